"""What trains in a tower: a tuning spec becomes one set of parameter names, the selection.

In goes a net and a list such as ``["adapters(reduction=4)", "norms(blocks='6:')"]``; new parts are inserted, and out
come names. That set is the only truth: it gets the gradients, the optimizer holds it, the delta saves it, the counts
are of it. A method that matches nothing is an error, never a silent no-op.
"""

from __future__ import annotations

import ast
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from clasp.nn import adapters as parts_of
from clasp.nn.anatomy import Block, anatomy, is_bias, is_norm
from clasp.types import UserError


@dataclass(frozen=True, slots=True)
class Tuning:
    """One method of a tuning spec, parsed: ``adapters(reduction=4, blocks="6:")``."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    blocks: slice | None = None


def parse(spec: str) -> Tuning:
    """Read one method: a name, or a name with options in brackets as in a Python call.

    Raises ``UserError`` for an unknown method or option, naming the nearest valid ones.
    """
    try:
        tree = ast.parse(spec.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        assert isinstance(call.func, ast.Name)
        name = call.func.id
        positional = [ast.literal_eval(argument) for argument in call.args]
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise UserError(
            f"tuning {spec!r} does not read as a method; write it as norms or adapters(reduction=4)"
        ) from None
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"tuning {spec!r}: unknown method {name!r}{hint}; methods: {', '.join(METHODS)}")
    method = METHODS[name]
    if len(positional) > len(method.order):
        raise UserError(f"tuning {spec!r}: {name} takes {_options(method)}")
    options.update(zip(method.order, positional, strict=False))
    blocks = options.pop("blocks", None)
    unknown = [] if method.open else [key for key in options if key not in method.defaults]
    if unknown:
        raise UserError(f"tuning {spec!r}: {name} has no option {unknown[0]!r}; it takes {_options(method)}")
    for key, value in options.items():
        method.check(spec, key, value)
    return Tuning(name, {**method.defaults, **options}, _block_range(spec, blocks))


def tune(net: nn.Module, specs: Sequence[str], *, seed: int) -> set[str]:
    """Insert what the specs ask for into ``net`` and return the names of the parameters that train.

    Structure comes first, in a fixed order (appended blocks, bottlenecks, peft, prompts), so that the order in which a
    recipe lists its methods never matters. New parts start from ``seed``. Raises ``UserError`` when a method matches
    nothing.
    """
    tunings = [parse(spec) for spec in specs]
    if len(tunings) > 1 and any(t.method == "none" for t in tunings):
        raise UserError(f"tuning {list(specs)}: none stands alone; leave it out to train something")
    chosen: set[int] = set()  # by identity: peft renames what it wraps, and keeps the parameters themselves
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tuning in sorted(tunings, key=lambda t: METHODS[t.method].rank):
            method = METHODS[tuning.method]
            found = method.select(net, tuning)
            if not found and tuning.method != "none":
                raise UserError(f"tuning {tuning.method!r} matches nothing in {type(net).__name__}: {method.looks_for}")
            chosen |= {id(p) for name, p in net.named_parameters() if name in found}
    return {name for name, p in net.named_parameters() if id(p) in chosen}


# --- the methods -----------------------------------------------------------------------------------------------------


def _full(net: nn.Module, tuning: Tuning) -> set[str]:
    if tuning.blocks is None:
        return {name for name, _ in net.named_parameters()}
    return _below(net, (block.path for block in _blocks(net, tuning)))


def _none(net: nn.Module, tuning: Tuning) -> set[str]:
    return set()


def _norms(net: nn.Module, tuning: Tuning) -> set[str]:
    norms = (name for name, module in net.named_modules() if is_norm(module))
    return _within(net, _below(net, norms), tuning)


def _biases(net: nn.Module, tuning: Tuning) -> set[str]:
    return _within(net, {name for name, p in net.named_parameters() if is_bias(name, p.ndim)}, tuning)


def _attention(net: nn.Module, tuning: Tuning) -> set[str]:
    return _weights(net, [b.attention for b in _blocks(net, tuning) if b.attention])


def _mlp(net: nn.Module, tuning: Tuning) -> set[str]:
    return _weights(net, [path for b in _blocks(net, tuning) for path in b.mlp])


def _last(net: nn.Module, tuning: Tuning) -> set[str]:
    parts, n = anatomy(net), tuning.options["n"]
    if n > len(parts.blocks):
        raise UserError(f"tuning last({n}): {parts.family} has {len(parts.blocks)} blocks")
    return _below(net, (*(b.path for b in parts.blocks[-n:]), *parts.tail))


def _deep(net: nn.Module, tuning: Tuning) -> set[str]:
    parts = anatomy(net)
    new = parts_of.append_blocks(net, parts, tuning.options["n"], tuning.options["init"])
    return new | _below(net, parts.tail)


def _adapters(net: nn.Module, tuning: Tuning) -> set[str]:
    parts = anatomy(net)
    return parts_of.insert_adapters(net, parts, _blocks(net, tuning), **tuning.options)


def _peft(net: nn.Module, tuning: Tuning) -> set[str]:
    options = dict(tuning.options)
    targets = _linears(net, tuning, options.pop("targets"))
    if not targets:
        return set()
    return parts_of.inject_peft(net, tuning.method, targets, options)


def _match(net: nn.Module, tuning: Tuning) -> set[str]:
    pattern = tuning.options["pattern"]
    if not isinstance(pattern, str):
        raise UserError("tuning match: say which names, for example match('encoder.layer.*.dense.*')")
    return {name for name, _ in net.named_parameters() if fnmatch.fnmatchcase(name, pattern)}


def _prompts(net: nn.Module, tuning: Tuning) -> set[str]:
    return parts_of.insert_prompts(net, anatomy(net), tuning.options["n"])


# --- reading the net -------------------------------------------------------------------------------------------------


def _blocks(net: nn.Module, tuning: Tuning) -> tuple[Block, ...]:
    blocks = anatomy(net).blocks
    return blocks if tuning.blocks is None else blocks[tuning.blocks]


def _below(net: nn.Module, paths: Iterable[str]) -> set[str]:
    heads = tuple(f"{path}." for path in paths)
    return {name for name, _ in net.named_parameters() if name.startswith(heads)} if heads else set()


def _within(net: nn.Module, names: set[str], tuning: Tuning) -> set[str]:
    """All of ``names``, or those inside the chosen blocks where a block range is given."""
    if tuning.blocks is None:
        return names
    return names & _below(net, (block.path for block in _blocks(net, tuning)))


def _weights(net: nn.Module, paths: list[str]) -> set[str]:
    """Parameters below ``paths`` that are not norms': BERT keeps its norms inside its attention and output modules."""
    norms = _below(net, (name for name, module in net.named_modules() if is_norm(module)))
    return _below(net, paths) - norms


def _linears(net: nn.Module, tuning: Tuning, targets: str) -> list[str]:
    """Linear layers (and 1x1 convolutions, in a CNN) of the chosen blocks' attention, MLP or both."""
    blocks = _blocks(net, tuning)
    if targets == "auto":
        targets = "attention" if any(b.attention for b in blocks) else "all"
    roots = {
        "attention": [b.attention for b in blocks if b.attention],
        "mlp": [path for b in blocks for path in b.mlp],
        "all": [b.path for b in blocks],
    }[targets]
    heads = tuple(f"{root}." for root in roots)
    return [
        name
        for name, module in net.named_modules()
        if (name.startswith(heads) or name in roots) and _is_linear(module) and ".adapter" not in name
    ]


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size in (1, (1, 1)) and module.groups == 1
    return isinstance(module, nn.Linear)


def _block_range(spec: str, blocks: Any) -> slice | None:
    if blocks is None:
        return None
    try:
        ends = [int(part) if part.strip() else None for part in str(blocks).split(":")]
        if len(ends) == 1 and ends[0] is not None:
            return slice(ends[0], ends[0] + 1 or None)
        start, stop = ends
        return slice(start, stop)
    except ValueError:
        raise UserError(
            f"tuning {spec!r}: blocks={blocks!r} is not a range; write '6:', ':4', '2:8', '-3:' or '5'"
        ) from None


# --- the table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Method:
    """A row of ``METHODS``: how names are selected, what was looked for, and the options with their defaults."""

    select: Callable[[nn.Module, Tuning], set[str]]
    looks_for: str
    rank: int = 9
    """structure is changed in this order, then names are read"""
    defaults: dict[str, Any] = field(default_factory=dict)
    choices: dict[str, tuple] = field(default_factory=dict)
    open: bool = False
    """further options belong to peft, which checks them"""

    @property
    def order(self) -> list[str]:
        return list(self.defaults)

    def check(self, spec: str, key: str, value: Any) -> None:
        """One option's value, or a ``UserError`` that names the valid ones."""
        if key in self.choices and value not in self.choices[key]:
            raise UserError(f"tuning {spec!r}: {key} is one of {', '.join(map(str, self.choices[key]))}, not {value!r}")
        counts = isinstance(self.defaults.get(key), int) or (self.open and key == "rank")
        if counts and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"tuning {spec!r}: {key} is a whole number from 1, not {value!r}")


_TARGETS = {"targets": ("auto", "attention", "mlp", "all")}

METHODS: dict[str, Method] = {
    "full": Method(_full, "it has no parameters"),
    "none": Method(_none, ""),
    "norms": Method(_norms, "looked for LayerNorm, RMSNorm, GroupNorm and BatchNorm modules with weights"),
    "biases": Method(_biases, "looked for vectors named bias or ..._bias"),
    "attention": Method(_attention, "looked for an attention module in its blocks; it has none"),
    "mlp": Method(_mlp, "looked for a feed-forward module in its blocks; it has none"),
    "last": Method(_last, "looked for its last blocks", defaults={"n": 1}),
    "deep": Method(_deep, "", rank=1, defaults={"n": 1, "init": "copy"}, choices={"init": parts_of.DEEP_STARTS}),
    "adapters": Method(
        _adapters,
        "looked for blocks in the range given",
        rank=2,
        defaults={"reduction": 4, "place": "output", "start": "identity"},
        choices={"place": parts_of.PLACES, "start": parts_of.STARTS},
    ),
    **{
        name: Method(
            _peft,
            "looked for linear layers (or 1x1 convolutions) in its blocks",
            rank=3,
            defaults={"targets": "auto"},
            choices=_TARGETS,
            open=True,
        )
        for name in parts_of.PEFT
    },
    "prompts": Method(_prompts, "", rank=4, defaults={"n": 8}),
    "match": Method(_match, "no parameter has such a name", defaults={"pattern": None}),
}


def _options(method: Method) -> str:
    return ", ".join((*method.defaults, "blocks", *(("and peft's own",) if method.open else ())))


def freeze(module: nn.Module, selection: Iterable[str]) -> None:
    """Give gradients to the selection and to nothing else. Names that do not exist are a bug of ours."""
    chosen = set(selection)
    missing = chosen - {name for name, _ in module.named_parameters()}
    assert not missing, f"selected but not there: {sorted(missing)[:3]}"
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)
