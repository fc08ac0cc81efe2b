"""Where arrays live: a mesh of three axes over the devices, and rules that place parameters on it by their names.

The batch is split over 'data' and 'fsdp' together. Parameters, their average and the optimiser's state are split over
'fsdp' (each device holds a part, gathered where a layer needs it: Rajbhandari et al. 2020, ZeRO-3) and, within a layer,
over 'tensor' (Shoeybi et al. 2019, Megatron-LM). On axes of one device nothing is split.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion_jax.errors import UsageError
from diffusion_jax.models.partition import BATCH_AXES
from diffusion_jax.registry import lookup

AXES = ('data', 'fsdp', 'tensor')
MIN_FSDP_SIZE = 1024  # numbers; gathering less costs more time than keeping it whole costs memory


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the given devices (all by default): `sizes` says how many along each of `AXES`, -1 for the rest.

    Raises:
      UsageError: the sizes do not multiply to the number of devices.
    """
    devices = list(devices or jax.devices())
    sizes = {'data': -1, 'fsdp': 1, 'tensor': 1} | dict(sizes or {})
    for axis in sizes:
        lookup('mesh axis', dict.fromkeys(AXES), axis)
    shape = [sizes[axis] for axis in AXES]
    given = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1 or any(size != -1 and size < 1 for size in shape) or len(devices) % given:
        raise _misfit(sizes, len(devices))
    shape = [len(devices) // given if size == -1 else size for size in shape]
    if math.prod(shape) != len(devices):
        raise _misfit(sizes, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def _misfit(sizes: Mapping[str, int], num_devices: int) -> UsageError:
    return UsageError(
        f'a mesh of {", ".join(f"{axis}={sizes[axis]}" for axis in AXES)} does not fit {num_devices} '
        f'device{"s" * (num_devices != 1)}: the sizes must multiply to their number; one of them may be -1, for the '
        'rest.'
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def sharded_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the mesh's batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def num_batch_shards(mesh: Mesh) -> int:
    """In how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


# --- rules: the shape of an array -> which of its axes are split ------------------------------------------------------


def _spec(axes: list[str | None]) -> PartitionSpec:
    while axes and axes[-1] is None:
        axes = axes[:-1]
    return PartitionSpec(*axes)


def _add_fsdp(shape: Sequence[int], axes: list[str | None], mesh: Mesh) -> PartitionSpec:
    """Splits the longest axis that is whole and divisible, the last of equals; small arrays stay as they are."""
    size = mesh.shape['fsdp']
    fitting = [i for i, axis in enumerate(axes) if axis is None and shape[i] % size == 0]
    if size > 1 and fitting and math.prod(shape) >= MIN_FSDP_SIZE:
        axes[max(fitting, key=lambda i: (shape[i], i))] = 'fsdp'
    return _spec(axes)


def _replicate(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    return PartitionSpec()


def _fsdp(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    return _add_fsdp(shape, [None] * len(shape), mesh)


def _over_tensor(shape: Sequence[int], axis: int, mesh: Mesh) -> PartitionSpec:
    axes: list[str | None] = [None] * len(shape)
    size = mesh.shape['tensor']
    if size > 1 and len(shape) >= -axis and shape[axis] % size == 0:
        axes[axis] = 'tensor'
    return _add_fsdp(shape, axes, mesh)


def _column(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    return _over_tensor(shape, -1, mesh)


def _row(shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    return _over_tensor(shape, -2, mesh)


RULES: dict[str, Callable[[Sequence[int], Mesh], PartitionSpec]] = {
    'replicate': _replicate,
    'fsdp': _fsdp,
    'column': _column,
    'row': _row,
}
"""Name -> (shape, mesh) -> partition.

'replicate': whole everywhere. 'fsdp': one axis over 'fsdp'. 'column': the outputs (last axis) over 'tensor', and one
other over 'fsdp'. 'row': the inputs (last but one) over 'tensor', and one other over 'fsdp'. A layer by columns and
then one by rows need one sum over 'tensor' between them; what an axis does not divide stays whole on it.
"""

DEFAULT_RULES = (
    (r'attention/(query|key|value)/', 'column'),  # each device has its heads
    (r'attention/out/', 'row'),
    (r'(^|/)(conv1|time|time_in)/', 'column'),  # a ResBlock's two convolutions are its MLP
    (r'(^|/)(conv2|time_out)/', 'row'),
    (r'', 'fsdp'),
)
"""Ordered (regex on the parameter's path, rule): the first that is found in the path holds."""


def check_rules(rules: Sequence[Sequence[str]]) -> None:
    """A `UsageError` for rules that name no rule or are no regular expressions."""
    for pair in rules:
        if isinstance(pair, str) or len(pair) != 2:
            raise UsageError(f'sharding_rules must be pairs (regex on the parameter path, rule), got {pair!r}.')
        lookup('sharding rule', RULES, pair[1])
        try:
            re.compile(pair[0])
        except re.error as error:
            raise UsageError(f'sharding_rules: {pair[0]!r} is no regular expression ({error}).') from error


def param_shardings(params: Any, rules: Sequence[Sequence[str]], mesh: Mesh) -> Any:
    """A NamedSharding for each leaf (concrete or abstract): that of the first rule whose regex its path has.

    Raises:
      UsageError: a rule is unknown, or no rule fits a path.
    """
    check_rules(rules)

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        for pattern, rule in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, RULES[rule](leaf.shape, mesh))
        raise UsageError(f"no sharding rule fits the parameter {name!r}: end sharding_rules with ('', 'fsdp').")

    return jax.tree_util.tree_map_with_path(place, params)


def optimizer_shardings(
    optimizer: optax.GradientTransformation, opt_state: Any, shardings: Any, whole: NamedSharding
) -> Any:
    """The optimiser's state: what it keeps per parameter lives where the parameter does, the rest on every device."""
    return optax.tree_map_params(
        optimizer, lambda _, sharding: sharding, opt_state, shardings, transform_non_params=lambda _: whole
    )


# --- between the host and the devices of all processes ----------------------------------------------------------------


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Host arrays, the same in every process, as global arrays."""

    def place(array):
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def fetch(array: jax.Array) -> np.ndarray:
    """A global array as a whole on the host, in every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, to be jitted, with its activations constrained to this mesh (`models.partition`)."""

    @functools.wraps(function)
    def traced(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Abstract arrays, each with its sharding."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * jax.numpy.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(tree)
        if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )
