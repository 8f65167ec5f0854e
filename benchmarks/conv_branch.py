"""The speed-up from computing the patch-sized convolutions of MS-CLIP's parallel branch as a matrix product.

    python -m benchmarks.conv_branch

Not in ``make bench``, since it compares clasp with itself. Prints milliseconds of a forward and a backward pass for
four kernels of ``msclip/msclip-s-b32`` at 32 images, and two of a small encoder at 128, in float32 and bfloat16: the
median of five, with minimum and maximum.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from clasp import configure_environment
from clasp.models.transformer.convolutions import DepthwisePatchConv

# images, channels, side of the feature map, kernel
WORK = ((32, 48, 112, 16), (32, 96, 56, 8), (32, 192, 28, 4), (32, 384, 14, 2), (128, 48, 32, 8), (128, 96, 16, 4))
REPEATS = 5


def main() -> None:
    """All shapes, alternating between the implementations."""
    configure_environment()
    for images, channels, side, kernel in WORK:
        maps = torch.randn(images, channels, side, side)
        ours = DepthwisePatchConv(channels, kernel, "batch")
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "one product": ours.conv_as_matmul,
            "convolution": _convolution(ours),
        }
        for kind in (torch.float32, torch.bfloat16):
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for repeat in range(REPEATS + 1):
                for name, way in ways.items():
                    seconds = _once(way, maps, kind)
                    if repeat:  # skip the warm-up
                        taken[name].append(1e3 * seconds)
            summary = "  ".join(
                f"{name} {sorted(each)[REPEATS // 2]:.1f} ({min(each):.1f} to {max(each):.1f})"
                for name, each in taken.items()
            )
            print(f"{[*maps.shape]} kernel {kernel:2} {str(kind).removeprefix('torch.'):8} ms: {summary}", flush=True)


def _convolution(ours: DepthwisePatchConv) -> Callable[[Tensor], Tensor]:
    conv = ours.conv
    return lambda maps: F.conv2d(maps, conv.weight, stride=conv.stride, groups=conv.groups)


def _once(way: Callable[[Tensor], Tensor], maps: Tensor, kind: torch.dtype) -> float:
    given = maps.to(kind).requires_grad_()
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == torch.bfloat16):
        out = way(given)
    out.float().square().sum().backward()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
