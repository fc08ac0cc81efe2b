"""From a config to the things that it names, and what a workdir remembers of the run that it holds."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PRNGKeyArray
from ml_collections import ConfigDict

from diffusion_jax import data, losses
from diffusion_jax.config import check_keys, differences, options, with_defaults
from diffusion_jax.denoisers import edm_preconditioned
from diffusion_jax.errors import UsageError
from diffusion_jax.models import MODELS, Params, functional
from diffusion_jax.registry import build, lookup, parameters_of
from diffusion_jax.schedules import SCHEDULES, Exploding, Schedule


@dataclasses.dataclass(frozen=True)
class LatentInfo:
    """A space of latents, whichever file its autoencoder is in: x0 = (z - shift) scale.

    Attributes:
      factor: pixels per latent along each side.
      channels: of the latents.
      scale, shift: of them.
      probe: what the encoder makes of one fixed picture, by which another one is told from it.
    """

    factor: int
    channels: int
    scale: float
    shift: float
    probe: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class TextInfo:
    """What texts become.

    Attributes:
      vocab_size: of the tokenizer.
      length: tokens of a text, with its start and end.
      features: of a frozen encoder's states; 0 where the network has an encoder of its own.
    """

    vocab_size: int
    length: int
    features: int = 0


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What a model must know of its data, without the data.

    Attributes:
      image_shape: (H, W, C).
      class_names: empty for unlabelled data.
      latents: those that the model works in; None for pixels.
      text: what its captions become; None for a model that takes none.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    latents: LatentInfo | None = None
    text: TextInfo | None = None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> 'DataInfo':
        """What `dataclasses.asdict` made of one; a KeyError or TypeError for anything else."""
        latents, text = record.get('latents'), record.get('text')
        return cls(
            tuple(record['image_shape']),
            tuple(record['class_names']),
            None if latents is None else LatentInfo(**{**latents, 'probe': tuple(latents['probe'])}),
            None if text is None else TextInfo(**text),
        )

    @property
    def model_shape(self) -> tuple[int, int, int]:
        """Of what the network sees."""
        if self.latents is None:
            return self.image_shape
        height, width, _ = self.image_shape
        return (height // self.latents.factor, width // self.latents.factor, self.latents.channels)


TASKS = ('diffusion', 'autoencoder')

AUTOENCODERS = ('autoencoder_kl', 'autoencoder_vq')
"""Models of the task 'autoencoder'."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The network, the schedule and the objective that a config names.

    Attributes:
      init: key -> parameters.
      apply: `apply(params, x, t, **conditioning)`.
      loss: `loss(params, x0, key, **conditioning)` -> [B].
      num_classes: 0 if the model is not conditioned on labels.
      learned_variance: whether the network gives the reverse process's variance besides.
      loss_history: the empty one, if training draws its times by it.
      encode_text: `encode_text(params, ids)` -> `TextOutput`, of a network with a text encoder of its own.
    """

    init: Callable[[PRNGKeyArray], Params]
    apply: Callable[..., Any]
    loss: losses.Loss
    schedule: Schedule
    prediction: str
    data: DataInfo
    num_classes: int
    learned_variance: bool = False
    loss_history: losses.LossHistory | None = None
    encode_text: Callable[..., Any] | None = None


def load_data(config: ConfigDict) -> data.Splits:
    """The train and test images that `config.data` names."""
    section = config.data
    chosen = {'data_dir': section.dir, 'resolution': section.resolution, 'tfds_name': section.tfds_name}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    can_stream = [name for name, source in data.SOURCES.items() if 'streaming' in parameters_of(source)]
    if section.name in can_stream and section.placement != 'auto':
        chosen['streaming'] = section.placement == 'stream'
    elif section.name in data.SOURCES and section.placement == 'stream':
        raise UsageError(
            f'data.name={section.name!r} is read into memory as a whole: data.placement=auto, device or host. '
            f'Sets that can be streamed: {", ".join(can_stream)}.'
        )
    if section.crop != 'center':
        chosen |= {'crop': section.crop, 'crop_min_scale': section.crop_min_scale}
    return data.load(section.name, **chosen)


def info_of(splits: data.Splits) -> DataInfo:
    return DataInfo(splits.train.image_shape, splits.train.class_names)


def make_experiment(config: ConfigDict, info: DataInfo) -> Experiment:
    """Resolves every name that matters to the model; a `UsageError` names what does not fit."""
    _checked(config, info, 'diffusion')
    if config.model.name in AUTOENCODERS:
        raise UsageError(f"model.name={config.model.name!r} is trained with task='autoencoder'.")
    if not 0 <= config.label_dropout <= 1:
        raise UsageError(f'label_dropout must be in [0, 1], got {config.label_dropout}.')
    num_classes = len(info.class_names) if config.class_conditional else 0
    _check_conditioning(config, info)
    schedule = build('schedule', SCHEDULES, **options(config.schedule))
    arguments = network_arguments(config, info)
    init, apply = functional(lambda rngs: build('model', MODELS, name=config.model.name, **arguments, rngs=rngs))
    network = apply
    if isinstance(schedule, Exploding):
        if config.loss.prediction != 'x0':
            raise UsageError(
                f'on schedule {config.schedule.name!r} x_t has any size, and the network is preconditioned to predict '
                "x0 (Karras et al. 2022): set loss.prediction='x0' (loss.weighting.name='edm' is the paper's)."
            )
        apply = edm_preconditioned(apply)
    learned_variance = config.model.get('learned_variance', False)
    losses.check_vlb_weight(config.loss.vlb_weight, schedule)
    if config.loss.vlb_weight and not learned_variance:
        raise UsageError(
            f'loss.vlb_weight={config.loss.vlb_weight} trains the variance of a model that has none: set '
            'model.learned_variance=True, or loss.vlb_weight=0.'
        )
    if learned_variance and not config.loss.vlb_weight:
        raise UsageError(
            'model.learned_variance=True needs loss.vlb_weight above 0, or the variance is never trained: set it '
            '(0.001 in improved DDPM), or model.learned_variance=False.'
        )
    loss_history = losses.init_history(schedule) if config.loss.time_sampler == 'loss_history' else None
    # Where there is no history, as for held-out images, the times that it stands for are uniform.
    time_samplers = losses.TIME_SAMPLERS | {'loss_history': losses.uniform}
    loss = functools.partial(
        losses.diffusion_loss,
        apply,
        schedule=schedule,
        prediction=config.loss.prediction,
        weighting=build('weighting', losses.WEIGHTINGS, **options(config.loss.weighting)),
        time_sampler=lookup('time_sampler', time_samplers, config.loss.time_sampler),
        vlb_weight=config.loss.vlb_weight,
    )
    lookup('prediction to train on', losses.LOG_ERROR_SCALE, config.loss.prediction)
    prediction = config.loss.prediction
    return Experiment(
        init,
        apply,
        loss,
        schedule,
        prediction,
        info,
        num_classes,
        bool(learned_variance),
        loss_history,
        functools.partial(network, method='encode') if 'vocab_size' in arguments else None,
    )


def network_arguments(config: ConfigDict, info: DataInfo) -> dict[str, Any]:
    """Arguments of the network of a config: the config's own, and those that follow from the data."""
    height, _, channels = info.model_shape
    chosen = {key: value for key, value in options(config.model).items() if key != 'name'}
    chosen |= {'resolution': height, 'image_channels': channels}
    chosen['num_classes'] = len(info.class_names) if config.class_conditional else 0
    if info.text is not None and not info.text.features:
        chosen |= {'vocab_size': info.text.vocab_size, 'text_length': info.text.length}
    return chosen


def _check_conditioning(config: ConfigDict, info: DataInfo) -> None:
    """A `UsageError` where the model and what it is told of do not fit."""
    name, text = config.model.name, info.text
    if info.latents is not None and config.sample.clip:
        raise UsageError('sample.clip=True is for pixels, and this model works in latents: leave it out.')
    if name == 'text_unet' and (text is None or text.features):
        raise UsageError(
            "model.name='text_unet' has a text encoder of its own, which captions are for: take captioned data, such "
            "as data.name='captioned_folder', and no text.encoder."
        )
    if name == 'conditional_unet' and (text is None or text.features != config.model.context_features):
        raise UsageError(
            f"model.name='conditional_unet' attends to the {config.model.context_features} features (context_features) "
            f'of a frozen text encoder, and there are {text.features if text else 0}: set text.encoder and '
            "model.context_features to its own; or take 'text_unet', which has an encoder, or 'unet', which needs none."
        )
    if text is not None and name not in ('text_unet', 'conditional_unet'):
        raise UsageError(f'text.encoder is of no use to model.name={name!r}: conditional_unet attends to texts.')


def _checked(config: ConfigDict, info: DataInfo, task: str) -> tuple[int, int]:
    """(resolution, channels) of the images, if the config is of that task and what all tasks share is in order."""
    check_keys(config)
    lookup('task', dict.fromkeys(TASKS), config.task)
    if config.task != task:
        which = {
            'diffusion': 'is of a diffusion model, not of an autoencoder',
            'autoencoder': 'is of an autoencoder, not of a diffusion model: `pipelines.load_autoencoder` reads one',
        }
        raise UsageError(f'this config, of task {config.task!r}, {which[config.task]}.')
    height, width, channels = info.image_shape
    if height != width:
        raise UsageError(f'images must be square, got {height}x{width}: set data.resolution.')
    if config.seed < 0:
        raise UsageError(f'seed must be 0 or more, got {config.seed}.')
    if not 0 <= config.ema_decay < 1:
        raise UsageError(f'ema_decay must be in [0, 1), got {config.ema_decay}.')
    return height, channels


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """The autoencoder that a config names.

    Attributes:
      init: key -> parameters.
      apply: `apply(params, x, method=..)`, as `models.autoencoder` and `models.vq_autoencoder` take it.
      factor: pixels per latent along each side.
      latent_channels: of what `encode` gives.
      codebook_size: vectors that latents are rounded to; 0: none.
    """

    init: Callable[[PRNGKeyArray], Params]
    apply: Callable[..., Any]
    factor: int
    latent_channels: int
    codebook_size: int
    data: DataInfo

    def encode(self, params: Params, images: Any) -> Any:
        """Images in [-1, 1], [B, H, W, C] -> latents [B, h, w, c]: the mean of their Gaussians, or before rounding."""
        encoded = self.apply(params, images, method='encode')
        return encoded if self.codebook_size else encoded.mean

    def decode(self, params: Params, z: Any) -> Any:
        """Latents -> images, mostly in [-1, 1]."""
        return self.apply(params, z, method='decode')


def make_autoencoder(config: ConfigDict, info: DataInfo) -> Autoencoder:
    """The autoencoder of a config of task 'autoencoder'; a `UsageError` names what does not fit."""
    resolution, channels = _checked(config, info, 'autoencoder')
    models = {name: MODELS[name] for name in AUTOENCODERS}
    if config.model.name in MODELS and config.model.name not in AUTOENCODERS:
        raise UsageError(f'model.name={config.model.name!r} is no autoencoder: {" or ".join(AUTOENCODERS)} is.')
    arguments = options(config.model)
    init, apply = functional(lambda rngs: build('model', models, **arguments, image_channels=channels, rngs=rngs))
    defaults = {name: p.default for name, p in parameters_of(models[config.model.name]).items()}
    chosen = defaults | arguments
    factor = 2 ** (len(chosen['channel_multipliers']) - 1)
    if resolution % factor:
        raise UsageError(
            f'images of {resolution}x{resolution} cannot be halved {len(chosen["channel_multipliers"]) - 1} times: set '
            f'data.resolution to a multiple of {factor}, or fewer model.channel_multipliers.'
        )
    codebook_size = chosen.get('codebook_size', 0)
    latent_channels = chosen.get('codebook_channels') or chosen['latent_channels']
    return Autoencoder(init, apply, factor, latent_channels, codebook_size, info)


# --- the workdir's record ---------------------------------------------------------------------------------------------


def record_path(workdir: str | Path) -> Path:
    return Path(workdir) / 'config.json'


def write_record(workdir: str | Path, config: ConfigDict, info: DataInfo) -> None:
    """Writes down the config and what the model knows of its data, so that the workdir stands on its own."""
    path = record_path(workdir)
    path.parent.mkdir(parents=True, exist_ok=True)
    told, previous = config.to_dict(), read_record(workdir)
    if previous and not told['init_from']:  # left out when a run goes on; where it came from is kept
        told['init_from'] = previous[0]['init_from']
    text = json.dumps({'config': told, 'data': dataclasses.asdict(info)}, indent=1)
    part = path.with_suffix('.part')
    part.write_text(text + '\n')
    part.replace(path)


def read_record(workdir: str | Path) -> tuple[dict[str, Any], DataInfo] | None:
    """(config, data info) of the run in a workdir; None if there is none."""
    path = record_path(workdir)
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        return with_defaults(record['config']), DataInfo.of(record['data'])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UsageError(f'{path} is damaged ({error!r}): restore it, or use another --workdir.') from error


def check_same_run(config: ConfigDict, workdir: str | Path) -> DataInfo | None:
    """The data info of the run in the workdir (None: no run there), or a `UsageError` if its config is another one."""
    record = read_record(workdir)
    if record is None:
        return None
    asked = config.to_dict()
    if not asked['init_from']:  # a run that has begun needs it no more
        asked['init_from'] = record[0]['init_from']
    changed = differences(asked, record[0])
    if changed:
        raise UsageError(
            f'{workdir} holds a run of another config. It differs in (run -> asked for): {"; ".join(changed)}. '
            'Use that config, or another --workdir.'
        )
    return record[1]
