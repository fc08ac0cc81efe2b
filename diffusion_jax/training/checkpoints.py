"""Checkpoints of the training state, by Orbax: written in the background, complete or absent."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from diffusion_jax.errors import UsageError
from diffusion_jax.registry import unknown
from diffusion_jax.training.step import TrainState

METRIC = 'held_out_loss'


def _metric(metrics: dict[str, float]) -> float:
    return metrics[METRIC]


def _items(state: TrainState) -> dict[str, Any]:
    """The state in parts that can be read apart: sampling needs no optimiser."""
    training = {'step': state.step, 'opt_state': state.opt_state, 'key': state.key}
    if state.loss_history is not None:
        training['loss_history'] = state.loss_history
    return {'params': state.params, 'ema': state.ema, 'training': training}


class Checkpoints:
    """The checkpoints of a workdir: the newest `keep`, and the one of least held-out loss besides.

    Opening for reading alone (`keep=None`) writes nothing.
    """

    def __init__(self, workdir: str | Path, keep: int | None = None):
        self.directory = Path(workdir).absolute() / 'checkpoints'
        if keep is None:
            options = ocp.CheckpointManagerOptions(
                create=False, save_root_metadata=False, enable_async_checkpointing=False
            )  # read_only=True would do, and warn each time that it does
            self._manager = ocp.CheckpointManager(self.directory, options=options) if self.directory.is_dir() else None
            return
        best = policies.BestN(get_metric_fn=_metric, reverse=True, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),
            cleanup_tmp_directories=True,  # what a killed run was in the middle of writing
            best_fn=_metric,
            best_mode='min',
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps()) if self._manager else []

    def save(self, step: int, state: TrainState, held_out_loss: float | None) -> None:
        """Starts to write; returns once the state is copied, so that the next step may donate it."""
        metrics = None if held_out_loss is None else {METRIC: held_out_loss}
        items = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
        self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, abstract_state: TrainState, which: str = 'newest') -> TrainState:
        """The state of the 'newest' or 'best' checkpoint, placed as the shardings in `abstract_state` say.

        Raises:
          UsageError: there is none, or it cannot be read.
        """
        items = self._restore(_items(abstract_state), self.choose(which))
        return TrainState(params=items['params'], ema=items['ema'], **items['training'])

    def restore_params(self, abstract_params: Any, step: int, ema: bool) -> Any:
        """The averaged or the raw parameters alone, of the checkpoint of that step."""
        name = 'ema' if ema else 'params'
        return self._restore({name: abstract_params}, step)[name]

    def _restore(self, items: dict[str, Any], step: int) -> dict[str, Any]:
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as error:
            raise UsageError(
                f'the checkpoint {self.directory / str(step)} cannot be read ({str(error).strip().splitlines()[0]}). '
                f'Delete that folder to go on from the one before; complete checkpoints: {self.steps()}.'
            ) from error

    def choose(self, which: str) -> int:
        """The step of the 'newest' or 'best' checkpoint; a `UsageError` if there is none."""
        if which not in ('newest', 'best'):
            raise unknown('checkpoint', which, ('newest', 'best'))
        steps = self.steps()
        if not steps:
            raise UsageError(f'no checkpoint in {self.directory}. Train first: the same command with --mode=train.')
        return steps[-1] if which == 'newest' else self._best(steps)

    def _best(self, steps: list[int]) -> int:
        losses = {step: self._manager.metrics(step) for step in steps}
        known = {step: _metric(metrics) for step, metrics in losses.items() if metrics}
        if not known:
            raise UsageError(f"no checkpoint in {self.directory} has a held-out loss: use checkpoint 'newest'.")
        return min(known, key=known.get)

    def close(self) -> None:
        """Waits for what is being written."""
        if self._manager:
            self._manager.close()


def abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The tree's shapes and dtypes, to be restored with that sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
