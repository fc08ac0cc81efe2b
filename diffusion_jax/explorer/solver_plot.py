"""Tab 6: solvers on data whose answer is known, and on the model."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation import solver_errors
from diffusion_jax.explorer import asking, calls, checks, pictures
from diffusion_jax.explorer.plots import COLOURS, numbers, panels, points
from diffusion_jax.explorer.schedule_choice import OWN, chosen
from diffusion_jax.explorer.subject import Subject
from diffusion_jax.samplers import DESCRIPTIONS, SOLVERS, TIME_SPACINGS
from diffusion_jax.schedules import SCHEDULES

TITLE = 'Samplers'
BUDGETS = (5, 10, 20, 50, 100)
MODEL_BUDGETS = (5, 10, 20)
MODEL_IMAGES = 4
MOST_SOLVERS = 6
NUM = 2000
PATHS = 24  # trajectories that are drawn
EXTENT = 2.2
GRID = np.linspace(-EXTENT, EXTENT, 81)
SPACINGS = tuple(sorted(TIME_SPACINGS))
"""Those that fit every schedule."""
PANELS = ('distance to the exact probability flow', 'distance to the data')


@jax.jit
def _density(x):
    return jnp.exp(solver_errors.EXAMPLE.log_density(x))


def density() -> np.ndarray:
    """That of the mixture's data on GRID x GRID, rows of one y."""
    x, y = np.meshgrid(GRID, GRID)
    points = np.stack([x.ravel(), y.ravel()], axis=1).astype(np.float32)
    return np.asarray(_density(points)).reshape(x.shape)


def checked(subject: Subject, solvers: Any, schedule: Any, spacing: Any, steps: Any, seed: Any):
    """(solvers, schedule, spacing, steps, seed), or a `UsageError`."""
    names = checks.several('solvers', solvers, SOLVERS, MOST_SOLVERS)
    choice = chosen(subject, checks.choice('schedule', schedule, (*SCHEDULES, OWN)), '1000')
    checks.choice('spacing', spacing, SPACINGS)
    steps = checks.whole('steps', steps, 1, checks.MAX_STEPS)
    return names, choice, spacing, steps, checks.whole('seed', seed, 0, checks.MAX_SEED)


def quality(measured: list[solver_errors.Measured], names: list[str], what: str) -> dict[str, Any]:
    """The plot of quality against calls, as a dict."""
    on_mixture = what == 'mixture'
    titles = PANELS if on_mixture else ('distance to many calls of ' + solver_errors.REFERENCE[0],)
    traces = []
    for name in names:
        colour = COLOURS[names.index(name) % len(COLOURS)]
        rows = [row for row in measured if row.solver == name]
        looks = {'mode': 'lines+markers', 'line': {'color': colour, 'dash': _dash(name)}}
        exact = [row for row in rows if np.isfinite(row.flow_error)]
        at = [row.calls for row in exact]
        traces.append(points(0, at, [row.flow_error for row in exact], name, legend=not on_mixture, **looks))
        if on_mixture:
            at = [row.calls for row in rows]
            traces.append(points(1, at, [row.distance for row in rows], name, **looks))
    layout = panels(titles, 'model calls', log=(0, 1), height=360, columns=len(titles))
    layout['legend']['y'] = -0.25
    for axis in [key for key in layout if key.startswith('xaxis')]:
        layout[axis] |= {'type': 'log', 'tickvals': list(BUDGETS)}
    return {'data': traces, 'layout': layout}


def _dash(name: str) -> str:
    return 'dash' if DESCRIPTIONS[name].stochastic else 'solid'


def paths(choice, names: list[str], spacing: str, steps: int, seed: int) -> dict[str, Any]:
    """The plot of trajectories over the density, as a dict."""
    contour = {
        'type': 'contour',
        'x': numbers(GRID),
        'y': numbers(GRID),
        'z': [numbers(row) for row in density()],
        'colorscale': 'Greys',
        'reversescale': False,
        'showscale': False,
        'contours': {'coloring': 'fill'},
        'line': {'width': 0},
        'hoverinfo': 'skip',
        'name': 'density of the data',
    }
    traces: list[dict[str, Any]] = [contour]
    for name in names:
        colour = COLOURS[names.index(name) % len(COLOURS)]
        plan = solver_errors.samplers.plan(name, choice.schedule, steps, spacing)
        states = solver_errors.states(solver_errors.EXAMPLE, choice.schedule, plan, PATHS, seed)
        # One line with gaps, a path after the other.
        x, y = (np.append(states[:, :, k], np.full((1, PATHS), np.nan), axis=0).T.ravel() for k in (0, 1))
        traces.append(points(0, x, y, name, mode='lines', line={'color': colour, 'width': 1}, legend=False))
        end = {'color': colour, 'size': 6}
        traces.append(points(0, states[-1, :, 0], states[-1, :, 1], name, mode='markers', marker=end))
    layout = panels((f'{PATHS} samples on their way, over the density of the data',), '', columns=1, height=560)
    layout['xaxis'] |= {'range': [-EXTENT, EXTENT], 'constrain': 'domain', 'scaleanchor': 'y'}
    layout['yaxis'] |= {'range': [-EXTENT, EXTENT], 'constrain': 'domain'}
    layout['legend'] = {'x': 1.0, 'y': 1.0}
    return {'data': traces, 'layout': layout}


def show(
    subject: Subject, solvers: Any, schedule: Any, spacing: Any, steps: Any, seed: Any
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any], str]]:
    """Yields (message, quality, paths, Python) as solver after solver is measured on the mixture."""
    names, choice, spacing, steps, seed = checked(subject, solvers, schedule, spacing, steps, seed)
    own = schedule == OWN
    call = calls.python(
        subject if own else None,
        'from diffusion_jax.evaluation import solver_errors',
        choice.call,
        f'rows = list(solver_errors.against_calls(schedule, {names!r}, {BUDGETS!r}, {spacing!r}, {NUM}, {seed}))',
        f'plan = dj.samplers.plan({names[0]!r}, schedule, {steps}, {spacing!r})',
        f'states = solver_errors.states(solver_errors.EXAMPLE, schedule, plan, {PATHS}, {seed})',
    )
    drawn = paths(choice, names, spacing, steps, seed)
    measured: list[solver_errors.Measured] = []
    yield pictures.note('measuring ..'), quality(measured, names, 'mixture'), drawn, call
    for row in solver_errors.against_calls(choice.schedule, names, BUDGETS, spacing, NUM, seed):
        measured.append(row)
        if row.solver != names[-1] and row.calls >= BUDGETS[-1]:
            yield pictures.note(f'{row.solver} is measured ..'), quality(measured, names, 'mixture'), drawn, call
    yield '', quality(measured, names, 'mixture'), drawn, call


def show_on_model(
    subject: Subject, asked: dict[str, Any], solvers: Any, spacing: Any, seed: Any
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yields (message, quality) as the solvers are measured on the model."""
    names, _, spacing, _, seed = checked(subject, solvers, OWN, spacing, 1, seed)
    exact = [name for name in names if not DESCRIPTIONS[name].stochastic]
    if not exact:
        raise UsageError('all of these draw noise: on the model, solvers that draw none are held to many calls of one.')
    settings = {**asking.settings(subject, asked), 'seed': seed}
    measured: list[solver_errors.Measured] = []
    made, told = 0, 0
    for row in solver_errors.on_model(subject.pipeline, MODEL_IMAGES, exact, MODEL_BUDGETS, spacing, **settings):
        if row is None:
            made += 1
            if made - told >= 10:
                told = made
                yield pictures.note(f'{made} model calls made ..'), None
        else:
            measured.append(row)
            yield pictures.note(f'{made} model calls made ..'), quality(measured, exact, 'model')
    note = f'{MODEL_IMAGES} images, {made} model calls; in units of [-1, 1]'
    if len(exact) < len(names):
        note += f'; left out, as they draw noise: {", ".join(name for name in names if name not in exact)}'
    yield pictures.note(note), quality(measured, exact, 'model')


def tab(page) -> None:
    import gradio as gr

    subject = page.subject
    state = gr.State(None, time_to_live=page.seconds_kept)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            solvers = gr.Dropdown(
                list(SOLVERS),
                value=['ddim', 'dpmpp_2m', 'heun'],
                multiselect=True,
                max_choices=MOST_SOLVERS,
                label='solvers',
                elem_id='samplers-solvers',
            )
            schedule = gr.Dropdown([OWN, *SCHEDULES], value='linear', label='schedule', elem_id='samplers-schedule')
            spacing = gr.Dropdown(list(SPACINGS), value='log_snr', label='spacing')
            steps = gr.Slider(
                1, checks.MAX_STEPS, value=10, step=1, label='steps of the paths', elem_id='samplers-steps'
            )
            seed = gr.Number(0, precision=0, label='seed', elem_id='samplers-seed')
            asked = asking.widgets(subject, 'samplers')
            model = gr.Button('Measure on the model', size='sm', elem_id='samplers-model')
            page.stop_button('samplers')
        with gr.Column(scale=3, min_width=400):
            said = gr.HTML(elem_id='samplers-message')
            plot = gr.Plot(show_label=False, elem_id='samplers-quality')
            drawn = gr.Plot(show_label=False, elem_id='samplers-paths')
            said_of_model = gr.HTML(elem_id='samplers-model-message')
            of_model = gr.Plot(show_label=False, visible=False, elem_id='samplers-on-model')
            code = page.code('samplers')

    def measured(solvers, schedule, spacing, steps, seed, *rest):
        for message, quality, paths, call in show(subject, solvers, schedule, spacing, steps, seed):
            yield message, page.plotted(quality), page.plotted(paths), call, True

    controls = {'solvers': solvers, 'schedule': schedule, 'spacing': spacing, 'steps': steps, 'seed': seed, **asked}
    page.tab('samplers', controls, measured, [], [said, plot, drawn, code, state], drawn=state)
    page.react([widget.input for widget in (solvers, schedule, spacing, seed)], 'samplers')
    page.react([steps.release], 'samplers')

    def measured_on_model(solvers, spacing, seed, *conditions):
        conditions = dict(zip(asked, conditions, strict=True))
        for message, quality in show_on_model(subject, conditions, solvers, spacing, seed):
            yield message, gr.skip() if quality is None else gr.Plot(page.plotted(quality), visible=True)

    inputs = [solvers, spacing, seed, *asked.values()]
    page.sample_on(model.click, measured_on_model, inputs, [said_of_model, of_model], 'samplers')
