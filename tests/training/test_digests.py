import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from diffusion_jax.training.digests import SEEDS, _compiled, differing, digests

DEVICES = np.array(jax.devices())
DTYPES = ('float32', 'float16', 'bfloat16', 'int32', 'int8', 'uint8', 'uint16', 'uint32', 'int4', 'complex64')
DTYPES += ('float8_e4m3fn',)


def bits_of(array) -> list[int]:
    """The 32-bit words of a host array of numbers of up to 32 bits, in order."""
    array = np.ascontiguousarray(array)
    return array.view(f'uint{8 * array.dtype.itemsize}').ravel().tolist()


def reference(words: list[int]) -> str:
    """The digest by its definition, in Python's own integers."""

    def mixed(word):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            word = ((word ^ (word >> shift)) * factor) % 2**32
        return word ^ (word >> 16)

    sums = [sum(mixed(word ^ mixed((i + seed) % 2**32)) for i, word in enumerate(words)) for seed in SEEDS]
    return ''.join(f'{total % 2**32:08x}' for total in sums)


def sample(dtype: str, shape=(8, 3, 16)) -> np.ndarray:
    rng = np.random.default_rng(0)
    if dtype == 'complex64':
        return (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(dtype)
    return np.asarray(jnp.asarray(rng.normal(size=shape) * 7).astype(dtype))


@pytest.mark.parametrize('dtype', ['float32', 'float16', 'bfloat16', 'int32', 'uint8', 'int8'])
def test_a_digest_is_what_its_definition_says(dtype):
    array = sample(dtype)
    assert digests({'a': jnp.asarray(array)}) == {'a': reference(bits_of(array))}


def shardings():
    cube = Mesh(DEVICES.reshape(2, 2, 2), ('data', 'fsdp', 'tensor'))
    row, four = Mesh(DEVICES, ('fsdp',)), Mesh(DEVICES[3:7], ('fsdp',))
    yield SingleDeviceSharding(DEVICES[5])
    for mesh, spec in [
        (row, ()),
        (row, ('fsdp',)),
        (row, (None, None, 'fsdp')),
        (four, ('fsdp',)),
        (Mesh(DEVICES[:1], ('fsdp',)), ('fsdp',)),
        (cube, ()),
        (cube, (('data', 'fsdp'), None, 'tensor')),
        (cube, ('tensor', None, ('fsdp', 'data'))),
    ]:
        yield NamedSharding(mesh, PartitionSpec(*spec))


@pytest.mark.parametrize('dtype', DTYPES)
def test_a_digest_does_not_depend_on_the_sharding_or_the_devices(dtype):
    array = sample(dtype)
    expected = digests(array)
    for sharding in shardings():
        assert digests(jax.device_put(array, sharding)) == expected


@pytest.mark.parametrize('dtype', DTYPES)
def test_any_single_flipped_bit_changes_both_sums(dtype):
    array = sample(dtype, (3, 4))
    [before] = digests(array).values()
    halves = (before[:8], before[8:])
    size = 4 if dtype == 'int4' else 8 * array.dtype.itemsize
    for position in (0, 5, 11):
        for bit in range(size):
            changed = array.copy()
            changed.reshape(-1)[position : position + 1].view(np.uint8)[bit // 8] ^= np.uint8(1 << bit % 8)
            [after] = digests(changed).values()
            assert after[:8] != halves[0], (position, bit)
            assert after[8:] != halves[1], (position, bit)


def test_signs_of_zero_and_payloads_of_nan_are_told_apart():
    bits = np.array([0, 1 << 31, 0x7FC00000, 0x7FC00001, 0x7F800000, 0xFFC00000, 1], np.uint32)
    values = [digests(jnp.asarray(bits[i : i + 1].view(np.float32)))[''] for i in range(len(bits))]
    assert len(set(values)) == len(bits)


def test_the_order_of_values_counts():
    array = jnp.arange(24.0).reshape(2, 3, 4)
    same = digests(array)
    assert digests(array[:, ::-1]) != same
    assert digests(array.at[0, 0, 0].set(1.0).at[0, 0, 1].set(0.0)) != same
    assert digests(array.reshape(24)) == same  # but not the shape


def test_every_kind_of_leaf_has_a_digest(x64):
    key = jax.random.key(3)
    tree = {
        'key': key,
        'keys': jax.random.split(key, 3),
        'flag': jnp.array([True, False, True]),
        'number': 3,
        'empty': jnp.zeros((0, 4)),
        'none': None,
        'long': jnp.array([1, 2**40], jnp.int64),
        'double': jnp.array([1 / 3, -0.0], jnp.float64),
        'nested': [jnp.float32(2.5), (np.float64(1 / 3),)],
    }
    found = digests(tree)
    assert list(found) == sorted(['key', 'keys', 'flag', 'number', 'empty', 'long', 'double', 'nested/0', 'nested/1/0'])
    assert found['empty'] == '0' * 16
    assert found['key'] == reference(bits_of(jax.random.key_data(key)))
    assert found['flag'] == reference([1, 0, 1])
    for name, array in (('long', np.array([1, 2**40])), ('double', np.array([1 / 3, -0.0]))):
        assert found[name] == reference(array.view(np.uint32).tolist()) == digests(array)['']
    with jax.enable_x64(False):  # on the host nothing is narrowed
        assert digests(np.array([1 / 3, -0.0]))[''] == found['double']


def test_what_differs_is_named():
    a = {'w': jnp.ones(3), 'b': jnp.zeros(2), 'c': jnp.zeros(1)}
    b = {'w': jnp.ones(3).at[1].set(1 + 2**-23), 'b': jnp.zeros(2), 'd': jnp.zeros(1)}
    assert differing(digests(a), digests(b)) == ['c', 'd', 'w']
    assert differing(digests(a), digests(a)) == []


def test_leaves_of_one_shape_share_a_program():
    sharding = NamedSharding(Mesh(DEVICES, ('fsdp',)), PartitionSpec('fsdp'))
    before = total_programs()
    digests([jax.device_put(jnp.full((16, 7, 11), i), sharding) for i in range(5)])
    assert total_programs() == before + 1


def total_programs() -> int:
    return _compiled(NamedSharding(Mesh(DEVICES, ('fsdp',)), PartitionSpec()))._cache_size()
