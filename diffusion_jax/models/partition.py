"""Activations on a mesh: said where a compiler that infers the rest of the placement would else have to guess."""

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

BATCH_AXES = ('data', 'fsdp')


def split_batch(x: Float[Array, 'B ...']) -> Float[Array, 'B ...']:
    """x with its first axis split over the batch axes of the mesh in use (`jax.set_mesh`); as it is without one."""
    return _constrain(x, PartitionSpec(BATCH_AXES))


def split_heads(x: Float[Array, 'B L heads K']) -> Float[Array, 'B L heads K']:
    """As `split_batch`, with the heads over 'tensor' where it divides them."""
    mesh = jax.sharding.get_abstract_mesh()
    tensor = mesh.shape.get('tensor', 1) if not mesh.empty else 1
    over = 'tensor' if tensor > 1 and x.shape[2] % tensor == 0 else None
    return _constrain(x, PartitionSpec(BATCH_AXES, None, over))


def _constrain(x, spec: PartitionSpec):
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size == 1 or not set(BATCH_AXES) <= set(mesh.axis_names):
        return x
    if x.shape[0] % (mesh.shape['data'] * mesh.shape['fsdp']):
        return x
    return jax.lax.with_sharding_constraint(x, spec)
