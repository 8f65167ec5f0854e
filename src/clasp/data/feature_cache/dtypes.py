"""How rows of numbers are written to disk: float32, float16, bfloat16, or int8 with a scale for each row.

In go float32 rows, out comes an array that numpy can keep in a file; and back. Unusual: bfloat16, which numpy does not
know, is kept as its bits; an int8 row carries its scale in four more bytes. A value that a storage cannot hold is an
error and never becomes an infinity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from clasp.types import UserError

StorageDtype = Literal["float32", "float16", "bfloat16", "int8"]


@dataclass(frozen=True, slots=True)
class DtypeCodec:
    """One way: the type in the file, how many of them a row of ``D`` numbers takes, and the two directions."""

    dtype: np.dtype
    extra_columns: int
    pack: Callable[[Float[Tensor, "n D"]], Shaped[np.ndarray, "n columns"]]
    unpack: Callable[[Shaped[np.ndarray, "... columns"]], Float[Tensor, "... D"]]

    def num_bytes(self, rows: int, width: int) -> int:
        """What ``rows`` rows of ``width`` numbers take."""
        return rows * (width + self.extra_columns) * self.dtype.itemsize


def _pack_float16(values: Float[Tensor, "n D"]) -> Shaped[np.ndarray, "n D"]:
    if bool((values.abs() > torch.finfo(torch.float16).max).any()):
        raise UserError(
            f"the states of a frozen trunk reach {float(values.abs().nan_to_num().max()):.3g}, which float16 cannot "
            "hold; set data.feature_cache = 'bfloat16' or 'float32'"
        )
    return values.half().numpy()


def _pack_int8(values: Float[Tensor, "n D"]) -> Shaped[np.ndarray, "n columns"]:
    scales = values.abs().amax(dim=1, keepdim=True) / 127
    whole = (values / scales.clamp(min=torch.finfo(torch.float32).tiny)).round().nan_to_num().to(torch.int8)
    return np.concatenate((whole.numpy(), scales.numpy().view(np.int8)), axis=1)


def _unpack_int8(stored: Shaped[np.ndarray, "... columns"]) -> Float[Tensor, "... D"]:
    scales = np.ascontiguousarray(stored[..., -4:]).view(np.float32)
    return torch.from_numpy(stored[..., :-4]).float() * torch.from_numpy(scales)


DTYPE_CODECS: dict[StorageDtype, DtypeCodec] = {
    "float32": DtypeCodec(np.dtype("<f4"), 0, lambda values: values.numpy(), torch.from_numpy),
    "float16": DtypeCodec(np.dtype("<f2"), 0, _pack_float16, torch.from_numpy),
    "bfloat16": DtypeCodec(
        np.dtype("<i2"),
        0,
        lambda values: values.bfloat16().view(torch.int16).numpy(),
        lambda stored: torch.from_numpy(stored).view(torch.bfloat16),
    ),
    "int8": DtypeCodec(np.dtype("i1"), 4, _pack_int8, _unpack_int8),
}
