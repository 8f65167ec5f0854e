"""The HTML report: what is in it, what a run lacks, what a hostile name cannot do, and that it stands alone."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from clasp.analysis.record import analyses_json, read_analyses
from clasp.data.atomic_files import with_checksum
from clasp.evaluation.results import EvaluationResult
from clasp.report.auto_table import AutoPlan, AutoRow
from clasp.report.chart_axes import Axis
from clasp.report.html_report import render_html_report
from clasp.report.pareto_section import mark_front
from clasp.report.run_comparison import compare_results, difference_tables, recipe_table
from clasp.report.run_record import read_results, read_run_record
from clasp.report.svg_charts import ChartPoint, swatch
from clasp.types import UserError
from toyreports import HOSTILE, retrieval_rows, toy_analysis, write_run
from toyresults import multilingual, result, retention

VOID = ("meta", "img", "wbr", "line", "rect", "circle", "polygon", "polyline")


class Page(HTMLParser):
    """A parsed page: elements by tag with their attributes, its text; asserts that every element is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(*runs: Path) -> Page:
    return Page(render_html_report([read_run_record(run, run.name) for run in runs]))


def test_a_report_of_one_run(tmp_path: Path):
    page = page_of(write_run(tmp_path / "mine", [*retrieval_rows(), *multilingual(), *retention()]))
    for words in (
        "mine",
        "50.0",
        "40.0–100.0",
        "5.00",
        "file:towers",
        "abcdef012345",
        "float32",
        "200 FLOP",
        "no meter here",
    ):
        assert words in page.text
    assert "x77-Latn-variant-with-a-long-name" in page.text, "every language, not the best and the worst"
    assert "+1.0" in page.text and "image tower: weights moved" in page.text, "retention"
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert "Training loss: mine from 3.5 at step 2 to 2.25 at step 4" in labels
    assert "Validation: mean recall, per cent: mine from 12.5 at step 0 to 50 at step 4" in labels


def test_the_page_stands_alone_and_is_accessible(tmp_path: Path):
    runs = [
        write_run(tmp_path / "a", retrieval_rows()),
        write_run(tmp_path / "b", retrieval_rows(0.6), batch_size=32, trained=80),
    ]
    (runs[0] / "search.png").write_bytes(b"\x89PNG")
    page = page_of(*runs)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert str(attributes.get("src", "data:")).startswith("data:") and str(attributes.get("href", "#"))[0] == "#"
    assert len(page.all("caption")) == len(page.all("table")) > 5
    assert {header["scope"] for header in page.all("th")} == {"row", "col"}
    assert all(image["alt"] for image in page.all("img")) and len(page.all("img")) == 1
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.all("svg"))
    anchors = {each["href"] for each in page.all("a")}
    assert anchors == {f"#{each['id']}" for each in page.all("section")}


def test_runs_are_compared_in_the_keys_that_differ(tmp_path: Path):
    runs = [
        write_run(tmp_path / "a", retrieval_rows()),
        write_run(tmp_path / "b", retrieval_rows(0.6), batch_size=32, trained=80),
    ]
    records = [read_run_record(run, run.name) for run in runs]
    differing, partial = difference_tables(records)
    assert differing.columns == ("key", "a", "b") and differing.rows == [["train.batch_size", "16", "32"]]
    assert partial.rows == [] and differing.notes == ["Equal in all runs: 3 other keys."]
    text = Page(render_html_report(records)).text
    assert "The runs differ in train.batch_size, so their losses are not comparable." in text
    assert "60.0 (50.0–100.0)" in text
    equal = page_of(runs[0], write_run(tmp_path / "c", retrieval_rows())).text
    assert "The recipes are equal." in equal


def test_the_last_of_repeated_results_counts(tmp_path: Path):
    record = read_run_record(write_run(tmp_path / "a", [*retrieval_rows(0.3), *retrieval_rows(0.4)]), "a")
    compared = compare_results([record])
    assert len(compared) == 1 and compared[0].labels == ["image to text", "text to image", "both directions"]
    both = compared[0].result(0, "both directions")
    assert both is not None and both.metrics["mean_recall"] == 0.4


def test_runs_on_other_pairs_have_no_chart_in_common(tmp_path: Path):
    other = [replace(row, n=40) for row in retrieval_rows()]
    text = page_of(write_run(tmp_path / "a", retrieval_rows()), write_run(tmp_path / "b", other)).text
    assert "No two runs were evaluated by the same metric on the same pairs" in text
    assert "different numbers of queries" in text and "No two runs have an evaluation" not in text
    elsewhere = [replace(row, data="other.csv") for row in other]
    text = page_of(tmp_path / "a", write_run(tmp_path / "c", elsewhere)).text
    assert "No two runs have an evaluation in common" in text


def test_a_run_shows_what_it_lacks(tmp_path: Path):
    run = tmp_path / "bare"
    run.mkdir()
    (run / "recipe.toml").write_text('[image]\ntower = "x"\n')
    (run / "state").mkdir()
    (run / "state" / "state.safetensors").touch()
    (run / "log.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "st')
    text = page_of(run).text
    for words in (
        "bare: interrupted;",
        "the last line of log.jsonl is cut short",
        "no gradient step was logged",
        "no results.jsonl: not evaluated",
        "no cost.json",
        "not analysed",
        "retention was not evaluated",
        "No run has a picture of a search",
    ):
        assert words in text


def test_the_stages_of_auto(tmp_path: Path):
    run = tmp_path / "auto"
    run.mkdir()
    plan = AutoPlan({"image": {"tower": "x"}}, primary="mean_recall", finished=False)
    plan.rows.append(AutoRow(stage="1-closed-form", method="cca", verdict="kept", metric=0.25, interval=(0.2, 0.3)))
    plan.rows.append(AutoRow(stage="2-full", method="full", verdict="left out", reason="no time"))
    plan.write(run)
    page = page_of(run)
    assert "interrupted" in page.text and "2-full: no time" in page.text
    assert "1-closed-form: 25.0" in [svg.get("aria-label") for svg in page.all("svg")]


def test_long_floats_are_short_where_recipes_are_compared(tmp_path: Path):
    runs = [write_run(tmp_path / name, retrieval_rows()) for name in "ab"]
    for run, rate in zip(runs, (1 / 3, 0.001), strict=True):
        (run / "recipe.toml").write_text((run / "recipe.toml").read_text() + f"lr = {rate!r}\n")
    records = [read_run_record(run, run.name) for run in runs]
    assert difference_tables(records)[0].rows == [["train.lr", "0.3333", "0.001"]]
    assert ["train.lr", repr(1 / 3)] in recipe_table(records[0]).rows


def test_floats_that_differ_are_not_shown_equal(tmp_path: Path):
    runs = [write_run(tmp_path / name, retrieval_rows()) for name in "ab"]
    for run, rate in zip(runs, ("0.00123456", "0.00123451"), strict=True):
        (run / "recipe.toml").write_text((run / "recipe.toml").read_text() + f"lr = {rate}\n")
    shown = difference_tables([read_run_record(run, run.name) for run in runs])[0].rows
    assert shown == [["train.lr", "0.00123456", "0.00123451"]]


def test_an_analysis_is_kept_and_shown(tmp_path: Path):
    run = write_run(tmp_path / "a", retrieval_rows())
    entries = [toy_analysis(), toy_analysis(data="other.csv"), toy_analysis(logit_scale=20.0)]
    (run / "analysis.json").write_text(analyses_json(entries))
    assert read_analyses(run) == [entries[2], entries[1]], "the same pairs again replace the entry"
    page = page_of(run)
    assert "39 pairs of pairs.csv, 2.0 s" in page.text and "30.2" in page.text
    assert "Images and texts as clusters" in page.text and "0.875" in page.text
    assert "24 attention heads, with images and with texts: correlation of their entropy 0.50" in page.text
    assert "Mutual k-NN of every image block with every text block; highest 0.200" in [
        svg.get("aria-label") for svg in page.all("svg")
    ]
    (run / "analysis.json").write_text('{"analyses": [{}]}')
    with pytest.raises(UserError, match=r"analysis\.json is damaged"):
        read_analyses(run)


def test_heat_maps_of_a_measure_have_one_scale(tmp_path: Path):
    runs = [write_run(tmp_path / name, retrieval_rows()) for name in "ab"]
    for run, most in zip(runs, (0.2, 0.4), strict=True):
        layers = [replace(row, mutual_knn=most, cka=0.5) for row in toy_analysis().layers]
        (run / "analysis.json").write_text(analyses_json([toy_analysis(layers=layers)]))
    page = page_of(*runs)
    drawn = [rect["fill-opacity"] for rect in page.all("rect") if rect["class"] == "heat"]
    assert drawn == ["0.500"] * 2 + ["1.000"] * 6, "each run: two blocks of mutual k-NN, then of CKA"
    assert page.text.count("Mutual k-NN: 0 to 0.400 (full colour), the scale of all its maps here") == 2


def test_results_of_validation_name_what_they_selected(tmp_path: Path):
    own = [replace(row, options={}, evaluation_id="ab12-validation") for row in retrieval_rows()]
    run = write_run(tmp_path / "a", own)
    note = "the same pairs selected the step among 2, which the interval leaves out"
    assert note in page_of(run).text and f"a: {note}" in page_of(run, write_run(tmp_path / "b", own)).text
    last = (run / "recipe.toml").read_text() + 'select = "last"\n'
    (run / "recipe.toml").write_text(last)
    others = write_run(tmp_path / "c", [replace(row, evaluation_id="cd34", options={}) for row in retrieval_rows()])
    assert "selected the step" not in page_of(run).text + page_of(others).text


def test_texts_of_the_user_are_escaped(tmp_path: Path):
    run = write_run(tmp_path / "a", [result("retrieval", data=HOSTILE), result("multilingual", HOSTILE)])
    (run / "recipe.toml").write_text(f"[data]\ntrain = {json.dumps(HOSTILE)}\n")
    (run / "analysis.json").write_text(analyses_json([toy_analysis(data=HOSTILE)]))
    text = render_html_report([read_run_record(run, HOSTILE), read_run_record(run, f"{HOSTILE}2")])
    page = Page(text)
    assert not page.all("script") and not page.all("b")
    assert "\u202e" not in text and "\x1b" not in text


@pytest.mark.parametrize("name", ["results.jsonl", "log.jsonl", "cost.json", "recipe.toml", "base.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str):
    run = write_run(tmp_path / "a", retrieval_rows())
    for damage in ("{]\n{]\n", "[" * 9999 + "\n\n"):  # the second is nested too deep to be parsed
        (run / name).write_text(damage)
        with pytest.raises(UserError, match=name):
            read_run_record(run, "a")


def test_a_result_that_was_changed_is_named(tmp_path: Path):
    run = write_run(tmp_path / "a", retrieval_rows())
    rows = [with_checksum(json.loads(line)) for line in (run / "results.jsonl").read_text().splitlines()]
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_results(run) == retrieval_rows()
    rows[1]["n"] += 1
    (run / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="line 2 is not as it was written"):
        read_results(run)


def test_a_log_that_is_no_text_is_named(tmp_path: Path):
    run = write_run(tmp_path / "a", retrieval_rows())
    log = run / "log.jsonl"
    log.write_bytes(b'{"event": "\xff"}\n' + log.read_bytes())
    with pytest.raises(UserError, match=r"line 1 of .*log\.jsonl is damaged"):
        read_run_record(run, "a")


def test_steps_repeated_after_an_interruption_count_once(tmp_path: Path):
    run = write_run(tmp_path / "a", retrieval_rows())
    with open(run / "log.jsonl", "a") as file:
        file.write('{"event": "step", "step": 4, "loss": 2.0}\n{"event": "step", "step": 6, "loss": 1.5}\n')
    record = read_run_record(run, "a")
    assert record.curves().loss == {2: 3.5, 4: 2.0, 6: 1.5}
    assert record.curves().validation == {0: 0.125, 4: 0.5}


def test_a_diverged_run_has_a_report(tmp_path: Path):
    run = write_run(tmp_path / "a", retrieval_rows(float("nan")))
    with open(run / "log.jsonl", "a") as file:
        file.write('{"event": "step", "step": 6, "loss": NaN}\n')
    page = page_of(run, write_run(tmp_path / "b", retrieval_rows()))
    assert "a: the loss was not a finite number at some steps" in page.text
    assert not [svg for svg in page.all("svg") if "nan" in str(svg.get("aria-label"))]


def test_states_of_runs(tmp_path: Path):
    run = write_run(tmp_path / "a", retrieval_rows())
    assert read_run_record(run, "x").state == "finished"
    (run / "imported.json").write_text("{}")
    assert read_run_record(run, "x").state == "imported"
    (run / "state").mkdir()
    (run / "state" / "state.safetensors").touch()
    assert read_run_record(run, "x").state == "interrupted"


# --- charts ----------------------------------------------------------------------------------------------------------


def test_the_pareto_front_by_hand():
    places = [(1.0, 10.0), (2.0, 20.0), (2.0, 15.0), (3.0, 20.0), (4.0, 30.0)]
    points = [ChartPoint(label=str(place), place=0, x=x, y=y) for place, (x, y) in enumerate(places)]
    assert [point.filled for point in mark_front(points)] == [True, True, False, False, True]


def test_axes_cover_their_values_with_round_ticks():
    axis = Axis.covering([0, 37], 0, 100, floor=0)
    assert axis.ticks() == [0, 10, 20, 30] and axis.at(0) == 0 and axis.at(axis.high) == 100
    decades = Axis.covering([0.2, 900], 0, 100, logarithmic=True)
    assert decades.ticks() == [1, 10, 100] or decades.ticks()[0] <= 1
    assert 0 < decades.at(0.2) < decades.at(900) < 100
    alone = Axis.covering([5.0], 0, 100)
    assert 0 < alone.at(5.0) < 100 and alone.ticks()
    share = Axis.covering([100.0], 0, 100, ceiling=Axis.most("top1, per cent", [100.0]))
    assert share.high == 100 == share.ticks()[-1] and share.at(100.0) == 100
    assert Axis.most("change, per cent", [120.0]) is None and Axis.most("seconds", [5.0]) is None


def test_runs_differ_in_colour_dash_or_shape():
    assert len({swatch(place) for place in range(28)}) == 28


# --- evaluations that differ in one option ---------------------------------------------------------------------------

ZEROSHOT = ("top1", "top5", "mean_per_class")


def evaluated(value: float, id: str = "", *, data: str = "pics", **options: str) -> EvaluationResult:
    row = result("zeroshot", value=value, metrics=ZEROSHOT, data=data)
    return replace(row, options=options if id else None, evaluation_id=id)


@pytest.mark.parametrize(
    ("rows", "titles"),
    [
        pytest.param(
            [
                evaluated(0.3, "aa11", templates="a photo of a {}.", label="class"),
                evaluated(0.4, "bb22", templates="clip-80", label="class"),
            ],
            {"zeroshot on pics": 0.3, "zeroshot on pics, templates=clip-80": 0.4},
            id="templates",
        ),
        pytest.param(
            [evaluated(0.3, "aa11", label="class"), evaluated(0.4, "bb22", descriptions="d.json", label="kind")],
            {"zeroshot on pics": 0.3, "zeroshot on pics, descriptions=d.json, label=kind": 0.4},
            id="descriptions",
        ),
        pytest.param(
            [evaluated(0.3), evaluated(0.4, "bb22", label="class")],
            {"zeroshot on pics (options not recorded)": 0.3, "zeroshot on pics (content bb22)": 0.4},
            id="earlier version",
        ),
        pytest.param(
            [evaluated(0.3, "aa11", label="class"), evaluated(0.4, "bb22", label="class")],
            {"zeroshot on pics (content aa11)": 0.3, "zeroshot on pics (content bb22)": 0.4},
            id="other pairs of one name",
        ),
        pytest.param(
            [evaluated(0.3, "aa11", label="class"), evaluated(0.4, "aa11", label="class")],
            {"zeroshot on pics": 0.4},
            id="repeated",
        ),
        pytest.param([evaluated(0.3), evaluated(0.4)], {"zeroshot on pics": 0.4}, id="repeated in an earlier version"),
    ],
)
def test_evaluations_that_differ_are_told_apart(rows: list[EvaluationResult], titles: dict[str, float], tmp_path: Path):
    record = read_run_record(write_run(tmp_path / "run", rows), "run")
    found = {each.title: each.result(0, "zeroshot") for each in compare_results([record])}
    assert {title: each and each.metrics["top1"] for title, each in found.items()} == titles
    text = Page(render_html_report([record])).text
    assert all(title in text for title in titles)


def test_runs_evaluated_on_copies_of_the_same_pairs_are_one_table(tmp_path: Path):
    runs = [
        write_run(tmp_path / name, [evaluated(0.3, "aa11", data=data, label="class")])
        for name, data in (("a", "pics"), ("b", "/mnt/pics"))
    ]
    (compared,) = compare_results([read_run_record(run, run.name) for run in runs])
    assert list(compared.rows) == [0, 1]


def test_few_queries_are_said_below_the_table_of_a_report(tmp_path: Path):
    few = [replace(row, n=16) for row in retrieval_rows()]
    runs = [write_run(tmp_path / "a", few), write_run(tmp_path / "b", few)]
    for chosen in (runs, runs[:1]):
        assert page_of(*chosen).text.count("warning: few queries (16): 95 % intervals may be ±24 points wide") == 1
