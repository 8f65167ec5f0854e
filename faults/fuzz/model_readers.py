"""Inputs of everything else that is read: recipes, run folders, checkpoints, stores, queries, HTTP requests.

Output: ``MODEL_READERS``. Note: a run folder is that of somebody else: a whole one with one file mutated, read as
``resume`` and ``report`` read it, and every twentieth as ``clasp.load`` does, towers included.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from fastapi.testclient import TestClient

from clasp.commands.run_store import open_run_store
from clasp.config.build import load
from clasp.config.recipe import read_recipe
from clasp.config.recipe_files import builtin_recipes
from clasp.convert.importers.lilt_checkpoint import read_lilt_checkpoint
from clasp.convert.importers.msclip_checkpoint import parse_msclip_state_dict
from clasp.convert.importers.safe_pickle import safe_load_pickle
from clasp.data.pairs import FileSource
from clasp.report.run_record import read_results, read_run_record
from clasp.search.background import read_background
from clasp.search.engine import SearchEngine
from clasp.search.flat_store import FlatStore
from clasp.search.indexer import Indexer
from clasp.search.metadata_filter import parse_filter
from clasp.search.query import parse_words
from clasp.serve.editor import IndexEditor
from clasp.serve.upload_folder import UploadFolder
from clasp.training.run_folder import RunFolder
from clasp.training.state import TrainPosition, TrainState
from clasp.types import Caption, Pair, UserError
from faults.fuzz.mutations import mutate
from faults.fuzz.worker import REFUSED, VALUE, Reader
from serve.test_openapi_fuzz import Operation, Requests
from toydata import toys, write_csv
from toyruns import recipe, run, save_towers
from toysearch import model
from toyserver import toy_app, toy_service

_GOLDEN = Path(__file__).parents[2] / "tests" / "golden"
_Read = Callable[[random.Random, Path], str]
_RECIPE_TOKENS = (
    b"[train]\n",
    b"extends = ",
    b"[tune]\n",
    b"lora(rank=",
    b"adapters(",
    b"= [",
    b'= "',
    b"auto",
    b"hf:",
)


def _recipes(folder: Path) -> _Read:
    seeds = [file.read_bytes() for file in builtin_recipes().values()]

    def read(chance: random.Random, scratch: Path) -> str:
        file = scratch / "mine.toml"
        file.write_bytes(mutate(chance.choice(seeds), chance, seeds, _RECIPE_TOKENS))
        read_recipe(file, [])
        return VALUE

    return read


def _run_folders(folder: Path) -> _Read:
    """A finished run, and one with a state, of which one file is mutated."""
    os.environ["CLASP_CACHE"] = str(folder / "cache")
    made = recipe(save_towers(folder / "towers"), write_csv(toys(32), folder / "pairs"), "train.epochs=1")
    whole = folder / "whole"
    run(made, whole)
    state = RunFolder(whole)
    encoder = load(whole)
    _save_a_state(state, encoder)
    FlatStore(whole / "index-flat").close()
    files = sorted(path for path in whole.rglob("*") if path.is_file() and path.suffix != ".png")
    seeds = [file.read_bytes() for file in files]

    def read(chance: random.Random, scratch: Path) -> str:
        copied, number = scratch / "run", chance.randrange(len(files))
        shutil.copytree(whole, copied)
        (copied / files[number].relative_to(whole)).write_bytes(mutate(seeds[number], chance, seeds, _RECIPE_TOKENS))
        folder = RunFolder(copied)
        read_all: tuple[Callable[[], Any], ...] = (
            folder.read,
            folder.read_delta,
            folder.read_state,
            lambda: read_results(copied),
            lambda: read_run_record(copied, "x"),
            *((lambda: load(copied),) if chance.random() < 0.05 else ()),
        )
        return _most(read_all)

    return read


def _most(reads: tuple[Callable[[], Any], ...]) -> str:
    """All of the reads, each of which may refuse."""
    outcome = VALUE
    for each in reads:
        try:
            each()
        except UserError as error:
            assert "\n" not in str(error), f"more than one line: {error}"
            outcome = REFUSED
    return outcome


def _save_a_state(folder: RunFolder, model: Any) -> None:
    weights = folder.read_delta()
    folder.save_state(TrainState(TrainPosition(1, 0, 1), "float32", weights, {}, None, (), 4))


def _checkpoints(folder: Path) -> _Read:
    seeds = []
    for name in ("lilt_lwa_ln.checkpoint.pth", "msclip_plain.state_dict.pth"):
        small = _shrunk(torch.load(_GOLDEN / name, map_location="cpu"))
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(small, file, _use_new_zipfile_serialization=zipped)
            seeds.append(file.getvalue())

    def read(chance: random.Random, scratch: Path) -> str:
        seed = chance.choice(seeds)
        data = (
            _mutated_pickle(seed, chance)
            if seed[:2] == b"PK" and chance.random() < 0.6
            else mutate(seed, chance, seeds)
        )
        file = scratch / "model.pth"
        file.write_bytes(data)
        if chance.random() < 0.5:
            read_lilt_checkpoint(file, {"image": None, "text": None})
        else:
            found = safe_load_pickle(file)
            if isinstance(found, dict) and all(isinstance(value, torch.Tensor) for value in found.values()):
                parse_msclip_state_dict(found)
        return VALUE

    return read


def _shrunk(value: Any) -> Any:
    """The same names with tensors of a few numbers."""
    if isinstance(value, torch.Tensor):
        return torch.zeros([min(size, 2) for size in value.shape])
    if isinstance(value, Mapping):
        return {key: _shrunk(item) for key, item in list(value.items())[:60]}
    return value


def _mutated_pickle(seed: bytes, chance: random.Random) -> bytes:
    """The zip with another ``data.pkl`` and whole checksums."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(seed)) as old, zipfile.ZipFile(made, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, mutate(data, chance, [data]) if entry.filename.endswith("data.pkl") else data)
    return made.getvalue()


def _stores(folder: Path) -> _Read:
    whole, encoder = folder / "run", model()
    (whole / "index").mkdir(parents=True)
    store = FlatStore(whole / "index")
    pictures = folder / "pictures"
    pictures.mkdir()
    pairs = []
    for toy in toys(12):
        path = pictures / f"{toy.key}.png"
        path.write_bytes(toy.png)
        pairs.append(Pair(toy.key, FileSource(str(path)), (Caption(toy.caption, "en"),), toy.key, {"year": 2001}))
    Indexer(SearchEngine(encoder, store)).index(pairs)
    store.close()
    (whole / "store.json").write_text(json.dumps({"store": "flat"}))
    files = sorted(path for path in whole.rglob("*") if path.is_file() and path.name != "lock")
    seeds, query = [file.read_bytes() for file in files], encoder.encode_text(["red"])

    def read(chance: random.Random, scratch: Path) -> str:
        copied, number = scratch / "run", chance.randrange(len(files))
        shutil.copytree(whole, copied)
        (copied / files[number].relative_to(whole)).write_bytes(mutate(seeds[number], chance, seeds))
        if chance.random() < 0.5:  # as an earlier clasp wrote it, else nearly all are refused for their checksum
            manifest = copied / "index" / "manifest.json"
            manifest.write_bytes(re.sub(rb'"\w+_checksum": \d+', b'"format": 1', manifest.read_bytes()))
        opened = open_run_store(copied)
        try:
            list(opened.scan())
            opened.search(query, 3, parse_filter("year>2000"))
            Indexer(SearchEngine(encoder, opened)).index(pairs[:2])
        finally:
            opened.close()
        read_background(copied / "background.safetensors", "")
        return VALUE

    return read


def _queries(folder: Path) -> _Read:
    seeds = [
        b"red -blue",
        b"a photo of a cat",
        b'"a red" circle -"a blue"',
        b'dog^-1.5 -"x^y"^2 b^.5',
        b"folder=holidays",
        b"year>=2003",
        b"date~2020",
    ]
    meta = {"name": "x", "meta": {"year": 2003}, "captions": [["a", "en"]], "group": "g", "file": {"bytes": 9}}

    def read(chance: random.Random, scratch: Path) -> str:
        text = mutate(chance.choice(seeds), chance, seeds)[:2000].decode("utf-8", "surrogateescape")
        if chance.random() < 0.5:
            parse_words(text)
        else:
            parse_filter(text)(meta)
        return VALUE

    return read


def _requests(folder: Path) -> _Read:
    """Requests by the description of the API, half of them with a mutated body."""
    service = toy_service(folder)
    client = TestClient(
        toy_app(service, editor=IndexEditor(service, UploadFolder(folder / "uploads"))), "http://127.0.0.1"
    )
    document = client.get("/openapi.json").json()
    operations = [
        Operation(method.upper(), path, described)
        for path, methods in document["paths"].items()
        for method, described in methods.items()
    ]
    ids = sorted(str(path.relative_to(folder / "pictures")) for path in (folder / "pictures").rglob("*.png"))
    requests = Requests(document, ids[:20])

    def read(chance: random.Random, scratch: Path) -> str:
        requests.chance, operation = chance, chance.choice(operations)
        request = requests.make(client, operation)
        if chance.random() < 0.5 and request.content:
            content = mutate(request.content, chance, [request.content])
            headers = {"content-type": request.headers.get("content-type", "")}
            request = client.build_request(request.method, request.url, content=content, headers=headers)
        reply = client.send(request)
        told = f"{operation}: {reply.status_code} {reply.text[:100]}"
        assert reply.status_code < 500 or reply.status_code == 503, told
        assert str(reply.status_code) in operation.described["responses"], told
        if reply.status_code >= 400:
            assert set(reply.json()) == {"error"} and "\n" not in reply.json()["error"], told
            return REFUSED
        return VALUE

    return read


MODEL_READERS: tuple[Reader, ...] = (
    Reader("recipe", 8_000, _recipes),
    Reader("run folder", 4_000, _run_folders),
    Reader("checkpoint", 4_000, _checkpoints),
    Reader("store", 4_000, _stores),
    Reader("query and filter", 3_000, _queries),
    Reader("HTTP request", 2_000, _requests),
)
