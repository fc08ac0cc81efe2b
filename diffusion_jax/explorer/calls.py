"""The Python that makes what the page shows: to copy, to run, to change."""

from typing import Any

from diffusion_jax.explorer.subject import Subject


def python(subject: Subject | None, *lines: str, images: bool = False) -> str:
    """A program: imports, the model, its images if they are needed, and these lines.

    Args:
      subject: None where no model is needed.
    """
    body = list(lines)
    if images:
        body.insert(0, subject.images.call)
    if subject is not None:
        body.insert(0, subject.call)
    text = '\n'.join(body)
    imports = [
        line
        for line, needed in (
            ('import jax', 'jax.random' in text or 'jax.jit' in text),
            ('import numpy as np', 'np.' in text),
        )
        if needed
    ]
    from_images = [name for name in ('to_float', 'to_uint8') if f'{name}(' in text]
    ours = ['import diffusion_jax as dj']
    if from_images:
        ours.append(f'from diffusion_jax.images import {", ".join(from_images)}')
    return '\n'.join([*imports, *([''] if imports else []), *ours, '', *body]) + '\n'


def arguments(settings: dict[str, Any]) -> str:
    """Keyword arguments as Python writes them; what is None is left out."""
    return ', '.join(f'{name}={value!r}' for name, value in settings.items() if value is not None)
