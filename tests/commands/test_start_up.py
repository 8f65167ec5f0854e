"""What the command imports: help without torch, a search with packaged towers without the libraries it does not use.

Facts of imports, not seconds: each is a fresh process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clasp.commands.search import index_images
from clasp.config.build import build_model_and_preprocessing
from clasp.config.recipe import read_recipe
from clasp.data.cache_folder import cache_folder
from clasp.models.inference import EmbeddingModel
from clasp.training.run_folder import RunFolder

_REPORT = """
import sys
from clasp.cli import main
sys.argv = ["clasp", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
top = {name.partition(".")[0] for name in sys.modules}
print(*top, *{"torch._dynamo", "PIL.EpsImagePlugin"} & set(sys.modules), file=sys.stderr)
"""


def _imported_by(*arguments: str) -> set[str]:
    """Top-level modules that a fresh process of the command has imported; and torch's compiler, and a rare decoder."""
    done = subprocess.run(
        [sys.executable, "-c", _REPORT, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CLASP_CACHE": str(cache_folder())},
    )
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["eval", "--help"]], ids=" ".join)
def test_help_imports_no_torch(arguments: list[str]):
    imported = _imported_by(*arguments)
    assert "clasp" in imported and not imported & {"torch", "numpy", "PIL", "transformers"}


_COLLECTOR = """
import gc, sys
from clasp.__main__ import start_command
sys.argv = ["clasp", *sys.argv[1:]]
try:
    start_command()
finally:
    print(gc.isenabled())
"""


@pytest.mark.parametrize(("verb", "collects"), [("search", False), ("index", True), ("serve", True)])
def test_a_search_alone_runs_without_the_collector_of_cycles(verb: str, collects: bool):
    command = [sys.executable, "-c", _COLLECTOR, verb, "no-such-run", "words"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(collects)] and done.returncode == 2, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of packaged towers with untrained heads, and an index of one image."""
    folder = tmp_path_factory.mktemp("run")
    recipe = read_recipe("heads", ["data.train=none.csv"])
    parts = build_model_and_preprocessing(recipe)
    saved = RunFolder(folder / "packaged")
    saved.start(recipe.to_toml(), parts.model, parts.transform, parts.tokenizer, pairs=None)
    saved.save(parts.model)
    (folder / "images").mkdir()
    Image.new("RGB", (32, 32), "teal").save(folder / "images" / "teal.png")
    model = EmbeddingModel(parts.model.eval(), parts.transform, parts.tokenizer)  # as loading it again would give
    index_images(saved.path, str(folder / "images"), model=model)
    return saved.path


def test_search_with_packaged_towers_imports_what_it_uses(run: Path):
    imported = _imported_by("search", str(run), "teal", "--json")
    assert {"torch", "PIL", "tokenizers", "safetensors"} <= imported
    unused = {"transformers", "peft", "accelerate", "sklearn", "scipy", "matplotlib", "pandas", "onnx", "tomlkit"}
    assert not imported & {*unused, "sympy", "torch._dynamo", "yaml", "huggingface_hub", "PIL.EpsImagePlugin"}
