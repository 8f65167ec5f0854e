"""``clasp analyze``: geometry of a run's embedding space, and similarity of the layers of its towers.

Input: run and options as typed. Output: an ``AnalysisRecord``, which is also kept in the run's ``analysis.json``. Note:
every pair has a caption and a group of its own, so that images with the captions of other pairs are true non-pairs; of
more than ``pairs=`` a hash of the ids chooses. Both towers run once, on live inputs, since cached states begin at a
later block; over the first of the pairs, whose order is drawn, once more where their attention can be read, and where
they share weights.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from clasp.analysis.attention_roles import AttentionAgreement, attention_agreement, head_roles
from clasp.analysis.embedding_geometry import embedding_geometry
from clasp.analysis.gradient_agreement import GradientAgreement, gradient_agreement, shared_parameters
from clasp.analysis.layer_similarity import layer_similarity
from clasp.analysis.modality_clusters import modality_clusters
from clasp.analysis.record import ANALYSIS_FILE, AnalysisRecord, analyses_json, read_analyses
from clasp.analysis.tower_features import TowerFeatures, extract_tower_features
from clasp.commands.training_overlap import training_overlap
from clasp.config.build import ModelAndPreprocessing, build_feature_source, load
from clasp.config.datasets import open_pairs_for_recipe
from clasp.config.recipe import Recipe, recipe_from_dict
from clasp.data.device import to_device
from clasp.data.formats.setting_hints import OPTION_HINTS
from clasp.data.missing_images import require_images
from clasp.data.pairs import ColumnNames, Pairs, caption_languages
from clasp.data.readers import PairIndex, SampleIndices
from clasp.evaluation.language_sets import require_languages
from clasp.evaluation.options import ANALYZE_OPTIONS, MAX_ANALYZED_PAIRS, MAX_NEIGHBOURS, PAIR_OPTIONS, parse_options
from clasp.evaluation.retention.features import hashed_subset
from clasp.models.dual_encoder import DualEncoder
from clasp.models.features import FeatureSource
from clasp.training.losses import build_loss
from clasp.training.run_folder import RunFolder
from clasp.training.unfinished import unfinished_lines
from clasp.types import MessageCallback, PooledFeatures, ProgressFactory, UserError, no_progress_bar

_ATTENDED = 200  # pairs whose attention is read
_BATCH = 64  # pairs of the batch whose gradients are compared


def analyze_run(
    run: str | Path,
    options: Sequence[str] = (),
    *,
    say: MessageCallback = lambda line: None,
    bar: ProgressFactory = no_progress_bar,
) -> AnalysisRecord:
    """Analyse a run on pairs; ``options`` are ``key=value`` of ``ANALYZE_OPTIONS``. Raises ``UserError``."""
    started, folder = time.perf_counter(), RunFolder(run)
    given = parse_options("analyze", ANALYZE_OPTIONS, options)
    limit, neighbours = _count(given, "pairs", MAX_ANALYZED_PAIRS), _count(given, "neighbours", MAX_NEIGHBOURS)
    recipe = recipe_from_dict(folder.recipe(), str(run)).with_overrides(["data.feature_cache=off"])
    earlier = read_analyses(folder.path)
    captions, pairs = _choose_pairs(given, recipe, limit)
    if limit <= neighbours:
        raise UserError(f"analyze: pairs={limit} must be more than neighbours={neighbours}")
    _require_more_than(neighbours, len(pairs), f"pairs with a caption and a group of their own in {given['data']}")
    model = load(run)
    assert isinstance(model.encoder, DualEncoder)
    parts = ModelAndPreprocessing(model.encoder, model.transform, model.tokenizer)
    inputs = build_feature_source(parts, recipe, bar=bar)
    image, text = _extract(parts.model, inputs, captions, pairs, bar)
    _require_more_than(neighbours, len(image.ids), f"images of {given['data']} that could be read")
    rows = [text.ids.index(id) for id in image.ids]  # an unreadable image is left out on both sides
    device = next(model.encoder.parameters()).device
    gradients = _gradients(parts.model, recipe, inputs, captions, pairs[:_BATCH])
    with torch.inference_mode():
        joint_image = model.encoder.embed_image(PooledFeatures(image.pooled.to(device))).cpu()
        joint_text = model.encoder.embed_text(PooledFeatures(text.pooled[rows].to(device))).cpu()
        layers = layer_similarity({0: joint_image}, {0: joint_text}, neighbours=neighbours)
        of_texts = {block: states[rows] for block, states in text.block_means.items()}
        layers += layer_similarity(image.block_means, of_texts, neighbours=neighbours)
        record = AnalysisRecord(
            data=given["data"],
            language=given.get("language", ""),
            reading={option.name: given[option.name] for option in PAIR_OPTIONS[1:] if option.name in given},
            pairs=len(image.ids),
            neighbours=neighbours,
            logit_scale=float(model.encoder.scale_and_bias()[0]),
            geometry=embedding_geometry(joint_image, joint_text),
            layers=layers,
            clusters=modality_clusters({0: joint_image, **image.block_means}, {0: joint_text, **of_texts}),
            attention=_attention(parts.model, inputs, captions, pairs[:_ATTENDED]),
            gradients=gradients,
            seconds=time.perf_counter() - started,
        )
    folder.write(ANALYSIS_FILE, analyses_json([*earlier, record]))
    for line in (*unfinished_lines(folder.path), *training_overlap(folder.path, str(run), {"": pairs})):
        say(line)
    return record


# --- how -------------------------------------------------------------------------------------------------------------


def _choose_pairs(given: Mapping[str, str], recipe: Recipe, limit: int) -> tuple[dict[str, str], Pairs]:
    """The captions by id, and the pairs: of those with the same caption or group the first, of more than ``limit`` by a
    hash of the id, in an order that is drawn with seed 0."""
    columns = ColumnNames(image=given.get("image", ""), caption=given.get("caption", ""))
    root = given.get("image_root")
    pairs = open_pairs_for_recipe(given["data"], recipe, columns=columns, image_root=root, hints=OPTION_HINTS)
    require_images(OPTION_HINTS, pairs)
    language = given.get("language", "")
    if language:
        require_languages([language], caption_languages(pairs), given["data"])
    rows: dict[str, tuple[int, str]] = {}
    seen: set[tuple[str, str]] = set()
    for row, pair in enumerate(pairs):
        text = next((each.text for each in pair.captions if language in ("", each.language)), None)
        if text is not None and not {("text", text), ("group", pair.group)} & seen:
            seen |= {("text", text), ("group", pair.group)}
            rows[pair.id] = (row, text)
    chosen = sorted(hashed_subset(rows, limit))
    random.Random(0).shuffle(chosen)
    return {id: rows[id][1] for id in chosen}, Pairs(pairs.name, [[pairs[rows[id][0]] for id in chosen]])


def _extract(
    model: DualEncoder, inputs: FeatureSource, captions: Mapping[str, str], pairs: Pairs, bar: ProgressFactory
) -> tuple[TowerFeatures, TowerFeatures]:
    """Pooled features and mean states of every block, of the images and of their captions."""
    with bar(f"{model.image.name}: images") as progress:
        stream = inputs.images(pairs)()
        image = extract_tower_features(model.image, stream, captions, lambda done: progress(done, len(pairs)))
    with bar(f"{model.text.name}: captions") as progress:
        texts = inputs.texts(captions)()
        text = extract_tower_features(model.text, texts, captions, lambda done: progress(done, len(pairs)))
    assert image.block_ids == image.ids and text.block_ids == text.ids
    return image, text


def _attention(
    model: DualEncoder, inputs: FeatureSource, captions: Mapping[str, str], pairs: Pairs
) -> AttentionAgreement | None:
    """The agreement of heads on these pairs; the texts are read only where the images have native attention."""
    of_images = head_roles(model.image, inputs.images(pairs)())
    if not of_images:
        return None
    return attention_agreement(of_images, head_roles(model.text, inputs.texts({p.id: captions[p.id] for p in pairs})()))


def _gradients(
    model: DualEncoder, recipe: Recipe, inputs: FeatureSource, captions: Mapping[str, str], pairs: Pairs
) -> list[GradientAgreement]:
    """The agreement of both towers' gradients on one batch of these pairs; empty where they share no weights."""
    if not shared_parameters(model):
        return []
    draws = [[each.text for each in pair.captions].index(captions[pair.id]) for pair in pairs]
    indices = SampleIndices(np.arange(len(pairs)), np.array(draws), np.zeros(len(pairs), dtype=np.int64))
    batch = inputs.batch_reader(pairs, PairIndex(pairs), None)(indices)
    device = next(model.parameters()).device
    batch = replace(batch, image=to_device(batch.image, device), text=to_device(batch.text, device))
    return gradient_agreement(model, batch, build_loss(recipe.loss))


def _count(given: Mapping[str, str], name: str, highest: int) -> int:
    text = given[name]
    if not (text.isdecimal() and 1 <= int(text) <= highest):
        raise UserError(f"analyze: {name}={text} must be a whole number from 1 to {highest:,}")
    return int(text)


def _require_more_than(neighbours: int, count: int, what: str) -> None:
    """A nearest neighbour is another pair than one's own."""
    if count <= neighbours:
        raise UserError(
            f"analyze needs more than neighbours={neighbours} {what}, and has {count:,}: name more, or fewer neighbours"
        )
