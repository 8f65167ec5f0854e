"""The dual encoder: two towers, two projection heads, the logit scale and the logit bias.

Input: a ``Batch`` (pixels and tokens, or cached features of frozen towers). Output: L2-normalised embeddings ``[B E]``
in one space. Note: the towers may share weights. A shared weight is one parameter, under its first name
(``clasp.models.sharing.tie.parameter_aliases``), and is counted, trained and saved once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from clasp.models.head_settings import HeadSettings
from clasp.models.heads import ProjectionHead, to_unit_length
from clasp.models.logit_settings import LogitSettings
from clasp.models.pretrained_heads import find_pretrained_heads, warn_of_unused_heads
from clasp.models.sharing.policy import SharingPlan
from clasp.models.sharing.tie import LowRankLinear, parameter_aliases
from clasp.models.standardize import ClassProbabilities, FeatureLayout, Standardize
from clasp.models.structure import is_norm
from clasp.models.tower import Tower
from clasp.models.tuning.spec import freeze_except
from clasp.models.weight_hashes import hash_tensors
from clasp.types import Batch, Embeddings, ImageInput, Pixels, PooledFeatures, TextInput, Tokens, UserError

ParameterKind = Literal["scale", "head", "norm", "new", "tower", "shared"]


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Parameter counts of one part, and the bytes of its trainable parameters in a delta."""

    total: int
    trained: int
    delta_bytes: int

    @property
    def percent(self) -> float:
        """Trainable parameters of the part, in per cent of its total."""
        return 100 * self.trained / self.total if self.total else 0.0


class DualEncoder(nn.Module):
    """Two towers with projection heads into one embedding space; an ``Encoder``.

    ``selection`` is the set of names of the trainable parameters: it alone determines which parameters get gradients,
    are optimised, are saved in the delta and are counted as trained. ``init_logit_bias`` is the initial logit bias;
    ``None``: the logits have none.
    """

    image_head: ProjectionHead
    text_head: ProjectionHead
    log_scale: nn.Parameter | None
    temperature: nn.Parameter | None

    def __init__(
        self,
        image: Tower,
        text: Tower,
        head: HeadSettings,
        *,
        seed: int,
        logits: LogitSettings | None = None,
        init_logit_bias: float | None = None,
    ):
        super().__init__()
        self.name = f"{image.name} + {text.name}"
        self.image, self.text = image, text
        device = next(image.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for side, tower, power in (("image", image, head.power[0]), ("text", text, head.power[1])):
                made = ProjectionHead(tower.width, head, _standardize(tower, head, power)).to(device)
                self.add_module(f"{side}_head", made)
        logits = logits or LogitSettings()
        start, *limits = (
            _scale_to_parameter(logits.scale, scale) for scale in (logits.init_logit_scale, *logits.scale_range)
        )
        scale = nn.Parameter(torch.tensor(start, device=device))
        self.log_scale, self.temperature = (scale, None) if logits.scale == "log" else (None, scale)
        self._limits = sorted(limits)  # of that parameter; a temperature is the reciprocal of its scale
        self.bias: nn.Parameter | None = None
        if init_logit_bias is not None:
            self.bias = nn.Parameter(torch.tensor(float(init_logit_bias), device=device))
        if head.init == "pretrained":
            self._start_from_checkpoint(head, logits)
        elif head.init == "random":
            warn_of_unused_heads(image, text)
        self.sharing: SharingPlan | None = None  # for reports only; weight sharing is read from the parameters
        self.selection: frozenset[str] = frozenset()
        self.select(())

    @torch.no_grad()
    def _start_from_checkpoint(self, settings: HeadSettings, logits: LogitSettings) -> None:
        """Heads, logit scale and logit bias of the dual encoder that the towers are halves of."""
        pretrained = find_pretrained_heads(self.image, self.text, settings)
        for head, found in ((self.image_head, pretrained.image), (self.text_head, pretrained.text)):
            if found is not None:
                head.copy_projection(found.weight)
        scale = pretrained.logit_scale(logits.scale_range)
        for parameter in (self.log_scale, self.temperature):
            if scale is not None and parameter is not None:
                parameter.fill_(_scale_to_parameter(logits.scale, scale))
        if self.bias is not None and pretrained.logit_bias is not None:
            self.bias.copy_(pretrained.logit_bias)

    def select(self, names: Iterable[str]) -> None:
        """Make ``names`` the selection and freeze the rest; a shared parameter may be given by any of its names."""
        first = parameter_aliases(self)
        self.selection = frozenset(first.get(name, name) for name in names)
        freeze_except(self, self.selection)

    def freeze(self) -> None:
        """Freeze all; a tower that trained ``was_tuned``: its features are not those of its base weights."""
        towers = (self.image, self.text)
        for tower in towers:  # both before either is frozen: they may share parameters
            tower.was_tuned = tower.was_tuned or not tower.fully_frozen
        self.requires_grad_(False)

    @property
    def shared_parameter_names(self) -> set[str]:
        """First names of the parameters that the two towers share; not those tied within one tower, as in T5."""
        return {
            first for name, first in parameter_aliases(self).items() if (name[:5], first[:6]) == ("text.", "image.")
        }

    @property
    def new_parameter_names(self) -> dict[str, set[str]]:
        """Parameters outside the backbones: the heads (with a learned pooling), and the logit scale and bias."""
        heads = ("image_head.", "text_head.", "image.pooling.", "text.pooling.")
        names = [name for name, _ in self.named_parameters()]
        return {
            "heads": {name for name in names if name.startswith(heads)},
            "scale": {name for name in names if name in ("log_scale", "temperature", "bias")},
        }

    @property
    def parameter_kinds(self) -> dict[str, ParameterKind]:
        """The kind of each parameter of the selection, by name; the kinds are the keys of ``train.lr_factors``.

        ``scale`` and ``head`` as in ``new_parameter_names``. Inside a tower, ``new`` are parameters that its backbone
        does not have (adapters, appended blocks with their norms, low-rank factors, prompts), the low-rank updates of
        shared weights, and ``Backbone.new_parameters``. Of the backbone's parameters, ``shared`` are those of both
        towers, ``norm`` those of norms, ``tower`` all others.
        """
        kinds: dict[str, ParameterKind] = dict.fromkeys(self.new_parameter_names["heads"], "head")
        kinds.update(dict.fromkeys(self.new_parameter_names["scale"], "scale"))
        shared = self.shared_parameter_names
        for side, tower in (("image", self.image), ("text", self.text)):
            assert tower.weight_hashes, "kinds need the weight hashes of the backbone, and meta tensors have none"
            modules = list(tower.net.modules())
            norms = {id(p) for module in modules if is_norm(module) for p in module.parameters()}
            differences = {
                id(p) for module in modules if isinstance(module, LowRankLinear) for p in module.low_rank_parameters
            }
            for name, p in tower.net.named_parameters():
                plain = name.replace(".base_layer.", ".")  # peft renames the weights that it wraps
                is_new = plain not in tower.weight_hashes or plain in tower.new_parameters or id(p) in differences
                kind: ParameterKind = "new" if is_new else "norm" if id(p) in norms else "tower"
                full = f"{side}.net.{name}"
                kinds[full] = "shared" if full in shared and kind != "new" else kind
        return {name: kinds[name] for name, _ in self.named_parameters() if name in self.selection}

    def parameter_counts(self) -> dict[str, ParameterCount]:
        """Total and trained parameters: of the ``model``, of each tower, of the heads and of the logit scale.

        Shared weights are counted once, as ``shared``, and in neither tower; without any, that part is absent.
        """
        shared = self.shared_parameter_names
        parts = {**self.new_parameter_names, **({"shared": shared} if shared else {})}

        def part_of(name: str) -> str:
            return next((part for part, names in parts.items() if name in names), name.partition(".")[0])

        def count(part: str | None) -> ParameterCount:
            chosen = [(n, p) for n, p in self.named_parameters() if part is None or part_of(n) == part]
            trained = [p for n, p in chosen if n in self.selection]
            total = sum(p.numel() for _, p in chosen)
            return ParameterCount(
                total, sum(p.numel() for p in trained), sum(p.numel() * p.element_size() for p in trained)
            )

        order = ("image", "text", *(["shared"] if shared else []), "heads", "scale")
        return {"model": count(None), **{part: count(part) for part in order}}

    @property
    def moving(self) -> dict[str, Tensor]:
        """Running statistics that are updated in training, by name; see ``Tower.moving``."""
        towers = {"image": self.image, "text": self.text}
        return {f"{side}.{name}": buffer for side, tower in towers.items() for name, buffer in tower.moving.items()}

    def delta(self) -> dict[str, Tensor]:
        """The trained parameters and the updated running statistics, by name."""
        trained = {name: p.detach() for name, p in self.named_parameters() if name in self.selection}
        return {**trained, **self.moving}

    @property
    def fingerprint(self) -> str:
        """Hash of all that an embedding depends on: both backbones, the delta, and new parameters that are frozen."""
        ours = self.selection.union(*self.new_parameter_names.values())
        tensors = {name: p.detach() for name, p in self.named_parameters() if name in ours}
        tensors |= self.moving
        if self.image_head.standardize is not None and self.image_head.standardize.probabilities is not None:
            classifier = self.image_head.standardize.probabilities.named_buffers()
            tensors |= {f"classifier:{name}": tensor for name, tensor in classifier}
        hashes = sorted(hash_tensors(tensors).items())
        return hashlib.sha256(repr((self.image.fingerprint, self.text.fingerprint, hashes)).encode()).hexdigest()

    # --- encoding ------------------------------------------------------------------------------------------------

    def embed_image(self, inputs: ImageInput) -> Float[Tensor, "B E"]:
        """Images, or cached features of the image tower, to L2-normalised embeddings."""
        pooled = inputs.values if isinstance(inputs, PooledFeatures) else self.image.pooled(inputs)
        return to_unit_length(self.image_head(pooled))

    @property
    def image_parts(self) -> int:
        """The parts of a batch of images that are encoded side by side, in inference in bfloat16."""
        return self.image.row_parts

    def embed_text(self, inputs: TextInput) -> Float[Tensor, "B E"]:
        """Captions, or cached features of the text tower, to L2-normalised embeddings."""
        pooled = inputs.values if isinstance(inputs, PooledFeatures) else self.text.pooled(inputs)
        return to_unit_length(self.text_head(pooled))

    def encode_image(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B E"]:
        """Normalised pixels to L2-normalised embeddings."""
        return self.embed_image(Pixels(pixels))

    def encode_text(self, tokens: Int[Tensor, "B N"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B E"]:
        """Token ids to L2-normalised embeddings; ``mask``: the attention mask, true on real tokens."""
        return self.embed_text(Tokens(tokens, mask))

    def scale_and_bias(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""] | None]:
        """The logit scale (not its logarithm) and, where the loss uses one, the logit bias."""
        if self.temperature is not None:
            with torch.no_grad():  # in place, so that the gradient is taken at the clamped value, not zeroed
                self.temperature.clamp_(*self._limits)
            return self.temperature.reciprocal(), self.bias
        assert self.log_scale is not None
        return self.log_scale.exp(), self.bias

    def forward(self, batch: Batch) -> Embeddings:
        """The embeddings of a batch, with the logit scale and the logit bias."""
        return Embeddings(self.embed_image(batch.image), self.embed_text(batch.text), *self.scale_and_bias())

    @torch.no_grad()
    def after_step(self) -> None:
        """Clamp the log scale to its range; a temperature is clamped in ``scale_and_bias``."""
        if self.log_scale is not None:
            self.log_scale.clamp_(*self._limits)


def _standardize(tower: Tower, head: HeadSettings, power: float) -> Standardize | None:
    """What standardises the features of a tower, with its classifier where the image head reads class probabilities.

    Raises ``UserError`` where that classifier is missing.
    """
    if not head.standardize:
        return None
    probabilities = None
    if head.class_probabilities and tower.modality == "image":
        if (found := tower.classifier()) is None:
            raise UserError(
                f"head.class_probabilities = true: {tower.name} has no classifier that reads what image.pool gives, or "
                "none that can be read without its weights; leave class_probabilities out, or choose a tower that was "
                "trained as a classifier (pip:efficientnet-lite0, or one of timm: or hf:) with its own pool"
            )
        probabilities = ClassProbabilities(*found)
    layers = [width for _, width in tower.pooled_layers]
    return Standardize(FeatureLayout(layers, head.standardize == "layer", power, probabilities))


def _scale_to_parameter(form: Literal["log", "temperature"], scale: float) -> float:
    """A logit scale as the value of the learned parameter; 0 and inf stand for no limit."""
    if form == "log":
        return math.log(scale) if scale else -math.inf
    return 1 / scale if scale else math.inf
