"""Text to image at the scale of Stable Diffusion 1: 512x512 in latents of 64x64x4, frozen CLIP, 860 M parameters.

    python main.py --config=configs/stable_diffusion.py --workdir=runs/stable_diffusion --config.data.dir=FOLDER \
        --config.latents.autoencoder=MODEL/vae --config.text.encoder=MODEL

FOLDER holds images and metadata.jsonl with a caption for each (docs/data.md). MODEL is a folder in diffusers' layout
with vae/, text_encoder/ and tokenizer/. Crops are random, so images are encoded as they come.

Memory is in docs/latents.md, compiled for 8 devices. It was not trained here.
"""

from diffusion_jax.config import default_config, model_section


def get_config():
    config = default_config()
    config.data.name = 'captioned_folder'
    config.data.resolution = 512
    config.data.placement = 'stream'
    config.data.crop = 'random'
    config.class_conditional = False
    config.latents.autoencoder = 'stable-diffusion-v1-5/vae'
    config.latents.cache = False
    config.text.encoder = 'stable-diffusion-v1-5'

    config.model = model_section('conditional_unet')
    config.model.dtype = 'bfloat16'
    config.model.remat = 'blocks'
    config.schedule.name = 'scaled_linear'
    config.optimizer.name = 'adamw'
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 10_000
    config.optimizer.weight_decay = 0.01
    config.ema_decay = 0.9999

    config.train.num_steps = 500_000
    config.train.batch_size = 64
    config.mesh.fsdp = -1
    config.mesh.data = 1

    config.sample.num = 16
    config.sample.solver = 'dpmpp_2m'
    config.sample.steps = 25
    config.sample.guidance_scale = 7.5
    config.sample.batch_size = 16
    config.evaluate.evaluators = ()
    return config
