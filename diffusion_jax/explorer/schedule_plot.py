"""Tab 3: schedules side by side, and where on them a sampler would step."""

from typing import Any

import numpy as np

from diffusion_jax import samplers
from diffusion_jax.explorer import calls, checks
from diffusion_jax.explorer.plots import COLOURS, panels, points
from diffusion_jax.explorer.schedule_choice import CHAINS, LENGTHS, OWN, Choice, named
from diffusion_jax.explorer.subject import Subject
from diffusion_jax.process import chain_betas
from diffusion_jax.samplers import SOLVERS, SPACINGS
from diffusion_jax.schedules import SCHEDULES, levels

TITLE = 'Schedules'
NONE = 'none'
GRID = np.linspace(0.0, 1.0, 201)
MAX_SHIFT = 10.0
PANELS = ('alpha-bar', 'beta (variance added by a step)', 'log-SNR', 'SNR')


def curves_of(subject: Subject, names: Any, length: Any, zero: Any, shift: Any) -> list[tuple[str, Choice, str]]:
    """(name, schedule, dash of its line) of all that are asked for: rescaled and shifted ones beside the plain ones."""
    found = []
    shift = checks.number('shift', shift, 0.1, MAX_SHIFT)
    for name in checks.several('schedules', names, (OWN, *SCHEDULES), len(SCHEDULES) + 1):
        if name == OWN:
            schedule = subject.pipeline.schedule
            steps = schedule.num_timesteps or 1000
            found.append((OWN, Choice(schedule, 'schedule = pipeline.schedule', steps), 'solid'))
            continue
        found.append((name, named(name, length), 'solid'))
        if zero and name in CHAINS and length != 'continuous':
            found.append((f'{name}, zero terminal SNR', named(name, length, zero=True), 'dash'))
        if name == 'flow' and shift != 1:
            found.append((f'flow, shift {shift:g}', named(name, length, shift=shift), 'dash'))
    return found


def figure(
    subject: Subject,
    names: Any,
    length: Any,
    zero: Any,
    shift: Any,
    solver: Any,
    steps: Any,
    spacing: Any,
) -> tuple[dict[str, Any], str]:
    """(a Plotly figure as a dict, Python).

    Args:
      names: of SCHEDULES, and OWN.
      length: one of LENGTHS.
      zero: whether chains are shown rescaled to zero terminal SNR, too.
      shift: of 'flow', shown beside the plain one unless it is 1.
      solver: one of SOLVERS whose steps are marked, or 'none'.
      steps, spacing: of its grid.

    Raises:
      UsageError: a setting out of its bounds, or a grid that a schedule does not take.
    """
    steps = checks.whole('steps', steps, 1, checks.MAX_STEPS)
    checks.choice('spacing', spacing, SPACINGS)
    checks.choice('solver', solver, (NONE, *SOLVERS))
    traces: list[dict[str, Any]] = []
    code: list[str] = []
    needs_model = False
    for k, (name, choice, dash) in enumerate(curves_of(subject, names, length, zero, shift)):
        needs_model |= name == OWN
        colour = COLOURS[k % len(COLOURS)]
        at = levels(choice.schedule, GRID)
        betas = chain_betas(choice.schedule, choice.num_steps)
        kept = np.unique(np.linspace(0, len(betas) - 1, min(len(betas), 200)).round().astype(int))
        curves = ((GRID, at.alpha_bar), ((kept + 1) / len(betas), betas[kept]), (GRID, at.log_snr), (GRID, at.snr))
        for panel, (x, y) in enumerate(curves):
            line = {'color': colour, 'dash': dash, 'width': 2}
            traces.append(points(panel, x, y, name, line=line, mode='lines', legend=panel == 0))
        code += [choice.call, f'levels = dj.schedules.levels(schedule, np.linspace(0, 1, 201))  # {name}']
        code.append(f'betas = dj.process.chain_betas(schedule, {choice.num_steps})')
        if solver != NONE:
            plan = samplers.plan(solver, choice.schedule, steps, _fitting(spacing, choice))
            times = np.unique(np.asarray(plan.times))
            marked = levels(choice.schedule, times)
            for panel, y in ((0, marked.alpha_bar), (2, marked.log_snr), (3, marked.snr)):
                marker = {'color': colour, 'size': 7, 'symbol': 'circle-open'}
                traces.append(
                    points(panel, times, y, f'{solver}, {steps} steps', mode='markers', marker=marker, legend=False)
                )
            code.append(f'plan = dj.samplers.plan({solver!r}, schedule, {steps}, {_fitting(spacing, choice)!r})')
    layout = panels(PANELS, x_title='t', log=(1, 3))
    return {'data': traces, 'layout': layout}, calls.python(subject if needs_model else None, *code)


def _fitting(spacing: str, choice: Choice) -> str:
    """The spacing, or in continuous time, for one that is of a chain's indices, 'trailing'."""
    chain = choice.schedule.num_timesteps is not None
    return spacing if chain or spacing in samplers.CONTINUOUS_SPACINGS else 'trailing'


def tab(page) -> None:
    import gradio as gr

    subject = page.subject
    with gr.Row():
        with gr.Column(scale=1, min_width=260):
            names = gr.Dropdown(
                [OWN, *SCHEDULES],
                value=[OWN, 'linear', 'cosine'],
                multiselect=True,
                label='schedules',
                elem_id='schedules-names',
            )
            length = gr.Dropdown(list(LENGTHS), value='1000', label='T, steps of the chains')
            zero = gr.Checkbox(False, label='and rescaled to zero terminal SNR', elem_id='schedules-zero')
            shift = gr.Slider(
                0.1, MAX_SHIFT, value=1.0, step=0.1, label='shift of flow (1: none)', elem_id='schedules-shift'
            )
            solver = gr.Dropdown([NONE, *SOLVERS], value='ddim', label='mark the steps of')
            steps = gr.Slider(1, checks.MAX_STEPS, value=10, step=1, label='steps', elem_id='schedules-steps')
            spacing = gr.Dropdown(list(SPACINGS), value='trailing', label='spacing')
        with gr.Column(scale=3, min_width=400):
            said = gr.HTML(elem_id='schedules-message')
            plot = gr.Plot(show_label=False, elem_id='schedules-plot')
            code = page.code('schedules')

    def show(*values):
        drawn, call = figure(subject, *values)
        return '', page.plotted(drawn), call

    controls = {'names': names, 'T': length, 'zero': zero, 'shift': shift}
    controls |= {'solver': solver, 'steps': steps, 'spacing': spacing}
    page.tab('schedules', controls, show, [], [said, plot, code])
    changed = [widget.input for widget in (names, length, zero, shift, solver, steps, spacing)]
    page.react(changed, 'schedules')
