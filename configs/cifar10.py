"""CIFAR-10 by the DDPM paper's recipe (Ho, Jain & Abbeel 2020, appendix B): unconditional, 35.7 M parameters.

    python main.py --config=configs/cifar10.py --workdir=runs/cifar10 --config.data.dir=FOLDER

FOLDER holds the official binary or python batches (cifar-10-batches-bin, cifar-10-batches-py) or a TFDS data directory.

Made for an accelerator: the paper trained 800,000 steps. Published there: FID 3.17 with 1000 ancestral steps of the
larger variance. This project has not trained it yet; what is tested here is the parameter count, the hyper-parameters,
and steps on files of CIFAR-10's format.
"""

from diffusion_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = 'cifar10'
    config.data.flip = True
    config.class_conditional = False

    config.model.channels = 128
    config.model.channel_multipliers = (1, 2, 2, 2)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16,)
    config.model.dropout = 0.1
    config.schedule.name = 'linear'
    config.loss.prediction = 'eps'

    config.optimizer.name = 'adam'
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 5000
    config.optimizer.clip_norm = 1.0
    config.ema_decay = 0.9999

    config.train.num_steps = 800_000
    config.train.batch_size = 128
    config.train.log_every = 100
    config.train.eval_every = 5000
    config.train.sample_every = 10_000
    config.train.checkpoint_every = 5000

    config.sample.solver = 'ddim'  # the paper's own: --config.sample.solver=ddpm --config.sample.steps=1000
    config.sample.steps = 50
    config.evaluate.evaluators = ('nearest_neighbour',)
    return config
