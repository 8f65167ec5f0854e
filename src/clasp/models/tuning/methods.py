"""The tuning methods, a row each: the modules a method inserts into a tower, and the parameters that it trains.

Input: a net and one parsed method (``TuningSpec``). Output: names of trainable parameters. Methods that insert modules
run first, in a fixed order, those that only select names after them. Properties of a method are fields of its row in
``TUNING_METHODS``, from which other modules read them. ``clasp.models.tuning.spec`` parses specs and runs them.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from clasp.data.plugins import load_named
from clasp.errors import counted
from clasp.models.structure import BlockStructure, find_structure, is_bias, is_norm
from clasp.models.transformer.encoders import ImageTransformer
from clasp.models.transformer.settings import ParallelBranchSettings
from clasp.models.tuning import peft_methods
from clasp.models.tuning.bottleneck import ADAPTER_INITS, ADAPTER_PLACES, insert_adapters
from clasp.models.tuning.depth import DEEP_INITS, append_blocks
from clasp.models.tuning.peft_methods import WeightPath
from clasp.models.tuning.prompts import insert_prompts
from clasp.types import UserError


@dataclass(frozen=True, slots=True)
class TuningSpec:
    """One parsed tuning method, such as ``adapters(reduction=4, blocks="6:")``; ``spec`` is its source text."""

    spec: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    blocks: slice | None = None


def layers_wrapped_by(net: nn.Module, tuning: TuningSpec) -> list[str]:
    """Paths of the wrapped layers among the targets of a peft method; after it has run, those that it wrapped."""
    roots = _peft_roots(net, tuning)
    return sorted(path for path in peft_methods.wrapped_layers(net) if _at_or_below(path, roots))


# --- the methods -----------------------------------------------------------------------------------------------------


def _full(net: nn.Module, tuning: TuningSpec) -> set[str]:
    if tuning.blocks is None:
        return {name for name, _ in net.named_parameters()}
    return _parameters_under(net, (block.path for block in _selected_blocks(net, tuning)))


def _none(net: nn.Module, tuning: TuningSpec) -> set[str]:
    return set()


def _norms(net: nn.Module, tuning: TuningSpec) -> set[str]:
    norms = (name for name, module in net.named_modules() if is_norm(module))
    return _restrict_to_blocks(net, _parameters_under(net, norms), tuning)


def _biases(net: nn.Module, tuning: TuningSpec) -> set[str]:
    return _restrict_to_blocks(net, {name for name, p in net.named_parameters() if is_bias(name, p.ndim)}, tuning)


def _attention(net: nn.Module, tuning: TuningSpec) -> set[str]:
    return _parameters_without_norms(net, [b.attention for b in _selected_blocks(net, tuning) if b.attention])


def _mlp(net: nn.Module, tuning: TuningSpec) -> set[str]:
    return _parameters_without_norms(net, [path for b in _selected_blocks(net, tuning) for path in b.mlp])


def _last(net: nn.Module, tuning: TuningSpec) -> set[str]:
    parts, n = find_structure(net), tuning.options["n"]
    if n > len(parts.blocks):
        raise UserError(f"tuning last({n}): {parts.family} has {counted(len(parts.blocks), 'block')}")
    return _parameters_under(net, (*(b.path for b in parts.blocks[-n:]), *parts.tail))


def _deep(net: nn.Module, tuning: TuningSpec) -> set[str]:
    parts = find_structure(net)
    new = append_blocks(net, parts, tuning.options["n"], tuning.options["init"])
    return new | _parameters_under(net, parts.tail)


def _adapters(net: nn.Module, tuning: TuningSpec) -> set[str]:
    parts = find_structure(net)
    return insert_adapters(net, parts, _selected_blocks(net, tuning), **tuning.options)


def _peft(net: nn.Module, tuning: TuningSpec) -> set[str]:
    if wrapped := layers_wrapped_by(net, tuning):
        raise UserError(
            f"tuning {tuning.spec!r}: {wrapped[0]} is wrapped by another method already; let their blocks or targets "
            "not overlap"
        )
    roots = _peft_roots(net, tuning)
    targets = [name for name, module in net.named_modules() if _at_or_below(name, roots) and _is_linear(module)]
    if not targets:
        return set()
    clasp_options = TUNING_METHODS[tuning.method].defaults
    options = {key: value for key, value in tuning.options.items() if key not in clasp_options}
    return peft_methods.inject_peft(net, tuning.method, targets, options)


def _match(net: nn.Module, tuning: TuningSpec) -> set[str]:
    pattern = tuning.options["pattern"]
    if not isinstance(pattern, str):
        raise UserError("tuning match: say which names, for example match('encoder.layer.*.dense.*')")
    return {name for name, _ in net.named_parameters() if fnmatch.fnmatchcase(name, pattern)}


def _prompts(net: nn.Module, tuning: TuningSpec) -> set[str]:
    return insert_prompts(net, find_structure(net), tuning.options["n"])


def _conv_branch(net: nn.Module, tuning: TuningSpec) -> set[str]:
    if not isinstance(net, ImageTransformer):
        raise UserError(
            f"tuning {tuning.spec!r}: a branch of convolutions stands beside the blocks of our own image nets alone "
            f"(own:, deit:, a tower of share.trunk), and this is a {type(net).__name__}"
        )
    layers = net.settings.layers
    before = tuning.options["before"] or tuple(range(2, layers, 2))[:5] or (layers - 1,)  # MS-CLIP's for 12 layers
    try:
        settings = ParallelBranchSettings(kind="gated", before=before)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"tuning {tuning.spec!r}: before = {before!r}: {reason}") from None
    return net.add_parallel_branch(settings, seed=int(torch.randint(1 << 31, ())))


# --- reading the net -------------------------------------------------------------------------------------------------


def _selected_blocks(net: nn.Module, tuning: TuningSpec) -> tuple[BlockStructure, ...]:
    blocks = find_structure(net).blocks
    if tuning.blocks is None:
        return blocks
    for end in (tuning.blocks.start, tuning.blocks.stop):
        if end is not None and not -len(blocks) <= end <= len(blocks):
            raise UserError(
                f"tuning {tuning.spec!r}: {find_structure(net).family} has blocks 0 to {len(blocks) - 1}, "
                f"and no block {end}"
            )
    return blocks[tuning.blocks]


def _parameters_under(net: nn.Module, paths: Iterable[str]) -> set[str]:
    heads = tuple(f"{path}." for path in paths)
    return {name for name, _ in net.named_parameters() if name.startswith(heads)} if heads else set()


def _restrict_to_blocks(net: nn.Module, names: set[str], tuning: TuningSpec) -> set[str]:
    """``names``, restricted to the selected blocks where a block range is given."""
    if tuning.blocks is None:
        return names
    return names & _parameters_under(net, (block.path for block in _selected_blocks(net, tuning)))


def _parameters_without_norms(net: nn.Module, paths: list[str]) -> set[str]:
    """Parameters under ``paths`` except those of norms, which BERT has inside its attention and output modules."""
    norms = _parameters_under(net, (name for name, module in net.named_modules() if is_norm(module)))
    return _parameters_under(net, paths) - norms


def _peft_roots(net: nn.Module, tuning: TuningSpec) -> list[str]:
    """Paths of the modules of the selected blocks in which peft wraps linear layers and 1x1 convolutions."""
    blocks, targets = _selected_blocks(net, tuning), tuning.options["targets"]
    if targets == "auto":
        targets = "attention" if any(b.attention for b in blocks) else "all"
    return {
        "attention": [b.attention for b in blocks if b.attention],
        "mlp": [path for b in blocks for path in b.mlp],
        "all": [b.path for b in blocks],
    }[targets]


def _at_or_below(path: str, roots: Sequence[str]) -> bool:
    return path in roots or path.startswith(tuple(f"{root}." for root in roots))


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size in (1, (1, 1)) and module.groups == 1
    return isinstance(module, nn.Linear)


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TuningMethod:
    """A row of ``TUNING_METHODS``: the function that selects names, an error hint, and options with defaults."""

    select: Callable[[nn.Module, TuningSpec], set[str]]
    no_match_hint: str = "it has no parameter for this method"
    stage: int = 9
    """methods run in this order: those that insert modules, then those that select names; peft before adapters, so that
    the input of an adapter at a branch's output includes the update of the branch's last layer"""
    defaults: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, tuple] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)
    """the largest value of a whole number, where it does not depend on the net"""
    passes_to_peft: bool = False
    """whether further options are passed to peft, which validates them"""
    added_parameters: Mapping[str, WeightPath] = field(default_factory=dict)
    """patterns of the names of added parameters (``*`` also matches dots; the first match counts), to how they are
    interpolated with the base weights; a parameter without a match cannot be interpolated"""
    gradient_init: bool = False
    """whether it adds a low-rank update B A whose A can be initialised from the gradient (``init="gradient"``)"""
    trains_nothing: bool = False
    """whether the tower stays frozen; such a method cannot be combined with others"""

    @property
    def positional_options(self) -> list[str]:
        return list(self.defaults)

    @property
    def options_text(self) -> str:
        """The names of its options, for error messages."""
        return ", ".join((*self.defaults, "blocks", *(("and peft's own",) if self.passes_to_peft else ())))

    def validate_option(self, spec: str, key: str, value: Any) -> None:
        """Raise ``UserError``, naming the valid choices, for an invalid value of an option."""
        if key in self.choices and value not in self.choices[key]:
            raise UserError(f"tuning {spec!r}: {key} is one of {', '.join(map(str, self.choices[key]))}, not {value!r}")
        counts = isinstance(self.defaults.get(key), int) or (self.passes_to_peft and key == "rank")
        whole = isinstance(value, int) and not isinstance(value, bool)
        if counts and not (whole and 1 <= value <= self.most.get(key, value)):
            limit = f" to {self.most[key]}" if key in self.most else ""
            raise UserError(f"tuning {spec!r}: {key} is a whole number from 1{limit}, not {value!r}")


_PEFT_DEFAULTS = {"targets": "auto"}
_PEFT_CHOICES = {"targets": ("auto", "attention", "mlp", "all"), "init": peft_methods.LORA_INITS}

TUNING_METHODS: dict[str, TuningMethod] = {
    "full": TuningMethod(_full, "it has no parameters"),
    "none": TuningMethod(_none, trains_nothing=True),
    "norms": TuningMethod(_norms, "looked for LayerNorm, RMSNorm, GroupNorm and BatchNorm modules with weights"),
    "biases": TuningMethod(_biases, "looked for vectors named bias or ..._bias"),
    "attention": TuningMethod(
        _attention, "looked in its blocks for a module named attn or attention, with linear maps in it"
    ),
    "mlp": TuningMethod(
        _mlp, "looked in its blocks for a module named mlp, ffn or feed_forward, with linear maps in it"
    ),
    "last": TuningMethod(_last, "looked for its last blocks", defaults={"n": 1}),
    "deep": TuningMethod(
        _deep, "", stage=1, defaults={"n": 1, "init": "copy"}, choices={"init": DEEP_INITS}, most={"n": 100}
    ),
    "adapters": TuningMethod(
        _adapters,
        "looked for blocks in the range given",
        stage=3,
        defaults={"reduction": 4, "place": "output", "init": "identity"},
        choices={"place": ADAPTER_PLACES, "init": ADAPTER_INITS},
        added_parameters={"*.adapter*.up.*": "from zero", "*.adapter*.down.*": "constant"},
    ),
    **{
        name: TuningMethod(
            _peft,
            "looked for linear layers (or 1x1 convolutions) in its blocks",
            stage=2,
            defaults={**_PEFT_DEFAULTS, "init": "random"} if row.gradient_init else _PEFT_DEFAULTS,
            choices=_PEFT_CHOICES,
            passes_to_peft=True,
            added_parameters=row.added_parameters,
            gradient_init=row.gradient_init,
        )
        for name, row in peft_methods.PEFT_METHODS.items()
    },
    "prompts": TuningMethod(
        _prompts, "", stage=4, defaults={"n": 8}, most={"n": 1000}, added_parameters={"prompts.*": "nonlinear"}
    ),
    "conv_branch": TuningMethod(
        _conv_branch,
        "",
        stage=5,
        defaults={"before": None},
        added_parameters={"parallel.*.gamma": "from zero", "parallel.*": "constant"},
    ),
    "match": TuningMethod(_match, "no parameter has such a name", defaults={"pattern": None}),
}


def find_tuning_method(name: str, spec: str) -> TuningMethod:
    """The row of ``TUNING_METHODS``, or the function or ``TuningMethod`` at ``package.module:Name``.

    A function takes the net and the ``TuningSpec`` and returns the names of the trainable parameters. Raises
    ``UserError`` for an unknown name.
    """
    found = load_named(name, TUNING_METHODS, f"tuning {spec!r}: method")
    return found if isinstance(found, TuningMethod) else TuningMethod(found)
