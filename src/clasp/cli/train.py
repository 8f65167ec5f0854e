"""Verbs that train, and what can be read before training: demo, params, doctor, train, resume.

Long, since help texts are a third of it, and what ``train`` and ``resume`` print at their end is one.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from clasp.cli.app import AllowCodeOption, JsonOption, OverridesArgument, RecipeArgument, RunArgument, app, code_allowed
from clasp.cli.recipe_arguments import (
    read_recipe_files,
    read_typed_recipe,
    require_pairs,
    require_run_name,
)
from clasp.commands.launch import is_launched
from clasp.config.recipe_files import require_single_keys
from clasp.errors import UserError, counted
from clasp.training.run_files import PLAN_FILE, require_folder

_ProcessesOption = Annotated[
    int, typer.Option("--processes", metavar="N", min=1, help="Processes that train together, one a GPU or core.")
]


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
        from clasp.cli.search import serve

        serve(folder)


@app.command()
def params(recipe: RecipeArgument, overrides: OverridesArgument = None, as_json: JsonOption = False) -> None:
    """Trainable and total parameters per part; builds shapes only, works offline.

    Only an hf: tower that no built-in recipe uses needs its config.json, from the local cache or the hub.
    """
    made = read_typed_recipe(recipe, overrides or ())
    from clasp.commands.params import count_parameters
    from clasp.report.console import print_json
    from clasp.report.terminal import print_parameter_counts

    report = count_parameters(made)
    if as_json:
        print_json(report.to_dict())
    else:
        print_parameter_counts(report.counts, report.sharing)


@app.command()
def doctor(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Train a few steps; forecast seconds, memory, disk and energy.")
    ] = False,
) -> None:
    """Check the data; report frozen blocks, feature-cache size and number of steps, without training.

    Exit code 2 if training would stop on this data.
    """
    made = require_pairs(read_typed_recipe(recipe, overrides or ()))
    from clasp.commands.doctor import diagnose, raise_on_stop
    from clasp.report.console import print_json, print_lines, progress_bar

    sections = []
    for section in diagnose(made, bar=progress_bar, measured=measure):
        sections.append(section)
        for finding in section.findings if not as_json else ():
            print_lines([finding])
            if finding.fix:
                print_lines([f"      to mend it: {_doctor_with(recipe, overrides or (), finding.fix, measure)}"])
    findings = [finding for section in sections for finding in section.findings]
    if as_json:
        about = {section.about: section.facts for section in sections}
        print_json({**about, "findings": [asdict(finding) for finding in findings]})
    raise_on_stop(sections)


def _doctor_with(recipe: str, overrides: Sequence[str], fix: Sequence[str], measure: bool) -> str:
    """The same command with these overrides in place of its own of the same keys."""
    keys = {override.partition("=")[0] for override in fix}
    kept = [override for override in overrides if override.partition("=")[0].strip() not in keys]
    return shlex.join(["clasp", "doctor", recipe, *kept, *fix, *(["--measure"] if measure else [])])


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the run folder. Default: the name of the recipe, numbered.")
    ] = None,
    runs: Annotated[Path, typer.Option("--runs", help="Parent folder of the run folders.")] = Path("runs"),
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", metavar="KEY=V,V", help="Sweep a key, e.g. train.lr=1e-3,3e-3; repeatable."),
    ] = None,
    minutes: Annotated[
        str | None,
        typer.Option(
            "--minutes",
            metavar="N",
            help="Wall time of a recipe with [auto]: start, auto. About 0.5 minutes are needed on two cores.",
        ),
    ] = None,
    steps: Annotated[
        str | None, typer.Option("--steps", metavar="N", help="Gradient steps in place of minutes: repeatable bitwise.")
    ] = None,
    processes: _ProcessesOption = 1,
) -> None:
    """Train a recipe on image-text pairs; writes a run folder: trained tensors (delta), log, results, cost, model card.

    data.train=FOLDER names the pairs: a folder, .csv, .tsv, .jsonl, .parquet or tar shards.

    With --grid, one run per combination of values; runs share the feature cache and are ranked by validation.

    With --processes, or started by torchrun, several processes compute the gradient of the same batches.
    """
    budget = {key: text for key, text in (("minutes", minutes), ("steps", steps)) if text is not None}

    def read() -> Any:
        require_run_name(runs, name)
        if grid:
            return _check_swept(recipe, overrides or (), budget)
        return require_pairs(read_typed_recipe(recipe, overrides or (), budget))

    made = None if is_launched() else read()
    from clasp.training.distributed import open_processes

    with open_processes() as together:
        with together.alike():
            made = read() if is_launched() else made
            count = max(processes, together.size)
            if count > 1 and (made is None or made.auto is not None):
                what = "--grid" if made is None else f"the recipe {recipe!r}, which has [auto],"
                raise UserError(f"{what} trains one run after another on one process, not on {count}")
        if made is None:
            return _sweep(recipe, overrides or (), grid or (), runs, name)
        run = runs / name if name else together.first(lambda: _free_path(runs, Path(recipe).stem))
        if made.auto is not None:
            return _climb(made, run)
        if processes > 1:
            typed = ["train", recipe, *(overrides or ()), "--name", run.name, "--runs", str(runs)]
            return _launch(processes, typed, run)
        _train(made, run, together, resume=_is_restarted(run, name, together))


def _check_swept(recipe: str, overrides: Sequence[str], budget: Mapping[str, str]) -> None:
    """Raises ``UserError`` for files of a recipe that cannot be read, and for a budget, which a grid has not."""
    if budget:
        raise UserError("--minutes and --steps are for one recipe with [auto], not for --grid")
    read_recipe_files(recipe, overrides)


@app.command()
def resume(
    run: RunArgument,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Only train.trackers can change.")
    ] = None,
    allow_code: AllowCodeOption = False,
    processes: _ProcessesOption = 1,
) -> None:
    """Resume an interrupted run from its saved state: same batches, same weights as without the interruption.

    With another number of processes: same batches, same weights to rounding.
    """
    require_single_keys(overrides or ())
    if not is_launched():
        require_folder(run)
    from clasp.training.distributed import open_processes

    with code_allowed(allow_code), open_processes() as together:
        with together.alike():
            climbed = (run / PLAN_FILE).exists()
            if climbed and overrides:
                raise UserError(f"{run} was trained with [auto], whose stages cannot change: {overrides[0]}")
            if climbed and max(processes, together.size) > 1:
                raise UserError(f"{run} was trained with [auto], on one process; leave --processes out")
        if climbed:
            return _climb(None, run)
        made, typed = together.first(lambda: _read_run(run, overrides or ()))
        with code_allowed(allow_code, typed):
            if processes > 1:
                allowed = ["--allow-code"] if allow_code else []
                return _launch(processes, ["resume", str(run), *(overrides or ()), *allowed], run)
            _train(made, run, together, resume=True)


def _read_run(run: Path, overrides: Sequence[str]) -> tuple[Any, set[str]]:
    """The recipe of a run with other trackers, and the names of these."""
    from clasp.config.recipe import recipe_from_dict
    from clasp.training.run_folder import RunFolder

    written = recipe_from_dict(RunFolder(run).recipe(), str(run / "recipe.toml"))
    made = written.with_overrides(overrides)
    return made, set(made.train.trackers) if made.train.trackers != written.train.trackers else set()


def _launch(count: int, arguments: Sequence[str], run: Path) -> None:
    """The same command in several processes; ends with their exit code."""
    from clasp.commands.launch import launch_processes, require_processes
    from clasp.training.interrupt import INTERRUPTED_EXIT_CODE

    require_processes(count)
    ended = launch_processes(count, arguments)
    if ended.code == INTERRUPTED_EXIT_CODE and not ended.reported:
        _say_stopped(run)
    if ended.code:
        sys.exit(ended.code)


def _is_restarted(run: Path, name: str | None, together: Any) -> bool:
    """Whether torchrun has restarted the processes after a failure, and there is a state to resume from."""
    from clasp.training.run_folder import RunFolder

    if together.restarts and name is None:
        with together.alike():
            raise UserError("--max-restarts of torchrun needs --name, so that the same run goes on")
    return together.restarts > 0 and together.first(lambda: RunFolder(run).has_state)


def _train(recipe: Any, run: Path, together: Any, *, resume: bool) -> None:
    from clasp.commands.launch import begin_to_report
    from clasp.commands.run_context import Preloaded
    from clasp.commands.train import train_recipe
    from clasp.report.console import format_megabytes, print_status, progress_bar, relative_path
    from clasp.report.tables import selection_note
    from clasp.report.terminal import print_results, terminal_reporter
    from clasp.training.interrupt import INTERRUPTED_EXIT_CODE

    given = Preloaded(processes=together)
    if not together.is_first:
        return _train_beside(recipe, run, given, resume=resume)
    where, reporter = relative_path(run), terminal_reporter()
    try:
        done = train_recipe(
            recipe, run, say=print_status, bar=progress_bar, reporter=reporter, resume=resume, preloaded=given
        )
    except KeyboardInterrupt:  # the loop handles the first Ctrl-C itself: this was before its first step, or a second
        begin_to_report()
        _say_stopped(run)
        sys.exit(INTERRUPTED_EXIT_CODE)
    typed = shlex.quote(where)
    if done.fitted.interrupted:
        begin_to_report()
        print_status(f"interrupted, state saved; resume with: clasp resume {typed}")
        sys.exit(INTERRUPTED_EXIT_CODE)
    more_in, notes = "results.jsonl and README.md in the run folder", selection_note(done.candidates)
    print_results("validation pairs", done.results, more_in, notes)
    print_status(f"cost: {done.cost}")
    print_status(f"the run is in {where} (delta {format_megabytes(done.delta_bytes)}, card README.md there)")
    print_status(_next_commands(typed, recipe.data.train))


def _say_stopped(run: Path) -> None:
    """One line about a run that was stopped before its first step, or at once."""
    from clasp.report.console import print_status, relative_path
    from clasp.training.run_folder import RunFolder

    if RunFolder(run).has_state:
        print_status(
            f"stopped at once; what was done after the last saved state is lost: resume from it with: clasp resume "
            f"{shlex.quote(relative_path(run))}"
        )
    else:
        print_status(
            "stopped before training: run the same command again; features cached so far are not computed twice"
        )


def _train_beside(recipe: Any, run: Path, given: Any, *, resume: bool) -> None:
    """Train as one of the processes that report nothing but errors of their own."""
    from clasp.commands.train import train_recipe
    from clasp.training.interrupt import INTERRUPTED_EXIT_CODE

    try:
        done = train_recipe(recipe, run, say=lambda line: None, resume=resume, preloaded=given)
        interrupted = done.fitted.interrupted
    except KeyboardInterrupt:
        interrupted = True
    if interrupted:
        given.processes.end_after_first(INTERRUPTED_EXIT_CODE)


def _next_commands(typed: str, source: str) -> str:
    """How to index and search with a run; where it was trained on a packaged sample, any folder of images."""
    images = "FOLDER" if source.startswith("sample:") else shlex.quote(source)
    return f'index and search with: clasp index {typed} {images}  then: clasp search {typed} "your words"'


def _climb(recipe: Any, run: Path) -> None:
    """Train a recipe with [auto], or resume (``None``) the climb in ``run``."""
    from clasp.commands.auto import climb, resume_climb
    from clasp.commands.auto_stages import AutoCallbacks
    from clasp.report.auto_table import auto_table
    from clasp.report.console import print_status, print_table, progress_bar, relative_path
    from clasp.report.terminal import terminal_reporter
    from clasp.training.interrupt import INTERRUPTED_EXIT_CODE

    callbacks, where = AutoCallbacks(print_status, progress_bar, terminal_reporter), relative_path(run)
    try:
        done = resume_climb(run, callbacks) if recipe is None else climb(recipe, run, callbacks)
    except KeyboardInterrupt:  # before the first stage, or while the best one was copied
        if not (run / PLAN_FILE).exists():
            raise
        print_status(f"stopped at once; go on with: clasp resume {shlex.quote(where)}")
        sys.exit(INTERRUPTED_EXIT_CODE)
    plan = done.plan
    table = auto_table(plan)
    if plan.rows:
        print_table(where, table.columns, table.cells, table.notes)
    kept = (
        f"kept: stages/{plan.best}, in {where}"
        if plan.best
        else "no stage had ended; heads that were tried are not tried again"
    )
    if done.interrupted:
        print_status(f"interrupted; {kept}; go on with: clasp resume {shlex.quote(where)}")
        sys.exit(INTERRUPTED_EXIT_CODE)
    print_status(f"{kept} ({plan.seconds:,.0f} s; card README.md there)")
    print_status(_next_commands(shlex.quote(where), str(plan.recipe["data"]["train"])))


def _sweep(source: str, overrides: Sequence[str], grid: Sequence[str], runs: Path, name: str | None) -> None:
    from clasp.commands.sweep import sweep
    from clasp.config.grid import GridSpec
    from clasp.report.console import print_status, print_table, progress_bar, relative_path
    from clasp.report.terminal import terminal_reporter

    made = GridSpec(source, overrides, grid)
    done = sweep(made, runs, name, say=print_status, bar=progress_bar, reporter=terminal_reporter)
    title = f"{relative_path(done.folder)}: {len(done.rows)} of {counted(done.combinations, 'run')}"
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
