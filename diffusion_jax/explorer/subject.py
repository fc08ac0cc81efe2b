"""What the page looks into: a model, some real images, and how Python gets at both."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from ml_collections import ConfigDict

from diffusion_jax import data
from diffusion_jax.data.image_set import ImageSet
from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.features import FeatureNetwork, shipped_classifier
from diffusion_jax.pipelines.images import ImagePipeline
from diffusion_jax.pipelines.model_file import PREFIX, load_shipped, pretrained, shipped_models

DEFAULT = 'fashion_mnist'
NUM_IMAGES = 30
DRAWN_STEPS = 20


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images to choose from.

    Attributes:
      images: uint8 [N, H, W, C].
      labels: of them; None where there are none.
      call: Python that makes `images`, given `pipeline`.
      origin: what they are, in words.
    """

    images: UInt8[np.ndarray, 'N H W C']
    labels: Int[np.ndarray, 'N'] | None
    call: str
    origin: str


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model as the page has it.

    Attributes:
      pipeline: the model.
      name: for the reader.
      step: of its training; None where that is not known.
      call: Python that makes `pipeline`.
      read_images: reads the real images; None, or a `UsageError` in it, where there are none: then the model draws.
    """

    pipeline: ImagePipeline
    name: str
    step: int | None
    call: str
    read_images: Callable[[], Images] | None = None

    @functools.cached_property
    def images(self) -> Images:
        """Real ones where they are at hand, and else what the model draws."""
        if self.read_images is not None:
            try:
                return self.read_images()
            except UsageError:  # the run's data are on another machine
                pass
        return self._drawn()

    def _drawn(self) -> Images:
        num = self.pipeline.num_classes or 8
        samples = self.pipeline(num, steps=DRAWN_STEPS)
        call = f'images = pipeline({num}, steps={DRAWN_STEPS}).images'
        return Images(samples.images, samples.labels, call, 'drawn by the model: no real images are at hand')

    @functools.cached_property
    def classifier(self) -> FeatureNetwork | None:
        """The shipped one of these classes and this shape, if there is one."""
        return shipped_classifier(self.pipeline.class_names, self.pipeline.image_shape)


def of_set(images: ImageSet, call: str, origin: str) -> Images:
    return Images(images.images, images.labels, call, origin)


def shipped(name: str = DEFAULT) -> Subject:
    """A model that ships, with examples of its data set."""
    pipeline = pretrained(name)
    *_, step = load_shipped(name)  # read once

    def read() -> Images:
        return of_set(data.examples(name), f'images = dj.data.examples({name!r}).images', f'{name}, test set')

    return Subject(pipeline, name, step, f'pipeline = dj.pretrained({name!r})', read)


def given(pipeline: ImagePipeline, name: str = 'your model', images: np.ndarray | None = None) -> Subject:
    """A pipeline that is there already, and uint8 images [N, H, W, C] of its shape, if there are any."""
    read = None
    if images is not None:
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != pipeline.image_shape or not len(images):
            raise UsageError(
                f'images must be uint8 of shape {("N", *pipeline.image_shape)}, got {images.dtype} {images.shape}.'
            )

        def read() -> Images:
            return Images(images[:NUM_IMAGES], None, 'images = ...  # those that you gave', 'given')

    return Subject(pipeline, name, None, 'pipeline = ...  # the one that you gave', read)


def of_config(config: ConfigDict, workdir: str | Path) -> Subject:
    """What a command names: its workdir's run, or `config.init_from`.

    Raises:
      UsageError: there is neither, it is damaged, or of another config.
    """
    from diffusion_jax.experiment import load_data, read_record
    from diffusion_jax.pipelines.workdir import load_pipeline_for
    from diffusion_jax.training.sharding import make_mesh

    source = config.init_from or ''
    has_run = read_record(workdir) is not None
    if not has_run and source.removeprefix(PREFIX) in shipped_models() and source.startswith(PREFIX):
        return shipped(source.removeprefix(PREFIX))
    pipeline, step = load_pipeline_for(config, workdir, make_mesh(config.mesh))
    if has_run:
        call = f'pipeline, step = dj.pipelines.load_pipeline({str(workdir)!r})'
        if config.sample.checkpoint != 'newest' or not config.sample.ema:
            call = f'{call[:-1]}, {config.sample.checkpoint!r}, ema={config.sample.ema})'
        name = str(workdir)
    elif (Path(source) / 'model_index.json').is_file():
        call, name = f'from diffusion_jax.interop.load import load\npipeline = load({source!r})', source
    elif Path(source).is_dir():
        call, name = f'pipeline, step = dj.pipelines.load_pipeline({source!r})', source
    else:
        call, name = f'pipeline = dj.pretrained({source!r})', source

    def read() -> Images:
        test = load_data(config).test
        some = test.load(np.arange(min(NUM_IMAGES, len(test))))
        if some.image_shape != pipeline.image_shape:
            raise UsageError('the data are of another shape than the model.')
        options = {
            'data_dir': config.data.dir,
            'resolution': config.data.resolution,
            'tfds_name': config.data.tfds_name,
        }
        said = ''.join(f', {key}={value!r}' for key, value in options.items() if value is not None)
        call = f'images = dj.data.load({config.data.name!r}{said}).test.load(np.arange({len(some)})).images'
        return of_set(some, call, f'{config.data.name}, test set')

    return Subject(pipeline, name, step, call, read)


def broken(error: Exception) -> str:
    """What the page says of a model that cannot be read."""
    return str(error) if isinstance(error, UsageError) else f'the model cannot be read: {type(error).__name__}: {error}'


def settings_of(subject: Subject) -> dict[str, Any]:
    """What the page must know to adapt to a model."""
    pipeline = subject.pipeline
    return {
        'labels': bool(pipeline.num_classes),
        'text': pipeline.prompts is not None,
        'latents': pipeline.latents is not None,
        'guided': bool(pipeline.num_classes) or pipeline.prompts is not None,
    }
