"""The ``clasp`` command: each verb a few lines that read arguments, call one function and print what came back.

Exit code 0: it worked. 2: a mistake of the user's, told in one line. 1: a mistake of ours, with its traceback.
Unusual: nothing heavy is imported before a verb needs it, so that help comes at once.
``--json`` prints one JSON object on standard output; everything else said goes to standard error.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from clasp.commands.environment import configure_environment

configure_environment()  # before a verb imports torch

app = typer.Typer(
    help="Make a CLIP out of two pre-trained models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

_RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A TOML file, or one of clasp's own: start, lilt/lwa, …")
]
_OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes, e.g. train.batch_size=512")
]
_RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
_JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller sample: a minute, and worse numbers.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="Where the run and the picture go.")] = Path("runs/demo"),
) -> None:
    """The whole story on the sample inside the package: align, evaluate, search, draw."""
    from clasp.commands.demo import run_demo

    run_demo(folder, quick=quick)


@app.command()
def params(recipe: _RecipeArgument, overrides: _OverridesArgument = None, as_json: _JsonOption = False) -> None:
    """Who trains: parameters in all and trained, per part. Loads no weights and asks no hub."""
    from clasp.config.build import build_model
    from clasp.config.recipe import read_recipe
    from clasp.report.terminal import print_parameter_counts

    model = build_model(read_recipe(recipe, overrides or ()), meta=True)
    counts = model.parameter_counts()
    if as_json:
        facts = {part: {**asdict(count), "percent": round(count.percent, 4)} for part, count in counts.items()}
        _print_json({**facts.pop("model"), **facts})
    else:
        print_parameter_counts(counts, model.sharing)


@app.command()
def doctor(recipe: _RecipeArgument, overrides: _OverridesArgument = None, as_json: _JsonOption = False) -> None:
    """What is odd about the pairs, and what training will cost, before any of it. Exit code 2 if it would stop."""
    from clasp.commands.doctor import diagnose, raise_on_stop
    from clasp.config.recipe import read_recipe
    from clasp.report.terminal import progress_bar

    sections = []
    for section in diagnose(read_recipe(recipe, overrides or ()), bar=progress_bar):
        sections.append(section)
        if not as_json:
            print(*section.findings, sep="\n", flush=True)
    if as_json:
        findings = [asdict(finding) for section in sections for finding in section.findings]
        _print_json({**{section.about: section.facts for section in sections}, "findings": findings})
    raise_on_stop(sections)


@app.command()
def train(
    recipe: _RecipeArgument,
    overrides: _OverridesArgument = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run; the recipe's and a number if left out.")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Folder of the runs.")] = Path("runs"),
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=V,V", help="A run for each value, e.g. train.lr=1e-3,3e-3"),
    ] = None,
) -> None:
    """Align two towers on your pairs: writes a run folder and says what to type next.

    With --grid, given once or more, every combination of values is a run; what is frozen is computed once for all.
    """
    from clasp.config.recipe import read_recipe

    if grid:
        return _sweep(recipe, overrides or (), grid, runs, name)
    made = read_recipe(recipe, overrides or ())
    run = runs / name if name else _free_path(runs, Path(recipe).stem)
    _train(made, run, resume=False)


@app.command()
def resume(run: _RunArgument) -> None:
    """Go on with a run that was stopped, exactly where it was."""
    from clasp.config.recipe import recipe_from_dict
    from clasp.training.run_folder import RunFolder

    _train(recipe_from_dict(RunFolder(run).recipe(), str(run / "recipe.toml")), run, resume=True)


@app.command(name="eval")
def evaluate(
    run: _RunArgument,
    task: Annotated[str, typer.Argument(help="zeroshot | retrieval | multilingual | retention")],
    options: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="data=…, classes=…, templates=…, fit=…, label=…")
    ] = None,
    as_json: _JsonOption = False,
) -> None:
    """Ask a run a question about some pairs; the answer is also kept in its results.jsonl.

    retention asks what each tower still knows, before and after alignment; its figure is RUN/retention.png.
    """
    from clasp.commands.evaluate import evaluate_run
    from clasp.report.terminal import print_results, print_status, progress_bar

    results = evaluate_run(run, task, options or (), say=print_status, bar=progress_bar)
    if as_json:
        _print_json({"run": str(run), "task": task, "results": [asdict(result) for result in results]})
    else:
        print_results(f"{run}: {task}", results)


@app.command(name="import")
def import_(
    kind: Annotated[str, typer.Argument(help="What saved it: lilt | msclip")],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The .pth file.")],
    run: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="The run folder to make.")],
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="pip:NAME, hf:NAME or file:FOLDER; by the vocabulary if left out."),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Pixels a side of the images, if other than in training.")
    ] = None,
    image_heads: Annotated[
        int | None, typer.Option("--image-heads", min=1, help="Of the attention, where its width does not run_demo.")
    ] = None,
    text_heads: Annotated[int | None, typer.Option("--text-heads", min=1, help="The same for the text tower.")] = None,
    lateral: Annotated[
        str | None, typer.Option("--lateral", help="msclip: layers that the branch joins; 2,4,6,8,10 if left out.")
    ] = None,
    truncation: Annotated[
        str,
        typer.Option(
            "--truncation", help="msclip: keep_eos | drop_eos, which is how the released code reads long captions."
        ),
    ] = "keep_eos",
) -> None:
    """Make a run of a checkpoint that another paper's code left. Nothing in the file is run."""
    from clasp.commands.import_checkpoint import import_checkpoint
    from clasp.convert.importers.run_writer import parse_import_options
    from clasp.report.terminal import format_megabytes, print_parameter_counts, print_status

    wanted = parse_import_options(
        tokenizer=tokenizer,
        size=size,
        image_heads=image_heads,
        text_heads=text_heads,
        lateral=lateral,
        truncation=truncation,
    )
    told = import_checkpoint(kind, checkpoint, run, wanted).report
    for line in told.lines:
        print_status(line)
    print_parameter_counts(told.counts)
    typed = shlex.quote(str(run))
    print_status(f"the run is in {run} (delta {format_megabytes(told.delta_bytes)}, card {run / 'README.md'})")
    print_status(f'index and search with: clasp index {typed} FOLDER  then: clasp search {typed} "your words"')


@app.command()
def index(
    run: _RunArgument,
    source: Annotated[
        str, typer.Argument(metavar="FOLDER|PAIRS", help="A folder of images, or pairs as for training.")
    ],
) -> None:
    """Embed images and keep them to be searched; a second call embeds only what is new."""
    from clasp.commands.search import index_images
    from clasp.report.terminal import print_status, progress_bar

    done = index_images(run, source, bar=progress_bar)
    print_status(str(done))
    print_status(f'search them with: clasp search {shlex.quote(str(run))} "your words"')


@app.command()
def search(
    run: _RunArgument,
    words: Annotated[str | None, typer.Argument(help="What to look for.")] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="Look for pictures like this one; with words, for both.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="How many hits.")] = 10,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="PNG with the hits; in the run folder if left out.")
    ] = None,
    as_json: _JsonOption = False,
) -> None:
    """Search the indexed images by words, by a picture, or by both."""
    from clasp.commands.search import search_images
    from clasp.report.terminal import print_status, print_table

    found = search_images(run, words, image, k, sheet)
    if as_json:
        _print_json({"query": found.query, "hits": [asdict(hit) for hit in found.hits], "sheet": str(found.sheet)})
        return
    rows = [[hit.id, f"{hit.score:.3f}", str(hit.meta["name"])] for hit in found.hits]
    print_table(found.query, ("id", "cosine", "image"), rows)
    print_status(f"picture of the hits: {found.sheet}")


def main() -> None:
    """The entry point: turns a user's mistake into one line and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name that is not UTF-8 is printed escaped, as to sys.stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        from clasp.types import UserError  # here, since it brings torch along

        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not full and not isinstance(error, UserError):
            raise
        print(f"clasp: {f'no space left on the disk ({error})' if full else error}", file=sys.stderr)
        sys.exit(2)


def _train(recipe: Any, run: Path, *, resume: bool) -> None:
    from clasp.commands.train import train_recipe
    from clasp.report.terminal import format_megabytes, print_results, print_status, progress_bar
    from clasp.training.trackers.console import stderr_reporter

    try:
        done = train_recipe(recipe, run, say=print_status, bar=progress_bar, reporter=stderr_reporter(), resume=resume)
    except KeyboardInterrupt:  # the loop takes Ctrl-C itself, so this was before its first step
        print_status(
            "stopped before training: type the same again; what a frozen tower has said by now is not computed twice"
        )
        sys.exit(130)
    typed, source = shlex.quote(str(run)), shlex.quote(recipe.data.train)
    if done.fitted.interrupted:
        print_status(f"stopped and saved; go on with: clasp resume {typed}")
        return
    print_results("validation pairs", done.results)
    print_status(f"cost: {done.cost}")
    print_status(f"the run is in {run} (delta {format_megabytes(done.delta_bytes)}, card {run / 'README.md'})")
    print_status(f'index and search with: clasp index {typed} {source}  then: clasp search {typed} "your words"')


def _sweep(source: str, overrides: Sequence[str], grid: Sequence[str], runs: Path, name: str | None) -> None:
    from clasp.commands.sweep import sweep
    from clasp.report.terminal import print_status, print_table, progress_bar
    from clasp.training.trackers.console import stderr_reporter
    from clasp.types import UserError

    done = sweep(source, overrides, grid, runs, name, say=print_status, bar=progress_bar, reporter=stderr_reporter)
    note = "validation: per cent, with 95 % intervals; s: seconds of training"
    print_table(f"{done.folder}: {len(done.rows)} of {done.combinations} runs", done.columns, done.cells, note)
    if done.stopped:
        return print_status("stopped and saved; go on by typing the same again")
    if not done.finished:
        raise UserError(f"no run of {done.folder} finished; the first: {done.rows[0].error}")
    for line in done.summary_lines():
        print_status(line)
    best = shlex.quote(done.finished[0].run)
    print_status(
        f'use it next: clasp eval {best} retrieval data=…  or: clasp index {best} FOLDER  then: clasp search {best} "…"'
    )


def _free_path(runs: Path, stem: str) -> Path:
    return next(path for n in range(1, 10_000) if not (path := runs / (stem if n == 1 else f"{stem}-{n}")).exists())


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=str))
