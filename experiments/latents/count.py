"""What latents save, counted: operations of one network on pixels, and on latents of an eighth of their side.

    python experiments/latents/count.py

The network is Stable Diffusion 1's U-Net (860 M parameters), once on R x R x 3 pixels and once on R/8 x R/8 x 4
latents; XLA counts the operations of its program, nothing runs. Attention's are counted by hand: over N positions
of C channels, 4 N^2 C for each self-attention. An image by 25 steps is 25 calls, and with latents a run of the decoder.
"""

import argparse

import jax
import jax.numpy as jnp

from diffusion_jax.models import AutoencoderKL, ConditionalUNet, functional

STEPS = 25
RESOLUTIONS = (64, 128, 256, 512, 1024)
CHANNELS, MULTIPLIERS, DEPTHS, BLOCKS = 320, (1, 2, 4, 4), (1, 1, 1, 0), 2


def flops_of(function, *shapes) -> float:
    return jax.jit(function).lower(*shapes).cost_analysis()['flops']


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def unet_flops(side: int, channels: int) -> float:
    init, apply = functional(lambda rngs: ConditionalUNet(resolution=side, image_channels=channels, rngs=rngs))
    params = jax.eval_shape(init, jax.random.key(0))

    def run(params, x, t, context):
        return apply(params, x, t, context=context)

    return flops_of(run, params, array(1, side, side, channels), array(1), array(1, 77, 768))


def decoder_flops(side: int) -> float:
    init, apply = functional(lambda rngs: AutoencoderKL(rngs=rngs))
    params = jax.eval_shape(init, jax.random.key(0))
    return flops_of(lambda params, z: apply(params, z, method='decode'), params, array(1, side // 8, side // 8, 4))


def attention_flops(side: int) -> float:
    """Of all self-attentions of the U-Net, their two products."""
    layers = [(level, depth * (2 * BLOCKS + 1)) for level, depth in enumerate(DEPTHS)]
    layers.append((len(DEPTHS) - 1, 1))  # the middle
    return sum(4.0 * (side >> level) ** 4 * CHANNELS * MULTIPLIERS[level] * count for level, count in layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    lines = [
        '| image | positions, pixels / latents | pixels: TFLOP a call (attention) | latents: TFLOP a call (attention) '
        '| fewer a call | decoder, TFLOP | fewer an image |',
        '|---|---|---|---|---|---|---|',
    ]
    for side in RESOLUTIONS:
        pixels, latents, decoder = unet_flops(side, 3), unet_flops(side // 8, 4), decoder_flops(side)
        shares = [attention_flops(of) / total for of, total in ((side, pixels), (side // 8, latents))]
        lines.append(
            f'| {side}x{side} | {side**2:,} / {(side // 8) ** 2:,} '
            f'| {pixels / 1e12:.3g} ({shares[0]:.0%}) | {latents / 1e12:.3g} ({shares[1]:.0%}) '
            f'| {pixels / latents:.3g} x | {decoder / 1e12:.3g} '
            f'| {STEPS * pixels / (STEPS * latents + decoder):.3g} x |'
        )
    print('\n'.join(lines))


if __name__ == '__main__':
    main()
