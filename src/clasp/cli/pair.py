"""The verb pair: towers ranked before training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from clasp.cli.app import JsonOption, OverridesArgument, app
from clasp.config.recipe_files import require_single_keys
from clasp.errors import counted

_OVERRIDE = re.compile(r"\w+(\.\w+)+=")


class SeveralValues(TyperCommand):
    """A command whose options take several values: ``--image A B`` is ``--image A --image B``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeat_option_names(args, ("--image", "--text")))


def repeat_option_names(args: Sequence[str], names: Sequence[str]) -> list[str]:
    """The arguments with the name of an option before each of its values, up to the next option or override."""
    repeated: list[str] = []
    current = ""
    for arg in args:
        if arg.startswith("-"):
            current = arg if arg in names else ""
        elif _OVERRIDE.match(arg):
            current = ""
        elif current and repeated[-1] != current:
            repeated.append(current)
        repeated.append(arg)
    return repeated


@app.command(cls=SeveralValues)
def pair(
    images: Annotated[
        list[str], typer.Option("--image", metavar="TOWER…", help="Image towers, as for image.tower of a recipe.")
    ],
    texts: Annotated[
        list[str], typer.Option("--text", metavar="TOWER…", help="Text towers, as for text.tower of a recipe.")
    ],
    overrides: OverridesArgument = None,
    as_json: JsonOption = False,
) -> None:
    """Rank pairs of towers before training: heads in closed form, mutual k-NN and CKA of their layers.

    clasp pair --image A B --text X Y data.train=FOLDER. Every tower runs once over the pairs; its features are cached,
    and clasp train auto goes on from them.
    """
    require_single_keys(overrides or ())
    from clasp.commands.pair import rank_tower_pairs
    from clasp.report.console import print_json, print_status, print_table, progress_bar
    from clasp.report.pair_table import pair_layer_table, pair_ranks, pair_table

    found = rank_tower_pairs(images, texts, overrides or (), say=print_status, bar=progress_bar)
    if as_json:
        ranked = [
            {"rank": int(rank.rstrip("=")), "tied": "=" in rank, **asdict(pair), "command": pair.command}
            for rank, pair in zip(pair_ranks(found), found, strict=True)
        ]
        return print_json({"pairs": ranked})
    combinations, layers, table = counted(len(found), "combination"), pair_layer_table(found), pair_table(found)
    print_table(f"layers of {combinations} of towers", layers.columns, layers.rows, layers.notes)
    print_table(f"{combinations} of towers, the best first", table.columns, table.rows, table.notes)
