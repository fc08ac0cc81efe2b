"""Stable Diffusion 1.5 at its full size on this machine, beside diffusers: read, written back, one 512 x 512 image.

    python -m venv ENV && ENV/bin/pip install torch diffusers transformers open-clip-torch
    python experiments/stable_diffusion/run.py --torch-python=ENV/bin/python --folder=/somewhere/with/10/GB

The published weights are not at hand here, so diffusers writes a folder of the same configuration with random ones:
860 M parameters in the U-Net, 123 M in the text encoder, 84 M in the autoencoder, 4.3 GB in float32; scaled so that
time and text move the output. Each part runs in a process of its own, whose peak of memory it then says:

  make       diffusers: writes the folder (once; what is there already is kept)
  diffusers  diffusers: reads it, and draws one image from the given noise
  ours       this package: the same, with neither torch nor diffusers
  export     this package: reads it, writes it anew, and compares every tensor to the last bit

Writes results.json; in it, how far our latents and image are from diffusers', in parts of the largest value.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
PROMPT, NEGATIVE, GUIDANCE = 'a red heart on a white wall', 'blurry', 7.5


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Clock:
    """Seconds since the last reading."""

    def __init__(self):
        self.began = time.perf_counter()

    def __call__(self) -> float:
        now = time.perf_counter()
        seconds, self.began = now - self.began, now
        return round(seconds, 1)


def make(options: argparse.Namespace) -> dict:
    import gzip
    import importlib.util

    import diffusers
    import numpy as np
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    package = Path(importlib.util.find_spec('open_clip').origin).parent
    lines = gzip.decompress((package / 'bpe_simple_vocab_16e6.txt.gz').read_bytes()).decode().split('\n')
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    symbols = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(rest))]
    tokens = symbols + [symbol + '</w>' for symbol in symbols] + [''.join(pair) for pair in merges]
    tokens += ['<|startoftext|>', '<|endoftext|>']
    vocabulary = {token: number for number, token in enumerate(tokens)}
    assert len(vocabulary) == 49408
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=(320, 640, 1280, 1280)
    )
    vae = diffusers.AutoencoderKL(
        sample_size=512,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        down_block_types=('DownEncoderBlock2D',) * 4,
        up_block_types=('UpDecoderBlock2D',) * 4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
            bos_token_id=49406,
            eos_token_id=49407,
        )
    )
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1 and 'norm' not in name:
                parameter.mul_(1.3)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=text,
        tokenizer=CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77),
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule='scaled_linear',
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(options.folder / 'model')
    noise = np.random.default_rng(0).normal(size=(1, 64, 64, 4)).astype(np.float32)
    np.save(options.folder / 'noise.npy', noise)
    return {'unet_parameters': sum(parameter.numel() for parameter in unet.parameters())}


def diffusers(options: argparse.Namespace) -> dict:
    import diffusers
    import numpy as np
    import torch

    clock = Clock()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(options.folder / 'model')
    pipeline.set_progress_bar_config(disable=True)
    told = {'version': f'diffusers {diffusers.__version__}, torch {torch.__version__}', 'read_s': clock()}
    noise = torch.from_numpy(np.load(options.folder / 'noise.npy').transpose(0, 3, 1, 2))
    settings = {'negative_prompt': NEGATIVE, 'num_inference_steps': options.steps, 'guidance_scale': GUIDANCE}
    with torch.no_grad():
        latents = pipeline(PROMPT, latents=noise, output_type='latent', **settings).images
        told['latents_s'] = clock()
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
        told['decode_s'] = clock()
    np.save(options.folder / 'diffusers.npy', latents.numpy().transpose(0, 2, 3, 1))
    np.save(options.folder / 'diffusers_image.npy', image.numpy().transpose(0, 2, 3, 1))
    return told


def ours(options: argparse.Namespace) -> dict:
    import jax
    import numpy as np

    from diffusion_jax.images import save_png, to_uint8
    from diffusion_jax.interop.load import load

    clock = Clock()
    pipeline = load(options.folder / 'model')
    told = {'version': f'jax {jax.__version__}', 'read_s': clock()}
    noise = np.load(options.folder / 'noise.npy')
    settings = {'prompts': PROMPT, 'negative_prompt': NEGATIVE, 'guidance_scale': GUIDANCE, 'steps': options.steps}
    for name in ('first_latents_s', 'latents_s'):  # compiling, and once more
        latents = next(pipeline.batches(1, noise=noise, decode=False, **settings)).images
        told[name] = clock()
    image = np.asarray(pipeline.latents.decode(latents))
    told['first_decode_s'] = clock()
    pipeline.latents.decode(latents).block_until_ready()
    told['decode_s'] = clock()
    save_png(options.folder / 'ours.png', np.asarray(to_uint8(image))[0])
    theirs, theirs_image = (np.load(options.folder / f'diffusers{name}.npy') for name in ('', '_image'))
    told['latents_difference'] = float(np.abs(latents - theirs).max() / np.abs(theirs).max())
    told['image_difference'] = float(np.abs(image - theirs_image).max() / np.abs(theirs_image).max())
    return told


def export(options: argparse.Namespace) -> dict:
    import shutil

    import numpy as np
    from safetensors import safe_open

    from diffusion_jax.interop.folders import read_folder, write_folder

    target = options.folder / 'written'
    shutil.rmtree(target, ignore_errors=True)
    clock = Clock()
    folder = read_folder(options.folder / 'model')
    told = {'read_s': clock()}
    write_folder(target, folder)
    told |= {'write_s': clock(), 'tensors': 0, 'bytes': 0}
    # Before the comparison, which reads both.
    told['peak_gib'] = round(peak_gib(), 1)
    for path in sorted((options.folder / 'model').rglob('*.safetensors')):
        with safe_open(path, 'np') as a, safe_open(target / path.relative_to(options.folder / 'model'), 'np') as b:
            assert set(a.keys()) == set(b.keys())
            for name in a.keys():  # noqa: SIM118  (it is no dict)
                one, other = a.get_tensor(name), b.get_tensor(name)
                assert one.dtype == other.dtype, name
                np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8), err_msg=name)
                told['tensors'] += 1
                told['bytes'] += one.nbytes
    shutil.rmtree(target)
    return told


PARTS = {'make': make, 'diffusers': diffusers, 'ours': ours, 'export': export}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--folder', required=True, type=Path, help='where the model is written: 10 GB')
    parser.add_argument('--torch-python', help='Python with torch, diffusers, transformers and open-clip-torch')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    parser.add_argument('--part', choices=PARTS, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.part:
        told = PARTS[options.part](options)
        print(json.dumps({'peak_gib': round(peak_gib(), 1)} | told))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    path = HERE / 'results.json'
    results = json.loads(path.read_text()) if path.exists() else {}
    for part in options.parts:
        if part == 'make' and (options.folder / 'noise.npy').exists():
            continue
        python = options.torch_python if part in ('make', 'diffusers') else sys.executable
        if python is None:
            sys.exit(f'error: {part} needs --torch-python.')
        command = [python, __file__, '--part', part, '--folder', str(options.folder), '--steps', str(options.steps)]
        print(f'{part} ..', file=sys.stderr)
        said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results[part] = json.loads(said.strip().splitlines()[-1])
        print(f'{part}: {results[part]}', file=sys.stderr)
        path.write_text(json.dumps(results, indent=2) + '\n')


if __name__ == '__main__':
    main()
