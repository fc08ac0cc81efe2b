"""What comes in over HTTP, held to its bounds: widgets have them too, but need not be asked."""

import math
from collections.abc import Collection
from typing import Any

from diffusion_jax.errors import UsageError
from diffusion_jax.registry import unknown

MAX_STEPS = 100
MAX_IMAGES = 16
MAX_SEED = 2**31 - 1
MAX_TEXT = 400
MAX_SCALE = 15.0
MAX_UPLOAD_BYTES = 4 * 2**20
MAX_UPLOAD_PIXELS = 4096 * 4096


def number(name: str, value: Any, low: float, high: float) -> float:
    """A finite number in [low, high], or a `UsageError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f'{name} must be a number from {low:g} to {high:g}, got {shortened(value)}.')
    if not low <= value <= high:
        raise UsageError(f'{name} must be from {low:g} to {high:g}, got {shortened(value)}.')
    return float(value)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """An integer in [low, high], or a `UsageError`."""
    found = number(name, value, low, high)
    if found != int(found):
        raise UsageError(f'{name} must be a whole number from {low} to {high}, got {shortened(value)}.')
    return int(found)


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """One of the choices, or a `UsageError` that lists them."""
    if not isinstance(value, str) or value not in choices:
        raise unknown(name, shortened(value), choices)
    return value


def several(name: str, values: Any, choices: Collection[str], most: int) -> list[str]:
    """One to `most` different choices, in their order."""
    if not isinstance(values, list | tuple) or not 1 <= len(values) <= most:
        raise UsageError(f'{name}: choose 1 to {most} of {", ".join(choices)}.')
    return list(dict.fromkeys(choice(name, value, choices) for value in values))


def text(name: str, value: Any) -> str:
    """A text of bounded length, or a `UsageError`."""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise UsageError(f'{name} must be a text of at most {MAX_TEXT} characters.')
    return value


def shortened(value: Any) -> str:
    """What was given, at most 40 characters of it."""
    shown = value if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 40 else f'{shown[:37]}...'
