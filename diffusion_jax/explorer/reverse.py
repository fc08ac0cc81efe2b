"""Tab 2: from noise to an image, call by call; back and forth through it; two solvers from the same noise."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from diffusion_jax.errors import UsageError
from diffusion_jax.explorer import asking, calls, checks, curves, pictures
from diffusion_jax.explorer.pictures import Picture, formatted
from diffusion_jax.explorer.subject import Subject
from diffusion_jax.pipelines.stepwise import Call, walk
from diffusion_jax.samplers import SOLVERS
from diffusion_jax.schedules import levels

TITLE = 'Reverse'
NONE = 'none'
EVERY = 0.15  # seconds between what is shown of a run that goes on
CURVE = np.linspace(0.002, 1.0, 200)


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trajectory that was drawn, on the host.

    Attributes:
      solver: its name.
      times: [N + 1], of each state.
      x: [N + 1, h, w, C], the states, from the noise on.
      x0, eps: [N, h, w, C], what was predicted in each state but the last.
      settings: of the pipeline's call that draws its last state.
    """

    solver: str
    times: Float[np.ndarray, 'N+1']
    x: Float[np.ndarray, 'N+1 h w C']
    x0: Float[np.ndarray, 'N h w C']
    eps: Float[np.ndarray, 'N h w C']
    settings: dict[str, Any]

    @property
    def num_calls(self) -> int:
        return len(self.x0)


def settings_of_run(subject: Subject, asked: dict[str, Any], seed: Any, solver: Any, steps: Any) -> dict[str, Any]:
    """A pipeline's keyword arguments, or a `UsageError`."""
    return {
        **asking.settings(subject, asked),
        'seed': checks.whole('seed', seed, 0, checks.MAX_SEED),
        'solver': checks.choice('solver', solver, SOLVERS),
        'steps': checks.whole('steps', steps, 1, checks.MAX_STEPS),
    }


def draw(subject: Subject, settings: dict[str, Any]) -> Iterator[Call | Run]:
    """The calls of a run, and at last the run."""
    pipeline = subject.pipeline
    seen = []
    for call in walk(pipeline, 1, **settings):
        seen.append(call)
        yield call
    plan = pipeline.plan(settings['solver'], settings['steps'])
    yield Run(
        settings['solver'],
        np.asarray(plan.times, np.float64),
        np.stack([call.x_t[0] for call in seen] + [seen[-1].x[0]]),
        np.stack([call.x0[0] for call in seen]),
        np.stack([call.eps[0] for call in seen]),
        settings,
    )


def image_of(subject: Subject, x: Float[np.ndarray, 'h w C']) -> np.ndarray:
    """x0 as an image, uint8: decoded, if the model works in latents."""
    latents = subject.pipeline.latents
    return pictures.shown(x if latents is None else np.asarray(latents.decode(x[None]))[0])


def state_of(subject: Subject, x: Float[np.ndarray, 'h w C']) -> np.ndarray:
    """x_t as it is seen: of latents, their channels side by side."""
    return pictures.shown(x) if subject.pipeline.latents is None else pictures.channels(x, 3.0)


def at_moment(subject: Subject, run: Run, moment: int, suffix: str = '') -> list[Picture]:
    """The pictures of one state, 0 .. N, of a run."""
    number = f'{run.solver}, state {moment} of {run.num_calls}'
    shown = [Picture(f'x_t{suffix}', state_of(subject, run.x[moment]), f'x\u209c, {run.solver}', number)]
    if moment < run.num_calls:
        shown += [
            Picture(
                f'eps{suffix}', pictures.signed(run.eps[moment], 3.0), 'predicted noise \u03b5', 'red +3, blue \u22123'
            ),
            Picture(f'x0{suffix}', image_of(subject, run.x0[moment]), 'predicted x\u2080'),
        ]
    else:
        shown.append(Picture(f'x0{suffix}', image_of(subject, run.x[-1]), 'the sample'))
    if moment:
        change = run.x[moment] - run.x[moment - 1]
        caption = 'in the last step; red +0.5, blue \u22120.5'
        shown.append(Picture(f'change{suffix}', pictures.signed(change, 0.5), 'change of x\u209c', caption))
    return shown


def nearest(run: Run, t: float) -> int:
    """The state of a run that is nearest in time."""
    return int(np.abs(run.times - t).argmin())


def view(subject: Subject, runs: list[Run], moment: Any) -> tuple[str, str]:
    """(HTML, Python) of one state of a run, and of another run's nearest in time."""
    if not runs:
        raise UsageError('nothing is drawn yet: press Draw.')
    first = runs[0]
    moment = checks.whole('state', moment, 0, first.num_calls)
    t = float(first.times[moment])
    shown = pictures.row(at_moment(subject, first, moment))
    for other in runs[1:]:
        shown += pictures.row(at_moment(subject, other, nearest(other, t), '_b'))
        apart = Picture(
            'apart',
            pictures.signed(first.x[moment] - other.x[nearest(other, t)], 1.0),
            'first minus second',
            'x\u209c of one and of the other; red +1, blue \u22121',
        )
        shown += pictures.row([apart])
    schedule = subject.pipeline.schedule
    at = levels(schedule, t)
    marks = [time for time in first.times if time >= CURVE[0]]
    drawing = curves.curve(
        CURVE, np.maximum(levels(schedule, CURVE).log_snr, -20.0), marks, max(t, CURVE[0]), 'the schedule', 'log-SNR'
    )
    numbers = pictures.table(
        [
            ('reverse_t', 't', formatted(t)),
            ('reverse_alpha_bar', 'alpha-bar', formatted(float(at.alpha_bar))),
            ('reverse_log_snr', 'log-SNR', formatted(float(at.log_snr))),
        ]
    )
    return shown + drawing + numbers, _call(subject, runs, moment)


def _call(subject: Subject, runs: list[Run], moment: int) -> str:
    decode = '' if subject.pipeline.latents is None else 'pipeline.latents.decode'
    lines = []
    for k, run in enumerate(runs):
        end = '_b' * k
        lines += [
            f'settings = dict({calls.arguments(run.settings)})',
            f'image{end} = pipeline(1, **settings).images[0]',
            'trajectory = pipeline.trajectory(1, **settings)',
        ]
        state = moment if k == 0 else nearest(run, float(runs[0].times[moment]))
        lines.append(f'x_t{end} = trajectory.x[{state}]')
        if state < run.num_calls:
            x0 = f'trajectory.x0[{state}]'
            lines.append(f'x0{end} = to_uint8({decode}({x0}))[0]' if decode else f'x0{end} = to_uint8({x0})[0]')
    return calls.python(subject, *lines)


def animation(subject: Subject, runs: list[Run]) -> str:
    """Each run from noise to sample, x_t beside the predicted x0, as a GIF in HTML."""
    if not runs:
        raise UsageError('nothing is drawn yet: press Draw.')
    made = []
    for k, run in enumerate(runs):
        last = run.num_calls - 1
        frames = []
        for moment in range(run.num_calls + 1):
            x0 = image_of(subject, run.x0[min(moment, last)] if moment <= last else run.x[-1])
            frames.append(np.concatenate([_resized(pictures.shown(run.x[moment]), x0.shape), x0], axis=1))
        made.append(
            pictures.animation(
                f'reverse_animation{"_b" * k}', pictures.gif(frames, side=336), f'{run.solver}: x\u209c, x\u2080'
            )
        )
    return f'<div class="dj-row">{"".join(made)}</div>'


def _resized(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Latents' picture at the size of the image, with its channels."""
    factor = shape[0] // image.shape[0]
    return np.broadcast_to(np.repeat(np.repeat(image, factor, axis=0), factor, axis=1), shape)


def show(subject: Subject, asked: dict[str, Any], seed: Any, solver: Any, other: Any, steps: Any, moment: Any):
    """Draws, and yields (HTML, Python, runs, moment) as it goes."""
    names = [checks.choice('solver', solver, SOLVERS)]
    if checks.choice('second solver', other, (NONE, *SOLVERS)) != NONE:
        names.append(other)
    asked_of = [settings_of_run(subject, asked, seed, name, steps) for name in names]
    moment = checks.whole('state', moment, 0, 2 * checks.MAX_STEPS)
    runs: list[Run] = []
    for settings in asked_of:
        told = 0.0
        for drawn in draw(subject, settings):
            if isinstance(drawn, Run):
                runs.append(drawn)
            elif time.monotonic() - told > EVERY:
                told = time.monotonic()
                number = f'{drawn.index + 1} of {drawn.num_calls}'
                yield (
                    pictures.row(
                        [
                            Picture('x_t', state_of(subject, drawn.x_t[0]), f'x\u209c, {settings["solver"]}', number),
                            Picture('x0', image_of(subject, drawn.x0[0]), 'predicted x\u2080'),
                        ]
                    ),
                    None,
                    None,
                    None,
                )
    moment = moment if 0 < moment <= runs[0].num_calls else runs[0].num_calls
    yield (*view(subject, runs, moment), runs, moment)


def tab(page) -> None:
    import gradio as gr

    subject = page.subject
    runs = gr.State(None, time_to_live=page.seconds_kept)
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            asked = asking.widgets(subject, 'reverse')
            seed = gr.Number(0, precision=0, label='seed', elem_id='reverse-seed')
            solver = gr.Dropdown(list(SOLVERS), value='ddim', label='solver', elem_id='reverse-solver')
            other = gr.Dropdown([NONE, *SOLVERS], value=NONE, label='second solver, from the same noise')
            steps = gr.Slider(1, checks.MAX_STEPS, value=20, step=1, label='steps', elem_id='reverse-steps')
            with gr.Row():
                go = gr.Button('Draw', variant='primary', size='sm', elem_id='reverse-draw', min_width=60)
                page.stop_button('reverse')
            gif = gr.Button('animation (GIF)', size='sm', elem_id='reverse-gif')
        with gr.Column(scale=3, min_width=400):
            moment = gr.Slider(0, 2 * checks.MAX_STEPS, value=0, step=1, label='state', elem_id='reverse-moment')
            with gr.Row():
                back = gr.Button('\u25c0 step', size='sm', min_width=60, elem_id='reverse-back')
                forth = gr.Button('step \u25b6', size='sm', min_width=60, elem_id='reverse-forth')
                play = gr.Button('play', size='sm', min_width=60, elem_id='reverse-play')
                pause = gr.Button('pause', size='sm', min_width=60)
            status = gr.HTML()
            figure = gr.HTML(elem_id='reverse-figure')
            animated = gr.HTML(elem_id='reverse-animation')
            code = page.code('reverse')
    timer = gr.Timer(0.2, active=False)
    controls = {**asked, 'seed': seed, 'solver': solver, 'second': other, 'steps': steps, 'state': moment}

    def drawn(*values):
        *conditions, seed, solver, other, steps, moment = values
        yield gr.skip(), gr.skip(), None, gr.skip(), '', ''
        conditions = dict(zip(asked, conditions, strict=True))
        for html, call, made, state in show(subject, conditions, seed, solver, other, steps, moment):
            if made is None:
                yield html, gr.skip(), None, gr.skip(), '', ''
            else:
                yield html, call, made, gr.update(maximum=made[0].num_calls, value=state), '', ''

    outputs = [figure, code, runs, moment, animated, status]
    page.tab('reverse', controls, drawn, [], outputs, drawn=runs)
    page.react([go.click], 'reverse')

    def scrub(runs, moment):
        return view(subject, runs or [], moment)

    page.on(moment.input, scrub, [runs, moment], [figure, code])
    page.remembered(moment.change, 'reverse')
    for button, by in ((back, -1), (forth, 1)):

        def go_by(runs, moment, by=by):
            if not runs:
                raise UsageError('nothing is drawn yet: press Draw.')
            moment = checks.whole('state', moment, 0, 2 * checks.MAX_STEPS)
            moment = min(max(moment + by, 0), runs[0].num_calls)
            return (*view(subject, runs, moment), moment)

        page.on(button.click, go_by, [runs, moment], [figure, code, moment])

    def tick(runs, moment):
        if not runs or moment >= runs[0].num_calls:
            return gr.skip(), gr.skip(), gr.skip(), gr.Timer(active=False)
        return (*view(subject, runs, int(moment) + 1), int(moment) + 1, gr.skip())

    def start(runs, moment):
        if not runs:
            raise UsageError('nothing is drawn yet: press Draw.')
        return (0 if moment >= runs[0].num_calls else moment), gr.Timer(active=True), ''

    page.on(play.click, start, [runs, moment], [moment, timer, status])
    page.on(pause.click, lambda: gr.Timer(active=False), [], [timer])
    page.on(timer.tick, tick, [runs, moment], [figure, code, moment, timer])
    page.on(gif.click, lambda runs: animation(subject, runs or []), [runs], [animated])
