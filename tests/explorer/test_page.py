"""The page in a browser: every tab opened, its main control moved, and what it shows held against the library."""

import time

import jax
import numpy as np
import pytest
from pages import executed

from diffusion_jax import data, process, samplers, schedules
from diffusion_jax.compilation import count_programs
from diffusion_jax.evaluation import solver_errors
from diffusion_jax.explorer import forward, network, pictures, solver_plot
from diffusion_jax.explorer.assembly import tabs_of
from diffusion_jax.images import to_float, to_uint8
from diffusion_jax.models import inspection

pytestmark = pytest.mark.browser


def near(ours, theirs, levels=1):
    return ours is not None and bool(np.abs(ours.astype(int) - np.asarray(theirs).astype(int)).max() <= levels)


def test_dragging_t_shows_the_librarys_x_t_and_compiles_nothing(browser, digits):
    browser.open()
    browser.until(lambda: browser.text('#t'))
    browser.slide('forward-t', 0.4)
    browser.until(lambda: browser.text('#t').startswith('0.4 '))
    for t in (0.9, 0.2, 0.65):
        browser.slide('forward-t', t)
        browser.until(lambda t=t: browser.text('#t').startswith(f'{t} '))
        schedule, x0 = digits.pipeline.schedule, np.asarray(to_float(data.examples('digits').images[:1]))
        eps = np.asarray(jax.device_get(jax.random.normal(jax.random.key(0), x0.shape)))
        expected = to_uint8(np.float32(schedule.alpha(t)) * x0 + np.float32(schedule.sigma(t)) * eps)
        assert near(browser.picture('jump'), expected[0])
        shares = schedules.levels(schedule, t)
        assert browser.text('#signal').strip() == f'{100 * shares.signal:.3g} %'
    browser.slide('forward-image', 4)
    browser.until(lambda: near(browser.picture('image'), data.examples('digits').images[4]))
    # What the test itself called compiled in this process, too; from here on there is the page alone.
    compiled = count_programs()()
    for t in (0.77, 0.12, 0.5):
        browser.slide('forward-t', t)
        browser.until(lambda t=t: browser.text('#t').startswith(f'{t} '))
    assert browser.compiled() == compiled


def test_the_reverse_tab_draws_and_scrubs_what_the_library_draws(browser, digits):
    browser.open()
    browser.go_to('Reverse')
    browser.until(lambda: 'state 20 of 20' in browser.text('#x_t'))
    browser.write('reverse-seed', '4')
    browser.slide('reverse-steps', 8)
    browser.click('#reverse-draw')
    browser.until(lambda: 'state 8 of 8' in browser.text('#x_t'))
    settings = {'labels': [0], 'guidance_scale': 1.5, 'seed': 4, 'solver': 'ddim', 'steps': 8}
    whole = digits.pipeline.trajectory(1, **settings)
    assert near(browser.picture('x0'), digits.pipeline(1, **settings).images[0])
    browser.slide('reverse-moment', 3)
    browser.until(lambda: 'state 3 of 8' in browser.text('#x_t'))
    assert near(browser.picture('x_t'), to_uint8(whole.x[3, 0]))
    assert near(browser.picture('x0'), to_uint8(whole.x0[3, 0]))
    browser.click('#reverse-forth')
    browser.until(lambda: 'state 4 of 8' in browser.text('#x_t'))
    assert near(browser.picture('x_t'), to_uint8(whole.x[4, 0]))
    browser.click('#reverse-back')
    browser.until(lambda: 'state 3 of 8' in browser.text('#x_t'))
    browser.click('#reverse-play')
    browser.until(lambda: 'state 8 of 8' in browser.text('#x_t'))
    browser.click('#reverse-gif')
    browser.until(lambda: browser.all('#reverse_animation img'))
    # Another seed and number of steps: the same program.
    compiled = count_programs()()
    browser.write('reverse-seed', '11')
    browser.slide('reverse-steps', 13)
    browser.slide('reverse-scale', 4.0)
    browser.click('#reverse-draw')
    browser.until(lambda: '8 of 13' in browser.text('#x_t') and browser.picture('change') is not None)
    assert browser.compiled() == compiled


def test_the_schedules_are_the_librarys_in_the_plot(browser):
    browser.open(tab='schedules', names='linear,flow', shift='3', solver='dpmpp_2m', steps='5')
    traces = browser.until(lambda: browser.plot('schedules-plot'))
    by_name = {(trace['name'], trace['yaxis']): trace for trace in traces}
    linear = schedules.levels(schedules.linear(1000), np.linspace(0, 1, 201))
    np.testing.assert_allclose(by_name['linear', 'y']['y'], linear.alpha_bar, rtol=1e-9)
    shifted = schedules.levels(schedules.flow(3.0), np.linspace(0, 1, 201))
    np.testing.assert_allclose(by_name['flow, shift 3', 'y']['y'], shifted.alpha_bar, rtol=1e-9, atol=1e-12)
    browser.slide('schedules-steps', 7)
    plan = samplers.plan('dpmpp_2m', schedules.linear(1000), 7)

    def marks():
        traces = browser.plot('schedules-plot')
        return [trace['x'] for trace in traces if trace['name'] == 'dpmpp_2m, 7 steps']

    np.testing.assert_allclose(browser.until(marks)[0], np.unique(plan.times), rtol=1e-9)


def test_a_click_on_the_map_shows_that_blocks_activations(browser, digits):
    browser.open(tab='network', label='5', t='0.3', image='2')
    browser.until(lambda: browser.picture('network_activations') is not None)
    block = next(block for block in network.map_of(digits) if block.side == 'up' and block.kind == 'res_block')
    browser.until(lambda: browser.all(f'g[data-block="{block.path}"] rect'))
    browser.driver.find_element('css selector', f'g[data-block="{block.path}"] rect').click()
    browser.until(lambda: browser.text('#network_block').startswith(f'{block.path},'))
    pipeline = digits.pipeline
    x_t = network.noisy(digits, data.examples('digits').images[2], 0.3, 0)
    t = np.float32([pipeline.schedule.timestep(0.3)])
    label = {'label': np.array([5], np.int32)}
    found = inspection.activations(pipeline.apply, pipeline.params, x_t, t, **label).blocks[block.path]
    assert browser.text('#network_mean') == pictures.formatted(float(np.asarray(found)[0].mean())).replace(
        '&minus;', '\u2212'
    )
    # Leaving out a skip changes the prediction and compiles nothing.
    compiled = count_programs()()
    box = browser.all('#network-skips input')[0]
    box.click()
    browser.until(lambda: browser.picture('network_x0_without') is not None)
    assert browser.compiled() == compiled
    scale = [0.0] + [1.0] * (inspection.count_skips(pipeline.apply) - 1)
    without = network.predicted(digits, x_t, 0.3, label, scale)
    assert near(browser.picture('network_x0_without'), to_uint8(without))
    assert browser.all('#network-map path.gone')


def test_dragging_the_scale_draws_a_row_of_the_pipelines_and_compiles_nothing(browser, digits):
    browser.open(tab='guidance', label='8', scale='2.5', steps='3', images='4')
    browser.until(lambda: browser.picture('row_15') is not None)
    settings = {'labels': [8], 'seed': 0, 'solver': 'ddim', 'steps': 3}
    row = np.concatenate(list(digits.pipeline(4, guidance_scale=2.5, **settings).images), axis=1)
    assert near(browser.picture('chosen_row'), row)
    compiled = count_programs()()
    browser.drag('guidance-scale', 6.0)
    browser.until(lambda: 'scale 6 ' in browser.text('#chosen_row'))
    assert browser.compiled() == compiled
    row = np.concatenate(list(digits.pipeline(4, guidance_scale=6.0, **settings).images), axis=1)
    assert near(browser.picture('chosen_row'), row)
    assert 'scale=6' in browser.driver.current_url
    traces = browser.until(lambda: browser.plot('guidance-plot'))
    marked = next(trace for trace in traces if trace['name'] == 'this scale')
    assert marked['x'] == [6.0]
    assert f'read as asked: {100 * marked["y"][0]:.3g} %' in browser.text('#chosen_row')


def test_the_samplers_tab_plots_what_the_library_measures(browser):
    browser.open(tab='samplers', solvers='ddim', steps='6')
    browser.until(lambda: browser.plot('samplers-quality') and browser.text('#samplers-message').strip() == '')
    rows = list(solver_errors.against_calls(schedules.linear(1000), ['ddim'], solver_plot.BUDGETS, 'log_snr', 2000, 0))

    def errors():
        traces = [trace for trace in browser.plot('samplers-quality') or [] if trace['yaxis'] == 'y']
        return traces and len(traces[0]['y']) == len(rows) and traces[0]

    np.testing.assert_allclose(browser.until(errors)['y'], [row.flow_error for row in rows], rtol=1e-4)
    browser.drag('samplers-steps', 12)
    plan = samplers.plan('ddim', schedules.linear(1000), 12, 'log_snr')
    states = solver_errors.states(solver_errors.EXAMPLE, schedules.linear(1000), plan, solver_plot.PATHS, 0)

    def ends():
        traces = browser.plot('samplers-paths') or []
        found = [trace['x'] for trace in traces if trace.get('mode') == 'markers']
        return found and np.allclose(found[0], states[-1, :, 0], atol=1e-4)

    browser.until(ends)


def test_a_view_is_in_the_url_and_comes_back(browser):
    browser.open(tab='reverse', label='3', seed='9', steps='5', state='2', second='euler')
    browser.until(lambda: 'state 2 of 5' in browser.text('#x_t'))
    shown = browser.picture('x_t'), browser.picture('x_t_b')
    browser.until(lambda: 'state=2' in browser.driver.current_url)
    url = browser.driver.current_url
    assert 'label=3&' in url
    browser.driver.get('about:blank')
    browser.driver.get(url)
    browser.until(lambda: 'state 2 of 5' in browser.text('#x_t'))
    for before, after in zip(shown, (browser.picture('x_t'), browser.picture('x_t_b')), strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_view_of_the_url_is_not_overwritten_by_the_plain_one(browser, monkeypatch):
    """A browser selects the first tab as it opens: its answer, however late, must not show other settings."""
    view = forward.view

    def late(subject, image, schedule, length, t, *rest):
        if t == 0.5:
            time.sleep(2)
        return view(subject, image, schedule, length, t, *rest)

    monkeypatch.setattr(forward, 'view', late)
    browser.open(tab='forward', t='0.35', image='7')
    browser.until(lambda: browser.text('#t').startswith('0.35 '))
    time.sleep(3)
    assert browser.text('#t').startswith('0.35 ')
    assert near(browser.picture('image'), data.examples('digits').images[7])


@pytest.mark.parametrize(
    'query',
    [
        {'tab': '<script>alert(1)</script>', 't': '0.3'},
        {'tab': 'forward', 't': 'nan', 'seed': '1e400', 'schedule': '<img src=x onerror=alert(1)>', 'T': '12'},
        {'tab': 'forward', 't': '7', 'image': '99999999999', 'nothing': 'x' * 3000},
        {'tab': 'schedules', 'names': ',,,linear,<b>', 'steps': '-5'},
    ],
)
def test_a_hostile_url_opens_a_page_all_the_same(browser, query):
    browser.open(**query)
    if query['tab'] == 'schedules':
        traces = browser.until(lambda: browser.plot('schedules-plot'))
        assert {trace['name'] for trace in traces} == {'linear', 'ddim, 10 steps'}
    else:
        browser.until(lambda: browser.text('#t').startswith('0.5 ') or query.get('t') == '0.3')
        browser.until(lambda: browser.text('#t'))
    assert not browser.all('#footer script')
    assert 'alert' not in browser.js('return document.body.innerHTML').replace('alertdialog', '')


def test_no_request_leaves_this_machine(browser, digits):
    browser.open()
    for name, module in tabs_of(digits).items():
        browser.go_to(module.TITLE)
        drawn = f'#tab-{name} :is(figure img, svg.dj-map, .js-plotly-plot)'
        browser.until(lambda drawn=drawn: browser.all(drawn), drawn)
    elsewhere = [
        url
        for url in browser.requests()
        if not url.startswith((browser.address, 'data:', 'blob:', 'about:', 'chrome:', 'chrome-extension:'))
    ]
    assert elsewhere == []


def test_the_python_on_the_page_makes_the_picture_on_it(browser):
    browser.open(tab='forward', image='2', t='0.4', seed='6', schedule='cosine')
    browser.until(lambda: browser.text('#t').startswith('0.4 '))
    browser.click('#forward-code-fold button')
    call = browser.until(lambda: browser.code('forward'))
    assert near(browser.picture('jump'), np.asarray(executed(call)['x_t'])[0])


def test_what_fails_is_said_on_the_page(browser):
    browser.open(tab='schedules', names='linear', T='10', solver='ddim', steps='50')
    message = browser.until(lambda: browser.text('#schedules-message .dj-message'))
    assert 'steps must be in 1..10' in message


def test_a_chain_in_process_is_the_librarys(browser):
    browser.open(tab='forward', image='1', t='0.2', schedule='linear', T='50')
    browser.until(lambda: 'step 10 of 50' in browser.text('#t'))
    x0 = to_float(data.examples('digits').images[1:2])
    chain = process.q_chain(schedules.linear(50), x0, jax.random.key(1), 50)
    assert near(browser.picture('chain'), to_uint8(chain[10, 0]))
