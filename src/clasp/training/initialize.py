"""Data-dependent initialisation: of the heads, and of low-rank updates with ``init="gradient"``.

Input: an untrained model and its training pairs. Output: none; parameters are changed in place before the first step.
Heads get the mean and standard deviation of the pooled features and, with ``init = "cca"``, the closed-form CCA map;
low-rank updates get the directions of the gradient. Note: a resumed run must not be initialised again.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clasp.data.loader import BadSampleLimit, BatchReader, PairLoader
from clasp.data.readers import PairIndex
from clasp.models.dual_encoder import DualEncoder
from clasp.models.head_settings import HeadSettings
from clasp.models.precision import resolve_precision
from clasp.models.standardize import Standardize
from clasp.models.tuning.peft_methods import initialize_lora_from_gradient, wrapped_weight_name
from clasp.models.tuning.settings import TuneSettings
from clasp.models.tuning.spec import freeze_except, gradient_initialized_layers
from clasp.training import grad_cache
from clasp.training.cca import cca
from clasp.training.class_pairs import ClassPairFeatures
from clasp.training.moments import PairMoments, combine_moments
from clasp.training.pooled_features import PairFeatures
from clasp.training.settings import TrainSettings
from clasp.training.step import seed_generators, step_seed
from clasp.types import Batch, Loss, UserError

# captions, with their images, that mean and deviation are estimated on; reading cached features costs little
_MAX_CAPTIONS_CACHED, _MAX_CAPTIONS_LIVE = 65_536, 2_048
GRADIENT_BATCHES = 4  # batches of the gradient that initialises low-rank updates; costs as much as that many steps


def initialize_heads(
    model: DualEncoder,
    sides: BatchReader,
    settings: HeadSettings,
    tally: BadSampleLimit,
    classes: ClassPairFeatures | None = None,
) -> None:
    """Initialise standardisation and, with ``init = "cca"``, the linear maps of the heads from the training pairs.

    ``sides`` read the images without augmentation, and their pairs are a ``PairIndex``; unreadable images are counted
    in ``tally``. ``classes``: class pairs, which count in the closed form beside the training pairs.
    """
    image, text = model.image_head.standardize, model.text_head.standardize
    if image is None or text is None:
        return
    assert isinstance(sides.pairs, PairIndex)
    pooled = PairFeatures(model, sides, sides.pairs, tally)
    _fit_standardize((image, text), pooled, sides.pairs)
    if settings.init == "cca":
        moments = standardized_moments(model, sides, tally)
        weighted = None
        if classes is not None:
            of_classes = classes.moments(image, text, moments, settings.ridge[0])
            weighted = of_classes, classes.classes.total_weight
        source = closed_form_source(moments, len(sides.pairs), weighted)
        rows = int(moments.weight) if weighted is None else None
        powers = settings.correlation_power
        maps = cca(source.moments, settings.width, ridge=settings.ridge, powers=powers, rows=rows)
        image_mean = source.image_mean
        if settings.mean_shrinkage is not None:
            image_mean = image_mean + image.shrunk_mean(settings.mean_shrinkage)
        centres = (model.image_head, maps.image, image_mean), (model.text_head, maps.text, source.text_mean)
        with torch.no_grad():
            for head, weight, mean in centres:
                assert isinstance(head.map, nn.Linear)
                head.map.weight.copy_(weight)
                head.map.bias.copy_(-(weight @ mean))


def standardize_of_pairs(
    model: DualEncoder, sides: BatchReader, tally: BadSampleLimit
) -> tuple[Standardize, Standardize]:
    """The standardisation (image, text) that ``initialize_heads`` starts the heads with, whatever they have now."""
    assert isinstance(sides.pairs, PairIndex)
    assert model.image_head.standardize is not None and model.text_head.standardize is not None
    made = deepcopy(model.image_head.standardize), deepcopy(model.text_head.standardize)
    _fit_standardize(made, PairFeatures(model, sides, sides.pairs, tally), sides.pairs)
    return made


@torch.no_grad()
def _fit_standardize(both: tuple[Standardize, Standardize], pooled: PairFeatures, index: PairIndex) -> None:
    most = _MAX_CAPTIONS_CACHED if pooled.cached else _MAX_CAPTIONS_LIVE
    images, counts, texts = [], [], []
    for part in pooled.every_image(_evenly_spaced(index, most)):
        images.append(part.images)
        counts.append(part.counts)
        texts += [text for _, text in part.captions]
    if not images:
        named = ", ".join(f"{name} ({reason})" for name, reason in list(pooled.tally.found.items())[:10])
        raise UserError(f"none of the images that the heads are initialised from can be read: {named}")
    both[0].fit(torch.cat(images), torch.from_numpy(np.concatenate(counts)))
    both[1].fit(torch.cat(texts))


@dataclass(frozen=True)
class ClosedFormSource:
    """What the closed form is solved for: moments, and the means of the standardised features that heads subtract."""

    moments: PairMoments
    image_mean: Float[Tensor, " Di"]
    text_mean: Float[Tensor, " Dt"]


def closed_form_source(moments: PairMoments, pairs: int, classes: tuple[PairMoments, float] | None) -> ClosedFormSource:
    """The moments of training pairs, and those of class pairs with their total weight in pairs, as one source.

    Without class pairs these are the moments about zero, the mean that standardisation has set. With them each source
    is centred on its own mean. Weight vectors have no mean of their own: the image side takes that of the training
    pairs, the text side the weighted mean of captions and class names.
    """
    if classes is None:
        return ClosedFormSource(
            moments, torch.zeros_like(moments.image).float(), torch.zeros_like(moments.text).float()
        )
    of_classes, weight = classes
    share = weight / (weight + pairs)
    text = (1 - share) * moments.text / moments.weight + share * of_classes.text / of_classes.weight
    combined = combine_moments([(moments, float(pairs)), (of_classes, weight)])
    return ClosedFormSource(combined, (moments.image / moments.weight).float(), text.float())


@torch.no_grad()
def standardized_moments(model: DualEncoder, sides: BatchReader, tally: BadSampleLimit) -> PairMoments:
    """The moments of every caption with its image, standardised as the heads of ``model`` do."""
    image, text = model.image_head.standardize, model.text_head.standardize
    assert image is not None and text is not None and isinstance(sides.pairs, PairIndex)
    pooled = PairFeatures(model, sides, sides.pairs, tally)
    moments = PairMoments.empty(len(image.scale), len(text.scale), image.scale.device)
    for part in pooled.every_image(np.arange(len(sides.pairs))):
        texts = ((rows, text(values)) for rows, values in part.captions)
        moments.add_captions(image(part.images), torch.from_numpy(part.counts).to(image.scale.device), texts)
    return moments


def initialize_low_rank(
    model: DualEncoder, batches: PairLoader, loss: Loss, tuned: TuneSettings, settings: TrainSettings
) -> None:
    """Initialise low-rank updates with ``init="gradient"`` along the gradient of the weights that they update.

    The gradient is that of the training loss over the first batches of the first epoch, with gradient caching where
    those do not fit in memory; it is taken with respect to the wrapped base weights, which do not change. See
    ``initialize_lora_from_gradient``. A layer without gradient keeps its random initialisation.
    Raises ``UserError`` where a gradient is not finite.
    """
    names = {id(p): name for name, p in model.named_parameters()}  # one name for parameters that both towers share
    layers = {
        names[id(tower.net.get_parameter(wrapped_weight_name(path)))]: (tower.net, path)
        for tower, specs in ((model.image, tuned.image), (model.text, tuned.text))
        for path in gradient_initialized_layers(tower.net, specs)
    }
    if not layers:
        return
    for name, gradient in _gradients(model, layers, batches, loss, settings).items():
        initialize_lora_from_gradient(*layers[name], gradient)


def _gradients(
    model: DualEncoder, names: Iterable[str], batches: PairLoader, loss: Loss, settings: TrainSettings
) -> dict[str, Tensor]:
    """The gradient of otherwise frozen parameters, summed over ``GRADIENT_BATCHES`` batches."""
    device = next(model.parameters()).device

    def seed(side: grad_cache.Modality, piece: int) -> None:
        seed_generators(step_seed(settings.seed, 0, "start", side, piece), device)

    embedder = grad_cache.MicroBatchEmbedder(
        model, device, resolve_precision(settings.precision, device).precision, seed
    )
    micro_batch = None if settings.micro_batch == "auto" else settings.micro_batch
    selection, targets = model.selection, {name: model.get_parameter(name) for name in names}
    freeze_except(model, targets)
    model.train()
    try:
        with_negatives = (batch for batch in batches.epoch(0) if len(batch.ids) > 1)
        for batch in islice(with_negatives, GRADIENT_BATCHES):
            micro_batch = micro_batch or _choose_micro_batch(embedder, batch)
            grad_cache.backward_in_micro_batches(embedder, batch, loss, micro_batch)
        found = {name: p.grad for name, p in targets.items() if p.grad is not None}
    finally:
        for p in targets.values():
            p.grad = None
        model.select(selection)
        model.train(False)
    for name, gradient in found.items():
        if not gradient.isfinite().all():
            raise UserError(
                f"the gradient for init='gradient' is not finite at {name}; try train.precision=float32, or "
                "init='random'"
            )
    return found


def _choose_micro_batch(embedder: grad_cache.MicroBatchEmbedder, batch: Batch) -> int:
    return grad_cache.choose_micro_batch(embedder, batch, len(batch.ids)).micro_batch


def _evenly_spaced(index: PairIndex, most: int) -> Int[np.ndarray, " n"]:
    """Evenly spaced pair numbers, with at most about ``most`` captions in all."""
    count = max(1, min(len(index), most * len(index) // int(index.caption_offsets[-1])))
    return np.unique(np.linspace(0, len(index) - 1, count).astype(np.int64))
