"""Embeddings in a folder: rows are found by name, made unit length, and a damaged folder is one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from clasp.data.pairs import Pairs
from clasp.evaluation.embedding_folder import EmbeddingFolder, StoredEncoder
from clasp.evaluation.embedding_table import embed_batches
from clasp.types import Caption, Encoder, Pair, UserError


class NoImage:
    name, version = "none", "0"

    def read(self) -> bytes:
        raise AssertionError("embeddings need no image")


def pairs(*ids: str) -> Pairs:
    return Pairs("zoo", [[Pair(id, NoImage(), (Caption(f"text of {id}"),), id) for id in ids]])


def write(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    np.save(folder / "image.npy", np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], dtype=np.float64))
    np.save(folder / "text.npy", np.array([[0.0, 5.0], [2.0, 0.0]], dtype=np.float16))
    (folder / "image.json").write_text(json.dumps(["a", "b", "c"]))
    (folder / "text.json").write_text(json.dumps(["one", "two"]))
    return folder


def test_rows_are_found_by_name_and_made_unit_length(tmp_path: Path):
    inputs = EmbeddingFolder(write(tmp_path))
    encoder: Encoder = StoredEncoder(inputs, "mine")
    images = embed_batches(inputs.images(pairs("c", "a"))(), encoder.embed_image, "image")
    assert images.ids == ("c", "a")
    torch.testing.assert_close(images.vectors, torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    texts = embed_batches(inputs.texts({"t1": "two", "t2": "one"})(), encoder.embed_text, "caption")
    assert texts.ids == ("t1", "t2")
    torch.testing.assert_close(texts.vectors, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert [list(ids) for ids, _ in inputs.read(["one"])] == [["one"]]
    with pytest.raises(UserError, match="mine holds embeddings, and has no tower to run images through"):
        encoder.encode_image(torch.zeros(1, 3, 2, 2))


def test_the_fingerprint_is_of_all_that_matters(tmp_path: Path):
    first = EmbeddingFolder(write(tmp_path / "first")).fingerprint
    assert EmbeddingFolder(write(tmp_path / "second")).fingerprint == first
    (tmp_path / "second" / "text.json").write_text(json.dumps(["two", "one"]))
    assert EmbeddingFolder(tmp_path / "second").fingerprint != first
    np.save(write(tmp_path / "second") / "image.npy", np.ones((3, 2), dtype=np.float32))
    assert EmbeddingFolder(tmp_path / "second").fingerprint != first


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no list": (
        lambda at: (at / "image.json").unlink(),
        "has no image.json; image.npy needs a list of its ids of pairs",
    ),
    "no array": (lambda at: (at / "text.npy").unlink(), "has no text.npy"),
    "no numbers": (lambda at: (at / "text.npy").write_text("hello"), "text.npy or text.json cannot be read"),
    "one axis": (lambda at: np.save(at / "text.npy", np.ones(3)), r"must be an array \[rows E\] .*; it is \(3,\)"),
    "integers": (lambda at: np.save(at / "text.npy", np.ones((2, 2), int)), "float16, float32 or float64"),
    "other width": (lambda at: np.save(at / "text.npy", np.ones((2, 3))), "image.npy is 2 wide and text.npy 3"),
    "other count": (lambda at: (at / "text.json").write_text('["x"]'), "lists 1 texts for the 2 rows of text.npy"),
    "one twice": (lambda at: (at / "text.json").write_text('["x", "x"]'), "more than once: 'x'"),
    "no strings": (lambda at: (at / "text.json").write_text("[1, 2]"), "must be a JSON list of strings, the texts"),
    "empty": (lambda at: (at / "image.npy").write_bytes(b""), "image.npy or image.json cannot be read"),
    "half an archive": (
        lambda at: (at / "image.npy").write_bytes(b"PK\x03\x04"),
        "image.npy or image.json cannot be read",
    ),
    "no json": (lambda at: (at / "text.json").write_text("["), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_one_line(damage: str, tmp_path: Path):
    write(tmp_path)
    DAMAGE[damage][0](tmp_path)
    with pytest.raises(UserError, match=DAMAGE[damage][1]) as caught:
        EmbeddingFolder(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_embedding_that_is_not_finite_is_named(tmp_path: Path):
    write(tmp_path)
    np.save(tmp_path / "image.npy", np.array([[1, 0], [np.nan, 1], [0, np.inf]], dtype=np.float32))
    inputs = EmbeddingFolder(tmp_path)
    with pytest.raises(UserError, match="the embedding of image 'b' is not finite, and those of 1 more"):
        embed_batches(inputs.images(pairs("a", "b", "c"))(), StoredEncoder(inputs, "mine").embed_image, "image")


def test_what_has_no_row_is_named_before_anything_is_read(tmp_path: Path):
    inputs = EmbeddingFolder(write(tmp_path))
    with pytest.raises(UserError, match=r"1 of 2 images of zoo have no row in image.npy; image.json does not list 'd'"):
        inputs.images(pairs("a", "d"))
    with pytest.raises(UserError, match=r"1 of 1 captions have no row in text.npy; text.json does not list 'three'"):
        inputs.texts({"t": "three"})
    with pytest.raises(UserError, match="prompts have no row"):
        inputs.read(["three"])
