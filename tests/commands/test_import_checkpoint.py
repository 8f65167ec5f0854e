"""Importing as a person meets it: the verb, what it refuses, and files that would like to run something."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import serialization

from clasp import cli
from clasp.commands.import_checkpoint import import_checkpoint
from clasp.config.build import load
from clasp.convert.importers import run_writer
from clasp.convert.importers.run_writer import ImportOptions, load_matching_tokenizer
from clasp.convert.importers.safe_pickle import safe_load_pickle
from clasp.data.tokenizer import Tokenizer
from clasp.models.tower_settings import ImageTowerSettings, TextTowerSettings
from clasp.models.zoo.registry import load_backbone
from clasp.training.run_folder import RunFolder
from clasp.types import UserError
from toydata import toys, write_csv
from toysavedtowers import save, save_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
LWA = GOLDEN / "lilt_lwa_ln.checkpoint.pth"
TOYS = toys(24)


@pytest.fixture
def words(tmp_path: Path) -> str:
    save_tokenizer(tmp_path / "words", template="<s> $A </s>")
    return f"file:{tmp_path / 'words'}"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Types a command, in this process; gives its exit code and its two streams."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*given: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["clasp", *map(str, given)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        return code, *capfd.readouterr()

    return call


def refused(words: str, call: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert words in line and "\n" not in line, line
    return line


def changed(file: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of a checkpoint, its dictionary changed in place or replaced by what ``change`` gives."""
    found = torch.load(file, weights_only=True)
    torch.save(change(found) or found, to)
    return to


# --- from a file to a search -----------------------------------------------------------------------------------------


def test_an_imported_run_is_a_run_wherever_it_lies(typed: Any, words: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("CLASP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    file = GOLDEN / "lilt_lwa_ln.checkpoint_omegaconf.pth"
    code, out, err = typed("import", "lilt", file, "-o", "a/run", f"tokenizer={words}")
    assert code == 0, err
    for said in ("LilT, epoch 14", "image tower: layers 3, width 128, heads 2, 64 px", "1,000 tokens"):
        assert said in err
    assert "recipe, by its config: lilt/lwa\n" in err
    assert "103,105" in out and "1,386,177" in out
    assert "clasp index a/run FOLDER" in err
    assert not any(path.name.startswith(".") for path in tmp_path.rglob("*")), "nothing is left beside the run"
    texts, before = ["w5 w6", "w7"], load("a/run")
    os.rename("a/run", "b")
    after = load(tmp_path / "b")
    assert after.fingerprint == before.fingerprint
    assert torch.equal(after.encode_text(texts), before.encode_text(texts))
    kept = json.loads((tmp_path / "b" / "base.json").read_text())
    assert kept["image"]["tower"] == "file:{run}/towers/image" and kept["pairs"] is None
    facts = json.loads((tmp_path / "b" / "imported.json").read_text())
    assert facts["config"]["conventional_adapter"] == {"insert": True, "reduction_factor": 4} and facts["epoch"] == 14
    assert "103,105 of 1,386,177" in (tmp_path / "b" / "README.md").read_text()

    pairs = write_csv(TOYS, tmp_path / "pairs")
    code, out, err = typed("eval", "b", "retrieval", f"data={pairs}", "--json")
    assert code == 0 and "recall@1" in json.loads(out)["results"][0]["metrics"], err
    code, _, err = typed("index", "b", pairs.parent)
    assert code == 0 and f"{len(TOYS)} images added" in err
    os.rename("b", "c")
    code, out, err = typed("search", "c", "w5 w6", "-k", "3", "--json")
    assert code == 0 and len(json.loads(out)["hits"]) == 3, err
    assert typed("resume", "c")[0] == 2


def test_the_towers_of_a_run_serve_other_recipes(words: str, tmp_path: Path) -> None:
    run = import_checkpoint("lilt", LWA, tmp_path / "run", ImportOptions(tokenizer=words)).run
    image = load_backbone(ImageTowerSettings(tower=f"file:{run / 'towers' / 'image'}"))
    text = load_backbone(TextTowerSettings(tower=f"file:{run / 'towers' / 'text'}", token_types=False))
    assert image.transform is not None and image.transform.mean[0] == pytest.approx(0.48145466)
    assert not any("adapter" in name for base in (image, text) for name, _ in base.net.named_parameters())
    shapes = load_backbone(ImageTowerSettings(tower=f"file:{run / 'towers' / 'image'}", size=32), meta=True).net
    assert all(p.is_meta for p in shapes.parameters())
    tower = f"file:{run / 'towers' / 'image'}"
    refused("patches; take 64", lambda: load_backbone(ImageTowerSettings(tower=tower, size=60)))
    refused("is a tower for images", lambda: load_backbone(TextTowerSettings(tower=tower)))
    refused("{run} is the run's own folder", lambda: load_backbone(ImageTowerSettings(tower="file:{run}/towers/image")))
    weights = run / "towers" / "image" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("cannot be read", lambda: load_backbone(ImageTowerSettings(tower=tower)))
    (run / "towers" / "image" / "config.json").write_text('{"model_type": "clasp_image", "net": {"patch": 0}}')
    refused("config.json is damaged", lambda: load_backbone(ImageTowerSettings(tower=tower)))


def test_other_weights_below_an_imported_delta_are_refused(words: str, tmp_path: Path) -> None:
    one = import_checkpoint("lilt", LWA, tmp_path / "one", ImportOptions(tokenizer=words)).run

    def other(found: dict[str, Any]) -> None:
        found["model"]["visual_encoder.blocks.0.attn.qkv.weight"] += 1e-3

    changed(LWA, tmp_path / "other.pth", other)
    two = import_checkpoint("lilt", tmp_path / "other.pth", tmp_path / "two", ImportOptions(tokenizer=words)).run
    os.replace(two / "towers" / "image" / "model.safetensors", one / "towers" / "image" / "model.safetensors")
    refused("1 of 42 tensors differ (blocks.0.attn.qkv.weight", lambda: load(one))


# --- what a file may look like ---------------------------------------------------------------------------------------


def test_bare_weights_half_precision_and_a_prefix(words: str, tmp_path: Path) -> None:
    whole = import_checkpoint("lilt", LWA, tmp_path / "whole", ImportOptions(tokenizer=words))
    bare = changed(LWA, tmp_path / "bare.pth", lambda found: {f"module.{k}": v for k, v in found["model"].items()})
    alone = import_checkpoint("lilt", bare, tmp_path / "bare", ImportOptions(tokenizer=words))
    assert any("no flags" in line for line in alone.report.lines) and "by its keys" in " ".join(alone.report.lines)
    one, other = load(whole.run), load(alone.run)
    assert torch.equal(one.encode_text(["w5 w6"]), other.encode_text(["w5 w6"]))
    assert one.encoder.fingerprint == other.encoder.fingerprint
    half = changed(LWA, tmp_path / "half.pth", lambda found: {k: v.half() for k, v in found["model"].items()})
    near = load(import_checkpoint("lilt", half, tmp_path / "half", ImportOptions(tokenizer=words)).run)
    assert near.encode_text(["w5 w6"]).dtype == torch.float32
    torch.testing.assert_close(near.encode_text(["w5 w6"]), one.encode_text(["w5 w6"]), atol=1e-2, rtol=0)


def test_every_key_is_accounted_for(words: str, tmp_path: Path) -> None:
    def spoil(found: dict[str, Any]) -> None:
        model = found["model"]
        model["visual_encoder.head.weight"] = torch.zeros(10, 128)
        model["text_encoder.pooler.dense.bias"] = torch.zeros(128)
        del model["vision_proj.bias"], model["text_encoder.encoder.layer.1.output.adapter.up_sampler.bias"]
        model["visual_encoder.norm.weight"] = torch.ones(64)

    file = changed(LWA, tmp_path / "odd.pth", spoil)
    line = refused("odd.pth", lambda: import_checkpoint("lilt", file, tmp_path / "run", ImportOptions(tokenizer=words)))
    assert "unexpected keys visual_encoder.head.weight, text_encoder.pooler.dense.bias" in line
    assert "missing keys vision_proj.bias, text_encoder.encoder.layer.1.output.adapter.up_sampler.bias" in line
    assert "visual_encoder.norm.weight is (64,) and not (128,)" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda found: [1, 2], "it holds a list"),
        (lambda found: {"state": found["model"], "epoch": 3}, "it has no model, but state, epoch"),
        (lambda found: {"model": {"layer.weight": torch.zeros(2)}}, "no key begins with visual_encoder."),
        (lambda found: {"model": {}}, "it has none"),
        (lambda found: {"model": [1]}, "its model is a list"),
        (
            lambda found: _put(found, "text_proj.bias", torch.ones(64, dtype=torch.int32)),
            "not a tensor of real numbers",
        ),
        (lambda found: {"model": {"visual_encoder.x": 3}}, "is not a tensor"),
        (lambda found: _less(found, "visual_encoder.patch_embed.proj.weight"), "sizes are read from visual_encoder"),
        (lambda found: _less(found, "text_encoder.encoder.layer.0.intermediate.dense.weight"), "which is missing"),
        (lambda found: _put(found, "visual_encoder.pos_embed", torch.zeros(1, 19, 128)), "has 19 rows"),
        (lambda found: _put(found, "vision_proj.weight", torch.zeros(32, 128)), "text_proj.weight is (64, 128)"),
        (lambda found: _drop(found, "visual_encoder.blocks"), "visual_encoder.blocks.0 is missing"),
        (lambda found: _put(found, "visual_encoder.blocks.999999999.norm1.bias", torch.zeros(128)), "unexpected keys"),
        (lambda found: _put(found, _DOWN, torch.zeros(100, 128)), "has 100 rows, which does not divide"),
        (lambda found: _put(found, "text_proj.bias", torch.full((64,), torch.nan)), "that are not finite"),
        (lambda found: _put(found, "temp", torch.zeros(1).expand(10**6)), "has more numbers than the file"),
        (lambda found: found.update(epoch=torch.Size([3])), "it holds a Size where a setting should be"),
    ],
)
def test_what_is_no_lilt_checkpoint(change: Any, says: str, words: str, tmp_path: Path) -> None:
    file = changed(LWA, tmp_path / "odd.pth", change)
    refused(says, lambda: import_checkpoint("lilt", file, tmp_path / "run", ImportOptions(tokenizer=words)))


_DOWN = "visual_encoder.blocks.0.adapter1.down_sampler.weight"


def _put(found: dict[str, Any], key: str, tensor: torch.Tensor) -> None:
    found["model"][key] = tensor


def test_an_optimizer_of_another_make_is_passed_over(words: str, tmp_path: Path) -> None:
    for odd in ([{}], [3], "adamw"):
        file = changed(LWA, tmp_path / "odd.pth", lambda found, odd=odd: found.update(optimizer={"param_groups": odd}))
        assert import_checkpoint("lilt", file, tmp_path / f"run {odd}", ImportOptions(tokenizer=words)).report.counts


def _less(found: dict[str, Any], key: str) -> None:
    del found["model"][key]


def _drop(found: dict[str, Any], start: str) -> None:
    for key in [key for key in found["model"] if key.startswith(start)]:
        del found["model"][key]


def test_heads_that_shapes_do_not_tell(words: str, tmp_path: Path) -> None:
    """A text tower 96 wide: one of 3 heads, say; 64 does not divide it."""

    def narrow(found: dict[str, Any]) -> None:
        for key, tensor in found["model"].items():
            if key.startswith("text_encoder.") and "adapter" not in key and tensor.ndim < 3:
                # every axis of the width, and no other: 128 becomes 96, four times that 384
                for axis, length in enumerate(tensor.shape):
                    tensor = tensor.narrow(axis, 0, {128: 96, 512: 384}.get(length, length))
                found["model"][key] = tensor.clone()
        found["model"]["text_proj.weight"] = found["model"]["text_proj.weight"][:, :96].clone()
        _drop_adapters(found)

    def _drop_adapters(found: dict[str, Any]) -> None:
        for key in [key for key in found["model"] if key.startswith("text_encoder.") and ".adapter." in key]:
            del found["model"][key]

    file = changed(LWA, tmp_path / "narrow.pth", narrow)
    refused(
        "set text_heads=N",
        lambda: import_checkpoint("lilt", file, tmp_path / "x", ImportOptions(tokenizer=words)),
    )
    wrong = ImportOptions(tokenizer=words, text_heads=5)
    refused("text_heads=5: does not divide 96", lambda: import_checkpoint("lilt", file, tmp_path / "x", wrong))
    right = ImportOptions(tokenizer=words, text_heads=3)
    model = load(import_checkpoint("lilt", file, tmp_path / "run", right).run)
    assert model.encode_text(["w5"]).shape == (1, 64)
    config = json.loads((tmp_path / "run" / "towers" / "text" / "config.json").read_text())
    assert (config["hidden_size"], config["num_attention_heads"], config["max_position_embeddings"]) == (96, 3, 384)


# --- the verb's mistakes ---------------------------------------------------------------------------------------------


def test_mistakes_of_the_verb(typed: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    for given, says in {
        ("lit", LWA, "-o", tmp_path / "run"): "did you mean lilt? kinds: lilt",
        ("lilt", tmp_path / "gone.pth", "-o", tmp_path / "run"): "there is no file",
        ("lilt", LWA, "-o", tmp_path / "full"): "is there already; choose another folder with -o",
        ("lilt", LWA, "-o", tmp_path / "run"): "no default one has 1,000 tokens",
        ("lilt", LWA, "-o", tmp_path / "run", f"tokenizer={words}", "size=100"): "patches of 16 px; take 96",
        ("lilt", LWA, "-o", tmp_path / "run", "tokenizer=pip:minilm-l6"): "ids up to 30,521",
        ("lilt", LWA, "-o", tmp_path / "run", "tokenizer=minilm-l6"): "has no scheme",
        ("lilt", LWA, "-o", tmp_path / "run", f"tokenizer=file:{tmp_path}"): "no tokenizer.json",
        ("lilt", LWA, "-o", tmp_path / "full" / "precious.txt" / "run", f"tokenizer={words}"): "cannot be written",
    }.items():
        code, out, err = typed("import", *given)
        assert code == 2 and not out and err.count("\n") == 1 and says in err, (given, err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "words"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["precious.txt"]


def test_a_full_disk_leaves_nothing(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "save", full)
    refused("no space left", lambda: import_checkpoint("lilt", LWA, tmp_path / "run", ImportOptions(tokenizer=words)))
    assert [path.name for path in tmp_path.iterdir()] == ["words"]


def test_tokenizers_by_vocabulary(words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named, tokenizer = load_matching_tokenizer(30_522, None)
    assert named == "pip:minilm-l6" and tokenizer(["A dog"]).ids.tolist() == [[101, 1037, 3899, 102]]
    refused("hf:google-bert/bert-base-multilingual-cased", lambda: load_matching_tokenizer(119_547, None))
    monkeypatch.setattr(run_writer, "BERT_UNCASED_PIP", "multilingual-e5-small")
    monkeypatch.setattr(run_writer.importlib.metadata, "distributions", lambda: iter(()))
    refused("hf:google-bert/bert-base-uncased", lambda: load_matching_tokenizer(30_522, None))
    save("bert", tmp_path / "bert")
    _, theirs = load_matching_tokenizer(64, f"file:{tmp_path / 'bert'}")
    _, plain = load_matching_tokenizer(64, words)
    assert theirs(["w5 w6"]).ids.tolist() == plain(["w5 w6"]).ids.tolist() == [[1, 5, 6, 63]]


def test_the_text_folder_keeps_the_tokenizer_to_the_id(tmp_path: Path) -> None:
    """BERT's own, with lower case, accents and word pieces, through the folder and back."""

    def larger(found: dict[str, Any]) -> None:
        table = found["model"]["text_encoder.embeddings.word_embeddings.weight"]
        found["model"]["text_encoder.embeddings.word_embeddings.weight"] = torch.zeros(30_522, table.shape[1])

    file = changed(LWA, tmp_path / "words.pth", larger)
    model = load(import_checkpoint("lilt", file, tmp_path / "run", ImportOptions()).run)
    _, whole = load_matching_tokenizer(30_522, None)
    captions = ["A naïve Doppelgänger", "unbelievably 猫", ""]
    here = Tokenizer.from_folder(tmp_path / "run" / "towers" / "text", template="tower", clean="none")
    assert here(captions).ids.tolist() == whole(captions).ids.tolist()
    assert model.tokenizer(["A dog!"]).ids.tolist() == [[101, 1037, 3899]], "no [SEP], as the paper has it"


# --- files that would like to run something --------------------------------------------------------------------------


class Runs:
    """Pickles as a call of ``function``; loaded unsafely, the call is made."""

    def __init__(self, function: Any, *args: Any):
        self.call = (function, args)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """A module with a class and a function that each leave a mark, and an omegaconf that does when imported."""
    mark = f"open({str(tmp_path / 'mark')!r}, 'w').close()"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "trapdoor.py").write_text(
        f"class Trap:\n    def __setstate__(self, state):\n        {mark}\n\ndef spring(*args):\n    {mark}\n"
    )
    (tmp_path / "code" / "omegaconf").mkdir()
    (tmp_path / "code" / "omegaconf" / "__init__.py").write_text(f"{mark}\n")
    monkeypatch.syspath_prepend(tmp_path / "code")
    import trapdoor

    yield trapdoor
    sys.modules.pop("trapdoor")


HOSTILE: dict[str, Callable[[types.ModuleType, Path], Any]] = {
    "os.system": lambda trap, mark: Runs(os.system, f"touch {mark}"),
    "eval": lambda trap, mark: Runs(eval, f"open({str(mark)!r}, 'w').close()"),
    "exec": lambda trap, mark: Runs(exec, f"open({str(mark)!r}, 'w').close()"),
    "subprocess": lambda trap, mark: Runs(subprocess.check_call, ["touch", str(mark)]),
    "mkdir": lambda trap, mark: Runs(os.mkdir, str(mark)),
    "getattr": lambda trap, mark: Runs(Path.touch, mark),
    "a function": lambda trap, mark: Runs(trap.spring),
    "setstate": lambda trap, mark: _with_state(trap.Trap()),
    "pickle": lambda trap, mark: Runs(pickle.loads, pickle.dumps(Runs(os.system, f"touch {mark}"))),
    "torch": lambda trap, mark: Runs(torch.save, 1, str(mark)),
}


def _with_state(trap: Any) -> Any:
    trap.armed = True
    return trap


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("place", ["config", "model", "optimizer", "the whole"])
def test_nothing_in_a_file_is_run(kind: str, place: str, trap: types.ModuleType, words: str, tmp_path: Path) -> None:
    file, mark = tmp_path / "hostile.pth", tmp_path / "mark"
    hostile = HOSTILE[kind](trap, mark)
    found = torch.load(LWA, weights_only=True)
    torch.save(hostile if place == "the whole" else {**found, place: hostile}, file)
    mark.unlink(missing_ok=True)
    line = refused(
        "hostile.pth", lambda: import_checkpoint("lilt", file, tmp_path / "run", ImportOptions(tokenizer=words))
    )
    assert "nothing in it was run" in line and not mark.exists()
    assert not (tmp_path / "run").exists()
    torch.load(file, weights_only=False)
    assert mark.exists(), "the trap is one: it springs for who loads the file unsafely"


def test_what_is_allowed_elsewhere_in_the_process_is_not_allowed_here(trap: types.ModuleType, tmp_path: Path) -> None:
    torch.save({"model": {}, "config": Runs(trap.spring)}, tmp_path / "hostile.pth")
    before = set(serialization.get_safe_globals())
    with serialization.safe_globals([trap.spring]):
        refused("refers to trapdoor.spring", lambda: safe_load_pickle(tmp_path / "hostile.pth"))
        assert trap.spring in serialization.get_safe_globals() and not (tmp_path / "mark").exists()
    assert set(serialization.get_safe_globals()) == before


def test_omegaconf_is_not_imported_even_where_it_is_installed(trap: types.ModuleType, tmp_path: Path) -> None:
    assert safe_load_pickle(GOLDEN / "lilt_lwa_ln.checkpoint_omegaconf.pth")["config"]["image_res"] == 64
    assert "omegaconf" not in sys.modules and not (tmp_path / "mark").exists()


@pytest.fixture
def omega(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes objects that pickle as omegaconf's would: its names, and the state it writes."""
    for name in ("omegaconf", "omegaconf.dictconfig", "omegaconf.listconfig", "omegaconf.nodes", "omegaconf.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))

    def make(where: str, **state: Any) -> Any:
        module, _, name = f"omegaconf.{where}".rpartition(".")
        kind = vars(sys.modules[module]).setdefault(name, type(name, (), {"__module__": module}))
        made = kind()
        vars(made).update(state)
        return made

    return make


def test_stand_ins_become_plain_values(omega: Callable[..., Any], tmp_path: Path) -> None:
    node = lambda value: omega("nodes.AnyNode", _val=value, _parent=None)  # noqa: E731
    listed = omega("listconfig.ListConfig", _content=[node(1), omega("dictconfig.DictConfig", _content={})])
    kinds = omega("base.ContainerMetadata", ref_type=Any, key_type=int, object_type=dict)
    config = omega(
        "dictconfig.DictConfig",
        _metadata=kinds,
        _content={
            "word": omega("nodes.StringNode", _val="x"),
            "interpolated": node("${word}"),
            "listed": listed,
            "missing": omega("dictconfig.DictConfig", _content=None),
            "either": omega("base.UnionNode", _content=omega("nodes.FloatNode", _val=0.5)),
        },
    )
    torch.save({"config": config}, tmp_path / "file.pth")
    assert safe_load_pickle(tmp_path / "file.pth")["config"] == {
        "word": "x",
        "interpolated": "${word}",
        "listed": [1, {}],
        "missing": None,
        "either": 0.5,
    }
    torch.save({"config": kinds}, tmp_path / "file.pth")
    refused("a class where a setting should be", lambda: safe_load_pickle(tmp_path / "file.pth"))
    torch.save({"config": {(1, 2): 3}}, tmp_path / "file.pth")
    refused("a key in it is not a string or number", lambda: safe_load_pickle(tmp_path / "file.pth"))
    round_and_round = omega("dictconfig.DictConfig", _content={})
    round_and_round._content["again"] = round_and_round
    torch.save({"config": round_and_round}, tmp_path / "file.pth")
    refused("without end", lambda: safe_load_pickle(tmp_path / "file.pth"))
    doubled: Any = [1]
    for _ in range(60):
        doubled = [doubled, doubled]
    torch.save({"config": doubled}, tmp_path / "file.pth")
    refused("without end", lambda: safe_load_pickle(tmp_path / "file.pth"))


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    file, whole = tmp_path / "file.pth", LWA.read_bytes()
    for content in (b"", b"model: yes\n", whole[: len(whole) // 2], whole[100:], b"\x80\x02.", bytes(1000)):
        file.write_bytes(content)
        refused("is not a checkpoint as torch.save writes it, or it is damaged", lambda: safe_load_pickle(file))
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.txt", "no pickle")
    refused("or it is damaged", lambda: safe_load_pickle(file))
    refused("there is no file", lambda: safe_load_pickle(tmp_path))
    torch.save({"model": {"temp": torch.tensor(1.0)}}, file, _use_new_zipfile_serialization=False)
    assert safe_load_pickle(file) == {"model": {"temp": torch.tensor(1.0)}}, "the format before torch 1.6"
