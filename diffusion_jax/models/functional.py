"""Where Flax ends: a module becomes `init(key) -> params` and `apply(params, *args, **kwargs)`, params a plain dict."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

Params = dict[str, Any]


def _to_dict(state: nnx.State) -> Params:
    params: Params = {}
    for path, variable in nnx.to_flat_state(state):
        *parents, name = map(str, path)
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = variable.get_value()
    return params


def _from_dict(abstract: nnx.State, params: Params) -> nnx.State:
    flat = []
    for path, variable in nnx.to_flat_state(abstract):
        leaf = params
        for name in map(str, path):
            leaf = leaf[name]
        flat.append((path, variable.replace(leaf)))
    return nnx.from_flat_state(flat)


def split(module: nnx.Module) -> tuple[Callable[..., Any], Params]:
    """(apply, params) of a Flax module: `apply(params, *args, **kwargs)` is `module(*args, **kwargs)`, and pure."""
    graph, state = nnx.split(module)
    abstract = jax.eval_shape(lambda: state)

    def apply(params: Params, *args, **kwargs):
        return nnx.merge(graph, _from_dict(abstract, params))(*args, **kwargs)

    return apply, _to_dict(state)


class _Keys:
    """The keys that nnx.Rngs(key) gives, with a counter of Python's.

    The counter of nnx.Rngs is an array. Where building is traced, as all is here, each update of a traced array looks
    through the whole program so far, and networks of a thousand parameters take minutes.
    """

    def __init__(self, key: PRNGKeyArray):
        self._key, self._count = key, 0

    def params(self) -> PRNGKeyArray:
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        return key


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[[PRNGKeyArray], Params], Callable[..., Any]]:
    """(init, apply) of the module that `build(rngs)` makes, without making it: jit `init` to create params sharded."""
    apply, _ = split(nnx.eval_shape(lambda: build(_Keys(jax.random.key(0)))))

    def init(key: PRNGKeyArray) -> Params:
        return _to_dict(nnx.state(build(_Keys(key))))

    return init, apply


def count_params(params: Params) -> int:
    """The number of scalars in a pytree of arrays, concrete or abstract."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
