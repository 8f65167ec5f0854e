"""Types are checked in every call, and sizes by name wherever a function has some: what jaxtyping's hook does, faster.

Goes in: every function and dataclass of the package, as the hook finds them. Comes out: each of them checked. Note:
jaxtyping binds the arguments of each call and checks them twice, so that sizes agree among them; where there is no size
to agree on, beartype alone is the same check in a small part of the time. A check is made when its function is called
first, since most never are; what a class has of a protocol is looked up once (as Python 3.12 does).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
import typing
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
    if sys.version_info < (3, 12):
        _remember_protocols()


def _remember_protocols() -> None:
    protocols: Any = getattr(typing, "_ProtocolMeta")  # noqa: B009
    is_instance, known = protocols.__instancecheck__, set[tuple[type, type]]()

    def asked(protocol: type, instance: Any) -> bool:
        pair = protocol, type(instance)
        if pair in known:
            return True
        if not is_instance(protocol, instance):
            return False
        if all(hasattr(pair[1], name) for name in getattr(typing, "_get_protocol_attrs")(protocol)):  # noqa: B009
            known.add(pair)
        return True

    protocols.__instancecheck__ = asked


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
    if not function.__annotations__:
        return function
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        return _jaxtyped(function, typechecker=typechecker)
    check: Any = None

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal check
        if check is None:
            check = _check_of(function, typechecker)
        return function(*args, **kwargs) if jaxtyping.config.jaxtyping_disable else check(*args, **kwargs)

    return called


def _check_of(function: Any, typechecker: Decorator) -> Any:
    written = function.__annotations__
    hints = {name: _resolved(hint, function.__globals__) for name, hint in written.items()}
    if any(map(_has_sizes, hints.values())):
        return _jaxtyped(function, typechecker=typechecker)
    function.__annotations__ = hints
    made = _typed(function)
    function.__annotations__ = written
    return made


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
