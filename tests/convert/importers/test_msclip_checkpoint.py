"""MS-CLIP's state dicts against recorded outputs and gradients, and back; every row of the spectrum to the unit."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clasp.convert.importers.msclip_checkpoint import (
    MSCLIP_LATERAL_LAYERS,
    MSCLIPCheckpoint,
    parse_msclip_state_dict,
)
from clasp.convert.importers.msclip_names import msclip_name_map
from clasp.models.backbone import Backbone
from clasp.models.dual_encoder import DualEncoder
from clasp.models.head_settings import HeadSettings
from clasp.models.sharing.policy import SharingSettings
from clasp.models.sharing.tie import TiedEncoders
from clasp.models.tower import Tower
from clasp.models.transformer.encoders import ImageTransformer, TextTransformer
from clasp.models.transformer.settings import ImageTransformerSettings, TextTransformerSettings
from clasp.training.cost.flops import count_macs
from clasp.types import Tokens, UserError

GOLDEN = Path(__file__).parents[2] / "golden"
NAMES = ("msclip_plain", "msclip_parallel_only", "msclip_share_last6", "msclip_s_b32")


@cache
def golden(name: str) -> dict[str, Any]:
    return torch.load(GOLDEN / f"{name}.golden.pt", weights_only=True)


def tensors(name: str) -> dict[str, Tensor]:
    return torch.load(GOLDEN / f"{name}.state_dict.pth", weights_only=True)


def read(name: str, state: dict[str, Tensor] | None = None) -> MSCLIPCheckpoint:
    config = golden(name)["config"]
    lateral = config["parallel_branch"].get("lateral_layers", MSCLIP_LATERAL_LAYERS)
    state = tensors(name) if state is None else state
    return parse_msclip_state_dict(state, heads=config["vision"]["heads"], lateral_layers=lateral)


def to_msclip_state_dict(model: MSCLIPCheckpoint) -> dict[str, Tensor]:
    """The state dict that was parsed; a shared tensor has two names and one storage."""
    pair = model.encoders
    ours: dict[str, Tensor] = {
        **{name: p.detach() for name, p in pair.named_parameters(remove_duplicate=False)},
        **dict(pair.named_buffers()),
        "image_head": model.image_head.T,
        "text_head": model.text_head.T,
        "log_scale": model.log_scale,
    }
    names = msclip_name_map(pair.image.settings, pair.text.settings)
    assert set(names.values()) == ours.keys()
    bare = {name: tensor.squeeze((0, 1)) if tensor.ndim == 3 else tensor for name, tensor in ours.items()}
    return {theirs: bare[name] for theirs, name in names.items()}


def to_msclip_tokens(ids: Tensor) -> Tokens:
    """With the mask of the released code: a text ends at the first position of its largest id, its end token; of a text
    truncated without one that is the start token. ``data.tokenizer`` keeps the end token."""
    return Tokens(ids, torch.arange(ids.shape[1]) <= ids.argmax(dim=1, keepdim=True))


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value)
    return str(error.value)


def features(model: MSCLIPCheckpoint, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    tokens = to_msclip_tokens(ids)
    states = model.encoders.text(tokens.ids, tokens.mask.long()).last_hidden_state
    last = states[torch.arange(len(ids)), tokens.mask.sum(1) - 1]
    return model.encoders.image(pixels)[:, 0] @ model.image_head.T, last @ model.text_head.T


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_those_recorded(name: str):
    model, inputs, said = read(name), golden(name)["inputs"], golden(name)["outputs"]
    with torch.no_grad():
        image, text = features(model, inputs["pixel_values"], inputs["input_ids"])
        _, endless = features(model, inputs["pixel_values"], inputs["input_ids_without_eot"])
    logits = model.log_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    numbers = torch.arange(len(logits))
    ours = {
        "image_features_raw": image,
        "text_features_raw": text,
        "image_features": F.normalize(image, dim=1),
        "text_features": F.normalize(text, dim=1),
        "text_features_without_eot": F.normalize(endless, dim=1),
        "logit_scale": model.log_scale,
        "logit_scale_exp": model.log_scale.exp(),
        "logits_per_image": logits,
        "loss": (F.cross_entropy(logits, numbers) + F.cross_entropy(logits.T, numbers)) / 2,
    }
    maps = {key for key in said if key.startswith("attention")}
    assert set(ours) | maps == set(said)
    for key, value in ours.items():
        torch.testing.assert_close(value, said[key], atol=1e-5, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", NAMES)
def test_a_dual_encoder_of_two_towers_says_what_was_recorded(name: str):
    model, inputs, said = read(name), golden(name)["inputs"], golden(name)["outputs"]
    towers = [
        Tower(Backbone(name, "image", model.encoders.image, "0", "cls")),
        Tower(Backbone(name, "text", model.encoders.text, "0", "last")),
    ]
    encoder = DualEncoder(*towers, HeadSettings(width=len(model.image_head)), seed=0).eval()
    with torch.no_grad():
        for head, matrix in ((encoder.image_head, model.image_head), (encoder.text_head, model.text_head)):
            head.map.get_parameter("weight").copy_(matrix)
            head.map.get_parameter("bias").zero_()
        ours = {
            "image_features": encoder.encode_image(inputs["pixel_values"]),
            "text_features": encoder.embed_text(to_msclip_tokens(inputs["input_ids"])),
            "text_features_without_eot": encoder.embed_text(to_msclip_tokens(inputs["input_ids_without_eot"])),
        }
    for key, value in ours.items():
        torch.testing.assert_close(value, said[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_attention_maps_are_those_recorded(name: str):
    model, inputs, said = read(name), golden(name)["inputs"], golden(name)["outputs"]
    maps = {}

    def keep(side: str):
        return lambda attn, args: maps.__setitem__(side, attn.attention_weights(*args))

    for side, net in (("image", model.encoders.image), ("text", model.encoders.text)):
        net.blocks[-1].attn.register_forward_pre_hook(keep(side))
    with torch.no_grad():
        model.encoders.image(inputs["pixel_values"][:1])
        model.encoders.text(inputs["input_ids"][:1], torch.ones_like(inputs["input_ids"][:1]))
    for side, found in maps.items():
        torch.testing.assert_close(found[0], said[f"attention_last_layer_{side}_0"], atol=1e-5, rtol=0)
    assert len(maps) == 2


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_recorded(name: str):
    model, recorded = read(name), golden(name)
    heads = {key: nn.Parameter(getattr(model, key)) for key in ("image_head", "text_head", "log_scale")}
    model = MSCLIPCheckpoint(model.encoders, **heads)
    image, text = features(model, recorded["inputs"]["pixel_values"], recorded["inputs"]["input_ids"])
    logits = model.log_scale.exp() * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    numbers = torch.arange(len(logits))
    ((F.cross_entropy(logits, numbers) + F.cross_entropy(logits.T, numbers)) / 2).backward()
    ours = {**dict(model.encoders.named_parameters(remove_duplicate=False)), **heads}
    names = msclip_name_map(model.encoders.image.settings, model.encoders.text.settings)

    def gradient(theirs: str) -> Tensor:
        grad = ours[names[theirs]].grad
        assert grad is not None, theirs
        return grad.T if names[theirs].endswith("_head") else grad

    assert {names[theirs] for theirs in recorded["grad_norms"]} >= {n for n, _ in model.encoders.named_parameters()}
    for theirs, norm in recorded["grad_norms"].items():
        assert gradient(theirs).norm().item() == pytest.approx(float(norm), rel=1e-3, abs=1e-6), theirs
    for theirs, wanted in recorded["grads"].items():
        torch.testing.assert_close(gradient(theirs).reshape(wanted.shape), wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_is_the_same_file(name: str):
    given, model = tensors(name), read(name)
    back = to_msclip_state_dict(model)
    assert back.keys() == given.keys()
    for key, tensor in given.items():
        assert back[key].dtype == tensor.dtype and torch.equal(back[key], tensor), key
    assert groups(back) == groups(given) == {frozenset(group) for group in golden(name)["alias_groups"]}


def groups(state: dict[str, Tensor]) -> set[frozenset[str]]:
    """Names that are one tensor."""
    by_storage: dict[int, set[str]] = defaultdict(set)
    for key, tensor in state.items():
        by_storage[tensor.data_ptr()].add(key)
    return {frozenset(keys) for keys in by_storage.values() if len(keys) > 1}


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_recorded(name: str):
    model, counted = read(name), golden(name)["params"]
    pair, state = model.encoders, to_msclip_state_dict(model)
    shared = [p for p in pair.text.parameters() if any(p is q for q in pair.image.parameters())]
    heads = model.image_head.numel() + model.text_head.numel()
    trained = sum(p.numel() for p in pair.parameters()) + heads + 1
    assert counted == {
        "trainable": trained,
        "trainable_without_token_embedding": trained - pair.text.token_embed.weight.numel(),
        "buffers": sum(b.numel() for b in pair.buffers()),
        "state_dict_keys": len(state),
        "distinct_tensors": len({tensor.data_ptr() for tensor in state.values()}),
        "alias_keys": len(shared),
        "tied_elements": sum(p.numel() for p in shared),
        "visual_module": sum(p.numel() for p in pair.image.parameters()) + model.image_head.numel(),
        "text_transformer_module": sum(p.numel() for p in pair.text.blocks.parameters()),
    }


def test_the_policy_is_read_from_the_file():
    assert str(read("msclip_s_b32").encoders.sharing) == (
        "layer  attention  ffn       norm1     norm2\n"
        "0      separate   separate  separate  separate\n"
        "1-11   shared     shared    separate  separate\n"
        "final norm: separate; head: separate"
    )
    assert read("msclip_share_last6").encoders.sharing.layers[5]["ffn"] == "separate"
    assert read("msclip_share_last6").encoders.sharing.layers[6]["ffn"] == "shared"


def test_a_file_that_lost_its_aliases_reads_the_same():
    given = {key: tensor.clone() for key, tensor in tensors("msclip_share_last6").items()}
    model, ours = read("msclip_share_last6", given), read("msclip_share_last6")
    assert str(model.encoders.sharing) == str(ours.encoders.sharing)
    assert all(torch.equal(a, b) for a, b in zip(model.encoders.parameters(), ours.encoders.parameters(), strict=True))


def test_a_copy_that_is_damaged_is_no_other_architecture():
    given = {key: tensor.clone() for key, tensor in tensors("msclip_share_last6").items()}
    given["transformer.resblocks.7.attn.in_proj_weight"][0, 0] += 1e-3
    assert "layer 7 of the state dict: attn.in_proj_weight is nearly" in refused(
        lambda: read("msclip_share_last6", given)
    )
    spoiled = {
        "logit_scale": (float("nan"), "numbers that are not finite"),
        "visual.transformer.resblocks.0.bn1.running_var": (-1.0, "variances below zero"),
    }
    for key, (value, says) in spoiled.items():
        given = {name: tensor.clone() for name, tensor in tensors("msclip_s_b32").items()}
        given[key].fill_(value)
        assert f"{key} has {says}" in refused(lambda given=given: read("msclip_s_b32", given))


def test_what_does_not_fit_is_refused_in_one_line():
    def without(key: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors("msclip_s_b32").items() if name != key}

    block = "transformer.resblocks.3"
    for key in (
        "visual.ln_pre.weight",
        f"{block}.ln_1.bias",
        f"{block}.attn.in_proj_weight",
        "logit_scale",
        "token_embedding.weight",
    ):
        assert key in refused(lambda key=key: read("msclip_s_b32", without(key)))
    more = {**tensors("msclip_plain"), "module.extra": torch.zeros(1), "z": torch.zeros(1)}
    assert "also has 'module.extra' and 1 more" in refused(lambda: read("msclip_plain", more))
    bent = {**tensors("msclip_plain"), "visual.ln_pre.bias": torch.zeros(3)}
    assert "visual.ln_pre.bias is (3,), not (128,)" in refused(lambda: read("msclip_plain", bent))
    half = {**tensors("msclip_s_b32"), f"{block}.mlp.c_fc.weight": torch.randn(384, 96)}
    assert "layer 3 of the state dict shares ffn only partly: mlp.c_fc.weight" in refused(
        lambda: read("msclip_s_b32", half)
    )
    assert "image_heads=5 does not divide the width of 96" in refused(
        lambda: parse_msclip_state_dict(tensors("msclip_s_b32"), heads=5)
    )
    assert "96 wide, which is not a multiple of 64" in refused(lambda: parse_msclip_state_dict(tensors("msclip_s_b32")))
    assert "joins before 5 layers, and 1 are given; set lateral=" in refused(
        lambda: parse_msclip_state_dict(tensors("msclip_s_b32"), heads=3, lateral_layers=[1])
    )
    assert "set lateral= to 5 layers of 1 to 11" in refused(
        lambda: parse_msclip_state_dict(tensors("msclip_s_b32"), heads=3, lateral_layers=[0, 1, 2, 3, 4])
    )
    assert "it lacks 'visual.positional_embedding'" in refused(lambda: parse_msclip_state_dict({"a": torch.zeros(1)}))


# --- the spectrum ----------------------------------------------------------------------------------------------------

BRANCH = {"kind": "paper", "before": (2, 4, 6, 8, 10)}
BOTH = {"attention": "shared", "ffn": "shared"}
SPECTRUM: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # image net, text net, policy
    "clip_b32_text512": ({}, {"width": 512, "heads": 8}, {}),
    "clip_b32_text768": ({}, {}, {}),
    "share_attn_ffn_ln1_ln2": ({}, {}, {**BOTH, "norm1": "shared", "norm2": "shared"}),
    "share_attn_ffn_ln1": ({}, {}, {**BOTH, "norm1": "shared"}),
    "share_attn_ffn_ln2": ({}, {}, {**BOTH, "norm2": "shared"}),
    "msclip_b32": ({}, {}, BOTH),
    "share_ffn_only": ({}, {}, {"ffn": "shared"}),
    "share_attn_only": ({}, {}, {"attention": "shared"}),
    **{f"share_attn_ffn_last{n}": ({}, {}, {**BOTH, "layers": f"-{n}:"}) for n in (11, 10, 8, 6, 4, 2)},
    "msclip_b32_early": ({"stem": "batch"}, {}, {**BOTH, "layers": "1:"}),
    "msclip_b32_parallel": ({"branch": BRANCH}, {}, BOTH),
    "msclip_s_b32": ({"stem": "batch", "branch": BRANCH}, {}, {**BOTH, "layers": "1:"}),
    "msclip_s_b32_laion_config": ({"stem": "batch", "branch": BRANCH}, {}, {**BOTH, "layers": "1:"}),
    "early_parallel_share_none": ({"stem": "batch", "branch": BRANCH}, {}, {}),
    "clip_b16_text512": ({"patch": 16}, {"width": 512, "heads": 8}, {}),
    "msclip_b16": ({"patch": 16}, {}, BOTH),
    "msclip_s_b16": ({"patch": 16, "stem": "batch", "branch": BRANCH}, {}, {**BOTH, "layers": "1:"}),
}
COUNTS = json.loads((GOLDEN / "param_counts.json").read_text(encoding="utf-8"))["msclip"]["variants"]


def spectrum(name: str, **smaller: Any) -> tuple[ImageTransformer, TextTransformer, SharingSettings]:
    image, text, policy = SPECTRUM[name]
    blocks = {"width": 768, "heads": 12, "layers": 12, "activation": "quick-gelu", "eps": 1e-12}
    pictures = {"size": 224, "patch": 32, "patch_bias": False, "entry_norm": True}
    words = {"vocabulary": 49408, "context": 77, "attention": "causal"}
    image_settings = ImageTransformerSettings(**{**blocks, **pictures, **image, **smaller})
    words_settings = TextTransformerSettings(**{**blocks, **words, **text, **smaller})
    return ImageTransformer(image_settings), TextTransformer(words_settings), SharingSettings(**policy)


def test_every_row_of_the_spectrum_is_here():
    assert set(SPECTRUM) == set(COUNTS)


@cache  # what is shared costs nothing and saves nothing
def image_macs(settings: ImageTransformerSettings) -> int:
    with torch.device("meta"):
        net, head, pixels = ImageTransformer(settings), nn.Linear(settings.width, 512), torch.zeros(1, 3, 224, 224)
    return count_macs(lambda: head(net(pixels)[:, 0]))


@cache
def text_macs(settings: TextTransformerSettings) -> int:
    with torch.device("meta"):
        net, head = TextTransformer(settings), nn.Linear(settings.width, 512)
        ids = torch.zeros(1, 77, dtype=torch.long)
    return count_macs(lambda: head(net(ids, ids).last_hidden_state[:, -1]))


@pytest.mark.parametrize("name", SPECTRUM)
def test_parameters_and_macs_to_the_unit(name: str):
    with torch.device("meta"):
        image, text, policy = spectrum(name)
        pair = TiedEncoders(image, text, policy, seed=0)
        heads = [nn.Linear(net.settings.width, 512, bias=False) for net in (image, text)]
    total = sum(p.numel() for p in nn.ModuleList([pair, *heads]).parameters()) + 1  # the logit scale
    assert {
        "parameters": total,
        "parameters_without_token_embedding": total - text.token_embed.weight.numel(),
        "image_macs": image_macs(image.settings),
        "text_macs": text_macs(text.settings),
    } == {key: value for key, value in COUNTS[name].items() if isinstance(value, int) and key != "patch_size"}


@pytest.mark.parametrize("name", [name for name in SPECTRUM if not name.startswith("clip_b16")])
def test_every_row_of_the_spectrum_goes_there_and_back(name: str):
    """At a sixth of the width, or an eighth where the text net is narrower, and with weights that tell parts apart."""
    narrow = {} if SPECTRUM[name][1] else {"width": 64, "heads": 4}
    image, text, policy = spectrum(name, **narrow) if narrow else small_clip()
    pair = TiedEncoders(image, text, policy, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in pair.parameters():
            p.normal_(generator=generator)
    heads = torch.randn(8, image.settings.width), torch.randn(8, text.settings.width)
    state = to_msclip_state_dict(MSCLIPCheckpoint(pair, *heads, torch.tensor(1.0)))
    again = parse_msclip_state_dict(state, heads=4)
    assert again.encoders.image.settings == image.settings
    assert again.encoders.sharing.layers == pair.sharing.layers
    back = to_msclip_state_dict(again)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


def small_clip() -> tuple[ImageTransformer, TextTransformer, SharingSettings]:
    blocks = {"heads": 4, "layers": 3, "activation": "quick-gelu", "eps": 1e-12, "hidden": 100}
    image = ImageTransformerSettings(width=64, size=64, patch=32, patch_bias=False, entry_norm=True, **blocks)
    return (
        ImageTransformer(image),
        TextTransformer(TextTransformerSettings(width=32, vocabulary=50, context=9, **blocks)),
        SharingSettings(),
    )
