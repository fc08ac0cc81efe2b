"""The forward tab: its pictures and numbers are the library's, its Python makes them, its bounds hold."""

import io

import jax
import numpy as np
import pytest
from pages import executed, pictures_of, text_of

from diffusion_jax import UsageError, data, process, schedules
from diffusion_jax.explorer import checks, forward
from diffusion_jax.explorer.schedule_choice import OWN
from diffusion_jax.images import to_float, to_uint8


def settings(**changes):
    return {'image': 3, 'schedule': 'cosine', 'length': '1000', 't': 0.5, 'seed': 2} | changes


@pytest.mark.parametrize(
    ('name', 'length', 'schedule'),
    [
        ('cosine', '1000', schedules.cosine(1000)),
        ('linear', '50', schedules.linear(50)),
        ('sigmoid', 'continuous', schedules.sigmoid(None)),
        ('flow', '1000', schedules.flow()),
        ('edm', '1000', schedules.edm()),
    ],
)
def test_pictures_and_numbers_are_those_of_the_library(digits, name, length, schedule):
    shown, _ = forward.view(digits, **settings(schedule=name, length=length, t=0.3))
    image = data.examples('digits').images[3]
    found = pictures_of(shown)
    np.testing.assert_array_equal(found['image'], image)
    x0 = to_float(image[None])
    eps = jax.random.normal(jax.random.key(2), x0.shape)
    jump = to_uint8(process.q_sample(schedule, x0, 0.3, eps))
    assert np.abs(found['jump'].astype(int) - np.asarray(jump)[0]).max() <= 1
    steps = 50 if length == '50' else 1000
    chain = to_uint8(process.q_chain(schedule, x0, jax.random.key(3), steps))[round(0.3 * steps), 0]
    assert np.abs(found['chain'].astype(int) - np.asarray(chain)).max() <= 1
    levels = schedules.levels(schedule, 0.3)
    assert float(text_of(shown, 'alpha_bar')) == pytest.approx(levels.alpha_bar, rel=1e-3)
    assert float(text_of(shown, 'log_snr')) == pytest.approx(levels.log_snr, rel=1e-3)
    assert float(text_of(shown, 'signal').split()[0]) == pytest.approx(100 * levels.signal, rel=1e-2)
    assert float(text_of(shown, 'noise').split()[0]) == pytest.approx(100 * levels.noise, rel=1e-2)
    assert f'{levels.alpha:.4g}' in text_of(shown, 'formula')


def test_at_the_ends_there_is_the_image_and_nothing_of_it(digits):
    shown, _ = forward.view(digits, **settings(t=0))
    found = pictures_of(shown)
    np.testing.assert_array_equal(found['jump'], found['image'])
    np.testing.assert_array_equal(found['chain'], found['image'])
    assert text_of(shown, 'log_snr') == '∞'
    shown, _ = forward.view(digits, **settings(t=1, schedule='flow'))
    assert text_of(shown, 'log_snr') == '-∞'


@pytest.mark.parametrize('changes', [{}, {'schedule': OWN, 't': 0.123}, {'schedule': 'flow', 'seed': 7}])
def test_the_python_makes_what_is_shown(digits, changes):
    shown, call = forward.view(digits, **settings(**changes))
    made, found = executed(call), pictures_of(shown)
    assert np.abs(np.asarray(made['x_t'])[0].astype(int) - found['jump']).max() <= 1
    assert np.abs(np.asarray(made['chain'])[0].astype(int) - found['chain']).max() <= 1
    assert float(text_of(shown, 'alpha_bar')) == pytest.approx(made['levels'].alpha_bar, rel=1e-3)


def test_dragging_compiles_nothing(digits):
    forward.view(digits, **settings())
    programs = forward._jump._cache_size(), forward._chain._cache_size()
    for t, seed in ((0.1, 2), (0.9, 5), (1.0, 6)):
        forward.view(digits, **settings(t=t, seed=seed, image=int(10 * t)))
    assert (forward._jump._cache_size(), forward._chain._cache_size()) == programs


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'t': 1.5}, 't must be from 0 to 1'),
        ({'t': float('nan')}, 't must be a number'),
        ({'t': '0.5'}, 't must be a number'),
        ({'t': None}, 't must be a number'),
        ({'image': 10**9}, 'image must be from 0 to 29'),
        ({'image': -1}, 'image must be from 0'),
        ({'image': 1.5}, 'whole number'),
        ({'image': True}, 'image must be a number'),
        ({'seed': 2**40}, 'seed must be from 0'),
        ({'schedule': 'cosin'}, "Did you mean 'cosine'"),
        ({'schedule': ['cosine']}, 'unknown schedule'),
        ({'schedule': 'x' * 10_000}, 'unknown schedule'),
        ({'length': '1000000'}, 'unknown T'),
        ({'length': 10**9}, 'unknown T'),
    ],
)
def test_what_is_out_of_bounds_is_refused(digits, changes, message):
    with pytest.raises(UsageError, match=message) as refusal:
        forward.view(digits, **settings(**changes))
    assert len(str(refusal.value)) < 300


def encoded(size, mode='RGB', kind='PNG'):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new(mode, size, 128).save(buffer, kind)
    return buffer.getvalue()


def test_an_uploaded_image_is_cut_to_the_models_shape(digits):
    assert forward.read_upload(None, (8, 8, 1)) is None
    for shape, mode, kind in (((8, 8, 1), 'RGB', 'PNG'), ((8, 8, 3), 'L', 'JPEG'), ((16, 16, 3), 'RGBA', 'PNG')):
        image = forward.read_upload(encoded((40, 20), mode, kind), shape)
        assert image.shape == shape
        assert image.dtype == np.uint8
    image = forward.read_upload(encoded((40, 20), 'L'), (8, 8, 1))
    shown, call = forward.view(digits, **settings(image=0), uploaded=image)
    np.testing.assert_array_equal(pictures_of(shown)['image'], image)
    assert "Image.open('image.png')" in call


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'no image'),
        (b'<svg onload=alert(1)>', 'no image'),
        (encoded((8, 8))[:40], 'no image'),
        (b'\x89PNG\r\n\x1a\n' + bytes(1000), 'no image'),
        (bytes(checks.MAX_UPLOAD_BYTES + 1), 'at most 4 MiB'),
        (encoded((5000, 5000), '1'), 'at most 16,777,216 pixels'),
        (encoded((20_000, 20_000), '1'), 'no image'),
    ],
)
def test_what_is_no_image_or_a_bomb_is_refused(content, message):
    with pytest.raises(UsageError, match=message):
        forward.read_upload(content, (8, 8, 1))


def test_the_animation_goes_from_the_image_to_noise(digits):
    from pages import frames_of

    frames = frames_of(forward.animation(digits, 3, 'cosine', '50', 0))
    assert len(frames) == 51
    side = frames[0].shape[0] // 8
    image = np.repeat(np.repeat(data.examples('digits').images[3], side, 0), side, 1)
    assert np.abs(frames[0].astype(int) - image).max() <= 2
