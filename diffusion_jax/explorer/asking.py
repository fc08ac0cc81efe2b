"""What a model is asked for, by label or by text and with guidance: the widgets, and what they mean to a pipeline."""

from typing import Any

from diffusion_jax.explorer import checks
from diffusion_jax.explorer.subject import Subject, settings_of

DEFAULT_SCALE = 1.5
DEFAULT_TEXT_SCALE = 5.0


def widgets(subject: Subject, tab: str, guided: bool = True) -> dict[str, Any]:
    """Those that this model needs, by their names in the URL."""
    import gradio as gr

    has = settings_of(subject)
    made: dict[str, Any] = {}
    if has['labels']:
        names = list(subject.pipeline.class_names)
        made['label'] = gr.Dropdown(names, value=names[0], label='label', elem_id=f'{tab}-label')
    if has['text']:
        first = subject.pipeline.default_prompts[0] or 'a picture'
        made['prompt'] = gr.Textbox(first, label='prompt', max_length=checks.MAX_TEXT, lines=1, elem_id=f'{tab}-prompt')
    if guided and has['guided']:
        scale = DEFAULT_TEXT_SCALE if has['text'] else DEFAULT_SCALE
        made['scale'] = gr.Slider(
            0.0, checks.MAX_SCALE, value=scale, step=0.05, label='guidance scale', elem_id=f'{tab}-scale'
        )
    return made


def settings(subject: Subject, asked: dict[str, Any]) -> dict[str, Any]:
    """A pipeline's keyword arguments, of the values of `widgets`; what the model does not take is not looked at.

    Raises:
      UsageError: a value out of its bounds.
    """
    has = settings_of(subject)
    found: dict[str, Any] = {}
    if has['labels']:
        names = list(subject.pipeline.class_names)
        found['labels'] = [names.index(checks.choice('label', asked.get('label'), names))]
    if has['text']:
        found['prompts'] = [checks.text('prompt', asked.get('prompt'))]
    if has['guided'] and 'scale' in asked:
        found['guidance_scale'] = checks.number('guidance scale', asked['scale'], 0.0, checks.MAX_SCALE)
    return found
