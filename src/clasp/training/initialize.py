"""Data-dependent initialisation: of the heads, and of low-rank updates with ``init="gradient"``.

Input: an untrained model and its training pairs. Output: none; parameters are changed in place before the first step.
Heads get the mean and standard deviation of the pooled features and, with ``init = "cca"``, the closed-form CCA map;
low-rank updates get the directions of the gradient. Note: a resumed run must not be initialised again.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from clasp.data.loader import BadSampleLimit, BatchReader, PairLoader
from clasp.data.readers import PairIndex
from clasp.models.dual_encoder import DualEncoder, HeadSettings
from clasp.models.tuning.peft_methods import initialize_lora_from_gradient, wrapped_weight_name
from clasp.models.tuning.settings import TuneSettings
from clasp.models.tuning.spec import freeze_except, gradient_initialized_layers
from clasp.training import grad_cache
from clasp.training.cca import cca
from clasp.training.class_pairs import ClassPairFeatures
from clasp.training.moments import PairMoments, combine_moments
from clasp.training.pooled_features import PairFeatures
from clasp.training.precision import resolve_precision
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
    most = _MAX_CAPTIONS_CACHED if pooled.cached else _MAX_CAPTIONS_LIVE
    some = zip(*pooled.every_caption(_evenly_spaced(sides.pairs, most)), strict=True)
    for standardize, parts in zip((image, text), some, strict=True):
        standardize.fit(torch.cat(parts))
    if settings.init == "cca":
        with torch.no_grad():
            whole = np.arange(len(sides.pairs))
            every = ((image(images), text(texts)) for images, texts in pooled.every_caption(whole))
            _set_closed_form(model, settings, PairMoments.of(every), len(whole), classes)


def _set_closed_form(
    model: DualEncoder, settings: HeadSettings, moments: PairMoments, pairs: int, classes: ClassPairFeatures | None
) -> None:
    """Set both linear maps to the CCA of the training pairs, and of class pairs where there are any.

    With class pairs each source is centred on its own mean, and the heads' bias takes the weighted mean of both.
    """
    image, text = model.image_head.standardize, model.text_head.standardize
    assert image is not None and text is not None
    means = torch.zeros_like(moments.image), torch.zeros_like(moments.text)
    if classes is not None:
        of_classes = classes.moments(image, text, moments, settings.ridge[0])
        weight = classes.classes.total_weight
        share = weight / (weight + pairs)
        # weight vectors have no mean of their own: on the image side it is that of the training pairs
        means = (
            moments.image / moments.weight,
            (1 - share) * moments.text / moments.weight + share * of_classes.text / of_classes.weight,
        )
        moments = combine_moments([(moments, float(pairs)), (of_classes, weight)])
    maps = cca(moments, settings.width, ridge=settings.ridge)
    for head, weight, mean in zip((model.image_head, model.text_head), (maps.image, maps.text), means, strict=True):
        assert isinstance(head.map, nn.Linear)
        head.map.weight.copy_(weight)
        head.map.bias.copy_(-(weight @ mean.float()))


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
