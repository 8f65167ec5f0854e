"""Types are checked in every call, and sizes by name wherever a function has some: what jaxtyping's hook does, faster.

Goes in: every function and dataclass of the package, as the hook finds them. Comes out: each of them checked. Note:
jaxtyping binds the arguments of each call and checks them twice, so that sizes agree among them; where there is no size
to agree on, beartype alone is the same check in a small part of the time.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import jaxtyping
from beartype import BeartypeConf, beartype

Decorator = Callable[[Any], Any]
_jaxtyped = jaxtyping.jaxtyped
_typed = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))  # a ``TypeError``, as jaxtyping's are


def install() -> None:
    """Put ``checked`` where the hook looks for its decorator."""
    assert "clasp" not in sys.modules, "what is imported already is decorated already"
    jaxtyping.jaxtyped = checked


def checked(*, typechecker: Decorator) -> Decorator:
    """A decorator of functions and classes; of a class, for the arguments of a dataclass only.

    ``typechecker`` is jaxtyping's, for functions with sizes.
    """

    def decorate(made: Any) -> Any:
        if not inspect.isclass(made):
            return _checked_function(made, typechecker)
        if dataclasses.is_dataclass(made) and inspect.unwrap(made.__init__) is made.__init__:
            made.__init__ = _checked_function(made.__init__, typechecker)
        return made

    return decorate


def _checked_function(function: Any, typechecker: Decorator) -> Any:
    written = function.__annotations__
    hints = {name: _resolved(hint, function.__globals__) for name, hint in written.items()}
    ordinary = not (inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function))
    if not ordinary or any(map(_has_sizes, hints.values())):
        return _jaxtyped(function, typechecker=typechecker)
    function.__annotations__ = hints
    made = _typed(function)
    function.__annotations__ = written
    if made is function:
        return function

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return function(*args, **kwargs) if jaxtyping.config.jaxtyping_disable else made(*args, **kwargs)

    return called


def _resolved(hint: Any, names: dict[str, Any]) -> Any:
    """What a hint in quotes stands for; anything, as in jaxtyping, where its names are not defined yet."""
    try:
        return get_type_hints(SimpleNamespace(__annotations__={"hint": hint}), names, include_extras=True)["hint"]
    except Exception:
        return Any


def _has_sizes(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_has_sizes, hint if isinstance(hint, list) else get_args(hint)))
