"""Our own nets: the block beside an obvious version, padding that changes nothing, stems, branches and starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from clasp.models.structure import find_structure
from clasp.models.transformer.blocks import Block, LayerNorm, make_norm
from clasp.models.transformer.convolutions import DepthwisePatchConv, halving_strides
from clasp.models.transformer.deit import VisionTransformer
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer, init_weights
from clasp.models.transformer.settings import (
    BlockSettings,
    ImageTransformerSettings,
    ParallelBranchSettings,
    TextTransformerSettings,
)
from clasp.models.tuning.depth import append_blocks, truncate_blocks
from clasp.training.cost.flops import count_macs
from clasp.types import UserError
from toytowers import base

BLOCK = {"width": 12, "heads": 3}
IMAGE = {"width": 32, "heads": 2, "layers": 4, "size": 32, "patch": 8}
TEXT = {"width": 32, "heads": 2, "layers": 3, "vocabulary": 40, "context": 9}
MASK = torch.tensor([[True] * 5, [True, True, True, False, False]])


def stirred(net: nn.Module) -> nn.Module:
    """No norm, bias, scale or statistic is an identity."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.2 * torch.randn(p.shape, generator=generator)
        for name, b in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                b += 0.3 * torch.rand(b.shape, generator=generator)
    return net.eval()


def image_net(**changes: Any) -> ImageTransformer:
    net = stirred(ImageTransformer(ImageTransformerSettings(**{**IMAGE, **changes})))
    assert isinstance(net, ImageTransformer)
    return net


def text_net(**changes: Any) -> TextTransformer:
    net = stirred(TextTransformer(TextTransformerSettings(**{**TEXT, **changes})))
    assert isinstance(net, TextTransformer)
    return net


# --- the block -------------------------------------------------------------------------------------------------------


def norm_slowly(x: Tensor, norm: Any, kind: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    normed = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return normed * norm.weight + (norm.bias if kind == "layer" else 0)


def attention_slowly(x: Tensor, block: Block, settings: BlockSettings, seen: Callable[[int, int], bool]) -> Tensor:
    """Token by token and head by head, for one row."""
    attn: Any = block.attn
    q, k, v = (x @ attn.qkv.weight.T + attn.qkv.bias).chunk(3, dim=1)
    size = settings.width // settings.heads
    out = torch.zeros_like(x)
    for head, n in product(range(settings.heads), range(len(x))):
        part = slice(head * size, (head + 1) * size)
        query, keys = q[n, part], k[:, part]
        if settings.qk_norm:
            query = norm_slowly(query, attn.q_norm, settings.norm, settings.eps)
            keys = norm_slowly(keys, attn.k_norm, settings.norm, settings.eps)
        scores = [math.exp(float(query @ keys[m]) / math.sqrt(size)) if seen(n, m) else 0.0 for m in range(len(x))]
        for m, score in enumerate(scores):
            out[n, part] += score / sum(scores) * v[m, part]
    return out @ attn.proj.weight.T + attn.proj.bias


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    "extras",
    [
        {},
        {"qk_norm": True},
        {"layer_scale": 0.1},
        {"activation": "quick-gelu"},
        {"norm_position": "post", "layer_scale": 0.1},
    ],
)
@pytest.mark.parametrize("way", ["all", "masked", "causal"])
def test_the_block_beside_an_obvious_version(norm: str, extras: dict[str, Any], way: str):
    settings = BlockSettings(**BLOCK, norm=norm, eps=1e-3, **extras)
    block = stirred(Block(settings, causal=way == "causal"))
    assert isinstance(block, Block)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        fast = block(x, MASK if way == "masked" else None)
        for row in range(2):
            seen = {
                "all": lambda n, m: True,
                "masked": lambda n, m, row=row: bool(MASK[row, m]),
                "causal": lambda n, m: m <= n,
            }[way]
            pre, post = settings.norm_position == "pre", settings.norm_position == "post"
            one = norm_slowly(x[row], block.norm1, norm, 1e-3) if pre else x[row]
            attended = attention_slowly(one, block, settings, seen)
            slow = x[row] + (attended if block.gamma_1 is None else attended * block.gamma_1)
            slow = norm_slowly(slow, block.norm1, norm, 1e-3) if post else slow
            two = norm_slowly(slow, block.norm2, norm, 1e-3) if pre else slow
            hidden = two @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
            active = hidden * (1.702 * hidden).sigmoid() if "activation" in extras else F.gelu(hidden)
            fed = active @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
            slow = slow + (fed if block.gamma_2 is None else fed * block.gamma_2)
            slow = norm_slowly(slow, block.norm2, norm, 1e-3) if post else slow
            torch.testing.assert_close(fast[row], slow, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_the_map_is_what_mixes_the_values(causal: bool):
    attn: Any = stirred(Block(BlockSettings(**BLOCK), causal=causal)).attn
    x = torch.randn(2, 5, 12)
    mask = None if causal else MASK
    with torch.no_grad():
        weights = attn.attention_weights(x, mask)
        values = attn.qkv(x)[..., 24:].view(2, 5, 3, 4).transpose(1, 2)
        mixed = (weights @ values).transpose(1, 2).reshape(2, 5, 12)
        torch.testing.assert_close(attn.proj(mixed), attn(x, mask), atol=1e-6, rtol=1e-5)
    assert (weights.triu(1) == 0).all() if causal else (weights[1, :, :, 3:] == 0).all()


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_statistics_are_taken_in_float32(norm: str):
    """States whose squares overflow half precision, and whose mean is far above their deviation."""
    module = make_norm(BlockSettings(**BLOCK, norm=norm, eps=1e-12), 256).to(torch.float16)
    x = (60_000 + 32 * torch.randn(3, 256, generator=torch.Generator().manual_seed(0))).to(torch.float16)
    wanted = norm_slowly(x.double(), module.double(), norm, 1e-12)
    ours = module.to(torch.float16)(x)
    torch.testing.assert_close(ours.double(), wanted, atol=2e-3, rtol=2e-3)


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_padding_and_where_it_is_cut_change_nothing(attention: str):
    torch.manual_seed(0)  # the tolerance is that of these weights
    net = text_net(attention=attention, entry_norm=True)
    ids = torch.randint(0, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([4, 6, 2])
    mask = torch.arange(9) < lengths[:, None]
    other = torch.where(mask, ids, 39 - ids)
    with torch.no_grad():
        whole = net(ids, mask.long()).last_hidden_state
        padded_otherwise = net(other, mask.long()).last_hidden_state
        cut = net(ids[:, :6], mask[:, :6].long()).last_hidden_state
        for row, length in enumerate(lengths.tolist()):
            alone = net(ids[row : row + 1, :length], torch.ones(1, length, dtype=torch.long)).last_hidden_state
            for seen in (padded_otherwise[row], cut[row], alone[0]):
                torch.testing.assert_close(seen[:length], whole[row, :length], atol=2e-6, rtol=1e-5)
    assert not torch.allclose(whole[0, 3], net(ids.flip(0), mask.long()).last_hidden_state[0, 3])


def test_the_two_ways_to_read_differ_in_what_comes_later():
    ids = torch.arange(6)[None]
    other = torch.tensor([[0, 1, 2, 3, 4, 30]])
    ones = torch.ones_like(ids)
    with torch.no_grad():
        for attention, same in (("causal", True), ("bidirectional", False)):
            net = text_net(attention=attention)
            first, second = (net(each, ones).last_hidden_state[:, :5] for each in (ids, other))
            assert torch.equal(first, second) == same


@pytest.mark.parametrize("kind", [image_net, text_net])
def test_after_blocks_that_end_with_a_norm_there_is_no_other(kind: Callable[..., Any]):
    net = kind(norm_position="post", entry_norm=True)
    assert isinstance(net.norm, nn.Identity) and not list(net.norm.parameters())
    assert [name for name, _ in net.named_parameters()] == [
        name for name, _ in kind(entry_norm=True).named_parameters() if not name.startswith("norm.")
    ]


def test_tokens_of_another_width_are_brought_to_that_of_the_states():
    narrow, plain = text_net(token_width=5), text_net()
    assert narrow.token_embed.weight.shape == (40, 5) and narrow.token_map.weight.shape == (32, 5)
    assert "token_map.weight" not in plain.state_dict()
    plain.load_state_dict(
        {
            **{name: tensor for name, tensor in narrow.state_dict().items() if not name.startswith("token_")},
            "token_embed.weight": narrow.token_embed.weight @ narrow.token_map.weight.T,
        }
    )
    ids = torch.arange(6)[None]
    one, other = (net(ids, torch.ones_like(ids)).last_hidden_state for net in (narrow, plain))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_tokens_of_another_width_start_as_large_as_plain_ones():
    settings = TextTransformerSettings(**{**TEXT, "width": 256, "vocabulary": 500, "token_width": 64, "token_std": 0.3})
    net = TextTransformer(settings)
    init_weights(net, seed=0)
    with torch.no_grad():
        assert float(net.token_map(net.token_embed.weight).std()) == pytest.approx(0.3, rel=0.05)


def test_a_caption_without_positions_is_refused():
    with pytest.raises(UserError, match=r"a caption of 10 tokens.*set text\.max_tokens = 9"):
        text_net()(torch.zeros(1, 10, dtype=torch.long), torch.ones(1, 10, dtype=torch.long))


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patch", "count", "strides"),
    [(32, 5, [2, 2, 2, 2, 2]), (16, 5, [2, 2, 2, 2, 1]), (8, 5, [2, 2, 2, 1, 1]), (16, 3, [2, 2, 2]), (2, 2, [2, 1])],
)
def test_halvings_by_hand(patch: int, count: int, strides: list[int]):
    assert halving_strides(patch, count) == strides


@pytest.mark.parametrize("stem", ["batch", "group"])
@pytest.mark.parametrize("patch", [32, 16, 8, 4])
def test_a_stem_gives_as_many_tokens_as_patches(stem: str, patch: int):
    net = image_net(size=64, patch=patch, stem=stem)
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, (64 // patch) ** 2 + 1, 32)
    assert len(net.blocks) == 3, "the stem is layer 0"
    assert any(True for _ in net.buffers()) == (stem == "batch"), "ours keeps no statistics"


@pytest.mark.parametrize("kind", ["paper", "gated"])
@pytest.mark.parametrize(("patch", "before"), [(32, (0, 1, 2, 3)), (16, (1, 3)), (8, (0, 1, 2, 3)), (4, (2,))])
def test_a_branch_fits_any_patch(kind: str, patch: int, before: tuple[int, ...]):
    net = image_net(size=64, patch=patch, branch={"kind": kind, "before": before})
    assert net(torch.randn(2, 3, 64, 64)).shape == (2, (64 // patch) ** 2 + 1, 32)
    assert find_structure(net).min_prefix_blocks == max(before) + 1
    net(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_the_papers_lateral_adapter_by_hand():
    """One stage before block 0, so that what enters the block can be worked out from the pixels."""
    net = image_net(size=8, patch=2, layers=1, branch={"kind": "paper", "before": (0,)})
    lateral: Any = net.parallel.laterals["0"]
    pixels = torch.randn(1, 3, 8, 8)
    entered = {}
    net.blocks[0].register_forward_pre_hook(lambda block, args: entered.update(x=args[0]))
    with torch.no_grad():
        net(pixels)
        states = torch.cat((net.cls_token, net.patch_embed(pixels)), dim=1) + net.pos_embed
        maps = net.parallel.stages[0](pixels)  # [1 32 4 4], a place for each patch
        top = lateral.widen(lateral.top(maps))
        kernel = lateral.bottom.conv.weight
        padded = F.pad(states[:, 1:].transpose(1, 2).view(1, 32, 4, 4), (1, 1, 1, 1))
        mixed = torch.zeros(1, 32, 4, 4)
        for row, column in product(range(4), range(4)):
            window = padded[:, :, row : row + 3, column : column + 3]
            mixed[:, :, row, column] = (window * kernel[:, 0]).sum((2, 3))
        patches = (lateral.bottom.norm(mixed) + top).flatten(2).transpose(1, 2)
        wanted = lateral.norm(torch.cat((2 * states[:, :1], patches), dim=1))
    torch.testing.assert_close(entered["x"], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("deit", [False, True])
def test_a_gated_branch_changes_nothing_until_its_gates_move(deit: bool):
    net = stirred(VisionTransformer(size=32, patch=8, width=32, blocks=4, heads=2)) if deit else image_net(stem="group")
    assert isinstance(net, ImageTransformer)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = net(pixels)
    names = net.add_parallel_branch(ParallelBranchSettings(kind="gated", before=(1, 3)), seed=0)
    assert names == {name for name, _ in net.named_parameters() if name.startswith("parallel.")}
    with torch.no_grad():
        assert torch.equal(net(pixels), before)
    net(pixels).square().sum().backward()
    gates = {name for name in names if name.endswith("gamma")}
    assert len(gates) == 2
    for name, p in net.named_parameters():
        assert p.grad is not None and (name in gates or name not in names) == bool(p.grad.any()), name
    with torch.no_grad():
        for name in gates:
            net.get_parameter(name).fill_(0.5)
        assert not torch.allclose(net(pixels), before)
    net.zero_grad()
    net(pixels).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("kernel", [1, 2, 4])
def test_the_product_of_places_is_the_convolution(kernel: int):
    part = DepthwisePatchConv(6, kernel, "group").double()
    maps = torch.randn(3, 6, 8, 4, dtype=torch.float64, requires_grad=True)
    fast, slow = part.conv_as_matmul(maps), part.conv(maps)
    torch.testing.assert_close(fast, slow)
    grads = [torch.autograd.grad(out.square().sum(), [maps, part.conv.weight]) for out in (fast, slow)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["deit", "dinov2"])
def test_a_fresh_block_starts_its_layer_scale_afresh(kind: str):
    if kind == "deit":
        net: Any = VisionTransformer(size=32, patch=8, width=32, blocks=2, heads=2, layer_scale=0.2)
    else:
        net = base("dinov2").net
        net.config.layerscale_value = 0.2
    scales = ("gamma_1", "lambda1")
    for name, p in net.named_parameters():
        if name.endswith(scales):
            p.data.fill_(0.7)
    new = append_blocks(net, find_structure(net), 1, "random")
    found = {name: p.detach() for name, p in net.named_parameters() if name.endswith(scales)}
    assert {name for name, p in found.items() if torch.all(p == 0.2)} == {name for name in new if name.endswith(scales)}
    assert len(new & set(found)) >= 1


def test_layers_above_which_a_branch_joins_are_kept():
    net = image_net(branch={"kind": "gated", "before": (1, 3)})
    with pytest.raises(UserError, match="the parallel branch joins above"):
        truncate_blocks(net, 2)


def test_a_branch_that_does_not_fit_is_refused():
    net = image_net(patch=8)
    with pytest.raises(UserError, match="there are blocks at layers 0 to 3"):
        net.add_parallel_branch(ParallelBranchSettings(kind="gated", before=(2, 4)), seed=0)
    assert net.parallel is None and net.settings.branch is None
    net.add_parallel_branch(ParallelBranchSettings(kind="gated", before=(1,)), seed=0)
    with pytest.raises(UserError, match="has a branch already"):
        net.add_parallel_branch(ParallelBranchSettings(kind="gated", before=(2,)), seed=0)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"heads": 5}, "heads = 5 does not divide width = 32"),
        ({"patch": 7}, "patch = 7 does not divide size = 32"),
        ({"size": 42, "patch": 14, "stem": "batch"}, "patch = 14: a stem halves images"),
        ({"size": 64, "patch": 64, "branch": {"before": (1,)}}, "patch = 64: a parallel branch halves images"),
        ({"width": 24, "stem": "batch"}, "so 16 divides it"),
        ({"stem": "batch", "branch": {"before": (0, 2)}}, "there are blocks at layers 1 to 3"),
        ({"branch": {"before": (3, 2)}}, "is not a rising list of layers"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], wanted: str):
    with pytest.raises(ValidationError, match=wanted):
        ImageTransformerSettings(**{**IMAGE, **changes})


# --- starts ----------------------------------------------------------------------------------------------------------


def test_a_net_starts_as_the_paper_says_and_the_same_each_time():
    image = ImageTransformer(ImageTransformerSettings(**{**IMAGE, "width": 128, "size": 64}, stem="batch"))
    text = TextTransformer(TextTransformerSettings(**{**TEXT, "width": 128, "vocabulary": 400, "context": 77}))
    before = torch.random.get_rng_state()
    init_weights(image, seed=3)
    init_weights(text, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)

    def deviation(tensor: Tensor) -> float:
        return float(tensor.detach().std())

    block: Any = image.blocks[1]
    assert deviation(block.mlp.fc1.weight) == pytest.approx(0.02, rel=0.03)
    assert deviation(block.attn.proj.weight) == pytest.approx(0.02, rel=0.03)
    assert deviation(block.attn.qkv.weight) == pytest.approx(math.sqrt(2 / (4 * 128)), rel=0.03)
    assert block.mlp.fc1.weight.abs().max() < 0.1
    assert deviation(image.pos_embed) == pytest.approx(128**-0.5, rel=0.05)
    assert deviation(text.pos_embed) == pytest.approx(0.02, rel=0.05)
    assert deviation(text.token_embed.weight) == pytest.approx(0.02, rel=0.03), "ours; the paper's is 1"
    assert all(not p.any() for name, p in text.named_parameters() if name.endswith("bias"))
    again = ImageTransformer(image.settings)
    init_weights(again, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(image.parameters(), again.parameters(), strict=True))
    init_weights(again, seed=5)
    assert not torch.equal(again.cls_token, image.cls_token)


def test_the_papers_token_embedding_is_a_setting():
    text = TextTransformer(TextTransformerSettings(**TEXT, token_std=1.0))
    init_weights(text, seed=0)
    assert float(text.token_embed.weight.detach().std()) == pytest.approx(1, rel=0.1)


def test_macs_by_hand():
    with torch.device("meta"):
        block, x = Block(BlockSettings(**BLOCK), causal=True), torch.zeros(2, 5, 12)
        depthwise, maps = nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.zeros(1, 8, 5, 5)
    matrices = 5 * 12 * (36 + 12 + 48 + 48)
    assert count_macs(lambda: block(x)) == 2 * (matrices + 2 * 5 * 5 * 12)
    assert count_macs(lambda: depthwise(maps)) == 25 * 8 * 9
    real = Block(BlockSettings(**BLOCK), causal=False)
    assert count_macs(lambda: real(torch.zeros(2, 5, 12), MASK)) == 2 * (matrices + 2 * 5 * 5 * 12)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_a_norm_keeps_its_input_in_half_the_memory(trained: bool) -> None:
    """Under autocast; its output is PyTorch's bitwise, as are its gradients in float32."""
    norm, reference = stirred(LayerNorm(48)), stirred(nn.LayerNorm(48))
    norm.requires_grad_(trained)
    x = 3 + 2 * torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))

    def gradients(each: nn.Module, lower: bool) -> tuple[Tensor, list[Tensor], int]:
        given = x.clone().requires_grad_(True)
        kept: list[Tensor] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t.detach(), lambda t: t),
            torch.autocast("cpu", torch.bfloat16, enabled=lower),
        ):
            out = each(given)
        taken = [given, *(p for p in each.parameters() if p.requires_grad)]
        return out, list(torch.autograd.grad((out * weights).sum(), taken)), sum(t.nbytes for t in kept if t.ndim == 3)

    exact, plain, whole = gradients(reference.requires_grad_(trained), False)
    same, bitwise, _ = gradients(norm, False)
    assert torch.equal(same, exact) and all(torch.equal(*each) for each in zip(bitwise, plain, strict=True))
    lower, rounded, half = gradients(norm, True)
    assert torch.equal(lower, exact) and len(rounded) == (3 if trained else 1) and half < 0.6 * whole
    assert all((one - other).norm() < 0.005 * other.norm() for one, other in zip(rounded, plain, strict=True))


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_image_net_takes_other_batches():
    """As the graphs that ``clasp export --to onnx`` traces."""
    net, pixels = image_net().requires_grad_(False), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        traced = torch.jit.trace(net, (pixels[:2],), check_trace=False)
        assert all(torch.equal(traced(pixels[:rows]), net(pixels[:rows])) for rows in (1, 3))
