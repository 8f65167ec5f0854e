"""Sources of pairs that a recipe names: packaged samples, and no source at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from clasp.config.datasets import open_all_pairs, open_training_pairs
from clasp.config.recipe import read_recipe
from clasp.types import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path))


def test_photos_stands_on_the_packaged_sample():
    train, val = open_training_pairs(read_recipe("photos"))
    assert (len(train), len(val)) == (1114, 139)
    assert {caption.language for number in range(20) for caption in train[number].captions} == {"en", "sw", "km"}
    assert not {pair.group for pair in train} & {pair.group for pair in val}


def test_at_most_so_many_pairs_are_trained_on():
    every, val = open_training_pairs(read_recipe("photos"))
    some, same = open_training_pairs(read_recipe("photos", ["data.max_pairs=100"]))
    more = open_training_pairs(read_recipe("photos", ["data.max_pairs=200"]))[0]
    assert len(some) == 100 and set(some.rows) < set(more.rows) < set(every.rows) and list(same.rows) == list(val.rows)
    assert list(some.rows) == sorted(some.rows) and max(some.rows) > 900, "in their order, from all of the source"
    assert len(open_training_pairs(read_recipe("photos", ["data.max_pairs=5000"]))[0]) == len(every)
    assert len(open_all_pairs(read_recipe("photos", ["data.max_pairs=100"]))[0]) == len(every), "they name the classes"


WRONG = {
    "sample:emojis": ["sample:emoji, sample:emoji-quick"],
    "sample:": ["sample:emoji"],
    "sample:emoji/tset": ["/train, /val, /test"],
    "sample:emoji/test/more": ["/train, /val, /test"],
}


@pytest.mark.parametrize("source", WRONG)
def test_a_wrong_sample_is_one_line_with_those_there_are(source: str):
    with pytest.raises(UserError) as refused:
        open_training_pairs(read_recipe("photos", [f"data.train={source}"]))
    assert all(part in str(refused.value) for part in [source, *WRONG[source]]) and "\n" not in str(refused.value)


def test_no_source_names_the_recipe_that_needs_none():
    with pytest.raises(UserError, match=r"set data\.train to .* the recipe photos, which needs none"):
        open_training_pairs(read_recipe("start"))


TOO_FEW = {
    "two, of which one is held out": (2, [], "of the 2 pairs of {}, 1 is held out to validate on (data.val_fraction"),
    "one": (1, [], "its only pair is one group, so none can be split off for validation; name pairs to validate on"),
    "one, and others to validate on": (1, ["data.val={}"], "data.train = {} has no other; give more pairs"),
}


@pytest.mark.parametrize(("count", "typed", "said"), TOO_FEW.values(), ids=TOO_FEW)
def test_fewer_than_two_pairs_to_train_on_are_refused_with_where_the_others_are(
    count: int, typed: list[str], said: str, tmp_path: Path
):
    table = tmp_path / "pairs.csv"
    table.write_text("filepath,title\n" + "".join(f"{n}.jpg,a {n}\n" for n in range(count)))
    overrides = [f"data.train={table}", *(each.format(table) for each in typed)]
    with pytest.raises(UserError) as error:
        open_training_pairs(read_recipe("heads", overrides))
    assert said.format(table) in str(error.value) and "\n" not in str(error.value)
