"""Networks whose reading of an image serves to compare images: features (the layer before the last) and logits."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from diffusion_jax.errors import UsageError
from diffusion_jax.evaluation.torch_file import read_torch_file
from diffusion_jax.images import to_float
from diffusion_jax.models import inception
from diffusion_jax.models.classifier import Classifier
from diffusion_jax.models.functional import Params, functional
from diffusion_jax.registry import lookup
from diffusion_jax.training.sharding import make_mesh, num_batch_shards, put, replicated, sharded_batch
from diffusion_jax.weights import check_shapes, load_weights, sha256_of

CLASSIFIER = 'classifier'
"""`kind` in the metadata of a classifier's weights file."""

SHIPPED = Path(__file__).parent.parent / 'shipped'

Apply = Callable[..., tuple[Any, Any]]
"""`apply(params, x)` -> (features [B, F], logits [B, K]), x float [B, H, W, C] in [-1, 1]."""


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """A network that reads images.

    Attributes:
      name: for reports.
      apply, params: the network.
      sha256: of its weights file.
      num_features: F.
      image_shape: (H, W, C) that it takes; None: any.
      class_names: of its logits; empty if they are not classes of ours.
      batch_size: images at a time.
    """

    name: str
    apply: Apply
    params: Params
    sha256: str
    num_features: int
    image_shape: tuple[int, int, int] | None
    class_names: tuple[str, ...]
    batch_size: int

    def __call__(
        self, images: UInt8[np.ndarray, 'N H W C'], mesh: Mesh | None = None
    ) -> tuple[Float[np.ndarray, 'N F'], Float[np.ndarray, 'N K']]:
        """(features, logits), computed over all devices of the mesh (of this process, by default)."""
        parts = list(in_batches(self.apply, self.params, images, mesh=mesh, batch_size=self.batch_size))
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def check(self, image_shape: Sequence[int]) -> None:
        """A `UsageError` unless it takes images of this shape."""
        if self.image_shape is not None and tuple(image_shape) != self.image_shape:
            raise UsageError(
                f'the feature network {self.name!r} reads images of {_times(self.image_shape)}, and these are '
                f"{_times(image_shape)}: take evaluate.features='inception' (any size), or a classifier trained on "
                'such images (experiments/classifiers/train.py --resolution=..).'
            )


def _times(shape: Sequence[int]) -> str:
    return 'x'.join(map(str, shape))


def check_num(what: str, have: int, need: int) -> None:
    """A `UsageError` unless there are as many as needed."""
    if have < need:
        raise UsageError(f'{have} {what} are too few: {need} are needed.')


@functools.partial(jax.jit, static_argnames=('apply',))
def _read(params: Params, images: jax.Array, *, apply: Apply):
    # Scores are held against those of other machines: accelerators would round to fewer bits.
    with jax.default_matmul_precision('highest'):
        return apply(params, to_float(images))


def in_batches(
    apply: Apply, params: Params, images: np.ndarray, *, mesh: Mesh | None = None, batch_size: int = 500
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(features, logits) of uint8 images, a batch at a time, each over all devices of the mesh."""
    mesh = mesh or make_mesh(devices=jax.local_devices())
    # Few sizes, so that few programs are compiled: full batches, or the next power of two.
    size = min(batch_size, 1 << max(0, len(images) - 1).bit_length())
    shards = num_batch_shards(mesh)
    size = -(-size // shards) * shards
    params = put(params, replicated(mesh))
    for start in range(0, len(images), size):
        rows = np.minimum(np.arange(start, start + size), len(images) - 1)
        features, logits = _read(params, put(images[rows], sharded_batch(mesh)), apply=apply)
        count = min(size, len(images) - start)
        yield np.asarray(features)[:count], np.asarray(logits)[:count]


# --- classifiers ------------------------------------------------------------------------------------------------------


def classifier_apply(architecture: dict[str, Any]) -> tuple[Callable[..., Params], Apply]:
    """(init, apply) of a `models.Classifier`: the same functions for the same arguments."""
    return _classifier_apply(json.dumps(architecture, sort_keys=True))


@functools.cache
def _classifier_apply(architecture: str) -> tuple[Callable[..., Params], Apply]:
    return functional(lambda rngs: Classifier(**json.loads(architecture), rngs=rngs))


@functools.cache
def load_classifier(path: Path, name: str) -> FeatureNetwork:
    """The classifier in a weights file that `experiments/classifiers/train.py` wrote.

    Raises:
      UsageError: there is no such file, or it is damaged or another's.
    """
    params, metadata = load_weights(path)
    if metadata.get('kind') != CLASSIFIER:
        raise UsageError(
            f'{path} holds no classifier (but {metadata.get("kind", "weights without a kind")!r}): '
            'experiments/classifiers/train.py trains one.'
        )
    init, apply = classifier_apply(metadata['architecture'])
    shapes = jax.eval_shape(init, jax.random.key(0))
    check_shapes(path, params, shapes)
    return FeatureNetwork(
        name=name,
        apply=apply,
        params=params,
        sha256=sha256_of(path),
        num_features=shapes['out']['kernel'].shape[0],
        image_shape=tuple(metadata['image_shape']),
        class_names=tuple(metadata['class_names']),
        batch_size=500,
    )


def _shipped(name: str, weights: str | None) -> FeatureNetwork:
    if weights:
        raise UsageError(f"evaluate.weights={weights!r} is for evaluate.features='inception' or 'classifier'.")
    return load_classifier(SHIPPED / f'{name}_classifier.safetensors', name)


def _needs_weights(name: str, weights: str | None, which: str) -> str:
    if not weights:
        raise UsageError(f'evaluate.features={name!r} needs evaluate.weights: {which}.')
    return weights


def _classifier(weights: str | None) -> FeatureNetwork:
    path = _needs_weights('classifier', weights, 'a file that experiments/classifiers/train.py wrote')
    return load_classifier(Path(path).expanduser(), 'classifier')


# --- Inception --------------------------------------------------------------------------------------------------------

INCEPTION_WEIGHTS = (
    'the file of the weights that FID uses, pt_inception-2015-12-05-6726825d.pth of pytorch-fid or '
    'weights-inception-2015-12-05-6726825d.pth of torch-fidelity'
)


@functools.cache
def _inception_apply(like_pytorch_fid: bool) -> tuple[Callable[..., Params], Apply]:
    init, apply = functional(lambda rngs: inception.Inception(rngs))

    def read(params: Params, x):
        return apply(params, inception.prepared(x, like_pytorch_fid))

    return init, read


@functools.cache
def load_inception(path: Path, like_pytorch_fid: bool = False) -> FeatureNetwork:
    """Inception-v3 with the weights in a PyTorch file.

    Args:
      like_pytorch_fid: resize as pytorch-fid does; by default as TensorFlow did and torch-fidelity does.

    Raises:
      UsageError: there is no such file, or it does not hold this network's weights.
    """
    tensors = read_torch_file(path)
    init, apply = _inception_apply(like_pytorch_fid)
    try:
        params = inception.params_of_state_dict(tensors)
    except (KeyError, ValueError, AttributeError) as error:
        raise UsageError(f'{path} does not hold Inception-v3 ({error!r}): it should be {INCEPTION_WEIGHTS}.') from error
    check_shapes(path, params, jax.eval_shape(init, jax.random.key(0)))
    return FeatureNetwork(
        name='inception_pytorch_fid' if like_pytorch_fid else 'inception',
        apply=apply,
        params=jax.tree.map(np.float32, params),
        sha256=sha256_of(path),
        num_features=inception.NUM_FEATURES,
        image_shape=None,
        class_names=(),
        batch_size=64,
    )


def _inception(weights: str | None, like_pytorch_fid: bool) -> FeatureNetwork:
    name = 'inception_pytorch_fid' if like_pytorch_fid else 'inception'
    return load_inception(Path(_needs_weights(name, weights, INCEPTION_WEIGHTS)).expanduser(), like_pytorch_fid)


FEATURES: dict[str, Callable[[str | None], FeatureNetwork]] = {
    'digits': functools.partial(_shipped, 'digits'),
    'fashion_mnist': functools.partial(_shipped, 'fashion_mnist'),
    'classifier': _classifier,
    'inception': functools.partial(_inception, like_pytorch_fid=False),
    'inception_pytorch_fid': functools.partial(_inception, like_pytorch_fid=True),
}
"""Name -> function of the weights' path. 'auto' takes the shipped classifier of these classes and this shape."""

SHIPPED_CLASSIFIERS = ('digits', 'fashion_mnist')


def shipped_classifier(class_names: Sequence[str], image_shape: Sequence[int]) -> FeatureNetwork | None:
    """The one of these classes and this shape, if there is one."""
    for name in SHIPPED_CLASSIFIERS:
        network = _shipped(name, None)
        if (network.class_names, network.image_shape) == (tuple(class_names), tuple(image_shape)):
            return network
    return None


def load_features(
    name: str, weights: str | None, class_names: Sequence[str], image_shape: Sequence[int]
) -> FeatureNetwork:
    """The feature network that a config's `evaluate` section names, for data of these classes and this shape.

    Raises:
      UsageError: there is none of that name, its weights cannot be read, or it does not take such images.
    """
    if name != 'auto':
        network = lookup('feature network', FEATURES, name)(weights)
        network.check(image_shape)
        return network
    if weights:
        raise UsageError(f"evaluate.weights={weights!r} needs evaluate.features: 'inception' or 'classifier'.")
    network = shipped_classifier(class_names, image_shape)
    if network is None:
        raise UsageError(
            f'no feature network is shipped for images of {_times(image_shape)} in '
            f'{len(class_names)} classes: set evaluate.features to inception (with evaluate.weights=FILE, the weights '
            'that FID uses) or to classifier (with evaluate.weights=FILE, from experiments/classifiers/train.py); or '
            "leave evaluators that need features out: evaluate.evaluators=('nearest_neighbour',)."
        )
    return network
