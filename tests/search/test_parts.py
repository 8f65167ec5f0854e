"""An index made in parts: every image in one of them, and a merge that reads and encodes nothing again."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from clasp.data.pairs import FolderImages, Pairs, list_images, open_pairs
from clasp.search.engine import SearchEngine
from clasp.search.flat_store import FlatStore
from clasp.search.indexer import Indexer
from clasp.search.parts import (
    DonePart,
    IndexPart,
    PartVectors,
    all_parts,
    parse_part,
    select_part,
    unfinished_parts,
    write_done,
)
from clasp.types import UserError
from toydata import toys, write_csv, write_images
from toysearch import Colours, model


def encode_parts(run: Path, items: FolderImages | Pairs, count: int, fingerprint: str = "f" * 64) -> int:
    """Encode every part; returns how many images were encoded."""
    encoded = 0
    for part in all_parts(count):
        some = select_part(items, part)
        if not some:
            continue
        store = FlatStore(part.folder(run) / "store")
        encoded += Indexer(SearchEngine(model(fingerprint), store)).index(some).encoded
        store.close()
    return encoded


def test_every_image_is_of_one_part(tmp_path: Path):
    write_images(toys(40), tmp_path / "pictures")
    pairs = open_pairs(write_csv(toys(40), tmp_path / "pairs"))
    for items in (list_images(tmp_path / "pictures"), pairs):
        parts = [select_part(items, part) for part in all_parts(3)]
        chosen = [item if isinstance(item, tuple) else item.id for part in parts for item in part]
        assert sorted(map(str, chosen)) == sorted(str(item if isinstance(item, tuple) else item.id) for item in items)
        assert all(len(part) > 3 for part in parts)
    assert parse_part("2/8") == IndexPart(2, 8) and str(IndexPart(2, 8)) == "2/8"
    for wrong in ("0/8", "9/8", "2", "2/", "a/b", "-1/8", "1/0"):
        with pytest.raises(UserError, match="--part"):
            parse_part(wrong)


def test_a_merge_is_as_one_index_and_encodes_nothing(tmp_path: Path):
    write_images(toys(30), tmp_path / "pictures")
    items = list_images(tmp_path / "pictures")
    whole = SearchEngine(model(), FlatStore(tmp_path / "whole"))
    Indexer(whole).index(items)
    assert encode_parts(tmp_path, items, 4) >= whole.store.count()  # equal bytes in two parts are encoded twice
    changed = Path(items[0][1].name)
    os.utime(changed, ns=(1, changed.stat().st_mtime_ns + 10**9))  # read again, and found to be the same
    merged = SearchEngine(model(), FlatStore(tmp_path / "merged"))
    computed = PartVectors(tmp_path, 4, model().fingerprint)
    done = Indexer(merged).index(list_images(tmp_path / "pictures"), computed=computed)
    assert (done.added, done.encoded) == (30, 0)
    assert isinstance(merged.model.encoder, Colours) and merged.model.encoder.seen == 0
    ids = [name for name, _ in whole.store.scan()]
    assert sorted(name for name, _ in merged.store.scan()) == sorted(ids)
    assert np.allclose(merged.store.vectors(ids), whole.store.vectors(ids), atol=1e-6)
    assert Indexer(merged).index(list_images(tmp_path / "pictures")).added == 0


def test_parts_of_another_model_and_another_source_are_refused(tmp_path: Path):
    write_images(toys(24), tmp_path / "pictures")
    encode_parts(tmp_path, list_images(tmp_path / "pictures"), 2, "e" * 64)
    with pytest.raises(UserError, match="part 1/2 was encoded with another model"):
        PartVectors(tmp_path, 2, "f" * 64)
    assert unfinished_parts(tmp_path, 2, "pictures") == all_parts(2)
    write_done(tmp_path, IndexPart(2, 2), DonePart("pictures", 3, "e" * 64))
    assert unfinished_parts(tmp_path, 2, "pictures") == [IndexPart(1, 2)]
    with pytest.raises(UserError, match="part 2/2 was made from pictures, not drawings"):
        unfinished_parts(tmp_path, 2, "drawings")
