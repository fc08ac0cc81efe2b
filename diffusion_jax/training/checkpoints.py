"""Checkpoints of the training state, by Orbax: written in the background, complete or absent, and verified when read.

A checkpoint is a folder checkpoints/<step> with an item for each part of the state, and a record: a JSON file of the
digests of all values (Orbax alone restores a flipped bit as if it had been saved), of the held-out loss, of what the
caller notes, and of its own checksum.
"""

import contextlib
import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from diffusion_jax.errors import SavingFailed, UsageError
from diffusion_jax.registry import unknown
from diffusion_jax.training.digests import differing, digests
from diffusion_jax.training.step import TrainState

LOGGER = logging.getLogger(__name__)

RECORD = 'record'
METRIC = 'held_out_loss'
SMALLEST_SLICE = 2**20  # bytes that a device writes of an array that others hold as well
UNFINISHED = '.orbax-checkpoint-tmp'  # in the names of folders that Orbax is writing, and of those being deleted


class Restored(NamedTuple):
    """A state, the step that it was saved at, and what was noted then."""

    state: TrainState
    step: int
    notes: dict[str, Any]


class Record(NamedTuple):
    """What a checkpoint says of itself; `digests` is None in those from before there were any."""

    held_out_loss: float | None
    notes: dict[str, Any]
    digests: dict[str, str] | None


class Damaged(Exception):
    """A checkpoint is not what was saved; the message is the reason, as a clause."""


class Checkpoints:
    """The checkpoints of a workdir: the newest `keep`, and the one of least held-out loss besides.

    Opening for reading alone (`keep=None`) writes nothing. With several processes, all of them call the same methods in
    the same order, on the same folder.
    """

    def __init__(self, workdir: str | Path, keep: int | None = None):
        self.workdir = Path(workdir).absolute()
        self.directory = self.workdir / 'checkpoints'
        self._keep = keep
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._saving: int | None = None

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, oldest first; not of one that is still being written."""
        if not self.directory.is_dir():
            return []
        names = [path.name for path in self.directory.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))

    # --- writing ------------------------------------------------------------------------------------------------------

    def save(
        self, step: int, state: TrainState, held_out_loss: float | None, notes: dict[str, Any] | None = None
    ) -> None:
        """Starts to write; returns once the state is copied, so that the next step may donate it.

        Args:
          notes: anything that JSON holds; `restore` gives it back.

        Raises:
          SavingFailed: this checkpoint, or the one before that was still being written, could not be written.
        """
        self.wait()
        items = _items(state)
        content = {'step': step, METRIC: held_out_loss, 'notes': notes or {}, 'digests': digests(items)}
        content = json.loads(json.dumps(content))  # as it will be read: JSON has no tuples, nor keys that are numbers
        content['sha256'] = _checksum(content)
        arrays = {name: ocp.args.PyTreeSave(item) for name, item in items.items()}
        args = ocp.args.Composite(**arrays, **{RECORD: ocp.args.JsonSave(content)})
        self._saving = step
        try:
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._delete_unfinished()  # what a killed run was in the middle of writing
            if self._checkpointer is None:
                # The folder in the foreground: else, where a save fails at once, its thread makes one later.
                options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
                self._checkpointer = ocp.AsyncCheckpointer(_writers(items), async_options=options)
            self._checkpointer.save(self.directory / str(step), args=args)
        except Exception as error:
            self._fail(error)

    def wait(self) -> None:
        """Blocks until what is being written is complete, and deletes what `keep` no longer asks for.

        Raises:
          SavingFailed: it could not be written; said once.
        """
        if self._saving is None:
            return
        try:
            self._checkpointer.wait_until_finished()
        except Exception as error:
            self._fail(error)
        self._saving = None
        if jax.process_index() == 0:
            self._delete_old()

    def close(self) -> None:
        """`wait`, and lets go of Orbax's threads."""
        self.wait()
        if self._checkpointer:
            self._checkpointer.close()
            self._checkpointer = None

    def _fail(self, error: Exception) -> NoReturn:
        step, self._saving = self._saving, None
        if self._checkpointer:
            # Whatever else went wrong in the background has the same cause.
            with contextlib.suppress(Exception):
                self._checkpointer.close()
            self._checkpointer = None
        if jax.process_index() == 0:
            self._delete_unfinished()  # half of a checkpoint is of no use, and the disk may be full of it
        steps = self.steps()
        earlier = f'The checkpoints from before are whole: {steps}' if steps else 'There are none from before'
        raise SavingFailed(
            f'the checkpoint of step {step} could not be saved: {_cause(error)}. {earlier}, in {self.directory}. Free '
            'some space or mend what is wrong there; the same command then goes on from the newest.'
        ) from error

    def _delete_unfinished(self) -> None:
        for _ in range(20):
            found = list(self.directory.glob(f'*{UNFINISHED}*'))
            for path in found:
                shutil.rmtree(path, ignore_errors=True)
            if not found:
                return
            time.sleep(0.05)  # some thread of a save that failed may still be writing

    def _delete_old(self) -> None:
        steps = self.steps()
        kept = set(steps[-self._keep :]) | set(self._by_loss(steps)[:1])
        for step in set(steps) - kept:
            path = self.directory / str(step)
            try:
                # Renamed first: a run that is killed meanwhile leaves no half of one under a checkpoint's name.
                doomed = path.rename(path.with_name(f'{step}{UNFINISHED}-deleted'))
                shutil.rmtree(doomed)
            except OSError as error:
                LOGGER.warning('the old checkpoint %s could not be deleted: %s', path, error)

    # --- reading ------------------------------------------------------------------------------------------------------

    def restore(self, abstract_state: TrainState, which: str = 'newest') -> Restored:
        """The 'newest' or 'best' checkpoint that is undamaged, placed as the shardings in `abstract_state` say.

        Each one that is passed over is named in the log, with the reason. Where this was opened for writing and an
        older than the newest was restored, those newer are moved to `workdir/damaged_checkpoints`, for the run to write
        these steps again.

        Raises:
          UsageError: there is none, or none that is undamaged.
        """
        self.wait()
        items, step, record, damaged = self._restore(_items(abstract_state), which)
        if damaged and which == 'newest' and self._keep is not None:
            self._move_away(damaged)
        key = jax.random.wrap_key_data(items['training'].pop('key'))
        state = TrainState(params=items['params'], ema=items['ema'], key=key, **items['training'])
        return Restored(state, step, record.notes)

    def restore_params(self, abstract_params: Any, which: str, ema: bool) -> tuple[Any, int]:
        """(averaged or raw parameters, step) of the 'newest' or 'best' checkpoint where they are undamaged.

        Raises:
          UsageError: there is none, or none that is undamaged.
        """
        name = 'ema' if ema else 'params'
        items, step, _, _ = self._restore({name: abstract_params}, which)
        return items[name], step

    def damaged(self, abstract_state: TrainState) -> dict[int, str]:
        """Reads and verifies every checkpoint: {step: reason} of those that are not what was saved."""
        self.wait()
        found = {}
        for step in _of_process_0(self.steps()):
            try:
                _read(self.directory / str(step), _items(abstract_state))
            except Damaged as reason:
                found[step] = str(reason)
        return found

    def choose(self, which: str) -> int:
        """The step of the 'newest' or 'best' checkpoint, by its record alone; a `UsageError` if there is none."""
        return self._candidates(which)[0]

    def _candidates(self, which: str) -> list[int]:
        """The steps to try, in that order."""
        if which not in ('newest', 'best') and not which.isdecimal():
            raise unknown('checkpoint', which, ('newest', 'best', 'the number of a step'))
        steps = _of_process_0(self.steps())
        if not steps:
            raise UsageError(f'no checkpoint in {self.directory}. Train first: the same command with --mode=train.')
        if which == 'newest':
            return steps[::-1]
        if which.isdecimal():
            if int(which) not in steps:
                raise UsageError(f'no checkpoint of step {which} in {self.directory}: it has {steps}.')
            return [int(which)]
        known = _of_process_0(self._by_loss(steps, warn=True))
        if not known:
            raise UsageError(f"no checkpoint in {self.directory} has a held-out loss: use checkpoint 'newest'.")
        return known

    def _by_loss(self, steps: list[int], warn: bool = False) -> list[int]:
        """Those of the steps that have a held-out loss, the least first."""
        losses = {}
        for step in steps:
            try:
                losses[step] = _read_record(self.directory / str(step)).held_out_loss
            except Damaged as reason:
                if warn:
                    LOGGER.warning('the checkpoint %s is damaged: %s.', self.directory / str(step), reason)
        known = {step: loss for step, loss in losses.items() if loss is not None and math.isfinite(loss)}
        return sorted(known, key=known.get)

    def _restore(self, abstract_items: dict[str, Any], which: str) -> tuple[dict[str, Any], int, Record, list[int]]:
        """(items, step, its record, the steps of the damaged ones that were passed over)."""
        reasons: dict[int, str] = {}
        for step in self._candidates(which):
            folder = self.directory / str(step)
            try:
                record, items = _read(folder, abstract_items)
            except Damaged as reason:
                reasons[step] = str(reason)
                LOGGER.warning('the checkpoint %s is damaged: %s.', folder, reason)
                continue
            if record.digests is None:
                LOGGER.warning(
                    'the checkpoint %s cannot be verified: it was written before digests of the values were.', folder
                )
            return items, step, record, list(reasons)
        listed = '; '.join(f'{step} ({reason})' for step, reason in reasons.items())
        raise UsageError(
            f'none of the checkpoints in {self.directory} can be restored: {listed}. To begin anew, move that folder '
            'away or delete it.'
        )

    def _move_away(self, steps: list[int]) -> None:
        """Moves checkpoints to where they are out of the way, and deletes nothing."""

        def move():
            for step in steps:
                source, target = self.directory / str(step), self.workdir / 'damaged_checkpoints' / str(step)
                copies = 1
                while target.exists():
                    copies += 1
                    target = target.with_name(f'{step}-{copies}')
                target.parent.mkdir(exist_ok=True)
                source.rename(target)
                LOGGER.warning('the damaged checkpoint %s is now %s: the run writes that step again.', source, target)

        try:
            _together(move if jax.process_index() == 0 else lambda: None)
        except Damaged as reason:
            raise UsageError(
                f'the damaged checkpoints {steps} in {self.directory} cannot be moved out of the way ({reason}): move '
                'them yourself.'
            ) from reason


def abstract(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The tree's shapes and dtypes, to be restored with that sharding."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _items(state: TrainState) -> dict[str, Any]:
    """The state, or its shapes, in parts that can be read apart: sampling needs no optimiser."""
    key = state.key
    if isinstance(key, jax.ShapeDtypeStruct):
        data = jax.eval_shape(jax.random.key_data, key)
        data = jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=key.sharding)
    else:
        data = jax.random.key_data(key)
    training = {'step': state.step, 'opt_state': state.opt_state, 'key': data}
    if state.loss_history is not None:
        training['loss_history'] = state.loss_history
    if state.adversary is not None:
        training['adversary'] = state.adversary
    return {'params': state.params, 'ema': state.ema, 'training': training}


def _writers(items: dict[str, Any]) -> ocp.CompositeCheckpointHandler:
    """What writes the items and the record.

    Orbax splits an array that several devices hold alike into slices, for each to write one: of a small array that is
    more work than to write it, and the training loop waits for it.
    """
    handlers = ocp.type_handlers
    arrays = handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=SMALLEST_SLICE)
    registry = handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.CompositeCheckpointHandler(
        **{name: ocp.PyTreeCheckpointHandler(type_handler_registry=registry) for name in items},
        **{RECORD: ocp.JsonCheckpointHandler()},
    )


# --- one checkpoint ---------------------------------------------------------------------------------------------------


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_record(folder: Path) -> Record:
    """Raises `Damaged` if the folder should have a record and has not, or if it is not what was written."""
    if not (folder / RECORD).exists():
        return _older_record(folder)
    try:
        content = json.loads((folder / RECORD / 'metadata').read_bytes())
        checksum = content.pop('sha256')
    except Exception as error:
        raise Damaged(f'its record cannot be read ({_cause(error)})') from error
    if checksum != _checksum(content):
        raise Damaged('its record is not what was written')
    if str(content['step']) != folder.name:
        raise Damaged(f'it is the checkpoint of step {content["step"]}')
    return Record(content[METRIC], content['notes'], content['digests'])


def _older_record(folder: Path) -> Record:
    """Of a checkpoint from before there were digests: Orbax's own list of items tells it from one that lost some."""
    try:
        items = json.loads((folder / '_CHECKPOINT_METADATA').read_bytes())['item_handlers']
        if RECORD in items:
            raise Damaged('its record is missing')
        loss = json.loads((folder / 'metrics' / 'metrics').read_bytes())[METRIC] if 'metrics' in items else None
    except Damaged:
        raise
    except Exception as error:
        raise Damaged(f'it has no record, and its list of items cannot be read ({_cause(error)})') from error
    return Record(loss, {}, None)


def _read(folder: Path, abstract_items: dict[str, Any]) -> tuple[Record, dict[str, Any]]:
    """What is in the folder, verified; `Damaged` if it is not what was saved."""

    def read():
        record = _read_record(folder)
        # A handler, not a Checkpointer: that one waits for all processes, which one that fails would keep waiting.
        with contextlib.closing(ocp.StandardCheckpointHandler()) as handler:
            return record, {
                name: handler.restore(folder / name, args=ocp.args.StandardRestore(item))
                for name, item in abstract_items.items()
            }

    record, items = _together(read)
    _together(lambda: _verify(record, items))
    return record, items


def _verify(record: Record, items: dict[str, Any]) -> None:
    if record.digests is None:
        return
    expected = {path: digest for path, digest in record.digests.items() if path.split('/')[0] in items}
    changed = differing(expected, digests(items))
    if changed:
        more = f' and of {len(changed) - 1} more' if len(changed) > 1 else ''
        raise Damaged(f'the values of {changed[0]}{more} are not those that were saved')


def _cause(error: BaseException) -> str:
    """What went wrong at the root of it, in a line."""
    chain = [error]
    while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None and inner not in chain:
        chain.append(inner)
    if any('No space left on device' in str(link) for link in chain):
        return 'No space left on device'
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:300]}' if lines else type(error).__name__


# --- several processes ------------------------------------------------------------------------------------------------


def _together(task: Callable[[], Any]) -> Any:
    """What the task returns; `Damaged` if it failed in any of the processes, and then in all of them."""
    result, failure = None, None
    try:
        result = task()
    except Exception as error:
        failure = error
    failed = failure is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.process_allgather(np.array(failed)).any())
    if not failed:
        return result
    if failure is None:
        raise Damaged('another process could not read it')
    raise failure if isinstance(failure, Damaged) else Damaged(_cause(failure)) from failure


def _of_process_0(steps: list[int]) -> list[int]:
    """The same list in every process: file systems may show a folder to one before the other."""
    if jax.process_count() == 1:
        return steps
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    padded = np.resize(np.array([*steps, 0], np.int32), length)
    return multihost_utils.broadcast_one_to_all(padded).tolist()
