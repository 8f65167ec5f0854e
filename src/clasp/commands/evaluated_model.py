"""The model of ``clasp eval MODEL`` and ``clasp compare``: a run, another dual encoder, or embeddings in a folder.

Input: what was typed. Output: a ``ModelSource``, found and checked but not loaded, so that pairs and options are
checked first; ``load`` gives the encoder with its inputs. A folder is recognised by the first file of ``FOLDER_KINDS``
that it has. Note: nothing is written here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from clasp.config.build import ModelAndPreprocessing, build_feature_source, build_model_and_preprocessing, load
from clasp.config.pretrained import DUAL_ENCODER_SCHEMES, pretrained_recipe
from clasp.config.recipe import DataSettings, recipe_from_dict
from clasp.evaluation.embedding_folder import IMAGE_ARRAY, EmbeddingFolder, StoredEncoder
from clasp.evaluation.encode_once import EncodeOnce
from clasp.evaluation.task_context import LoadedModel, TrainedRun, TrainedTowers
from clasp.models.dual_encoder import DualEncoder
from clasp.models.zoo.hub_runs import RUN_SCHEME, fetch_run, is_hub_run
from clasp.training.run_folder import RunFolder
from clasp.types import ProgressFactory, UserError


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that was found: its ``name`` as typed, how it reads pairs, and how it is loaded.

    ``trained``: the run folder on this machine that its results belong to; ``None`` where they need another folder.
    ``reads_images``: whether it reads the images of pairs, and has not their embeddings.
    """

    name: str
    data: DataSettings
    load: Callable[[ProgressFactory], LoadedModel]
    trained: TrainedRun | None = None
    reads_images: bool = True

    @property
    def run(self) -> Path | None:
        """The folder of ``trained``."""
        return None if self.trained is None else self.trained.folder


def find_model(model: str | Path) -> ModelSource:
    """The model at a folder, at ``clip:``, ``open_clip:`` or ``hf:``. Raises ``UserError``."""
    name = str(model)
    scheme, colon, rest = name.partition(":")
    if colon and scheme in DUAL_ENCODER_SCHEMES:
        return _find_pretrained(name, name)
    if name.startswith(RUN_SCHEME):
        return _find_run(name, fetch_run(name)) if is_hub_run(name) else _find_pretrained(name, f"clip:{rest}")
    folder = Path(model)
    for file, find in FOLDER_KINDS.items():
        if (folder / file).is_file():
            return find(name, folder)
    if folder.is_dir() and not (folder / "base.json").exists():
        raise UserError(f"{folder} is not a model to evaluate: it has none of {', '.join(FOLDER_KINDS)}")
    return _find_run(name, folder)


def _find_run(name: str, folder: Path) -> ModelSource:
    recipe = recipe_from_dict(RunFolder(folder).recipe(), name)

    def load_run(bar: ProgressFactory) -> LoadedModel:
        model = load(folder)
        assert isinstance(model.encoder, DualEncoder)
        parts = ModelAndPreprocessing(model.encoder, model.transform, model.tokenizer)
        inputs = build_feature_source(parts, recipe, bar=bar)
        towers = TrainedTowers(parts.model, inputs)
        return LoadedModel(EncodeOnce(inputs.in_precision(model.encoder)), inputs, towers)

    return ModelSource(name, recipe.data, load_run, None if name.startswith(RUN_SCHEME) else TrainedRun(folder, recipe))


def _find_pretrained(name: str, tower: str) -> ModelSource:
    recipe = pretrained_recipe(tower)

    def load_pretrained(bar: ProgressFactory) -> LoadedModel:
        parts = build_model_and_preprocessing(recipe)
        parts.model.eval()
        inputs = build_feature_source(parts, recipe, bar=bar)
        return LoadedModel(EncodeOnce(inputs.in_precision(parts.model)), inputs)

    return ModelSource(name, recipe.data, load_pretrained)


def _find_embeddings(name: str, folder: Path) -> ModelSource:
    inputs = EmbeddingFolder(folder)

    def load_embeddings(bar: ProgressFactory) -> LoadedModel:
        return LoadedModel(StoredEncoder(inputs, name), inputs)

    return ModelSource(name, DataSettings(), load_embeddings, reads_images=False)


def _find_sentence_transformer(name: str, folder: Path) -> ModelSource:
    """The CLIP inside a SentenceTransformer: the folder of its first module."""
    try:
        first = json.loads((folder / "modules.json").read_text(encoding="utf-8"))[0]
        inside, kind = folder / str(first["path"]), str(first["type"]).rpartition(".")[2]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{folder / 'modules.json'} is damaged: {type(error).__name__}: {error}") from None
    if not (inside / "config.json").is_file():
        raise UserError(f"{folder} is a SentenceTransformer of {kind}, not a CLIP with both encoders")
    return _find_pretrained(name, f"clip:{inside}")


FOLDER_KINDS: dict[str, Callable[[str, Path], ModelSource]] = {
    "recipe.toml": _find_run,
    IMAGE_ARRAY: _find_embeddings,
    "open_clip_config.json": lambda name, folder: _find_pretrained(name, f"open_clip:{folder}"),
    "modules.json": _find_sentence_transformer,
    "config.json": lambda name, folder: _find_pretrained(name, f"clip:{folder}"),
}
"""A file that only a folder of this kind has, to how the model is found"""
