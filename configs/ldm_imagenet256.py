"""ImageNet at 256x256 in latents of 32x32x4, class-conditional, as Latent Diffusion's LDM-8: for accelerators.

    python main.py --config=configs/ldm_imagenet256.py --workdir=runs/ldm_imagenet256 --config.data.dir=FOLDER \
        --config.latents.autoencoder=VAE

FOLDER has a folder of images for each class. VAE is a vae/ in diffusers' layout, such as Stable Diffusion's, or an
autoencoder of your own. All images are encoded once: 21 GB of latents, 42 GB with mirrored ones.

Memory is in docs/latents.md, compiled for 8 devices. It was not trained here.
"""

from diffusion_jax.config import default_config


def get_config():
    config = default_config()
    config.data.name = 'folder'
    config.data.resolution = 256
    config.data.flip = True
    config.data.placement = 'stream'
    config.latents.autoencoder = 'stable-diffusion-v1-5/vae'

    config.model.channels = 256
    config.model.channel_multipliers = (1, 2, 4)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16, 8)
    config.model.dtype = 'bfloat16'
    config.schedule.name = 'scaled_linear'
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 5000
    config.ema_decay = 0.9999

    config.train.num_steps = 400_000
    config.train.batch_size = 512
    config.mesh.fsdp = -1
    config.mesh.data = 1

    config.sample.num = 50
    config.sample.solver = 'dpmpp_2m'
    config.sample.steps = 25
    config.sample.guidance_scale = 1.5
    config.evaluate.evaluators = ()
    return config
