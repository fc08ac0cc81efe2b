"""What a network works with that was trained elsewhere: an autoencoder, a tokenizer, a text encoder."""

import dataclasses
import functools
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion_jax.distributed import is_writer
from diffusion_jax.errors import UsageError
from diffusion_jax.experiment import DataInfo, Experiment, LatentInfo, TextInfo
from diffusion_jax.pipelines.autoencoders import load_autoencoder_file, write_autoencoder
from diffusion_jax.pipelines.clip_prompts import ClipPrompts, Encoder
from diffusion_jax.pipelines.images import ImagePipeline
from diffusion_jax.pipelines.latents import LatentSpace
from diffusion_jax.text import ClipTokenizer
from diffusion_jax.training.sharding import make_mesh

LOGGER = logging.getLogger(__name__)

KEPT = 'autoencoder.safetensors'
"""A run's own copy of its autoencoder, in its workdir."""

PROBE_SIDE = 4  # latents
PROBE_TOLERANCE = 0.02  # of the latents' deviation: above what a rounding to float16, or another device, does


@dataclasses.dataclass(frozen=True, eq=False)
class Parts:
    """What a config names besides its network; None where it names none.

    Attributes:
      latents, latent_info: the autoencoder, and what a run remembers of it.
      tokenizer: of texts.
      text_info: what texts become.
      text: the frozen encoder of texts.
    """

    latents: LatentSpace | None = None
    latent_info: LatentInfo | None = None
    tokenizer: ClipTokenizer | None = None
    text_info: TextInfo | None = None
    text: Encoder | None = None

    def of(self, info: DataInfo) -> DataInfo:
        """What a model knows of its data, with these parts."""
        if self.latent_info is not None:
            height, width, channels = info.image_shape
            factor, wanted = self.latent_info.factor, self.latents.image_channels
            if height % factor or width % factor or channels != wanted:
                raise UsageError(
                    f'images of {height}x{width}x{channels} do not fit the autoencoder, which takes {wanted} channels '
                    f'and sides that are multiples of {factor}: set data.resolution, or latents.autoencoder.'
                )
        return dataclasses.replace(info, latents=self.latent_info, text=self.text_info)


def read_parts(config: ConfigDict, info: DataInfo, mesh: Mesh | None = None, kept: str | Path | None = None) -> Parts:
    """The parts that a config names, placed on the mesh.

    Args:
      info: of the data, before a run, or as a run or a model's file remembers it: then the autoencoder must be of the
        latents that are remembered there.
      kept: an autoencoder that is preferred to the one that the config names, if there is such a file.

    Raises:
      UsageError: a part is missing, damaged, or another than the one that the model was trained with.
    """
    mesh = mesh or make_mesh()
    tokenizer, text_info, text = _read_text(config, mesh)
    latents = latent_info = None
    source = config.latents.autoencoder
    if kept is not None and info.latents is not None and Path(kept).is_file():
        source = kept
    if source:
        latents, latent_info = read_latent_space(source, mesh)
        if info.latents is not None:
            check_same_latents(info.latents, latent_info, source)
            latents = dataclasses.replace(latents, scale=info.latents.scale, shift=info.latents.shift)
            latent_info = info.latents
    elif info.latents is not None:
        raise UsageError('this model works in latents: say whose, as config.latents.autoencoder.')
    return Parts(latents, latent_info, tokenizer, text_info, text)


def _read_text(config: ConfigDict, mesh: Mesh) -> tuple[ClipTokenizer | None, TextInfo | None, Encoder | None]:
    section = config.text
    if section.length < 3:
        raise UsageError(f'text.length must be 3 or more (start, a token, end), got {section.length}.')
    if section.encoder:
        from diffusion_jax.interop.folders import read_part

        folder = Path(section.encoder).expanduser()
        tokenizer = ClipTokenizer.from_folder(folder / 'tokenizer')
        part = read_part(folder / 'text_encoder', kind='CLIPTextModel', mesh=mesh)
        length = min(section.length, part.options['length'])
        info = TextInfo(part.options['vocab_size'], length, part.options['features'])
        return tokenizer, info, Encoder(tokenizer, part.apply, part.params, length)
    if config.model.name != 'text_unet':
        return None, None, None
    small = section.tokenizer == 'small'
    tokenizer = ClipTokenizer.small() if small else ClipTokenizer.from_folder(section.tokenizer)
    return tokenizer, TextInfo(tokenizer.vocab_size, section.length), None


def pipeline_of(
    experiment: Experiment,
    params: Any,
    mesh: Mesh | None = None,
    parts: Parts | None = None,
    default_prompts: tuple[str, ...] = ('',),
) -> ImagePipeline:
    """An experiment's network with these parameters, ready to sample."""
    parts, info, prompts = parts or Parts(), experiment.data, None
    if info.text is not None:
        if parts.tokenizer is None:
            raise UsageError('this model takes text, and there is no tokenizer.')
        encoder = parts.text or Encoder(parts.tokenizer, experiment.encode_text, params, info.text.length)
        prompts = ClipPrompts((encoder,))
    if info.latents is not None and parts.latents is None:
        raise UsageError('this model works in latents, and there is no autoencoder.')
    return ImagePipeline(
        experiment.apply,
        params,
        experiment.schedule,
        experiment.prediction,
        info.image_shape,
        info.class_names if experiment.num_classes else (),
        mesh,
        experiment.learned_variance,
        latents=parts.latents,
        prompts=prompts,
        default_prompts=default_prompts,
    )


# --- autoencoders -----------------------------------------------------------------------------------------------------


def keep_autoencoder(config: ConfigDict, info: DataInfo, workdir: str | Path) -> None:
    """A run's own copy of the autoencoder that its config names, if it is one of ours: the run then stands alone.

    An autoencoder that is there already stays, if it is of the same latents.
    """
    source, target = config.latents.autoencoder, Path(workdir) / KEPT
    if not source or not is_writer() or target.exists():
        return
    source = Path(source).expanduser()
    if source.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix('.part')
        shutil.copyfile(source, part)
        part.replace(target)
    elif not _is_of_diffusers(source):
        write_autoencoder(source, target)


def _is_of_diffusers(folder: Path) -> bool:
    from diffusion_jax.interop.tensors import read_json

    path = folder / 'config.json'
    return path.is_file() and '_class_name' in read_json(path)


@functools.lru_cache(maxsize=2)
def _loaded(source: Path, changed: int, mesh: Mesh) -> tuple[LatentSpace, LatentInfo]:
    if source.is_dir() and _is_of_diffusers(source):
        from diffusion_jax.interop.folders import read_part
        from diffusion_jax.interop.load import latent_space

        space = latent_space(read_part(source, kind='AutoencoderKL', mesh=mesh))
    else:
        space = load_autoencoder_file(source, mesh)
    return space, LatentInfo(space.factor, space.channels, space.scale, space.shift, probe_of(space))


def read_latent_space(source: str | Path, mesh: Mesh | None = None) -> tuple[LatentSpace, LatentInfo]:
    """The latents of an autoencoder: a file of --mode=export, a run's folder, or a vae/ in diffusers' layout.

    Raises:
      UsageError: there is none, or it is damaged.
    """
    source = Path(source).expanduser()
    if not source.exists():
        raise UsageError(
            f'there is no autoencoder {source}. Train one (configs/*_autoencoder.py), write it with --mode=export, and '
            'name its file: --config.latents.autoencoder=RUN/model.safetensors'
        )
    # Once: another time its functions are the same, and what was compiled for them is found again.
    return _loaded(source.resolve(), source.stat().st_mtime_ns, mesh or make_mesh())


def probe_of(space: LatentSpace) -> tuple[float, ...]:
    """What an encoder makes of one fixed picture: its signature, which rounding its parameters changes little."""
    side = PROBE_SIDE * space.factor
    rows, columns = np.mgrid[:side, :side] / side
    picture = [np.sin(2 * np.pi * ((k + 1) * rows + (2 - k) * columns) + k) for k in range(space.image_channels)]
    images = np.stack(picture, axis=-1)[None].astype(np.float32)
    return tuple(round(float(value), 5) for value in np.asarray(jax.jit(space.encoder)(space.params, images).mean).flat)


def same_encoder(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Whether two probes are of one encoder, be it on other devices or in other precision."""
    a, b = np.array(ours), np.array(theirs)
    return a.shape == b.shape and bool(np.abs(a - b).max() <= PROBE_TOLERANCE * max(a.std(), 1e-6))


def check_same_latents(recorded: LatentInfo, found: LatentInfo, source: str | Path) -> None:
    """A `UsageError` if an autoencoder is of other latents. Its decoder may be another: that upgrades the images."""
    same = (recorded.factor, recorded.channels) == (found.factor, found.channels)
    if not same or not same_encoder(recorded.probe, found.probe):
        raise UsageError(
            f'{source} is not the autoencoder that this model was trained with: it encodes a test picture otherwise '
            f'({found.channels} channels at 1/{found.factor}, against {recorded.channels} at 1/{recorded.factor}). '
            'Name that one, or one with the same encoder: config.latents.autoencoder.'
        )
