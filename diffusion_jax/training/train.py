"""Training, from top to bottom."""

import logging
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion_jax.data.batches import Batches
from diffusion_jax.errors import SamplingDiverged, TrainingDiverged, UsageError
from diffusion_jax.evaluation import check_evaluators, evaluate_pipeline
from diffusion_jax.experiment import check_same_run, info_of, load_data, make_experiment, write_record
from diffusion_jax.images import save_png
from diffusion_jax.models import count_params
from diffusion_jax.pipelines.workdir import check_sampling, picture_of, pipeline_of, sample_as_configured
from diffusion_jax.training.checkpoints import Checkpoints, abstract
from diffusion_jax.training.metrics import MetricsWriter, RunningMetrics, plot_curves
from diffusion_jax.training.optimizer import make_optimizer
from diffusion_jax.training.sharding import make_mesh, replicated, sharded_batch
from diffusion_jax.training.step import TrainState, init_state, make_held_out_loss, make_train_step

LOGGER = logging.getLogger(__name__)

EVAL_BATCHES = 8


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """`--mode=train`: trains as the config says, in `workdir`, from its newest checkpoint if it has one.

    The workdir then holds config.json, checkpoints/, metrics.jsonl, tensorboard/, curves.png, samples/ and
    evaluation.json. A run that was killed and started again ends with the same parameters, bit for bit, as one that was
    not.

    Raises:
      UsageError: the config, the data or the workdir is not fit for it; nothing was written.
      TrainingDiverged: the loss became NaN or infinite; the checkpoints are those from before.
    """
    workdir = Path(workdir)

    # --- what the config asks for: all of it must hold before anything is written -------------------------------------
    settings = config.train
    for name in ('num_steps', 'log_every', 'eval_every', 'sample_every', 'checkpoint_every', 'keep_checkpoints'):
        if settings[name] < 1:
            raise UsageError(f'train.{name} must be at least 1, got {settings[name]}.')
    check_same_run(config, workdir)
    splits = load_data(config)
    experiment = make_experiment(config, info_of(splits))
    optimizer, learning_rate = make_optimizer(**config.optimizer, num_steps=settings.num_steps)
    mesh = make_mesh()
    whole, split = replicated(mesh), sharded_batch(mesh)
    batches = Batches(
        splits.train, settings.batch_size, config.seed, replicated=whole, sharded=split, placement=config.data.placement
    )
    held_out = Batches(
        splits.test, settings.batch_size, config.seed, replicated=whole, sharded=split, placement=config.data.placement
    )
    check_sampling(pipeline_of(experiment, {}, mesh), config.sample)
    check_evaluators(config.evaluate, splits, experiment.num_classes)

    # --- the state, created where it lives; the newest checkpoint, if there is one ------------------------------------
    write_record(workdir, config, experiment.data)
    create = jax.jit(
        lambda: init_state(experiment.init, optimizer, config.seed, experiment.loss_history), out_shardings=whole
    )
    checkpoints = Checkpoints(workdir, settings.keep_checkpoints)
    state_shapes = abstract(jax.eval_shape(create), whole)
    resumed = bool(checkpoints.steps())
    state = checkpoints.restore(state_shapes) if resumed else create()
    start = int(state.step)
    LOGGER.info(
        '%s: %d images, %s; %s with %.2f M parameters; %d x %s; %s',
        config.data.name,
        len(splits.train),
        'x'.join(map(str, experiment.data.image_shape)),
        config.model.name,
        count_params(state.params) / 1e6,
        mesh.size,
        mesh.devices.flat[0].device_kind,
        f'resumed at step {start}' if resumed else 'a new run',
    )

    # --- the step, compiled before the loop ---------------------------------------------------------------------------
    step_function = jax.jit(
        make_train_step(
            experiment.loss,
            optimizer,
            ema_decay=config.ema_decay,
            flip=config.data.flip,
            null_label=experiment.num_classes,
            label_dropout=config.label_dropout,
        ),
        donate_argnums=0,
        out_shardings=(whole, whole),
    )
    began = time.perf_counter()
    train_step = step_function.lower(state_shapes, batches.arrays, batches(0)).compile()
    LOGGER.info('compiled the training step in %.1f s', time.perf_counter() - began)
    held_out_loss = jax.jit(make_held_out_loss(experiment.loss, null_label=experiment.num_classes))

    # --- the loop -----------------------------------------------------------------------------------------------------
    def held_out_mean() -> float:
        keys = jax.random.split(jax.random.key(config.seed), EVAL_BATCHES)
        losses = [held_out_loss(state.ema, held_out.arrays, held_out(i), key) for i, key in enumerate(keys)]
        return float(np.mean(jax.device_get(losses)))

    writer = MetricsWriter(workdir, start)
    running = RunningMetrics()
    timer, timed_from = time.perf_counter(), start
    bar = tqdm(total=settings.num_steps, initial=start, desc='training', unit='step', dynamic_ncols=True)
    try:
        for step in range(start + 1, settings.num_steps + 1):
            state, metrics = train_step(state, batches.arrays, batches(step - 1))
            running.add(step, metrics)
            bar.update()
            last = step == settings.num_steps
            logs, evaluates, saves, samples = (
                last or step % every == 0
                for every in (settings.log_every, settings.eval_every, settings.checkpoint_every, settings.sample_every)
            )
            if evaluates or saves or samples:
                running.check()  # a state that is not finite is never saved
            if logs:
                means = running.report()
                rate = (step - timed_from) / (time.perf_counter() - timer)
                speed = {'steps_per_second': rate, 'images_per_second': rate * settings.batch_size}
                writer.scalars(step, means | {'learning_rate': float(learning_rate(step - 1))} | speed)
                bar.set_postfix_str(f'loss {means["loss"]:.4f}, {speed["images_per_second"]:.0f} images/s')
            loss_now = held_out_mean() if evaluates else None
            if evaluates:
                writer.scalars(step, {'held_out_loss': loss_now})
            if saves:
                checkpoints.save(step, state, loss_now)
            if samples:
                try:
                    drawn = sample_as_configured(pipeline_of(experiment, state.ema, mesh), config.sample)
                except SamplingDiverged as error:  # a young model under strong guidance: no reason to stop training
                    LOGGER.warning('no samples of step %d: %s', step, error)
                else:
                    picture = picture_of(drawn, experiment.num_classes)
                    save_png(workdir / 'samples' / f'training_step{step}.png', picture)
                    writer.image(step, 'samples', picture)
            if logs or evaluates or samples:
                timer, timed_from = time.perf_counter(), step
    except TrainingDiverged as error:
        raise TrainingDiverged(
            f'training stopped at {error}. Complete checkpoints from before: {checkpoints.steps() or "none"}, in '
            f'{checkpoints.directory}. Try a lower optimizer.learning_rate, more optimizer.warmup_steps or a smaller '
            'optimizer.clip_norm, in another --workdir.'
        ) from None
    finally:
        bar.close()
        writer.close()
        checkpoints.close()

    # --- what came of it ----------------------------------------------------------------------------------------------
    LOGGER.info('loss curves: %s', plot_curves(workdir))
    if config.evaluate.after_training and config.evaluate.evaluators:
        evaluate_pipeline(pipeline_of(experiment, state.ema, mesh), splits, config, workdir, int(state.step))
    LOGGER.info('samples: %s', workdir / 'samples')
    return state
