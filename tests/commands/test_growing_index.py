"""An index of a run that is made in parts, follows a folder, or is computed by another engine's workers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from clasp import BatchEmbedder
from clasp.commands.index_parts import index_part, merge_parts
from clasp.commands.run_store import open_run_store
from clasp.commands.search import index_images
from clasp.commands.store_exchange import StoreImport, export_index, import_index
from clasp.commands.watch import WatchSettings, watch_folder
from clasp.search.manifest import lock_store
from clasp.search.parts import PARTS_FOLDER, IndexPart
from clasp.types import UserError, no_progress_bar
from docblocks import DOCS, read_blocks
from toydata import toys, write_folder, write_images
from toyruns import recipe, run, save_towers


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    pairs = write_folder(toys(24), folder / "pairs")
    run(recipe(save_towers(folder), pairs, "train.epochs=1"), folder / "run")
    return folder / "run"


@pytest.fixture
def made(trained: Path, tmp_path: Path) -> Path:
    """A run without an index, and a folder of twelve pictures beside it."""
    shutil.copytree(trained, tmp_path / "run")
    write_images(toys(12), tmp_path / "pictures")
    return tmp_path / "run"


def stored(made: Path) -> list[str]:
    store = open_run_store(made)
    try:
        return sorted(name for name, _ in store.scan())
    finally:
        store.close()


def test_the_last_part_merges(made: Path):
    pictures, said = str(made.parent / "pictures" / "images"), []

    def part(number: int) -> object:
        return index_part(made, pictures, IndexPart(number, 3), store=None, bar=no_progress_bar, say=said.append)

    assert part(2) is None and said[-1] == "part 2/3 is done; not done yet: 1/3, 3/3"
    with pytest.raises(UserError, match=r"that are not done: 1/3, 3/3; type: clasp index .* --part 1/3"):
        merge_parts(made, pictures, 3, store=None, bar=no_progress_bar, say=said.append)
    assert part(2) is None and "nothing to encode" in said[-2]
    with pytest.raises(UserError, match=r"was made from .*images, not elsewhere"):
        index_part(made, "elsewhere", IndexPart(1, 3), store=None, bar=no_progress_bar, say=said.append)
    assert part(1) is None
    descriptor = lock_store(made / PARTS_FOLDER)
    assert part(3) is None and said[-1] == "part 3/3 is done; another process merges the parts"

    os.close(descriptor)
    done = merge_parts(made, pictures, 3, store=None, bar=no_progress_bar, say=said.append)
    assert (done.added, done.encoded) == (12, 0)
    assert len(stored(made)) == 12 and not list((made / PARTS_FOLDER).glob("part-*"))


def test_a_folder_is_followed(made: Path):
    pictures, said, waits = made.parent / "pictures" / "images", [], []
    names = sorted(path.name for path in pictures.iterdir())

    def change(seconds: float) -> None:
        """What happens to the folder while the command waits."""
        waits.append(seconds)
        match len(waits):
            case 1:
                assert stored(made) == names
                (pictures / names[0]).unlink()
            case 2:
                assert stored(made) == names[1:]
                (pictures / names[1]).rename(pictures / "renamed.png")
            case 3:
                assert "renamed.png" in stored(made)
            case 6:
                pictures.rename(made.parent / "unmounted")
            case 8:
                assert len(stored(made)) == 11
                (made.parent / "unmounted").rename(pictures)
            case 10:
                raise KeyboardInterrupt

    watch_folder(made, str(pictures), WatchSettings(1.0, 4.0, sleep=change), say=said.append)
    assert [int(wait) for wait in waits[:6]] == [1, 1, 1, 2, 4, 4]
    assert ["12 images added" in said[0], "1 removed" in said[1], "1 renamed" in said[2]] == [True] * 3
    assert said[3].startswith("waiting: ") and "images does not exist" in said[3]
    assert said[4].startswith("stopped") and len(said) == 5
    with pytest.raises(UserError, match="nowhere is not a folder"):
        watch_folder(made, "nowhere", WatchSettings(), say=said.append)


def test_batches_of_another_engine_are_embedded(made: Path):
    files = sorted((made.parent / "pictures" / "images").iterdir())[:4]
    embed = BatchEmbedder(made)
    columns = {
        "bytes": np.array([*(path.read_bytes() for path in files), b"no image"], dtype=object),
        "row": [*range(5)],
    }
    batch = embed(columns)
    assert batch["embedding"].dtype == np.float32 and batch["embedding"].shape == (5, 16)
    assert np.allclose(batch["embedding"][:4], embed.model.encode_image([str(path) for path in files]), atol=1e-6)
    assert np.isnan(batch["embedding"][4]).all() and list(map(bool, batch["error"])) == [False] * 4 + [True]
    assert batch["row"] == columns["row"]
    paths = BatchEmbedder(made, column="path")({"path": [str(path) for path in files]})
    assert np.allclose(paths["embedding"], batch["embedding"][:4], atol=1e-6)
    with pytest.raises(UserError, match="no column 'bytes'; there are path"):
        embed({"path": []})


@pytest.mark.parametrize(("engine", "needed"), [("ray", ("ray", "pandas")), ("daft", ("daft",))])
def test_an_engine_embeds_as_the_docs_show(made: Path, engine: str, needed: tuple[str, ...]):
    """The block of docs/stores.md; skipped where the engine, which is no extra of clasp, is not installed."""
    if not all(map(find_spec, needed)):
        pytest.skip(f"{engine} is not installed")
    pictures, out = made.parent / "pictures" / "images", made.parent / "out"
    files = {path.name: path for path in pictures.iterdir()}
    (pictures / "none.png").write_bytes(b"no image")
    blocks = read_blocks((DOCS / "stores.md").read_text(encoding="utf-8"))
    (text,) = [block.text for block in blocks if block.language == "python" and f"import {engine}" in block.text]
    for written, here in (("/data/pictures", pictures), ("runs/photos", made), ("/data/embeddings", out)):
        assert text.count(written) == 1
        text = text.replace(written, str(here))
    (made.parent / "embed.py").write_text(text)
    done = subprocess.run([sys.executable, "embed.py"], cwd=made.parent, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = {Path(row["path"]).name: row for row in pq.read_table(out).to_pylist()}
    assert rows.keys() == files.keys() | {"none.png"}
    assert {name for name, row in rows.items() if row["error"]} == {"none.png"}
    expected = BatchEmbedder(made, column="path")({"path": [*map(str, files.values())]})["embedding"]
    assert np.allclose([rows[name]["embedding"] for name in files], expected, atol=1e-6)


def test_clip_retrievals_layout_goes_out_and_comes_in(made: Path, trained: Path, tmp_path: Path):
    def take(run: Path, folder: Path) -> StoreImport:
        return import_index(run, folder, store=None, bar=no_progress_bar, say=lambda line: None)

    pictures, out = made.parent / "pictures" / "images", tmp_path / "out"
    index_images(made, str(pictures))
    assert export_index(made, out, bar=no_progress_bar) == 12
    vectors, table = np.load(out / "img_emb" / "img_emb_0.npy"), pq.read_table(out / "metadata" / "metadata_0.parquet")
    assert vectors.shape == (12, 16) and len(table) == 12 and Path(table["image_path"][0].as_py()).is_file()
    with pytest.raises(UserError, match="out is not empty"):
        export_index(made, out, bar=no_progress_bar)

    other = shutil.copytree(trained, tmp_path / "other")
    assert take(other, out) == StoreImport(12, 0)
    assert stored(other) == stored(made)
    assert index_images(other, str(pictures)).added == 0  # the entries are as if indexed here

    (out / "clasp.json").unlink()  # as of clip-retrieval itself: float16, no columns of ours
    np.save(out / "img_emb" / "img_emb_0.npy", vectors.astype(np.float16))
    foreign = table.select(["image_path", "caption"])
    pq.write_table(foreign, out / "metadata" / "metadata_0.parquet")
    (pictures / Path(foreign["image_path"][3].as_py()).name).unlink()
    third = shutil.copytree(trained, tmp_path / "third")
    assert take(third, out) == StoreImport(11, 1)
    np.save(out / "img_emb" / "img_emb_0.npy", vectors[::-1])
    with pytest.raises(UserError, match="was made with another model: an image that is encoded again"):
        take(third, out)
    np.save(out / "img_emb" / "img_emb_0.npy", vectors[:5])
    with pytest.raises(UserError, match="the two files do not belong together"):
        take(third, out)
    (out / "metadata" / "metadata_0.parquet").unlink()
    with pytest.raises(UserError, match=r"metadata_0\.parquet is missing"):
        take(third, out)
    with pytest.raises(UserError, match=r"has no img_emb/img_emb_\*\.npy"):
        take(third, pictures)
