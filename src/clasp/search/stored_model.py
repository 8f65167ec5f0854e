"""The model whose embeddings a store holds, and unit length: what every store checks before it writes or searches.

Input: fingerprints, or vectors. Output: nothing, or one line that says what is wrong. Note: norms are computed in
float64, so that a vector has the same length in every store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from clasp.plain_types import UserError


@dataclass(frozen=True, slots=True)
class StoredModel:
    """Fingerprint and name of the model that computed the vectors of a store; both empty if none is recorded."""

    fingerprint: str = ""
    name: str = ""

    def __str__(self) -> str:
        short = ", ".join((self.fingerprint[:12], *self.fingerprint.split(":")[3:]))  # the precision, unless float32
        return f"{self.name} ({short})" if self.name else short or "of an unknown name"

    def require_same(self, other: StoredModel, store: object) -> None:
        """``UserError`` if ``other`` is another model."""
        if self.fingerprint != other.fingerprint:
            raise UserError(
                f"{store} was made with the model {self}, not {other}; to make it anew type: clasp index RUN FOLDER"
            )


def row_norms(values: Float[np.ndarray, "n E"], names: Sequence[str]) -> Float64[np.ndarray, " n"]:
    """L2 norms of the rows; ``UserError`` naming the first that is zero or not finite."""
    lengths = np.sqrt(np.einsum("ij,ij->i", values, values, dtype=np.float64))
    bad = np.flatnonzero(~(np.isfinite(lengths) & (lengths > 0)))
    if len(bad):
        raise UserError(f"the vector of {names[int(bad[0])]!r} is zero or not finite, so it has no direction")
    return lengths
