"""Whole pipelines of DDPM and DiT from folders of diffusers', against diffusers' own samples."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.folders import read_folder, read_part, write_folder, write_part
from diffusion_jax.interop.load import load, pipeline_of

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'interop'
LABELS = [3, 998]  # as make_ddpm_and_dit.py has them
SETTINGS = {'steps': 10, 'batch_size': 8}


def opened(name):
    with jax.default_matmul_precision('highest'):
        folder = read_folder(FIXTURES / name)
        yield folder, pipeline_of(folder), np.load(FIXTURES / name / 'reference.npz')


@pytest.fixture(scope='module')
def ddpm():
    """(folder, pipeline, reference)."""
    yield from opened('ddpm')


@pytest.fixture(scope='module')
def dit():
    yield from opened('dit')


def samples(pipeline, reference, **settings):
    (batch,) = pipeline.batches(2, decode=False, noise=reference['noise'], **SETTINGS, **settings)
    return batch.images


def close(ours, theirs, tolerance=1e-4):
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() < tolerance * np.abs(theirs).max()


def test_images_of_ddpm_are_those_of_diffusers(ddpm):
    _, pipeline, reference = ddpm
    assert pipeline.image_shape == (16, 16, 3)
    assert close(samples(pipeline, reference, solver='ddim', clip=False), reference['ddim'])
    # The scheduler's config says that x0 is clipped.
    assert close(samples(pipeline, reference, solver='ddim'), reference['ddim_clipped'])


def test_ddpm_draws_by_its_own_scheduler(ddpm):
    _, pipeline, _ = ddpm
    plan = pipeline.plan(None, 10)
    assert plan.num_calls == 10
    images = pipeline(2, **SETTINGS).images
    assert images.shape == (2, 16, 16, 3)
    assert (images[0] != images[1]).any()


def test_a_ddim_pipeline_makes_its_scheduler_one_of_ddim(ddpm):
    folder, _, reference = ddpm
    index = {**folder.index, '_class_name': 'DDIMPipeline'}
    pipeline = pipeline_of(type(folder)(index, folder.parts, scheduler=folder.scheduler))
    assert close(samples(pipeline, reference), reference['ddim_clipped'])


@pytest.mark.parametrize(('name', 'scale'), [('plain', None), ('plain', 1.0), ('guided', 4.0)])
def test_latents_of_dit_are_those_of_diffusers(dit, name, scale):
    _, pipeline, reference = dit
    ours = samples(pipeline, reference, labels=LABELS, guidance_scale=scale)
    assert close(ours, reference[name])


def test_images_of_dit_are_those_of_diffusers(dit):
    _, pipeline, reference = dit
    drawn = pipeline(2, labels=LABELS, guidance_scale=4.0, noise=reference['noise'], **SETTINGS)
    assert drawn.images.shape == (2, 16, 16, 3)
    assert np.abs(drawn.images / 255 - reference['image']).max() < 0.5 / 255 + 1e-3
    np.testing.assert_array_equal(drawn.labels, LABELS)


def test_dit_knows_its_classes(dit):
    _, pipeline, _ = dit
    assert pipeline.num_classes == 1000
    assert [pipeline.class_names[label] for label in (2, 3, 998)] == ['2', 'shark, white shark', 'ear']
    assert pipeline.learned_variance
    with pytest.raises(UsageError, match='label'):
        pipeline(1, labels=[1000], steps=2)


def test_the_learned_variance_is_there_for_ddpm(dit):
    _, pipeline, _ = dit
    drawn = pipeline(2, labels=LABELS, solver='ddpm', variance='learned', **SETTINGS)
    assert drawn.images.shape == (2, 16, 16, 3)


@pytest.mark.parametrize('name', ['ddpm', 'dit'])
def test_what_was_read_is_written_back_equal(name, tmp_path):
    folder = read_folder(FIXTURES / name)
    write_folder(tmp_path / 'out', folder, shard_bytes=50_000)
    for part in folder.parts:
        source, written = FIXTURES / name / part, tmp_path / 'out' / part
        theirs = load_file(next(source.glob('*.safetensors')))
        ours = {key: value for path in written.glob('*.safetensors') for key, value in load_file(path).items()}
        assert ours.keys() == theirs.keys()
        assert all(ours[key].dtype == theirs[key].dtype == np.float16 for key in theirs)
        assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)
        assert json.loads((written / 'config.json').read_text()) == json.loads((source / 'config.json').read_text())
    again = read_folder(tmp_path / 'out')
    for part in folder.parts:
        jax.tree.map(np.testing.assert_array_equal, folder.parts[part].params, again.parts[part].params)
    assert again.scheduler == folder.scheduler
    assert again.index == folder.index


@pytest.mark.parametrize(('name', 'usual'), [('ddpm', 'unet'), ('dit', 'transformer')])
def test_a_part_alone_is_read_and_written(name, usual, tmp_path):
    part = read_part(FIXTURES / name / 'variant')
    write_part(tmp_path / usual, part)
    folder = read_folder(tmp_path / usual)
    assert list(folder.parts) == [usual]
    jax.tree.map(np.testing.assert_array_equal, part.params, folder.parts[usual].params)
    theirs, ours = (
        load_file(path / 'diffusion_pytorch_model.safetensors')
        for path in (FIXTURES / name / 'variant', tmp_path / usual)
    )
    assert ours.keys() == theirs.keys()
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize('index', [True, False])
def test_parts_may_lie_at_the_root(index, ddpm, tmp_path):
    """As in google/ddpm-cifar10-32."""
    model, source = tmp_path / 'model', FIXTURES / 'ddpm'
    shutil.copytree(source / 'unet', model)
    shutil.copyfile(source / 'scheduler' / 'scheduler_config.json', model / 'scheduler_config.json')
    if index:
        shutil.copyfile(source / 'model_index.json', model / 'model_index.json')
    folder, _, _ = ddpm
    found = read_folder(model)
    jax.tree.map(np.testing.assert_array_equal, found.parts['unet'].params, folder.parts['unet'].params)
    assert found.scheduler == folder.scheduler
    assert pipeline_of(found).image_shape == (16, 16, 3)


def test_a_dit_may_call_itself_by_its_old_name(dit, tmp_path):
    """As facebook/DiT-XL-2-256 does."""
    shutil.copytree(FIXTURES / 'dit', tmp_path / 'dit')
    edit(tmp_path / 'dit' / 'transformer' / 'config.json', _class_name='Transformer2DModel')
    edit(tmp_path / 'dit' / 'model_index.json', transformer=['diffusers', 'Transformer2DModel'])
    folder, _, _ = dit
    found = read_folder(tmp_path / 'dit').parts['transformer']
    jax.tree.map(np.testing.assert_array_equal, found.params, folder.parts['transformer'].params)


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    for name in ('ddpm', 'dit'):
        shutil.copytree(FIXTURES / name, tmp_path / name)
    unet = tmp_path / 'ddpm' / 'unet' / 'config.json'
    edit(unet, act_fn='mish')
    with pytest.raises(UsageError, match=r"unet/config\.json: .*act_fn='mish' is not supported"):
        load(tmp_path / 'ddpm')
    edit(unet, act_fn='silu', block_out_channels=[8, 8])
    with pytest.raises(UsageError, match='does not fit its config'):
        load(tmp_path / 'ddpm')
    with pytest.raises(UsageError, match=r'there is no scheduler_config\.json'):
        load(FIXTURES / 'ddpm' / 'variant')
    shutil.copyfile(
        FIXTURES / 'ddpm' / 'scheduler' / 'scheduler_config.json',
        shutil.copytree(FIXTURES / 'ddpm' / 'variant', tmp_path / 'alone') / 'scheduler_config.json',
    )
    with pytest.raises(UsageError, match='a UNet2DModel with labels is read, but has no pipeline'):
        load(tmp_path / 'alone')
    edit(tmp_path / 'dit' / 'transformer' / 'config.json', num_layers=3)
    with pytest.raises(UsageError, match=r'transformer_blocks\.2\.attn1\.to_k\.bias is missing'):
        load(tmp_path / 'dit')
    shutil.rmtree(tmp_path / 'dit' / 'transformer')
    with pytest.raises(UsageError, match='there is no file'):
        load(tmp_path / 'dit')
