"""An autoencoder of captioned pictures at 64x64, such as emoji: 64x64 pixels <-> 16x16 latents of 4 channels.

    python main.py --config=configs/emoji_autoencoder.py --workdir=runs/emoji_autoencoder
    python main.py --config=configs/emoji_autoencoder.py --workdir=runs/emoji_autoencoder --mode=export

data/emoji is what experiments/emoji/build.py writes. Any folder (--config.data.dir=FOLDER) will do that holds pictures
and metadata.jsonl, a line {"file_name": .., "text": ..} for each; the texts are not used here.
1.39 M parameters, L1 and a small KL. On two CPU cores it took 29 minutes; held-out emoji come back at 31.2 dB (PSNR).
On one H100, 16,000 steps of 32 took a minute and a half, after half a minute of compiling: 35.7 dB.
"""

from diffusion_jax.config import default_config, model_section


def get_config():
    config = default_config()
    config.task = 'autoencoder'
    config.data.name = 'captioned_folder'
    config.data.resolution = 64
    config.data.dir = 'data/emoji'

    config.model = model_section('autoencoder_kl')
    config.model.channels = 16
    config.model.channel_multipliers = (1, 2, 6)
    config.model.num_res_blocks = 1
    config.model.num_groups = 8
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.decay = 'cosine'
    config.ema_decay = 0.998

    config.train.num_steps = 4000
    config.train.batch_size = 16
    config.train.eval_every = 500
    config.train.sample_every = 1000
    config.train.checkpoint_every = 500

    config.sample.num = 50
    config.evaluate.evaluators = ('psnr',)
    config.evaluate.reference = 'test'
    config.evaluate.num = 1000
    return config
