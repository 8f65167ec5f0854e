"""A run folder: recipe, delta, and the hashes of the base weights that the delta belongs to.

Input: a model with its recipe, transform and tokenizer. Output: a folder, and the model loaded back from it, bitwise.
Every file is written by ``data.atomic_files``, so a kill leaves the old file or the new one, and the delta, the
transform and the tokenizer have hashes that are checked when they are read. Note: the delta holds the trainable
parameters only, so a run needs its base weights, and refuses ones that differ in any tensor. Long: what is written and
what is checked when it is read stand together.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clasp.data.atomic_files import (
    PARTIAL_SUFFIX,
    append_json_lines,
    remove_partial_files,
    sync_file,
    sync_folder,
    translate_disk_errors,
    write_text_file,
)
from clasp.data.folder_lock import LOCK_FILE, require_unlocked
from clasp.data.images import ImageTransform
from clasp.data.tokenizer import Tokenizer
from clasp.errors import require_printable_path
from clasp.models.dual_encoder import DualEncoder
from clasp.models.tower import Tower
from clasp.training.cost import COST_FILE
from clasp.training.recipe_changes import describe_changes
from clasp.training.run_code import code_names, require_allowed
from clasp.training.run_files import STATE_FOLDER, require_run_folder
from clasp.training.state import TrainState
from clasp.training.state_files import StateFiles
from clasp.training.tensor_file import read_tensor_file, write_tensor_file
from clasp.types import UserError

_FORMAT = 1
_DELTA_FILE = "delta.safetensors"
RECIPE_HASH, RECIPE_SETTINGS = "recipe", "settings"  # in base.json
RUN_PLACEHOLDER = "{run}"  # the run's folder, in the towers of its recipe, so that a run can be moved
# what a run that never trained may have left; towers/ where the run includes its towers
_STARTED_FILES = ("recipe.toml", "transform.json", "tokenizer", "base.json", "log.jsonl", COST_FILE)
_APPENDED_FILES = ("log.jsonl", "results.jsonl")
_TRACKER_FILES = ("trackers.json", "tensorboard")
_INITIAL_FILES = (*_STARTED_FILES, *_TRACKER_FILES, "towers", "wandb", STATE_FOLDER, LOCK_FILE)
_log = logging.getLogger(__name__)


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
        self.require_held: Callable[[], None] = lambda: None
        """Raises ``UserError`` once the folder is no longer this process's, where it holds the lock."""

    # --- writing -------------------------------------------------------------------------------------------------

    @property
    def has_state(self) -> bool:
        """Whether a training state was saved, from which the run can be resumed."""
        return bool(StateFiles(self.path).paths)

    @property
    def has_only_first_state(self) -> bool:
        """Whether the run was resumable from its start only: one state, of before the first step."""
        try:
            return len(StateFiles(self.path).paths) == 1 and self.read_state().position.step == 0
        except UserError:  # it is damaged
            return False

    def require_available(self) -> None:
        """Raises ``UserError`` where another process writes this folder, and as ``require_free``."""
        require_unlocked(self.path)
        self.require_free()

    def require_free(self) -> None:
        """Raises ``UserError`` unless a run may start here: no folder, or a run that ended before it had trained."""
        require_printable_path(self.path)
        other = "choose another name (clasp train: --name; clasp demo: --out), or delete it"
        if self.has_state:
            raise UserError(
                f"{self.path} holds an interrupted run; resume it with: clasp resume {self.path}; or {other}"
            )
        if (self.path / _DELTA_FILE).exists():
            raise UserError(f"{self.path} holds a run already; {other}")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file; {other}")
        there = sorted(entry.name for entry in self.path.iterdir()) if self.path.exists() else []
        foreign = [name for name in there if name not in _INITIAL_FILES and not name.endswith(PARTIAL_SUFFIX)]
        if foreign:
            raise UserError(f"{self.path} holds something other than a run ({', '.join(foreign[:3])}); {other}")

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
        with self._writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            sync_folder(self.path.parent)
            self._remove_started_files()
            write_text_file(self.path / "recipe.toml", recipe_toml)
            write_text_file(self.path / "transform.json", json.dumps(transform.to_dict(), indent=2))
            tokenizer.save(self.path / "tokenizer")
            about = {tower.modality: self._base_entry(tower) for tower in (model.image, model.text)}
            base = {"format": _FORMAT, **about, "pairs": pairs, "files": self._preprocessing_hashes()}
            base[RECIPE_HASH] = hash_file(self.path / "recipe.toml")
            base[RECIPE_SETTINGS] = tomllib.loads(recipe_toml)
            write_text_file(self.path / "base.json", json.dumps(base, indent=1))

    def _base_entry(self, tower: Tower) -> dict[str, Any]:
        name = tower.name.replace(f"{self.path}/", f"{RUN_PLACEHOLDER}/")
        return {
            "tower": name,
            "version": tower.version,
            "fingerprint": tower.fingerprint,
            "tensors": tower.weight_hashes,
        }

    def _preprocessing_hashes(self) -> dict[str, str]:
        """The sha256 of the files that decide what the towers read: image transform and tokenizer."""
        files = [self.path / "transform.json", *sorted((self.path / "tokenizer").rglob("*"))]
        return {file.relative_to(self.path).as_posix(): hash_file(file) for file in files if file.is_file()}

    def _remove_started_files(self) -> None:
        for name in (*_STARTED_FILES, *_TRACKER_FILES):
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name, ignore_errors=True)
            else:
                (self.path / name).unlink(missing_ok=True)
        StateFiles(self.path).remove()

    def remove_partial_writes(self) -> None:
        """Delete what a killed process was writing; for the holder of the folder's lock."""
        for folder in (self.path, self.path / STATE_FOLDER):
            remove_partial_files(folder)

    def discard_start(self) -> None:
        """Delete the files of a start that failed before the first state was saved; other runs are left alone."""
        if (self.path / "recipe.toml").exists() and not self.has_state and not (self.path / _DELTA_FILE).exists():
            self._remove_started_files()

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        self.require_held()
        with translate_disk_errors(path):
            yield

    def save(self, model: DualEncoder) -> int:
        """Write the delta; returns its size in bytes."""
        with self._writing(self.path):
            write_tensor_file(self.path / _DELTA_FILE, model.delta(), {"format": str(_FORMAT)})
        return (self.path / _DELTA_FILE).stat().st_size

    def save_state(self, state: TrainState) -> None:
        """Write the training state that a bitwise resumption needs; ``state/`` is deleted when a run is finished."""
        with self._writing(self.path):
            StateFiles(self.path).write(state, self._identity())

    def keep_results(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The results of a run that has ended, as lines of ``results.jsonl``: ``rows``, or those of an end that was
        killed before its state was deleted."""
        with self._writing(self.path):
            return StateFiles(self.path).keep_results(rows)

    def finish(self) -> None:
        """Delete the training state of a finished run, once what was appended is on disk."""
        self.require_held()
        for name in _APPENDED_FILES:
            sync_file(self.path / name)
        StateFiles(self.path).remove()

    def append(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines to ``log.jsonl`` or ``results.jsonl``."""
        with self._writing(self.path):
            append_json_lines(self.path / name, rows)

    def write(self, name: str, text: str) -> None:
        """Write a text file of the run, such as its model card."""
        with self._writing(self.path):
            write_text_file(self.path / name, text)

    # --- reading -------------------------------------------------------------------------------------------------

    def recipe(self) -> dict[str, Any]:
        """The recipe as nested dictionaries, ``{run}`` replaced.

        Raises ``UserError`` when the folder is not a run, and for Python code that it names (``run_code``).
        """
        require_run_folder(self.path)
        given = self._read_recipe_file()
        require_allowed(code_names(given), self.path)
        return self.resolve_placeholder(given)

    def _read_recipe_file(self) -> dict[str, Any]:
        try:
            return tomllib.loads((self.path / "recipe.toml").read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
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
        recipe, base = self.recipe(), self.base()
        self._check_preprocessing(base.get("files"))
        if base.get(RECIPE_HASH) not in (None, hash_file(self.path / "recipe.toml")):
            known = "no key of it" if RECIPE_SETTINGS in base else "which keys was not recorded"
            changes = "; ".join(self._recipe_changes(base)) or known
            _log.warning("%s was changed since the run was saved: %s", self.path / "recipe.toml", changes)
        try:
            transform = ImageTransform.from_dict(json.loads((self.path / "transform.json").read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path} is damaged: {error}") from None
        return RunMetadata(recipe, transform, Tokenizer.from_folder(self.path / "tokenizer"), base)

    def _recipe_changes(self, base: Mapping[str, Any]) -> list[str]:
        """The keys of the recipe that were changed since the run was started; none of a run of an earlier clasp, whose
        ``base.json`` has no settings."""
        before = base.get(RECIPE_SETTINGS)
        return describe_changes(before, self._read_recipe_file()) if isinstance(before, dict) else []

    def base(self) -> dict[str, Any]:
        """``base.json``. Raises ``UserError`` where it is damaged."""
        path = self.path / "base.json"
        try:
            base = json.loads(path.read_text(encoding="utf-8-sig"))
            damaged = [side for side in ("image", "text") if not {"tower", "fingerprint", "tensors"} <= set(base[side])]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is damaged: {type(error).__name__}: {error}") from None
        if damaged:
            raise UserError(f"{path} is damaged: the entry of the {damaged[0]} tower is not whole")
        return base

    def _check_preprocessing(self, recorded: Mapping[str, str] | None) -> None:
        """Raises ``UserError`` unless image transform and tokenizer are those that were saved."""
        if recorded is None:
            _log.warning("%s was saved by an earlier clasp, without hashes of transform.json and tokenizer", self.path)
            return
        found = self._preprocessing_hashes()
        for name in sorted(set(recorded) | set(found)):
            if recorded.get(name) != found.get(name):
                what = "was added" if name not in recorded else "is missing" if name not in found else "was changed"
                raise UserError(f"{self.path / name} {what} since the run was saved; put the saved file back")

    def _identity(self) -> str:
        """A hash of what a training state belongs to: recipe (without trackers), base weights, pairs."""
        recipe, base = self._read_recipe_file(), self.base()
        recipe.get("train", {}).pop("trackers", None)
        bases = [base[side]["fingerprint"] for side in ("image", "text")]
        return hashlib.sha256(json.dumps([recipe, bases, base.get("pairs")], sort_keys=True).encode()).hexdigest()

    def require_same_bases(self, model: DualEncoder) -> None:
        """Raises ``UserError`` unless the towers of ``model`` have the base weights that this run was trained on."""
        base = self.base()
        for tower in (model.image, model.text):
            _require_same_weights(self.path, tower, base[tower.modality])

    def load_delta(self, model: DualEncoder) -> None:
        """Verify the base weights of ``model`` and load the delta into it; tensor names must match exactly.

        Raises ``UserError`` for other base weights, and for a delta that is missing, damaged or does not fit.
        """
        self.require_same_bases(model)
        path, tensors, parameters = self.path / _DELTA_FILE, self.read_delta(), model.delta()
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
        path = self.path / _DELTA_FILE
        if not path.exists():
            raise UserError(f"{self.path} was never trained: it has no {_DELTA_FILE}")
        return read_tensor_file(path).tensors

    def read_state(self) -> TrainState:
        """Read the newest whole state that ``save_state`` wrote. Raises ``UserError`` when there is none."""
        self.recipe()
        if self.has_state:
            if changes := self._recipe_changes(self.base()):
                raise UserError(
                    f"{self.path / 'recipe.toml'} was changed since the run was started: {'; '.join(changes)}; a run "
                    "goes on with its own recipe: put it back, or train with a new --name"
                )
            return StateFiles(self.path).read(self._identity())
        if (self.path / _DELTA_FILE).exists():
            raise UserError(f"{self.path} has no state/ to resume from; it is finished, or its state was deleted")
        raise UserError(
            f"{self.path} was stopped before its first state was saved, so there is nothing to resume; start it again "
            f"with clasp train and --name {self.path.name} (cached features are not computed twice)"
        )


def hash_file(path: Path) -> str:
    """The sha256 of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
