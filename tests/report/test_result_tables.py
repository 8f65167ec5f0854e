"""Tables of results: the main metric first, languages folded in the terminal and whole in the card, 100 columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

from clasp.commands.demo import _LANGUAGE_SETS, demo_table
from clasp.report.console import print_table
from clasp.report.leaderboard import SweepResult, SweepRow
from clasp.report.model_card import EVALUATIONS_HEADING, with_evaluations
from clasp.report.tables import labelled_by_task, result_tables, retention_label, retention_table, summary_tables
from clasp.report.terminal import print_results
from toyresults import LANGUAGES, multilingual, result, retention

LONG = "/data/a-very-long-folder/with-another-inside/" * 3 + "pairs.jsonl"
WIDE = "写真と説明文の組" * 12


def rows_of(title: str) -> list[str]:
    """The first cell of every row of the only table with such a title."""
    (table,) = [table for table in summary_tables(multilingual(), "results.jsonl") if table.columns[0] == title]
    return [row[0] for row in table.rows]


def test_the_main_metric_comes_first_with_its_interval_and_chance():
    (table,) = result_tables(
        [result("retrieval/image_to_text"), result("retrieval/text_to_image"), result("retrieval")]
    )
    assert table.columns == ("retrieval", "mean recall", "95 %", "chance", "R@1", "R@5", "R@10", "median rank")
    assert table.rows[2] == ["both directions", "50.0", "40.0–100.0", "10.0", "50.0", "50.0", "50.0", "12,345.5"]
    (zeroshot,) = result_tables([result("zeroshot", metrics=("top1", "top5", "mean_per_class"))])
    assert zeroshot.columns[:5] == ("zeroshot", "top1", "95 %", "chance", "top5")
    (outside,) = result_tables([result("positive", metrics=("own_share",))])
    assert outside.columns == ("positive", "own share", "95 %", "chance")


def test_many_languages_are_folded_to_means_worst_and_best():
    assert rows_of("multilingual") == [
        "all",
        "low-resource, never trained on before",
        f"{LANGUAGES[0]} (worst)",
        f"{LANGUAGES[-1]} (best)",
    ]
    (table,) = summary_tables(multilingual(), "results.jsonl")
    assert table.notes[-1] == "76 more languages in results.jsonl"


def test_few_languages_are_all_shown():
    few = [row for row in multilingual() if row.language in (*LANGUAGES[:3], "macro:all")]
    (table,) = summary_tables(few, "results.jsonl")
    assert [row[0] for row in table.rows] == ["all", *LANGUAGES[:3]] and len(table.notes) == 1


def test_languages_and_a_row_of_none_are_one_table():
    rows = [result("own", language, metrics=("recall@1",)) for language in ("de", "en", "")]
    ((task, labelled),) = labelled_by_task(rows)
    assert task == "own" and [row.result for row in labelled] == rows and len({row.label for row in labelled}) == 3


def test_the_card_keeps_all_rows():
    (table,) = result_tables(multilingual())
    assert [row[0] for row in table.rows[:78]] == LANGUAGES and len(table.rows) == 80


def test_few_queries_are_a_note_above_the_others():
    few = [replace(row, n=8) for row in multilingual()]
    certain = [replace(row, chance={**row.chance, "recall@10": 1.0, "median_rank": 4.0}) for row in few[:3]]
    both = [replace(certain[0], n=40), *certain[1:], *few[3:]]
    for tables in (result_tables(both), summary_tables(both, "results.jsonl")):
        assert tables[0].notes[0] == (
            "warning: few queries (8): 95 % intervals may be ±35 points wide, and R@10 cannot be less than 100 %"
        )
    assert "warning" not in " ".join(result_tables(multilingual())[0].notes)
    (first, *_) = retention_table([replace(row, n=8) for row in retention()], "here").notes
    assert first == "warning: few queries (8): 95 % intervals may be ±35 points wide"


def test_a_metric_that_is_certain_in_one_direction_is_not_named():
    rows = [result(f"retrieval{direction}") for direction in ("/image_to_text", "/text_to_image", "")]
    rows[1] = replace(rows[1], chance={**rows[1].chance, "recall@10": 1.0})
    assert "warning" not in " ".join(result_tables(rows)[0].notes)


def test_metrics_that_are_certain_in_a_small_language_are_not_named():
    rows = [result("multilingual", "en"), replace(result("multilingual", "zu"), n=8)]
    rows[1] = replace(rows[1], chance={**rows[1].chance, "recall@10": 1.0})
    assert "warning" not in " ".join(result_tables(rows)[0].notes)


def test_retention_is_folded_task_by_task():
    table = retention_table(retention(), "results.jsonl")
    assert table.columns == ("retention", "change", "95 %", "before", "after", "chance")
    assert [row[0] for row in table.rows] == [
        "image: k-NN",
        "image: linear probe",
        "captions R@1, trained: mean",
        f"captions R@1, trained: {LANGUAGES[29]} (worst)",
        f"captions R@1, trained: {LANGUAGES[0]} (best)",
        "captions R@1, never trained: mean",
        f"captions R@1, never trained: {LANGUAGES[29]} (worst)",
        f"captions R@1, never trained: {LANGUAGES[0]} (best)",
    ]
    assert table.rows[2][1:] == ["-15.0", "-25.0 to -5.0", "60.0", "45.0", "10.0"]
    assert "56 more languages in results.jsonl" in table.notes
    assert "image tower: weights moved by 5 % of their norm, most in block 1 (10 %)" in table.notes[2]


def test_rows_of_retention_in_words():
    labels = {
        ("image_knn", ""): "image: k-NN",
        ("text_recall@5/never_trained", "zu"): "text R@5, never trained: zu",
        ("text_recall@5/never_trained", "macro:never_trained"): "text R@5, never trained: mean",
        ("captions_recall@1", ""): "captions R@1",
    }
    for (probe, language), label in labels.items():
        assert retention_label(result(f"retention/{probe}", language)) == label


# --- on a hundred columns --------------------------------------------------------------------------------------------


def _demo() -> None:
    sets = {f"macro:{title}" for title in _LANGUAGE_SETS}
    rows = [result("multilingual/image_to_text", language) for language in ("en", *sorted(sets))]
    untrained = {f"{row.language}/image_to_text/recall@5": 0.04 for row in rows}
    table = demo_table(rows, untrained)
    print_table("demo", table.columns, table.rows, table.notes)


def _sweep() -> None:
    settings = tuple(f"train.setting_{number}={number}e-3" for number in range(6))
    finished = SweepRow(
        "a", settings, settings, "finished", "retrieval/mean_recall", 0.5, (0.4, 1.0), 0.1, 123456, 1234.5
    )
    failed = SweepRow("b", settings, settings, "failed", error=f"the loss is nan at step 3 of {LONG}")
    done = SweepResult(Path("runs"), [finished, failed, failed, failed, failed], False, 5)
    print_table(f"{LONG}: 2 runs", done.columns, done.cells, done.notes)


def _search() -> None:
    rows = [[f"{place}/{name}", "0.123", name] for place, name in enumerate((LONG, WIDE, "short.png"))]
    print_table("words " * 40, ("id", "cosine", "image"), rows)


PRINTED: dict[str, tuple[Callable[[], None], int]] = {
    "retrieval": (lambda: print_results(LONG, [result("retrieval", data=LONG)], "results.jsonl"), 1),
    "zeroshot": (lambda: print_results(WIDE, [result("zeroshot", metrics=("top1", "top5"), data=WIDE)], "here"), 1),
    "multilingual": (lambda: print_results("run", multilingual(), "results.jsonl"), 4),
    "retention": (lambda: print_results("run", retention(), "results.jsonl"), 8),
    "outside": (
        lambda: print_results("run", [result("t" * 60, metrics=[f"metric {n} of a long name" for n in range(3)])], "x"),
        1,
    ),
    "demo": (_demo, 6),
    "sweep": (_sweep, 5),
    "search": (_search, 3),
}


@pytest.mark.parametrize("name", PRINTED)
def test_tables_fit_a_hundred_columns_and_a_row_is_one_line(name: str, capsys: pytest.CaptureFixture[str]):
    show, rows = PRINTED[name]
    show()
    out = capsys.readouterr().out
    assert max(cell_len(line) for line in out.splitlines()) <= 100, out
    assert sum(line.startswith("│") for line in out.splitlines()) == rows, out
    assert sum(line.startswith("┃") for line in out.splitlines()) == 1, "titles of columns are on one line"


def test_a_label_that_is_cut_is_written_whole_below(capsys: pytest.CaptureFixture[str]):
    print_table("t", ("task", "value"), [[LONG, "1.0"], ["short", "2.0"]])
    table, below = capsys.readouterr().out.split("└")
    assert LONG not in table and f"is {LONG}" in below.replace("\n", "") and "short is" not in below


def test_numbers_are_whole_where_names_are_cut(capsys: pytest.CaptureFixture[str]):
    PRINTED["retrieval"][0]()
    out = capsys.readouterr().out
    for number in ("40.0–100.0", "12,345.5", "mean recall", "median rank", "/data", "s.jsonl"):
        assert number in out


def test_a_card_shows_the_evaluations_once_and_keeps_the_rest():
    own = result("retrieval", data="validation")
    asked = [result("zeroshot", metrics=("top1", "top5")), *multilingual(), *retention()]
    card = "# run\n\nwords\n"
    assert with_evaluations(card, [own]) == card
    assert with_evaluations(card, [replace(own, evaluation_id="0123-validation")]) == card
    assert "| retrieval on validation |" in with_evaluations(card, [replace(own, evaluation_id="0123", options={})])
    first = with_evaluations(card, [own, asked[0]])
    assert first.startswith(f"{card}\n## {EVALUATIONS_HEADING}\n") and "| zeroshot | 50.0 |" in first
    whole = with_evaluations(f"{first}\n## Another\n\nkept\n", [own, *asked, asked[0]])
    assert whole.startswith(f"{card}\n## Another\n\nkept\n\n## {EVALUATIONS_HEADING}\n")
    for head in ("zeroshot", "multilingual", "retention"):
        assert whole.count(f"\n| {head} on pairs.csv |") == 1
    assert "76 more languages in results.jsonl" in whole and "validation" not in whole
    assert with_evaluations(whole, [own, *asked]) == whole
