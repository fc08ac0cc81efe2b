"""Names in a config become functions. A registry is a plain dict; these two functions make its errors helpful."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from diffusion_jax.errors import UsageError

Value = TypeVar('Value')


def unknown(kind: str, name: object, choices: Iterable[str]) -> UsageError:
    """The error for a name that is none of `choices`."""
    choices = sorted(choices)
    close = get_close_matches(str(name), choices, n=1)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    return UsageError(f'unknown {kind} {name!r}.{hint} Valid choices: {", ".join(choices) or "none"}.')


def lookup(kind: str, registry: Mapping[str, Value], name: str) -> Value:
    """`registry[name]`, or a `UsageError` that lists the names."""
    if name not in registry:
        raise unknown(kind, name, registry)
    return registry[name]


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function, or of a class's `__init__` without self (a metaclass would hide them)."""
    if inspect.isclass(function):
        return dict(list(inspect.signature(function.__init__).parameters.items())[1:])
    return dict(inspect.signature(function).parameters)


def build(kind: str, registry: Mapping[str, Callable[..., Value]], name: str, *args: Any, **options: Any) -> Value:
    """Calls `registry[name](*args, **options)`; an option that the function does not take is a `UsageError`."""
    function = lookup(kind, registry, name)
    parameters = dict(list(parameters_of(function).items())[len(args) :])
    for option in options:
        if option not in parameters:
            raise unknown(f'option of {kind} {name!r}:', option, parameters)
    missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in options]
    if missing:
        raise UsageError(f'{kind} {name!r} needs the option{"s" * (len(missing) > 1)} {", ".join(missing)}.')
    return function(*args, **options)
