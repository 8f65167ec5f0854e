"""Storage dtypes of the feature cache: float32, float16, bfloat16, or int8 quantised per row.

Input: float32 rows. Output: a numpy array for the file; and the inverse. Note: bfloat16, which numpy lacks, is stored
as int16 bits; an int8 row stores its float32 quantisation step in four more bytes. A value that overflows the dtype is
an error and never becomes infinite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from clasp.plain_types import StorageDtype, UserError


@dataclass(frozen=True, slots=True)
class DtypeCodec:
    """One storage dtype: the numpy dtype of the file, extra columns beyond ``D``, and the conversions."""

    dtype: np.dtype
    extra_columns: int
    pack: Callable[[Float[Tensor, "n D"]], Shaped[np.ndarray, "n columns"]]
    unpack: Callable[[Shaped[np.ndarray, "... columns"]], Float[Tensor, "... D"]]

    def num_bytes(self, rows: int, width: int) -> int:
        """Bytes of ``rows`` rows of ``width`` values."""
        return rows * (width + self.extra_columns) * self.dtype.itemsize


def _pack_float16(values: Float[Tensor, "n D"]) -> Shaped[np.ndarray, "n D"]:
    if bool((values.abs() > torch.finfo(torch.float16).max).any()):
        raise UserError(
            f"the hidden states of a frozen prefix reach {float(values.abs().nan_to_num().max()):.3g}, which float16 "
            "cannot hold; set data.feature_cache = 'bfloat16' or 'float32'"
        )
    return values.half().numpy()


def _pack_int8(values: Float[Tensor, "n D"]) -> Shaped[np.ndarray, "n columns"]:
    steps = values.abs().amax(dim=1, keepdim=True) / 127
    quantised = (values / steps.clamp(min=torch.finfo(torch.float32).tiny)).round().nan_to_num().to(torch.int8)
    return np.concatenate((quantised.numpy(), steps.numpy().view(np.int8)), axis=1)


def _unpack_int8(stored: Shaped[np.ndarray, "... columns"]) -> Float[Tensor, "... D"]:
    steps = np.ascontiguousarray(stored[..., -4:]).view(np.float32)
    return torch.from_numpy(stored[..., :-4]).float() * torch.from_numpy(steps)


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
