"""Handwritten digits, 8x8 (scikit-learn's, embedded: no download), class-conditional, on a laptop's CPU.

    python main.py --config=configs/digits.py --workdir=runs/digits

Measured on two CPU cores (JAX 0.10): 1 min 56 s for the 1000 steps (607 images/s) and the samples made on the way, 3
min 7 s with the installation and the scoring. Of 1000 samples (guidance 2, 25 DDIM steps) the classifier that ships,
itself 99.3% right on unseen real digits, reads 100.0% as the label asked for; Frechet distance to the training set
0.069 (the test set's: 0.142), precision 0.96, recall 0.56; near copies 0.3% (unseen real digits: 1%), exact copies 0.
"""

from diffusion_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = 'digits'

    config.model.channels = 32
    config.model.channel_multipliers = (1, 2)
    config.model.attention_resolutions = (4,)
    config.loss.prediction = 'v'
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay = 'cosine'
    config.ema_decay = 0.995

    config.train.num_steps = 1000
    config.train.batch_size = 64
    config.train.log_every = 50
    config.train.eval_every = 250
    config.train.sample_every = 500
    config.train.checkpoint_every = 250

    config.sample.steps = 25
    config.sample.guidance_scale = 2.0
    config.evaluate.evaluators = ('frechet_distance', 'precision_recall', 'class_agreement', 'nearest_neighbour')
    return config
