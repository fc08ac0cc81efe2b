"""Whole pipelines of Stable Diffusion 1, 2 and XL from folders of diffusers', against diffusers' own latents."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.folders import read_folder, read_part, write_folder, write_part
from diffusion_jax.interop.load import load, pipeline_of

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'interop'
FAMILIES = ('sd1', 'sd2', 'sdxl')
SOLVERS = {'ddim': 'ddim', 'pndm': 'plms', 'euler': 'euler', 'unipc': 'unipc', 'dpmpp_2m': 'dpmpp_2m'}
# As make_stable_diffusion.py has them.
PROMPTS = ['a red heart', 'the cat!  and the hat, with 3 more words than it can possibly hold in its few places']
NEGATIVE = ['blurry', '']
SETTINGS = {'prompts': PROMPTS, 'negative_prompt': NEGATIVE, 'guidance_scale': 7.5, 'steps': 10, 'batch_size': 8}


@pytest.fixture(scope='module', params=FAMILIES)
def loaded(request):
    """(family, folder, pipeline, reference)."""
    with jax.default_matmul_precision('highest'):
        folder = read_folder(FIXTURES / request.param)
        yield request.param, folder, pipeline_of(folder), np.load(FIXTURES / request.param / 'reference.npz')


def latents_of(pipeline, reference, **settings):
    (batch,) = pipeline.batches(2, decode=False, noise=reference['noise'], **{**SETTINGS, **settings})
    return batch.images


@pytest.mark.parametrize(
    'name', [name if name in ('pndm', 'dpmpp_2m') else pytest.param(name, marks=pytest.mark.slow) for name in SOLVERS]
)
def test_the_latents_are_those_of_diffusers(loaded, name):
    _, _, pipeline, reference = loaded
    theirs = reference[f'{name}/latents'] * 1.0
    if theirs.shape[1] == 4:
        theirs = theirs.transpose(0, 2, 3, 1)
    ours = latents_of(pipeline, reference, solver=SOLVERS[name])
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_the_folders_own_scheduler_is_the_default_and_the_images_are_those_of_diffusers(loaded):
    _, _, pipeline, reference = loaded
    images = pipeline(2, noise=reference['noise'], **SETTINGS).images
    assert images.shape == (2, 32, 32, 3)
    assert np.abs(images / 255 - reference['image']).max() < 0.5 / 255 + 1e-3


def test_what_the_texts_become_is_what_transformers_gives(loaded):
    family, folder, _, reference = loaded
    for name in ('text', 'text_2') if family == 'sdxl' else ('text',):
        part = folder.parts[name.replace('text', 'text_encoder')]
        ids = folder.tokenizers[name.replace('text', 'tokenizer')](PROMPTS)
        np.testing.assert_array_equal(ids, reference[f'{name}/ids'])
        out = part.apply(part.params, ids)
        for ours, theirs in (
            (np.stack(out.hidden), reference[f'{name}/hidden'].transpose(0, 3, 1, 2)),
            (out.last, reference[f'{name}/last']),
            (out.pooled, reference[f'{name}/pooled']),
        ):
            # transformers has the final norm's output in the place of the last hidden state, of late.
            count = min(len(ours), len(theirs)) - (theirs.ndim == 4)
            assert np.abs(ours[:count] - theirs[:count]).max() < 2e-5 * np.abs(theirs).max()


def test_no_negative_prompt_is_zeros_in_xl_and_an_empty_one_is_not():
    with jax.default_matmul_precision('highest'):
        pipeline, reference = load(FIXTURES / 'sdxl'), np.load(FIXTURES / 'sdxl' / 'reference.npz')
        theirs = reference['no_negative/latents']
        theirs = theirs.transpose(0, 2, 3, 1) if theirs.shape[1] == 4 else theirs
        none = latents_of(pipeline, reference, negative_prompt=None)
        empty = latents_of(pipeline, reference, negative_prompt='')
    assert np.abs(none - theirs).max() < 1e-4 * np.abs(theirs).max()
    assert np.abs(empty - theirs).max() > 1e-2 * np.abs(theirs).max()


def test_what_was_read_is_written_back_equal(loaded, tmp_path):
    family, folder, _, _ = loaded
    write_folder(tmp_path / 'out', folder, shard_bytes=100_000)
    for name, part in folder.parts.items():
        source, written = FIXTURES / family / name, tmp_path / 'out' / name
        theirs = load_file(next(source.glob('*.safetensors')))
        shards = [load_file(path) for path in written.glob('*.safetensors')]
        ours = {key: value for shard in shards for key, value in shard.items()}
        assert ours.keys() == theirs.keys()
        assert all(ours[key].tobytes() == theirs[key].tobytes() for key in theirs)
        assert ours['conv_in.weight' if 'conv_in.weight' in ours else next(iter(ours))].dtype == np.float16
        assert json.loads((written / 'config.json').read_text()) == json.loads((source / 'config.json').read_text())
        assert part.config
    again = read_folder(tmp_path / 'out')
    for name, part in folder.parts.items():
        jax.tree.map(np.testing.assert_array_equal, part.params, again.parts[name].params)
    assert again.scheduler == folder.scheduler
    with pytest.raises(UsageError, match='is not empty: nothing was written'):
        write_folder(tmp_path / 'out', folder)


def test_prompts_of_every_kind_are_read(caplog):
    pipeline = load(FIXTURES / 'sd1')
    strange = ['', 'x' * 10_000, '😀🎉', '中文', '\x00\x07\x1b', '   ', '\ud800', '<|endoftext|>']
    drawn = pipeline(8, prompts=strange, steps=2, batch_size=8)
    assert drawn.images.shape == (8, 32, 32, 3)
    assert any('Cut off was' in record.message for record in caplog.records)
    with pytest.raises(UsageError, match='a prompt must be text, got 3'):
        pipeline(1, prompts=[3], steps=2)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(FIXTURES / 'sd1', tmp_path / 'model')
    return tmp_path / 'model'


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_wrong_with_a_folder_is_said(copy):
    with pytest.raises(UsageError, match='there is no folder'):
        load(copy / 'nothing')
    with pytest.raises(UsageError, match='neither model_index'):
        load(copy / 'tokenizer')
    with pytest.raises(UsageError, match='there is no denoiser'):
        load(copy / 'vae')

    edit(copy / 'unet' / 'config.json', freq_shift=1)
    with pytest.raises(UsageError, match=r'unet/config\.json: .*freq_shift=1 is not supported'):
        load(copy)
    edit(copy / 'unet' / 'config.json', freq_shift=0, block_out_channels='many')
    with pytest.raises(UsageError, match=r'unet/config\.json'):
        load(copy)
    edit(copy / 'unet' / 'config.json', block_out_channels=[16, 16])
    with pytest.raises(UsageError, match='does not fit its config'):
        load(copy)
    edit(copy / 'unet' / 'config.json', **json.loads((FIXTURES / 'sd1' / 'unet' / 'config.json').read_text()))
    edit(copy / 'model_index.json', unet=['diffusers', 'UNet3DModel'])
    with pytest.raises(UsageError, match='unknown class of unet'):
        load(copy)
    edit(copy / 'model_index.json', unet=['diffusers', 'UNet2DConditionModel'], **{'../outside': ['diffusers', 'X']})
    with pytest.raises(UsageError, match='is damaged'):
        load(copy)


def test_a_truncated_part_is_named(copy):
    path = copy / 'vae' / 'diffusion_pytorch_model.safetensors'
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(
        UsageError, match=r'vae/diffusion_pytorch_model\.safetensors is no safetensors file, or is damaged'
    ):
        load(copy)


def test_a_missing_part_is_named(copy):
    shutil.rmtree(copy / 'tokenizer')
    with pytest.raises(UsageError, match='tokenizer'):
        load(copy)


def test_averaged_weights_and_variants_are_taken(copy):
    tensors = load_file(copy / 'unet' / 'diffusion_pytorch_model.safetensors')
    averaged = {name: (0.5 * array).astype(np.float16) for name, array in tensors.items()}
    (copy / 'unet_ema').mkdir()
    shutil.copyfile(copy / 'unet' / 'config.json', copy / 'unet_ema' / 'config.json')
    save_file(averaged, copy / 'unet_ema' / 'diffusion_pytorch_model.safetensors')
    save_file(averaged, copy / 'unet' / 'diffusion_pytorch_model.fp16.safetensors')

    def first(**options):
        return np.asarray(read_folder(copy, **options).parts['unet'].params['conv_in']['kernel'])

    np.testing.assert_allclose(first(ema=True), 0.5 * first(), rtol=1e-3)
    np.testing.assert_allclose(first(variant='fp16'), 0.5 * first(), rtol=1e-3)  # parts without it: the plain one


def test_a_part_alone_is_read_and_written(tmp_path):
    part = read_part(FIXTURES / 'sd1' / 'vae')
    write_part(tmp_path / 'vae', part)
    folder = read_folder(tmp_path / 'vae')
    assert list(folder.parts) == ['vae']
    jax.tree.map(np.testing.assert_array_equal, part.params, folder.parts['vae'].params)


def test_a_low_rank_change_is_added_by_load():
    plain = load(FIXTURES / 'sd1')
    changed = load(FIXTURES / 'sd1', loras=[(FIXTURES / 'lora' / 'peft.safetensors', 0.7)])
    settings = {'prompts': 'a red heart', 'steps': 3}
    assert (plain(1, **settings).images != changed(1, **settings).images).any()


def test_parts_are_split_over_devices():
    mesh = None
    from diffusion_jax.training.sharding import make_mesh

    mesh = make_mesh({'data': 2, 'fsdp': 4})
    split, whole = load(FIXTURES / 'sd1', mesh=mesh), load(FIXTURES / 'sd1')
    kernel = split.params['mid_block']['resnets']['0']['conv1']['kernel']
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    settings = {'prompts': 'a red heart', 'steps': 3, 'decode': False, 'batch_size': 8}
    (a,), (b,) = (list(each.batches(2, **settings)) for each in (split, whole))
    assert np.abs(a.images - b.images).max() < 1e-3 * np.abs(b.images).max()
