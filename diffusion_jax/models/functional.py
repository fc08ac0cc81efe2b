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


class ModuleApply:
    """`apply(params, *args, **kwargs)` is `module(*args, **kwargs)` with these parameters, and pure.

    Equal to itself alone, as any function: what was compiled for it is found again by it and by no other. `inspection`
    reaches the module through it; nothing else should.
    """

    def __init__(self, graph: nnx.GraphDef, abstract: nnx.State):
        self.__name__ = 'apply'  # of compiled programs
        self._graph = graph
        self._abstract = abstract

    def __call__(self, params: Params, *args, **kwargs):
        return self.module(params)(*args, **kwargs)

    def module(self, params: Params | None = None) -> nnx.Module:
        """A new module that holds these parameters; of shapes alone without them. Changing it changes nothing else."""
        return nnx.merge(self._graph, self._abstract if params is None else _from_dict(self._abstract, params))

    @property
    def shapes(self) -> Params:
        """The parameters, as `jax.ShapeDtypeStruct`s."""
        return _to_dict(self._abstract)


def split(module: nnx.Module) -> tuple[ModuleApply, Params]:
    """(apply, params) of a Flax module: `apply(params, *args, **kwargs)` is `module(*args, **kwargs)`, and pure."""
    graph, state = nnx.split(module)
    return ModuleApply(graph, jax.eval_shape(lambda: state)), _to_dict(state)


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


def functional(build: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable[[PRNGKeyArray], Params], ModuleApply]:
    """(init, apply) of the module that `build(rngs)` makes, without making it: jit `init` to create params sharded."""
    apply, _ = split(nnx.eval_shape(lambda: build(_Keys(jax.random.key(0)))))

    def init(key: PRNGKeyArray) -> Params:
        return _to_dict(nnx.state(build(_Keys(key))))

    return init, apply


def count_params(params: Params) -> int:
    """The number of scalars in a pytree of arrays, concrete or abstract."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
