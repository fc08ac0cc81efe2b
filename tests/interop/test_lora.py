"""Low-rank changes: against a U-Net of diffusers' with the same adapter, in the files of diffusers and of kohya."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.lora import lora_changes, read_lora
from diffusion_jax.interop.names import import_params
from diffusion_jax.interop.tensors import TensorFiles, find_weights
from diffusion_jax.interop.unets import UNET_RENAME, unet_options
from diffusion_jax.models import ConditionalUNet, functional

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'interop'
PEFT, KOHYA = (FIXTURES / 'lora' / f'{name}.safetensors' for name in ('peft', 'kohya'))


@pytest.fixture(scope='module')
def unet():
    """(tensors, shapes, run) of sd1's: run(params) is its output for the stored input."""
    folder = FIXTURES / 'sd1' / 'unet'
    options = unet_options(json.loads((folder / 'config.json').read_text()))
    init, apply = functional(lambda rngs: ConditionalUNet(**options, rngs=rngs))
    given = np.load(FIXTURES / 'sd1' / 'reference.npz')
    run = jax.jit(
        lambda params: apply(params, given['unet/x_0'], np.full(2, given['unet/t'][0]), context=given['unet/context'])
    )
    tensors = TensorFiles(find_weights(folder, 'diffusion_pytorch_model'))
    return tensors, jax.eval_shape(init, jax.random.key(0)), run


def output(unet, *loras):
    tensors, shapes, run = unet
    changed = lora_changes(loras)['unet'](tensors)
    with jax.default_matmul_precision('highest'):
        return np.asarray(run(import_params(changed, shapes, UNET_RENAME)))


@pytest.mark.parametrize('path', [PEFT, KOHYA], ids=['peft', 'kohya'])
@pytest.mark.parametrize('scale', [0.7, 1.0])
def test_the_changed_network_is_that_of_diffusers(unet, path, scale):
    theirs = np.load(FIXTURES / 'lora' / 'reference.npz')[f'unet_{scale}']
    unchanged = np.load(FIXTURES / 'sd1' / 'reference.npz')['unet/y_0']
    assert np.abs(theirs - unchanged).max() > 0.1 * np.abs(theirs).max()
    assert np.abs(output(unet, (path, scale)) - theirs).max() < 2e-5 * np.abs(theirs).max()


def test_several_are_added(unet):
    twice = output(unet, (PEFT, 0.3), (KOHYA, 0.4))
    np.testing.assert_allclose(twice, output(unet, (PEFT, 0.7)), atol=2e-5 * np.abs(twice).max())


def test_a_change_of_none_is_none(unet):
    tensors, shapes, _ = unet
    changed = import_params(lora_changes([(PEFT, 0.0)])['unet'](tensors), shapes, UNET_RENAME)
    jax.tree.map(np.testing.assert_array_equal, changed, import_params(tensors, shapes, UNET_RENAME))


def test_every_usual_name_is_known(tmp_path):
    down, up = np.ones((2, 4), np.float32), np.ones((3, 2), np.float32)
    names = {
        'unet.mid.attn1.processor.to_q_lora.{}.weight': ('unet', 'mid_attn1_to_q'),
        'mid.attn1.processor.to_out_lora.{}.weight': ('unet', 'mid_attn1_to_out_0'),
        'text_encoder.text_model.q_proj.lora_linear_layer.{}.weight': ('text_encoder', 'text_model_q_proj'),
        'text_encoder_2.text_model.q_proj.lora.{}.weight': ('text_encoder_2', 'text_model_q_proj'),
    }
    tensors = {name.format(role): array for name in names for role, array in (('down', down), ('up', up))}
    for prefix, part in (('lora_te', 'text_encoder'), ('lora_te2', 'text_encoder_2')):
        names[prefix] = (part, 'k_proj')
        tensors |= {f'{prefix}_k_proj.lora_down.weight': down, f'{prefix}_k_proj.lora_up.weight': up}
    save_file(tensors, tmp_path / 'a.safetensors')
    found = read_lora(tmp_path / 'a.safetensors')
    assert {(part, base) for part, changes in found.items() for base in changes} == set(names.values())
    np.testing.assert_allclose(found['unet']['mid_attn1_to_q'].of(np.zeros((3, 4))), np.full((3, 4), 2.0))


def changed_file(tmp_path, change):
    tensors = load_file(KOHYA)
    change(tensors)
    save_file(tensors, tmp_path / 'a.safetensors')
    return tmp_path / 'a.safetensors'


def test_files_of_something_else_are_refused(tmp_path, unet):
    first = next(name for name in load_file(KOHYA) if name.endswith('lora_up.weight'))
    base = first.removesuffix('.lora_up.weight')

    path = changed_file(tmp_path, lambda tensors: tensors.pop(first))
    with pytest.raises(UsageError, match='has only one of its two factors'):
        read_lora(path)
    path = changed_file(tmp_path, lambda tensors: tensors.update({f'{base}.dora_scale': np.ones(3, np.float32)}))
    with pytest.raises(UsageError, match=r'dora_scale\. DoRA, LoHa and LoKr are not supported'):
        read_lora(path)
    path = changed_file(tmp_path, lambda tensors: tensors.update({first: np.ones((7, 3), np.float32)}))
    with pytest.raises(UsageError, match=r'a change of \(7, 3\) x .* does not fit a weight'):
        output(unet, (path, 1.0))
    with pytest.raises(UsageError, match='no low-rank changes as diffusers or kohya'):
        read_lora(FIXTURES / 'sd1' / 'vae' / 'diffusion_pytorch_model.safetensors')


def test_changes_of_another_model_are_refused(tmp_path, unet):
    def rename(tensors):
        for name in list(tensors):
            if 'mid_block' in name:
                tensors[name.replace('mid_block', 'mid_blok')] = tensors.pop(name)

    path = changed_file(tmp_path, rename)
    with pytest.raises(
        UsageError, match=r'weights that .* does not have, such as unet\.mid_blok.*it is of another model'
    ):
        output(unet, (path, 1.0))
