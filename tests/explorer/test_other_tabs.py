"""Guidance, network, samplers, latents and prompts: pictures and numbers are the library's, their Python makes them."""

import jax
import numpy as np
import pytest
from pages import executed, frames_of, pictures_of, text_of

from diffusion_jax import UsageError, data, denoisers, process, samplers, schedules
from diffusion_jax.evaluation import solver_errors
from diffusion_jax.evaluation.class_agreement import mean_distance, share_read_as
from diffusion_jax.evaluation.features import shipped_classifier
from diffusion_jax.explorer import guidance_grid, latent_view, network, pictures, prompt, solver_plot
from diffusion_jax.images import to_float, to_uint8
from diffusion_jax.models import inspection


def near(ours, theirs, levels=1):
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= levels


# --- guidance ---------------------------------------------------------------------------------------------------------


def rows(digits, scale=3.0, kept=None, label='4', num=4, seed=1, steps=3, low=-30.0, high=30.0, rescale=0.0):
    asked = {'label': label, 'scale': scale}
    rest = (seed, num, 'ddim', steps, low, high, rescale)
    return list(guidance_grid.show(digits, asked, rest, kept))[-1]


def test_a_row_of_guidance_is_what_the_pipeline_draws(digits):
    message, shown, plot, call, kept = rows(digits, rescale=0.3, low=-4.0)
    assert message == ''
    settings = {'labels': [4], 'seed': 1, 'solver': 'ddim', 'steps': 3, 'guidance_rescale': 0.3}
    settings['guidance_interval'] = (-4.0, 30.0)
    found = pictures_of(shown)
    assert set(found) == {'chosen_row', *(f'row_{scale:g}' for scale in guidance_grid.SCALES)}
    for name, scale in (('chosen_row', 3.0), ('row_0', 0.0), ('row_15', 15.0)):
        images = digits.pipeline(4, guidance_scale=scale, **settings).images
        near(found[name], np.concatenate(list(images), axis=1))
    np.testing.assert_array_equal(executed(call)['images'], digits.pipeline(4, guidance_scale=3.0, **settings).images)
    drawn = {row.scale: row for row in kept.values()}
    network = shipped_classifier(digits.pipeline.class_names, (8, 8, 1))
    features, logits = network(drawn[3.0].images)
    traces = {(trace['name'], trace['yaxis']): trace for trace in plot['data']}
    assert traces['this scale', 'y']['y'] == [share_read_as(logits, np.full(4, 4))]
    assert traces['this scale', 'y2']['y'][0] == pytest.approx(mean_distance(features))


def test_rows_that_are_there_are_not_drawn_again(digits):
    *_, kept = rows(digits)
    parts = list(guidance_grid.show(digits, {'label': '4', 'scale': 5.0}, (1, 4, 'ddim', 3, -30.0, 30.0, 0.0), kept))
    assert sum(part[1] is None for part in parts) == 3  # one row of three calls
    *_, other = rows(digits, kept=kept, seed=2)
    assert len(other) == 7


def test_fidelity_and_diversity_are_what_they_say():
    logits = np.eye(3)[[0, 1, 1, 2]]
    assert share_read_as(logits, np.array([0, 1, 2, 2])) == 0.75
    assert mean_distance(np.zeros((3, 2))) == 0
    assert mean_distance(np.array([[0.0], [3.0], [6.0]])) == pytest.approx(4.0)
    with pytest.raises(UsageError, match='two of them'):
        mean_distance(np.zeros((1, 2)))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num': 17}, 'images must be from 1 to 16'),
        ({'num': 0}, 'images must be from 1'),
        ({'num': 16, 'steps': 100}, 'images times steps must be at most 800'),
        ({'scale': 16}, 'guidance scale must be from 0 to 15'),
        ({'low': 5.0, 'high': -5.0}, 'low < high'),
        ({'high': float('inf')}, 'to must be a number'),
        ({'rescale': 2}, 'rescale must be from 0 to 1'),
        ({'steps': 10**9}, 'steps must be from 1 to 100'),
    ],
)
def test_guidance_out_of_bounds_is_refused(digits, changes, message):
    with pytest.raises(UsageError, match=message):
        rows(digits, **changes)


# --- the network ------------------------------------------------------------------------------------------------------


def of_network(digits, block='down.0.blocks.0.res', removed=(), t=0.4, image=3, seed=2, label='3'):
    return network.view(digits, {'label': label}, image, t, seed, block, list(removed))


def test_activations_and_predictions_are_those_of_the_network(digits):
    svg, shown, call = of_network(digits, removed=['skip 1'])
    pipeline = digits.pipeline
    x0 = to_float(data.examples('digits').images[3:4])
    eps = jax.random.normal(jax.random.key(2), x0.shape)
    x_t = process.q_sample(pipeline.schedule, x0, 0.4, eps)
    found = pictures_of(shown)
    near(found['network_x_t'], to_uint8(x_t)[0])
    near(found['network_x0'], to_uint8(pipeline.denoiser([3])(x_t, 0.4).x0)[0])
    scale = np.ones(inspection.count_skips(pipeline.apply))
    scale[1] = 0
    apply, params = inspection.ablated(pipeline.apply, pipeline.params, scale)
    label = {'label': np.array([3], np.int32)}
    without = denoisers.ModelDenoiser(apply, params, pipeline.schedule, pipeline.prediction, label)(x_t, 0.4).x0
    near(found['network_x0_without'], to_uint8(without)[0])
    made = executed(call)
    np.testing.assert_allclose(made['x0_without'], without, atol=1e-4)
    values = np.asarray(made['values'])[0]
    assert float(text_of(shown, 'network_mean')) == pytest.approx(values.mean(), rel=2e-3, abs=1e-5)
    near(found['network_activations'], pictures.channels(values, np.abs(values).max(), network.CHANNELS), 2)
    assert svg.count('class="gone"') == 1
    assert svg.count('data-block=') == len(network.map_of(digits))


def test_every_block_has_a_view_and_only_the_choice_compiles_nothing(digits):
    of_network(digits)
    programs = inspection._activations._cache_size(), network._x0._cache_size()
    for block in network.map_of(digits):
        svg, shown, _ = of_network(digits, block.path, ['skip 0'], t=0.7)
        assert f'data-block="{block.path}" class="chosen"' in svg
        assert 'network_activations' in shown or 'gives no picture' in shown
    assert (inspection._activations._cache_size(), network._x0._cache_size()) == programs


def test_hovering_tells_shapes_and_parameters(digits):
    svg, _, _ = of_network(digits)
    block = next(block for block in network.map_of(digits) if block.kind == 'attention')
    assert f'{block.num_params:,} parameters' in svg
    assert 'gives ' + 'x'.join(map(str, block.output_shape)) in svg


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'block': 'up.99'}, 'unknown block'),
        ({'block': None}, 'unknown block'),
        ({'t': 0}, 't must be from 0.001'),
        ({'removed': ['skip 99']}, 'unknown skips'),
        ({'removed': ['skip 0'] * 500}, 'skips: choose'),
        ({'label': '<b>'}, 'unknown label'),
    ],
)
def test_a_network_asked_out_of_bounds_refuses(digits, changes, message):
    with pytest.raises(UsageError, match=message):
        of_network(digits, **changes)


# --- samplers ---------------------------------------------------------------------------------------------------------


def test_quality_and_paths_are_those_of_the_library(digits, monkeypatch):
    monkeypatch.setattr(solver_plot, 'NUM', 300)
    *_, (message, quality, paths, call) = solver_plot.show(digits, ['ddim', 'ddpm'], 'linear', 'log_snr', 5, 3)
    assert message == ''
    schedule = schedules.linear(1000)
    expected = list(solver_errors.against_calls(schedule, ['ddim', 'ddpm'], solver_plot.BUDGETS, 'log_snr', 300, 3))
    traces = {(trace['name'], trace['yaxis']): trace for trace in quality['data']}
    np.testing.assert_allclose(
        traces['ddim', 'y']['y'], [row.flow_error for row in expected if row.solver == 'ddim'], rtol=1e-6
    )
    np.testing.assert_allclose(
        traces['ddpm', 'y2']['y'], [row.distance for row in expected if row.solver == 'ddpm'], rtol=1e-6
    )
    assert traces['ddpm', 'y']['y'] == []
    plan = samplers.plan('ddim', schedule, 5, 'log_snr')
    states = solver_errors.states(solver_errors.EXAMPLE, schedule, plan, solver_plot.PATHS, 3)
    ends = next(trace for trace in paths['data'] if trace['name'] == 'ddim' and trace['mode'] == 'markers')
    np.testing.assert_allclose(ends['x'], states[-1, :, 0], rtol=1e-6)
    made = executed(call)
    np.testing.assert_allclose(made['states'], states, atol=1e-6)
    assert [row.solver for row in made['rows']] == [row.solver for row in expected]
    assert max(map(max, paths['data'][0]['z'])) == pytest.approx(float(solver_plot.density().max()))


def test_on_the_model_those_that_draw_noise_are_left_out(digits, monkeypatch):
    monkeypatch.setattr(solver_plot, 'MODEL_BUDGETS', (4, 8))
    asked = {'label': '2', 'scale': 1.5}
    *_, (message, quality) = solver_plot.show_on_model(digits, asked, ['dpmpp_2m', 'ddpm'], 'log_snr', 0)
    assert 'left out, as they draw noise: ddpm' in message
    (trace,) = quality['data']
    assert trace['x'] == [4, 8]
    assert trace['y'][1] < trace['y'][0]
    with pytest.raises(UsageError, match='all of these draw noise'):
        list(solver_plot.show_on_model(digits, asked, ['ddpm'], 'log_snr', 0))


# --- latents and texts ------------------------------------------------------------------------------------------------


def test_latents_are_those_of_the_autoencoder(stable):
    shown, call = latent_view.view(stable, 0, 2, 0.25)
    space, images = stable.pipeline.latents, stable.images.images
    first, second = (space.encode(to_float(images[k : k + 1])) for k in (0, 2))
    found = pictures_of(shown)
    np.testing.assert_array_equal(found['latent_image'], images[0])
    near(found['latent_back'], to_uint8(space.decode(first))[0])
    near(found['latent_between'], to_uint8(space.decode(0.75 * first + 0.25 * second))[0])
    limit = float(np.abs(np.stack([first, second])).max())
    near(found['latent_channels'], pictures.channels(np.asarray(first)[0], limit))
    made = executed(call, pipeline=stable.pipeline)
    near(found['latent_between'], np.asarray(made['between'])[0])
    assert len(frames_of(latent_view.animation(stable, 0, 2))) >= 2
    for bad in ((-1, 0, 0.5), (0, 99, 0.5), (0, 1, 1.5)):
        with pytest.raises(UsageError, match='must be from'):
            latent_view.view(stable, *bad)


def test_images_of_a_text_and_where_each_word_is_looked_at(stable):
    asked, rest = {'prompt': 'a red heart', 'scale': 3.0}, ('a dog', 4, 2, 3)
    *_, (shown, call, drawn) = prompt.show(stable, asked, rest, 0.5)
    settings = {'prompts': ['a red heart'], 'negative_prompt': 'a dog', 'guidance_scale': 3.0, 'seed': 4, 'steps': 3}
    images = stable.pipeline(2, **settings).images
    found = pictures_of(shown)
    for k in (0, 1):
        near(found[f'prompt_image_{k}'], images[k], 2)
    _, pieces, maps = prompt.maps_at(stable, drawn, 0.5)
    np.testing.assert_allclose(maps.sum(axis=-1), 1.0, atol=1e-4)
    assert pieces[0].startswith('<')
    assert ''.join(pieces[1:-1]) == 'aredheart'
    made = executed(call, pipeline=stable.pipeline)
    np.testing.assert_allclose(made['attention'], maps, atol=1e-3)
    near(found['attention_1'], to_uint8(maps[..., 1:2] / maps[..., 1].max() * 2 - 1), 1)
    for changes, message in (
        ({'prompt': 'x' * 401}, 'at most 400 characters'),
        ({'prompt': None}, 'must be a text'),
        ({'scale': 99}, 'guidance scale must be from'),
    ):
        with pytest.raises(UsageError, match=message):
            list(prompt.show(stable, asked | changes, rest, 0.5))
    with pytest.raises(UsageError, match='images must be from 1 to 4'):
        list(prompt.show(stable, asked, ('', 0, 5, 3), 0.5))
