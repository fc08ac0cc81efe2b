"""Data sets that TFDS prepared on the disk, read without TensorFlow."""

import os
from typing import Any

from diffusion_jax.errors import UsageError


def find(name: str, data_dir: str | None) -> Any | None:
    """TFDS's builder of the data set as it lies in `data_dir` or TFDS's default; None if it is not there.

    Raises:
        ImportError: TFDS is not installed.
    """
    import tensorflow_datasets as tfds

    # Not tfds.data_source: it takes the data set's code before its files, and where there are no files it says that the
    # data set is prepared in the wrong format.
    try:
        return tfds.core.read_only_builder.builder_from_files(
            name, data_dir=os.path.expanduser(data_dir) if data_dir else None
        )
    except tfds.core.DatasetNotFoundError:
        return None


def data_source(builder: Any, name: str, data_dir: str | None) -> dict[str, Any]:
    """The splits of a data set, each with random access to its records.

    Raises:
        UsageError: it was prepared in another format than ArrayRecord.
    """
    try:
        return builder.as_data_source()
    except NotImplementedError as error:
        raise UsageError(
            f'{builder.data_dir} is in a format that only TensorFlow reads. Remove it and prepare it again with '
            f'`{_build(name, data_dir)}`.'
        ) from error


def feature_source(directory: str, split: str, feature: str) -> Any:
    """Random access to the records of a split, of which no image but `feature` is decoded."""
    import tensorflow_datasets as tfds

    builder = tfds.core.read_only_builder.builder_from_directory(directory)
    others = [name for name, kind in builder.info.features.items() if isinstance(kind, tfds.features.Image)]
    decoders = {name: tfds.decode.SkipDecoding() for name in others if name != feature}
    return builder.as_data_source(split=split, decoders=decoders or None)


def not_found(name: str, places: list[str], data_dir: str | None, steps: str) -> UsageError:
    """The error for a data set that is neither in `places` nor where TFDS would have it, with the ways to get it."""
    tfds_dir = data_dir or os.environ.get('TFDS_DATA_DIR', '~/tensorflow_datasets')
    looked = '; '.join([*places, f'{tfds_dir} (prepared by TFDS)'])
    return UsageError(
        f'{name} was not found. Looked in: {looked}. Next step, one of: {steps}; or `{_build(name, data_dir)}`, '
        "which needs TensorFlow (`pip install 'diffusion_jax[tfds]'`)."
    )


def _build(name: str, data_dir: str | None) -> str:
    return f'tfds build {name} --file_format=array_record' + (f' --data_dir={data_dir}' if data_dir else '')
