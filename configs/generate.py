"""From texts to images, by a model that is there: nothing is trained.

    python main.py --mode=generate --prompt='a red heart' --config.init_from=MODEL

MODEL is a folder in diffusers' layout (Stable Diffusion 1, 2 or XL), a file of --mode=export or a run's folder; or one
.safetensors file of Stable Diffusion's original layout, with --config.text.tokenizer=FOLDER, which holds vocab.json and
merges.txt. Without --config this config is taken, and without --workdir the images go to runs/generated. What is None
below is what the model itself says: solver and grid of its scheduler_config.json.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from diffusion_jax.config import default_config


def get_config():
    config = default_config()
    config.model = ConfigDict({'name': placeholder(str)})
    config.sample.solver = placeholder(str)
    config.sample.spacing = placeholder(str)
    config.sample.final = placeholder(str)
    config.sample.steps = 25
    config.sample.guidance_scale = 7.5
    config.sample.batch_size = 4
    return config
