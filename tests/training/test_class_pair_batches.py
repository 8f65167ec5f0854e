"""Class pairs in gradient steps: what is in a batch, that runs repeat and resume, and where there can be none."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from clasp.commands import fit_run
from clasp.commands import train as main_job
from clasp.config.recipe import Recipe
from clasp.data.loader import BatchReader, PairLoader
from clasp.models.dual_encoder import DualEncoder
from clasp.training.class_pair_batches import ClassPairReader
from clasp.training.trackers.console import SilentReporter, TrainProgress
from clasp.types import Batch, PooledFeatures, UserError
from toyclassifiers import save_colour_classifier
from toydata import COLOURS, Toy, toys, write_csv
from toyruns import delta, recipe, run, save_text_tower

TOYS = toys(60)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    save_colour_classifier(folder / "image", toys(90, seed=1), list(COLOURS))
    save_colour_classifier(folder / "unnamed", TOYS, [f"LABEL_{number}" for number in range(len(COLOURS))])
    save_text_tower(folder / "text")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))


def with_steps(towers: Path, pairs: Path, *overrides: str) -> Recipe:
    given = ["head.init=cca", "head.ridge=[0.1, 0.1]", "head.width=5", "train.select=last", "head.noise=0.5"]
    return recipe(towers, pairs, *given, *overrides)


class Seen(NamedTuple):
    """What was opened for a run."""

    model: DualEncoder
    reader: BatchReader
    batches: PairLoader


def opened(made: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Seen:
    """A run without a step, and its batches."""
    seen: list[Seen] = []
    whole = main_job.open_batches

    def watched(context, sides):
        seen.append(Seen(context.model, sides, whole(context, sides)))
        return seen[-1].batches

    monkeypatch.setattr(main_job, "open_batches", watched)
    run(made.with_overrides(["train.epochs=0"]), folder)
    return seen[0]


def values(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    assert isinstance(batch.image, PooledFeatures) and isinstance(batch.text, PooledFeatures)
    return batch.image.values, batch.text.values


def test_a_batch_has_the_same_pairs_and_some_classes_after_them(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    one_is_a_class = [*TOYS[:-1], TOYS[-1]._replace(shape="", colour="red")]
    pairs = write_csv([Named(*toy) for toy in one_is_a_class], tmp_path)
    seen = opened(with_steps(towers, pairs, "data.class_ratio=0.5"), tmp_path / "run", monkeypatch)
    plain = PairLoader(seen.reader, batch_size=16, seed=1)
    equal = 0
    for epoch in range(4):
        for with_classes, without in zip(seen.batches.epoch(epoch), plain.epoch(epoch), strict=True):
            count, added = len(without.ids), with_classes.ids[len(without.ids) :]
            assert with_classes.ids[:count] == without.ids and 1 <= len(added) == len(set(added)) <= 8
            for ours, theirs in zip(values(with_classes), values(without), strict=True):
                assert torch.equal(ours[:count], theirs)
            group, text = with_classes.groups.T
            assert torch.equal(text[:count, None] == text[None, :count], same(without.groups[:, 1]))
            assert torch.equal(group[:count, None] == group[None, :count], same(without.groups[:, 0]))
            assert not (group[:count, None] == group[None, count:]).any(), "no pair is in the group of a class"
            assert len(set(group[count:].tolist())) == len(added), "classes are negatives of each other"
            equal += int((text[:count, None] == text[None, count:]).sum())
    assert equal > 0, "a caption that is the name of a class is no negative of it"
    again = [batch.ids for batch in seen.batches.epoch(2)]
    assert again == [batch.ids for batch in seen.batches.epoch(2)]
    assert again[1:] == [batch.ids for batch in seen.batches.epoch(2, start=1)]


class Named(Toy):
    """A toy whose caption is "red" where it has no shape."""

    @property
    def caption(self) -> str:
        return super().caption if self.shape else self.colour


def same(column: torch.Tensor) -> torch.Tensor:
    return column[:, None] == column


def test_in_the_heads_a_class_is_its_pattern_and_its_name(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pairs = write_csv(TOYS, tmp_path)
    seen = opened(with_steps(towers, pairs, "data.class_ratio=1"), tmp_path / "run", monkeypatch)
    reader = seen.batches._stream._dataset._read
    assert isinstance(reader, ClassPairReader)
    image, text = seen.model.image_head.standardize, seen.model.text_head.standardize
    assert image is not None and text is not None
    patterns = image(reader.rows.image).detach()
    vectors = seen.model.image.classifier()
    assert vectors is not None
    expected = (vectors[0].weight - vectors[0].weight.mean(0)) / image.scale.detach()
    cosine = torch.nn.functional.cosine_similarity(patterns, expected)
    torch.testing.assert_close(cosine, torch.ones(len(COLOURS)), rtol=1e-4, atol=1e-4)
    assert patterns.norm(dim=1).mean().item() == pytest.approx(patterns.shape[1] ** 0.5, rel=1e-4)
    weight = torch.tensor(np.diff(reader.rows.cumulative, prepend=0)).float()
    torch.testing.assert_close(weight @ text(reader.rows.text).detach(), torch.zeros(32), rtol=0, atol=1e-4)


@pytest.mark.parametrize("power", ["[1.0, 1.0]", "[0.5, 1.0]"])
def test_a_class_is_about_the_mean_that_the_image_head_subtracts(
    power: str, towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pairs, mapped = write_csv(TOYS, tmp_path), list[torch.Tensor]()
    for shrinkage in ([], ["head.mean_shrinkage=0.5"]):
        settings = "data.class_ratio=1", "head.standardize=layer", f"head.power={power}", *shrinkage
        seen = opened(with_steps(towers, pairs, *settings), tmp_path / f"run{len(shrinkage)}", monkeypatch)
        reader = seen.batches._stream._dataset._read
        assert isinstance(reader, ClassPairReader)
        with torch.no_grad():
            mapped.append(seen.model.image_head(reader.rows.image))
    torch.testing.assert_close(*mapped, rtol=1e-4, atol=1e-4)


def test_unreadable_images_leave_the_rest_aligned(towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pairs = write_csv(TOYS, tmp_path)
    for toy in TOYS[5:8]:
        (tmp_path / "images" / f"{toy.key}.png").write_bytes(b"no picture")
    seen = opened(with_steps(towers, pairs, "data.class_ratio=0.5"), tmp_path / "run", monkeypatch)
    plain = PairLoader(seen.reader, batch_size=16, seed=1)
    for with_classes, without in zip(seen.batches.epoch(0), plain.epoch(0), strict=True):
        count = len(without.ids)
        assert with_classes.ids[:count] == without.ids and with_classes.skipped == without.skipped
        assert torch.equal(same(with_classes.groups[:count, 1]), same(without.groups[:, 1]))
        assert len(with_classes.groups) == len(with_classes.ids) == len(values(with_classes)[0])


class StopAt(SilentReporter):
    """Presses Ctrl-C after a step."""

    def step(self, progress: TrainProgress) -> None:
        if progress.step == 4:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_run_repeats_itself_stops_and_goes_on(towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pairs = write_csv(TOYS, tmp_path)
    made = with_steps(towers, pairs, "data.class_ratio=0.5")
    for name in ("one", "two"):
        run(made, tmp_path / name)
    whole = (tmp_path / "one" / "delta.safetensors").read_bytes()
    assert (tmp_path / "two" / "delta.safetensors").read_bytes() == whole
    run(with_steps(towers, pairs), tmp_path / "without")
    assert not torch.equal(
        delta(tmp_path / "without")["image_head.map.weight"], delta(tmp_path / "one")["image_head.map.weight"]
    )
    stopped = main_job.train_recipe(made, tmp_path / "stopped", say=str, reporter=StopAt())
    assert stopped.fitted.interrupted
    monkeypatch.setattr(fit_run, "initialize_heads", None)  # a run that goes on starts nothing
    saved = Recipe.model_validate(main_job.RunFolder(tmp_path / "stopped").read().recipe)
    run(saved, tmp_path / "stopped", resume=True)
    assert (tmp_path / "stopped" / "delta.safetensors").read_bytes() == whole


WRONG = {
    "head.init=random": "is for head.init = 'cca' with class pairs; here head.init = 'random'",
    "data.class_weight=0": "is for head.init = 'cca' with class pairs; here data.class_weight = 0",
    'tune.image=["norms"]': "is for features that are cached: set tune.image",
    "data.feature_cache=off": "is for features that are cached: set tune.image",
    "image.tower=file:TOWERS/unnamed": "there are no class pairs, since file:",
}


@pytest.mark.parametrize("change", WRONG)
def test_where_there_are_none_one_line_says_why(change: str, towers: Path, tmp_path: Path):
    pairs = write_csv(TOYS, tmp_path)
    with pytest.raises(UserError) as refused:
        run(with_steps(towers, pairs, "data.class_ratio=0.5", change.replace("TOWERS", str(towers))), tmp_path / "run")
    assert f"data.class_ratio = 0.5 {WRONG[change]}".replace("0.5 there", "0.5: there") in str(refused.value)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()
