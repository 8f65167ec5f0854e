"""The sharing policy as a table, two nets that hold weights in common, and towers on them that cannot tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from clasp.models.backbone import Backbone
from clasp.models.dual_encoder import DualEncoder
from clasp.models.frozen import find_frozen_part
from clasp.models.head_settings import HeadSettings
from clasp.models.sharing.policy import SharingSettings
from clasp.models.sharing.tie import (
    LowRankLinear,
    SplitQKV,
    TiedEncoders,
    parameter_aliases,
    share_weights,
    tie_parameters,
)
from clasp.models.tower import Tower
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer, init_weights
from clasp.models.transformer.settings import ImageTransformerSettings, TextTransformerSettings
from clasp.types import Batch, Pixels, Tokens, UserError

SIZES = {"width": 32, "heads": 2, "layers": 4}
PICTURES, WORDS = {"size": 32, "patch": 8}, {"vocabulary": 40, "context": 9}
BLOCK_WEIGHTS = {"attention": 4 * 32 * 32 + 4 * 32, "ffn": 8 * 32 * 32 + 5 * 32, "norm1": 64, "norm2": 64}
BOTH = {"attention": "shared", "ffn": "shared"}


def nets(image: dict | None = None, text: dict | None = None, **both: Any) -> tuple[ImageTransformer, TextTransformer]:
    torch.manual_seed(0)
    return (
        ImageTransformer(ImageTransformerSettings(**{**SIZES, **PICTURES, **both, **(image or {})})),
        TextTransformer(TextTransformerSettings(**{**SIZES, **WORDS, **both, **(text or {})})),
    )


def pair(image: dict | None = None, text: dict | None = None, both: dict | None = None, **policy: Any) -> TiedEncoders:
    """A pair whose every weight and statistic is random, so that nothing is an identity."""
    made = TiedEncoders(*nets(image, text, **(both or {})), SharingSettings(**policy), seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return made.eval()


def numbers(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def pictures(rows: int = 3) -> Tensor:
    return torch.randn(rows, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def words(rows: int = 3) -> Tokens:
    ids = torch.randint(1, 40, (rows, 8), generator=torch.Generator().manual_seed(3))
    return Tokens(ids, torch.arange(8) < torch.tensor([8, 5, 3, 6, 8, 2])[:rows, None])


def read(net: nn.Module) -> Tensor:
    """What a net says of some inputs."""
    tokens = words()
    with torch.no_grad():
        if isinstance(net, ImageTransformer):
            return net(pictures())
        return net(tokens.ids, tokens.mask.long()).last_hidden_state * tokens.mask[..., None]


def refused(call: Callable[[], Any], *wanted: str) -> None:
    with pytest.raises(UserError) as error:
        call()
    said = str(error.value)
    assert "\n" not in said
    for words in wanted:
        assert words in said, said


# --- the policy ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "table"),
    [
        (
            {"layers": "1:", "attention": "shared", "ffn": {"low-rank": 8}},
            """
            layer  attention  qk_norm   ffn         norm1     norm2     layer_scale
            0      separate   separate  separate    separate  separate  separate
            1-3    shared     separate  low-rank 8  separate  separate  separate
            final norm: separate; head: separate
            """,
        ),
        (
            {
                **BOTH,
                "layers": "1:3",
                "k": "separate",
                "head": "shared",
                "final_norm": "shared",
                "overrides": [{"layers": "-1:", "norm1": "shared"}],
            },
            """
            layer  q         k         v         o         qk_norm   ffn       norm1     norm2     layer_scale
            0      separate  separate  separate  separate  separate  separate  separate  separate  separate
            1-2    shared    separate  shared    shared    separate  shared    separate  separate  separate
            3      separate  separate  separate  separate  separate  separate  shared    separate  separate
            final norm: shared; head: shared
            """,
        ),
        (  # what ``also`` does not name is the rest
            {**BOTH, "overrides": [{"layers": ":2", "ffn": "shared"}]},
            """
            layer  attention  qk_norm   ffn     norm1     norm2     layer_scale
            0-1    separate   separate  shared  separate  separate  separate
            2-3    shared     separate  shared  separate  separate  separate
            final norm: separate; head: separate
            """,
        ),
    ],
)
def test_a_policy_prints_itself(policy: dict[str, Any], table: str):
    settings = SharingSettings(**policy)
    assert str(settings.resolve(4)).splitlines() == [line.strip() for line in table.strip().splitlines()]
    assert SharingSettings(**settings.model_dump(mode="json", exclude_none=True)) == settings


def test_parts_that_blocks_do_not_have_are_not_printed():
    assert str(pair(**BOTH).sharing).splitlines()[0] == "layer  attention  ffn     norm1     norm2"
    extras = {"qk_norm": True, "layer_scale": 0.1}
    assert "qk_norm" in str(pair(both=extras).sharing) and "layer_scale" in str(pair(both=extras).sharing)


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ({"attention": "low-rank"}, "'low-rank' needs a rank; write {low-rank = 8}"),
        ({"ffn": {}}, "needs a rank"),
        ({"ffn": {"low-rank": 0}}, "low-rank = 0 is not a whole number from 1"),
        ({"ffn": {"rank": 3}}, "is not one of 'shared', 'separate'"),
        ({"q": "both"}, "'both' is not one of 'shared', 'separate'"),
        ({"norm1": {"low-rank": 4}}, "a vector has no rank"),
        ({"layers": "1-3"}, "'1-3' is not a range of layers; write '1:'"),
        ({"overrides": [{"ffn": "shared"}]}, "Field required"),
        ({"atention": "shared"}, "Extra inputs are not permitted"),
    ],
)
def test_settings_without_sense_are_refused(policy: dict[str, Any], wanted: str):
    with pytest.raises(ValidationError) as error:
        SharingSettings(**policy)
    assert wanted in error.value.errors()[0]["msg"]


@pytest.mark.parametrize("layers", ["2:5", "4", "-5:", "3:3", "-1:2", "4:"])
def test_layers_that_do_not_exist_are_refused(layers: str):
    refused(
        lambda: SharingSettings(layers=layers, **BOTH).resolve(4), f"layers = {layers!r}", "there are layers 0 to 3"
    )


def test_layers_named_twice_are_refused():
    twice = SharingSettings(layers="1:", **BOTH, overrides=[{"layers": ":2", "ffn": "shared"}])
    refused(lambda: twice.resolve(4), "'1:' and ':2' both contain layer 1")


@pytest.mark.parametrize(
    ("image", "text", "policy", "wanted"),
    [
        ({}, {"width": 16}, BOTH, ["layer 0 cannot share q of the attention", "width is 32 in the image net and 16"]),
        ({}, {"width": 16}, {"norm2": "shared"}, ["cannot share norm2", "width is 32"]),
        ({}, {"width": 16}, {"final_norm": "shared"}, ["final_norm", "width is 32 in the image net and 16"]),
        ({}, {"heads": 4}, BOTH, ["heads is 2 in the image net and 4 in the text net"]),
        ({}, {"hidden": 64}, {"ffn": "shared"}, ["hidden is 128 in the image net and 64"]),
        ({}, {"activation": "quick-gelu"}, {"ffn": "shared"}, ["activation is gelu"]),
        ({}, {"norm": "rms"}, {"norm1": "shared"}, ["norm is layer in the image net and rms"]),
        (
            {},
            {"norm_position": "post"},
            {"norm2": "shared"},
            ["cannot share norm2", "norm_position is pre in the image net and post"],
        ),
        (
            {},
            {"norm_position": "post"},
            {"final_norm": "shared"},
            ["blocks of the text net end with a norm, and no other"],
        ),
        ({}, {}, {"layer_scale": "shared"}, ["cannot share layer_scale", "blocks of the image net have none"]),
        ({"qk_norm": True}, {}, {"qk_norm": "shared"}, ["cannot share qk_norm", "blocks of the text net have none"]),
        ({"stem": "batch"}, {}, BOTH, ["layer 0 of the image net is its stem", "write layers = '1:'"]),
        ({"layers": 6}, {}, BOTH, ["there is no layer 4 in the text net"]),
        ({}, {"layers": 6}, {"layers": "5", **BOTH}, ["there is no layer 5 in the image net"]),
        ({}, {}, {"q": {"low-rank": 16}}, ["low-rank = 16 has more weights than the 32 x 32 matrix"]),
    ],
)
def test_policies_that_do_not_fit_the_nets_are_refused(
    image: dict[str, Any], text: dict[str, Any], policy: dict[str, Any], wanted: list[str]
):
    refused(lambda: TiedEncoders(*nets(image, text), SharingSettings(**policy), seed=0), *wanted)


# --- what is shared --------------------------------------------------------------------------------------------------

LOW_RANK = 4 * (2 * 32) + 4 * (2 * 32 + 96 - 32) + 2 * 4 * (32 + 128)  # o, packed qkv, fc1 and fc2 at rank 4
POLICIES: dict[str, tuple[dict[str, Any], int]] = {  # with the weights that both nets hold
    "nothing": ({}, 0),
    "msclip": (BOTH, 4 * (BLOCK_WEIGHTS["attention"] + BLOCK_WEIGHTS["ffn"])),
    "vlmo": ({"attention": "shared"}, 4 * BLOCK_WEIGHTS["attention"]),
    "feed-forward": ({"ffn": "shared"}, 4 * BLOCK_WEIGHTS["ffn"]),
    "middle": ({"layers": "1:3", **BOTH}, 2 * (BLOCK_WEIGHTS["attention"] + BLOCK_WEIGHTS["ffn"])),
    "whole blocks": ({**BOTH, "norm1": "shared", "norm2": "shared"}, 4 * sum(BLOCK_WEIGHTS.values())),
    "sharedclip": (
        {**BOTH, "norm1": "shared", "norm2": "shared", "final_norm": "shared", "head": "shared"},
        4 * sum(BLOCK_WEIGHTS.values()) + 64,
    ),
    "keys apart": ({"attention": "shared", "k": "separate"}, 4 * (BLOCK_WEIGHTS["attention"] - 32 * 32 - 32)),
    "values only": ({"v": "shared"}, 4 * (32 * 32 + 32)),
    "low-rank": (
        {"attention": {"low-rank": 4}, "ffn": {"low-rank": 4}},
        4 * (BLOCK_WEIGHTS["attention"] + BLOCK_WEIGHTS["ffn"]),
    ),
    "mixed": (
        {"layers": "2", **BOTH, "overrides": [{"layers": "3", "norm1": "shared", "o": {"low-rank": 2}}]},
        BLOCK_WEIGHTS["attention"] + BLOCK_WEIGHTS["ffn"] + 64 + 32 * 32 + 32,
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_each_weight_is_counted_and_stored_once(name: str, tmp_path: Path):
    policy, shared = POLICIES[name]
    made = pair(**policy)
    assert numbers(made) == numbers(made.image) + numbers(made.text) - shared
    own = 2 * 4 * LOW_RANK if name == "low-rank" else 2 * 2 * 2 * 32 if name == "mixed" else 0
    plain = nets()
    assert numbers(made) == numbers(plain[0]) + numbers(plain[1]) - shared + own
    held = {id(p) for p in made.image.parameters()}
    assert sum(p.numel() for p in made.text.parameters() if id(p) in held) == shared
    state = made.state_dict()
    assert list(state) == [name for name, _ in made.named_parameters()]
    safetensors.torch.save_file(state, tmp_path / "pair.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "pair.safetensors")
    assert sum(tensor.numel() * 4 for tensor in stored.values()) == 4 * numbers(made)
    other = TiedEncoders(*nets(), SharingSettings(**policy), seed=5)
    other.load_state_dict(stored)
    assert torch.equal(read(other.image), read(made.image)) and torch.equal(read(other.text), read(made.text))


def test_loading_still_refuses_what_is_not_there():
    made = pair(**BOTH)
    state = dict(made.state_dict())
    lost = state.pop("image.blocks.0.attn.qkv.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*text\.blocks\.0\.attn\.qkv\.weight"):
        made.load_state_dict(state)
    state.update({"image.blocks.0.attn.qkv.weight": lost, "more": lost})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        made.load_state_dict(state)


def test_who_holds_what():
    made = pair(layers="1:", attention="shared", k="separate", norm2="shared")
    for number in range(4):
        ours: Any = made.image.blocks[number]
        theirs: Any = made.text.blocks[number]
        assert (ours.norm2.weight is theirs.norm2.weight) == (number > 0)
        assert ours.norm1.weight is not theirs.norm1.weight
        assert ours.attn is not theirs.attn and ours.attn.proj is not theirs.attn.proj, "modules stay each net's own"
        assert (ours.attn.proj.weight is theirs.attn.proj.weight) == (number > 0)
        if number:
            assert ours.attn.qkv.q.weight is theirs.attn.qkv.q.weight
            assert ours.attn.qkv.k.weight is not theirs.attn.qkv.k.weight
    assert parameter_aliases(made)["text.blocks.2.attn.qkv.v.bias"] == "image.blocks.2.attn.qkv.v.bias"
    assert len(parameter_aliases(made)) == 3 * (2 * 2 + 2 + 2)


def test_a_stem_shifts_the_blocks_of_the_image_net():
    made = pair({"stem": "group"}, layers="1:", **BOTH)
    ours: Any = made.image.blocks
    theirs: Any = made.text.blocks
    assert len(ours) == 3 and len(theirs) == 4
    assert all(ours[n].mlp.fc1.weight is theirs[n + 1].mlp.fc1.weight for n in range(3))


@pytest.mark.parametrize("keep", ["image", "text"])
def test_the_net_that_is_kept_says_what_it_said(keep: Any):
    image, text = nets()
    before = {"image": read(image), "text": read(text)}
    TiedEncoders(image, text, SharingSettings(**BOTH, norm1="shared", k={"low-rank": 3}), seed=0, keep=keep)
    after = {"image": read(image), "text": read(text)}
    for side in before:
        same = torch.allclose(after[side], before[side], atol=1e-5)
        assert same == (side == keep), side


def test_parts_taken_apart_compute_the_same():
    packed = nn.Linear(8, 24)
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(SplitQKV(packed)(x), packed(x))


def test_a_low_rank_difference_starts_as_none_and_is_one_nets_own():
    made = TiedEncoders(*nets(), SharingSettings(ffn={"low-rank": 4}), seed=0)
    linear: Any = made.text.blocks[0].get_submodule("mlp.fc1")
    assert isinstance(linear, LowRankLinear)
    x = torch.randn(5, 32)
    assert torch.equal(linear(x), linear.shared(x))
    image, text = read(made.image), read(made.text)
    with torch.no_grad():
        linear.up.normal_()
    torch.testing.assert_close(linear(x), linear.shared(x) + x @ linear.down.T @ linear.up.T)
    assert torch.equal(read(made.image), image) and not torch.allclose(read(made.text), text)
    with torch.no_grad():
        linear.shared.weight.mul_(1.5)
    assert not torch.allclose(read(made.image), image), "what both hold moves both"


def test_the_gradient_of_a_shared_weight_is_the_sum_of_both():
    made, apart = pair(**BOTH), pair()
    state = {name: p for name, p in made.named_parameters(remove_duplicate=False)}
    apart.load_state_dict(state)
    tokens = words()

    def backward(pair: TiedEncoders) -> None:
        text = pair.text(tokens.ids, tokens.mask.long()).last_hidden_state[:, 0]
        (pair.image(pictures())[:, 0] * text).sum().backward()

    backward(made)
    backward(apart)
    name = "blocks.2.mlp.fc2.weight"
    both = [net.get_parameter(name).grad for net in (apart.image, apart.text)]
    assert both[0] is not None and both[1] is not None
    grad = made.image.get_parameter(name).grad
    torch.testing.assert_close(grad, both[0] + both[1], atol=1e-5, rtol=1e-4)


def test_copies_and_moves_keep_what_is_shared():
    made, name = pair(**BOTH), "blocks.0.mlp.fc1.weight"
    for other in (copy.deepcopy(made), copy.deepcopy(made).to(torch.float64)):
        assert numbers(other) == numbers(made)
        ours, theirs, old = (net.get_parameter(name) for net in (other.image, other.text, made.image))
        assert ours is theirs and ours is not old


def initialized(seed: int) -> tuple[ImageTransformer, TextTransformer]:
    both = nets()
    for number, net in enumerate(both):
        init_weights(net, seed=seed + number)
    return both


def test_a_pair_from_scratch_is_the_same_each_time():
    policy = SharingSettings(**BOTH, q={"low-rank": 2})
    one, two, other = (TiedEncoders(*initialized(seed), policy, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one.image.cls_token, other.image.cls_token)
    text: Any = one.text.blocks[0]
    image: Any = one.image.blocks[0]
    assert not torch.equal(text.attn.qkv.q.down, image.attn.qkv.q.down)


# --- towers that cannot tell -----------------------------------------------------------------------------------------


def towers(made: TiedEncoders) -> tuple[Tower, Tower]:
    return (
        Tower(Backbone("views", "image", made.image, "0", "cls")),
        Tower(Backbone("views", "text", made.text, "0", "last")),
    )


def encoder(made: TiedEncoders, image: list[str], text: list[str], **head: Any) -> DualEncoder:
    """A dual encoder on both views, its selection made under first names."""
    sides = dict(zip(("image", "text"), towers(made), strict=True))
    model = DualEncoder(sides["image"], sides["text"], HeadSettings(width=16, **head), seed=0)
    chosen = set().union(*model.new_parameter_names.values())
    for number, (side, methods) in enumerate((("image", image), ("text", text))):
        chosen |= {f"{side}.{name}" for name in sides[side].tune(methods, seed=number)}
    known = parameter_aliases(model)
    model.select({known.get(name, name) for name in chosen})
    return model


def batch(rows: int = 3) -> Batch:
    groups = torch.arange(rows)[:, None].expand(-1, 2)
    return Batch(tuple("abcdef"[:rows]), Pixels(pictures(rows)), words(rows), groups)


@pytest.mark.parametrize("name", ["nothing", "msclip", "sharedclip", "keys apart", "low-rank"])
def test_one_step_on_shared_weights_and_a_delta_that_holds_each_once(name: str, tmp_path: Path):
    made = pair(**POLICIES[name][0])
    weights = numbers(made)
    model = encoder(made, ["full"], ["full"])
    if made.sharing.head == "shared":
        tie_parameters(model.image_head, model.text_head)
        known = parameter_aliases(model)
        model.select({known.get(name, name) for name in model.selection})
    heads = numbers(nn.ModuleList([model.image_head, model.text_head]))
    assert model.parameter_counts()["model"].total == model.parameter_counts()["model"].trained == weights + heads + 1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = model.train()(batch())
    logits = out.scale * out.image @ out.text.T
    F.cross_entropy(logits, torch.arange(3)).backward()
    optimizer.step()
    model.after_step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == model.selection
    safetensors.torch.save_file(model.delta(), tmp_path / "delta.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "delta.safetensors")
    assert sum(tensor.numel() * tensor.element_size() for tensor in stored.values()) == 4 * (weights + heads + 1)
    again = encoder(pair(**POLICIES[name][0]), ["full"], ["full"])
    if made.sharing.head == "shared":
        tie_parameters(again.image_head, again.text_head)
    with torch.no_grad():
        for name, p in again.named_parameters():
            p.copy_(stored[name])
    tokens = words()
    assert torch.equal(again.encode_image(pictures()), model.encode_image(pictures()))
    assert torch.equal(again.encode_text(tokens.ids, tokens.mask), model.encode_text(tokens.ids, tokens.mask))


def stir(parameter: Tensor) -> None:
    """Not by the same number everywhere, which a norm would take away again."""
    parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))


METHODS = ["norms", "biases", "adapters", "adapters(place='input')", "lora(rank=2)", "attention", "mlp", "last(1)"]


@pytest.mark.parametrize("name", ["msclip", "keys apart", "low-rank"])
@pytest.mark.parametrize("method", [*METHODS, "deep(1)", "prompts(2)"])
def test_tuning_one_view_leaves_the_other_alone_unless_the_weight_is_shared(name: str, method: str):
    made = pair(**POLICIES[name][0])
    before = {side: read(net) for side, net in (("image", made.image), ("text", made.text))}
    model = encoder(made, [method], ["none"])
    assert any(name.startswith("image.") for name in model.selection)
    new_at_start = method.startswith(("adapters", "lora"))
    if new_at_start:
        assert torch.allclose(read(made.image), before["image"], atol=1e-6)
    assert torch.allclose(read(made.text), before["text"], atol=1e-6), "nothing was put into the text net"
    tokens, shared = words(), set(parameter_aliases(model).values())
    out = model(batch())
    F.cross_entropy(out.scale * out.image @ out.text.T, torch.arange(3)).backward()
    given = {name for name, p in model.named_parameters() if p.grad is not None}
    assert given == model.selection
    with torch.no_grad():
        for name in model.selection:
            if name.startswith("image."):
                stir(model.get_parameter(name))
    moved = not torch.allclose(read(made.text), before["text"], atol=1e-4)
    assert moved == bool(shared & model.selection)
    assert not torch.allclose(model.image(Pixels(pictures())), before["image"], atol=1e-4)
    assert model.encode_text(tokens.ids, tokens.mask).isfinite().all()


@pytest.mark.parametrize("method", ["adapters", "lora(rank=2)", "prompts(2)"])
def test_both_views_tuned_by_one_method_each_have_their_own(method: str):
    made = pair(**BOTH)
    model = encoder(made, [method], [method])
    text = read(model.text.net)
    with torch.no_grad():
        for name in model.selection:
            if name.startswith("image.net"):
                stir(model.get_parameter(name))
    assert torch.equal(read(model.text.net), text)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_prompts_are_seen_by_text_that_is_padded(attention: str):
    made = pair(text={"attention": attention}, **BOTH)
    tower = towers(made)[1]
    before = tower.pooled(words())
    tower.tune(["prompts(3)"], seed=0)
    with torch.no_grad():
        tower.net.get_parameter("prompts.tokens").normal_(std=3)
    tokens = words()
    after = tower.pooled(tokens)
    assert not torch.allclose(before, after, atol=1e-3)
    alone = [tower.pooled(Tokens(tokens.ids[n : n + 1, : int(m.sum())], m[None, m])) for n, m in enumerate(tokens.mask)]
    torch.testing.assert_close(torch.cat(alone), after, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stem", [None, "batch"])
def test_the_trunk_of_a_view_can_be_kept(stem: str | None):
    made = pair({"stem": stem}, layers="1:", **BOTH)
    for tower, given in zip(towers(made), (Pixels(pictures()), words()), strict=True):
        tower.tune(["last(1)"], seed=0)
        for name, p in tower.named_parameters():
            p.requires_grad_(name.startswith(("net.blocks.2.", "net.blocks.3.", "net.norm.")))
        with torch.no_grad():
            whole = tower(given)
            for depth in range(1, tower.frozen_blocks + 1):
                assert torch.equal(tower(tower.prefix_states(given, depth)), whole), depth
        assert tower.frozen_blocks == 2
        part = find_frozen_part(tower, 32)
        assert part is not None and part.depth == 2


def test_a_view_is_cut_only_above_its_branch():
    branch = {"kind": "paper", "before": (1, 2)}
    tower = towers(pair({"branch": branch}, **BOTH))[0]
    with torch.no_grad():
        for depth, frozen in ((1, 0), (2, 0), (3, 3), (4, 4)):
            for name, p in tower.named_parameters():
                trained = [f"net.blocks.{number}." for number in range(depth, 4)] + ["net.norm."]
                p.requires_grad_(name.startswith(tuple(trained)))
            assert tower.frozen_blocks == frozen
        whole = tower(Pixels(pictures()))
        for depth in (3, 4):
            assert torch.equal(tower(tower.prefix_states(Pixels(pictures()), depth)), whole)
        with pytest.raises(AssertionError, match="cannot be resumed after block 2"):
            tower(tower.prefix_states(Pixels(pictures()), 2))


def test_what_one_tower_trains_is_no_trunk_of_the_other():
    """The image tower is told to train nothing, and holds weights that the text tower trains."""
    model = encoder(pair(layers="2:", **BOTH), ["none"], ["mlp"])
    assert model.image.frozen_blocks == 2 and not model.image.fully_frozen
    assert {name.split(".")[0] for name in model.selection if ".blocks.3." in name} == {"image"}


def test_meta_nets_share_too():
    with torch.device("meta"):
        made = TiedEncoders(*nets(), SharingSettings(**BOTH), seed=0)
        image, text = towers(made)
    assert image.width == text.width == 32
    assert numbers(made) == numbers(pair(**BOTH))


def test_sharing_twice_is_sharing_once():
    image, text = nets()
    share_weights(image, text, SharingSettings(**BOTH))
    share_weights(image, text, SharingSettings(**BOTH))
    assert numbers(nn.ModuleList([image, text])) == numbers(pair(**BOTH))
