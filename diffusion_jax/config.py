"""What a config holds: every key with its default. A config file starts from `default_config()` and changes some.

Configs are data: they name things ('ddim', 'cosine') that the registries resolve. The config that comes back is locked,
so that a key that does not exist is an error and not a new key.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from diffusion_jax.errors import UsageError
from diffusion_jax.models import MODELS, UNet
from diffusion_jax.registry import lookup, parameters_of
from diffusion_jax.samplers import SOLVERS
from diffusion_jax.training.sharding import DEFAULT_RULES

SOLVER_OPTIONS: dict[str, type] = {
    name: next((kind for kind in (bool, int, float) if kind.__name__ in str(parameter.annotation)), str)
    for solver in SOLVERS.values()
    for name, parameter in parameters_of(solver).items()
    if name not in ('schedule', 'times')
}
"""Keys of config.sample that go to the solver, where they are given (eta, order, ...), and their types."""


def default_config() -> ConfigDict:
    """All keys. The model's resolution, image channels and number of classes come from the data."""
    config = ConfigDict()
    config.task = 'diffusion'  # or 'autoencoder', for which schedule, loss and labels mean nothing
    config.seed = 0
    config.init_from = placeholder(str)  # a model to begin from: pretrained:NAME, a .safetensors file, a run's folder

    config.data = ConfigDict(
        {
            'name': 'digits',  # one of data.SOURCES
            'dir': placeholder(str),  # where its files are, if not in their usual place
            'resolution': placeholder(int),  # resize to this; the data's own by default
            'flip': False,  # mirror training images at random
            'placement': 'auto',  # 'device', 'host' or 'auto'; 'stream' reads images when they are needed
            'workers': 0,  # processes that read a streamed set; 0: threads of this one
            'crop': 'center',  # of streamed images; 'random': a random square, to train on
            'crop_min_scale': 0.8,  # of a random square's side, in the image's short side
            'tfds_name': placeholder(str),  # with name='tfds': which data set
        }
    )
    config.class_conditional = True  # condition on the label, if the data has labels
    config.label_dropout = 0.1  # how often the null label replaces it, for classifier-free guidance

    config.model = ConfigDict({'name': 'unet', **_defaults_of(UNet)})  # and all of its arguments
    config.schedule = ConfigDict({'name': 'cosine', 'num_timesteps': 1000})  # num_timesteps=None: continuous
    config.loss = ConfigDict(
        {
            'prediction': 'eps',  # 'eps', 'x0', 'v' or 'flow'
            'weighting': {'name': 'simple'},  # one of losses.WEIGHTINGS
            'time_sampler': 'uniform',  # 'stratified', or 'loss_history': by importance, on a chain
            'vlb_weight': 0.0,  # of the variational bound, with model.learned_variance; improved DDPM has 0.001
        }
    )
    config.latents = ConfigDict(  # what the network works in, instead of pixels
        {
            # Whose: a file of --mode=export of an autoencoder, the folder of its run, or a vae/ of diffusers.
            'autoencoder': placeholder(str),
            'cache': True,  # encode all images once, to files; else each when it is needed
            'cache_dir': placeholder(str),  # for several runs; the workdir by default
            'draw': True,  # from the Gaussian of each image, or take its mean
        }
    )
    config.text = ConfigDict(  # what captions become, where the data have them and the model takes them
        {
            'tokenizer': 'small',  # 4,514 tokens that ship with the package; or a folder with a tokenizer of CLIP's
            'length': 77,  # tokens of a text; longer ones are cut
            'encoder': placeholder(str),  # of conditional_unet: a folder with text_encoder/ and tokenizer/ of CLIP's
        }
    )
    config.autoencoder = (
        ConfigDict(  # the objective of task='autoencoder', model.name='autoencoder_kl' or 'autoencoder_vq'
            {
                'reconstruction': 'l1',  # or 'l2': mean |x - y|, or of its square, over pixels
                'kl_weight': 1e-6,  # of the latents' KL per number of the image, as in Latent Diffusion; autoencoder_kl
                'commitment_weight': 0.25,  # of the encoder's distance to the codebook; autoencoder_vq
                'perceptual_weight': 0.0,  # of the distance between features
                'perceptual_features': 'auto',  # as evaluate.features: the shipped classifier, or one of FEATURES
                'perceptual_file': placeholder(str),  # the weights of features 'inception' and 'classifier'
                'discriminator_weight': 0.0,  # of the adversarial term, times what balances its gradient (VQGAN, eq. 7)
                'discriminator_start': 0,  # the step at which the discriminator begins, and the term with it
                'discriminator_channels': 64,  # of its first layer
                'discriminator_layers': 3,  # that halve
            }
        )
    )
    config.optimizer = ConfigDict(
        {
            'name': 'adam',  # or 'adamw'
            'learning_rate': 2e-4,
            'warmup_steps': 0,  # linear, from 0
            'decay': 'constant',  # or 'cosine', 'linear': to 0 at train.num_steps
            'b1': 0.9,
            'b2': 0.999,
            'weight_decay': 0.0,  # adamw only
            'clip_norm': 1.0,  # of the whole gradient
        }
    )
    config.ema_decay = 0.9999  # with warm-up: min(ema_decay, (1 + step) / (10 + step))
    config.train = ConfigDict(
        {
            'num_steps': 1000,
            'batch_size': 128,
            'log_every': 100,
            'eval_every': 1000,  # held-out loss of the averaged parameters
            'sample_every': 1000,  # a grid of samples
            'checkpoint_every': 1000,
            'keep_checkpoints': 2,  # the newest ones; the one of least held-out loss is kept besides
            'accumulate': 1,  # the batch goes through in as many parts: less memory, the same batch
            'steps_per_dispatch': 1,  # compiled steps in one go: for small models, whose steps are short
            'max_skipped_steps': 0,  # steps of NaN or inf are skipped, up to as many; 0: stop at the first
        }
    )
    config.mesh = ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1})  # devices along each axis; -1: the rest
    config.sharding_rules = DEFAULT_RULES  # (regex on a parameter's path, rule), see training.sharding
    config.sample = ConfigDict(
        {
            'num': 100,
            'labels': 'all',  # 'all': every class in turn; or '3', or '0,1,2', likewise in turn
            'solver': 'ddim',  # one of samplers.SOLVERS; which is for what: samplers.describe()
            'steps': 50,
            'spacing': 'trailing',  # one of samplers.SPACINGS
            'final': 'zero',  # or 'sigma_min': where the last step ends
            **{name: placeholder(kind) for name, kind in SOLVER_OPTIONS.items()},  # None: the solver's own default
            'prompts': (),  # of a model that takes text, in turn; of none, captions of the data
            'negative_prompt': placeholder(str),  # what guidance leads away from
            'guidance_scale': placeholder(float),  # None: the conditional model alone
            'guidance_rescale': 0.0,  # in [0, 1]: against over-exposure by large scales
            'guidance_interval': placeholder(tuple),  # (low, high) in log-SNR: guide there alone
            'clip': placeholder(bool),  # the predicted x0, to [-1, 1]; None: where it is an image, not latents
            'seed': 0,
            'batch_size': 100,
            'ema': True,  # the averaged parameters, or the raw ones
            'checkpoint': 'newest',  # or 'best' (least held-out loss), or the number of a step
        }
    )
    config.evaluate = ConfigDict(
        {
            'evaluators': ('nearest_neighbour',),  # of evaluation.EVALUATORS; of an autoencoder, RECONSTRUCTION_SCORES
            'num': 1000,  # samples, drawn as config.sample says
            'features': 'auto',  # the shipped classifier of these data; or one of evaluation.features.FEATURES
            'weights': placeholder(str),  # the file of features 'inception' and 'classifier'
            # Real images that samples are held against, or that are reconstructed: 'train', 'test'; or a file of
            # statistics for samples, .npz.
            'reference': 'train',
            'num_likelihood': 64,  # test images, for bits_per_dim
            'after_training': True,
            'every': 0,  # steps between scores during training; 0: none
            'num_during_training': 500,  # samples for these
        }
    )
    config.export_dtype = 'float32'  # of --mode=export, or 'float16'
    return config.lock()


def model_section(name: str) -> ConfigDict:
    """`config.model` for the model of that name of `models.MODELS`: all of its arguments, at their defaults."""
    return ConfigDict({'name': name, **_defaults_of(lookup('model', MODELS, name))})


def _defaults_of(module: Callable[..., Any]) -> dict[str, Any]:
    """A module's keyword arguments with their defaults, save those that come from the data."""
    return {
        p.name: placeholder(int) if p.default is None else p.default
        for p in parameters_of(module).values()
        if p.default is not p.empty and p.name not in FROM_DATA
    }


FROM_DATA = ('resolution', 'image_channels', 'num_classes', 'vocab_size', 'text_length')
"""Arguments of a model that the data sets decide."""

FREE_TO_CHANGE = (
    'sample.',
    'evaluate.',
    'export_dtype',
    'data.dir',
    'data.placement',
    'data.workers',
    'train.num_steps',
    'train.log_every',
)
FREE_TO_CHANGE += ('train.eval_every', 'train.sample_every', 'train.checkpoint_every', 'train.keep_checkpoints')
FREE_TO_CHANGE += ('train.accumulate', 'train.steps_per_dispatch', 'train.max_skipped_steps')
FREE_TO_CHANGE += ('mesh.', 'sharding_rules', 'model.remat', 'latents.cache_dir', 'latents.autoencoder')
"""Keys that a run may be resumed or sampled with another value of: they do not alter what was trained so far."""


def solver_options(section: ConfigDict) -> dict[str, Any]:
    """What a config's `sample` section says of the solver itself."""
    return {name: section[name] for name in SOLVER_OPTIONS if section[name] is not None}


def options(section: Mapping[str, Any]) -> dict[str, Any]:
    """A section that names a thing, as keyword arguments for `registry.build`."""
    return {key: value.to_dict() if isinstance(value, ConfigDict) else value for key, value in section.items()}


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{'a': {'b': 1}} as {'a.b': 1}, with values as JSON reads them back."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f'{prefix}{key}.')
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """'key: theirs -> ours' for each key that matters to what was trained (see `FREE_TO_CHANGE`)."""
    ours, theirs = flatten(ours), flatten(theirs)
    return [
        f'{key}: {theirs.get(key, "(absent)")!r} -> {ours.get(key, "(absent)")!r}'
        for key in sorted(ours.keys() | theirs.keys())
        if not key.startswith(FREE_TO_CHANGE) and ours.get(key) != theirs.get(key)
    ]


def check_keys(config: ConfigDict) -> None:
    """A `UsageError` for keys of a config file that no default has (the model's own arguments aside) or lacks."""
    have = {k for k in flatten(config.to_dict()) if not _open_ended(k)}
    want = {k for k in flatten(default_config().to_dict()) if not _open_ended(k)}
    _refuse('has unknown keys', have - want, want)
    _refuse('lacks keys', want - have, want)


def with_defaults(record: Mapping[str, Any]) -> dict[str, Any]:
    """A config that was written down, with the default of each key that it is too old to have."""
    filled = ConfigDict(dict(record))
    default = default_config()
    same_model = filled.model.name == default.model.name
    for key, value in flatten(default.to_dict()).items():
        section, _, name = key.rpartition('.')
        if section and section.split('.')[0] not in filled:  # no section within a section was ever added
            filled[section] = ConfigDict()
        holder = filled[section] if section else filled
        if ((section == 'model' and same_model) or not _open_ended(key)) and name not in holder:
            holder[name] = value
    return filled.to_dict()


def _open_ended(key: str) -> bool:
    return key.startswith(('model.', 'schedule.', 'loss.weighting.'))


def _refuse(what: str, keys: set[str], valid: Iterable[str]) -> None:
    if keys:
        raise UsageError(f'the config {what}: {", ".join(sorted(keys))}. Valid keys: {", ".join(sorted(valid))}.')
