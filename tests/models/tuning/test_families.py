"""Methods × families of ``transformers``: each works, or refuses in one line; and rows that once did neither."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from clasp.models.backbone import Backbone
from clasp.models.structure import find_structure
from clasp.models.tower import Tower
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.tuning.spec import freeze_except
from clasp.models.zoo.registry import load_backbone
from clasp.types import Pixels, Tokens, UserError
from selection_checks import CAPTIONS, recipe, train_save_count
from toyfamilies import IMAGE_FAMILIES, TEXT_FAMILIES, save_family
from toymethods import METHODS, OTHER_PEFT
from toysavedtowers import save
from toytowers import inputs

ROWS = [method for method in (*METHODS, *OTHER_PEFT) if method != "none" and not method.startswith("conv_branch")]
FAMILIES = [name for name in (*IMAGE_FAMILIES, *TEXT_FAMILIES) if name != "textnet"]  # which is large
WORKS = [  # what once failed, or trained other parts than its name has
    ("gemma3_text", "adapters"), ("phi3", "adapters"), ("nomic_bert", "adapters"), ("nomic_bert", "attention"),
    ("nomic_bert", "mlp"), ("gpt_neox", "adapters"), ("mt5", "attention"), ("mt5", "mlp"), ("mt5", "adapters"),
    ("umt5", "attention"), ("umt5", "adapters(place='input')"), ("mobilenet_v2", "lora(rank=2)"), ("opt", "mlp"),
    ("ernie", "mlp"), ("mpt", "deep(1)"), ("bloom", "deep(1)"), ("longformer", "lora(rank=2)"),
    ("convnextv2", "norms"), ("hiera", "norms"), ("hiera", "attention"), ("siglip_vision_model", "full"),
]  # fmt: skip


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone | UserError]:
    """Bases by name as they were opened first; towers take copies."""
    return {}


def tower(name: str, opened: dict[str, Backbone | UserError], folder: Path) -> Tower:
    """A fresh tower; the error of a base that cannot be opened is raised again."""
    if name not in opened:
        save_family(name, folder, size={"height": 64, "width": 64} if "64" in str(IMAGE_FAMILIES.get(name)) else 32)
        settings = (ImageTowerSettings if name in IMAGE_FAMILIES else TextTowerSettings)(tower=f"file:{folder}")
        try:
            opened[name] = load_backbone(settings)
        except UserError as error:
            opened[name] = error
    base = opened[name]
    if isinstance(base, UserError):
        raise base
    return Tower(replace(base, net=copy.deepcopy(base.net)))


def check(made: Tower, method: str) -> None:
    """One selection: what is named is what gets gradients, and it changes what comes out."""
    names = made.tune([method], seed=0)
    freeze_except(made, names)
    size = made._size
    given = inputs("bert") if made.modality == "text" else Pixels(torch.randn(2, 3, size, size))
    if isinstance(given, Tokens):
        given.ids[:, -1] = 2
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name in names:
                p += 0.02 * torch.randn(p.shape, generator=generator)
    out = made.pooled(given)
    (out * torch.randn(out.shape, generator=generator)).sum().backward()
    assert {name for name, p in made.named_parameters() if p.grad is not None} == names
    assert any(p.grad is not None and p.grad.any() for p in made.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_works_or_refuses_in_one_line(opened: dict[str, Backbone | UserError], tmp_path: Path, name: str):
    """A fifth of the methods on each family, each method on a fifth of the families."""
    for method in ROWS[FAMILIES.index(name) % 5 :: 5]:
        try:
            check(tower(name, opened, tmp_path), method)
        except UserError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize(("name", "method"), WORKS)
def test_what_once_failed_works(opened: dict[str, Backbone | UserError], tmp_path: Path, name: str, method: str):
    check(tower(name, opened, tmp_path), method)


@pytest.mark.parametrize("method", ["lora(rank=2)", "dora(rank=2)"])
def test_what_peft_refuses_is_one_line(opened: dict[str, Backbone | UserError], tmp_path: Path, method: str):
    made = tower("mamba", opened, tmp_path)
    with pytest.raises(UserError, match=r"peft cannot wrap the layers of MambaModel \(.*out_proj") as caught:
        made.tune([method], seed=0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "attention", "mlp"), [("nomic_bert", "self_attn", "mlp"), ("gpt_neox", "attention", "mlp")]
)
def test_a_part_has_linear_maps_in_it(
    opened: dict[str, Backbone | UserError], tmp_path: Path, name: str, attention: str, mlp: str
):
    """Norms and dropouts that are called after what stands before them are none."""
    block = find_structure(tower(name, opened, tmp_path).net).blocks[0]
    assert (block.attention, block.mlp) == (f"{block.path}.{attention}", (f"{block.path}.{mlp}",))


def test_a_bottleneck_is_as_wide_as_the_states(opened: dict[str, Backbone | UserError], tmp_path: Path):
    """Gemma 3 has norms of one head after its output map, Phi 3 its output map before the other."""
    for name in ("gemma3_text", "phi3"):
        made = tower(name, opened, tmp_path / name)
        names = made.tune(["adapters"], seed=0)
        widths = {p.shape[0] for n, p in made.named_parameters() if n in names and n.endswith("up.bias")}
        assert widths == {32}


@pytest.mark.parametrize("name", ["mt5", "nomic_bert", "gemma3_text", "xlnet"])
def test_all_four_uses_of_a_selection(tmp_path: Path, name: str):
    """Through a recipe: gradients, optimizer, delta and counts on meta tensors."""
    save("vit", tmp_path / "vit")
    save_family(name, tmp_path / "text")
    given = recipe(
        f"file:{tmp_path / 'vit'}", f"file:{tmp_path / 'text'}", ["norms"], tune={"text": ["adapters", "full"]}
    )
    parts = train_save_count(given, tmp_path / "run", CAPTIONS)
    assert any("adapter1" in part for part in parts.model.selection)
