"""The pages of the reference that are made from the code: every recipe key, every verb.

In: the settings classes of ``clasp.config.recipe`` with their attribute docstrings, and the command of ``clasp.cli``.
Out: Markdown, which Sphinx reads below what stands in ``reference/recipe.md`` and ``reference/verbs.md`` (``conf.py``
names this file as an extension). Note: nothing is kept, so neither page can be out of date; ``tests/test_docs.py``
fails where a key, an argument or an option has no description.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from clasp.cli.verbs import root_command
from clasp.config.recipe import Recipe, recipe_keys

# --- recipe keys -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RecipeKey:
    """A key, its values and its default in words; a section has neither."""

    name: str
    values: str
    default: str
    description: str


def list_recipe_keys() -> list[RecipeKey]:
    """Every key and section of a recipe, in the order of the settings classes."""
    return list(_keys_of(Recipe, ""))


def _keys_of(kind: type, prefix: str) -> Iterator[RecipeKey]:
    types, texts = recipe_keys(), attribute_docstrings(kind)
    for name, (annotation, default, limits) in _fields_of(kind).items():
        key = f"{prefix}{name}"
        if types[key] is not None:
            yield RecipeKey(key, _values(annotation, limits), _default(default), texts.get(name, ""))
            continue
        section = next(part for part in (annotation, *get_args(annotation)) if isinstance(part, type))
        yield RecipeKey(key, "", "", texts.get(name) or inspect.cleandoc(section.__doc__ or ""))
        yield from _keys_of(section, f"{key}.")


def _fields_of(kind: type) -> dict[str, tuple[Any, Any, list[Any]]]:
    """Annotation, default and limits of each field of a pydantic model or a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    if issubclass(kind, BaseModel):
        return {name: (hints[name], field.default, field.metadata) for name, field in kind.model_fields.items()}
    return {field.name: (hints[field.name], field.default, []) for field in fields(kind)}


def attribute_docstrings(kind: type) -> dict[str, str]:
    """The string below each field of a class and of the classes that it inherits from."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("clasp."):
            (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
            assert isinstance(definition, ast.ClassDef)
            for field, below in pairwise(definition.body):
                match field, below:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        found[name] = inspect.cleandoc(text)
    return found


_WORDS = {str: "string", int: "integer", float: "number", bool: "true, false", Any: "any value"}


def _values(annotation: Any, limits: list[Any]) -> str:
    """The values of a key in words, such as ``integer > 1, "auto"``."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inside = [part.metadata if isinstance(part, FieldInfo) else [part] for part in parts[1:]]
        return _values(parts[0], [*limits, *(limit for each in inside for limit in each)])
    if origin in (Union, UnionType):
        return ", ".join(_values(part, limits) for part in parts if part is not NoneType)
    if origin is Literal:
        return ", ".join(json.dumps(part) for part in parts)
    if origin is list or origin is tuple:
        several = origin is list or ... in parts
        inner = ", ".join(dict.fromkeys(_values(part, []) for part in parts if part is not ...))
        return f"list ({inner})" if several else f"list of {len(parts)} ({inner})"
    if origin is dict:
        return f"table ({_values(parts[1], [])})"
    bounds = [bound for limit in limits if (bound := _bound(limit))] if annotation in (int, float) else []
    return " ".join([_WORDS[annotation], *bounds])


def _bound(limit: Any) -> str:
    match limit:
        case Ge(ge=value):
            return f"≥ {value:,}"
        case Gt(gt=value):
            return f"> {value:,}"
        case Le(le=value):
            return f"≤ {value:,}"
        case Lt(lt=value):
            return f"< {value:,}"
    return ""


def _default(value: Any) -> str:
    if value is PydanticUndefined or value is MISSING:
        return "required"
    return "left out by default" if value is None else f"default `{json.dumps(value, ensure_ascii=False)}`"


def render_recipe_keys() -> str:
    """The list of keys as Markdown: a heading for each section, an anchor for each key (``#train-lr``)."""
    parts = []
    for key in list_recipe_keys():
        if not key.values:
            level = "##" if "." not in key.name else "###"
            parts.append(f"{level} [{key.name}]\n\n{_escape(key.description)}\n")
        else:
            text = textwrap.indent(_escape(key.description), "  ").lstrip()
            anchor = key.name.replace(".", "-")
            parts.append(f"`{key.name}`{{#{anchor}}}\n: {_escape(key.values)}; {key.default}\n\n  {text}\n")
    return "\n".join(parts)


# --- verbs -----------------------------------------------------------------------------------------------------------


def list_verbs() -> dict[str, Any]:
    """The command of every verb by its name, ``store copy`` and its like included."""
    return dict(_verbs_of(typer.main.get_command(root_command()), ""))


def _verbs_of(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from _verbs_of(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def render_verbs() -> str:
    """Every verb as Markdown: usage, help, arguments and options, and what its help ends with."""
    parts = []
    for name, command in list_verbs().items():
        arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
        options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
        usage = " ".join(["clasp", name, *map(_usage, arguments), "[OPTIONS]" if options else ""]).strip()
        parts.append(f"## clasp {name}\n\n```text\n{usage}\n```\n\n{_escape(inspect.cleandoc(command.help))}\n")
        parts += [_describe(parameter) for parameter in (*arguments, *options)]
        if command.epilog:
            parts.append(f"```text\n{command.epilog.replace(chr(92) + '[', '[')}\n```\n")
    return "\n".join(parts)


def _usage(argument: Any) -> str:
    name = f"{_name(argument)}{' …' if argument.nargs == -1 else ''}"
    return name if argument.required else f"[{name}]"


def _name(parameter: Any) -> str:
    return parameter.metavar or parameter.name.rstrip("_").upper()


def _describe(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        words = _name(parameter)
    else:
        words = ", ".join(parameter.opts) + ("" if parameter.is_flag else f" {_name(parameter)}")
    notes = ["required"] if parameter.param_type_name == "option" and parameter.required else []
    shown = isinstance(parameter.default, str | int | Path) and not parameter.is_flag and str(parameter.default)
    notes += [f"default `{parameter.default}`"] if shown else []
    notes += [f"or the environment variable `{parameter.envvar}`"] if parameter.envvar else []
    return f"`{words}`\n: {_escape(' '.join(parameter.help.split()))}{f' ({chr(59).join(notes)})' if notes else ''}\n"


# --- Sphinx ----------------------------------------------------------------------------------------------------------


def _escape(text: str) -> str:
    """Docstrings as Markdown: what is between double backticks is code, all else is plain."""
    spans = re.split(r"(``.+?``)", text, flags=re.DOTALL)
    return "".join(span if span.startswith("``") else re.sub(r"([\\*_<\[\]`|#{}])", r"\\\1", span) for span in spans)


PAGES = {"reference/recipe": render_recipe_keys, "reference/verbs": render_verbs}


def setup(app: Any) -> dict[str, Any]:
    """Called by Sphinx: the pages of ``PAGES`` end with what is rendered from the code."""

    def add_rendered(app: Any, page: str, source: list[str]) -> None:
        if page in PAGES:
            source[0] += "\n" + PAGES[page]()

    app.connect("source-read", add_rendered)
    return {"parallel_read_safe": True}
