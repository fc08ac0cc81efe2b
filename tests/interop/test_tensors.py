"""Files of tensors: sharded ones, variants, and files that are damaged or hostile."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from diffusion_jax.errors import UsageError
from diffusion_jax.interop.names import export_params, import_params, renamed, torch_name
from diffusion_jax.interop.tensors import TensorFiles, find_weights, read_json, save_tensors

STEM = 'diffusion_pytorch_model'


def write(path, **tensors):
    save_file({name: np.asarray(value, np.float32) for name, value in tensors.items()}, path)


def test_every_type_of_float_is_read(tmp_path):
    values = np.array([[1.5, -2.0, 3.25]])
    types = {'float64': np.float64, 'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}
    save_tensors(tmp_path / 'a.safetensors', {name: values.astype(kind) for name, kind in types.items()})
    tensors = TensorFiles([tmp_path / 'a.safetensors'])
    assert set(tensors) == set(types)
    assert len(tensors) == 4
    for name in types:
        assert tensors.dtype(name) == name
        assert tensors.shape(name) == (1, 3)
        np.testing.assert_array_equal(tensors[name].astype(np.float64), values)


def test_shards_are_one(tmp_path):
    write(tmp_path / f'{STEM}-00001-of-00002.safetensors', a=[1.0])
    write(tmp_path / f'{STEM}-00002-of-00002.safetensors', b=[2.0])
    where = {'a': f'{STEM}-00001-of-00002.safetensors', 'b': f'{STEM}-00002-of-00002.safetensors'}
    (tmp_path / f'{STEM}.safetensors.index.json').write_text(json.dumps({'weight_map': where}))
    tensors = TensorFiles(find_weights(tmp_path, STEM))
    assert {name: tensors[name].item() for name in tensors} == {'a': 1.0, 'b': 2.0}


def test_variants_are_found(tmp_path):
    write(tmp_path / f'{STEM}.fp16.safetensors', a=[1.0])
    assert [path.name for path in find_weights(tmp_path, STEM)] == [f'{STEM}.fp16.safetensors']  # the only ones
    write(tmp_path / f'{STEM}.safetensors', a=[2.0])
    assert [path.name for path in find_weights(tmp_path, STEM)] == [f'{STEM}.safetensors']
    assert [path.name for path in find_weights(tmp_path, STEM, 'fp16')] == [f'{STEM}.fp16.safetensors']
    with pytest.raises(UsageError, match=r'variants there: (fp16, None|None, fp16)'):
        find_weights(tmp_path, STEM, 'bf16')


def test_pickled_weights_are_never_opened(tmp_path):
    (tmp_path / f'{STEM}.bin').write_bytes(b'anything')
    with pytest.raises(UsageError, match=r'Only pickled ones are .*\.bin\), which are never opened'):
        find_weights(tmp_path, STEM)


@pytest.mark.parametrize('name', ['../outside.safetensors', '/etc/passwd', 'folder/a.safetensors', 'a.bin', 3])
def test_an_index_cannot_lead_out_of_its_folder(tmp_path, name):
    folder = tmp_path / 'model'
    folder.mkdir()
    write(tmp_path / 'outside.safetensors', a=[1.0])
    (folder / f'{STEM}.safetensors.index.json').write_text(json.dumps({'weight_map': {'a': name}}))
    with pytest.raises(UsageError, match=r'not the plain name|is damaged'):
        find_weights(folder, STEM)


@pytest.mark.parametrize('index', ['{', '[]', '{"weight_map": 3}', '{}'])
def test_a_damaged_index_is_said_to_be_one(tmp_path, index):
    (tmp_path / f'{STEM}.safetensors.index.json').write_text(index)
    with pytest.raises(UsageError, match='is damaged'):
        find_weights(tmp_path, STEM)


def test_a_missing_shard_is_named(tmp_path):
    where = {'weight_map': {'a': 'gone.safetensors'}}
    (tmp_path / f'{STEM}.safetensors.index.json').write_text(json.dumps(where))
    with pytest.raises(UsageError, match=r'there is no file .*gone\.safetensors'):
        TensorFiles(find_weights(tmp_path, STEM))


def test_a_name_in_two_shards_is_refused(tmp_path):
    write(tmp_path / 'a.safetensors', same=[1.0])
    write(tmp_path / 'b.safetensors', same=[2.0])
    with pytest.raises(UsageError, match='which another file of the same model holds as well'):
        TensorFiles([tmp_path / 'a.safetensors', tmp_path / 'b.safetensors'])


def header(text):
    return len(text).to_bytes(8, 'little') + text.encode()


HOSTILE = {
    'a header of 2^60 bytes': (2**60).to_bytes(8, 'little') + b'{}',
    'nothing': b'',
    'half a length': b'\x01\x02',
    'no JSON': header('not json'),
    'data out of the file': header('{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'),
    'an overlap': header(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    )
    + b'\0' * 4,
    'a size that is not its shape': header('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}') + b'\0' * 4,
    'a shape that overflows': header(f'{{"a":{{"dtype":"F32","shape":[{2**62},{2**62}],"data_offsets":[0,4]}}}}')
    + b'\0' * 4,
    'a type that does not exist': header('{"a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}}') + b'\0' * 4,
}


@pytest.mark.parametrize('kind', HOSTILE)
def test_hostile_files_are_refused(tmp_path, kind):
    path = tmp_path / 'a.safetensors'
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(UsageError, match=r'a\.safetensors is no safetensors file, or is damaged'):
        TensorFiles([path])


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / 'a.safetensors'
    write(path, a=np.arange(100.0))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(UsageError, match='or is damaged'):
        TensorFiles([path])


def test_a_type_that_is_no_parameters_is_refused(tmp_path):
    save_file({'a': np.zeros(3, np.uint8)}, tmp_path / 'a.safetensors')
    with pytest.raises(UsageError, match=r'a in .* is of type U8'):
        TensorFiles([tmp_path / 'a.safetensors'])['a']


def test_names_and_layouts_go_both_ways():
    rng = np.random.RandomState(0)
    rename = renamed((r'^first\.', 'other.'))
    params = {
        'first': {'kernel': rng.rand(3, 3, 2, 5).astype(np.float32), 'bias': rng.rand(5).astype(np.float32)},
        'attn': {'to_out': {'kernel': rng.rand(4, 4).astype(np.float32)}},
        'norm': {'scale': rng.rand(4).astype(np.float32)},
        'token': {'embedding': rng.rand(6, 4).astype(np.float32)},
    }
    written = export_params(params, rename)
    assert {name: array.shape for name, array in written.items()} == {
        'other.weight': (5, 2, 3, 3),
        'other.bias': (5,),
        'attn.to_out.0.weight': (4, 4),
        'norm.weight': (4,),
        'token.weight': (6, 4),
    }
    # A square kernel is transposed by its name; its shape would not show that it was not.
    np.testing.assert_array_equal(written['attn.to_out.0.weight'], params['attn']['to_out']['kernel'].T)
    np.testing.assert_array_equal(written['token.weight'], params['token']['embedding'])
    again = import_params(written, params, rename)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    assert torch_name(('a', 'ff', 'proj', 'kernel'), rename) == 'a.ff.net.0.proj.weight'


def test_json_that_is_none_is_refused(tmp_path):
    path = tmp_path / 'config.json'
    with pytest.raises(UsageError, match='there is no file'):
        read_json(path)
    for text, message in (('{', 'is no JSON'), ('[1]', 'holds no JSON object'), ('[' * 100_000, 'is no JSON')):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_json(path)
