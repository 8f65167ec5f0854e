"""Probes of a tower: that its features depend on their own input only, and which parameters get a gradient.

Input: an encoding function and tiny inputs. Output: nothing, or a ``UserError`` that names the cause; or the parameters
without a gradient. Note: one row alone is compared with the same row in a padded batch, and only where they differ do
further passes find the cause. Gradient flow is read from the autograd graph of a forward pass; a single
small gradient is computed, since some nets have no backward pass in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.structure import is_transformers_model
from clasp.models.transformer.bert import BertEncoder
from clasp.models.transformer.encoders import TextTransformer
from clasp.types import Pixels, Tokens, UserError

_SHORT, _LONG = 4, 11  # tokens of the probed text, and of the other row of its batch
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # measured: rounding changes a float32 feature by 5e-7
_LOW_PRECISION_TOLERANCE = 0.05
_SMALL = 1_000_000  # elements of a parameter whose gradient is cheap
FORWARD_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)


@dataclass(frozen=True, slots=True)
class ProbeInputs:
    """One row alone, and batches in which its features must be the same; it is the last row of both."""

    alone: Pixels | Tokens
    beside: Pixels | Tokens
    """after another row of the same shape"""
    padded: Pixels | Tokens
    """after a longer row, hence padded; for images the same as ``beside``"""


def image_probe(size: int, device: torch.device) -> ProbeInputs:
    """Two random images of ``size`` x ``size`` pixels."""
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, 3, size, size, generator=generator).to(device)
    return ProbeInputs(Pixels(both[1:]), Pixels(both), Pixels(both))


def text_probe(net: nn.Module, device: torch.device) -> ProbeInputs:
    """Two texts, of 4 and of 11 tokens, or of fewer where the net has fewer positions."""
    rows, positions, pad = _text_limits(net)
    long = min(_LONG, positions)
    short = min(_SHORT, max(1, long - 1))
    ids = (torch.arange(2 * long).reshape(2, long) * 5 + 1) % max(1, min(rows, 60) - 3) + min(3, rows - 1)
    ids = ids.to(device)
    full = torch.ones_like(ids, dtype=torch.bool)
    mask = torch.arange(long, device=device) < torch.tensor([[long], [short]], device=device)
    return ProbeInputs(
        alone=Tokens(ids[1:, :short], full[1:, :short]),
        beside=Tokens(ids[:, :short], full[:, :short]),
        padded=Tokens(ids.masked_fill(~mask, pad), mask),
    )


def first_states(
    name: str, family: str, encode: Callable[[Pixels | Tokens], Tensor], inputs: Pixels | Tokens
) -> Float[Tensor, "U N D"]:
    """Hidden states of the first forward pass of the tower ``name``; failures are raised as ``UserError``."""
    try:
        states = encode(inputs)
    except UserError:
        raise
    except FORWARD_ERRORS as error:
        what = f"{inputs.values.shape[-1]} px a side" if isinstance(inputs, Pixels) else f"{inputs.ids.shape[1]} tokens"
        raise UserError(
            f"tower = {name!r}: {family} cannot read an input of {what} ({first_line(error)}); a net that is called in "
            "another way needs a forward_features in its clasp.Backbone"
        ) from error
    if isinstance(inputs, Tokens) and states.shape[:2] != inputs.ids.shape:
        raise UserError(
            f"tower = {name!r}: {family} returns a tensor of shape {list(states.shape)} for {inputs.ids.shape[1]} "
            "tokens, not a state of each; give its clasp.Backbone a forward_features that does"
        )
    return states


def check_consistency(
    name: str, family: str, encode: Callable[[Pixels | Tokens], Tensor], first: Tensor, given: ProbeInputs
) -> None:
    """Check that ``encode`` returns ``first``, the features of ``given.alone``, for that row in every batch.

    Raises ``UserError`` that names what the features depend on besides their own input: randomness, the other rows of
    the batch, or padding. Also for features that are not finite.
    """
    if not first.isfinite().all():
        raise UserError(f"tower = {name!r}: {family} returns numbers that are not finite for an ordinary input")
    tolerance = _TOLERANCE.get(first.dtype, _LOW_PRECISION_TOLERANCE)
    if (off := relative_difference(encode(given.padded)[-1:], first)) <= tolerance:
        return
    if (again := relative_difference(encode(given.alone), first)) > tolerance:
        what, off = "returns other features each time for the same input (it draws at random in evaluation too)", again
    elif (beside := relative_difference(encode(given.beside)[-1:], first)) > tolerance:
        what, off = "returns features of an input that depend on the others in its batch", beside
    else:
        what = "returns features of a caption that depend on its padding, hence on its neighbours (no mask for it)"
    raise UserError(
        f"tower = {name!r}: {family} {what}: they differ by {100 * off:.2g} %; choose another tower, or write a "
        "factory that gives a clasp.Backbone whose forward_features does not"
    )


def relative_difference(values: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; infinite where shapes differ or values are not finite."""
    if values.shape != expected.shape:
        return torch.inf
    off = (values.float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-12)
    return off.item() if off.isfinite() else torch.inf


def reached_parameters(output: Tensor) -> set[int]:
    """The ``id`` of each parameter that gets a gradient from ``output``, read from the autograd graph."""
    found, seen, waiting = set(), set(), [output.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("AccumulateGrad"):
            found.add(id(node.variable))
        waiting += [following for following, _ in node.next_functions]
    return found


def parameters_without_gradient(
    parameters: Iterable[tuple[str, nn.Parameter]], names: set[str], encode: Callable[[], Tensor]
) -> set[str]:
    """Those of ``names`` that get no gradient from the output of ``encode``. ``requires_grad`` is restored after."""
    every = list(parameters)
    before = [p.requires_grad for _, p in every]
    try:
        for name, p in every:
            p.requires_grad_(name in names)
        with torch.enable_grad():
            output = encode()
            reached = reached_parameters(output)
            lowest = next((p for _, p in every if id(p) in reached and p.numel() <= _SMALL), None)
            if lowest is not None:  # Reformer raises in a backward pass in evaluation mode
                torch.autograd.grad(output.float().sum(), lowest)
    finally:
        for (_, p), flag in zip(every, before, strict=True):
            p.requires_grad_(flag)
    return {name for name, p in every if name in names and id(p) not in reached}


def first_line(error: Exception) -> str:
    """An error in one line, for a message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# --- how -------------------------------------------------------------------------------------------------------------


def _text_limits(net: nn.Module) -> tuple[int, int, int]:
    """Vocabulary size, number of positions and padding id of a text net; small defaults where they are not known."""
    if isinstance(net, TextTransformer):
        return net.settings.vocabulary, net.settings.context, 0
    if isinstance(net, BertEncoder):
        limits = net.settings
        return limits.vocab_size, limits.max_position_embeddings - 2, limits.pad_token_id
    if not is_transformers_model(net):
        return 3, _LONG, 0
    facts = net.config.to_dict()
    table: Any = net.get_input_embeddings()
    rows = table.num_embeddings if isinstance(table, nn.Embedding) else facts.get("vocab_size") or 3
    pad, positions = facts.get("pad_token_id"), facts.get("max_position_embeddings")
    longest = positions - 2 if isinstance(positions, int) and positions > 4 else _LONG  # RoBERTa leaves two unused
    return rows, longest, pad if isinstance(pad, int) and 0 <= pad < rows else 0
