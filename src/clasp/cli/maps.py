"""The verb maps: where in an image a caption and its words are found."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from clasp.cli.app import AllowCodeOption, JsonOption, RunArgument, app, code_allowed
from clasp.errors import counted
from clasp.evaluation.options import MAP_OPTIONS, describe_option, parse_options
from clasp.training.run_files import require_folder

_MAPS_HELP = escape("\n".join(map(describe_option, MAP_OPTIONS)))


@app.command(epilog=_MAPS_HELP)
def maps(
    run: RunArgument,
    options: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Options, listed below.")] = None,
    as_json: JsonOption = False,
    allow_code: AllowCodeOption = False,
) -> None:
    """Draw where in some images their captions and single words are found, into RUN/maps.png; nothing is measured.

    Each map is the similarity of every patch to a text; beside these, where the image tower has a class token, its
    attention.
    """
    parse_options("maps", MAP_OPTIONS, options or ())
    require_folder(run)
    from clasp.commands.patch_maps import MAPS_FILE, map_patches
    from clasp.report.console import print_json, print_status, progress_bar, relative_path

    with code_allowed(allow_code):
        found = map_patches(run, options or (), bar=progress_bar)
    if as_json:
        pairs = [{"id": id, **of_pair.to_dict()} for id, of_pair in found.items()]
        return print_json({"run": str(run), "pairs": pairs})
    chosen = any(option.startswith("words=") for option in options or ())
    hint = "" if chosen else "; words=dog,grass maps these in place of each caption's longest"
    print_status(f"maps of {counted(len(found), 'image')} in {relative_path(run / MAPS_FILE)}{hint}")
