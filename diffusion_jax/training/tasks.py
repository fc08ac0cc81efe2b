"""What is trained: what the loop of `training.train` needs to know of a diffusion model, or of an autoencoder."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax.data import Splits
from diffusion_jax.data.batches import Batches
from diffusion_jax.errors import SamplingDiverged, UsageError
from diffusion_jax.evaluation import check_evaluators, evaluate_during_training, evaluate_pipeline
from diffusion_jax.evaluation.reconstruction import Reconstructions, evaluate_reconstructions
from diffusion_jax.evaluation.report import write_autoencoder_report, write_report
from diffusion_jax.experiment import DataInfo, make_autoencoder, make_experiment, read_record
from diffusion_jax.pipelines import autoencoders, model_file
from diffusion_jax.pipelines.parts import keep_autoencoder, pipeline_of, read_parts
from diffusion_jax.pipelines.workdir import check_sampling, picture_of, sample_as_configured
from diffusion_jax.registry import lookup
from diffusion_jax.training.autoencoding import make_autoencoder_step, make_held_out_error, make_objective
from diffusion_jax.training.inputs import Inputs
from diffusion_jax.training.latent_cache import cached_latents
from diffusion_jax.training.step import TrainState, init_state, make_held_out_loss, make_train_step

LOGGER = logging.getLogger(__name__)


class Task(Protocol):
    """A config's task. Everything that it makes is pure, and its state is one `TrainState`.

    Attributes:
      data: what the model knows of its data.
      pictures: what the pictures of training are of.
    """

    data: DataInfo
    pictures: str

    def __init__(self, config: ConfigDict, data: DataInfo, mesh: Mesh, workdir: Path): ...

    def check(self, splits: Splits, mesh: Mesh) -> None:
        """A `UsageError` if pictures or scores cannot be made as the config says."""

    def batches(self, splits: Splits, make: Callable[..., Batches]) -> tuple[Batches, Batches]:
        """Batches to train on and held-out ones; `make(image_set, conditioning=.., frozen=..)` makes them."""

    def load_init(self, mesh: Mesh) -> Any:
        """The parameters that `config.init_from` names."""

    def create(self, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step."""

    def step(self, optimizer: optax.GradientTransformation, param_shardings: Any) -> Callable:
        """step(state, arrays, batch) -> (state, metrics)."""

    def held_out_loss(self) -> Callable:
        """held_out_loss(params, arrays, batch, key_data)."""

    def picture(self, params: Any, splits: Splits, mesh: Mesh) -> Any:
        """What these parameters do, uint8 [h, w, 3]; may raise `SamplingDiverged`."""

    def scores(self, params: Any, splits: Splits, mesh: Mesh, workdir: Path) -> dict[str, float]:
        """Numbers to follow during training; may raise `SamplingDiverged`."""

    def finish(self, params: Any, splits: Splits, mesh: Mesh, workdir: Path, step: int) -> None:
        """Scores and the report, after training."""


class _Diffusion:
    """Steps towards x0 from noise; pictures and scores of samples."""

    pictures = 'samples'

    def __init__(self, config: ConfigDict, data: DataInfo, mesh: Mesh, workdir: Path):
        self._config, self._workdir = config, workdir
        record = read_record(workdir)
        self._parts = read_parts(config, record[1] if record else data, mesh)
        self._experiment = make_experiment(config, self._parts.of(data))
        self.data = self._experiment.data
        self._prompts = ('',)

    def _pipeline(self, params: Any, mesh: Mesh):
        return pipeline_of(self._experiment, params, mesh, self._parts, self._prompts)

    def check(self, splits, mesh):
        if self.data.text is not None:
            if splits.train.captions is None:
                raise UsageError(
                    f'model.name={self._config.model.name!r} learns from captions, and data.name='
                    f"{self._config.data.name!r} has none: take one that has, such as 'captioned_folder'."
                )
            self._prompts = splits.test.captions
        check_sampling(self._pipeline({}, mesh), self._config.sample)
        check_evaluators(self._config, splits, self._pipeline({}, mesh))

    def batches(self, splits, make):
        keep_autoencoder(self._config, self.data, self._workdir)
        parts, frozen = self._parts, {}
        if parts.text is not None:
            frozen['text'] = parts.text.params
        if parts.latents is None or not self._config.latents.cache:
            sets = splits
            if parts.latents is not None:
                frozen['autoencoder'] = parts.latents.params
        else:
            sets = cached_latents(self._config, splits, parts, self._workdir)

        def made(name: str) -> Batches:
            return make(getattr(sets, name), conditioning=self._ids(getattr(splits, name)), frozen=frozen or None)

        return made('train'), made('test')

    def _ids(self, images: Any) -> dict[str, np.ndarray]:
        if self.data.text is None:
            return {}
        ids = self._parts.tokenizer(images.captions, self.data.text.length, warn=False)
        return {'ids': ids}

    def _inputs(self) -> Inputs:
        parts, text = self._parts, self.data.text
        return Inputs(
            flip=self._config.data.flip,
            null_label=self._experiment.num_classes,
            label_dropout=self._config.label_dropout,
            latents=parts.latent_info,
            encoder=None if parts.latents is None else parts.latents.encoder,
            draw=self._config.latents.draw,
            null_ids=None if text is None else parts.tokenizer('', text.length)[0],
            encode_text=None if parts.text is None else lambda params, ids: parts.text.apply(params, ids).last,
        )

    def load_init(self, mesh):
        return model_file.load_init(self._config, mesh)[1]

    def create(self, optimizer):
        return init_state(self._experiment.init, optimizer, self._config.seed, self._experiment.loss_history)

    def step(self, optimizer, param_shardings):
        return make_train_step(
            self._experiment.loss,
            optimizer,
            ema_decay=self._config.ema_decay,
            inputs=self._inputs(),
            accumulate=self._config.train.accumulate,
            skip_nonfinite=self._config.train.max_skipped_steps > 0,
            param_shardings=param_shardings,
        )

    def held_out_loss(self):
        return make_held_out_loss(self._experiment.loss, self._inputs())

    def picture(self, params, splits, mesh):
        samples = sample_as_configured(self._pipeline(params, mesh), self._config.sample)
        return picture_of(samples, self._experiment.num_classes)

    def scores(self, params, splits, mesh, workdir):
        return evaluate_during_training(self._pipeline(params, mesh), splits, self._config, workdir)

    def finish(self, params, splits, mesh, workdir, step):
        trained = self._pipeline(params, mesh)
        if self._config.evaluate.after_training and self._config.evaluate.evaluators:
            try:
                evaluate_pipeline(trained, splits, self._config, workdir, step)
            except SamplingDiverged as error:  # the run is done, and its checkpoints are whole
                LOGGER.warning('no scores of step %d: %s', step, error)
        write_report(self._config, workdir, trained, step)


class _Autoencoding:
    """Steps towards the images themselves; pictures and scores of reconstructions of held-out images."""

    pictures = 'reconstructions'

    def __init__(self, config: ConfigDict, data: DataInfo, mesh: Mesh, workdir: Path):
        self._config = config
        self._autoencoder = make_autoencoder(config, data)
        self._objective = make_objective(config.autoencoder, self._autoencoder)
        self.data = data

    def check(self, splits, mesh):
        autoencoders.check_reconstructing(self._config.sample)
        Reconstructions(self._config, self._autoencoder, splits)
        if self._config.evaluate.every:
            Reconstructions(self._config, self._autoencoder, splits, self._config.evaluate.num_during_training)

    def batches(self, splits, make):
        return make(splits.train), make(splits.test)

    def load_init(self, mesh):
        return autoencoders.load_init(self._config, mesh)

    def create(self, optimizer):
        adversary = self._objective.init_discriminator
        return init_state(self._autoencoder.init, optimizer, self._config.seed, init_adversary=adversary)

    def step(self, optimizer, param_shardings):
        return make_autoencoder_step(
            self._objective,
            optimizer,
            ema_decay=self._config.ema_decay,
            flip=self._config.data.flip,
            accumulate=self._config.train.accumulate,
            skip_nonfinite=self._config.train.max_skipped_steps > 0,
            param_shardings=param_shardings,
        )

    def held_out_loss(self):
        return make_held_out_error(self._objective)

    def picture(self, params, splits, mesh) -> np.ndarray:
        section = self._config.sample
        images = autoencoders.first_of(splits.test, min(section.num, autoencoders.SHOWN))
        again = autoencoders.reconstruct(self._autoencoder, params, images, mesh, section.batch_size)
        return autoencoders.picture_of_pairs(images, again)

    def scores(self, params, splits, mesh, workdir):
        num = self._config.evaluate.num_during_training
        return Reconstructions(self._config, self._autoencoder, splits, num).score(params, mesh)[0]

    def finish(self, params, splits, mesh, workdir, step):
        if self._config.evaluate.after_training and self._config.evaluate.evaluators:
            evaluate_reconstructions(self._autoencoder, params, splits, self._config, workdir, step, mesh)
        write_autoencoder_report(self._config, workdir, self._autoencoder, params, step)


_TASKS: dict[str, type[Task]] = {'diffusion': _Diffusion, 'autoencoder': _Autoencoding}


def make_task(config: ConfigDict, data: DataInfo, mesh: Mesh, workdir: str | Path) -> Task:
    """What `config.task` names, for such data; a `UsageError` names what does not fit."""
    return lookup('task', _TASKS, config.task)(config, data, mesh, Path(workdir))
