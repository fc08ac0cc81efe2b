"""Seeing what the submodules of a network are given and give, without a change to the network.

A merged module lives for one call, so its submodules can be changed for that call: nothing else sees it, and a network
that is not tapped is the very same program as ever.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

from diffusion_jax.errors import UsageError
from diffusion_jax.models.functional import ModuleApply

Tap = Callable[[nnx.Module, tuple, Any], None]
"""Told of each call: the module, its positional arguments, and what it gave."""


def module_apply(apply: Callable[..., Any]) -> ModuleApply:
    """The `ModuleApply` that a network's function is, or wraps; `.module(params)` is then the module.

    It is found in `functools.partial`s, in `jax.jit`s and in dataclasses that have it as `apply`, such as
    `denoisers.EdmPreconditioned` and `Ablated`.

    Raises:
      UsageError: there is none.
    """
    found = []
    rewrapped(apply, lambda inner: found.append(inner) or inner)
    return found[0]


def rewrapped(apply: Callable[..., Any], change: Callable[[ModuleApply], Callable]) -> Callable[..., Any]:
    """The same function around another network. Pure, as nothing else would be under tracing and in many threads."""
    if isinstance(apply, ModuleApply):
        return change(apply)
    if isinstance(apply, functools.partial):
        return functools.partial(rewrapped(apply.func, change), *apply.args, **apply.keywords)
    if isinstance(apply, jax.stages.Wrapped) and hasattr(apply, '__wrapped__'):
        return rewrapped(apply.__wrapped__, change)
    if dataclasses.is_dataclass(apply) and callable(getattr(apply, 'apply', None)):
        return dataclasses.replace(apply, apply=rewrapped(apply.apply, change))
    raise UsageError(
        f'this network ({getattr(apply, "__name__", type(apply).__name__)}) is a function, and one cannot see into it: '
        'inspect an `apply` of models.functional or models.split, or that of a pipeline of this package.'
    )


def children(module: nnx.Module) -> dict[str, nnx.Module]:
    """The submodules directly in a module, by name."""
    found = nnx.iter_children(module)
    return {str(name): child for name, child in found if not isinstance(child, nnx.Variable)}


def submodule(module: nnx.Module, path: str) -> nnx.Module | None:
    """The submodule of a dotted path; None if there is none."""
    for name in path.split('.'):
        module = children(module).get(name)
        if module is None:
            return None
    return module


@functools.cache
def _tapped(kind: type[nnx.Module]) -> type[nnx.Module]:
    """A class that tells `self._tap` of its calls, and is `kind` in all else, `isinstance` included. One for each:
    Flax and JAX remember every class of modules for good."""

    def __call__(self, *args, **kwargs):
        out = kind.__call__(self, *args, **kwargs)
        self._tap(self, args, out)
        return out

    return type(kind)(kind.__name__, (kind,), {'__call__': __call__})


def with_taps(apply: Callable[..., Any], taps: Mapping[str, Tap]) -> Callable[..., Any]:
    """The same network, that tells of the calls of the submodules at these paths, each time it is traced."""

    def tapped(inner: ModuleApply) -> Callable[..., Any]:
        def call(params, *args, **kwargs):
            module = inner.module(params)
            for network in (module, *children(module).values()):
                if hasattr(network, 'remat'):
                    network.remat = 'none'  # what a tap sees could not leave a function that is to be recomputed
            found = [(submodule(module, path), tap) for path, tap in taps.items()]
            for each, tap in found:
                # Past Flax's own setters: this module is never split again.
                object.__setattr__(each, '_tap', tap)
                object.__setattr__(each, '__class__', _tapped(type(each)))
            return module(*args, **kwargs)

        return call

    return rewrapped(apply, tapped)


def remember(record: dict[str, Any], path: str, read: Callable[[nnx.Module, tuple, Any], Any]) -> Tap:
    """A tap that keeps what it reads of the one call that there is."""

    def tap(module, args, out):
        if path in record:
            raise UsageError(f'{path} is called more than once: there is no one value of it.')
        record[path] = read(module, args, out)

    return tap
