"""A tower: any encoder, as a module with hidden states and a pooled feature.

Input: a ``Backbone`` (a foreign module with its preprocessing) and a few settings. Output: a module with
``forward -> hidden states [B N D]`` and ``pooled -> [B Dp]``; both also resume from ``HiddenStates``, the output of the
frozen prefix. Note: a tower is in evaluation mode in training, too, unless ``dropout`` is set, and running statistics
of BatchNorm are fixed, so that a frozen tower is deterministic. They are updated where the net is randomly initialised
and the norm trains: they are then in ``moving`` and are saved with the trained parameters. ``was_tuned``: it trained
before it was frozen as a whole. A long class: hidden states, resuming and pooling all read one structure of the net.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from clasp.errors import counted
from clasp.models.activation_checkpointing import CheckpointedForward
from clasp.models.autocast import is_autocast
from clasp.models.backbone import Backbone
from clasp.models.classifier import Classifier, classifier_columns
from clasp.models.family_layouts import FAMILY_LAYOUTS
from clasp.models.foreign_forward import (
    declared_width,
    disable_kv_cache,
    drop_module,
    foreign_states,
    native_image_size,
)
from clasp.models.length_buckets import split_by_length
from clasp.models.partial_forward import (
    as_tokens,
    block_output_type,
    block_states,
    count_frozen_blocks,
    resume_from,
    states_after_block,
)
from clasp.models.patch_dropout import PatchDropout, place_patch_dropout
from clasp.models.pooling import (
    POOLING_FUNCTIONS,
    AttentionPool,
    check_pool,
    norm_pooled,
    pool_as_authors,
    pool_of_layers,
    resolve_extra_layers,
)
from clasp.models.probe import (
    FORWARD_ERRORS,
    ProbeInputs,
    check_consistency,
    first_line,
    first_states,
    image_probe,
    parameters_without_gradient,
    relative_difference,
    text_probe,
)
from clasp.models.row_threads import in_row_threads, pays_to_divide, row_threads
from clasp.models.running_statistics import batch_norms, trains_norm, updated_statistics
from clasp.models.structure import find_structure, find_unused_modules
from clasp.models.transformer.bert import BertEncoder
from clasp.models.transformer.dinov2 import Dinov2Encoder
from clasp.models.transformer.packing import pack_rows
from clasp.models.tuning.bottleneck import hooks_of, is_adapter_hook
from clasp.models.tuning.depth import truncate_blocks
from clasp.models.tuning.spec import TuningSpec, apply_tuning, parse_tuning_spec
from clasp.models.weight_hashes import hash_tensors, hash_values
from clasp.types import HiddenStates, Pixels, Tokens, UserError

_log = logging.getLogger(__name__)


class Tower(nn.Module):
    """An encoder of one modality. ``net`` is the backbone's module, ``pooling`` a learned pooling or ``None``.

    Modifies the module in place: unused parts are dropped. Raises ``UserError`` for a ``pool`` or ``layer`` that the
    backbone does not support, and, unless on the meta device, for features that depend on more than their own input.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        pool: str | None = None,
        layer: int | None = None,
        extra_layers: Sequence[int] | Literal["all"] = (),
        dropout: bool = False,
    ):
        super().__init__()
        self.name, self.modality, self.version = backbone.name, backbone.modality, backbone.version
        self.net = backbone.net
        self._pool = pool or backbone.pool
        self._pooler = backbone.pooler if self._pool == "pooler" else None
        pooler_path = backbone.pooler.module if backbone.pooler is not None else None
        unused = {*find_unused_modules(self.net), *([pooler_path] if pooler_path else [])}
        for path in sorted(unused - {pooler_path if self._pooler is not None else None}):
            drop_module(self.net, path)
        disable_kv_cache(self.net)
        if layer is not None:
            truncate_blocks(self.net, layer)
        self.pretrained_head, self.authors_pool = backbone.pretrained_head, backbone.pool
        self.weight_hashes = self._hash_weights(backbone.weight_hashes)
        self._forward_features, self._from_seed = backbone.forward_features, backbone.from_seed
        self.new_parameters = backbone.new_parameters
        self._read_classifier = backbone.classifier if layer is None else None
        self.tunings: tuple[TuningSpec, ...] = ()
        self.was_tuned = False
        self.dropout = dropout
        self.patch_dropout: PatchDropout | None = None
        self._structure = find_structure(self.net)
        if self._structure.channels_first:
            # measured: two to four times faster on CPUs
            nn.utils.convert_conv2d_weight_memory_format(self.net, torch.channels_last)
        check_pool(self._pool, backbone, self._structure)
        self._extra_layers = resolve_extra_layers(extra_layers, self._pool, len(self._structure.blocks), self.name)
        self.pooling: AttentionPool | None = None
        self._size = native_image_size(self.net, backbone.transform)
        self._add_pooling()
        self.eval()

    @property
    def fingerprint(self) -> str:
        """Hash of the base weights and the pooling; trained parameters are not part of it."""
        return hash_values(sorted(self.weight_hashes.items()), self._pool, self._extra_layers)

    @property
    def layer_fingerprint(self) -> str:
        """Hash of all that the pooled states of any one layer depend on, whatever other layers are pooled."""
        return hash_values(sorted(self.weight_hashes.items()), self._pool, [])

    @property
    def extra_layers(self) -> tuple[int, ...]:
        """The blocks that are pooled in addition to the last, counted from 1, lowest first."""
        return tuple(self._extra_layers)

    @property
    def has_classifier(self) -> bool:
        """Whether the tower was pre-trained with a classifier; on the meta device not known of an ``hf:`` tower."""
        return self._read_classifier is not None

    def classifier(self) -> tuple[Classifier, slice] | None:
        """The classifier that the tower was pre-trained with, and the columns of the pooled features that it reads;
        ``None`` where there is none, or ``pool`` does not have what it reads."""
        if self._read_classifier is None:
            return None
        classifier = self._read_classifier()
        if classifier is None:
            return None
        columns = classifier_columns(classifier, self._pool, self.pooled_layers[0][1])
        return None if columns is None else (classifier, columns)

    @property
    def pools_as_authors(self) -> bool:
        """Whether the pooled vector is that of the tower's authors."""
        return self._pool == self.authors_pool and not self._extra_layers

    def tune(self, specs: Sequence[str], *, seed: int) -> set[str]:
        """Apply tuning specs; returns the names of the trainable parameters, relative to the tower.

        A learned pooling is not among them. Parameters without a gradient are left out with a warning; raises
        ``UserError`` where all of them are, and where the net does not run with the new parts.
        """
        names = {f"net.{name}" for name in apply_tuning(self.net, specs, seed=seed)}
        self.tunings += tuple(map(parse_tuning_spec, specs))
        self._structure = find_structure(self.net)  # blocks may have been appended
        unreached = self._without_gradient(names, specs) if names else set()
        if unreached:
            if unreached == names:
                raise UserError(f"tuning {list(specs)}: nothing that it trains takes part in {self._structure.family}")
            shown = ", ".join(sorted(unreached)[:3])
            more = f" and {len(unreached) - 3} more" if len(unreached) > 3 else ""
            _log.warning("%s: %s%s take no part in its output, and stay frozen", self.name, shown, more)
        return names - unreached

    def _without_gradient(self, names: set[str], specs: Sequence[str]) -> set[str]:
        """Those of ``names`` that get no gradient. On the meta device, known families are not tried."""
        meta = self._device.type == "meta"
        if meta and type(self.net).__name__ in FAMILY_LAYOUTS:
            return set()
        try:
            return parameters_without_gradient(
                self.named_parameters(), names, lambda: self._pooled(self._probe_inputs().alone)
            )
        except (*FORWARD_ERRORS, AssertionError) as error:
            if meta:
                return set()  # some nets branch on values
            raise UserError(
                f"tuning {list(specs)}: {self._structure.family} does not run with it ({first_line(error)}); choose "
                "another method, or other blocks or targets"
            ) from error

    def _hash_weights(self, known: Mapping[str, str] | None) -> dict[str, str]:
        """The hash of every tensor of the net and of its pre-trained head; ``known``: those of the net, if recorded."""
        state = self.net.state_dict()
        hashes = hash_tensors(state) if known is None else {name: known[name] for name in state}
        return {**hashes, **hash_tensors(self._head_tensors())}

    def _head_tensors(self) -> dict[str, Tensor]:
        """Tensors of a pre-trained head, under names that no parameter of a net has."""
        tensors = self.pretrained_head.tensors() if self.pretrained_head is not None else {}
        return {f"pretrained_head:{name}": tensor for name, tensor in tensors.items()}

    def enable_activation_checkpointing(self) -> None:
        """Save the input only of each block above the frozen prefix, and recompute its activations when needed.

        Costs a second forward pass of the blocks that a gradient goes through (Chen et al., 2016, "Training deep nets
        with sublinear memory cost"); dropout masks are the same in both. To be called after the selection is made.
        """
        for block in self._structure.blocks[self.frozen_blocks :]:
            module = self.net.get_submodule(block.path)
            vars(module)["forward"] = CheckpointedForward(module)

    def enable_patch_dropout(self, rate: float) -> None:
        """Drop this fraction of the patch tokens in training, before the first block that trains.

        To be called after the selection is made. Raises ``UserError`` where no block trains, and for a net whose output
        is wrong without some of its patches.
        """
        trained = [name for name, parameter in self.net.named_parameters() if parameter.requires_grad]
        images = self._probe_inputs().beside
        self.patch_dropout = place_patch_dropout(
            self.name, self.net, self._structure, rate, trained=trained, encode=lambda: self(images)
        )

    def forward(
        self, inputs: Pixels | Tokens | HiddenStates, *, class_token_only: bool = False
    ) -> Float[Tensor, "U N D"]:
        """Hidden states after the last block and the final norm; U rows, one for each distinct caption.

        ``class_token_only``: those of the class token alone (N = 1), of a net that can leave the others out.
        """
        if isinstance(inputs, HiddenStates):
            blank, block_type = self._blank_input(inputs), self._block_output_type
            assert block_type is not None, f"{self.name} cannot be resumed between blocks"
            lowest = self._structure.min_prefix_blocks
            assert inputs.depth >= lowest, f"{self.name} cannot be resumed after block {inputs.depth}, only {lowest} on"
            values = inputs.values.to(next(self.net.parameters()).dtype)  # they may be cached in half precision
            run = partial(self, blank, class_token_only=class_token_only)
            return resume_from(self.net, self._structure, inputs.depth, values, run, output_type=block_type)
        if isinstance(inputs, Pixels) and self._structure.channels_first:
            inputs = Pixels(inputs.values.contiguous(memory_format=torch.channels_last))
        features = _class_token if class_token_only else self._forward_features
        return as_tokens(foreign_states(self.name, self.net, inputs, features))

    # --- the frozen prefix ---------------------------------------------------------------------------------------

    @property
    def convolutional(self) -> bool:
        """Whether the blocks compute on feature maps ``[B D height width]``, or the net has BatchNorm."""
        return self._structure.channels_first or bool(batch_norms(self.net))

    @property
    def fully_frozen(self) -> bool:
        """Whether the tower has no trainable parameter, a learned pooling included: its pooled output is then fixed."""
        return not any(parameter.requires_grad for parameter in self.parameters())

    @property
    def frozen_blocks(self) -> int:
        """The number of blocks in the frozen prefix: the lowest blocks without trainable parameters in or before them.

        0 also where the net cannot be resumed there: its blocks exchange more than the hidden states, or a parallel
        branch joins above.
        """
        trained = [name for name, parameter in self.net.named_parameters() if parameter.requires_grad]
        depth = min([count_frozen_blocks(self._structure, trained), *self._extra_layers])
        return depth if depth >= self._structure.min_prefix_blocks and self._block_output_type else 0

    @cached_property
    def _block_output_type(self) -> type | None:
        """The output type of the blocks; ``None`` where the net cannot be resumed from them, or gives other states then
        (XLM)."""
        given, whole = self._probe_inputs().alone, []
        try:
            with torch.no_grad():
                block_type = block_output_type(self.net, self._structure, lambda: whole.append(self(given)))
                if block_type is None or self._device.type == "meta":
                    return block_type
                prefix = self.prefix_states(given, max(1, self._structure.min_prefix_blocks))
                blank = self._blank_input(prefix)
                resumed = resume_from(
                    self.net, self._structure, prefix.depth, prefix.values, lambda: self(blank), output_type=block_type
                )
                return block_type if relative_difference(resumed, whole[0]) <= 1e-3 else None
        except FORWARD_ERRORS:
            return None

    def prefix_states(self, inputs: Pixels | Tokens, depth: int) -> HiddenStates:
        """The hidden states ``[B N D]`` after the first ``depth`` blocks, ``1 <= depth <= frozen_blocks``."""
        assert 1 <= depth <= len(self._structure.blocks), (
            f"{self.name} has {counted(len(self._structure.blocks), 'block')}, not {depth}"
        )
        values = states_after_block(self.net, self._structure, depth, lambda: self(inputs))
        if isinstance(inputs, Tokens):
            return HiddenStates(values, inputs.mask, depth, 0, inputs.rows)
        return HiddenStates(values, _full_mask(values), depth, inputs.values.shape[-1])

    def prefix_fingerprint(self, depth: int) -> str:
        """Hash of all that the hidden states after ``depth`` blocks depend on."""
        return hash_values(sorted(self.weight_hashes.items()), "states", depth)

    def _blank_input(self, states: HiddenStates) -> Pixels | Tokens:
        """A blank input of the shape that ``states`` were computed from; one image suffices, as images have no mask."""
        if self.modality == "text":
            return Tokens(torch.zeros_like(states.mask, dtype=torch.long), states.mask)
        return Pixels(torch.zeros(1, 3, states.size, states.size, device=self._device))

    @property
    def layer_pool(self) -> str | None:
        """The pooling for several layers: class token and mean of the patches where there is a class token, mean and
        maximum of the feature maps of a CNN, else that of the tower; ``None`` where only the last states can be pooled.
        """
        return pool_of_layers(self._pool, self.modality, self._structure)

    # --- pooling -------------------------------------------------------------------------------------------------

    def pool(self, states: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"]) -> Float[Tensor, "B Dp"]:
        """Pool hidden states to one vector a row; ``mask``: the attention mask, true on real tokens."""
        if self._pooler is not None:
            return pool_as_authors(self.net, self._pooler, states, mask, self._prefix_tokens)
        if self.pooling is not None:
            vectors = self.pooling(states, mask)
        else:
            vectors = self._pool_without_weights(states, mask)
        if self._structure.pooled_norm:
            width = int(states.shape[2])  # a tensor while it is traced
            vectors = norm_pooled(self.net.get_submodule(self._structure.pooled_norm), vectors, width)
        return vectors

    def pooled(self, inputs: Pixels | Tokens | HiddenStates) -> Float[Tensor, "B Dp"]:
        """Inputs to pooled features, one vector a row.

        Captions are split into micro-batches of similar length, to reduce padding, or packed without any.
        """
        if isinstance(inputs, Pixels):
            encodes = torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
            if encodes and pays_to_divide(inputs.values, self.row_parts):
                return in_row_threads(lambda part: self._pooled(Pixels(part)), inputs.values)
            return self._pooled(inputs)
        packed = self._packing_net(inputs) is not None
        parts, back = ([replace(inputs, rows=None)], None) if packed else split_by_length(inputs)
        vectors = torch.cat([self._pooled(part) for part in parts])
        order = back if inputs.rows is None else inputs.rows if back is None else back[inputs.rows]
        return vectors if order is None else vectors[order]

    def _pooled(self, inputs: Pixels | Tokens | HiddenStates) -> Float[Tensor, "U Dp"]:
        return torch.cat(self._pool_layers(inputs), dim=1)

    def _pool_layers(self, inputs: Pixels | Tokens | HiddenStates) -> list[Float[Tensor, "U _"]]:
        """The pooled states of the last block, then of the extra layers, lowest first."""
        layers = self._layer_states(inputs, class_token_only=self._needs_class_token_only)
        text = None if isinstance(inputs, Pixels) or self.modality == "image" else inputs.mask
        return self.pool_layers(layers, [_full_mask(each) if text is None else text for each in layers])

    def layer_states(self, inputs: Pixels | Tokens | HiddenStates) -> list[Float[Tensor, "U _ _"]]:
        """The hidden states that are pooled: of the last block, after the final norm, then of the extra layers, lowest
        first. Lower feature maps of a CNN have more tokens."""
        return self._layer_states(inputs, class_token_only=False)

    def _layer_states(
        self, inputs: Pixels | Tokens | HiddenStates, *, class_token_only: bool
    ) -> list[Float[Tensor, "U _ _"]]:
        outputs: list[Tensor] = []
        blocks = [self.net.get_submodule(self._structure.blocks[number - 1].path) for number in self._extra_layers]
        hooks = [
            block.register_forward_hook(lambda _, __, output: outputs.append(block_states(output))) for block in blocks
        ]
        if self.patch_dropout is not None and self.patch_dropout.training:
            hooks.append(self.patch_dropout.register(self.net))
        try:
            net = self._packing_net(inputs)
            if net is None:
                states = self(inputs, class_token_only=class_token_only)
            else:
                assert isinstance(inputs, Tokens)
                states = net.forward_packed(inputs.ids, inputs.mask)
                outputs = [pack_rows(inputs.mask).unpack(early, inputs.mask) for early in outputs]
        finally:
            for hook in hooks:
                hook.remove()
        return [states, *(as_tokens(early) for early in outputs)]

    def pool_layers(
        self, layers: Sequence[Float[Tensor, "U _ _"]], masks: Sequence[Bool[Tensor, "U _"]]
    ) -> list[Float[Tensor, "U _"]]:
        """The pooled vectors of ``layer_states``; concatenated, they are what the head reads."""
        return [self.pool(layers[0], masks[0]), *map(self._pool_without_weights, layers[1:], masks[1:])]

    @property
    def packs_captions(self) -> bool:
        """Whether the tower encodes captions without padding in bfloat16: a packaged net on a CPU does, without prompts
        and with dropout off. In float32, features stay bitwise those of padded captions."""
        apart = "prompts" in dict(self.net.named_children()) or self.net.training
        return isinstance(self.net, BertEncoder) and self._device.type == "cpu" and not apart

    @property
    def attends(self) -> bool:
        """Whether its blocks may attend: those of the convolutional families do not."""
        return not self._structure.channels_first

    @property
    def attends_in_products(self) -> bool:
        """Whether inference in bfloat16 attends in plain products, whatever the attention kernel: a packaged image net
        on a CPU does."""
        return isinstance(self.net, Dinov2Encoder) and self._device.type == "cpu"

    @property
    def row_parts(self) -> int:
        """The number of parts of a batch of images that inference in bfloat16 encodes side by side, each in one thread:
        more than one for a packaged net on a CPU, which keeps nothing of a pass, with nothing but adapters hooked to
        it."""
        dropping = self.net.training or (self.patch_dropout is not None and self.patch_dropout.training)
        if not self.attends_in_products or self._extra_layers or dropping:
            return 1
        return row_threads() if all(map(is_adapter_hook, hooks_of(self.net))) else 1

    @property
    def can_leave_out_patches(self) -> bool:
        """Whether the last block leaves out patches in bfloat16: a packaged image net pooled at its class token."""
        return self._pool == "cls" and isinstance(self.net, Dinov2Encoder)

    @property
    def _needs_class_token_only(self) -> bool:
        """Whether the last block leaves out what is not pooled: in float32 it does not, where no bit changes."""
        return self.can_leave_out_patches and is_autocast(self._device)

    def _packing_net(self, inputs: Pixels | Tokens | HiddenStates) -> BertEncoder | None:
        """The net where these inputs are encoded without padding; ``None`` also where they have none."""
        encodes = torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        if not (encodes and self.packs_captions and isinstance(inputs, Tokens)) or bool(inputs.mask.all()):
            return None
        assert isinstance(self.net, BertEncoder)
        return self.net

    def train(self, mode: bool = True) -> Tower:
        """Always evaluation mode, unless ``dropout`` is set; BatchNorm is in training mode where its statistics are
        ``moving``. Patch dropout follows ``mode``."""
        super().train(mode and self.dropout)
        if self.patch_dropout is not None:
            self.patch_dropout.training = mode
        for norm in batch_norms(self).values():
            norm.train(mode and self._from_seed and trains_norm(norm))
        return self

    @property
    def moving(self) -> dict[str, Tensor]:
        """Running statistics that are updated in training, by name: those of trainable norms in a randomly initialised
        net."""
        return updated_statistics(self) if self._from_seed else {}

    def _pool_without_weights(self, states: Float[Tensor, "U N D"], mask: Bool[Tensor, "U N"]) -> Float[Tensor, "U Dp"]:
        return POOLING_FUNCTIONS[self._pool](states, mask, self._prefix_tokens)

    @property
    def _prefix_tokens(self) -> int:
        """The number of tokens before the patches (class and registers), which poolings of patches leave out."""
        return self._structure.prefix_tokens if self.modality == "image" else 0

    # --- probing the net -----------------------------------------------------------------------------------------

    @property
    def _device(self) -> torch.device:
        return next(self.net.parameters()).device

    def _probe_inputs(self) -> ProbeInputs:
        if self.modality == "text":
            return text_probe(self.net, self._device)
        return image_probe(self._size, self._device)

    @torch.no_grad()
    def _add_pooling(self) -> None:
        """Create a learned pooling, set ``width`` and ``pooled_layers``, and check that a feature depends on its own
        input only.

        On the meta device the width ``D`` of the hidden states is read from the net where it is declared: a forward
        pass of shapes takes half a second, and decoders branch on values.
        """
        given, meta = self._probe_inputs(), self._device.type == "meta"
        width = declared_width(self.net, self._structure, self.modality) if meta else None
        shape = (1, 2 + self._structure.prefix_tokens, width or 0)
        if width is None:
            states = first_states(self.name, self._structure.family, self, given.alone)
        else:
            states = torch.empty(shape, device="meta")
        blocks = [len(self._structure.blocks), *self._extra_layers]
        if self._pool == "attention":
            self.pooling = AttentionPool(states.shape[2]).to(self._device)
        if self._extra_layers and not (meta and width and not self._structure.channels_first):
            layers = self._pool_layers(given.alone)
        else:  # hidden states of a transformer are equally wide
            below = [self._pool_without_weights(states, _full_mask(states)) for _ in self._extra_layers]
            layers = [self.pool(states, _full_mask(states)), *below]
        vectors = torch.cat(layers, dim=1)
        self.width = vectors.shape[1]
        self.pooled_layers = tuple((block, layer.shape[1]) for block, layer in zip(blocks, layers, strict=True))
        if not meta:
            check_consistency(self.name, self._structure.family, self._pooled, vectors, given)


def _class_token(net: nn.Module, pixels: Tensor) -> Tensor:
    return net(pixels, class_token_only=True).last_hidden_state[:, :1]


def _full_mask(states: Float[Tensor, "U N D"]) -> Bool[Tensor, "U N"]:
    return torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
