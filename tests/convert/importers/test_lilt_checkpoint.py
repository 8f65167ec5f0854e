"""LilT's checkpoints against what its reference computed with them: names, what trained, and every recorded output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from clasp.commands.import_checkpoint import import_checkpoint
from clasp.config.build import load
from clasp.config.recipe import read_recipe, recipe_from_dict
from clasp.convert.importers.lilt_checkpoint import (
    LILT_HEAD_PREFIXES,
    LILT_TOWER_PREFIXES,
    LiltCheckpoint,
    lilt_adapter_method,
    parse_lilt_checkpoint,
    read_lilt_checkpoint,
)
from clasp.convert.importers.lilt_flags import APPENDED_BLOCK_METHOD, LiltTuning, explain_lilt_tuning, infer_lilt_tuning
from clasp.convert.importers.run_writer import ImportOptions
from clasp.convert.importers.safe_pickle import safe_load_pickle
from clasp.data.images import ImageTransform
from clasp.models.dual_encoder import DualEncoder
from clasp.models.tower_settings import ImageTowerSettings
from clasp.models.transformer.deit import resize_pos_embed
from clasp.models.transformer.settings import ImageTransformerSettings
from clasp.models.tuning.spec import apply_tuning
from clasp.models.zoo.folder import BertSettings, build_on_meta, save_image_encoder
from clasp.models.zoo.registry import load_backbone
from clasp.training.losses.build import build_loss
from clasp.training.run_folder import RunFolder
from clasp.types import Batch, Pixels, Tokens, UserError
from toysavedtowers import save_tokenizer

GOLDEN = Path(__file__).parents[2] / "golden"
FILES = (
    "lilt_da_ln.checkpoint",
    "lilt_large_like_lwa_ln.checkpoint",
    "lilt_lwa_ln.checkpoint",
    "lilt_lwa_ln.checkpoint_omegaconf",
    "lilt_lwa_ln_bitfit.checkpoint",
)
BY_WIDTH = {"image": None, "text": None}


@dataclass
class Case:
    """A recorded file, the run made of it, and what the run loads as."""

    golden: dict[str, Any]
    lilt: LiltCheckpoint
    run: Path
    model: DualEncoder

    @property
    def theirs(self) -> dict[str, str]:
        """The names of the model's parameters to the authors'."""
        names = {"temperature": "temp"}
        for modality, side in self.lilt.towers.items():
            names |= {
                f"{modality}.net.{ours}": f"{LILT_TOWER_PREFIXES[modality]}{theirs}"
                for ours, theirs in side.original_names.items()
            }
            names |= {
                f"{modality}_head.map.{part}": f"{LILT_HEAD_PREFIXES[modality]}{part}" for part in ("weight", "bias")
            }
        return names

    @property
    def tokens(self) -> Tokens:
        inputs = self.golden["inputs"]
        return Tokens(inputs["input_ids"], inputs["attention_mask"].bool())

    @property
    def pixels(self) -> Pixels:
        return Pixels(self.golden["inputs"]["pixel_values"])


@pytest.fixture(scope="module", params=FILES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    save_tokenizer(folder / "words", template="<s> $A </s>")
    file = GOLDEN / f"{request.param}.pth"
    run = import_checkpoint("lilt", file, folder / "run", ImportOptions(tokenizer=f"file:{folder / 'words'}")).run
    model = load(run).encoder
    assert isinstance(model, DualEncoder)
    recorded = request.param.partition(".")[0]
    golden = torch.load(GOLDEN / f"{recorded}.golden.pt", weights_only=True)
    return Case(golden, read_lilt_checkpoint(file, BY_WIDTH), run, model)


# --- what the imported run says --------------------------------------------------------------------------------------


def test_every_recorded_output(case: Case):
    model, said = case.model, case.golden["outputs"]
    with torch.no_grad():
        image_tokens, text_tokens = model.image(case.pixels), model.text(case.tokens)
        pooled = {"image": model.image.pooled(case.pixels), "text": model.text.pooled(case.tokens)}
        embeddings = model(_batch(case))
    logits = embeddings.scale * embeddings.image @ embeddings.text.T
    ours = {
        "image_tokens": image_tokens,
        "text_tokens": text_tokens,
        "image_cls": pooled["image"],
        "text_cls": pooled["text"],
        "image_embed_raw": model.image_head(pooled["image"]),
        "text_embed_raw": model.text_head(pooled["text"]),
        "image_embed": embeddings.image,
        "text_embed": embeddings.text,
        "temperature": 1 / embeddings.scale,
        "logits_per_image": logits,
        "logits_per_text": logits.T,
        "loss": _loss(case),
        "temperature_stored": case.lilt.temperature,
    }
    assert ours.keys() == said.keys()
    for name, tensor in said.items():
        assert ours[name].shape == tensor.shape, name
        assert (ours[name].detach() - tensor).abs().max() <= 1e-5, name


def test_what_trains_to_the_name_and_to_the_unit(case: Case):
    counts, params = case.model.parameter_counts(), case.golden["params"]
    assert {case.theirs[name] for name in case.model.selection} == set(case.golden["trainable_names"])
    assert (counts["model"].total, counts["model"].trained) == (params["total"], params["trainable"])
    assert counts["image"].trained == params["vision_trainable"]
    assert counts["text"].trained == params["text_trainable"]
    assert {n for n, p in case.model.named_parameters() if p.requires_grad} == case.model.selection
    assert case.theirs.keys() == dict(case.model.named_parameters()).keys()


def test_every_recorded_gradient(case: Case):
    model = case.model
    model.zero_grad()
    _loss(case).backward()
    gradients = {case.theirs[name]: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms, said = case.golden["grad_norms"], case.golden["grads"]
    assert gradients.keys() == norms.keys() and said.keys() <= norms.keys()
    for name, norm in norms.items():
        torch.testing.assert_close(gradients[name].norm().item(), float(norm), rtol=1e-3, atol=1e-6)
    for name, tensor in said.items():
        torch.testing.assert_close(gradients[name], tensor, rtol=1e-3, atol=1e-6)


def test_every_tensor_of_the_file_is_in_the_run(case: Case):
    """Bit for bit; the temperature as it is used."""
    parameters = dict(case.model.named_parameters())
    for modality, side in case.lilt.towers.items():
        for name, tensor in side.tensors.items():
            assert torch.equal(parameters[f"{modality}.net.{name}"], tensor), name
        for part, tensor in case.lilt.heads[modality].items():
            assert torch.equal(parameters[f"{modality}_head.map.{part}"], tensor)
    assert parameters["temperature"] == case.lilt.temperature.clamp(0.001, 0.5)
    delta = safetensors.torch.load_file(case.run / "delta.safetensors")
    assert delta.keys() == case.model.selection
    plain = {side: _saved(case.run, side) for side in ("image", "text")}
    added = {name for name in case.model.selection if not _is_in(plain, name)}
    adapted = case.golden["arch"]["adapter_reduction_factor"] is not None
    assert all((".adapter" in name) == adapted for name in added if ".net." in name) and added
    held = case.golden["arch"]
    assert (
        sum(name.startswith("blocks.") and name.endswith("norm1.bias") for name in plain["image"])
        == (held["vision"]["pretrained_blocks"])
    )


def test_the_recipe_is_the_papers(case: Case):
    recipe, paper = recipe_from_dict(RunFolder(case.run).recipe(), "run"), read_recipe("lilt/base")
    assert recipe.image.model_copy(update={"tower": paper.image.tower, "size": paper.image.size}) == paper.image
    assert recipe.text.model_copy(update={"tower": paper.text.tower}) == paper.text
    assert (recipe.loss, recipe.train, recipe.data) == (paper.loss, paper.train, paper.data)
    assert (recipe.loss.scale, recipe.loss.scale_range) == ("temperature", (2, 1000))
    assert recipe.head.width == case.golden["arch"]["embed_dim"]
    method = {"da_ln": "lilt/da", "lwa_ln": "lilt/lwa", "lwa_ln_bitfit": "lilt/lwa-bitfit"}
    known = read_recipe(method[case.golden["recipe"]["name"]]).tune
    assert (set(recipe.tune.image), set(recipe.tune.text)) == (set(known.image), set(known.text))


def test_sizes_are_those_of_the_net(case: Case):
    arch = case.golden["arch"]
    image, text = case.lilt.towers["image"].settings, case.lilt.towers["text"].settings
    assert isinstance(image, ImageTransformerSettings) and isinstance(text, BertSettings)
    vision = arch["vision"]
    assert (image.size, image.patch, image.width) == (arch["image_size"], arch["patch_size"], vision["width"])
    assert (image.heads, image.layers, image.hidden) == (vision["heads"], vision["blocks"], vision["mlp_width"])
    assert (image.layer_scale is not None, image.class_position) == (
        vision["layer_scale"],
        vision["position_covers_cls"],
    )
    words = arch["text"]
    assert text == BertSettings(
        width=words["width"],
        layers=words["layers"],
        heads=words["heads"],
        hidden=words["mlp_width"],
        vocabulary=words["vocab_size"],
        positions=words["max_positions"],
    )
    assert all(side.reduction == arch["adapter_reduction_factor"] for side in case.lilt.towers.values())


def _batch(case: Case) -> Batch:
    count = len(case.pixels.values)
    groups = torch.arange(count)[:, None].expand(-1, 2).contiguous()
    return Batch(tuple(map(str, range(count))), case.pixels, case.tokens, groups)


def _loss(case: Case) -> torch.Tensor:
    batch = _batch(case)
    e = case.model(batch)
    loss = build_loss(recipe_from_dict(RunFolder(case.run).recipe(), "run").loss)
    return loss(e.image, e.text, e.scale, e.bias, groups=batch.groups).total


def _saved(run: Path, side: str) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "towers" / side / "model.safetensors")


def _is_in(plain: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    side, _, rest = name.partition(".net.")
    return rest in plain.get(side, {})


# --- the OmegaConf file ----------------------------------------------------------------------------------------------


def test_the_omegaconf_file_says_what_the_plain_one_says():
    plain, theirs = (safe_load_pickle(GOLDEN / f"lilt_lwa_ln.checkpoint{end}.pth") for end in ("", "_omegaconf"))
    assert theirs.keys() == plain.keys()
    assert theirs["config"] == plain["config"] and type(theirs["config"]) is dict
    assert json.loads(json.dumps(theirs["config"])) == plain["config"]
    assert all(torch.equal(theirs["model"][name], tensor) for name, tensor in plain["model"].items())
    assert all(theirs[key] == plain[key] for key in ("optimizer", "lr_scheduler", "epoch"))


# --- other image sizes -----------------------------------------------------------------------------------------------


def test_positions_of_a_folder_resize_as_recorded(tmp_path: Path):
    cases = torch.load(GOLDEN / "lilt_position_resize.golden.pt", weights_only=True)["cases"]
    assert cases
    for number, case in enumerate(cases):
        settings = ImageTransformerSettings(
            size=4 * case["source_grid"],
            patch=4,
            width=case["source"].shape[2],
            heads=1,
            layers=1,
            class_position=bool(case["extra_rows"]),
        )
        tensors = {name: torch.randn(p.shape) for name, p in build_on_meta(settings).named_parameters()}
        transform = ImageTransform(settings.size, (0.5,) * 3, (0.5,) * 3)
        save_image_encoder(settings, {**tensors, "pos_embed": case["source"]}, transform, tmp_path / str(number))
        size = 4 * case["target_grid"]
        base = load_backbone(ImageTowerSettings(tower=f"file:{tmp_path / str(number)}", size=size))
        torch.testing.assert_close(base.net.get_parameter("pos_embed").data, case["target"], atol=1e-5, rtol=0)
        assert base.transform is not None and base.transform.size == size
        assert base.net(torch.zeros(1, 3, size, size)).shape[1] == case["target_grid"] ** 2 + 1


@pytest.mark.parametrize("name", ["lilt_lwa_ln", "lilt_large_like_lwa_ln"])
def test_import_at_another_size(tmp_path: Path, name: str):
    save_tokenizer(tmp_path / "words", template="<s> $A </s>")
    file, wanted = GOLDEN / f"{name}.checkpoint.pth", ImportOptions(tokenizer=f"file:{tmp_path / 'words'}", size=96)
    model = load(import_checkpoint("lilt", file, tmp_path / "run", wanted).run)
    assert model.transform.size == 96 and isinstance(model.encoder, DualEncoder)
    side = read_lilt_checkpoint(file, BY_WIDTH).towers["image"]
    table, extra = side.tensors["pos_embed"], int(name == "lilt_lwa_ln")
    parameters = dict(model.encoder.named_parameters())
    assert torch.equal(parameters["image.net.pos_embed"], resize_pos_embed(table, 6, extra))
    assert torch.equal(_saved(tmp_path / "run", "image")["pos_embed"], table), "the folder keeps what it was given"
    pixels = torch.randn(2, 3, 96, 96)
    small = torch.nn.functional.interpolate(pixels, size=(64, 64), mode="bicubic")
    plain = load(import_checkpoint("lilt", file, tmp_path / "as-it-was", ImportOptions(tokenizer=wanted.tokenizer)).run)
    cosines = (model.encode_pixels(pixels) * plain.encode_pixels(small)).sum(1)
    assert cosines.min() > 0.5, "the same pictures at another size are near"


# --- the paper's recipes, by their switches --------------------------------------------------------------------------

NAMES = json.loads((GOLDEN / "lilt_trainable_names.json").read_text())["recipes"]
COUNTS = json.loads((GOLDEN / "param_counts.json").read_text())["lilt"]
SWITCHES = {"freeze_vision_encoder": False, "freeze_text_encoder": False, "pretrained_text": True}
TINY = {
    "image": ImageTransformerSettings(size=256, patch=16, width=192, heads=3, layers=12, hidden=768),
    "text": BertSettings(width=128, layers=2, heads=2, hidden=512, vocabulary=30522, positions=512),
}


def made(
    switches: Mapping[str, Any], *, image: str | None = None, text: str | None = None, **found: Any
) -> LiltCheckpoint:
    """A file of the tiny towers, in shapes only; ``image`` and ``text`` say what else is in them than switches do."""
    given: dict[str, Any] = {**SWITCHES}
    for key, value in switches.items():
        section, _, name = key.rpartition(".")
        (given.setdefault(section, {}) if section else given)[name] = value
    adapted = given.get("conventional_adapter", {})
    model = {"temp": torch.tensor(0.07)}
    for modality, only in (("image", "vision_only"), ("text", "language_only")):
        what = {"image": image, "text": text}[modality]
        deep = given.get("adapter_append") if what is None else what == "deep"
        bottlenecks = adapted.get("insert") in (True, only) if what is None else what == "adapters"
        settings = TINY[modality].model_copy(update={"layers": TINY[modality].layers + bool(deep)})
        net = build_on_meta(settings)
        if bottlenecks:
            apply_tuning(net, [lilt_adapter_method(modality, adapted.get("reduction_factor", 4))], seed=0)
        model |= {
            f"{LILT_TOWER_PREFIXES[modality]}{_theirs(modality, name)}": p.data for name, p in net.named_parameters()
        }
        width = TINY[modality].width
        model |= {
            f"{LILT_HEAD_PREFIXES[modality]}weight": torch.empty(256, width),
            f"{LILT_HEAD_PREFIXES[modality]}bias": torch.empty(256),
        }
    return parse_lilt_checkpoint(Path("tiny.pth"), {"model": model, "config": given, **found}, BY_WIDTH)


def _theirs(modality: str, name: str) -> str:
    """Written once more, for the sake of the test: LilT's names of its adapters."""
    parts = name.replace("down.", "down_sampler.").replace("up.", "up_sampler.")
    if modality == "text":
        parts = parts.replace(".adapter1.", ".attention.output.adapter.").replace(".adapter2.", ".output.adapter.")
    return parts


def _selected(lilt: LiltCheckpoint, modality: str, each: LiltTuning) -> dict[str, int]:
    """The authors' names of what the methods select on the plain tower, with their sizes."""
    net = build_on_meta(lilt.towers[modality].base_tower(each.appended_blocks)[0])
    names = apply_tuning(net, each.methods, seed=0)
    theirs = lilt.towers[modality].original_names
    return {f"{LILT_TOWER_PREFIXES[modality]}{theirs[n]}": p.numel() for n, p in net.named_parameters() if n in names}


@pytest.mark.parametrize("name", NAMES)
def test_trained_names_are_the_references(name: str):
    lilt, recipe = made(NAMES[name]["switches"]), NAMES[name]
    found = {"temp", *(f"{head}{part}" for head in LILT_HEAD_PREFIXES.values() for part in ("weight", "bias"))}
    tunings = {modality: infer_lilt_tuning(lilt, modality) for modality in lilt.towers}
    for modality, each in tunings.items():
        found |= _selected(lilt, modality, each).keys()
        assert not each.notes
    assert found == set(recipe["trained_names"])
    assert explain_lilt_tuning(lilt, sum(len(each.trained) for each in tunings.values())) == []


@pytest.mark.parametrize("name", COUNTS["counts"]["tiny_tiny"])
def test_trained_counts_are_the_references(name: str):
    lilt, counts = made(COUNTS["recipe_switches"][name]), COUNTS["counts"]["tiny_tiny"][name]
    for modality, theirs in (("image", "vision"), ("text", "text")):
        each = infer_lilt_tuning(lilt, modality)
        assert sum(_selected(lilt, modality, each).values()) == counts[f"{theirs}_trained"]
        assert len(each.methods) <= 4, "a person reads these"


FROZEN = {"freeze_vision_encoder": True, "freeze_text_encoder": True}
LWA = {**FROZEN, "conventional_adapter.insert": True, "unlock_layernorm": True}
DA = {**FROZEN, "adapter_append": True, "add_adapter": True, "unlock_layernorm": True}


def test_a_text_tower_that_was_not_pretrained_has_nothing_added():
    """Facts of the paper's code: it then forgets both settings in the text tower."""
    lwa = made({**LWA, "pretrained_text": False}, text="plain")
    assert infer_lilt_tuning(lwa, "text").methods == ["norms"]
    assert infer_lilt_tuning(lwa, "image").methods == [lilt_adapter_method("image", 4), "norms"]
    da = made({**DA, "pretrained_text": False}, text="plain")
    assert infer_lilt_tuning(da, "image").methods == [APPENDED_BLOCK_METHOD, "norms"]
    text = infer_lilt_tuning(da, "text")
    assert (set(text.methods), text.appended_blocks) == ({"last(1)", "norms"}, 0)


def test_dino_has_no_adapters_though_the_config_says_so():
    lilt = made({**LWA, "vision_encoder": "base_dino"}, image="plain")
    assert infer_lilt_tuning(lilt, "image").methods == ["norms"]
    assert infer_lilt_tuning(lilt, "text").methods == [lilt_adapter_method("text", 4), "norms"]
    deep = made({**DA, "vision_encoder": "base_dino"}, image="plain")
    image = infer_lilt_tuning(deep, "image")
    assert (set(image.methods), image.appended_blocks) == ({"last(1)", "norms"}, 0)


def test_blocks_that_were_frozen_again_stay_out_of_the_selection():
    frozen = list(range(10))
    lilt = made({**LWA, "always_freeze.visual_encoder": frozen, "always_freeze.text_encoder": []})
    image = infer_lilt_tuning(lilt, "image")
    names = _selected(lilt, "image", image)
    norms = {name for name in names if "norm" in name}
    assert norms == {
        *(f"visual_encoder.blocks.{b}.norm{n}.{p}" for b in (10, 11) for n in (1, 2) for p in ("weight", "bias")),
        "visual_encoder.norm.weight",
        "visual_encoder.norm.bias",
    }
    assert sum("adapter" in name for name in names) == 12 * 8, "no other file has them"
    assert "80 tensors of the image tower were frozen" in image.notes[0]
    assert len(image.trained) == len(names) - 80
    assert "always_freeze" not in " ".join(infer_lilt_tuning(lilt, "text").notes)


def test_without_switches_norms_and_what_was_added_are_taken_to_have_trained():
    for config in (None, {"image_res": 256}):
        lwa = parse_lilt_checkpoint(Path("tiny.pth"), {"model": _model(made(LWA)), "config": config}, BY_WIDTH)
        assert infer_lilt_tuning(lwa, "image").methods == [lilt_adapter_method("image", 4), "norms"]
        da = parse_lilt_checkpoint(Path("tiny.pth"), {"model": _model(made(DA)), "config": config}, BY_WIDTH)
        assert [infer_lilt_tuning(da, modality).methods for modality in da.towers] == [
            [APPENDED_BLOCK_METHOD, "norms"]
        ] * 2
        plain = parse_lilt_checkpoint(Path("tiny.pth"), {"model": _model(made({})), "config": config}, BY_WIDTH)
        assert [infer_lilt_tuning(plain, modality).methods for modality in plain.towers] == [["norms"]] * 2
        assert "no flags" in explain_lilt_tuning(plain, 0)[0]


def test_what_the_switches_cannot_tell_is_said():
    assert "drawn" in " ".join(explain_lilt_tuning(made({**FROZEN, "unlock_random": True}), 0))
    lilt = made({**LWA, "freeze_proj": True}, optimizer={"param_groups": [{"params": list(range(7))}]})
    said = explain_lilt_tuning(lilt, 6)
    assert len(said) == 1 and "heads were frozen" in said[0], said
    assert "has 7 tensors, but 9 are" in explain_lilt_tuning(lilt, 8)[1]
    with pytest.raises(UserError, match="unlock_layernorm = 'both'; LilT has true, false, vision_only"):
        infer_lilt_tuning(made({**FROZEN, "unlock_layernorm": "both"}), "image")


def _model(lilt: LiltCheckpoint) -> dict[str, torch.Tensor]:
    """The weights alone, by the authors' names."""
    model = {"temp": lilt.temperature}
    for modality, side in lilt.towers.items():
        model |= {
            f"{LILT_TOWER_PREFIXES[modality]}{side.original_names[name]}": tensor
            for name, tensor in side.tensors.items()
        }
        model |= {f"{LILT_HEAD_PREFIXES[modality]}{part}": tensor for part, tensor in lilt.heads[modality].items()}
    return model
