"""Schedules by what a page says of them: a name, a length, rescaling, a shift. The same one is the same object."""

import functools
from typing import NamedTuple

from diffusion_jax.errors import UsageError
from diffusion_jax.explorer import checks
from diffusion_jax.explorer.subject import Subject
from diffusion_jax.schedules import SCHEDULES, Chain, Schedule, zero_terminal_snr

CHAINS = ('linear', 'cosine', 'scaled_linear', 'sigmoid')
"""Those of SCHEDULES that are chains of T steps, or their limit."""
LENGTHS = ('10', '50', '100', '250', '1000', 'continuous')
OWN = "the model's"


class Choice(NamedTuple):
    """A schedule, Python that makes `schedule`, and the steps of its chain, or of one drawn on it."""

    schedule: Schedule
    call: str
    num_steps: int


@functools.lru_cache(maxsize=64)
def _made(name: str, length: int | None, zero: bool, shift: float) -> tuple[Schedule, str]:
    if name == 'flow':
        return SCHEDULES[name](shift), f'dj.schedules.flow({shift:g})'
    if name not in CHAINS:
        return SCHEDULES[name](), f'dj.schedules.{name}()'
    schedule, call = SCHEDULES[name](length), f'dj.schedules.{name}({length})'
    if zero:
        if not isinstance(schedule, Chain):
            raise UsageError('zero terminal SNR rescales a chain of T steps: choose a T.')
        return zero_terminal_snr(schedule), f'dj.schedules.zero_terminal_snr({call})'
    return schedule, call


def named(name: str, length: str = '1000', zero: bool = False, shift: float = 1.0) -> Choice:
    """One of SCHEDULES.

    Args:
      length: one of LENGTHS, of those that are chains.
      zero: rescaled to end in pure noise, of those that are chains.
      shift: of 'flow'.
    """
    checks.choice('schedule', name, SCHEDULES)
    num_steps = 1000 if checks.choice('T', length, LENGTHS) == 'continuous' else int(length)
    steps = None if length == 'continuous' else num_steps
    schedule, call = _made(name, steps if name in CHAINS else None, bool(zero) and name in CHAINS, shift)
    return Choice(schedule, f'schedule = {call}', num_steps)


def chosen(subject: Subject, name: str, length: str) -> Choice:
    """One of SCHEDULES, or the model's own."""
    if name != OWN:
        return named(name, length)
    checks.choice('T', length, LENGTHS)
    schedule = subject.pipeline.schedule
    return Choice(schedule, 'schedule = pipeline.schedule', schedule.num_timesteps or 1000)
