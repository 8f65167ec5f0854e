"""The model that an index is searched with: that of a run, by torch, or its graphs exported to ONNX, without torch.

Input: a run folder or the output of ``clasp export RUN --to onnx``, and an engine of ``ENGINES``. Output: a function
that loads the ``SearchModel``; what can be wrong with the folder is found before. Note: torch, and what imports it, is
imported for runs alone, since an exported model is served where there is none.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from clasp.convert.onnx_model import MANIFEST_FILE, OnnxModel, WeightFormat
from clasp.data.cache_folder import cache_folder
from clasp.data.formats.setting_hints import FIXED_HINTS
from clasp.data.missing_images import require_images
from clasp.data.pairs import FolderImages, Pairs, list_images, open_pairs
from clasp.plain_types import SearchModel, UserError
from clasp.training.run_files import require_run_folder

ModelLoader = Callable[[], SearchModel]


def is_export(folder: Path) -> bool:
    """Whether the folder is an output of ``clasp export --to onnx``."""
    return (folder / MANIFEST_FILE).is_file()


def find_search_model(folder: Path, engine: str | None = None) -> ModelLoader:
    """The function that loads the model of a folder; ``engine`` is by default that of the folder.

    ``UserError`` for an unknown engine, a folder that is not of it, and packages that are missing.
    """
    if engine is not None and engine not in ENGINES:
        raise UserError(f"--engine {engine} is not an engine of a model; there are {', '.join(ENGINES)}")
    return ENGINES[engine or ("onnx" if is_export(folder) else "torch")](folder)


def open_images(folder: Path, source: str) -> FolderImages | Pairs:
    """The images of a folder, or pairs: in the columns that the run in ``folder`` was trained with, or the usual ones
    for an exported model."""
    if Path(source).is_dir():
        return list_images(source)
    if is_export(folder):
        return _with_images(open_pairs(source, cache=cache_folder() / "pairs", hints=FIXED_HINTS))
    _require_torch(folder, "the recipe")
    from clasp.config.datasets import open_pairs_for_recipe
    from clasp.config.recipe import recipe_from_dict
    from clasp.training.run_folder import RunFolder

    recipe = recipe_from_dict(RunFolder(folder).recipe(), str(folder))
    return _with_images(open_pairs_for_recipe(source, recipe, hints=FIXED_HINTS))


def _with_images(pairs: Pairs) -> Pairs:
    require_images(FIXED_HINTS, pairs)
    return pairs


def _find_run(folder: Path) -> ModelLoader:
    if is_export(folder):
        raise UserError(f"--engine torch is for run folders, and {folder} is an export; leave --engine out")
    _require_torch(folder, "the model")
    require_run_folder(folder)

    def load_run() -> SearchModel:
        from clasp.config.build import load

        return load(folder)

    return load_run


def _find_export(folder: Path, weights: WeightFormat) -> ModelLoader:
    if find_spec("onnxruntime") is None:
        raise UserError("--engine onnx needs onnxruntime; type: pip install 'clasp-vl[onnx]'")
    if not is_export(folder):
        raise UserError(f"{folder} is not an ONNX export; type: clasp export RUN --to onnx -o OUT, and name OUT")
    threads = os.environ.get("OMP_NUM_THREADS", "")  # which torch follows too
    model = OnnxModel(folder, weights=weights, threads=int(threads) if threads.isdecimal() else None)
    return lambda: model


def _require_torch(folder: Path, what: str) -> None:
    if find_spec("torch") is None:
        raise UserError(
            f"{what} of {folder} needs torch, which is not installed; an export does not: "
            "clasp export RUN --to onnx -o OUT"
        )


ENGINES: dict[str, Callable[[Path], ModelLoader]] = {
    "torch": _find_run,
    "onnx": lambda folder: _find_export(folder, "float32"),
    "onnx-int8": lambda folder: _find_export(folder, "int8"),
}
"""Engine to the function that finds its model in a folder"""
