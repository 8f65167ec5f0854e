"""Verbs about models: eval, compare, analyze, report."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from clasp.cli.app import AllowCodeOption, JsonOption, RunArgument, app, code_allowed
from clasp.evaluation.options import ANALYZE_OPTIONS, describe_option, parse_options
from clasp.evaluation.registry import check_task, describe_tasks, task_names
from clasp.evaluation.suites import SUITES
from clasp.training.run_files import require_folder

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run folder, clip:NAME, open_clip:NAME/TAG, or another model's folder.")
]
_ANALYZE_HELP = escape("\n".join(map(describe_option, ANALYZE_OPTIONS)))
_TASKS_HELP = escape("\n".join(describe_tasks()))


@app.command(name="eval", epilog=_TASKS_HELP)
def evaluate(
    model: ModelArgument,
    task: Annotated[str | None, typer.Argument(metavar="TASK", help=task_names())] = None,
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Options of the task, listed below."),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option("--suite", metavar="NAME", help=f"Data sets: {', '.join(SUITES)}, or TOML."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FOLDER", help="With --suite: has a folder for each data set.")
    ] = None,
    predictions: Annotated[
        bool, typer.Option("--predictions", help="Keep the prediction of every query, and pictures of some.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for results.jsonl; by default RUN.")
    ] = None,
    as_json: JsonOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Evaluate a model on a data set; metrics with 95 % intervals are printed and appended to results.jsonl.

    MODEL is a run folder, clip:NAME or open_clip:NAME/TAG, a folder of one of these or of a SentenceTransformer CLIP,
    hf:USER/NAME, or a folder of embeddings (image.npy, image.json, text.npy, text.json). Results of a run are kept in
    its folder, those of any other model in --out FOLDER.
    """
    words = [word for word in (task, *(options or ())) if word is not None]
    if suite is None and words and words[0].startswith("suite="):
        suite, *words = words[0].partition("=")[2], *words[1:]
        if "data=" in words:
            raise typer.BadParameter("data= is empty; it names the folder that has a folder for each set")
        if data is None and (folder := next((word for word in words if word.startswith("data=")), "")):
            data = Path(folder.partition("=")[2])
            words.remove(folder)
    if suite is not None:
        with code_allowed(allow_code):
            return _evaluate_suite(model, suite, data, words, out, as_json=as_json)
    if task is None or data is not None:
        raise typer.BadParameter("name a TASK with its options, or --suite NAME --data FOLDER")
    check_task(task, options or ())
    _require_folders(model)
    from clasp.commands.evaluate import evaluate_run
    from clasp.report.console import print_json, print_status, progress_bar, relative_path
    from clasp.report.terminal import print_results

    with code_allowed(allow_code):
        results = evaluate_run(
            model, task, options or (), out=out, predictions=predictions, say=print_status, bar=progress_bar
        )
    if as_json:
        print_json({"run": model, "task": task, "results": [asdict(result) for result in results]})
    else:
        where = "the run folder" if out is None else relative_path(out)
        print_results(f"{relative_path(model)}: {task}", results, f"results.jsonl in {where}")


def _require_folders(*models: str) -> None:
    """Raises ``UserError`` for a model that is a path, and no folder: other models have a scheme, such as ``clip:``."""
    for model in models:
        if ":" not in model:
            require_folder(Path(model))


def _evaluate_suite(
    model: str, suite: str, data: Path | None, options: list[str], out: Path | None, *, as_json: bool
) -> None:
    _require_folders(model)
    from clasp.commands.evaluate_suite import evaluate_suite
    from clasp.evaluation.suites import MTEB_TASKS
    from clasp.report.console import print_json, print_status, print_table, progress_bar, relative_path
    from clasp.report.suite_table import suite_table

    odd = [option for option in options if not option.startswith("templates=")]
    if data is None or odd:
        refused = f", not {', '.join(odd)}" if odd else ""
        raise typer.BadParameter(f"--suite takes --data FOLDER and templates=…{refused}")
    templates = next((option.partition("=")[2] for option in options), None)
    rows = evaluate_suite(model, suite, data, templates=templates, out=out, say=print_status, bar=progress_bar)
    if as_json:
        found = [
            {"set": row.set.name, "value": row.value} | ({} if row.result is None else asdict(row.result))
            for row in rows
        ]
        return print_json({"run": model, "suite": suite, "sets": found})
    table = suite_table([(row.set, row.result) for row in rows], len(MTEB_TASKS.get(suite, ())))
    print_table(f"{relative_path(model)}: {suite}", table.columns, table.rows, table.notes)


@app.command(epilog=_TASKS_HELP)
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A model, as for clasp eval.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The model it is compared with.")],
    task: Annotated[str, typer.Argument(metavar="TASK", help=task_names())],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options of the task, listed below.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="New folder for comparison.json and predictions.jsonl."),
    ] = None,
    as_json: JsonOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Compare two models on the same queries: difference, 95 % interval and p-value of every metric.

    Intervals are of the paired bootstrap; accuracies are tested with McNemar's exact test. With --out, the predictions
    and scores of both models for every query are kept.
    """
    check_task(task, options or ())
    _require_folders(first, second)
    from clasp.commands.compare import compare_models
    from clasp.report.console import print_json, print_lines, print_status, print_table, progress_bar, relative_path
    from clasp.report.model_comparison import comparison_sentence, model_comparison_table

    with code_allowed(allow_code):
        done = compare_models((first, second), task, options or (), out=out, say=print_status, bar=progress_bar)
    sentence = comparison_sentence(done.first, done.second, done.primary)
    if as_json:
        return print_json({**done.to_dict(), "sentence": sentence})
    table = model_comparison_table(done.comparisons, done.primary)
    print_table(f"A: {done.first}, B: {done.second}, on {done.asked}", table.columns, table.rows, table.notes)
    print_lines([sentence])
    if out is not None:
        print_status(f"every query is in {relative_path(out)}")


@app.command(epilog=_ANALYZE_HELP)
def analyze(
    run: RunArgument,
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options, listed below.")] = None,
    as_json: JsonOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Analyse the embedding space of a run and the layers of its towers; the result is kept in RUN/analysis.json.

    Modality gap, alignment, uniformity, effective rank, cosines; CKA and mutual k-NN of the towers' layers, clusters of
    the two modalities, whether attention heads attend alike in both towers, and whether gradients of both agree on
    shared weights, each with a shuffled baseline.
    """
    parse_options("analyze", ANALYZE_OPTIONS, options or ())
    require_folder(run)
    from clasp.commands.analyze import analyze_run
    from clasp.report.analysis_section import cluster_table, geometry_table, gradient_table, layer_table
    from clasp.report.console import print_json, print_status, print_table, progress_bar, relative_path

    with code_allowed(allow_code):
        done = analyze_run(run, options or (), say=print_status, bar=progress_bar)
    if as_json:
        return print_json({"run": str(run), **done.to_dict()})
    gradients = [gradient_table(done)] if done.gradients else []
    for table in (geometry_table(done), layer_table(done), cluster_table(done), *gradients):
        print_table(relative_path(run), table.columns, table.rows, table.notes)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, in the order of the columns.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML file about runs: what differs, learning curves, quality against cost, results.

    Only files of the run folders are read; the file has no script and requests nothing.
    """
    for run in runs:
        require_folder(run)
    from clasp.commands.report import write_report
    from clasp.report.console import format_megabytes, print_status, relative_path

    size = write_report(runs, out)
    print_status(f"the report is in {relative_path(out)} ({format_megabytes(size)})")
