"""Where arrays live: a mesh over all devices, the batch split along its `data` axis, the state on every device."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of one axis, 'data', over the given devices; all of them by default."""
    return Mesh(np.asarray(devices or jax.devices()), ('data',))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def sharded_batch(mesh: Mesh) -> NamedSharding:
    """The first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec('data'))
