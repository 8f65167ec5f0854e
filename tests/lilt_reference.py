"""LilT's own numbers and names, and its tiny towers with random weights.

In: the golden files recorded from the reference implementation. Out: a tuning for each of its rows, our name for each
of its parameters, and two towers that a recipe can open without a hub: the factory ``lilt_reference:image``, and a
folder.
"""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import transformers as hf
from torch import nn

from clasp.models.backbone import Backbone
from clasp.models.tower_settings import ImageTowerSettings
from clasp.models.zoo.known_configs import KNOWN_CONFIGS
from clasp.models.zoo.registry import load_backbone
from toysavedtowers import save_tokenizer

FOLDER = Path(__file__).parent / "golden"
COUNTS = json.loads((FOLDER / "param_counts.json").read_text())["lilt"]["counts"]
NAMES = {
    row: facts["trained_names"]
    for row, facts in json.loads((FOLDER / "lilt_trainable_names.json").read_text())["recipes"].items()
}

TOWERS = {  # row of the golden file: our image and text towers
    "base_base": ("deit:base", "hf:princeton-nlp/unsup-simcse-bert-base-uncased"),
    "base_multilingual": ("deit:base", "hf:google-bert/bert-base-multilingual-cased"),
    "small_small": ("deit:small", "hf:prajjwal1/bert-small"),
    "large_large": ("deit:large", "hf:princeton-nlp/unsup-simcse-bert-large-uncased"),
    "tiny_tiny": ("deit:tiny", "hf:prajjwal1/bert-tiny"),
}
DEEP = "deep(1, init='random')"


def lwa(place: str, reduction: int = 4) -> str:
    return f"adapters(reduction={reduction}, place='{place}', init='random')"


LWA = (lwa("input"), lwa("output"))
# the reference's switches, as image and text tunings, then head where it does not train
TUNED: dict[str, tuple] = {
    "clip_full": (["full"], ["full"]),
    "lit": (["none"], ["full"]),
    "text_frozen": (["full"], ["none"]),
    "projections": (["none"], ["none"]),
    "temperature_only": (["none"], ["none"], "none"),
    "ln_proj_frozen": (["norms"], ["norms"], "none"),
    "ln_vision": (["norms"], ["none"]),
    "ln_text": (["none"], ["norms"]),
    "ln": (["norms"], ["norms"]),
    "bitfit_vision": (["biases"], ["none"]),
    "bitfit_text": (["none"], ["biases"]),
    "bitfit": (["biases"], ["biases"]),
    "bitfit_ln": (["biases", "norms"], ["biases", "norms"]),
    "last_layer": (["last(1)"], ["last(1)"]),
    "last_layer_ln": (["last(1)", "norms"], ["last(1)", "norms"]),
    "da": ([DEEP], [DEEP]),
    "da_ln": ([DEEP, "norms"], [DEEP, "norms"]),
    "da_bitfit": ([DEEP, "biases"], [DEEP, "biases"]),
    "da_ln_bitfit": ([DEEP, "norms", "biases"], [DEEP, "norms", "biases"]),
    "lwa": ([LWA[0]], [LWA[1]]),
    "lwa_ln": ([LWA[0], "norms"], [LWA[1], "norms"]),
    "lwa_bitfit": ([LWA[0], "biases"], [LWA[1], "biases"]),
    "lwa_ln_bitfit": ([LWA[0], "norms", "biases"], [LWA[1], "norms", "biases"]),
    "lwa_vision_only_ln": ([LWA[0], "norms"], ["norms"]),
    "lwa_text_only_ln": (["norms"], [LWA[1], "norms"]),
    "lwa_rf8_ln": ([lwa("input", 8), "norms"], [lwa("output", 8), "norms"]),
    "lwa_rf16_ln": ([lwa("input", 16), "norms"], [lwa("output", 16), "norms"]),
    "lwa_da_ln": ([LWA[0], DEEP, "norms"], [LWA[1], DEEP, "norms"]),
    # the reference matches substrings: "dense" is also in BERT's attention output, "attention" holds a norm of BERT's
    "unlock_dense": (["mlp"], ["match('*.dense.*')"]),
    "unlock_attn": (["attention"], ["match('*.attention.*')"]),
}


def tuned(row: str) -> list[str]:
    """A row as overrides of a recipe."""
    image, text, head = (*TUNED[row], "full")[:3]
    return [f"tune.image={image}", f"tune.text={text}", f"tune.head={head}"]


def our_name(theirs: str) -> str:
    """Our name of a parameter of the reference."""
    if theirs == "temp":
        return "temperature"
    name = re.sub(r"\.(down|up)_sampler\.", r".\1.", theirs)
    name = re.sub(r"(layer\.\d+)\.attention\.output\.adapter\.", r"\1.adapter1.", name)
    name = re.sub(r"(layer\.\d+)\.output\.adapter\.", r"\1.adapter2.", name)
    for their_part, ours in (
        ("visual_encoder.", "image.net."),
        ("text_encoder.", "text.net."),
        ("vision_proj.", "image_head.map."),
        ("text_proj.", "text_head.map."),
    ):
        if name.startswith(their_part):
            return ours + name.removeprefix(their_part)
    raise AssertionError(theirs)


# --- tiny towers -----------------------------------------------------------------------------------------------------


def image() -> Backbone:
    """The paper's tiny image tower at 256 px, with random weights."""
    base = _image()
    return replace(base, net=copy.deepcopy(base.net))


@cache
def _image() -> Backbone:
    base = load_backbone(ImageTowerSettings(tower="deit:tiny", size=256), meta=True)
    assert not list(base.net.buffers())
    _stirred(base.net.to_empty(device="cpu"))
    return base


@cache
def save_text(folder: Path) -> Path:
    """The paper's tiny text tower with random weights, as a hub would have it; its tokenizer knows toy words."""
    facts = dict(KNOWN_CONFIGS["prajjwal1/bert-tiny"])
    net = hf.AutoModel.from_config(hf.AutoConfig.for_model(facts.pop("model_type"), **facts))
    _stirred(net)
    net.save_pretrained(folder)
    save_tokenizer(folder, template="<s> $A </s>")
    return folder


def _stirred(net: nn.Module) -> None:
    """No norm, bias or table is an identity or a zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.copy_(0.05 * torch.randn(p.shape, generator=generator) + ("norm" in name.lower() and "weight" in name))
