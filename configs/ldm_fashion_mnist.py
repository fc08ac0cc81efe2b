"""Fashion-MNIST in the latents of its autoencoder, class-conditional: 7x7x4 instead of 28x28.

    python main.py --config=configs/fashion_mnist_autoencoder.py --workdir=runs/fashion_mnist_autoencoder
    python main.py --config=configs/fashion_mnist_autoencoder.py --workdir=runs/fashion_mnist_autoencoder --mode=export
    python main.py --config=configs/ldm_fashion_mnist.py --workdir=runs/ldm_fashion_mnist

0.93 M parameters. Not trained in full by this project yet: experiments/latents has this network after 300 and 600
steps, beside others on pixels.
"""

from diffusion_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = 'fashion_mnist'
    config.data.flip = True
    config.latents.autoencoder = 'runs/fashion_mnist_autoencoder/model.safetensors'

    config.model.channels = 40
    config.model.channel_multipliers = (2,)
    config.model.num_res_blocks = 1
    config.model.attention_resolutions = (7,)
    config.model.time_conditioning = 'scale_shift'
    config.schedule.name = 'cosine'
    config.loss.prediction = 'v'
    config.loss.time_sampler = 'stratified'
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay = 'cosine'
    config.ema_decay = 0.999

    config.train.num_steps = 6000
    config.train.batch_size = 64
    config.train.eval_every = 1000
    config.train.sample_every = 2000
    config.train.checkpoint_every = 1000

    config.sample.num = 100
    config.sample.steps = 25
    config.sample.guidance_scale = 1.5
    config.evaluate.evaluators = ('frechet_distance', 'class_agreement')
    config.evaluate.num = 2000
    return config
