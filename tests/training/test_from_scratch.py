"""Nets of ours from a recipe on: trained from scratch, stopped and gone on with, loaded, partly frozen, and refused."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import clasp
from clasp.commands.train import train_recipe
from clasp.config.build import build_model, build_model_and_preprocessing
from clasp.config.recipe import Recipe, read_recipe, recipe_from_dict
from clasp.data.bpe import train_bpe
from clasp.data.tokenizer import Tokenizer
from clasp.models.zoo.from_scratch import load_clip_tokenizer
from clasp.training.distributed import Processes
from clasp.training.losses import build_loss
from clasp.training.run_folder import RunFolder
from clasp.training.step import Stepper
from clasp.training.trackers.console import SilentReporter, TrainProgress
from clasp.types import UserError
from toydata import toys, write_folder
from toyruns import delta, run, save_towers
from toyruns import recipe as toy_recipe

NET = {"width": 32, "heads": 2, "layers": 3}
CONVOLUTIONS = {
    "none": (),
    "without statistics": ("image.net.stem=group", "image.net.branch.kind=gated", "image.net.branch.before=[1, 2]"),
    "the paper's": ("image.net.stem=batch", "image.net.branch.kind=paper", "image.net.branch.before=[1, 2]"),
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(toys(48), tmp_path_factory.mktemp("pairs"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))


def recipe(pairs: Path, *changes: str) -> Recipe:
    """MS-CLIP at a size for tests: two nets of three layers, 32 wide, attention and feed-forward shared."""
    given = {
        "image": {"tower": "own:image", "net": {**NET, "size": 32, "patch": 8}},
        "text": {"tower": "own:text", "vocabulary": "pairs", "net": {**NET, "vocabulary": 300, "context": 16}},
        "share": {"attention": "shared", "ffn": "shared"},
        "tune": {"image": ["full"], "text": ["full"]},
        "head": {"width": 16, "bias": False},
        "data": {"train": str(pairs), "val_fraction": 0.25},
        "train": {
            "batch_size": 12,
            "epochs": 2,
            "precision": "float32",
            "weight_decay_shared": 0.2,
            "decay_filter": "msclip",
        },
    }
    return recipe_from_dict(given, "toy").with_overrides(changes)


def refused(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


class StopAt(SilentReporter):
    """Presses Ctrl-C after a step."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, progress: TrainProgress) -> None:
        if progress.step == self.at:
            os.kill(os.getpid(), signal.SIGINT)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convolutions", CONVOLUTIONS)
def test_a_run_is_loaded_and_gone_on_with_bitwise(convolutions: str, pairs: Path, tmp_path: Path) -> None:
    stem = convolutions != "none"
    made = recipe(pairs, *CONVOLUTIONS[convolutions], *(["share.layers=1:"] if stem else []))
    whole = run(made, tmp_path / "whole")
    stopped = train_recipe(made, tmp_path / "cut", say=lambda line: None, reporter=StopAt(4))
    assert stopped.fitted.interrupted
    again = recipe_from_dict(RunFolder(tmp_path / "cut").recipe(), "again")
    run(again, tmp_path / "cut", resume=True)
    one, other = delta(tmp_path / "whole"), delta(tmp_path / "cut")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

    model = clasp.load(tmp_path / "whole")
    parameters = dict(model.encoder.named_parameters())
    statistics = one.keys() - parameters.keys()
    assert parameters.keys() <= one.keys(), "everything trains"
    assert sum(one[name].numel() for name in parameters) == model.encoder.parameter_counts()["model"].total
    assert whole.delta_bytes - sum(t.nbytes for t in one.values()) < 40_000, "names and shapes, and no tensor twice"
    moved = {name for name, _ in model.encoder.named_buffers() if name in statistics}
    assert statistics == moved and bool(moved) == (convolutions == "the paper's")
    steps = {int(one[name]) for name in moved if name.endswith("num_batches_tracked")}
    assert steps <= {whole.fitted.weights_position.step}, "once in each step"
    assert "0      separate" in (tmp_path / "whole" / "README.md").read_text() or not stem
    with torch.no_grad():
        same = model.encode_text(["a red circle"])
    assert torch.equal(same, clasp.load(tmp_path / "cut").encode_text(["a red circle"]))


def test_the_same_seed_gives_the_same_bases(pairs: Path) -> None:
    one, other, third = (build_model(recipe(pairs, f"train.seed={seed}")) for seed in (3, 3, 4))
    assert one.fingerprint == other.fingerprint != third.fingerprint
    assert build_model(recipe(pairs), meta=True).parameter_counts() == build_model(recipe(pairs)).parameter_counts()


def test_shared_weights_decay_and_learn_apart(pairs: Path) -> None:
    made = recipe(pairs, "train.lr_factors.shared=0.5", 'share.ffn={"low-rank" = 2}')
    model = build_model(made)
    kinds = model.parameter_kinds
    assert kinds["image.net.blocks.0.mlp.fc1.down"] == kinds["text.net.blocks.0.mlp.fc1.up"] == "new"
    assert kinds["image.net.blocks.0.mlp.fc1.shared.weight"] == "shared"
    stepper = Stepper(model, build_loss(made.loss), made.train, Processes(), "float32", steps=4, kinds=kinds)
    names = {p: name for name, p in model.named_parameters()}
    held = {names[p]: group for group in stepper.optimizer.param_groups for p in group["params"]}
    assert held.keys() == model.selection

    def of(name: str) -> tuple[float, float]:
        return held[name]["weight_decay"], held[name]["lr_factor"]

    assert of("image.net.blocks.0.attn.qkv.weight") == (0.2, 0.5)
    assert of("image.net.blocks.0.attn.qkv.bias") == (0.0, 0.5)
    assert of("image.net.blocks.0.norm1.weight") == of("text.net.blocks.0.norm1.weight") == (0.0, 1.0)
    assert of("image.net.patch_embed.proj.weight") == (0.1, 1.0)
    assert of("text.net.token_embed.weight") == of("text.net.pos_embed") == of("image.net.pos_embed") == (0.0, 1.0)


def test_one_head_for_both_is_one_tensor(pairs: Path, tmp_path: Path) -> None:
    run(recipe(pairs, "share.head=shared", "share.final_norm=shared", "train.epochs=1"), tmp_path / "run")
    saved = delta(tmp_path / "run")
    assert "image_head.map.weight" in saved and "text_head.map.weight" not in saved
    model = clasp.load(tmp_path / "run").encoder
    assert model.text_head.map.weight is model.image_head.map.weight
    assert model.parameter_counts()["heads"].total == 32 * 16


def test_a_frozen_part_is_kept_and_trains_the_same(pairs: Path, tmp_path: Path) -> None:
    """The lower blocks of both nets stay as they were drawn; what they say is computed once, to float32."""
    made = recipe(pairs, "tune.image=['last']", "tune.text=['last']")
    for features in ("float32", "off"):
        run(made.with_overrides([f"data.feature_cache={features}"]), tmp_path / features)
    kept, live = delta(tmp_path / "float32"), delta(tmp_path / "off")
    assert kept.keys() == live.keys() and {n.split(".")[3] for n in kept if "blocks" in n} == {"2"}
    for name in kept:
        torch.testing.assert_close(kept[name], live[name], atol=2e-4, rtol=1e-3)
    assert list((tmp_path / "cache" / "features").glob("*.npy"))


def test_what_one_tower_trains_of_both_trains(pairs: Path) -> None:
    model = build_model(recipe(pairs, "tune.text=['none']"))
    assert model.text.net.blocks[0].attn.qkv.weight.requires_grad and not model.text.fully_frozen
    assert not model.text.net.blocks[0].norm1.weight.requires_grad
    assert model.parameter_counts()["text"].trained == 0 and model.parameter_counts()["shared"].percent == 100


def test_one_pre_trained_trunk_for_both(pairs: Path, tmp_path: Path) -> None:
    towers = save_towers(tmp_path / "towers")
    made = toy_recipe(towers, pairs, "head.standardize=false", "share.trunk=image", "train.epochs=1")
    done = run(made, tmp_path / "run")
    model = clasp.load(tmp_path / "run").encoder
    counts = model.parameter_counts()
    assert counts["image"].trained == counts["shared"].trained == 0 < counts["text"].trained
    saved = delta(tmp_path / "run")
    assert {name.partition(".")[0] for name in saved} == {"image_head", "text_head", "log_scale", "text"}
    assert sum(t.numel() for t in saved.values()) == counts["model"].trained
    assert all(model.parameter_kinds[name] == "new" for name in saved if name.startswith("text."))
    assert done.delta_bytes < 4 * counts["model"].trained + 10_000
    assert "shared" in (tmp_path / "run" / "README.md").read_text()
    refused("own:image is not", lambda: build_model(recipe(pairs, "share.trunk=image"), meta=True))


# --- words -----------------------------------------------------------------------------------------------------------


def test_clips_word_pieces() -> None:
    tokenizer = load_clip_tokenizer(77)
    assert tokenizer.encode(["a photo of a cat"]) == [[49406, 320, 1125, 539, 320, 2368, 49407]]
    # as open_clip_torch 3.3.0 has them
    assert tokenizer.encode(["The DOG's  bone!!! 123 45"])[0][1:-1] == [
        518,
        1929,
        568,
        6195,
        995,
        272,
        273,
        274,
        275,
        276,
    ]
    assert tokenizer.encode(["naïve café — “quotes” 日本語"])[0][1:-1] == [
        1097,
        35689,
        563,
        15304,
        2005,
        257,
        5808,
        257,
        39121,
        44353,
        34002,
        508,
    ]
    long = tokenizer.encode(["cat " * 200])[0]
    assert len(long) == 77 and long[-1] == 49407
    assert tokenizer.with_settings(truncation="drop_eos").encode(["cat " * 200, "cat"]) == [
        [49406],
        [49406, 2368, 49407],
    ]


def test_learned_word_pieces_are_a_fact_about_the_captions() -> None:
    captions = [toy.caption for toy in toys(30)]
    one, other = train_bpe(captions, 400), train_bpe(captions[::-1], 400)
    assert one.to_str() == other.to_str() and one.get_vocab_size() <= 400
    tokenizer = Tokenizer(one, max_tokens=8)
    ids = tokenizer.encode(["A red circle", "žluťoučký 日本"])
    assert ids[0][0] == 0 and all(row[-1] == 1 for row in ids)
    assert len(ids[0]) == 5, "a word that was seen often is one piece"
    assert len(ids[1]) == 8, "a word that was never seen is its bytes"


# --- nonsense --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["share.layers=1:5"], "there are layers 0 to 2"),
        (["text.net.width=64"], "cannot share q of the attention: width is 32 in the image net and 64 in the text net"),
        (["text.net.layers=2"], "no layer 2 in the text net"),
        (["image.net.stem=group"], "layer 0 of the image net is its stem"),
        (["text.tower=pip:multilingual-e5-small"], "text.vocabulary = 'pairs' is for tower = 'own:text'"),
        (["image.tower=pip:efficientnet-lite0"], "[image.net] is for tower = 'own:image'"),
        (["image.tower=own:text"], "a native encoder is own:image there"),
        (["image.size=64"], "set image.net.size instead"),
        (["text.max_tokens=40"], "has 16 positions"),
        (["text.vocabulary=clip"], "CLIP has 49408 word pieces"),
        (["head.kind=mlp"], "bias = false is for kind = 'linear'"),
        (["share.head=shared", "head.bias=true", "head.standardize=true"], "is of one tower's features"),
        ([*CONVOLUTIONS["the paper's"], "share.layers=1:", "train.micro_batch=4"], "statistics of whole batches"),
        (["share.atention=shared"], "did you mean"),
        (
            ['share.overrides=[{layers="1", atention="shared"}]'],
            "unknown key 'share.overrides.0.atention'; did you mean",
        ),
        (["image.net.with=3"], "unknown key 'image.net.with'"),
        (["image.tower=own"], "has no scheme"),
    ],
)
def test_nonsense_is_refused(changes: list[str], words: str, pairs: Path) -> None:
    refused(words, lambda: build_model(recipe(pairs, *changes), meta=True))


def test_only_nets_of_ours_share_parts(pairs: Path) -> None:
    towers = [
        "image.tower=pip:efficientnet-lite0",
        "text.tower=pip:multilingual-e5-small",
    ]
    shares = read_recipe("start", [*towers, "share.attention=shared"])
    refused("pip:efficientnet-lite0 is not a native encoder", lambda: build_model(shares, meta=True))
    refused(
        "one head is for equal widths",
        lambda: build_model(read_recipe("start", [*towers, "share.head=shared"]), meta=True),
    )
    refused("there is no [share]", lambda: read_recipe("start", ["train.weight_decay_shared=0.1"]))
    refused("[image.net]", lambda: build_model(read_recipe("start", ["image.tower=own:image"]), meta=True))
    refused(
        "includes 256 bytes",
        lambda: build_model_and_preprocessing(recipe(pairs, "text.net.vocabulary=100"), lambda: ["a"]),
    )


def test_pieces_of_a_batch_are_no_trouble_without_statistics(pairs: Path, tmp_path: Path) -> None:
    made = recipe(pairs, *CONVOLUTIONS["without statistics"], "share.layers=1:", "train.epochs=1")
    run(made.with_overrides(["train.micro_batch=5"]), tmp_path / "pieces")
    run(made, tmp_path / "whole")
    one, other = (load_file(tmp_path / name / "delta.safetensors") for name in ("pieces", "whole"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=2e-4, rtol=1e-3)
