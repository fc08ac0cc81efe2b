"""Long sampling jobs: kept batch by batch, and gone on with."""

import numpy as np
import pytest
from runs import load_config

from diffusion_jax import UsageError
from diffusion_jax.pipelines import load_pipeline
from diffusion_jax.pipelines.workdir import fingerprint, sample_as_configured, sample_in_parts


class Killed(Exception):
    pass


class KilledAfter:
    """A pipeline that is killed when it has drawn some batches."""

    def __init__(self, pipeline, batches):
        self._pipeline, self._left = pipeline, batches

    def batches(self, num, **settings):
        for batch in self._pipeline.batches(num, **settings):
            if not self._left:
                raise Killed
            self._left -= 1
            yield batch


@pytest.fixture(scope='module')
def pipeline(workdir):
    return load_pipeline(workdir)[0]


SECTION = load_config(sample__batch_size=8).sample


def test_a_killed_job_goes_on_to_the_same_samples(pipeline, tmp_path):
    whole = sample_as_configured(pipeline, SECTION, 30)
    parts = tmp_path / 'parts'
    with pytest.raises(Killed):
        sample_in_parts(KilledAfter(pipeline, 2), SECTION, 30, parts)
    assert sorted(path.name for path in parts.iterdir()) == ['00000000.npz', '00000008.npz']
    resumed = sample_in_parts(KilledAfter(pipeline, 2), SECTION, 30, parts)  # two more are enough
    np.testing.assert_array_equal(resumed.images, whole.images)
    np.testing.assert_array_equal(resumed.labels, whole.labels)
    again = sample_in_parts(KilledAfter(pipeline, 0), SECTION, 30, parts)  # all are there
    np.testing.assert_array_equal(again.images, whole.images)


def test_what_cannot_be_read_is_drawn_again(pipeline, tmp_path):
    whole = sample_in_parts(pipeline, SECTION, 24, tmp_path / 'parts')
    second = tmp_path / 'parts' / '00000008.npz'
    data = bytearray(second.read_bytes())
    for damage in (data[: len(data) // 2], b'', data[:200] + bytes([data[200] ^ 1]) + data[201:]):
        second.write_bytes(damage)
        again = sample_in_parts(KilledAfter(pipeline, 2), SECTION, 24, tmp_path / 'parts')
        np.testing.assert_array_equal(again.images, whole.images)


def test_a_single_batch_leaves_no_parts(pipeline, tmp_path):
    sample_in_parts(pipeline, SECTION, 8, tmp_path / 'parts')
    assert not (tmp_path / 'parts').exists()


def test_samples_from_the_middle_on_are_those_of_the_whole(pipeline):
    settings = {'labels': [1, 2, 3], 'steps': 2, 'batch_size': 8}
    whole = pipeline(21, **settings)
    rest = list(pipeline.batches(21, first=5, **settings))
    assert [len(batch.images) for batch in rest] == [8, 8]
    np.testing.assert_array_equal(np.concatenate([batch.images for batch in rest]), whole.images[5:])
    np.testing.assert_array_equal(np.concatenate([batch.labels for batch in rest]), whole.labels[5:])
    with pytest.raises(UsageError, match=r'first must be in 0\.\.20'):
        next(pipeline.batches(21, first=21))


def test_the_fingerprint_tells_what_a_sample_looks_like():
    same = load_config(sample__num=99, sample__batch_size=3).sample
    assert fingerprint(same) == fingerprint(load_config().sample)
    for other in ({'sample__seed': 1}, {'sample__steps': 7}, {'sample__guidance_scale': 3.0}, {'sample__ema': False}):
        assert fingerprint(load_config(**other).sample) != fingerprint(same)


def test_samples_of_a_file_are_not_gone_on_with_once_it_is_another(tmp_path):
    file = tmp_path / 'model.safetensors'
    file.write_bytes(b'one')
    before = fingerprint(SECTION, str(file))
    assert fingerprint(SECTION, str(file)) == before
    file.write_bytes(b'two')
    assert fingerprint(SECTION, str(file)) != before
