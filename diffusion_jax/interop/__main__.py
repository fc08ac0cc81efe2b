"""Checkpoints of others from the command line: looked into, read into diffusers' layout, and ours written in it."""

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion_jax.errors import UsageError

EXAMPLES = """examples:
  python -m diffusion_jax.interop inspect stable-diffusion-v1-5
  python -m diffusion_jax.interop inspect model.safetensors
  python -m diffusion_jax.interop import model.safetensors sd --tokenizer stable-diffusion-v1-5/tokenizer
  python -m diffusion_jax.interop import stable-diffusion-v1-5 styled --lora style.safetensors:0.8
  python -m diffusion_jax.interop import stable-diffusion-v1-5 model.safetensors
  python -m diffusion_jax.interop export runs/emoji emoji_for_diffusers
"""


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python -m diffusion_jax.interop',
        description="Checkpoints of PyTorch's models: Stable Diffusion 1, 2 and XL, DDPM, DiT and their parts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest='command', required=True, metavar='inspect|import|export')
    inspect = commands.add_parser('inspect', help='what a folder or file holds; no weights are read')
    inspect.add_argument('source', help="a folder in diffusers' layout, a part of one, or a .safetensors file")
    inspect.add_argument('--tensors', action='store_true', help='name, shape and type of every tensor')
    read = commands.add_parser('import', help='reads a model and writes it in one of the two layouts')
    read.add_argument('source', help="a folder in diffusers' layout, or one .safetensors file of the original layout")
    read.add_argument('target', help="a new folder (diffusers' layout), or a new .safetensors file (the original one)")
    read.add_argument('--variant', help='of the weights in a folder: fp16, ema, ..')
    read.add_argument('--ema', action='store_true', help='the averaged weights of the U-Net, where there are such')
    read.add_argument(
        '--lora', action='append', default=[], metavar='FILE[:SCALE]', help='low-rank changes to add; may be repeated'
    )
    read.add_argument('--like', help='of one file: a folder whose configs, scheduler and tokenizers it has')
    read.add_argument('--tokenizer', help='of one file: a folder with vocab.json and merges.txt of CLIP')
    read.add_argument('--prediction', choices=['eps', 'v'], help='of one file: what a Stable Diffusion 2 predicts')
    read.add_argument('--latent-scale', type=float, help='of one file with an autoencoder alone')
    write = commands.add_parser('export', help="writes a model that was trained here in diffusers' layout")
    write.add_argument('source', help='the folder of a run, or a file of --mode=export')
    write.add_argument('target', help='a new folder, or a new .safetensors file (of a Stable Diffusion)')
    write.add_argument('--no-ema', action='store_true', help="a run's last parameters, not their average")
    return parser


def lora_of(text: str) -> tuple[str, float]:
    """('file', 0.8) of 'file:0.8'; a scale of 1 where there is none."""
    path, separator, scale = text.rpartition(':')
    if not separator or Path(text).exists():
        return text, 1.0
    try:
        value = float(scale)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(
            f'--lora={text}: {scale!r} is no scale. It is FILE or FILE:SCALE, such as style.safetensors:0.8'
        )
    return path, value


def _millions(count: int) -> str:
    return f'{count / 1e6:,.1f} M' if count >= 1e5 else f'{count:,}'


def _sum(tensors: Any, names: list[str]) -> str:
    count = sum(math.prod(tensors.shape(name)) for name in names)
    types = Counter(tensors.dtype(name) for name in names)
    told = ', '.join(f'{number} x {kind}' if len(types) > 1 else kind for kind, number in types.most_common())
    return f'{_millions(count)} parameters in {len(names)} tensors of {told}'


def _list(tensors: Any, prefix: str = '') -> list[str]:
    return [f'    {prefix}{name}  {list(tensors.shape(name))}  {tensors.dtype(name)}' for name in sorted(tensors)]


def _scheduler_lines(config: Mapping[str, Any]) -> list[str]:
    from diffusion_jax.interop import schedulers

    sampling = schedulers.sampling_of(config)
    given = ', '.join(f'{key}={value}' for key, value in schedulers.schedule_options(config).items())
    return [
        f'scheduler: {config["_class_name"]}',
        f'    solver {sampling.solver}, spacing {sampling.spacing}, predicts {schedulers.prediction_of(config)}',
        f'    schedule {given}',
    ]


def _inspect_folder(path: Path, tensors_too: bool) -> list[str]:
    from diffusion_jax.interop import folders
    from diffusion_jax.interop.tensors import TensorFiles, find_weights, read_json

    index = read_json(path / 'model_index.json') if (path / 'model_index.json').exists() else None
    lines = [f'{path}: {index.get("_class_name", "a model") if index else "a part"} in the layout of diffusers']
    names = ['.'] if index is None else [name for name, value in index.items() if isinstance(value, list)]
    for name in names:
        folder = path / name
        if Path(name).name != name and name != '.':
            raise UsageError(f'{path / "model_index.json"} is damaged: it names a part {name!r}.')
        if name in folders.LEFT_OUT:
            if index[name] != [None, None]:
                lines.append(f'{name}: left out, for it has no part in making images')
        elif name == 'scheduler':
            file = path / 'scheduler' / 'scheduler_config.json'
            lines += _scheduler_lines(read_json(file if file.exists() else path / 'scheduler_config.json'))
        elif name.startswith('tokenizer'):
            lines.append(f'{name}: {", ".join(sorted(file.name for file in folder.iterdir())) or "empty"}')
        elif index is None or index[name] != [None, None]:
            config = read_json(folder / 'config.json')
            kind = folders.kind_of(config) if index is None else index[name][1]
            if kind not in folders.KINDS:
                lines.append(f'{name}: {kind}, which is not read')
                continue
            stem = folders.KINDS[kind].stem
            tensors = TensorFiles(find_weights(folder, stem))
            lines.append(f'{kind if name == "." else f"{name}: {kind}"}, {_sum(tensors, list(tensors))}')
            lines += _list(tensors) if tensors_too else []
    if index is None and (path / 'scheduler_config.json').exists():
        lines += _scheduler_lines(read_json(path / 'scheduler_config.json'))
    return lines


def _inspect_file(path: Path, tensors_too: bool) -> list[str]:
    from diffusion_jax.interop.lora import read_lora
    from diffusion_jax.interop.single_file import contents_of, unused_names
    from diffusion_jax.interop.tensors import TensorFiles

    tensors = TensorFiles([path])
    listed = _list(tensors) if tensors_too else []
    if 'kind' in tensors.metadata and 'config' in tensors.metadata:
        kind = json.loads(tensors.metadata['kind'])
        return [f'{path}: a model of this package ({kind})', _sum(tensors, list(tensors)), *listed]
    if any('lora' in name for name in tensors):
        lines = [f'{path}: a LoRA']
        for part, changes in read_lora(path).items():
            ranks = sorted({len(change.down) for change in changes.values()})
            lines.append(f'{part}: changes {len(changes)} weights, of rank {", ".join(map(str, ranks))}')
        return lines + listed
    found = contents_of(tensors, tensors.metadata)
    what = 'an autoencoder' if found.version is None else f'Stable Diffusion {found.version}'
    lines = [f'{path}: {what} in one file of the original layout']
    for part, prefix in found.prefixes.items():
        names = [name for name in tensors if name.startswith(prefix)]
        lines.append(f'{part} ({prefix}*): {_sum(tensors, names)}')
    if found.averaged:
        lines.append('unet, averaged (model_ema.*): read with --ema')
    if found.version is not None:
        lines.append(f'predicts {found.prediction or "eps or v: it does not say (--prediction)"}')
        lines.append('no tokenizer and no scheduler: --tokenizer or --like names the former')
    unused = unused_names(tensors)
    lines += [f'no weights, left out: {", ".join(unused[:8])}{" .." if len(unused) > 8 else ""}'] if unused else []
    return lines + listed


def inspect(source: str | Path, tensors_too: bool = False) -> list[str]:
    """Lines on what a folder or a file holds, from its configs and headers alone.

    Raises:
      UsageError: there is none, or it is damaged, or of a kind that we do not read.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _inspect_folder(path, tensors_too)
    if path.suffix != '.safetensors':
        raise UsageError(f'{path} is neither a folder nor a .safetensors file. Pickled files are never opened.')
    return _inspect_file(path, tensors_too)


def _write(target: str, folder: Any) -> str:
    from diffusion_jax.interop.folders import write_folder
    from diffusion_jax.interop.single_file import write_single_file

    if target.endswith('.safetensors'):
        write_single_file(target, folder)
    else:
        write_folder(target, folder)
    return f'{target}: {", ".join(folder.parts)}'


def run(arguments: argparse.Namespace) -> list[str]:
    """What a command has to say when it is done."""
    if arguments.command == 'inspect':
        return inspect(arguments.source, arguments.tensors)
    from diffusion_jax.interop.folders import check_new

    check_new(Path(arguments.target).expanduser())  # before what takes minutes is read
    if arguments.command == 'import':
        from diffusion_jax.interop.load import read_model

        folder = read_model(
            arguments.source,
            variant=arguments.variant,
            ema=arguments.ema,
            loras=[lora_of(text) for text in arguments.lora],
            like=arguments.like,
            tokenizer=arguments.tokenizer,
            prediction=arguments.prediction,
            latent_scale=arguments.latent_scale,
        )
        return [f'wrote {_write(arguments.target, folder)}']
    from diffusion_jax.interop.export import folder_of

    return [f'wrote {_write(arguments.target, folder_of(arguments.source, ema=not arguments.no_ema))}']


def main(argv: list[str] | None = None) -> int:
    arguments = _options().parse_args(argv)
    try:
        print('\n'.join(run(arguments)))
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 0
    return 0


if __name__ == '__main__':
    sys.exit(main())
