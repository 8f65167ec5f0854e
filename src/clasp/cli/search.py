"""Verbs of an index: index, watch, search, serve."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from clasp.cli.app import AllowCodeOption, JsonOption, RunArgument, app, code_allowed
from clasp.cli.server_search import parse_plain_search, print_found
from clasp.errors import UserError
from clasp.training.run_files import require_folder


@app.command()
def index(
    run: RunArgument,
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
    allow_code: AllowCodeOption = False,
) -> None:
    """Embed images into RUN/index; a second call embeds only new and changed files."""
    require_folder(run)
    from clasp.commands.index_parts import index_part, merge_parts
    from clasp.commands.search import index_images
    from clasp.report.console import print_status, progress_bar, relative_path
    from clasp.search.parts import parse_part

    if part is not None and merge is not None:
        raise UserError(f"--part {part} and --merge {merge}: one at a time; the last part merges by itself")
    with code_allowed(allow_code):
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
    run: RunArgument,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder of images that changes.")],
    allow_code: AllowCodeOption = False,
) -> None:
    """Keep the index as FOLDER is: index what is new, drop what is gone, until Ctrl-C; clasp serve follows."""
    require_folder(run)
    from clasp.commands.watch import WatchSettings, watch_folder
    from clasp.report.console import print_status, progress_bar

    with code_allowed(allow_code):
        watch_folder(run, folder, WatchSettings(), say=print_status, bar=progress_bar)


@app.command()
def search(
    run: RunArgument,
    words: Annotated[str | None, typer.Argument(metavar="WORDS", help="Text query.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", help="Image query; with WORDS or further images, the mean of all; repeatable."),
    ] = None,
    image_weight: Annotated[
        list[float] | None,
        typer.Option("--image-weight", help="Weight of an image, one for each in order; below 0 it is subtracted."),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Number of hits.")] = 10,
    where: Annotated[
        list[str] | None,
        typer.Option("--where", metavar="FIELD=VALUE", help="Filter: folder=…, camera~…, date>=2020-01; repeatable."),
    ] = None,
    only_close: Annotated[
        bool, typer.Option("--only-close", help="Leave out hits below the line, where nothing is close; needs WORDS.")
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option("--sheet", help="PNG contact sheet of the hits. Default: RUN/search.png.")
    ] = None,
    as_json: JsonOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Search RUN/index by text, by images, or by both; hits by cosine similarity, near-duplicates as one.

    A term after a minus sign is subtracted: "beach -people". A number after a caret is the weight of its term: 'beach
    "red umbrella"^0.5', "dog^-1". In double quotes both are literal.
    """
    require_folder(run)
    from clasp.commands.warm_search import search_warm_server
    from clasp.search.image_weights import weigh_images

    images = weigh_images(image or [], image_weight or [], "--image-weight")
    found = None
    if parse_plain_search(sys.argv[1:]) is None:  # of a plain search the server was asked before
        found = search_warm_server(run, words, images, k, where or (), sheet, only_close)
    if found is None:
        from clasp.commands.search import search_images

        with code_allowed(allow_code):
            found = search_images(run, words, images, k, where or (), sheet, only_close).found()
    print_found(run, found, as_json=as_json)


@app.command()
def serve(
    run: RunArgument,
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
    uploads: Annotated[
        Path | None,
        typer.Option("--uploads", metavar="FOLDER", help="Let requests add images, saved here, and delete entries."),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option("--engine", help="torch, onnx or onnx-int8 (the last two without torch). Default: by the folder."),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="OUT", help="Embed queries with this ONNX export of RUN. Default: RUN itself."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes, each with the model in memory.")] = 1,
    allow_code: AllowCodeOption = False,
) -> None:
    """Serve a search page and an HTTP API over RUN/index; nothing leaves the machine.

    RUN may be an ONNX export. Needs the extra: pip install 'clasp-vl[serve]'.
    """
    require_folder(run)
    from clasp.commands.serve import ServeSettings, serve_run
    from clasp.report.console import print_status, progress_bar

    settings = ServeSettings(host, port, token, hosts or (), uploads, engine, model, workers, allow_code)
    with code_allowed(allow_code):
        serve_run(run, pictures, settings, say=print_status, bar=progress_bar)
