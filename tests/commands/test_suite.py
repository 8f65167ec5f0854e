"""Suites and kept predictions, on embeddings whose right answers are visible: an image has the vector of its class."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from clasp import cli
from clasp.commands.evaluate import evaluate_run
from clasp.commands.evaluate_suite import evaluate_suite
from clasp.commands.evaluated_model import find_model
from clasp.commands.report import write_report
from clasp.commands.result_folder import ResultFolder
from clasp.data.atomic_files import has_its_checksum, read_json_lines
from clasp.evaluation.bootstrap import GroupedScores, bootstrap_replicates
from clasp.evaluation.compositional import HardNegativeQueries, WinogroundQueries
from clasp.evaluation.multilabel import eleven_point_precision, two_class_influence
from clasp.evaluation.probe_queries import ProbeQueries
from clasp.evaluation.prompt_templates import TEMPLATE_SETS
from clasp.evaluation.retrieval import RetrievalQueries
from clasp.evaluation.suites import MTEB_TASKS, SUITES, TASK_METRICS, find_suite
from clasp.evaluation.task_context import TrainedRun
from clasp.evaluation.zeroshot import ZeroShotQueries, read_templates
from clasp.report.prediction_sheets import Confusion, most_confused
from clasp.report.suite_table import suite_table
from clasp.training.run_code import require_allowed
from clasp.types import UserError
from toydata import COLOURS, toys, write_csv
from toyreports import retrieval_rows, write_run
from toyruns import lines, recipe

TOYS = toys(20)
CLASSES = sorted(COLOURS)
TWO = ("hateful-memes", ("black", "other"))


def label_of(colour: str, classes: tuple[str, ...] | list[str]) -> int:
    return classes.index(colour) if colour in classes else len(classes) - 1


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three of the sets of a suite, as ELEVATER has them."""
    folder = tmp_path / "sets"
    for name, classes, more in (
        ("cifar-10", CLASSES, ""),
        (TWO[0], TWO[1], ""),
        ("voc-2007-classification", CLASSES, ",0"),
    ):
        (folder / name).mkdir(parents=True)
        (folder / name / "labels.txt").write_text("\n".join(classes))
        rows = []
        for toy in TOYS:
            (folder / name / f"{toy.key}.png").write_bytes(toy.png)
            label = label_of(toy.colour, list(classes))
            rows.append(f"{toy.key}.png {label}{more if label else ''}")
        (folder / name / "test.txt").write_text("\n".join(rows))
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The first class is taken for the second; everything else is right."""
    folder = tmp_path / "embeddings"
    folder.mkdir()
    vectors = np.eye(len(CLASSES), dtype="float32")
    of_image = [vectors[CLASSES.index(toy.colour) or 1] for toy in TOYS]
    texts = [f"a photo of a {name}." for name in [*CLASSES, "other"]]
    captions = sorted({toy.caption for toy in TOYS})
    of_text = [*vectors, -vectors[CLASSES.index("black")], *(vectors[CLASSES.index(c.split()[1])] for c in captions)]
    np.save(folder / "image.npy", np.stack(of_image * 2))
    (folder / "image.json").write_text(
        json.dumps([f"{toy.key}.png" for toy in TOYS] + [f"images/{toy.key}.png" for toy in TOYS])
    )
    np.save(folder / "text.npy", np.stack(of_text))
    (folder / "text.json").write_text(json.dumps([*texts, *captions]))
    return folder


def test_a_suite_is_one_table_with_missing_sets_named_first(data: Path, model: Path, tmp_path: Path):
    said: list[str] = []
    rows = evaluate_suite(model, "elevater-20", data, out=tmp_path / "out", say=said.append)
    (missing,) = [line for line in said if line.startswith("missing: ")]
    assert len(rows) == 20 and said[0] == missing and missing.count(str(data)) == 17, "one address has all"
    assert f"{data / 'mnist'}, " in missing and missing.partition(", to be had at ")[2].startswith(
        "https://github.com/"
    )
    values = {row.set.name: row.value for row in rows if row.value is not None}
    first = sum(toy.colour == CLASSES[0] for toy in TOYS)
    assert values["cifar-10"] == pytest.approx(1 - first / len(TOYS)) and len(values) == 3
    written = lines(tmp_path / "out" / "results.jsonl")
    assert all("checksum" in row and has_its_checksum(row) for row in written)
    assert len(written) == 3 and {Path(row["data"]).name for row in written} == set(values)
    kept = sorted((tmp_path / "out" / "predictions").iterdir())
    assert len(kept) == 2  # average precision has no scores of single queries
    queries = lines(kept[0])
    assert len(queries) == len(TOYS) and {row["task"] for row in queries} == {"zeroshot"}
    (row,) = (row for row in written if row["evaluation_id"] == queries[-1]["evaluation_id"])
    assert row["data"] == str(data / "cifar-10") and set(row["options"]) == {"classes", "templates", "label"}
    assert {row["predicted"] for row in queries if row["expected"] == CLASSES[0]} == {CLASSES[1]}
    table = suite_table([(row.set, row.result) for row in rows])
    assert len(table.rows) == 4 and table.rows[-1][0] == "mean of 3" and "17 of 20 sets are missing (" in table.notes[1]
    assert table.notes[0] == "warning: few queries in 3 of 3 sets (20): 95 % intervals may be ±22 points wide"


def test_the_card_of_a_run_has_the_table_of_its_last_suite(model: Path, tmp_path: Path):
    run = write_run(tmp_path / "run", [])
    (run / "README.md").write_text("# run\n\n## Evaluations\n\nnone\n")
    (each,) = (each for each in find_suite("elevater-20") if each.name == "cifar-10")
    source = replace(find_model(model), trained=TrainedRun(run, recipe(tmp_path, "pairs.csv")))
    for value in (0.25, 0.75):
        result = replace(retrieval_rows()[0], metrics={each.metric: value}, chance={}, interval={})
        ResultFolder(source, None).record_table("Suite elevater-20", suite_table([(each, result)]), say=str)
    card = (run / "README.md").read_text()
    assert "## Evaluations\n\nnone" in card and card.count("## Suite elevater-20") == 1
    assert "| mean of 1 |  | 75.0 |" in card and "25.0" not in card


def test_probes_fit_on_the_split_for_it(model: Path, tmp_path: Path):
    """Class folders below ``train`` and ``test``; an image has the vector of its class."""
    sets = tmp_path / "sets"
    for place, toy in enumerate(sorted(TOYS, key=lambda toy: toy.colour)):
        folder = sets / "cifar-10" / ("train" if place % 2 else "test") / toy.colour
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{toy.key}.png").write_bytes(toy.png)
    found = sorted((sets / "cifar-10").rglob("*.png"))
    colours = {toy.key: toy.colour for toy in TOYS}
    np.save(model / "image.npy", np.eye(len(CLASSES), dtype="float32")[[CLASSES.index(colours[f.stem]) for f in found]])
    (model / "image.json").write_text(json.dumps([f"{f.parent.name}/{f.name}" for f in found]))
    said: list[str] = []
    rows = evaluate_suite(model, "msclip-24", sets, out=tmp_path / "out", say=said.append)
    ((name, value),) = ((row.set.name, row.value) for row in rows if row.value is not None)
    assert name == "cifar-10" and value > 2 / len(CLASSES), "a few images of each class, a strong penalty"
    assert any("imagenet-1k, to be had at https://www.image-net.org" in line for line in said)
    with pytest.raises(UserError, match="templates=clip-80: no set of msclip-24 has a task with templates"):
        evaluate_suite(model, "msclip-24", sets, templates="clip-80", out=tmp_path / "out")
    shutil.rmtree(sets / "cifar-10" / "train")
    with pytest.raises(UserError, match=r"cifar-10: .*train"):
        evaluate_suite(model, "msclip-24", sets, out=tmp_path / "out")


def test_probes_read_the_lists_of_elevater(data: Path, model: Path, tmp_path: Path):
    voc = data / "voc-2007-classification"
    for folder in (data / "cifar-10", voc):
        rows = sorted((folder / "test.txt").read_text().splitlines(), key=lambda row: row.split()[1])
        (folder / "test.txt").write_text("\n".join(rows[::2]))
        (folder / "train.txt").write_text("\n".join(rows[1::2]))
    (data / "stl10" / "train").mkdir(parents=True)
    whole = (voc / "train.txt").read_text()
    (voc / "train.txt").write_text(f"{TOYS[0].key}.png 1")
    with pytest.raises(UserError) as error:
        evaluate_suite(model, "msclip-24", data, out=tmp_path / "out")
    for message in (
        f"{TWO[0]}: {data / TWO[0] / 'train'} does not exist",
        f"stl10: {data / 'stl10' / 'test'} does not exist",
        f"{voc.name}: {TOYS[0].key}.png of {voc / 'train.txt'} has no list of class names in 'classes'",
    ):
        assert message in str(error.value)
    assert not (tmp_path / "out").exists()
    (voc / "train.txt").write_text(whole)
    for name in (TWO[0], "stl10"):
        shutil.rmtree(data / name)
    rows = evaluate_suite(model, "msclip-24", data, out=tmp_path / "out")
    values = {row.set.name: row.value for row in rows if row.value is not None}
    assert set(values) == {"cifar-10", voc.name} and all(value > 2 / len(CLASSES) for value in values.values())


def test_what_a_suite_refuses(data: Path, model: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no suite 'elevater'; did you mean elevater-20\?"):
        evaluate_suite(model, "elevater", data, out=tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"has none of the 20 sets of elevater-20: caltech-101, cifar-10"):
        evaluate_suite(model, "elevater-20", tmp_path / "empty", out=tmp_path / "out")
    for name in ("cifar-10", TWO[0]):
        (data / name / "test.txt").write_text("a.png 99")
    with pytest.raises(UserError, match=r"cifar-10: .*hateful-memes: ") as error:
        evaluate_suite(model, "elevater-20", data, out=tmp_path / "out")
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


QUERIES: dict[str, tuple[type, tuple[str, ...]]] = {
    "zeroshot": (ZeroShotQueries, ("roc_auc",)),
    "probe": (ProbeQueries, ()),
    "retrieval": (RetrievalQueries, ()),
    "multilingual": (RetrievalQueries, ()),
    "sugarcrepe": (HardNegativeQueries, ()),
    "winoground": (WinogroundQueries, ()),
}


def test_the_metrics_that_a_suite_may_name_are_those_of_the_tasks(data: Path, model: Path, tmp_path: Path):
    """So a name that is not refused before the model is loaded is never missing after."""
    for task, (queries, of_two_classes) in QUERIES.items():
        (given,) = (field.default for field in fields(queries) if field.name == "metric_names")
        assert {*given, *of_two_classes} == set(TASK_METRICS[task])
    named = {"hateful-memes": "zeroshot", "voc-2007-classification": "multilabel"}
    file = tmp_path / "mine.toml"
    asked = [(folder, task, metric) for folder, task in named.items() for metric in TASK_METRICS[task]]
    sets = (f'[[set]]\nname="{m}"\nfolder="{folder}"\ntask="{task}"\nmetric="{m}"\n' for folder, task, m in asked)
    file.write_text("".join(sets))
    rows = evaluate_suite(model, str(file), data, out=tmp_path / "out")
    assert len(rows) == 7 and all(row.value is not None for row in rows)
    assert {*TASK_METRICS} == {*QUERIES, "multilabel", "multilabel_probe"}  # the last two make rows alike


def test_a_suite_of_ones_own_is_a_toml_file(data: Path, model: Path, tmp_path: Path):
    file = tmp_path / "mine.toml"
    file.write_text('[[set]]\nname = "cifar-10"\nmetric = "mean_per_class"\n')
    (row,) = evaluate_suite(model, str(file), data, templates="a photo of a {}.", out=tmp_path / "out")
    assert row.value == pytest.approx((len(CLASSES) - 1) / len(CLASSES))
    for text, message in (
        ("x = 1", r"has no \[\[set\]\] tables"),
        ('[[set]]\nname = "a"\nmetrics = "b"', "unknown key 'metrics'; there are name, task, metric, source"),
        ('[[set]]\nname = "a"\ntask = "knn"', "task = 'knn' is not one of zeroshot"),
        ('[[set]]\nname = "a"\n[[set]]\nname = "a"', "names the set 'a' twice"),
        ('[[set]]\nname = "a"\nsettings = "label=\'x"', "settings = .label='x.: no closing quotation"),
        ('[[set]]\nname = "a"\ntask = "probe"\nsplit = "val"', "split = 'val' is for "),
        ('[[set]]\nname = "a"\ntask = "probe"\ntemplates = "clip-7"', "templates = 'clip-7' is for "),
        ('[[set]]\nname = "a"\nmetric = "recall"', "zeroshot has no metric 'recall'; it has top1"),
        ("x = " + "[" * 100_000, "is not a TOML file"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            find_suite(str(file))
    file.write_text('[[set]]\nname = "cifar-10"\nmetric = "roc_auc"\n')
    with pytest.raises(UserError, match="cifar-10: zeroshot has no metric 'roc_auc' here; it has top1"):
        evaluate_suite(model, str(file), data, out=tmp_path / "out")
    file.write_text('[[set]]\nname = "a"\ntask = "multilabel"\n')
    assert find_suite(str(file))[0].metric == "mean_average_precision"
    for name, sets in SUITES.items():
        count = len(sets) + len(MTEB_TASKS.get(name, ()))
        assert len({each.name for each in sets} | {*MTEB_TASKS.get(name, ())}) == count
        assert count == {"elevater-20": 20, "msclip-24": 24, "mieb-lite": 51}[name]


def test_the_command_prints_one_table(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def typed(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["clasp", "eval", str(model), *words])
        with pytest.raises(SystemExit):
            cli.main()
        said = capsys.readouterr()
        return said.out + said.err

    assert "mean of 3" in typed("--suite", "elevater-20", "--data", str(data), "--out", str(tmp_path / "out"))
    assert "name a TASK" in typed() and "--suite takes --data FOLDER" in typed("--suite", "elevater-20", "k=1")


def test_a_suite_runs_within_what_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def needs_code(*given: object, **more: object) -> None:
        require_allowed({"loss.kind": "another:name"}, Path("run"))
        raise UserError("it was allowed")

    monkeypatch.setattr("clasp.commands.evaluate_suite.evaluate_suite", needs_code)
    for words, message in (([], "--allow-code"), (["--allow-code"], "it was allowed")):
        typed = ["clasp", "eval", str(tmp_path), "--suite", "elevater-20", "--data", "x", *words]
        monkeypatch.setattr(sys, "argv", typed)
        with pytest.raises(SystemExit):
            cli.main()
        assert message in capsys.readouterr().err


def test_predictions_are_kept_with_pictures_that_the_report_shows(data: Path, model: Path, tmp_path: Path):
    folder, out = write_run(tmp_path / "run", retrieval_rows()), tmp_path / "out"
    evaluate_run(model, "zeroshot", [f"data={data / 'cifar-10'}"], out=out, predictions=True)
    pairs = write_csv(TOYS, tmp_path / "pairs")
    evaluate_run(model, "retrieval", [f"data={pairs}"], out=out, predictions=True)
    with pytest.raises(UserError, match="multilabel has no scores of single queries to keep"):
        evaluate_run(model, "multilabel", [f"data={data}"], out=out, predictions=True)
    (kept,) = (out / "predictions").glob("retrieval-*")
    for row in read_json_lines(kept):
        assert (row["rank"] == 1) == (row["recall@1"] == 1) and row["rank"] >= 1
        assert row["predicted_caption"] in {toy.caption for toy in TOYS}
    for file in (*out.glob("*.png"), out / "predictions"):
        file.rename(folder / file.name)
    (folder / "results.jsonl").write_bytes((out / "results.jsonl").read_bytes())
    write_report([folder], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Confusions" in text and text.count("data:image/png") == 2
    assert f"<bdi>{CLASSES[1]}</bdi>" in text and "10 most frequent" not in text
    (file,) = (folder / "predictions").glob("zeroshot-*")
    file.write_text('{"task": "zeroshot"}\n{}\n')
    with pytest.raises(UserError, match="is damaged"):
        write_report([folder], tmp_path / "report.html")


def test_the_most_confused_classes():
    assert most_confused(["a", "a", "a", "b", "c"], ["b", "b", "a", "a", "c"]) == [
        Confusion("a", "b", 2, 3),
        Confusion("b", "a", 1, 1),
    ]


def test_each_language_has_the_classes_with_a_name_there(data: Path, model: Path, tmp_path: Path):
    numbers = list(range(len(CLASSES)))
    file, templates = tmp_path / "babel.json", tmp_path / "templates.json"
    given = {
        "EN": [numbers, CLASSES],
        "DE": [numbers[2:], CLASSES[2:]],
        "IT": [numbers[:2], CLASSES[:2]],
        "PT": [numbers[:1], CLASSES[:1]],
    }
    file.write_text(json.dumps(given))
    templates.write_text(json.dumps({language: ["a photo of a {}."] for language in given}))
    options = [f"data={data / 'cifar-10'}", f"classes={file}", f"templates={templates}"]
    said: list[str] = []
    results = evaluate_run(model, "multilingual_zeroshot", options, out=tmp_path / "out", say=said.append)
    rows = {row.language: row for row in results}
    assert any(line.startswith("left out: PT: ") for line in said) and "roc_auc" not in rows["IT"].metrics
    asked = [toy for toy in TOYS if toy.colour in CLASSES[2:]]
    assert rows["EN"].n == len(TOYS) and rows["DE"].n == len(asked) and rows["DE"].metrics["top1"] == 1
    assert rows["macro:all"].metrics["top1"] == pytest.approx(
        sum(rows[language].metrics["top1"] for language in ("EN", "DE", "IT")) / 3
    )
    for text, message in (('{"EN": [[0], []]}', r"must be \{\"en\""), ("[]", "with languages as keys")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            evaluate_run(model, "multilingual_zeroshot", options, out=tmp_path / "out")
    file.write_text(json.dumps({**given, "FR": [[0, 1], ["a", "b"]]}))
    with pytest.raises(UserError, match="has no list of templates for 'FR'"):
        evaluate_run(model, "multilingual_zeroshot", options, out=tmp_path / "out")


# --- metrics and templates -------------------------------------------------------------------------------------------


def test_the_area_of_two_classes_is_the_mean_over_classes():
    generator = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(60, generator=generator).round(decimals=1), torch.rand(60, generator=generator) < 0.3
    influence = two_class_influence(scores, labels)
    for of_class in (influence[labels], influence[~labels]):
        assert of_class.mean().item() == pytest.approx(roc_auc_score(labels.numpy(), scores.numpy()), abs=1e-12)


def test_the_bootstrap_error_of_the_area_is_that_of_delong():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) < 120
    scores = torch.randn(300, generator=generator) + labels
    wins = (scores[labels][:, None] > scores[~labels]).double()  # a row a positive, a column a negative
    expected = (wins.mean(1).var() / len(wins) + wins.mean(0).var() / len(wins.T)).sqrt()
    sample = GroupedScores(two_class_influence(scores, labels)[:, None], torch.arange(300), labels.long())
    (replicates,) = bootstrap_replicates([sample], group_count=300, resamples=2000)
    assert replicates.std().item() == pytest.approx(expected.item(), rel=0.05)


def test_eleven_point_precision_by_hand():
    scores = torch.tensor([[0.9], [0.8], [0.7], [0.6]])
    labels = torch.tensor([[True], [False], [True], [False]])
    # precision 1 up to recall 0.5, then 2/3: six of the eleven recalls, and five
    assert eleven_point_precision(scores, labels).item() == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert eleven_point_precision(torch.ones(4, 1), labels).item() == pytest.approx(0.5)
    assert eleven_point_precision(scores, labels & False).isnan().all()


def test_named_template_sets():
    assert [len(TEMPLATE_SETS[name]) for name in ("clip-80", "clip-7")] == [80, 7]
    for templates in TEMPLATE_SETS.values():
        assert len(set(templates)) == len(templates) and all(each.count("{}") == 1 for each in templates)
    assert set(TEMPLATE_SETS["clip-7"]) <= set(TEMPLATE_SETS["clip-80"])
    assert read_templates("clip-7") == list(TEMPLATE_SETS["clip-7"])
    with pytest.raises(UserError, match="named sets: clip-80, clip-7"):
        read_templates("clip-81")


def test_mieb_lite_has_its_own_prompts_shots_and_folders(tmp_path: Path):
    """One folder serves a probe of 16 images a class and zero-shot; the tasks of mteb are named."""
    pets, vectors, ids = ("cat", "dog"), np.eye(2, dtype="float32"), []
    for split, count in (("train", 16), ("test", 4)):
        for name in pets:
            folder = tmp_path / "sets" / "OxfordPets" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{split}-{number}.png").write_bytes(TOYS[number % len(TOYS)].png + f"{name}{split}".encode())
                ids.append((f"{name}/{split}-{number}.png", pets.index(name)))
    model = tmp_path / "model"
    model.mkdir()
    np.save(model / "image.npy", vectors[[label for _, label in ids]])
    (model / "image.json").write_text(json.dumps([id for id, _ in ids]))
    np.save(model / "text.npy", vectors)
    (model / "text.json").write_text(json.dumps([f"a photo of a {name}, a type of pet." for name in pets]))
    said: list[str] = []
    rows = evaluate_suite(model, "mieb-lite", tmp_path / "sets", out=tmp_path / "out", say=said.append)
    values = {row.set.name: row.value for row in rows if row.value is not None}
    assert values == {"OxfordPets": 1.0, "OxfordPetsZeroShot": 1.0} and len(rows) == 20
    folder = tmp_path / "sets" / "Country211"
    assert f"{folder} of Country211ZeroShot, to be had at https://huggingface.co/datasets/" in "\n".join(said)
    (left,) = [line for line in said if line.startswith("not here: 31 tasks of mieb-lite that mteb computes")]
    assert left.endswith("XM3600T2IRetrieval") and "clasp.as_mteb(RUN)" in left
    probed, asked = (row["options"] for row in lines(tmp_path / "out" / "results.jsonl"))
    assert (probed["shots"], probed["draws"]) == ("16", "5") and asked["templates"] == "a photo of a {}, a type of pet."
    notes = suite_table([(row.set, row.result) for row in rows], 31).notes
    assert notes[-1] == "31 more tasks of the suite in mteb, on clasp.as_mteb(RUN); its mean is over all"


def test_suite_and_data_may_be_typed_as_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    found: list[object] = []

    def stop(model: str, suite: str, data: Path, **given: object) -> None:
        found.extend((suite, data, given["templates"]))
        raise UserError("enough")

    monkeypatch.setattr("clasp.commands.evaluate_suite.evaluate_suite", stop)
    typed = ["clasp", "eval", str(tmp_path), "suite=mieb-lite", "templates=clip-80", "data=sets"]
    monkeypatch.setattr(sys, "argv", typed)
    with pytest.raises(SystemExit):
        cli.main()
    assert found == ["mieb-lite", Path("sets"), "clip-80"]
    capsys.readouterr()
