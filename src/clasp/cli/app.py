"""The program's root command and the arguments that several verbs take.

Output: ``app``, to which every module of this package adds its verbs when it is imported (``verbs``).
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated

import typer

from clasp.commands.environment import configure_environment

configure_environment()  # before a verb imports torch

app = typer.Typer(
    help="Align a pre-trained image encoder and a pre-trained text encoder into a CLIP-style model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _verbs() -> None:
    """Makes the root command a group, also where one verb alone was imported."""


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a built-in recipe: start, lilt/lwa, …")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Overrides of recipe keys, e.g. train.batch_size=512")
]
RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder: output of clasp train or clasp import.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
AllowCodeOption = Annotated[
    bool, typer.Option("--allow-code", help="Import the Python code that the run names (package.module:Name).")
]


def code_allowed(any_code: bool, names: Collection[str] = ()) -> AbstractContextManager[None]:
    """A block in which a run may import the Python code that it names: any, or these names."""
    from clasp.training.run_code import allow_code

    return allow_code(None if any_code else names)
