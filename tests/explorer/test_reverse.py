"""The reverse tab: its states are the library's trajectory, whatever is asked of it."""

import numpy as np
import pytest
from pages import executed, frames_of, pictures_of, text_of

from diffusion_jax import UsageError, schedules
from diffusion_jax.explorer import pictures, reverse
from diffusion_jax.images import to_uint8


def run(digits, solver='ddim', other='none', steps=6, moment=0, seed=5, **asked):
    asked = {'label': '7', 'scale': 2.0} | asked
    shown = list(reverse.show(digits, asked, seed, solver, other, steps, moment))
    assert all(part[2] is None for part in shown[:-1])
    return shown[-1]


SETTINGS = {'labels': [7], 'guidance_scale': 2.0, 'seed': 5, 'steps': 6}


def near(ours, theirs, levels=1):
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= levels


@pytest.mark.parametrize(('solver', 'moment'), [('ddim', 1), ('dpmpp_2m', 4), ('heun', 7)])
def test_a_state_is_that_of_the_trajectory(digits, solver, moment):
    shown, _, runs, at = run(digits, solver, moment=moment)
    assert at == moment
    whole = digits.pipeline.trajectory(1, solver=solver, **SETTINGS)
    found = pictures_of(shown)
    near(found['x_t'], to_uint8(whole.x[moment, 0]))
    near(found['x0'], to_uint8(whole.x0[moment, 0]))
    near(found['change'], pictures.signed(whole.x[moment, 0] - whole.x[moment - 1, 0], 0.5))
    t = runs[0].times[moment]
    levels = schedules.levels(digits.pipeline.schedule, t)
    eps = (whole.x[moment, 0] - levels.alpha * whole.x0[moment, 0]) / levels.sigma
    near(found['eps'], pictures.signed(eps, 3.0), 2)
    assert float(text_of(shown, 'reverse_t')) == pytest.approx(t, rel=1e-3)
    assert float(text_of(shown, 'reverse_log_snr')) == pytest.approx(levels.log_snr, rel=1e-3)


def test_the_last_state_is_the_sample(digits):
    shown, _, runs, moment = run(digits)
    assert moment == runs[0].num_calls == 6
    near(pictures_of(shown)['x0'], digits.pipeline(1, solver='ddim', **SETTINGS).images[0])


def test_two_solvers_begin_with_the_same_noise_and_meet_in_time(digits):
    shown, _, runs, _ = run(digits, 'ddim', 'heun', moment=3)
    np.testing.assert_array_equal(runs[0].x[0], runs[1].x[0])
    found = pictures_of(shown)
    state = reverse.nearest(runs[1], runs[0].times[3])
    assert runs[1].times[state] == pytest.approx(runs[0].times[3])
    near(found['x_t_b'], to_uint8(runs[1].x[state]))
    near(found['apart'], pictures.signed(runs[0].x[3] - runs[1].x[state], 1.0))


@pytest.mark.parametrize('moment', [2, 6])
def test_the_python_makes_what_is_shown(digits, moment):
    shown, call, *_ = run(digits, moment=moment)
    made, found = executed(call), pictures_of(shown)
    near(found['x_t'], to_uint8(made['x_t'][0]))
    near(found['x0'], made['x0'] if moment < 6 else made['image'])


def test_the_animation_ends_in_the_sample(digits):
    _, _, runs, _ = run(digits)
    frames = frames_of(reverse.animation(digits, runs))
    assert len(frames) == 7
    side = frames[-1].shape[0] // 8
    image = digits.pipeline(1, solver='ddim', **SETTINGS).images[0]
    right = frames[-1][:, frames[-1].shape[1] // 2 :]
    near(right, np.repeat(np.repeat(np.broadcast_to(image, (8, 8, 3)), side, 0), side, 1), 3)


def test_nothing_drawn_is_said(digits):
    with pytest.raises(UsageError, match='press Draw'):
        reverse.view(digits, [], 3)
    with pytest.raises(UsageError, match='press Draw'):
        reverse.animation(digits, [])


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'steps': 101}, 'steps must be from 1 to 100'),
        ({'steps': 0}, 'steps must be from 1'),
        ({'steps': 1e308}, 'steps must be from 1'),
        ({'steps': '5'}, 'steps must be a number'),
        ({'seed': -1}, 'seed must be from 0'),
        ({'solver': 'dimm'}, "Did you mean 'ddim'"),
        ({'other': 'all'}, 'unknown second solver'),
        ({'label': 'cat'}, 'unknown label'),
        ({'label': None}, 'unknown label'),
        ({'scale': -1}, 'guidance scale must be from 0 to 15'),
        ({'scale': 1e9}, 'guidance scale must be from 0 to 15'),
        ({'moment': 1e9}, 'state must be from 0'),
    ],
)
def test_what_is_out_of_bounds_is_refused_before_anything_is_drawn(digits, changes, message):
    with pytest.raises(UsageError, match=message):
        run(digits, **changes)
