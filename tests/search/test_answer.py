"""Calibrated scores: queries about what is in the collection and what is not, and answers in parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from clasp.search.answer import RankingPart, SearchAnswer, answer_query, check_part
from clasp.search.background import (
    Background,
    BackgroundCaption,
    BackgroundFacts,
    measure_background,
    nothing_close_line,
    read_background,
)
from clasp.search.engine import SearchEngine
from clasp.search.explanation import explain_hit
from clasp.search.flat_store import FlatStore
from clasp.search.metadata_filter import parse_filter
from clasp.search.query import SearchQuery, WeightedImage, WeightedText
from clasp.types import UserError
from toysearch import model

WIDTH, IMAGES = 24, 300


def random_units(chance: np.random.Generator, *shape: int) -> np.ndarray:
    rows = chance.standard_normal(shape, np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def world(folder: Path) -> tuple[SearchEngine, Background]:
    """300 random images, the first ten of which repeat the eleventh; 200 captions of nothing."""
    store = FlatStore(folder / "index")
    engine = SearchEngine(model(), store)
    chance = np.random.default_rng(0)
    images = random_units(chance, IMAGES, WIDTH)
    images[:10] = images[10]
    meta = [
        {"name": f"/p/{'a' if n % 2 else 'b'}/{n}.png", "sha256": str(n), "captions": [], "languages": [], "meta": {}}
        for n in range(IMAGES)
    ]
    store.add([str(n) for n in range(IMAGES)], images, meta)
    captions = random_units(chance, 200, WIDTH)
    names = [BackgroundCaption(f"caption {n}", f"caption {n}") for n in range(200)]
    return engine, measure_background(names, captions, store, engine.stored_vectors, engine.model.fingerprint, 0.999)


def ask(engine: SearchEngine, background: Background, vector: np.ndarray, part: RankingPart) -> SearchAnswer:
    query = SearchQuery((WeightedText("a red"),))
    row = (vector / np.linalg.norm(vector))[None]
    return answer_query(engine, background, query, part, encode_texts=lambda texts: row, encode_images=lambda i: row)


def test_what_is_there_is_close_and_what_is_not_is_not(tmp_path: Path):
    (engine, background), chance = world(tmp_path), np.random.default_rng(1)
    there, absent = 0, 0
    for place in range(50, 100):
        image = engine.stored_vectors([str(place)])[0]
        answer = ask(engine, background, image + 0.3 * random_units(chance, WIDTH), RankingPart(5))
        there += bool(answer.close_count)
        assert answer.hits[0].close or answer.close_count != 1
        absent += bool(ask(engine, background, random_units(chance, WIDTH), RankingPart(5)).close_count)
    assert there >= 45 and absent <= 15
    far = ask(engine, background, random_units(chance, WIDTH), RankingPart(5))
    assert far.p_value is not None and 0 < far.p_value <= 1
    assert len(far.hits) == 5, "hits are shown all the same"
    none = dataclasses.replace(far, close_count=0)
    assert none.line_note.startswith("nothing is close: the best hit scores like a random caption does (p = 0.")
    some = dataclasses.replace(far, close_count=2)
    assert some.line_note.startswith("below hit 2 nothing is close")
    assert dataclasses.replace(far, close_count=5).line_note == ""


def test_the_p_value_is_a_number_to_read():
    shown = {p: nothing_close_line(p).rsplit("p = ")[1] for p in (1.0, 0.996, 0.95, 0.5, 0.1, 0.0123)}
    assert list(shown.values()) == ["1)", "1)", "0.95)", "0.5)", "0.1)", "0.01)"]


def test_parts_of_a_ranking_are_the_whole(tmp_path: Path):
    engine, background = world(tmp_path)
    query = random_units(np.random.default_rng(1), WIDTH)
    whole = ask(engine, background, query, RankingPart(100))
    parts = [ask(engine, background, query, RankingPart(7, start)) for start in range(0, 91, 7)]
    assert [hit.hit.id for part in parts for hit in part.hits] == [hit.hit.id for hit in whole.hits[:91]]
    everything = ask(engine, background, query, RankingPart(500))
    assert not everything.more and whole.more
    assert len(everything.hits) == IMAGES - 10
    assert {len(hit.group.duplicates) for hit in everything.hits} == {0, 10}
    some = ask(engine, background, query, RankingPart(500, filters=[parse_filter("folder=a")]))
    assert {hit.hit.meta["name"][:5] for hit in some.hits} == {"/p/a/"}
    nowhere = ask(engine, background, query, RankingPart(5, filters=[parse_filter("folder=c")]))
    assert nowhere.hits == [] and nowhere.line_note == "no picture passes these filters"
    assert (
        ask(engine, background, query, RankingPart(5, offset=500, filters=[parse_filter("folder=a")])).line_note == ""
    )


def test_only_close_hits_are_those_above_the_line(tmp_path: Path):
    engine, background = world(tmp_path)
    there = engine.stored_vectors(["60"])[0]
    whole = ask(engine, background, there, RankingPart(100))
    count = whole.close_count or 0
    close = ask(engine, background, there, RankingPart(100, only_close=True))
    assert 0 < count < 100 and close.hits == whole.hits[:count] and not close.more
    first = ask(engine, background, there, RankingPart(1, only_close=True))
    assert first.hits == whole.hits[:1] and first.more == (count > 1)
    absent = next(
        vector
        for vector in random_units(np.random.default_rng(1), 50, WIDTH)
        if ask(engine, background, vector, RankingPart(5)).close_count == 0
    )
    none = ask(engine, background, absent, RankingPart(5, only_close=True))
    assert none.hits == [] and none.line_note.startswith("nothing is close") and none.to_dict()["hits"] == []
    with pytest.raises(UserError, match="the search 'like 20' has no words to find"):
        check_part(RankingPart(5, only_close=True), SearchQuery(like=("20",)))


def test_images_have_no_calibrated_score(tmp_path: Path):
    engine, background = world(tmp_path)
    row = engine.stored_vectors(["20"])
    for query in (SearchQuery(like=("20",)), SearchQuery((), (WeightedImage(b"x"),))):
        answer = answer_query(
            engine, background, query, RankingPart(3), encode_texts=lambda t: row, encode_images=lambda i: row
        )
        assert answer.p_value is None and answer.close_count is None and answer.line_note == ""
        assert answer.hits[0].hit.id == "20" and answer.hits[0].z is None


def test_why_an_image_is_a_hit(tmp_path: Path):
    engine, background = world(tmp_path)
    image = engine.stored_vectors(["20"])
    rows = np.concatenate([image + 0.1, random_units(np.random.default_rng(1), 1, WIDTH)])
    query = SearchQuery((WeightedText("x"), WeightedText("y", -0.35)), like=("20", "21"), unlike=("22",))
    why = explain_hit(
        image, background, query, 3, encode_texts=lambda texts: rows, stored_vectors=engine.stored_vectors
    )
    cosines = background.vectors @ image[0]
    best = np.argsort(-cosines)[:3].tolist()
    assert [each.caption.text for each in why.captions] == [f"caption {place}" for place in best]
    assert [each.score for each in why.captions] == pytest.approx(cosines[best].tolist())
    expected = ((cosines[best] - cosines.mean()) / cosines.std(ddof=1)).tolist()
    assert [each.z for each in why.captions] == pytest.approx(expected, abs=1e-4)
    assert [(part.kind, part.value, part.weight) for part in why.parts] == [
        ("text", "x", 1.0), ("text", "y", -0.35), ("like", "20", 0.375), ("like", "21", 0.375), ("unlike", "22", -0.15)
    ]  # fmt: skip
    assert why.parts[0].score == pytest.approx(float(rows[0] @ image[0])) and why.parts[2].score == pytest.approx(1)
    assert why.parts[0].z == pytest.approx(float((rows[0] @ image[0] - cosines.mean()) / cosines.std(ddof=1)), abs=1e-4)
    assert why.parts[2].z is None
    bare = explain_hit(
        image, background, None, 5, encode_texts=lambda texts: rows, stored_vectors=engine.stored_vectors
    )
    assert len(bare.captions) == 5 and bare.parts == []


def test_a_background_is_saved_and_damage_is_no_error(tmp_path: Path):
    facts = BackgroundFacts("m", 3, 1.0, 0.5, 0.9)
    made, path = (
        Background(np.eye(4, 3, dtype=np.float32), facts, tuple(map(BackgroundCaption, "abcd", "wxyz"))),
        tmp_path / "background.safetensors",
    )
    assert read_background(path, "m") is None
    made.save(path)
    read = read_background(path, "m")
    assert read is not None and read.facts == facts and np.array_equal(read.vectors, made.vectors)
    assert read.captions == made.captions
    assert read_background(path, "other") is None
    for damage in (b"", b"\xff" * 50, path.read_bytes()[:-3]):
        path.write_bytes(damage)
        assert read_background(path, "m") is None
    assert made.threshold == pytest.approx(1.0 + 0.5 * 1.6449, abs=1e-3)
    assert made.p_value(1.0) == pytest.approx(0.5)
