"""An ONNX export served in an environment that has no torch: the hits of torch, several processes, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np
import pytest

import clasp
from clasp.commands.background import open_background
from clasp.commands.export import export_run
from clasp.commands.run_store import open_run_store
from clasp.commands.search import index_images, search_images
from clasp.commands.search_model import find_search_model
from clasp.commands.serve import ServeSettings, serve_run
from clasp.config.build import build_model_and_preprocessing
from clasp.search.answer import RankingPart, answer_query
from clasp.search.engine import SearchEngine
from clasp.search.flat_store import FlatStore
from clasp.search.query import SearchQuery, WeightedImage, WeightedText
from clasp.serve.warm_server import read_record
from clasp.training.run_folder import RunFolder
from clasp.types import UserError, no_progress_bar
from toydata import toys, write_folder, write_images
from toyruns import recipe, save_towers
from toyserver import wait_until_it_answers

SOURCES = Path(clasp.__file__).parents[1]
# what docs/serve.md installs, and what these packages import
INSTALLED = """
PIL annotated_doc annotated_types anyio click fastapi h11 idna jaxtyping markdown_it mdurl numpy onnxruntime
opentelemetry pyarrow pydantic pydantic_core pygments python_multipart rich safetensors shellingham starlette
tokenizers typer typing_extensions.py typing_inspection uvicorn wadler_lindig numpy.libs pillow.libs
""".split()


class World(NamedTuple):
    """A run with untrained heads and an index of drawings, its export, and an environment without torch."""

    run: Path
    export: Path
    pictures: Path
    environment: Path

    def clasp(self, *arguments: str) -> list[str]:
        """The command in that environment; ``-S``: without the packages of this one."""
        return [sys.executable, "-S", "-m", "clasp", *arguments]

    @property
    def variables(self) -> dict[str, str]:
        paths = {"PYTHONPATH": os.pathsep.join(map(str, (SOURCES, self.environment)))}
        return {**os.environ, **paths, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    made = recipe(save_towers(folder), write_folder(toys(24), folder / "pairs"))
    parts = build_model_and_preprocessing(made)
    saved = RunFolder(folder / "run")
    saved.start(made.to_toml(), parts.model, parts.transform, parts.tokenizer, pairs=None)
    saved.save(parts.model)
    write_images(toys(20), folder / "pictures")
    index_images(saved.path, str(folder / "pictures"), model=clasp.load(saved.path, precision="float32"))
    export_run(saved.path, "onnx", folder / "onnx")
    packages = Path(sysconfig.get_path("purelib"))
    (folder / "environment").mkdir()
    for name in INSTALLED:
        for found in (*packages.glob(name), *packages.glob(f"{name}-*.dist-info")):
            (folder / "environment" / found.name).symlink_to(found)
    return World(saved.path, folder / "onnx", folder / "pictures", folder / "environment")


@contextmanager
def served(world: World, folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server in the environment without torch, and its process."""
    command = world.clasp("serve", str(folder), "--port", "0", *options)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=world.variables) as server:
        try:
            deadline = time.monotonic() + 60
            while (record := read_record(folder)) is None or record.pid != server.pid:
                assert time.monotonic() < deadline and server.poll() is None, server.communicate()[1]
                time.sleep(0.05)
            wait_until_it_answers(record.address)
            yield record.address, server
        finally:
            server.terminate()


def ask(address: str, words: str, image: bytes = b"") -> list[tuple[str, float]]:
    """Ids and scores of the first ten hits."""
    if not image:
        reply: Any = urllib.request.urlopen(f"{address}/api/search?{urlencode({'q': words, 'k': 10})}", timeout=30)
    else:
        body = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + image
        body += f'\r\n--x\r\nContent-Disposition: form-data; name="q"\r\n\r\n{words}\r\n--x--\r\n'.encode()
        head = {"Content-Type": "multipart/form-data; boundary=x"}
        reply = urllib.request.urlopen(urllib.request.Request(f"{address}/api/search", body, head), timeout=30)
    with reply:
        return [(hit["id"], hit["score"]) for hit in json.loads(reply.read())["hits"]][:10]


def of_torch(world: World, words: str, image: Path | None = None) -> list[tuple[str, float]]:
    """The same of the run in float32."""
    engine = SearchEngine(clasp.load(world.run, precision="float32"), open_run_store(world.run))
    query = SearchQuery((WeightedText(words),), (WeightedImage(image),) if image else ())
    encode = {"encode_texts": engine.encode_texts, "encode_images": engine.encode_images}
    answer = answer_query(engine, open_background(world.run, engine), query, RankingPart(10), **encode)
    return [(ranked.hit.id, ranked.hit.score) for ranked in answer.hits]


def is_running(number: int) -> bool:
    """Whether a process has not ended; one that nobody has waited for yet has."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_same(found: list[tuple[str, float]], wanted: list[tuple[str, float]]) -> None:
    assert len(found) == len(wanted) > 3
    assert [name for name, _ in found] == [name for name, _ in wanted]
    assert [score for _, score in found] == pytest.approx([score for _, score in wanted], abs=1e-4)


def test_that_environment_has_no_torch(world: World):
    code = "import importlib.util as u; print(*(bool(u.find_spec(name)) for name in ('torch', 'onnxruntime', 'clasp')))"
    done = subprocess.run([sys.executable, "-S", "-c", code], env=world.variables, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True"], done.stderr
    code = "import clasp, clasp.commands.store_copy; print(clasp.UserError.__name__)"
    done = subprocess.run([sys.executable, "-S", "-c", code], env=world.variables, capture_output=True, text=True)
    assert done.stdout == "UserError\n", done.stderr
    done = subprocess.run(world.clasp("serve", str(world.run)), env=world.variables, capture_output=True, text=True)
    assert done.returncode == 2 and "needs torch, which is not installed; an export does not" in done.stderr


def test_an_index_made_and_searched_without_torch(world: World):
    for arguments in (["index", str(world.export), str(world.pictures)], ["search", str(world.export), "a red ring"]):
        done = subprocess.run(world.clasp(*arguments), env=world.variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "20 images added, 20 of them encoded" in done.stderr or "picture of the hits" in done.stderr
    index = search_images(world.export, "a red ring", [], 10)
    assert_same([(hit.id, hit.score) for hit in index.hits], of_torch(world, "a red ring"))


def test_the_index_of_a_run_served_without_torch(world: World):
    picture = sorted(world.pictures.rglob("*.png"))[3]
    with served(world, world.run, "--model", str(world.export)) as (address, _):
        assert_same(ask(address, "a red ring"), of_torch(world, "a red ring"))
        assert_same(ask(address, "blue", picture.read_bytes()), of_torch(world, "blue", picture))


@pytest.mark.faults
@pytest.mark.parametrize("killed", ["one", "first"])
def test_several_processes(world: World, killed: str):
    with served(world, world.export, "--pictures", str(world.pictures), "--workers", "2") as (address, server):
        assert_same(ask(address, "a red ring"), of_torch(world, "a red ring"))
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        workers = [int(each) for each in children if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]
        assert len(workers) == 2
        os.kill(workers[0] if killed == "one" else server.pid, signal.SIGKILL)
        said = server.communicate(timeout=30)[1]
        if killed == "one":
            assert "one of 2 processes ended by itself" in said and server.returncode == 2
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert read_record(world.export) is None


def serve(folder: Path, **settings: Any) -> None:
    serve_run(folder, None, ServeSettings(port=0, **settings), say=lambda line: None, bar=no_progress_bar)


def test_what_is_refused_before_anything_is_loaded(world: World, tmp_path: Path):
    with pytest.raises(UserError, match="--engine tensorrt is not an engine of a model; there are torch, onnx"):
        serve(world.run, engine="tensorrt")
    with pytest.raises(UserError, match=r"run is not an ONNX export; type: clasp export RUN --to onnx -o OUT"):
        serve(world.run, engine="onnx")
    with pytest.raises(UserError, match="--engine torch is for run folders"):
        serve(world.export, engine="torch")
    with pytest.raises(UserError, match="has no index yet"):
        serve(tmp_path, model=world.export)
    store = FlatStore(tmp_path / "index")
    store.claim("f" * 64, "another")
    store.add(["a"], np.ones((1, 4), np.float32), [{}])
    store.close()
    with pytest.raises(UserError, match=r"was made with another model than .*onnx, or in bfloat16"):
        serve(tmp_path, model=world.export)
    with pytest.raises(UserError, match="no such folder"):
        serve(tmp_path / "none", model=world.export)
    with pytest.raises(UserError, match="--workers 2 and --uploads: one process changes the index"):
        serve(world.run, workers=2, uploads=tmp_path / "uploads")
    assert not (tmp_path / "uploads").exists()


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 1}', '{"format": 7}'])
def test_a_damaged_export(tmp_path: Path, damage: str):
    (tmp_path / "clasp_onnx.json").write_text(damage)
    with pytest.raises(UserError, match=r"clasp_onnx\.json is (damaged|of format 7)") as error:
        find_search_model(tmp_path)
    assert "\n" not in str(error.value)
