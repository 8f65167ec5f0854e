"""Verbs of other formats: import of released checkpoints, export of a run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from clasp.cli.app import AllowCodeOption, JsonOption, RunArgument, app, code_allowed
from clasp.training.run_files import require_folder


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
    run: RunArgument,
    target: Annotated[str, typer.Option("--to", metavar="FORMAT", help="onnx | merged | sentence-transformers | hub")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder to write.")],
    int8: Annotated[bool, typer.Option("--int8", help="onnx: also graphs with int8 weights; prints the loss.")] = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="USER/NAME", help="hub: also upload the folder as this repository.")
    ] = None,
    as_json: JsonOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Write the model of a run in the format of another library, compared with the run on real inputs.

    onnx: both towers as graphs that run without torch; merged: folders of transformers, tuning folded into the weights;
    sentence-transformers: a folder for SentenceTransformer(OUT); hub: a repository that clasp.load loads.
    """
    require_folder(run)
    from clasp.commands.export import export_run
    from clasp.convert.exporters.job import ExportOptions
    from clasp.report.console import print_json, print_status, relative_path

    options = ExportOptions(quantize="int8" if int8 else None, push=push)
    with code_allowed(allow_code):
        report = export_run(run, target, out, options, say=print_status)
    if as_json:
        print_json({"run": str(run), "to": target, "out": str(out), **report.facts})
        return
    for line in report.lines:
        print_status(line)
    print_status(f"the model is in {relative_path(out)}")
