"""Training, from top to bottom."""

import dataclasses
import functools
import logging
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion_jax.compilation import memory_report, use_cache
from diffusion_jax.data.batches import Batches
from diffusion_jax.distributed import Interruption, is_writer
from diffusion_jax.errors import Interrupted, SamplingDiverged, TrainingDiverged, UsageError
from diffusion_jax.experiment import check_same_run, info_of, load_data, write_record
from diffusion_jax.images import save_png
from diffusion_jax.models import count_params
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.metrics import MetricsWriter, RunningMetrics, SilentWriter, plot_curves
from diffusion_jax.training.optimizer import make_optimizer
from diffusion_jax.training.profiling import Tracer
from diffusion_jax.training.sharding import (
    bytes_per_device,
    check_rules,
    make_mesh,
    num_batch_shards,
    on_mesh,
    replicated,
    sharded_batch,
    with_shardings,
)
from diffusion_jax.training.step import TrainState, scanned, state_shardings
from diffusion_jax.training.tasks import make_task

LOGGER = logging.getLogger(__name__)

EVAL_BATCHES = 8


def train(config: ConfigDict, workdir: str | Path, profile: bool = False) -> TrainState:
    """`--mode=train`: trains as the config says, in `workdir`, from its newest checkpoint if it has one.

    The workdir then holds config.json, checkpoints/, metrics.jsonl, tensorboard/, curves.png, samples/, evaluation.json
    and cache/ (compiled programs). A run that was killed and started again ends with the same parameters, bit for bit,
    as one that was not. With several processes (`distributed.initialize`) all of them call this, on one workdir.

    Args:
      profile: writes a trace of some steps to `workdir/profile`, for TensorBoard, XProf or Perfetto.

    Raises:
      UsageError: the config, the data or the workdir is not fit for it; nothing was written.
      TrainingDiverged: the loss became NaN or infinite; the checkpoints are those from before.
      SavingFailed: a checkpoint could not be written; those from before are whole.
      Interrupted: SIGTERM or Ctrl-C asked to stop; the step reached is saved.
    """
    workdir = Path(workdir)

    # --- what the config asks for: all of it must hold before anything is written -------------------------------------
    settings = config.train
    per_dispatch = settings.steps_per_dispatch
    check_settings(settings, config.evaluate.every)
    check_same_run(config, workdir)
    mesh = make_mesh(config.mesh)
    check_rules(config.sharding_rules)
    splits = load_data(config)
    task = make_task(config, info_of(splits), mesh, workdir)
    optimizer, learning_rate = make_optimizer(**config.optimizer, num_steps=settings.num_steps)
    if settings.batch_size % (num_batch_shards(mesh) * settings.accumulate):
        raise UsageError(
            f'train.batch_size={settings.batch_size} must be a multiple of the {num_batch_shards(mesh)} parts that the '
            f'mesh splits it in, times train.accumulate={settings.accumulate}.'
        )
    make_batches = functools.partial(
        Batches,
        batch_size=settings.batch_size,
        seed=config.seed,
        replicated=replicated(mesh),
        sharded=sharded_batch(mesh),
        placement=config.data.placement,
        workers=config.data.workers,
    )
    task.check(splits, mesh)
    batches, held_out = task.batches(splits, make_batches)
    checkpoints = Checkpoints(workdir, settings.keep_checkpoints)
    resumed = bool(checkpoints.steps())
    begins_with = task.load_init(mesh) if config.init_from and not resumed else None

    # --- the state, created where it lives; the newest checkpoint, if there is one ------------------------------------
    if is_writer():
        write_record(workdir, config, task.data)
    use_cache(workdir)

    def create() -> TrainState:
        return task.create(optimizer)

    shapes = jax.eval_shape(create)
    shardings = state_shardings(shapes, optimizer, config.sharding_rules, mesh)
    shapes = with_shardings(shapes, shardings)
    if resumed:
        state, start, notes = checkpoints.restore(shapes)
    else:
        state, start, notes = jax.jit(create, out_shardings=shardings)(), 0, {}
        if begins_with is not None:
            params, ema = (jax.device_put(begins_with, part) for part in (shardings.params, shardings.ema))
            state = dataclasses.replace(state, params=params, ema=jax.tree.map(jnp.copy, ema))
    if start % per_dispatch:
        raise UsageError(
            f'the newest checkpoint is of step {start}: go on from there with a train.steps_per_dispatch that divides '
            f'it, not {per_dispatch}.'
        )
    LOGGER.info(
        '%s: %d images, %s; %s with %.2f M parameters, %.1f MiB of state per device; %s; %s',
        config.data.name,
        len(splits.train),
        'x'.join(map(str, task.data.image_shape)),
        config.model.name,
        count_params(state.params) / 1e6,
        bytes_per_device(state) / 2**20,
        description_of(mesh),
        f'resumed at step {start}'
        if resumed
        else f'a new run from {config.init_from}'
        if config.init_from
        else 'a new run',
    )

    # --- the step, compiled before the loop ---------------------------------------------------------------------------
    step_function = task.step(optimizer, shardings.params)
    stacked = None if per_dispatch == 1 else per_dispatch
    step_function = jax.jit(
        on_mesh(mesh, scanned(step_function) if stacked else step_function),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
    began = time.perf_counter()
    train_step = step_function.lower(shapes, batches.arrays, batches(0, stacked)).compile()
    LOGGER.info('compiled the training step in %.1f s; %s', time.perf_counter() - began, memory_report(train_step))
    held_out_loss = jax.jit(on_mesh(mesh, task.held_out_loss()), out_shardings=replicated(mesh))

    # --- the loop -----------------------------------------------------------------------------------------------------
    def held_out_mean() -> float:
        keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(config.seed), EVAL_BATCHES)))
        # One at a time: on CPUs, collectives of programs in flight together wait for one another for ever.
        losses = [float(held_out_loss(state.ema, held_out.arrays, held_out(i), key)) for i, key in enumerate(keys)]
        return float(np.mean(losses))

    writer = MetricsWriter(workdir, start) if is_writer() else SilentWriter()
    running = RunningMetrics(settings.max_skipped_steps, notes.get('skipped_steps', 0))
    timer, timed_from, waited = time.perf_counter(), start, 0.0
    bar = tqdm(
        total=settings.num_steps,
        initial=start,
        desc='training',
        unit='step',
        dynamic_ncols=True,
        disable=not is_writer(),
    )
    tracer = Tracer(workdir / 'profile' if profile and is_writer() else None)
    stream = batches.stream(start, stacked)
    interruption = Interruption()
    try:
        with interruption:
            for step in range(start + per_dispatch, settings.num_steps + 1, per_dispatch):
                before = time.perf_counter()
                with tracer.step(step):
                    batch = next(stream)
                    waited += time.perf_counter() - before
                    state, metrics = train_step(state, batches.arrays, batch)
                    running.add(step, metrics)
                bar.update(per_dispatch)
                last = step == settings.num_steps
                logs, evaluates, saves, samples = (
                    last or step % every == 0
                    for every in (
                        settings.log_every,
                        settings.eval_every,
                        settings.checkpoint_every,
                        settings.sample_every,
                    )
                )
                stops = interruption.requested((step - start) // per_dispatch) and not last
                if evaluates or saves or samples or stops:
                    running.check()  # a state that is not finite is never saved
                if logs:
                    means = running.report()
                    seconds = time.perf_counter() - timer
                    rate = (step - timed_from) / seconds
                    speed = {
                        'steps_per_second': rate,
                        'images_per_second': rate * settings.batch_size,
                        'input_wait': waited / seconds,
                    }
                    writer.scalars(step, means | {'learning_rate': float(learning_rate(step - 1))} | speed)
                    loss = f'loss {means["loss"]:.4f}, ' if 'loss' in means else ''
                    bar.set_postfix_str(f'{loss}{speed["images_per_second"]:.0f} images/s')
                loss_now = held_out_mean() if evaluates else None
                if evaluates:
                    writer.scalars(step, {'held_out_loss': loss_now})
                if saves or stops:
                    checkpoints.save(step, state, loss_now, {'skipped_steps': running.skipped})
                if stops:
                    raise Interrupted(step, interruption.signal_number)
                if samples:
                    try:
                        picture = task.picture(state.ema, splits, mesh)
                    except SamplingDiverged as error:  # a young model under strong guidance: no reason to stop training
                        LOGGER.warning('no samples of step %d: %s', step, error)
                    else:
                        if is_writer():
                            save_png(workdir / 'samples' / f'training_step{step}.png', picture)
                        writer.image(step, task.pictures, picture)
                scores = config.evaluate.every and (last or step % config.evaluate.every == 0)
                if scores:
                    try:
                        values = task.scores(state.ema, splits, mesh, workdir)
                    except SamplingDiverged as error:
                        LOGGER.warning('no scores of step %d: %s', step, error)
                    else:
                        writer.scalars(step, values)
                if logs or evaluates or samples or scores:
                    timer, timed_from, waited = time.perf_counter(), step, 0.0
    except TrainingDiverged as error:
        raise TrainingDiverged(
            f'training stopped at {error}. Complete checkpoints from before: {checkpoints.steps() or "none"}, in '
            f'{checkpoints.directory}. Try a lower optimizer.learning_rate, more optimizer.warmup_steps or a smaller '
            'optimizer.clip_norm, in another --workdir; or let train.max_skipped_steps pass over a few such steps.'
        ) from None
    finally:
        stream.close()
        tracer.close()
        bar.close()
        writer.close()
        checkpoints.close()

    # --- what came of it ----------------------------------------------------------------------------------------------
    if is_writer():
        LOGGER.info('loss curves: %s', plot_curves(workdir))
    task.finish(state.ema if config.sample.ema else state.params, splits, mesh, workdir, int(state.step))
    LOGGER.info('%s: %s', task.pictures, workdir / 'samples')
    return state


def check_settings(settings: ConfigDict, every: int) -> None:
    """A `UsageError` for numbers of steps that do not fit one another."""
    events = ('num_steps', 'log_every', 'eval_every', 'sample_every', 'checkpoint_every')
    for name in (*events, 'keep_checkpoints', 'accumulate', 'steps_per_dispatch'):
        if settings[name] < 1:
            raise UsageError(f'train.{name} must be at least 1, got {settings[name]}.')
    if settings.max_skipped_steps < 0:
        raise UsageError(f'train.max_skipped_steps must be 0 or more, got {settings.max_skipped_steps}.')
    for name in events:
        if settings[name] % settings.steps_per_dispatch:
            raise UsageError(
                f'train.steps_per_dispatch={settings.steps_per_dispatch} must divide train.{name}={settings[name]}: '
                'things happen between dispatches.'
            )
    if every % settings.steps_per_dispatch:
        raise UsageError(
            f'train.steps_per_dispatch={settings.steps_per_dispatch} must divide evaluate.every={every}: things happen '
            'between dispatches.'
        )


def description_of(mesh: Mesh) -> str:
    """'8 x cpu', with the mesh's axes and the number of processes where there are several."""
    axes = ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items() if size > 1)
    processes = f' in {jax.process_count()} processes' if jax.process_count() > 1 else ''
    return f'{mesh.size} x {mesh.devices.flat[0].device_kind}{processes}' + (f' ({axes})' if axes else '')
