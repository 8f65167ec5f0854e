"""timm's towers, with random weights saved by the test: read as timm reads them, and tuned as all others are."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub  # noqa: TID251
import pytest
import timm  # noqa: TID251
import torch
from safetensors.torch import load_file, save_file

from clasp.config.build import build_model
from clasp.config.recipe import read_recipe
from clasp.config.recipe_files import builtin_recipes
from clasp.data.images import ImageTransform
from clasp.models.backbone import Backbone
from clasp.models.tower import Tower
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.transformer.deit import VisionTransformer
from clasp.models.tuning.spec import freeze_except
from clasp.models.zoo.imagenet import imagenet_concepts
from clasp.models.zoo.registry import _load_deit_weights as load_deit
from clasp.models.zoo.registry import load_backbone
from clasp.models.zoo.timm_labels import timm_concepts
from clasp.types import Pixels, UserError
from selection_checks import CAPTIONS, recipe, train_save_load
from toysavedtowers import save


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A file of random weights for a name of timm's, with the classifier that the published ones have."""
    folder = tmp_path_factory.mktemp("timm")

    def file(name: str) -> Path:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                net = timm.create_model(name)
                tensors = {
                    n: t + 0.05 * torch.rand_like(t) if t.is_floating_point() else t
                    for n, t in net.state_dict().items()
                }
            save_file(tensors, path)
        return path

    return file


def opened(name: str, file: Path, **settings) -> Backbone:
    return load_backbone(ImageTowerSettings(tower=f"timm:{name}@{file}", **settings))


def pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


# name, picture size, pooling, tokens before the patches, width, whether timm pools as we do (it lacks our mean of
# what attention or a last convolution would pool)
TOWERS = [
    ("vit_tiny_patch16_224", 64, "cls", 1, 192, True),
    ("deit_tiny_distilled_patch16_224", 64, "cls", 2, 192, False),  # timm averages its two classes' logits
    ("vit_small_patch14_reg4_dinov2", 56, "cls", 5, 384, True),  # layer scale and registers
    ("vit_wee_patch16_reg1_gap_256", 64, "mean", 1, 256, True),  # registers, no class token, a norm after the mean
    ("eva02_tiny_patch14_224", 56, "mean", 1, 192, True),
    ("resnet18", 64, "mean", 0, 512, True),
    ("convnext_atto", 64, "mean", 0, 320, True),
    ("efficientnet_lite0", 64, "mean", 0, 1280, True),
    ("mobilenetv3_small_050", 64, "mean", 0, 288, False),
    ("swin_tiny_patch4_window7_224", 224, "mean", 0, 768, True),  # width last
]


@pytest.mark.parametrize(("name", "size", "pool", "prefix", "width", "same"), TOWERS, ids=[row[0] for row in TOWERS])
def test_pooled_output_is_timms_own(
    weights: Callable[[str], Path], name: str, size: int, pool: str, prefix: int, width: int, same: bool
):
    file = weights(name)
    base = opened(name, file, size=size)
    assert (base.modality, base.pool, base.version) == ("image", pool, f"timm {timm.__version__}")
    tower, given = Tower(base), pixels(size)
    assert (tower.width, tower._structure.prefix_tokens) == (width, prefix)
    sized = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **sized).eval()
    with torch.no_grad():
        states = theirs.forward_features(given)
        grid = states.flatten(1, 2) if name.startswith("swin") else states.flatten(2).mT if states.ndim == 4 else states
        torch.testing.assert_close(tower(Pixels(given)), grid, rtol=1e-4, atol=1e-4)
        pooled = theirs.forward_head(states, pre_logits=True) if same else grid[:, 0] if pool == "cls" else grid.mean(1)
        torch.testing.assert_close(tower.pooled(Pixels(given)), pooled, rtol=1e-4, atol=1e-4)
    # what timm keeps beyond the states is gone, so all that is left can be trained
    freeze_except(tower, names := tower.tune(["full"], seed=0))
    tower.pooled(Pixels(given)).square().sum().backward()
    assert {n for n, p in tower.named_parameters() if p.grad is not None} == names
    meta = Tower(load_backbone(ImageTowerSettings(tower=f"timm:{name}", size=size), meta=True))
    assert {n: p.shape for n, p in meta.named_parameters()} == {n: p.shape for n, p in tower.named_parameters()}
    assert all(p.is_meta for p in meta.parameters())


def test_transform_is_timms(weights: Callable[[str], Path]):
    transform = opened("vit_tiny_patch16_224", weights("vit_tiny_patch16_224")).transform
    assert transform == ImageTransform(224, (0.5,) * 3, (0.5,) * 3, interpolation="bicubic", crop_fraction=0.9)


@pytest.mark.parametrize("classes", [None, 0, 7])
def test_every_weight_comes_from_the_file(weights: Callable[[str], Path], tmp_path: Path, classes: int | None):
    """With the published classifier, with none, with one of one's own; never with a tensor missing or left over."""
    tensors, file = load_file(weights("resnet18")), tmp_path / "own.safetensors"
    if classes is not None:
        del tensors["fc.weight"], tensors["fc.bias"]
    if classes:
        tensors |= {"fc.weight": torch.zeros(classes, 512), "fc.bias": torch.zeros(classes)}
    save_file(tensors, file)
    net = opened("resnet18", file).net
    assert all(torch.equal(t, tensors[name]) for name, t in net.state_dict().items())
    gone = tensors.pop("layer3.0.conv1.weight")
    save_file(tensors, file)
    says("layer3.0.conv1.weight", lambda: opened("resnet18", file))
    save_file({**tensors, "layer3.0.conv1.weight": gone, "layer9.weight": gone.clone()}, file)
    says("layer9.weight", lambda: opened("resnet18", file))


# --- tuning ----------------------------------------------------------------------------------------------------------

ALL = "lora(rank=2, targets='all')"
TUNED = [
    ("vit_tiny_patch16_224", ["none"]),
    ("vit_tiny_patch16_224", ["norms"]),
    ("vit_tiny_patch16_224", ["lora(rank=2)"]),
    ("vit_tiny_patch16_224", ["adapters", "deep(1)", "prompts(2)", "biases"]),
    ("convnext_atto", ["norms", ALL, "adapters"]),
    ("resnet18", ["norms", ALL]),
]


@pytest.mark.parametrize(("name", "tuned"), TUNED, ids=str)
def test_one_selection_four_uses(weights: Callable[[str], Path], tmp_path: Path, name: str, tuned: list[str]):
    text = f"file:{save('bert', tmp_path / 'bert')}"
    given = recipe(f"timm:{name}@{weights(name)}", text, tuned).with_overrides(["image.size=64", 'tune.text=["none"]'])
    parts = train_save_load(given, tmp_path / "run", CAPTIONS)
    inside = {n for n in parts.model.selection if n.startswith("image.net.")}
    assert bool(inside) == (tuned != ["none"])


def test_norms_of_swin_and_registers_are_found(weights: Callable[[str], Path]):
    """Every norm by type, no layer scale; low-rank tuning finds the attention of each."""
    for name, norms in (("swin_tiny_patch4_window7_224", 29), ("vit_small_patch14_reg4_dinov2", 25)):
        tower = Tower(load_backbone(ImageTowerSettings(tower=f"timm:{name}"), meta=True))
        names = tower.tune(["norms"], seed=0)
        assert len(names) == 2 * norms and not any("ls1" in n or "gamma" in n for n in names)
        assert any("attn.qkv.lora_A" in n for n in tower.tune([ALL], seed=0))


# --- DeiT files, which are timm's -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "width", "heads", "layer_scale"),
    [("deit_tiny_patch16_224", 192, 3, None), ("deit3_small_patch16_224", 384, 6, 1e-4)],
)
def test_our_deit_reads_timms_file(
    weights: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    width: int,
    heads: int,
    layer_scale: float | None,
):
    file = weights(name)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repository, filename: str(file))
    ours = VisionTransformer(size=224, patch=16, width=width, blocks=12, heads=heads, layer_scale=layer_scale)
    load_deit(ours, "timm/anything")
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels(224)), theirs.forward_features(pixels(224)), rtol=1e-3, atol=1e-3)
    if layer_scale is None:
        base = load_backbone(ImageTowerSettings(tower="deit:tiny", size=160))
        assert Tower(base).pooled(Pixels(pixels(160))).shape == (2, 192)


# --- classifiers -----------------------------------------------------------------------------------------------------

CLASSIFIERS = {  # name -> the pooling that its classifier reads; None: none of ours
    "vit_tiny_patch16_224": "cls",
    "vit_wee_patch16_reg1_gap_256": "mean",
    "convnext_atto": "mean",
    "resnetv2_18": "mean",  # a 1 x 1 convolution
    "deit_tiny_distilled_patch16_224": None,  # two classifiers
    "mobilenetv3_small_050": None,  # a convolution after the pooling
    "vit_small_patch14_reg4_dinov2": None,  # no classifier
}


@pytest.mark.parametrize(("name", "reads"), CLASSIFIERS.items(), ids=CLASSIFIERS)
def test_the_classifier_is_timms_own(weights: Callable[[str], Path], name: str, reads: str | None):
    file, size = weights(name), 56 if "patch14" in name else 64
    tower = Tower(opened(name, file, size=size))
    found = tower.classifier()
    if reads is None:
        assert found is None
        return
    assert found is not None
    classifier, columns = found
    assert classifier.pool == reads and classifier.concepts == imagenet_concepts()
    sized = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    theirs = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **sized).eval()
    given = pixels(size)
    with torch.no_grad():
        logits, ours = theirs(given), tower.pooled(Pixels(given))[:, columns] @ classifier.weight.T
    torch.testing.assert_close(ours[0] - ours[1], logits[0] - logits[1], rtol=1e-3, atol=1e-3)
    assert load_backbone(ImageTowerSettings(tower=f"timm:{name}"), meta=True).classifier is None


def test_names_of_larger_heads_are_timms():
    named = timm_concepts({}, 21_843)
    assert named is not None and "21k" in named.source
    first, terms = named.concepts[0], {concept.names[0] for concept in named.concepts[21_843:]}
    assert first.names == ("organism", "being") and first.definition.startswith("a living thing")
    assert "natural object" in terms and not {"bird", "dog"} & terms, "those are classes themselves"
    assert timm_concepts({}, 11_821) is not None and timm_concepts({}, 7) is None
    own = timm_concepts({"label_names": ["red, scarlet", "blue"]}, 2)
    assert own is not None and own.concepts[0].names == ("red", "scarlet")
    numbered = timm_concepts({"label_names": {"1": "blue", "0": "red"}}, 2)
    assert numbered is not None and numbered.concepts[1].names == ("blue",)
    synsets = timm_concepts({"label_names": ["n01440764", "n01443537"]}, 2)
    assert synsets is not None and synsets.concepts[0].names == ("tench", "Tinca tinca")
    assert [concept.names[0] for concept in synsets.concepts[2:]].count("fish") == 1
    assert timm_concepts({"label_names": ["n00000000", "n01443537"]}, 2) is None
    assert timm_concepts({"label_names": ["LABEL_0", "LABEL_1"]}, 2) is None


# --- what cannot be had -----------------------------------------------------------------------------------------------


def says(what: str, call: Callable[[], object]) -> None:
    """One line, with ``what`` in it."""
    with pytest.raises(UserError, match=re.escape(what)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_unknown_and_missing(monkeypatch: pytest.MonkeyPatch):
    says("nearest: vit_tiny_patch16_224", lambda: load_backbone(ImageTowerSettings(tower="timm:vit_tiny_patch16_24")))
    says("there is no file nowhere.pt", lambda: load_backbone(ImageTowerSettings(tower="timm:resnet18@nowhere.pt")))
    says("is a tower for images", lambda: load_backbone(TextTowerSettings(tower="timm:resnet18")))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    says("without a hub use pip:", lambda: load_backbone(ImageTowerSettings(tower="timm:resnet18.a1_in1k")))


def test_the_hub_recipe_is_counted_without_weights():
    """Shapes only: nothing is downloaded."""
    model = build_model(read_recipe("hub/vit-in21k-timm"), meta=True).parameter_counts()["model"]
    line = f"# {model.trained:,} parameters train ({model.percent:.2f} %)."
    assert line in builtin_recipes()["hub/vit-in21k-timm"].read_text()
