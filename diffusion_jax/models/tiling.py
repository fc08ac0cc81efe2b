"""Autoencoders on images that are too large for memory: tile by tile, and image by image."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.errors import UsageError

Function = Callable[[Any, Float[Array, 'B H W C']], Any]
"""(params, images or latents) -> an array, or a tuple of arrays, [B, h, w, c]."""


@dataclasses.dataclass(frozen=True)
class Tiled:
    """`encode` and `decode` as pure functions that need memory for a tile only, or for an image of the batch.

    Tiles overlap, and fade linearly into those above and to the left of them, as diffusers' do. A network sees less of
    the image in a tile than in the whole, so the result is nearly, not wholly, what it is without: its norms and its
    attention are over a tile.

        tiled = Tiled(functools.partial(encode, apply), functools.partial(decode, apply), factor=8)
        images = jax.jit(tiled.decode)(params, z)

    Args:
      encoder, decoder: of the autoencoder: `(params, images)` and `(params, latents)`.
      factor: pixels per latent along each side.
      tile: pixels along each side; images of up to that size stay whole. None: no tiles.
      overlap: of a tile with the next, as a share of it.
      sliced: the images of a batch one after the other.

    Raises:
      UsageError: the tile or its overlap is no whole number of latents.
    """

    encoder: Function
    decoder: Function
    factor: int
    tile: int | None = 512
    overlap: float = 0.25
    sliced: bool = False

    def __post_init__(self):
        if self.tile is None:
            return
        if not 0 <= self.overlap < 1:
            raise UsageError(f'overlap must be in [0, 1), got {self.overlap}.')
        latents = self.tile // self.factor
        if latents < 1 or self.tile % self.factor or latents * self.overlap != int(latents * self.overlap):
            raise UsageError(
                f'tile={self.tile} and overlap={self.overlap} must be whole numbers of latents of {self.factor} pixels:'
                f' take a tile that is a multiple of {4 * self.factor} with overlap=0.25.'
            )

    def encode(self, params: Any, images: Float[Array, 'B H W C']) -> Any:
        """What the encoder gives for images of any size; their sides must be multiples of `factor`."""
        if images.shape[1] % self.factor or images.shape[2] % self.factor:
            raise UsageError(
                f'images of {images.shape[1]}x{images.shape[2]} cannot be encoded: their sides must be multiples of '
                f'{self.factor}.'
            )
        return self._run(self.encoder, params, images, self.tile, 1 / self.factor)

    def decode(self, params: Any, z: Float[Array, 'B h w c']) -> Any:
        """What the decoder gives for latents of any size."""
        return self._run(self.decoder, params, z, self.tile and self.tile // self.factor, self.factor)

    def _run(self, function: Function, params: Any, x: Float[Array, 'B H W C'], side: int | None, ratio: float) -> Any:
        def whole(x):
            if side is None or max(x.shape[1:3]) <= side:
                return function(params, x)
            return _by_tiles(lambda part: function(params, part), x, side, self.overlap, ratio)

        if not self.sliced or x.shape[0] == 1:
            return whole(x)
        out = jax.lax.map(lambda row: whole(row[None]), x)
        return jax.tree.map(lambda leaf: leaf[:, 0], out)


def _by_tiles(function: Callable, x: Float[Array, 'B H W C'], side: int, overlap: float, ratio: float) -> Any:
    batch, height, width, channels = x.shape
    step = int(side * (1 - overlap))
    corners = [(top, left) for top in range(0, height, step) for left in range(0, width, step)]
    # The tiles of one shape in one loop: they are computed one after the other, and compiled once.
    shapes: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for top, left in corners:
        shapes.setdefault((min(side, height - top), min(side, width - left)), []).append((top, left))
    tiles: dict[tuple[int, int], list[Array]] = {}
    for (tall, wide), places in shapes.items():

        def cut(place, tall=tall, wide=wide):
            return function(jax.lax.dynamic_slice(x, (0, *place, 0), (batch, tall, wide, channels)))

        leaves, structure = jax.tree.flatten(jax.lax.map(cut, tuple(map(jnp.array, zip(*places, strict=True)))))
        for index, place in enumerate(places):
            tiles[place] = [leaf[index] for leaf in leaves]

    side_out = int(side * ratio)
    fade, keep = int(side_out * overlap), side_out - int(side_out * overlap)
    rows: dict[int, list[list[Array]]] = {}
    for top, left in corners:
        for i, tile in enumerate(tiles[top, left]):
            # Into neighbours that have been faded themselves, as diffusers does in place.
            if top:
                tile = _fade(tiles[top - step, left][i], tile, fade, axis=1)
            if left:
                tile = _fade(tiles[top, left - step][i], tile, fade, axis=2)
            tiles[top, left][i] = tile
        rows.setdefault(top, []).append([tile[:, :keep, :keep] for tile in tiles[top, left]])
    lines = [[jnp.concatenate(parts, axis=2) for parts in zip(*row, strict=True)] for row in rows.values()]
    return jax.tree.unflatten(structure, [jnp.concatenate(parts, axis=1) for parts in zip(*lines, strict=True)])


def _fade(before: Array, after: Array, extent: int, axis: int) -> Array:
    """`after`, which begins as the end of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    if not extent:
        return after
    weights = jnp.arange(extent, dtype=after.dtype) / extent
    weights = weights.reshape([-1 if i == axis else 1 for i in range(after.ndim)])
    end = jax.lax.slice_in_dim(before, before.shape[axis] - extent, before.shape[axis], axis=axis)
    start, rest = jnp.split(after, [extent], axis=axis)
    return jnp.concatenate([end * (1 - weights) + start * weights, rest], axis=axis)
