"""diffusers in PyTorch, as its own examples train and sample an unconditional model; --compile: by torch.compile.

The network is that of `google/ddpm-cifar10-32`, of random weights; training adds what configs/cifar10.py has: mirrored
images, dropout, Adam, clipped gradients and an average of the parameters.
"""

import argparse
import contextlib
import functools
import time

import torch
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from serving import peak_host_bytes, serve, timed

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--compile', action='store_true')
    parser.add_argument('--channels-last', action='store_true')
    return parser.parse_args()


def wait():
    if DEVICE == 'cuda':
        torch.cuda.synchronize()


def autocast(dtype):
    return torch.autocast(DEVICE, torch.bfloat16) if dtype == 'bfloat16' else contextlib.nullcontext()


def network(dropout=0.1):
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=('DownBlock2D', 'AttnDownBlock2D', 'DownBlock2D', 'DownBlock2D'),
        up_block_types=('UpBlock2D', 'UpBlock2D', 'AttnUpBlock2D', 'UpBlock2D'),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        dropout=dropout,
    ).to(DEVICE)
    return unet.to(memory_format=torch.channels_last) if ARGUMENTS.channels_last else unet


def info(dtype='float32'):
    return {
        'name': 'diffusers + torch.compile' if ARGUMENTS.compile else 'diffusers',
        'version': f'torch {torch.__version__}',
        'device': torch.cuda.get_device_name() if DEVICE == 'cuda' else 'cpu',
        'parameters': sum(parameter.numel() for parameter in network().parameters()),
    }


@functools.cache
def trainer(batch, dtype):
    torch.manual_seed(0)
    unet = network()
    average = [parameter.detach().clone() for parameter in unet.parameters()]
    optimizer = torch.optim.Adam(unet.parameters(), lr=2e-4, fused=True)
    schedule = DDPMScheduler(num_train_timesteps=1000)
    images = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8)
    model = torch.compile(unet) if ARGUMENTS.compile else unet

    def run():
        x0 = images.to(DEVICE).float() / 127.5 - 1
        mirrored = torch.rand(batch, device=DEVICE) < 0.5
        x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (batch,), device=DEVICE)
        with autocast(dtype):
            eps = model(schedule.add_noise(x0, noise, t), t, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(eps.float(), noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list(unet.parameters()), 1e-4)
        wait()

    return run, timed(run)  # the first call compiles


def train(batch, dtype='float32'):
    run, first = trainer(batch, dtype)
    return {'seconds': timed(run), 'compile_s': first}


@functools.cache
def generator(batch, steps, dtype):
    torch.manual_seed(0)
    unet = network().eval()
    schedule = DDIMScheduler(num_train_timesteps=1000, clip_sample=True)
    model = torch.compile(unet) if ARGUMENTS.compile else unet

    @torch.inference_mode()
    def run():
        schedule.set_timesteps(steps)
        x = torch.randn(batch, 3, 32, 32, device=DEVICE)
        for t in schedule.timesteps:
            with autocast(dtype):
                eps = model(x, t, return_dict=False)[0]
            x = schedule.step(eps.float(), t, x).prev_sample
        wait()

    began = time.perf_counter()
    run()
    return run, time.perf_counter() - began


def sample(batch, steps, dtype='float32'):
    run, first = generator(batch, steps, dtype)
    return {'seconds': timed(run), 'compile_s': first}


def memory():
    return {
        'host_bytes': peak_host_bytes(),
        'device_bytes': torch.cuda.max_memory_allocated() if DEVICE == 'cuda' else None,
    }


if __name__ == '__main__':
    ARGUMENTS = arguments()
    serve({'info': info, 'train': train, 'sample': sample, 'memory': memory})
