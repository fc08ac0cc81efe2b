"""`python -m diffusion_jax.interop`: what it says of files, what it reads and writes, and models of ours exported."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from diffusion_jax.config import default_config, model_section
from diffusion_jax.experiment import DataInfo, TextInfo, make_autoencoder, make_experiment
from diffusion_jax.interop.__main__ import EXAMPLES, lora_of, main
from diffusion_jax.interop.load import load
from diffusion_jax.interop.text_encoders import CLIP_PREFIX
from diffusion_jax.pipelines.autoencoders import KIND, load_autoencoder
from diffusion_jax.pipelines.model_file import autoencoder_beside, pretrained, save_model
from diffusion_jax.pipelines.parts import read_latent_space
from diffusion_jax.text import ClipTokenizer
from diffusion_jax.training.sharding import make_mesh
from diffusion_jax.weights import save_weights

FIXTURES = Path(__file__).parents[1] / 'fixtures' / 'interop'
SD1 = FIXTURES / 'sd1'
SHIPPED = Path(__file__).parents[2] / 'diffusion_jax' / 'shipped'


@pytest.fixture
def command(capsys):
    """arguments -> (exit status, what was printed, what was said of errors)."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


def tensors_of(folder):
    """{file: {name: array}}; text encoders by the shorter of the two kinds of names that transformers reads."""
    return {
        str(path.relative_to(folder)): {
            name.removeprefix(CLIP_PREFIX): array for name, array in load_file(path).items()
        }
        for path in sorted(Path(folder).rglob('*.safetensors'))
    }


def assert_same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for file, tensors in ours.items():
        assert tensors.keys() == theirs[file].keys()
        for name, array in tensors.items():
            assert array.dtype == theirs[file][name].dtype
            np.testing.assert_array_equal(array, theirs[file][name], err_msg=name)


# --- inspect ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('source', 'said'),
    [
        (
            SD1,
            ['StableDiffusionPipeline', 'unet: UNet2DConditionModel', 'PNDMScheduler', 'solver plms', 'predicts eps'],
        ),
        (FIXTURES / 'sd2', ['predicts v']),
        (FIXTURES / 'sdxl', ['text_encoder_2: CLIPTextModelWithProjection']),
        (FIXTURES / 'ddpm', ['DDPMPipeline', 'unet: UNet2DModel']),
        (FIXTURES / 'dit', ['transformer: DiTTransformer2DModel']),
        (SD1 / 'unet', ['a part in the layout of diffusers', 'UNet2DConditionModel, 0.2 M parameters in 208 tensors']),
        (FIXTURES / 'lora' / 'kohya.safetensors', ['a LoRA', 'unet: changes 36 weights, of rank 3']),
        (SHIPPED / 'digits.safetensors', ['a model of this package (diffusion)', '1.0 M parameters']),
    ],
    ids=lambda value: Path(value).stem if isinstance(value, Path) else '',
)
def test_inspect_says_what_is_there(source, said, command):
    status, output, _ = command('inspect', source)
    assert status == 0
    for words in said:
        assert words in output


def test_inspect_counts_parameters_and_lists_tensors(command):
    tensors = load_file(SD1 / 'text_encoder' / 'model.safetensors')
    _, output, _ = command('inspect', '--tensors', SD1)
    assert f'text_encoder: CLIPTextModel, {sum(a.size for a in tensors.values()):,} parameters' in output
    for name, array in tensors.items():
        assert f'{name}  {list(array.shape)}  {array.dtype}\n' in output


def test_inspect_reads_no_weights(tmp_path, command):
    """A file may be larger than memory: its header alone is read."""
    shutil.copytree(SD1, tmp_path / 'sd1')
    path = tmp_path / 'sd1' / 'unet' / 'diffusion_pytorch_model.safetensors'
    data = bytearray(path.read_bytes())
    length = 8 + int.from_bytes(data[:8], 'little')
    data[length:] = b'\xff' * (len(data) - length)
    path.write_bytes(data)
    assert command('inspect', tmp_path / 'sd1')[1] == command('inspect', SD1)[1].replace(
        str(SD1), str(tmp_path / 'sd1')
    )


# --- import -----------------------------------------------------------------------------------------------------------


def test_a_folder_becomes_one_file_and_a_folder_again(tmp_path, command):
    file, folder = tmp_path / 'model.safetensors', tmp_path / 'folder'
    assert command('import', SD1, file) == (0, f'wrote {file}: text_encoder, unet, vae\n', '')
    status, output, _ = command('inspect', file)
    assert status == 0
    assert 'Stable Diffusion 1 in one file' in output
    assert 'predicts eps' in output
    assert command('import', file, folder, '--like', SD1)[0] == 0
    assert_same_tensors(tensors_of(folder), tensors_of(SD1))
    assert json.loads((folder / 'unet' / 'config.json').read_text()) == json.loads(
        (SD1 / 'unet' / 'config.json').read_text()
    )


def test_a_lora_is_added_at_its_scale(tmp_path, command):
    lora = FIXTURES / 'lora' / 'kohya.safetensors'
    changed = {}
    for scale in (0, 1, 0.5):
        target = tmp_path / f'at{scale}'
        assert command('import', SD1, target, '--lora', f'{lora}:{scale}')[0] == 0
        changed[scale] = load_file(target / 'unet' / 'diffusion_pytorch_model.safetensors')
    plain = load_file(SD1 / 'unet' / 'diffusion_pytorch_model.safetensors')
    moved = [name for name, array in plain.items() if (array != changed[1][name]).any()]
    assert len(moved) == 36
    for name, array in plain.items():
        np.testing.assert_array_equal(changed[0][name], array)
        middle = (array.astype(np.float32) + changed[1][name].astype(np.float32)) / 2
        np.testing.assert_allclose(changed[0.5][name], middle, atol=2e-3)


def test_a_lora_is_named_with_or_without_a_scale(tmp_path):
    assert lora_of('style.safetensors') == ('style.safetensors', 1.0)
    assert lora_of('style.safetensors:0.8') == ('style.safetensors', 0.8)
    assert lora_of('style.safetensors:-1') == ('style.safetensors', -1.0)
    odd = tmp_path / 'a:2'
    odd.touch()
    assert lora_of(str(odd)) == (str(odd), 1.0)


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_done_is_one_line_and_leaves_nothing(tmp_path, command):
    full = tmp_path / 'full'
    full.mkdir()
    (full / 'kept').write_text('kept')
    taken = tmp_path / 'taken.txt'
    taken.write_text('kept')
    odd = tmp_path / 'odd.safetensors'
    save_file({'weight': np.zeros((2, 2), np.float32)}, odd)
    new = tmp_path / 'new'
    lora = FIXTURES / 'lora' / 'kohya.safetensors'
    cases = [
        (('inspect', tmp_path / 'nowhere'), 'neither a folder nor a .safetensors file'),
        (('inspect', taken), 'Pickled files are never opened'),
        (('inspect', full), 'config.json'),
        (('inspect', odd), 'odd.safetensors'),
        (('import', tmp_path / 'nowhere', new), 'there is no folder'),
        (('import', SD1, full), 'not empty'),
        (('import', SD1, taken), 'taken.txt'),
        (('import', SD1, odd), 'is there already'),
        (('import', odd, new), 'odd.safetensors'),
        (('import', SD1, new, '--like', SD1), 'for one .safetensors file'),
        (('import', SD1, new, '--lora', f'{lora}:much'), "'much' is no scale"),
        (('import', SD1, new, '--lora', tmp_path / 'nowhere.safetensors'), 'nowhere.safetensors'),
        (('import', FIXTURES / 'dit', new, '--lora', lora), 'the LoRA changes unet'),
        (('import', FIXTURES / 'dit', tmp_path / 'dit.safetensors'), 'no single-file layout'),
        (('export', tmp_path / 'nowhere', new), 'name the folder of a run'),
        (('export', full, new), 'holds no run'),
        (('export', odd, new), 'no file of --mode=export'),
        (('export', SHIPPED / 'digits.safetensors', new), "diffusers has no network like model.name='unet'"),
    ]
    before = sorted(tmp_path.rglob('*'))
    for arguments, message in cases:
        status, output, errors = command(*arguments)
        assert (status, output) == (1, ''), arguments
        assert errors.startswith('error: '), arguments
        assert message in errors, (arguments, errors)
        assert errors.count('\n') == 1
    assert sorted(tmp_path.rglob('*')) == before
    assert taken.read_text() == (full / 'kept').read_text() == 'kept'


def test_help_shows_examples_of_every_command(capsys):
    with pytest.raises(SystemExit):
        main(['--help'])
    output = capsys.readouterr().out
    for command in ('inspect', 'import', 'export'):
        assert f'diffusion_jax.interop {command}' in EXAMPLES
    assert EXAMPLES.strip() in output


# --- export -----------------------------------------------------------------------------------------------------------


def drawn(init, seed=0):
    """Parameters with no zeros or ones left where a network starts from them."""
    params = jax.jit(init)(jax.random.key(seed))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@pytest.fixture(scope='module')
def autoencoder(tmp_path_factory):
    """The file of an autoencoder, 16x16x3 to 8x8x4, whose latents have a scale and a shift."""
    config = default_config()
    config.task = 'autoencoder'
    config.model = model_section('autoencoder_kl')
    config.model.update(channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4, latent_channels=4)
    made = make_autoencoder(config, DataInfo((16, 16, 3), ()))
    path = tmp_path_factory.mktemp('autoencoder') / 'model.safetensors'
    metadata = {'kind': KIND, 'config': config.to_dict(), 'data': dataclasses.asdict(made.data), 'step': 1}
    save_weights(path, drawn(made.init), metadata | {'ema': True, 'scale': 0.7, 'shift': 0.3}, 'float32')
    return path


def model_of(folder, model, autoencoder=None, class_names=(), text=None, **settings):
    """The file of a denoiser with parameters drawn at random, its autoencoder beside it."""
    config = default_config()
    config.class_conditional = bool(class_names)
    config.model = model_section(model)
    config.model.update(**settings)
    config.schedule.num_timesteps = 1000
    config.loss.prediction = 'v' if autoencoder else 'eps'
    config.text.length = 8
    path = folder / 'model.safetensors'
    latents = None
    if autoencoder is not None:
        shutil.copyfile(autoencoder, autoencoder_beside(path))
        config.latents.autoencoder = str(autoencoder)
        latents = read_latent_space(autoencoder)[1]
    info = DataInfo((16, 16, 3), class_names, latents, text)
    experiment = make_experiment(config, info)
    save_model(path, drawn(experiment.init), config, info, 1, True)
    return path


def opened(path, folder):
    """(pipeline of our file, pipeline of what was exported), on one device: less to compile."""
    mesh = make_mesh(devices=jax.devices()[:1])
    return pretrained(str(path), mesh), load(folder, mesh=mesh)


def assert_same_latents(ours, theirs, settings):
    a, b = (next(pipeline.batches(2, decode=False, **settings)).images for pipeline in (ours, theirs))
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())


@pytest.mark.slow
def test_a_text_to_image_model_of_ours_is_a_stable_diffusion(autoencoder, tmp_path, command):
    path = model_of(
        tmp_path,
        'text_unet',
        autoencoder,
        text=TextInfo(ClipTokenizer.small().vocab_size, 8),
        text_features=16,
        text_layers=2,
        text_heads=2,
        channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        attention_depths=(0, 1),
        num_heads=2,
        num_groups=4,
    )
    folder = tmp_path / 'exported'
    status, output, errors = command('export', path, folder)
    assert (status, errors) == (0, '')
    assert output == f'wrote {folder}: vae, unet, text_encoder\n'
    ours, theirs = opened(path, folder)
    settings = {'prompts': ['a red heart', 'an old dog'], 'guidance_scale': 3.0, 'steps': 3}
    # The shift of our latents is in the exported autoencoder's biases: the latents differ by nothing else.
    assert_same_latents(ours, theirs, settings)
    image = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3)).astype(np.float32) / 127.5 - 1
    x0 = ours.latents.encode(image)
    np.testing.assert_allclose(x0, theirs.latents.encode(image), atol=1e-4)
    np.testing.assert_allclose(ours.latents.decode(x0), theirs.latents.decode(x0), atol=1e-4)
    single, again = tmp_path / 'single.safetensors', tmp_path / 'again'
    assert command('export', path, single)[0] == 0
    assert command('import', single, again, '--like', folder)[0] == 0
    assert_same_tensors(tensors_of(again), tensors_of(folder))


def test_a_dit_of_ours_is_a_dit_pipeline(autoencoder, tmp_path, command):
    path = model_of(tmp_path, 'dit', autoencoder, ('one', 'two'), channels=16, num_layers=2, num_heads=2, patch_size=2)
    folder = tmp_path / 'exported'
    assert command('export', path, folder)[0] == 0
    ours, theirs = opened(path, folder)
    assert theirs.class_names == ('one', 'two')
    assert_same_latents(ours, theirs, {'labels': [0, 1], 'guidance_scale': 2.0, 'steps': 3})


def test_a_ddpm_of_ours_is_a_ddpm_pipeline(tmp_path, command):
    path = model_of(tmp_path, 'ddpm_unet', channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4)
    folder = tmp_path / 'exported'
    assert command('export', path, folder)[0] == 0
    settings = {'steps': 3, 'solver': 'ddim', 'spacing': 'leading'}
    ours, theirs = (pipeline(2, **settings).images for pipeline in opened(path, folder))
    np.testing.assert_allclose(ours.astype(int), theirs.astype(int), atol=1)


def test_an_autoencoder_of_ours_is_one_of_diffusers(autoencoder, tmp_path, command):
    folder = tmp_path / 'exported'
    assert command('export', autoencoder, folder) == (0, f'wrote {folder}: vae\n', '')
    config = json.loads((folder / 'config.json').read_text())
    assert (config['_class_name'], config['scaling_factor'], config['shift_factor']) == ('AutoencoderKL', 0.7, 0.3)
    space, info = read_latent_space(folder)
    encode, decode, params, known = load_autoencoder(autoencoder)
    assert (info.scale, info.shift, info.factor) == (known.scale, known.shift, known.factor)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    z = encode(params, images)
    np.testing.assert_allclose(space.encode(images), (z - 0.3) * 0.7, atol=1e-4)
    np.testing.assert_allclose(space.decode((z - 0.3) * 0.7), decode(params, z), atol=1e-4)


def test_what_diffusers_has_no_pipeline_of_is_a_part_alone(autoencoder, tmp_path, command):
    path = model_of(
        tmp_path,
        'ddpm_unet',
        autoencoder,
        ('a', 'b'),
        channels=8,
        channel_multipliers=(1, 2),
        num_res_blocks=1,
        num_groups=4,
    )
    folder = tmp_path / 'exported'
    assert command('export', path, folder)[1] == f'wrote {folder}: unet\n'
    config = json.loads((folder / 'config.json').read_text())
    assert (config['_class_name'], config['num_class_embeds']) == ('UNet2DModel', 3)
    assert json.loads((folder / 'scheduler_config.json').read_text())['prediction_type'] == 'v_prediction'
