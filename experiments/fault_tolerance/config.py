"""Digits, a network of a few thousand parameters, and saves all the time: one is nearly always under way."""

from diffusion_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = 'digits'
    config.model.channels = 8
    config.model.channel_multipliers = (1, 2)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (4,)
    config.model.dropout = 0.1
    config.schedule.num_timesteps = 100
    config.loss.prediction = 'v'
    config.optimizer.warmup_steps = 5

    config.train.num_steps = 400
    config.train.batch_size = 16
    config.train.log_every = 1
    config.train.checkpoint_every = 5
    config.train.eval_every = 50
    config.train.sample_every = 400

    config.sample.num = 10
    config.sample.steps = 2
    config.sample.batch_size = 16
    config.evaluate.after_training = False
    return config
