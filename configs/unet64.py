"""A folder of images at 64x64, by a U-Net of four levels: 64 -> 32 -> 16 -> 8 with 64, 128, 256 and 512 channels.

    python main.py --config=configs/unet64.py --workdir=runs/mine --config.data.dir=FOLDER

FOLDER holds PNG, JPEG, WebP, BMP or GIF files; if each lies in a sub-folder, the sub-folders are the classes, and
labels and guidance work (without them, add --config.class_conditional=False --config.sample.guidance_scale=None
--config.evaluate.evaluators="('nearest_neighbour',)"). 63.2 M parameters, attention at 16 and 8: for an accelerator, in
bfloat16. Its parameter count and its steps are tested; it has not been trained to the end yet.
"""

from diffusion_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = 'folder'
    config.data.resolution = 64
    config.data.flip = True

    config.model.channels = 64
    config.model.channel_multipliers = (1, 2, 4, 8)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16, 8)
    config.model.head_channels = 64
    config.model.dropout = 0.1
    config.model.dtype = 'bfloat16'
    config.schedule.name = 'cosine'
    config.loss.prediction = 'v'
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 1e-4
    config.optimizer.weight_decay = 1e-2
    config.optimizer.warmup_steps = 1000
    config.optimizer.decay = 'cosine'
    config.ema_decay = 0.9999

    config.train.num_steps = 200_000
    config.train.batch_size = 64
    config.train.eval_every = 5000
    config.train.sample_every = 5000
    config.train.checkpoint_every = 5000

    config.sample.num = 64
    config.sample.guidance_scale = 2.0
    return config
