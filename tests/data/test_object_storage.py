"""Shards on an S3 server on this machine (moto): read as files are, also by workers; what is missing is named at once.

Needs ``pip install s3fs "moto[server]"``, which no extra of clasp installs (140 MB); skipped without them.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clasp.data import shard_stage
from clasp.data.loader import BatchReader, PairLoader
from clasp.data.pairs import Pairs, open_pairs
from clasp.data.readers import LiveImageReader, LiveTextReader
from clasp.data.shard_download import describe_object
from clasp.data.shard_stage import ShardStage
from clasp.types import UserError
from toydata import toys, write_shards, write_tar
from toypairs import TRANSFORM, word_tokenizer

moto = pytest.importorskip("moto.server", reason='pip install "moto[server]"')
s3fs = pytest.importorskip("s3fs", reason="pip install s3fs")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
TOYS = toys(24, seed=4)
PART_BYTES = 5 << 20  # the least part of an upload in parts


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The file system of a server that has the shards of 24 pairs in a bucket, six in each."""
    (tmp_path / "served").mkdir()
    write_shards(TOYS, tmp_path / "served", shards=4)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    surroundings = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**surroundings, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(shard_stage, "WAITS_SECONDS", (0.01, 0.01))
    system = s3fs.S3FileSystem(skip_instance_cache=True)
    system.mkdir("bucket")
    for file in sorted((tmp_path / "served").glob("*.tar")):
        system.put(str(file), f"bucket/{file.name}")
    yield system
    system.rm("bucket", recursive=True)  # the server of the next test has the same buckets
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def opened(system: Any, cache: Path, most: int = 10**9) -> Pairs:
    source = "::".join(f"s3://{path}" for path in sorted(system.ls("bucket", refresh=True)))
    return open_pairs(source, cache=cache / "pairs", stage=ShardStage(cache / "shards", most))


def test_pairs_are_those_of_the_files_also_in_workers(bucket: Any, tmp_path: Path):
    files = sorted((tmp_path / "served").glob("*.tar"))
    here, there = open_pairs("::".join(map(str, files))), opened(bucket, tmp_path)
    assert [(p.id, p.captions, p.image.read()) for p in there] == [(p.id, p.captions, p.image.read()) for p in here]
    few = opened(bucket, tmp_path / "few", most=2 * max(file.stat().st_size for file in files))
    reader = BatchReader(few, LiveImageReader(TRANSFORM), LiveTextReader(word_tokenizer()))
    orders = []
    for workers in (0, 2):
        loader = PairLoader(reader, batch_size=3, seed=1, workers=workers)
        orders.append([batch.ids for batch in loader.epoch(0) if not batch.skipped])
        loader.close()
    assert orders[0] == orders[1] and len(orders[0]) == 8


def test_an_object_uploaded_in_parts_has_no_md5_and_a_replaced_one_is_indexed_anew(bucket: Any, tmp_path: Path):
    large = tmp_path / "large.tar"
    with tarfile.open(large, "w") as tar:
        for name, data in (("a.png", TOYS[0].png), ("a.txt", b"a red circle"), ("a.bin", os.urandom(2 * PART_BYTES))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    bucket.put(str(large), "bucket/large.tar", chunksize=PART_BYTES)
    assert describe_object("s3://bucket/large.tar").tag.endswith("-3")
    before = opened(bucket, tmp_path)
    assert before[0].image.read() == TOYS[0].png and len(before) == 25
    write_tar(toys(30, seed=9)[24:], large)
    bucket.put(str(large), "bucket/large.tar")
    after = opened(bucket, tmp_path)
    assert len(after) == 30 and [pair.id for pair in after][6:] == [pair.id for pair in before][1:]
    for file in (tmp_path / "shards").glob("*.shard"):
        file.unlink()
    with pytest.raises(UserError, match=r"^s3://bucket/large\.tar cannot be read: it was replaced after its pairs"):
        before[0].image.read()


@pytest.mark.parametrize("source", ["S3://bucket/none.tar", "s3://nowhere/shard-000.tar"])
def test_what_is_missing_is_named_at_once(source: str, bucket: Any, tmp_path: Path):
    with pytest.raises(UserError, match=f"^{source} cannot be read: not found: ") as told:
        open_pairs(source, stage=ShardStage(tmp_path / "shards", 10**9))
    assert "\n" not in str(told.value) and "attempts" not in str(told.value)
