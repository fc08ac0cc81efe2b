"""Digests of the values in a pytree, computed where the values live.

A digest depends on the values and their order alone: not on the sharding, the mesh or the number of devices or
processes. What was saved by eight devices and is restored on one can so be told from what is damaged.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, UInt32

SEEDS = (0x9E3779B9, 0x7F4A7C15)  # one for each of the two sums


def _words(array: Array) -> UInt32[Array, '...']:
    """The array's bits as 32-bit words, of its shape; numbers of more than 32 bits have an axis of words besides."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if jnp.iscomplexobj(array):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    if array.dtype in (jnp.int4, jnp.uint4, jnp.int2, jnp.uint2):
        array = array.astype(jnp.int8)
    size = array.dtype.itemsize
    if size >= 4:
        return lax.bitcast_convert_type(array, jnp.uint32)
    return lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16}[size]).astype(jnp.uint32)


def _mixed(word: UInt32[Array, '...']) -> UInt32[Array, '...']:
    """MurmurHash3's finaliser (Appleby): a bijection in which each bit of the word reaches every bit."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _sums(array: Array) -> UInt32[Array, '2']:
    """Two sums modulo 2^32 of mixed words.

    Addition may be grouped in any way, so each device adds up its part. A word is mixed with its flat index by a
    bijection of the word: one that changes, alone, always changes both sums.
    """
    words = _words(array)
    # The flat index from an index along each axis: it is split over devices as the words are. Modulo 2^32, too.
    strides = [math.prod(words.shape[axis + 1 :]) % 2**32 for axis in range(words.ndim)]
    index = jnp.zeros(words.shape, jnp.uint32)
    for axis, stride in enumerate(strides):
        index += lax.broadcasted_iota(jnp.uint32, words.shape, axis) * np.uint32(stride)
    mixed = _mixed(words[..., None] ^ _mixed(index[..., None] + np.array(SEEDS, np.uint32)))
    return mixed.sum(tuple(range(words.ndim)), dtype=jnp.uint32)


@functools.cache
def _compiled(sharding: NamedSharding | None):
    # Replicated, or a process could not read what others have added up.
    return jax.jit(_sums, out_shardings=sharding)


def _dispatch(leaf: Any) -> jax.Array:
    if not isinstance(leaf, jax.Array):
        leaf = np.asarray(leaf)
        if leaf.dtype.itemsize == 8 and leaf.dtype.kind in 'fiu':  # JAX would narrow it
            leaf = np.ascontiguousarray(leaf)[..., None].view(np.uint32)
        return _compiled(None)(leaf)
    named = isinstance(leaf.sharding, NamedSharding)
    return _compiled(NamedSharding(leaf.sharding.mesh, PartitionSpec()) if named else None)(leaf)


def digests(tree: Any) -> dict[str, str]:
    """{path: digest} of each leaf: 16 hexadecimal digits that tell its values, bit for bit.

    Leaves are arrays of any dtype (typed PRNG keys too) or numbers, on any mesh; with several processes all must call
    it, on the same global arrays, and all get the same. A word that changes alone always changes the digest; other
    changes go unnoticed with probability 2^-64. Compiles once for each shape, dtype and sharding.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    sums = []
    for _, leaf in leaves:
        sums.append(_dispatch(leaf))
        if jax.device_count() > 1 and jax.default_backend() == 'cpu':
            # There, collectives of programs in flight together can wait for one another for ever.
            jax.block_until_ready(sums[-1])
    sums = jax.device_get(sums)
    names = [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves]
    return {name: f'{first:08x}{second:08x}' for name, (first, second) in zip(names, sums, strict=True)}


def differing(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """The paths whose digests are not the same, and those that only one of the two has; in order of name."""
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
