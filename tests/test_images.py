import jax.numpy as jnp
import numpy as np
from PIL import Image

from diffusion_jax.images import grid, save_png, to_float, to_uint8


def test_every_byte_survives_the_way_to_floats_and_back():
    values = jnp.arange(256, dtype=jnp.uint8)
    floats = to_float(values)
    assert floats[0] == -1
    assert floats[255] == 1
    np.testing.assert_array_equal(to_uint8(floats), values)


def test_floats_are_clipped_and_rounded_to_the_nearest():
    np.testing.assert_array_equal(to_uint8(jnp.array([-7.0, 7.0, -1 + 1.4 / 127.5, -1 + 1.6 / 127.5])), [0, 255, 1, 2])


def test_a_grid_goes_row_by_row_with_a_gap():
    images = np.stack([np.full((48, 48, 1), value, np.uint8) for value in (10, 20, 30, 40, 50)])
    picture = grid(images, columns=3)
    assert picture.shape == (98, 148, 3)
    assert [picture[5, 5, 0], picture[5, 55, 0], picture[5, 105, 0]] == [10, 20, 30]
    assert [picture[55, 5, 0], picture[55, 55, 0], picture[55, 105, 0]] == [40, 50, 255]
    assert (picture[48:50] == 255).all()


def test_small_images_are_enlarged_and_colour_is_kept(tmp_path):
    images = np.zeros((4, 8, 8, 3), np.uint8)
    images[..., 1] = 200
    picture = grid(images)
    assert picture.shape == (98, 98, 3)
    assert tuple(picture[10, 10]) == (0, 200, 0)
    save_png(tmp_path / 'deep' / 'grid.png', picture)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / 'deep' / 'grid.png')), picture)
