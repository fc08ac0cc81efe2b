"""The page: tabs, the footer, what happens between a widget and a function, and the view in the URL.

A tab says which widgets hold its settings and which function shows them. The page sees to the rest: one message instead
of a traceback, settings in the URL, the footer's counter, and the queue that one sampler at a time goes through.
"""

import dataclasses
import functools
import html
import inspect
import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import parse_qsl

import jax

from diffusion_jax.compilation import count_programs
from diffusion_jax.errors import SamplingDiverged, UsageError
from diffusion_jax.explorer import checks, pictures
from diffusion_jax.explorer.subject import Subject

LOGGER = logging.getLogger(__name__)

QUEUE = 16  # requests that wait for the sampler, over all sessions; more are refused
SECONDS_KEPT = 3600  # a session's trajectories, after it was last heard of

CSS = """
.dj-row {display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start}
.dj-figure {margin: 0; position: relative}
.dj-figure figcaption {font-weight: 600; margin-bottom: 4px; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap}
.dj-figure img {image-rendering: pixelated; border: 1px solid var(--border-color-primary); display: block}
.dj-figure a {font-size: 11px; opacity: .75; text-decoration: underline}
.dj-figure p {font-size: 12px; margin: 0; opacity: .8}
.dj-table {border-collapse: collapse; margin-top: 6px !important; width: auto !important}
.dj-table, .dj-table tr, .dj-table th, .dj-table td {border: none !important; text-align: left !important;
  padding: 3px 18px 3px 0 !important}
.dj-table th {font-weight: 500 !important} .dj-table td {font-variant-numeric: tabular-nums}
.dj-row + .dj-row {margin-top: 14px}
.dj-column {display: flex; flex-direction: column; gap: 8px}
.dj-heading {font-weight: 600; margin: 14px 0 4px 0}
.dj-formula {font-size: 18px; margin: 14px 0 4px 0}
.dj-bar {display: inline-block; width: 160px; height: 10px; background: var(--border-color-primary)}
.dj-bar i {display: block; height: 10px; background: #2166ac} .dj-noise i {background: #b2182b}
.dj-message {border: 1px solid #b2182b; border-left-width: 6px; padding: 10px 14px; white-space: pre-wrap}
.dj-note {opacity: .8; margin: 4px 0}
.dj-curve {margin-top: 10px; max-width: 100%}
.dj-curve polyline {fill: none; stroke: #2166ac; stroke-width: 1.5} .dj-curve circle {fill: #2166ac}
.dj-curve .now {fill: #b2182b} .dj-curve text {font-size: 11px; fill: var(--body-text-color)}
.dj-map {max-width: 100%} .dj-map g {cursor: pointer} .dj-map text {font-size: 12px; fill: #222; pointer-events: none}
.dj-map rect {stroke: #888} .dj-map .chosen rect {stroke: #b2182b; stroke-width: 3}
.dj-map path {fill: none; stroke: #2166ac; stroke-width: 2} .dj-map .gone {stroke: #b2182b; stroke-dasharray: 4 5}
.dj-map .skip {fill: var(--body-text-color)}
.dj-footer {font-size: 12px; opacity: .8; font-variant-numeric: tabular-nums}
footer {display: none !important}
"""

SCRIPT = """
<script>
window.djQuery = location.search;  // what the page was opened with, before any tab writes its own
window.djView = (tab, names, values) => {
  if (!window.djRead) return values;
  const query = new URLSearchParams({tab});
  names.forEach((name, i) => {
    const value = values[i];
    if (value !== null && value !== undefined) query.set(name, Array.isArray(value) ? value.join(',') : String(value));
  });
  try { history.replaceState(null, '', '?' + query.toString() + location.hash); } catch (error) { /* in a frame */ }
  return values;
};
</script>
"""


@dataclasses.dataclass(eq=False)
class Tab:
    """What the page knows of a tab.

    Attributes:
      controls: the settings' widgets by their names in the URL.
      show: (settings.., extra..) -> the outputs' values; a generator of them if it samples.
      extra: other inputs.
      outputs: of `show`; the first is a `gr.HTML`, which takes messages.
      drawn: the `gr.State` that tells that a sampling tab has something to show; None for the others. What samples has
        one output more, last: the word beside its stop button.
      runs: events that a stop button ends.
    """

    controls: dict[str, Any]
    show: Callable[..., Any]
    extra: list[Any]
    outputs: list[Any]
    drawn: Any = None
    runs: list[Any] = dataclasses.field(default_factory=list)

    @property
    def samples(self) -> bool:
        return inspect.isgeneratorfunction(self.show)

    @property
    def inputs(self) -> list[Any]:
        return [*self.controls.values(), *self.extra]


class Page:
    """Wires widgets to functions. Holds no session's state: that is in `gr.State`s."""

    def __init__(self, subject: Subject):
        self.subject = subject
        self.tabs: dict[str, Tab] = {}
        self.count = count_programs()
        self.footer: Any = None  # made first, shown last
        self.seconds_kept = SECONDS_KEPT
        self.ready: Any = None  # hidden: 'yes' once the view of the query is drawn
        self._stops: dict[str, tuple[Any, Any]] = {}  # by tab: the button, and the word beside it

    def code(self, name: str) -> Any:
        """Where the Python of what is shown stands."""
        import gradio as gr

        with gr.Accordion('the Python that makes this', open=False, elem_id=f'{name}-code-fold'):
            return gr.Code(language='python', interactive=False, show_label=False, elem_id=f'{name}-code')

    @staticmethod
    def plotted(figure: dict[str, Any]) -> Any:
        """A figure of `plots` as Gradio takes it."""
        import plotly.graph_objects

        return plotly.graph_objects.Figure(figure)

    def tab(self, name: str, controls, show, extra, outputs, drawn=None) -> Tab:
        if inspect.isgeneratorfunction(show):
            show, outputs = self._stoppable(name, show, outputs)
        self.tabs[name] = Tab(controls, show, extra, outputs, drawn)
        return self.tabs[name]

    # --- events -------------------------------------------------------------------------------------------------------

    def guarded(self, function: Callable[..., Any], outputs: Sequence[Any]) -> Callable[..., Any]:
        """The function with the footer as one more output, and a message where it fails."""
        import gradio as gr

        place = next((k for k, output in enumerate(outputs) if isinstance(output, gr.HTML)), None)

        def failed(error: Exception) -> list[Any]:
            if not isinstance(error, UsageError | SamplingDiverged):
                LOGGER.error('the explorer failed', exc_info=error)
            values = [gr.skip()] * len(outputs)
            if place is not None:
                values[place] = pictures.message(said(error))
            return [*values, self.footer_text()]

        def whole(values: Any) -> list[Any]:
            values = list(values) if isinstance(values, tuple) else [values] * bool(outputs)
            return [*values, self.footer_text()]

        if inspect.isgeneratorfunction(function):

            @functools.wraps(function)
            def generator(*args):
                try:
                    for values in function(*args):
                        yield whole(values)
                except Exception as error:
                    yield failed(error)

            return generator

        # Gradio reads the signature: a function that asks for the event's data is told of it.
        @functools.wraps(function)
        def plain(*args):
            try:
                return whole(function(*args))
            except Exception as error:
                return failed(error)

        return plain

    def _event(self, function, inputs, outputs, samples: bool, js: str | None = None) -> dict[str, Any]:
        """What an event of Gradio's takes. What samples is queued, one at a time; the rest is answered at once."""
        how = {'concurrency_id': 'sampler', 'concurrency_limit': 1} if samples else {'queue': False}
        return {
            'fn': self.guarded(function, outputs),
            'inputs': list(inputs),
            'outputs': [*outputs, self.footer],
            'js': js,
            'show_progress': 'minimal' if samples else 'hidden',
            'trigger_mode': 'once' if samples else 'always_last',
            'api_visibility': 'private',
            **how,
        }

    def on(self, trigger, function, inputs, outputs, then: str | None = None) -> Any:
        """`function(*inputs)` -> outputs when a widget says so, and then tab `then` is shown."""
        event = trigger(**self._event(function, inputs, outputs, samples=False))
        return event if then is None else event.then(**self.shows(then))

    def sample_on(self, trigger, function, inputs, outputs, name: str) -> None:
        """A generator of outputs, queued when a widget says so; the stop button of tab `name` ends it."""
        function, outputs = self._stoppable(name, function, outputs)
        self.tabs[name].runs.append(trigger(**self._event(function, inputs, outputs, samples=True)))

    def remembered(self, trigger: Any, name: str) -> None:
        """Writes a tab's settings into the URL when a widget changes; the server is not asked."""
        inputs = list(self.tabs[name].controls.values())
        trigger(None, inputs, None, js=self._url(name), queue=False, show_progress='hidden', api_visibility='private')

    def _url(self, name: str) -> str:
        return f"(...values) => window.djView('{name}', {json.dumps(list(self.tabs[name].controls))}, values)"

    def shows(self, name: str) -> dict[str, Any]:
        """What an event takes to show a tab as its widgets say, and to write them into the URL."""
        tab = self.tabs[name]
        return self._event(tab.show, tab.inputs, tab.outputs, tab.samples, self._url(name))

    def react(self, triggers: Sequence[Any], name: str) -> None:
        """Shows the tab anew at each of these."""
        for trigger in triggers:
            event = trigger(**self.shows(name))
            if self.tabs[name].samples:
                self.tabs[name].runs.append(event)

    def stop_button(self, name: str) -> None:
        """A button that ends what the tab is sampling, for the next in the queue, and the word that says so."""
        import gradio as gr

        button = gr.Button('Stop', size='sm', min_width=60, elem_id=f'{name}-stop')
        self._stops[name] = button, gr.HTML(elem_id=f'{name}-stopped')

    def _stoppable(self, name: str, show: Callable[..., Any], outputs: Sequence[Any]) -> tuple[Any, list[Any]]:
        """(show, outputs) with the word as one more output, which goes as a run begins.

        A run writes it once: what it has sent already may arrive after the button was pressed, and would wipe it.
        """
        import gradio as gr

        @functools.wraps(show)
        def stoppable(*args):
            word = ''
            for values in show(*args):
                yield (*values, word)
                word = gr.skip()

        return stoppable, [*outputs, self._stops[name][1]]

    def wire_stops(self) -> None:
        """Called last: a button ends what began by whatever event, also by opening the tab or the page."""
        how = {'queue': False, 'api_visibility': 'private', 'show_progress': 'hidden'}
        for name, (button, word) in self._stops.items():
            button.click(lambda: pictures.note('stopped'), None, [word], cancels=self.tabs[name].runs, **how)

    def selected(self, item: Any, name: str) -> None:
        """When the tab is opened by hand: shown, unless it samples and has something to show already."""
        tab = self.tabs[name]
        event = self.shows(name)
        shown = functools.partial(_unless_drawn if tab.samples else _once_ready, tab)
        event['fn'] = self.guarded(shown, tab.outputs)
        event['inputs'] = [*tab.inputs, *([tab.drawn] if tab.samples else []), self.ready]
        # A browser selects the first tab as it opens, when what the query says is not there yet.
        event['js'] = f"(...values) => [...({self._url(name)})(...values.slice(0, -1)), window.djRead ? 'yes' : '']"
        selection = item.select(**event)
        if tab.samples:
            tab.runs.append(selection)

    # --- the view in the URL ------------------------------------------------------------------------------------------

    def restore(self, query: dict[str, str]) -> tuple[str, dict[Any, Any]]:
        """(tab, value of each of its widgets) that a query says; what is not valid is left out."""
        name = query.get('tab', '')
        name = name if name in self.tabs else next(iter(self.tabs))
        values = {}
        for key, widget in self.tabs[name].controls.items():
            if key in query and (value := parsed(widget, query[key])) is not None:
                values[widget] = value
        return name, values

    def loaded(self, blocks: Any, tabs: Any) -> None:
        """What happens when a browser opens the page: the view of its query, or that of the first tab.

        It is drawn from the query itself: the widgets may not have heard of it yet.
        """
        import gradio as gr

        query = gr.Textbox(visible=False)
        view = gr.State(None)  # (tab, its settings)
        widgets = [widget for tab in self.tabs.values() for widget in tab.controls.values()]

        def read(query):
            name, values = self.restore(query_of(query))
            updates = {widget: gr.update(value=value) for widget, value in values.items()}
            settings = [values.get(widget, widget.value) for widget in self.tabs[name].controls.values()]
            return {tabs: gr.Tabs(selected=name), view: (name, settings), **updates}

        how = {'queue': False, 'api_visibility': 'private', 'show_progress': 'hidden'}
        js = '() => [window.djQuery]'
        start = blocks.load(read, [query], [tabs, view, *widgets], js=js, **how)
        for samples in (False, True):
            parts = {name: tab for name, tab in self.tabs.items() if tab.samples == samples}
            outputs = [widget for tab in parts.values() for widget in tab.outputs]
            first = _first_of(parts) if samples else _view_of(parts)
            event = start.then(**self._event(first, [view], outputs, samples))
            if samples:
                for tab in parts.values():
                    tab.runs.append(event)
            else:
                event.then(None, None, None, js='() => { window.djRead = true; }', **how)

    def footer_text(self) -> str:
        subject, devices = self.subject, jax.local_devices()
        step = '' if subject.step is None else f', step {subject.step:,}'
        kind = getattr(devices[0], 'device_kind', devices[0].platform)
        count = self.count()
        return (
            f'<div class="dj-footer"><span id="compiled" data-count="{count}">{count} programs compiled or read from '
            f'the cache since the start</span> &middot; {len(devices)} x {html.escape(kind)} &middot; '
            f'{html.escape(subject.name)}{step}</div>'
        )


MAX_QUERY = 4000
MAX_FIELDS = 40


def _slot(parts: dict[str, Tab], name: str) -> slice:
    """Where a tab's outputs stand among those of all parts."""
    start = 0
    for key, tab in parts.items():
        size = len(tab.outputs)
        if key == name:
            return slice(start, start + size)
        start += size
    raise KeyError(name)


def _placed(parts: dict[str, Tab], name: str, values: Any) -> tuple[Any, ...]:
    import gradio as gr

    everything = [gr.skip()] * sum(len(tab.outputs) for tab in parts.values())
    everything[_slot(parts, name)] = values if isinstance(values, tuple) else [values]
    return tuple(everything)


def _said_in(tab: Tab, error: Exception) -> tuple[Any, ...]:
    """A message in the place of a tab's first output."""
    import gradio as gr

    return (pictures.message(said(error)), *[gr.skip()] * (len(tab.outputs) - 1))


def _view_of(parts: dict[str, Tab]):
    import gradio as gr

    def first(view):
        name, settings = view
        if name not in parts:
            return (gr.skip(),) * sum(len(tab.outputs) for tab in parts.values())
        try:
            shown = parts[name].show(*settings, *[None] * len(parts[name].extra))
        except (UsageError, SamplingDiverged) as error:
            shown = _said_in(parts[name], error)
        return _placed(parts, name, shown)

    return first


def _first_of(parts: dict[str, Tab]):
    import gradio as gr

    def first(view):
        name, settings = view
        if name not in parts:
            yield (gr.skip(),) * sum(len(tab.outputs) for tab in parts.values())
            return
        try:
            for shown in parts[name].show(*settings, *[None] * len(parts[name].extra)):
                yield _placed(parts, name, shown)
        except (UsageError, SamplingDiverged) as error:
            yield _placed(parts, name, _said_in(parts[name], error))

    return first


def _unless_drawn(tab: Tab, *values: Any) -> Iterator[Any]:
    import gradio as gr

    *values, drawn, ready = values
    if drawn is not None or not ready:
        yield (gr.skip(),) * len(tab.outputs)
        return
    yield from tab.show(*values)


def query_of(text: Any) -> dict[str, str]:
    """The fields of a query; of one that is none, nothing."""
    try:
        return dict(parse_qsl(text[:MAX_QUERY].removeprefix('?'), max_num_fields=MAX_FIELDS))
    except (TypeError, ValueError):
        return {}


def _once_ready(tab: Tab, *values: Any) -> Any:
    import gradio as gr

    *values, ready = values
    return tab.show(*values) if ready else (gr.skip(),) * len(tab.outputs)


def said(error: Exception) -> str:
    if isinstance(error, UsageError | SamplingDiverged):
        return str(error)
    return f'this failed ({type(error).__name__}): the terminal that the explorer runs in says more.'


def parsed(widget: Any, text: str) -> Any:
    """The value that a query's text stands for, or None if the widget does not take it."""
    import gradio as gr

    if isinstance(widget, gr.Slider | gr.Number):
        try:
            value = float(text)
        except ValueError:
            return None
        low = -checks.MAX_SEED if widget.minimum is None else widget.minimum
        high = checks.MAX_SEED if widget.maximum is None else widget.maximum
        if not math.isfinite(value) or not low <= value <= high:
            return None
        return int(value) if value == int(value) else value
    if isinstance(widget, gr.Checkbox):
        return {'true': True, 'false': False}.get(text)
    if isinstance(widget, gr.Dropdown | gr.Radio | gr.CheckboxGroup):
        valid = [value for _, value in widget.choices]
        if getattr(widget, 'multiselect', False) or isinstance(widget, gr.CheckboxGroup):
            values = [value for value in text.split(',') if value in valid]
            return values or None
        return text if text in valid else None
    return text[: checks.MAX_TEXT] if isinstance(widget, gr.Textbox) else None
