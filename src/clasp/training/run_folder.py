"""A run folder: recipe, delta, and the hashes of the base weights that the delta belongs to.

Input: a model with its recipe, transform and tokenizer. Output: a folder, and the model loaded back from it, bitwise.
Every file is written under a temporary name and renamed, so a kill leaves the old file or the new one. Note: the delta
holds the trainable parameters only, so a run needs its base weights, and refuses ones that differ in any tensor.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from clasp.data.images import ImageTransform
from clasp.data.tokenizer import Tokenizer
from clasp.models.dual_encoder import DualEncoder
from clasp.models.tower import Tower
from clasp.training.state import TrainState
from clasp.types import UserError

_FORMAT = 1
RUN_PLACEHOLDER = "{run}"  # the run's folder, in the towers of its recipe, so that a run can be moved
# files of a run before training; towers/ where the run includes its towers, tracker files where trackers are named
_INITIAL_FILES = ("recipe.toml", "transform.json", "tokenizer", "base.json", "log.jsonl", "towers")
_TRACKER_FILES = ("trackers.json", "tensorboard", "wandb")


@dataclass(frozen=True, slots=True)
class RunMetadata:
    """The metadata of a run folder, without weights."""

    recipe: dict[str, Any]
    transform: ImageTransform
    tokenizer: Tokenizer
    base: dict[str, Any]


class RunFolder:
    """One run folder; constructing the object does no input or output."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    # --- writing -------------------------------------------------------------------------------------------------

    def require_free(self) -> None:
        """Raises ``UserError`` unless a run may start here: no folder, or a run that ended before it had trained."""
        other = "choose another name with --name, or delete it"
        if (self.path / "state").exists():
            raise UserError(
                f"{self.path} holds an interrupted run; resume it with: clasp resume {self.path}; or {other}"
            )
        if (self.path / "delta.safetensors").exists():
            raise UserError(f"{self.path} holds a run already; {other}")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; {other}")
        there = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        foreign = [name for name in there if name.removesuffix(".part") not in (*_INITIAL_FILES, *_TRACKER_FILES)]
        if foreign:
            raise UserError(f"{self.path} holds something else than a run ({', '.join(foreign[:3])}); {other}")

    def start(
        self,
        recipe_toml: str,
        model: DualEncoder,
        transform: ImageTransform,
        tokenizer: Tokenizer,
        *,
        pairs: str | None,
    ) -> None:
        """Make the folder and write the files that training does not change; ``pairs``: the hash of the data, if known.

        Raises ``UserError`` for a folder that is taken. Files of a run that never trained are overwritten.
        """
        self.require_free()
        with translate_disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            for name in ("log.jsonl", "trackers.json"):
                (self.path / name).unlink(missing_ok=True)
            shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
            _write(self.path / "recipe.toml", recipe_toml)
            _write(self.path / "transform.json", json.dumps(transform.to_dict(), indent=2))
            tokenizer.save(self.path / "tokenizer")
            about = {tower.modality: self._base_entry(tower) for tower in (model.image, model.text)}
            base = {"format": _FORMAT, **about, "pairs": pairs}
            _write(self.path / "base.json", json.dumps(base, indent=1))

    def _base_entry(self, tower: Tower) -> dict[str, Any]:
        name = tower.name.replace(f"{self.path}/", f"{RUN_PLACEHOLDER}/")
        return {
            "tower": name,
            "version": tower.version,
            "fingerprint": tower.fingerprint,
            "tensors": tower.weight_hashes,
        }

    def save(self, model: DualEncoder) -> int:
        """Write the delta; returns its size in bytes."""
        with translate_disk_errors(self.path):
            _write_tensors(self.path / "delta.safetensors", model.delta(), {"format": str(_FORMAT)})
        return (self.path / "delta.safetensors").stat().st_size

    def save_state(self, state: TrainState) -> None:
        """Write the training state that a bitwise resumption needs; ``state/`` is deleted when a run is finished."""
        with translate_disk_errors(self.path):
            (self.path / "state").mkdir(exist_ok=True)
            # one file, so that a kill never pairs new tensors with an old position
            facts = {"facts": json.dumps(state.metadata())}
            _write_tensors(self.path / "state" / "state.safetensors", state.tensors(), facts)

    def finish(self) -> None:
        """Delete the training state of a finished run."""
        shutil.rmtree(self.path / "state", ignore_errors=True)

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to ``log.jsonl`` or ``results.jsonl``."""
        # a lone surrogate, from a file name that is not UTF-8, becomes the escape that JSON has for it
        with (
            translate_disk_errors(self.path),
            open(self.path / name, "a", encoding="utf-8", errors="backslashreplace") as file,
        ):
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def write(self, name: str, text: str) -> None:
        """Write a text file of the run, such as its model card."""
        with translate_disk_errors(self.path):
            _write(self.path / name, text)

    # --- reading -------------------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, Any]:
        """The recipe as nested dictionaries, ``{run}`` replaced. Raises ``UserError`` when the folder is not a run."""
        if not self.path.is_dir():
            raise UserError(f"no run at {self.path}: no such folder")
        needed = ("recipe.toml", "base.json", "transform.json", "tokenizer")
        missing = [name for name in needed if not (self.path / name).exists()]
        if missing:
            raise UserError(f"{self.path} is not a run folder: it has no {', '.join(missing)}")
        try:
            return self.resolve_placeholder(tomllib.loads((self.path / "recipe.toml").read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{self.path / 'recipe.toml'} is damaged: {error}") from None

    def resolve_placeholder(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """A recipe's sections with ``{run}`` in the towers replaced by this run's folder."""
        filled = dict(recipe)
        for side in ("image", "text"):
            match recipe.get(side):
                case {"tower": str(tower), **rest}:
                    filled[side] = {"tower": tower.replace(RUN_PLACEHOLDER, str(self.path)), **rest}
        return filled

    def read(self) -> RunMetadata:
        """Everything but tensors. Raises ``UserError`` when the folder is not a run."""
        recipe = self.recipe()
        try:
            base = json.loads((self.path / "base.json").read_text(encoding="utf-8"))
            transform = ImageTransform.from_dict(json.loads((self.path / "transform.json").read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{self.path} is damaged: {error}") from None
        return RunMetadata(recipe, transform, Tokenizer.from_folder(self.path / "tokenizer"), base)

    def require_same_bases(self, model: DualEncoder) -> None:
        """Raises ``UserError`` unless the towers of ``model`` have the base weights that this run was trained on."""
        base = json.loads((self.path / "base.json").read_text(encoding="utf-8"))
        for tower in (model.image, model.text):
            _require_same_weights(self.path, tower, base[tower.modality])

    def load_delta(self, model: DualEncoder) -> None:
        """Verify the base weights of ``model`` and load the delta into it; tensor names must match exactly.

        Raises ``UserError`` for other base weights, and for a delta that is missing, damaged or does not fit.
        """
        self.require_same_bases(model)
        path, tensors, parameters = self.path / "delta.safetensors", self.read_delta(), model.delta()
        mismatched = sorted(set(tensors) ^ set(parameters))
        if mismatched:
            raise UserError(
                f"{path} does not fit its recipe: {mismatched[0]} and {len(mismatched) - 1} more are on one side only"
            )
        with torch.no_grad():
            for name, tensor in parameters.items():
                if tensors[name].shape != tensor.shape:
                    raise UserError(
                        f"{path}: {name} is {tuple(tensors[name].shape)}, the model has {tuple(tensor.shape)}"
                    )
                tensor.copy_(tensors[name])

    def read_delta(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name. Raises ``UserError`` where the delta is missing or damaged."""
        path = self.path / "delta.safetensors"
        if not path.exists():
            raise UserError(f"{self.path} was never trained: it has no delta.safetensors")
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from None

    def read_state(self) -> TrainState:
        """Read what ``save_state`` wrote. Raises ``UserError`` when it is missing or damaged."""
        self.recipe()
        path = self.path / "state" / "state.safetensors"
        if not path.exists():
            raise UserError(f"{self.path} has no state/ to resume from; it is finished, or its state was deleted")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                return TrainState.from_tensors(json.loads(file.metadata()["facts"]), tensors)
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} is damaged: {error}") from None


def _require_same_weights(run: Path, tower: Tower, recorded: dict[str, Any]) -> None:
    if tower.fingerprint == recorded["fingerprint"]:
        return
    names = sorted(set(tower.weight_hashes) | set(recorded["tensors"]))
    differ = [name for name in names if tower.weight_hashes.get(name) != recorded["tensors"].get(name)]
    first = (
        f"{differ[0]} is {tower.weight_hashes.get(differ[0])}, was {recorded['tensors'].get(differ[0])}"
        if differ
        else "pooling"
    )
    raise UserError(
        f"{run} was trained on other weights of the {tower.modality} tower {recorded['tower']} "
        f"({recorded['version']}): {len(differ)} of {len(names)} tensors differ ({first}); "
        f"fingerprint {tower.fingerprint[:12]}, was {recorded['fingerprint'][:12]}"
    )


def _write(path: Path, text: str) -> None:
    with _atomic_write(path) as part:
        part.write_text(text, encoding="utf-8")


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    rows = {name: tensor.contiguous() for name, tensor in tensors.items()}  # those of a CNN are channels-last
    with _atomic_write(path) as part:
        safetensors.torch.save_file(rows, part, metadata)


@contextmanager
def _atomic_write(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that replaces it on success."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def translate_disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a path that cannot be written into a ``UserError``; earlier files stay."""
    try:
        yield
    except Exception as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        # safetensors and tokenizers hide the operating system's error in their text
        if full or "No space left" in str(error):
            raise UserError(f"no space left to write {path}; nothing saved before is lost") from None
        if isinstance(error, PermissionError | FileExistsError | NotADirectoryError):
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        raise
