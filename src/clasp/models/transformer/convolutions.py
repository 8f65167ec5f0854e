"""Image-specific modules: patch embedding, convolutional stem (early specialisation), parallel convolutional branch.

Input: pixels. Output: patch tokens in row-major order, or feature maps that lateral adapters add to the tokens before
some blocks. There are two branches: MS-CLIP's (You et al., ECCV 2022), with BatchNorm, whose lateral adapters replace
the patch tokens; and ours, without running statistics, whose gated lateral adapters are residual and zero at
initialisation, so that the branch can be added to a pre-trained net without changing its output. Note: widths and
strides follow from the net's width and patch size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clasp.models.autocast import is_autocast
from clasp.models.transformer.settings import STEM_STAGES, ConvNormKind, ParallelBranchSettings

_CONV_NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "batch": lambda channels, eps: nn.BatchNorm2d(channels, eps=eps),
    "group": lambda channels, eps: nn.GroupNorm(1, channels, eps=eps),  # over the whole map; no running statistics
}
_STEM_EPS, _BOTTLENECK_EPS = 1e-5, 1e-6  # the bottlenecks of the released branch differ from its other norms


class PatchEmbed(nn.Module):
    """Patch embedding by one strided convolution; tokens in row-major order."""

    def __init__(self, patch: int, width: int, *, bias: bool):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=bias)

    def forward(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B N D"]:
        return maps_to_tokens(self.proj(pixels))


class ConvNorm(nn.Module):
    """A convolution without a bias, followed by a norm of its channels.

    Padding is 0 where the kernel equals the stride, else ``kernel // 2``, so that a stride of 1 preserves the size.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        *,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        norm: ConvNormKind,
        eps: float = _STEM_EPS,
    ):
        super().__init__()
        padding = 0 if kernel == stride else kernel // 2
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=False)
        self.norm = _CONV_NORMS[norm](out, eps)

    def forward(self, x: Float[Tensor, "B _ height width"]) -> Float[Tensor, "B _ _ _"]:
        return self.norm(self.conv(x))


class StemStage(nn.Module):
    """``relu(conv3x3(x) + conv1x1(x))``, both with the same stride and a norm."""

    def __init__(self, channels: int, out: int, stride: int, norm: ConvNormKind):
        super().__init__()
        self.main = ConvNorm(channels, out, kernel=3, stride=stride, norm=norm)
        self.shortcut = ConvNorm(channels, out, kernel=1, stride=stride, norm=norm)

    def forward(self, x: Float[Tensor, "B _ height width"]) -> Float[Tensor, "B _ _ _"]:
        return F.relu(self.main(x) + self.shortcut(x))


class ConvStem(nn.Module):
    """Early specialisation: convolutions in place of patches and of the first block (MS-CLIP).

    The resolution is halved until a position covers ``patch`` pixels, at widths D/16, D/16, D/8 … D; the last layer is
    a 1x1 convolution without norm or activation.
    """

    def __init__(self, patch: int, width: int, norm: ConvNormKind):
        super().__init__()
        widths = [width >> STEM_STAGES, *(width >> (STEM_STAGES - 1 - number) for number in range(STEM_STAGES))]
        first, *strides = halving_strides(patch, STEM_STAGES + 1)
        self.first = ConvNorm(3, widths[0], kernel=3, stride=first, norm=norm)
        self.stages = nn.ModuleList(
            StemStage(widths[number], widths[number + 1], stride, norm) for number, stride in enumerate(strides)
        )
        self.last = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B N D"]:
        x = F.relu(self.first(pixels))
        for stage in self.stages:
            x = stage(x)
        return maps_to_tokens(self.last(x))


class BranchStem(nn.Module):
    """Stage 0 of a branch: ``relu(conv3x3(pixels))`` with a norm."""

    def __init__(self, out: int, stride: int, norm: ConvNormKind):
        super().__init__()
        self.main = ConvNorm(3, out, kernel=3, stride=stride, norm=norm)

    def forward(self, pixels: Float[Tensor, "B 3 height width"]) -> Float[Tensor, "B _ _ _"]:
        return F.relu(self.main(pixels))


class Bottleneck(nn.Module):
    """A residual bottleneck (He et al., CVPR 2016): 1x1, 3x3 with the stride, 1x1; half the width inside."""

    def __init__(self, channels: int, out: int, stride: int, norm: ConvNormKind):
        super().__init__()
        self.reduce = ConvNorm(channels, out // 2, kernel=1, norm=norm, eps=_BOTTLENECK_EPS)
        self.spatial = ConvNorm(out // 2, out // 2, kernel=3, stride=stride, norm=norm, eps=_BOTTLENECK_EPS)
        self.expand = ConvNorm(out // 2, out, kernel=1, norm=norm, eps=_BOTTLENECK_EPS)
        self.shortcut = ConvNorm(channels, out, kernel=1, stride=stride, norm=norm, eps=_BOTTLENECK_EPS)

    def forward(self, x: Float[Tensor, "B _ height width"]) -> Float[Tensor, "B _ _ _"]:
        inside = F.relu(self.spatial(F.relu(self.reduce(x))))
        return F.relu(self.expand(inside) + self.shortcut(x))


class DepthwisePatchConv(ConvNorm):
    """A depthwise convolution whose ``kernel`` is its stride, and a norm: from the maps to the patch grid.

    Windows do not overlap, so it is also one matrix product per channel, 2 to 14 times as fast in bfloat16 on a CPU;
    in float32 the convolution is faster (``benchmarks/conv_branch.py``).
    """

    def __init__(self, channels: int, kernel: int, norm: ConvNormKind):
        super().__init__(channels, channels, kernel=kernel, stride=kernel, groups=channels, norm=norm)

    def forward(self, x: Float[Tensor, "B _ height width"]) -> Float[Tensor, "B _ _ _"]:
        use_conv = x.is_meta or (x.dtype == torch.float32 and not is_autocast(x.device))
        return self.norm(self.conv(x) if use_conv else self.conv_as_matmul(x))

    def conv_as_matmul(self, x: Float[Tensor, "B _ height width"]) -> Float[Tensor, "B _ _ _"]:
        """The output of ``conv``, as a batched matrix product."""
        kernel = self.conv.kernel_size[0]
        windows = x.unflatten(3, (-1, kernel)).unflatten(2, (-1, kernel))
        batch, _, rows, _, columns, _ = windows.shape
        windows = windows.permute(1, 0, 2, 4, 3, 5).flatten(4).flatten(1, 3)
        maps = torch.bmm(windows, self.conv.weight.flatten(1).unsqueeze(2))
        return maps.view(-1, batch, rows, columns).transpose(0, 1)


class LateralAdapter(nn.Module):
    """MS-CLIP's lateral adapter: patches become ``bottom(patches) + top(maps)``, then all tokens are normalised.

    The patches have no residual connection, and the tokens before them (the class token) are doubled, both as in the
    released code. ``kernel``: positions of the maps per patch, along a side.
    """

    def __init__(self, width: int, channels: int, kernel: int, state_norm: nn.Module):
        super().__init__()
        self.top = DepthwisePatchConv(channels, kernel, "batch")
        self.widen = nn.Conv2d(channels, width, 1, bias=False)
        self.bottom = ConvNorm(width, width, kernel=3, groups=width, norm="batch")
        self.norm = state_norm

    def forward(
        self, states: Float[Tensor, "B N D"], maps: Float[Tensor, "B _ height width"]
    ) -> Float[Tensor, "B N D"]:
        top = self.widen(self.top(maps))
        front, patches = split_patch_map(states, top)
        return self.norm(torch.cat((front + front, maps_to_tokens(self.bottom(patches) + top)), dim=1))


class GatedLateralAdapter(nn.Module):
    """Gated lateral adapter: ``patches + gamma * (bottom(patches) + top(maps))``, ``gamma`` initialised to zero.

    The class token is unchanged. There is no normalisation over the batch. The gate is our change to MS-CLIP's branch,
    after the layer scale of Touvron et al. (ICCV 2021), which is initialised to a small value and not to zero.
    """

    def __init__(self, width: int, channels: int, kernel: int):
        super().__init__()
        self.top = DepthwisePatchConv(channels, kernel, "group")
        self.widen = nn.Conv2d(channels, width, 1, bias=False)
        self.bottom = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.gamma = nn.Parameter(torch.zeros(width))

    def forward(
        self, states: Float[Tensor, "B N D"], maps: Float[Tensor, "B _ height width"]
    ) -> Float[Tensor, "B N D"]:
        top = self.widen(self.top(maps))
        front, patches = split_patch_map(states, top)
        return torch.cat(
            (front, states[:, front.shape[1] :] + self.gamma * maps_to_tokens(self.bottom(patches) + top)), dim=1
        )


class ParallelBranch(nn.Module):
    """Convolutional stages of decreasing resolution, each added to the tokens before one block.

    ``before``: indices of those blocks in the net. The last stage is as wide as the net, each stage before it half as
    wide as the next. A stage is computed right before its block.
    """

    def __init__(
        self,
        settings: ParallelBranchSettings,
        *,
        patch: int,
        width: int,
        before: Sequence[int],
        state_norm: Callable[[int], nn.Module],
    ):
        super().__init__()
        norm: ConvNormKind = "batch" if settings.kind == "paper" else "group"
        widths = [width >> number for number in reversed(range(len(before)))]
        strides = halving_strides(patch, len(before))
        self.stage_by_block = {number: stage for stage, number in enumerate(before)}
        self.stages = nn.ModuleList([BranchStem(widths[0], strides[0], norm)])
        self.stages.extend(
            Bottleneck(widths[number - 1], widths[number], strides[number], norm) for number in range(1, len(before))
        )
        self.laterals = nn.ModuleDict()
        size = 1  # pixels per position of the maps, along a side
        for number, channels, stride in zip(before, widths, strides, strict=True):
            size *= stride
            self.laterals[str(number)] = (
                LateralAdapter(width, channels, patch // size, state_norm(width))
                if settings.kind == "paper"
                else GatedLateralAdapter(width, channels, patch // size)
            )

    def forward(
        self, number: int, states: Float[Tensor, "B N D"], maps: Float[Tensor, "B _ height width"]
    ) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B _ _ _"]]:
        """The input of block ``number``, one of ``stage_by_block``, and the maps of its stage; the first stage reads
        pixels."""
        maps = self.stages[self.stage_by_block[number]](maps)
        return self.laterals[str(number)](states, maps), maps


def halving_strides(patch: int, count: int) -> list[int]:
    """Strides of ``count`` convolutions: 2 until a position covers ``patch`` pixels (a power of 2), then 1."""
    halved = patch.bit_length() - 1
    assert patch == 1 << halved, f"{patch} is not a power of 2; settings refuse it"
    return [2 if number < halved else 1 for number in range(count)]


def maps_to_tokens(maps: Float[Tensor, "B D height width"]) -> Float[Tensor, "B N D"]:
    """Feature maps as tokens, in row-major order."""
    return maps.flatten(2).transpose(1, 2)


def split_patch_map(
    states: Float[Tensor, "B N D"], maps: Float[Tensor, "B D height width"]
) -> tuple[Float[Tensor, "B _ D"], Float[Tensor, "B D height width"]]:
    """The tokens before the patches, and the patches as feature maps of the size of ``maps``."""
    count = maps.shape[2] * maps.shape[3]
    patches = states[:, -count:].transpose(1, 2).unflatten(2, maps.shape[2:])
    return states[:, :-count], patches
