"""Tuning specs: from a list of methods to one set of names of trainable parameters, the selection.

Input: a net, and a list such as ``["adapters(reduction=4)", "norms(blocks='6:')"]``. Output: names; new modules are
inserted into the net. The selection alone determines which parameters get gradients, are optimised, are saved in the
delta and are counted. Note: a method that matches nothing is an error, never a silent no-op.
"""

from __future__ import annotations

import ast
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from clasp.models.tuning.methods import TuningMethod, TuningSpec, find_tuning_method, layers_wrapped_by
from clasp.models.tuning.peft_methods import WeightPath
from clasp.types import UserError


def parse_tuning_spec(spec: str) -> TuningSpec:
    """Parse one method: a name, or a name with options in parentheses, as in a Python call.

    A name is a key of ``TUNING_METHODS`` or ``package.module:Name``. Raises ``UserError`` for an unknown method or
    option, naming the nearest valid ones.
    """
    outside = re.match(r"[\w.]+:\w+", spec.strip())
    try:
        tree = ast.parse(f"_{spec.strip()[outside.end() :]}" if outside else spec.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        assert isinstance(call.func, ast.Name)
        name = outside.group() if outside else call.func.id
        positional = [ast.literal_eval(argument) for argument in call.args]
        options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise UserError(
            f"tuning {spec!r} does not read as a method; write it as norms or adapters(reduction=4)"
        ) from None
    method = find_tuning_method(name, spec)
    if len(positional) > len(method.positional_options):
        raise UserError(f"tuning {spec!r}: {name} takes {method.options_text}")
    options.update(zip(method.positional_options, positional, strict=False))
    blocks = options.pop("blocks", None)
    unknown = [] if method.passes_to_peft else [key for key in options if key not in method.defaults]
    if unknown:
        raise UserError(f"tuning {spec!r}: {name} has no option {unknown[0]!r}; it takes {method.options_text}")
    for key, value in options.items():
        method.validate_option(spec, key, value)
    return TuningSpec(spec, name, {**method.defaults, **options}, _block_range(spec, blocks))


def apply_tuning(net: nn.Module, specs: Sequence[str], *, seed: int) -> set[str]:
    """Insert the modules of the specs into ``net`` and return the names of the trainable parameters.

    Modules are inserted first, in a fixed order (appended blocks, peft, adapters, prompts), so that the order of the
    methods in a recipe does not matter. A method may be given several times, with other options for other blocks. New
    parameters are initialised from ``seed``. Raises ``UserError`` when a method matches nothing, and when two of them
    would insert a module in the same place.
    """
    tunings = [parse_tuning_spec(spec) for spec in specs]
    idle = [t.method for t in tunings if _row(t).trains_nothing]
    if len(tunings) > 1 and idle:
        raise UserError(f"tuning {list(specs)}: {idle[0]} stands alone; leave it out to train something")
    chosen: set[int] = set()  # by identity: peft renames what it wraps, and keeps the parameters themselves
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for tuning in sorted(tunings, key=_application_order):
            method = _row(tuning)
            found = method.select(net, tuning)
            if not found and not method.trains_nothing:
                raise UserError(
                    f"tuning {tuning.spec!r} matches nothing in {type(net).__name__}: {method.no_match_hint}"
                )
            chosen |= {id(p) for name, p in net.named_parameters() if name in found}
    return {name for name, p in net.named_parameters() if id(p) in chosen}


def gradient_initialized_layers(net: nn.Module, specs: Sequence[str]) -> list[str]:
    """Paths of the layers of a tuned net whose low-rank update is initialised from the gradient (``init="gradient"``).

    ``specs`` are those the net was tuned with. No state is stored for this: no two methods wrap one layer, so the
    wrapped layers among a method's targets were wrapped by it.
    """
    gradient_inits = [
        t for t in map(parse_tuning_spec, specs) if _row(t).gradient_init and t.options["init"] == "gradient"
    ]
    return [path for tuning in gradient_inits for path in layers_wrapped_by(net, tuning)]


def weight_path(tunings: Iterable[TuningSpec], name: str) -> tuple[str, WeightPath] | None:
    """The method among ``tunings`` that added the parameter ``name`` to a net, and how it is interpolated with the
    base; ``None`` where no pattern of their rows matches."""
    for tuning in tunings:
        for pattern, path in _row(tuning).added_parameters.items():
            if fnmatch.fnmatchcase(name, pattern):
                return tuning.method, path
    return None


def freeze_except(module: nn.Module, selection: Iterable[str]) -> None:
    """Set ``requires_grad`` for the selection, and unset it for all other parameters; asserts that all names exist."""
    chosen = set(selection)
    missing = chosen - {name for name, _ in module.named_parameters()}
    assert not missing, f"selected but not there: {sorted(missing)[:3]}"
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in chosen)


# --- how -------------------------------------------------------------------------------------------------------------


def _application_order(tuning: TuningSpec) -> tuple:
    """Inserting methods first; ties are sorted, so that random initialisation does not depend on the list's order."""
    options = sorted(tuning.options.items())
    return _row(tuning).stage, tuning.method, repr(tuning.blocks), repr(options)


def _row(tuning: TuningSpec) -> TuningMethod:
    return find_tuning_method(tuning.method, tuning.spec)


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
