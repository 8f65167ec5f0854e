"""The ``clasp`` command: each verb reads its arguments, calls one function and prints the result.

Exit code 0: success. 2: an error in the user's input, one line. 1: an error in clasp, with its traceback.
``--json`` prints one JSON object on standard output; progress and log lines go to standard error.
Note: torch and transformers are imported inside the verbs, so that ``--help`` returns at once. One file of many lines:
a verb is its options with their help and a few calls, and they share ``main`` and the options at the top.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import shlex
import sys
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from clasp.commands.environment import configure_environment
from clasp.evaluation.registry import ANALYZE_OPTIONS, describe_option, describe_tasks, task_names

configure_environment()  # before a verb imports torch

app = typer.Typer(
    help="Align a pre-trained image encoder and a pre-trained text encoder into a CLIP-style model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

store_app = typer.Typer(
    help="Move the index of a run to another store, export it, import embeddings.", no_args_is_help=True
)
app.add_typer(store_app, name="store")

_RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a built-in recipe: start, lilt/lwa, …")
]
_OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of recipe keys, e.g. train.batch_size=512")
]
_RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder: output of clasp train or clasp import.")
]
_JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
_AllowCodeOption = Annotated[
    bool, typer.Option("--allow-code", help="Import the Python code that the run names (package.module:Name).")
]
_ANALYZE_HELP = escape("\n".join(map(describe_option, ANALYZE_OPTIONS)))
_TASKS_HELP = escape("\n".join(describe_tasks()))


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sample: takes a minute, lower accuracy.")] = False,
    folder: Annotated[Path, typer.Option("--out", help="Run folder to write.")] = Path("runs/demo"),
    with_page: Annotated[
        bool, typer.Option("--serve", help="Then serve the search page over the demo's drawings, as clasp serve does.")
    ] = False,
) -> None:
    """Align two packaged towers on the packaged emoji sample, evaluate on held-out concepts, search and draw hits."""
    if with_page:
        from clasp.commands.serve import require_serve_extra

        require_serve_extra()
    from clasp.commands.demo import run_demo

    run_demo(folder, quick=quick)
    if with_page:
        serve(folder)


@app.command()
def params(recipe: _RecipeArgument, overrides: _OverridesArgument = None, as_json: _JsonOption = False) -> None:
    """Trainable and total parameters per part; builds shapes only, works offline.

    Only an hf: tower that no built-in recipe uses needs its config.json, from the local cache or the hub.
    """
    from clasp.commands.params import count_parameters
    from clasp.config.recipe import read_recipe, require_single_keys
    from clasp.report.console import print_json
    from clasp.report.terminal import print_parameter_counts

    require_single_keys(overrides or ())
    report = count_parameters(read_recipe(recipe, overrides or ()))
    if as_json:
        print_json(report.to_dict())
    else:
        print_parameter_counts(report.counts, report.sharing)


@app.command()
def doctor(recipe: _RecipeArgument, overrides: _OverridesArgument = None, as_json: _JsonOption = False) -> None:
    """Check the data; report frozen blocks, feature-cache size and number of steps, without training.

    Exit code 2 if training would stop on this data.
    """
    from clasp.commands.doctor import diagnose, raise_on_stop
    from clasp.config.recipe import read_recipe, require_single_keys
    from clasp.report.console import print_json, print_lines, progress_bar

    require_single_keys(overrides or ())
    sections = []
    for section in diagnose(read_recipe(recipe, overrides or ()), bar=progress_bar):
        sections.append(section)
        if not as_json:
            print_lines(section.findings)
    if as_json:
        findings = [asdict(finding) for section in sections for finding in section.findings]
        print_json({**{section.about: section.facts for section in sections}, "findings": findings})
    raise_on_stop(sections)


@app.command()
def train(
    recipe: _RecipeArgument,
    overrides: _OverridesArgument = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run folder. Default: the name of the recipe, numbered.")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Parent folder of the run folders.")] = Path("runs"),
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=V,V", help="Sweep a key, e.g. train.lr=1e-3,3e-3; repeatable."),
    ] = None,
    minutes: Annotated[
        str | None, typer.Option("--minutes", metavar="N", help="Wall time of a recipe with [auto]: start, auto.")
    ] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", metavar="N", help="Gradient steps in place of minutes: repeatable bitwise.")
    ] = None,
) -> None:
    """Train a recipe on image-text pairs; writes a run folder: trained tensors (delta), log, results, cost, model card.

    data.train=FOLDER names the pairs: a folder, .csv, .tsv, .jsonl, .parquet or tar shards.

    With --grid, one run per combination of values; runs share the feature cache and are ranked by validation.
    """
    from clasp.config.recipe import read_recipe, require_single_keys
    from clasp.types import UserError

    require_single_keys(overrides or ())
    if name is not None and (not name.strip() or Path(name).name != name or name == ".."):
        raise UserError(f"--name {name!r} is not the name of one folder; its place is --runs")
    if grid:
        return _sweep(recipe, overrides or (), grid, runs, name)
    given = {key: text for key, text in (("minutes", minutes), ("steps", steps)) if text is not None}
    made = read_recipe(recipe, overrides or (), budget=given or None)
    run = runs / name if name else _free_path(runs, Path(recipe).stem)
    if made.auto is not None:
        return _climb(made, run)
    _train(made, run, resume=False)


@app.command()
def resume(
    run: _RunArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Only train.trackers can change.")
    ] = None,
    allow_code: _AllowCodeOption = False,
) -> None:
    """Resume an interrupted run from its saved state: same batches, same weights as without the interruption."""
    from clasp.config.recipe import recipe_from_dict, require_single_keys
    from clasp.report.auto_table import PLAN_FILE
    from clasp.training.run_folder import RunFolder
    from clasp.types import UserError

    require_single_keys(overrides or ())
    with _allow_code(allow_code):
        if (run / PLAN_FILE).exists():
            if overrides:
                raise UserError(f"{run} was trained with [auto], whose stages cannot change: {overrides[0]}")
            return _climb(None, run)
        written = recipe_from_dict(RunFolder(run).recipe(), str(run / "recipe.toml"))
        made = written.with_overrides(overrides or ())
        typed = set(made.train.trackers) if made.train.trackers != written.train.trackers else set()
        with _allow_code(allow_code, typed):
            _train(made, run, resume=True)


@app.command(name="eval", epilog=_TASKS_HELP)
def evaluate(
    run: _RunArgument,
    task: Annotated[str, typer.Argument(metavar="TASK", help=task_names())],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Options of the task, listed below."),
    ] = None,
    as_json: _JsonOption = False,
    allow_code: _AllowCodeOption = False,
) -> None:
    """Evaluate a run on a data set; metrics with 95 % intervals are printed and appended to RUN/results.jsonl."""
    from clasp.commands.evaluate import evaluate_run
    from clasp.report.console import print_json, print_status, progress_bar, relative_path
    from clasp.report.terminal import print_results

    with _allow_code(allow_code):
        results = evaluate_run(run, task, options or (), say=print_status, bar=progress_bar)
    if as_json:
        print_json({"run": str(run), "task": task, "results": [asdict(result) for result in results]})
    else:
        print_results(f"{relative_path(run)}: {task}", results, "results.jsonl in the run folder")


@app.command(epilog=_ANALYZE_HELP)
def analyze(
    run: _RunArgument,
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options, listed below.")] = None,
    as_json: _JsonOption = False,
) -> None:
    """Analyse the embedding space of a run and the layers of its towers; the result is kept in RUN/analysis.json.

    Modality gap, alignment, uniformity, effective rank, cosines; CKA and mutual k-NN of the towers' layers, each with a
    shuffled baseline.
    """
    from clasp.commands.analyze import analyze_run
    from clasp.report.analysis_section import geometry_table, layer_table
    from clasp.report.console import print_json, print_table, progress_bar, relative_path

    done = analyze_run(run, options or (), bar=progress_bar)
    if as_json:
        return print_json({"run": str(run), **done.to_dict()})
    for table in (geometry_table(done), layer_table(done)):
        print_table(relative_path(run), table.columns, table.rows, table.notes)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders, in the order of the columns.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="HTML file to write.")] = Path("report.html"),
) -> None:
    """Write one self-contained HTML file about runs: what differs, learning curves, quality against cost, results.

    Only files of the run folders are read; the file has no script and requests nothing.
    """
    from clasp.commands.report import write_report
    from clasp.report.console import format_megabytes, print_status, relative_path

    size = write_report(runs, out)
    print_status(f"the report is in {relative_path(out)} ({format_megabytes(size)})")


@app.command(name="import")
def import_(
    kind: Annotated[str, typer.Argument(help="Format of the checkpoint: lilt | msclip")],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The .pth file; nothing in it is executed.")],
    run: Annotated[Path, typer.Option("--out", "-o", metavar="RUN", help="Run folder to write.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="tokenizer=…, size=…, image_heads=…, text_heads=…, lateral=2,4,6, truncation=…"
        ),
    ] = None,
) -> None:
    """Convert a released LilT or MS-CLIP checkpoint into a run folder, without executing its pickle.

    Options are needed only where the file is ambiguous: tokenizer=pip:NAME, hf:NAME or file:FOLDER (default: by
    vocabulary size); size=PIXELS; image_heads=N and text_heads=N; for msclip lateral=2,4,6,8,10 (layers with a lateral
    adapter) and truncation=keep_eos or drop_eos (the released code's).
    """
    from clasp.commands.import_checkpoint import import_checkpoint
    from clasp.convert.importers.run_writer import parse_import_options
    from clasp.report.console import format_megabytes, print_status, relative_path
    from clasp.report.terminal import print_parameter_counts

    parsed = parse_import_options(options or ())
    report = import_checkpoint(kind, checkpoint, run, parsed).report
    for line in report.lines:
        print_status(line)
    print_parameter_counts(report.counts)
    where = relative_path(run)
    typed = shlex.quote(where)
    print_status(f"the run is in {where} (delta {format_megabytes(report.delta_bytes)}, card README.md there)")
    print_status(f'index and search with: clasp index {typed} FOLDER  then: clasp search {typed} "your words"')


@app.command()
def export(
    run: _RunArgument,
    target: Annotated[str, typer.Option("--to", metavar="FORMAT", help="onnx | merged | sentence-transformers | hub")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to write.")],
    int8: Annotated[bool, typer.Option("--int8", help="onnx: also graphs with int8 weights; prints the loss.")] = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="USER/NAME", help="hub: also upload the folder as this repository.")
    ] = None,
    as_json: _JsonOption = False,
) -> None:
    """Write the model of a run in the format of another library, compared with the run on real inputs.

    onnx: both towers as graphs that run without torch; merged: folders of transformers, tuning folded into the weights;
    sentence-transformers: a folder for SentenceTransformer(OUT); hub: a repository that clasp.load loads.
    """
    from clasp.commands.export import export_run
    from clasp.convert.exporters.job import ExportOptions
    from clasp.report.console import print_json, print_status, relative_path

    options = ExportOptions(quantize="int8" if int8 else None, push=push)
    report = export_run(run, target, out, options, say=print_status)
    if as_json:
        print_json({"run": str(run), "to": target, "out": str(out), **report.facts})
        return
    for line in report.lines:
        print_status(line)
    print_status(f"the model is in {relative_path(out)}")


@app.command()
def index(
    run: _RunArgument,
    source: Annotated[
        str,
        typer.Argument(metavar="FOLDER|PAIRS", help="A folder of images, or pairs as for clasp train."),
    ],
    store: Annotated[
        str | None,
        typer.Option(
            "--store",
            metavar="STORE",
            help="Engine of a new index: flat, edge, or http://HOST:6333/COLLECTION. Default: by size.",
        ),
    ] = None,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="I/N", help="Encode part I of N; the process that ends last merges them."),
    ] = None,
    merge: Annotated[
        int | None,
        typer.Option("--merge", metavar="N", min=1, help="Merge N finished parts; after a failed merge."),
    ] = None,
    allow_code: _AllowCodeOption = False,
) -> None:
    """Embed images into RUN/index; a second call embeds only new and changed files."""
    from clasp.commands.index_parts import index_part, merge_parts
    from clasp.commands.search import index_images
    from clasp.report.console import print_status, progress_bar, relative_path
    from clasp.search.parts import parse_part
    from clasp.types import UserError

    if part is not None and merge is not None:
        raise UserError(f"--part {part} and --merge {merge}: one at a time; the last part merges by itself")
    with _allow_code(allow_code):
        if part is not None:
            done = index_part(run, source, parse_part(part), store=store, bar=progress_bar, say=print_status)
        elif merge is not None:
            done = merge_parts(run, source, merge, store=store, bar=progress_bar, say=print_status)
        else:
            done = index_images(run, source, bar=progress_bar, store=store, say=print_status)
    if done is None:
        return
    print_status(str(done))
    print_status(f'search them with: clasp search {shlex.quote(relative_path(run))} "your words"')


@app.command()
def watch(
    run: _RunArgument,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder of images that changes.")],
) -> None:
    """Keep the index as FOLDER is: index what is new, drop what is gone, until Ctrl-C; clasp serve follows."""
    from clasp.commands.watch import WatchSettings, watch_folder
    from clasp.report.console import print_status, progress_bar

    watch_folder(run, folder, WatchSettings(), say=print_status, bar=progress_bar)


@app.command()
def search(
    run: _RunArgument,
    words: Annotated[str | None, typer.Argument(metavar="WORDS", help="Text query.")] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="Image query; with WORDS, the mean of both embeddings.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of hits.")] = 10,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="FIELD=VALUE", help="Filter: folder=…, caption~…, year>=2020; repeatable."),
    ] = None,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="PNG contact sheet of the hits. Default: RUN/search.png.")
    ] = None,
    as_json: _JsonOption = False,
    allow_code: _AllowCodeOption = False,
) -> None:
    """Search RUN/index by text, by image, or by both; hits by cosine similarity, near-duplicates as one.

    A term after a minus sign is subtracted: "beach -people"; in double quotes a minus sign is literal.
    """
    from clasp.commands.warm_search import search_warm_server
    from clasp.report.console import print_json, print_status, print_table, relative_path

    found = search_warm_server(run, words, image, k, where or (), sheet)
    if found is None:
        from clasp.commands.search import search_images

        with _allow_code(allow_code):
            found = search_images(run, words, image, k, where or (), sheet).found()
    if as_json:
        print_json({"query": found.query, **found.answer, "sheet": str(found.sheet)})
        return
    print_table(found.query, ("id", "cosine", "z", "image"), [_hit_cells(hit) for hit in found.answer["hits"]])
    if found.answer["note"]:
        print_status(found.answer["note"])
    print_status(f"picture of the hits: {relative_path(found.sheet)}")


@app.command()
def serve(
    run: _RunArgument,
    pictures: Annotated[
        str | None, typer.Option("--pictures", metavar="FOLDER|PAIRS", help="Index these first, as clasp index does.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address; other than of this machine only with a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option("--port", help="Port; 0 takes any free one.")] = 8000,
    token: Annotated[
        str, typer.Option("--token", envvar="CLASP_TOKEN", help="Token that every request must send.")
    ] = "",
    hosts: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Further name of the server, behind a proxy; repeatable."),
    ] = None,
    allow_code: _AllowCodeOption = False,
) -> None:
    """Serve a search page and an HTTP API over RUN/index; nothing leaves the machine.

    Needs the extra: pip install 'clasp-vl[serve]'.
    """
    from clasp.commands.serve import ServeSettings, serve_run
    from clasp.report.console import print_status, progress_bar

    settings = ServeSettings(host, port, token, hosts or ())
    with _allow_code(allow_code):
        serve_run(run, pictures, settings, say=print_status, bar=progress_bar)


@store_app.command("copy")
def store_copy(
    run: _RunArgument,
    target: Annotated[
        str,
        typer.Option("--to", metavar="STORE", help="flat, edge, or http://HOST:6333/COLLECTION."),
    ],
) -> None:
    """Move the index of a run to another store engine; the earlier one is deleted after the two have been compared."""
    from clasp.commands.store_copy import copy_index
    from clasp.report.console import print_status, progress_bar

    done = copy_index(run, target, bar=progress_bar)
    print_status(f"{done.entries:,} entries moved from {done.source} to {done.target}")


@store_app.command("export")
def store_export(
    run: _RunArgument,
    folder: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="A new folder.")],
) -> None:
    """Write the index of a run as clip-retrieval does: img_emb/img_emb_*.npy and metadata/metadata_*.parquet."""
    from clasp.commands.store_exchange import export_index
    from clasp.report.console import print_status, progress_bar

    print_status(f"{export_index(run, folder, bar=progress_bar):,} entries are in {folder}")


@store_app.command("import")
def store_import(
    run: _RunArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder with img_emb and metadata.")],
    store: Annotated[str | None, typer.Option("--store", metavar="STORE", help="As for clasp index.")] = None,
) -> None:
    """Add embeddings in clip-retrieval's layout to the index; those of another model are refused."""
    from clasp.commands.store_exchange import import_index
    from clasp.report.console import print_status, progress_bar

    done = import_index(run, folder, store=store, bar=progress_bar, say=print_status)
    print_status(f"{done.added:,} entries added; {done.unreadable:,} left out, whose image cannot be read")


def _hit_cells(hit: dict[str, Any]) -> list[str]:
    from clasp.report.console import relative_path

    copies = f" (+{len(hit['duplicates'])} nearly the same)" if hit["duplicates"] else ""
    z = "" if hit["z"] is None else f"{hit['z']:.1f}"
    return [hit["id"], f"{hit['score']:.3f}", z, relative_path(hit["meta"]["name"]) + copies]


def _allow_code(any_code: bool, names: Collection[str] = ()) -> AbstractContextManager[None]:
    """A block in which a run may import the Python code that it names: any, or these names."""
    from clasp.training.run_code import allow_code

    return allow_code(None if any_code else names)


def main() -> None:
    """The entry point: turns a ``UserError`` into one line and exit code 2."""
    _replace_closed_streams()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name that is not UTF-8 is printed escaped, as to sys.stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except _UsageError as error:
        _print_usage_error(error)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        from clasp.types import UserError  # here, since it imports torch

        system = isinstance(error, OSError) and error.errno in _USER_ERRNOS
        if not system and not isinstance(error, UserError):
            raise
        from clasp.report.console import print_error

        print_error(_describe_system_error(error) if isinstance(error, OSError) else str(error))
        sys.exit(2)


_UsageError: Any = typer.BadParameter.__mro__[1]  # typer names its subclasses only


def _print_usage_error(error: Any) -> None:
    """An argument that is missing or unknown, in one line; without arguments, the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return error.show()
    from clasp.report.console import print_error

    command = error.ctx.command_path if error.ctx is not None else "clasp"
    print_error(f"{' '.join(error.format_message().split()).rstrip('.')}; for what it takes: {command} --help")


# errors of the disk and of its owner: no bug of ours, wherever they come from
_USER_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def _describe_system_error(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk ({error})"
    return f"{error.filename or 'a file'} cannot be read or written: {error.strerror}"


def _replace_closed_streams() -> None:
    """Standard streams that were closed by whoever started the command are ``None`` in Python."""
    for stream in ("stdout", "stderr"):
        if vars(sys)[stream] is None:
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))


class _PrintableFormatter(logging.Formatter):
    """Escapes control characters: warnings contain file and sample names."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        from clasp.report.console import printable

        return printable(super().formatMessage(record))


def _train(recipe: Any, run: Path, *, resume: bool) -> None:
    from clasp.commands.train import train_recipe
    from clasp.report.console import format_megabytes, print_status, progress_bar, relative_path
    from clasp.report.terminal import print_results, terminal_reporter
    from clasp.training.run_folder import RunFolder

    where, reporter = relative_path(run), terminal_reporter()
    try:
        done = train_recipe(recipe, run, say=print_status, bar=progress_bar, reporter=reporter, resume=resume)
    except KeyboardInterrupt:  # the loop handles the first Ctrl-C itself: this was before its first step, or a second
        if RunFolder(run).has_state:
            print_status(
                f"stopped at once; what was done after the last saved state is lost: resume from it with: clasp resume "
                f"{shlex.quote(where)}"
            )
        else:
            print_status(
                "stopped before training: run the same command again; features cached so far are not computed twice"
            )
        sys.exit(130)
    typed = shlex.quote(where)
    if done.fitted.interrupted:
        print_status(f"interrupted, state saved; resume with: clasp resume {typed}")
        sys.exit(130)
    print_results("validation pairs", done.results, "results.jsonl and README.md in the run folder")
    print_status(f"cost: {done.cost}")
    print_status(f"the run is in {where} (delta {format_megabytes(done.delta_bytes)}, card README.md there)")
    print_status(_next_commands(typed, recipe.data.train))


def _next_commands(typed: str, source: str) -> str:
    """How to index and search with a run; where it was trained on a packaged sample, any folder of images."""
    images = "FOLDER" if source.startswith("sample:") else shlex.quote(source)
    return f'index and search with: clasp index {typed} {images}  then: clasp search {typed} "your words"'


def _climb(recipe: Any, run: Path) -> None:
    """Train a recipe with [auto], or resume (``None``) the climb in ``run``."""
    from clasp.commands.auto import AutoCallbacks, climb, resume_climb
    from clasp.report.auto_table import auto_table
    from clasp.report.console import print_status, print_table, progress_bar, relative_path
    from clasp.report.terminal import terminal_reporter

    callbacks = AutoCallbacks(print_status, progress_bar, terminal_reporter)
    done = resume_climb(run, callbacks) if recipe is None else climb(recipe, run, callbacks)
    where, plan = relative_path(run), done.plan
    table = auto_table(plan)
    if plan.rows:
        print_table(where, table.columns, table.cells, table.notes)
    kept = f"kept: stages/{plan.best}, in {where}" if plan.best else "no stage had ended, so nothing is kept"
    if done.interrupted:
        print_status(f"interrupted; {kept}; go on with: clasp resume {shlex.quote(where)}")
        sys.exit(130)
    print_status(f"{kept} ({plan.seconds:,.0f} s; card README.md there)")
    print_status(_next_commands(shlex.quote(where), str(plan.recipe["data"]["train"])))


def _sweep(source: str, overrides: Sequence[str], grid: Sequence[str], runs: Path, name: str | None) -> None:
    from clasp.commands.sweep import sweep
    from clasp.config.grid import GridSpec
    from clasp.report.console import print_status, print_table, progress_bar, relative_path
    from clasp.report.terminal import terminal_reporter
    from clasp.types import UserError

    made = GridSpec(source, overrides, grid)
    done = sweep(made, runs, name, say=print_status, bar=progress_bar, reporter=terminal_reporter)
    title = f"{relative_path(done.folder)}: {len(done.rows)} of {done.combinations} runs"
    print_table(title, done.columns, done.cells, done.notes)
    if done.stopped:
        print_status("interrupted, state saved; resume with the same command")
        sys.exit(130)
    if not done.finished:
        raise UserError(f"no run of {done.folder} finished; the first: {done.rows[0].error}")
    for line in done.summary_lines():
        print_status(line)
    best = shlex.quote(relative_path(done.finished[0].run))
    print_status(
        f'use it next: clasp eval {best} retrieval data=…  or: clasp index {best} FOLDER  then: clasp search {best} "…"'
    )


def _free_path(runs: Path, stem: str) -> Path:
    return next(path for n in range(1, 10_000) if not (path := runs / (stem if n == 1 else f"{stem}-{n}")).exists())
