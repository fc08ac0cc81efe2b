"""What tests read out of the HTML that a tab gives."""

import base64
import html
import io
import re

import numpy as np
from PIL import Image, ImageSequence


def _opened(uri: str):
    return Image.open(io.BytesIO(base64.b64decode(uri.partition('base64,')[2])))


def pictures_of(shown: str) -> dict[str, np.ndarray]:
    """Name -> pixels [H, W, C] of every picture."""
    found = re.findall(r'<figure class="dj-figure" id="(\w+)".*?<img src="(data:image/png[^"]+)"', shown, re.DOTALL)
    pixels = {name: np.asarray(_opened(uri)) for name, uri in found}
    return {name: image[..., None] if image.ndim == 2 else image for name, image in pixels.items()}


def frames_of(shown: str) -> list[np.ndarray]:
    """The frames [H, W, 3] of the first animation."""
    (uri, *_) = re.findall(r'<img src="(data:image/gif[^"]+)"', shown)
    return [np.asarray(frame.convert('RGB')) for frame in ImageSequence.Iterator(_opened(uri))]


def text_of(shown: str, name: str) -> str:
    """The text of the element of that name, its minus signs as in ASCII."""
    inner = re.search(rf'id="{name}"[^>]*>(.*?)</(?:td|p|div|span)>', shown, re.DOTALL)[1]
    inner = re.search(rf'id="{name}"[^>]*>(.*?)</(?:td|p)>', shown, re.DOTALL)[1] if '<span' in inner else inner
    return html.unescape(re.sub(r'<[^>]+>', '', inner)).replace('\u2212', '-').strip()


def executed(call: str, pipeline=None) -> dict:
    """The names that a page's Python leaves; `pipeline` is put in where the page says that it was given."""
    names: dict = {'_given': pipeline}
    call = call.replace('pipeline = ...', 'pipeline = _given')
    exec(compile(call, 'the Python of the page', 'exec'), names)
    return names
