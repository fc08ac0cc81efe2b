"""Diffusion models in JAX and Flax: schedules, losses, samplers, networks and training, as functions and data."""

from diffusion_jax import (
    data,
    denoisers,
    guidance,
    losses,
    models,
    oracles,
    pipelines,
    process,
    samplers,
    schedules,
    vlb,
)
from diffusion_jax.errors import SamplingDiverged, TrainingDiverged, UsageError
from diffusion_jax.pipelines import pretrained

__version__ = '0.1.0'

__all__ = [
    'SamplingDiverged',
    'TrainingDiverged',
    'UsageError',
    'data',
    'denoisers',
    'guidance',
    'losses',
    'models',
    'oracles',
    'pipelines',
    'pretrained',
    'process',
    'samplers',
    'schedules',
    'vlb',
]
