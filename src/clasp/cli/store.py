"""Verbs of a store: store copy, store export, store import."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clasp.cli.app import AllowCodeOption, RunArgument, app, code_allowed
from clasp.errors import counted
from clasp.training.run_files import require_folder

store_app = typer.Typer(
    help="Move the index of a run to another store, export it, import embeddings.", no_args_is_help=True
)
app.add_typer(store_app, name="store")


@store_app.command("copy")
def store_copy(
    run: RunArgument,
    target: Annotated[
        str,
        typer.Option("--to", metavar="STORE", help="flat, edge, or http://HOST:6333/COLLECTION."),
    ],
    allow_code: AllowCodeOption = False,
) -> None:
    """Move the index of a run to another store engine; the earlier one is deleted after the two have been compared."""
    require_folder(run)
    from clasp.commands.store_copy import copy_index
    from clasp.report.console import print_status, progress_bar

    with code_allowed(allow_code):
        done = copy_index(run, target, bar=progress_bar)
    print_status(f"{counted(done.entries, 'entry')} moved from {done.source} to {done.target}")


@store_app.command("export")
def store_export(
    run: RunArgument,
    folder: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="A new folder.")],
    allow_code: AllowCodeOption = False,
) -> None:
    """Write the index of a run as clip-retrieval does: img_emb/img_emb_*.npy and metadata/metadata_*.parquet."""
    require_folder(run)
    from clasp.commands.store_exchange import export_index
    from clasp.report.console import print_status, progress_bar

    with code_allowed(allow_code):
        exported = export_index(run, folder, bar=progress_bar)
    print_status(f"{counted(exported, 'entry')} in {folder}")


@store_app.command("import")
def store_import(
    run: RunArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder with img_emb and metadata.")],
    store: Annotated[str | None, typer.Option("--store", metavar="STORE", help="As for clasp index.")] = None,
    allow_code: AllowCodeOption = False,
) -> None:
    """Add embeddings in clip-retrieval's layout to the index; those of another model are refused."""
    require_folder(run)
    from clasp.commands.store_exchange import import_index
    from clasp.report.console import print_status, progress_bar

    with code_allowed(allow_code):
        done = import_index(run, folder, store=store, bar=progress_bar, say=print_status)
    print_status(f"{counted(done.added, 'entry')} added; {done.unreadable:,} left out, whose image cannot be read")
