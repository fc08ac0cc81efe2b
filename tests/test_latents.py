"""Diffusion in the latents of an autoencoder, and from texts: whole runs of seconds."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from image_files import colour, save
from ml_collections import ConfigDict
from runs import ROOT, load_config

from diffusion_jax import UsageError, data
from diffusion_jax.config import default_config, model_section
from diffusion_jax.data.batches import Batches
from diffusion_jax.data.latents import LatentRecords, LatentSet, description_path, records_path, write_latents
from diffusion_jax.evaluation import evaluate
from diffusion_jax.experiment import LatentInfo, info_of, read_record
from diffusion_jax.images import to_float
from diffusion_jax.interop.folders import read_folder
from diffusion_jax.interop.single_file import write_single_file
from diffusion_jax.pipelines import load_autoencoder, load_pipeline, pretrained
from diffusion_jax.pipelines.model_file import load_source
from diffusion_jax.pipelines.parts import KEPT, check_same_latents, read_latent_space, read_parts
from diffusion_jax.pipelines.workdir import export, generate, sample
from diffusion_jax.text import ClipTokenizer
from diffusion_jax.training.checkpoints import Checkpoints
from diffusion_jax.training.inputs import Inputs
from diffusion_jax.training.latent_cache import cached_latents
from diffusion_jax.training.sharding import make_mesh, replicated, sharded_batch
from diffusion_jax.training.train import train

GENERATE = ROOT / 'configs' / 'generate.py'
STABLE_DIFFUSION = Path(__file__).parent / 'fixtures' / 'interop' / 'sd1'


def autoencoder_config(**changes) -> ConfigDict:
    """Digits to 4x4 latents of two channels."""
    config = default_config()
    config.task = 'autoencoder'
    config.model = model_section(changes.pop('model', 'autoencoder_kl'))
    config.model.update(channels=8, channel_multipliers=(1, 2), num_res_blocks=1, num_groups=4, latent_channels=2)
    config.train.update(num_steps=3, batch_size=16, log_every=1, eval_every=3, sample_every=3, checkpoint_every=3)
    config.sample.update(num=4, batch_size=8)
    config.evaluate.evaluators = ()
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return config


def exported(folder, **changes) -> Path:
    config = autoencoder_config(**changes)
    train(config, folder)
    return export(config, folder)


@pytest.fixture(scope='module')
def autoencoder(tmp_path_factory):
    return exported(tmp_path_factory.mktemp('autoencoder'))


def latent_config(autoencoder, **changes) -> ConfigDict:
    settings = {
        'optimizer__warmup_steps': 1,
        'train__num_steps': 4,
        'train__sample_every': 4,
        'sample__num': 8,
        'evaluate__num': 10,
    } | changes
    return load_config(
        latents__autoencoder=str(autoencoder),
        model__attention_resolutions=(),
        evaluate__evaluators=('nearest_neighbour',),
        **settings,
    )


@pytest.fixture(scope='module')
def finished(autoencoder, tmp_path_factory):
    """The workdir of a run on digits' latents."""
    folder = tmp_path_factory.mktemp('latent')
    train(latent_config(autoencoder), folder)
    return folder


def params_of(workdir):
    return jax.tree.map(np.asarray, load_pipeline(workdir)[0].params)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_cached_latents_are_those_of_the_images(autoencoder, finished):
    _, _, params, _ = load_autoencoder(autoencoder)
    space, _ = read_latent_space(autoencoder)
    images = data.load('digits').test.images
    moments = jax.jit(space.encoder)(params, to_float(images))
    found = LatentRecords(finished / 'latents', 'test').read(np.arange(len(images)))
    np.testing.assert_allclose(found['mean'], moments.mean, atol=2e-3)
    np.testing.assert_allclose(found['log_variance'], moments.log_variance, atol=2e-2)
    assert 'mirrored_mean' not in found


@pytest.mark.slow
def test_mirrored_images_are_cached_too(autoencoder, tmp_path):
    train(latent_config(autoencoder, data__flip=True, train__num_steps=4), tmp_path)
    space, _ = read_latent_space(autoencoder)
    images = data.load('digits').test.images
    found = LatentRecords(tmp_path / 'latents', 'test').read(np.arange(len(images)))
    mirrored = jax.jit(space.encoder)(space.params, to_float(images)[:, :, ::-1])
    np.testing.assert_allclose(found['mirrored_mean'], mirrored.mean, atol=2e-3)
    assert np.abs(found['mirrored_mean'] - found['mean']).max() > 0.01


def some_latents(folder, num=20):
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=(num, 4, 4, 2)).astype(np.float16) for name in ('mean', 'log_variance')}
    write_latents(folder, 'train', [{n: a[:13] for n, a in arrays.items()}, {n: a[13:] for n, a in arrays.items()}], {})
    return arrays


def test_batches_of_latents_are_the_same_in_memory_and_streamed(tmp_path):
    arrays = some_latents(tmp_path)
    labels = np.arange(20, dtype=np.int32) % 3
    mesh = make_mesh()
    ids = np.arange(40, dtype=np.int32).reshape(20, 2)
    made = []
    for streamed in (False, True):
        latents = LatentSet(LatentRecords(tmp_path, 'train'), labels, ('a', 'b', 'c'), None, streamed)
        batches = Batches(
            latents,
            8,
            0,
            replicated=replicated(mesh),
            sharded=sharded_batch(mesh),
            placement='auto' if streamed else 'host',
            conditioning={'ids': ids},
            frozen={'x': jnp.ones(2)},
        )
        assert set(batches.arrays) == {'frozen'}
        with batches.stream(3) as stream:
            made.append([next(stream), next(stream), batches(3)])
    for ours, theirs in zip(*made, strict=True):
        assert ours.keys() == theirs.keys() == {'mean', 'log_variance', 'label', 'ids'}
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    first = made[0][0]
    rows = np.asarray(first['ids'])[:, 0] // 2
    np.testing.assert_array_equal(first['mean'], arrays['mean'][rows])
    np.testing.assert_array_equal(first['label'], labels[rows])


def test_a_damaged_cache_is_named(tmp_path):
    some_latents(tmp_path)
    path = records_path(tmp_path, 'train')
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r'train\.array_record is damaged.*Delete it'):
        LatentRecords(tmp_path, 'train').read(np.arange(20))
    description_path(tmp_path, 'train').write_text('{')
    with pytest.raises(UsageError, match=r'train\.json is missing or damaged'):
        LatentRecords(tmp_path, 'train')


def test_a_cache_of_something_else_is_refused(autoencoder, finished, tmp_path):
    other = exported(tmp_path / 'other', seed=7)
    folder = str(finished / 'latents')
    with pytest.raises(UsageError, match=r'latents of something else \(another autoencoder\)'):
        train(latent_config(other, latents__cache_dir=folder), tmp_path / 'run')
    # Of the same one on another device, whose rounding is another, it is taken.
    elsewhere = tmp_path / 'elsewhere'
    shutil.copytree(folder, elsewhere)
    for split in ('train', 'test'):
        path = description_path(elsewhere, split)
        description = json.loads(path.read_text())
        description['of']['autoencoder'] = [value + 1e-5 for value in description['of']['autoencoder']]
        path.write_text(json.dumps(description))
    config, splits = latent_config(autoencoder, latents__cache_dir=str(elsewhere)), data.load('digits')
    parts = read_parts(config, info_of(splits), make_mesh())
    assert len(cached_latents(config, splits, parts, tmp_path).train) == len(splits.train)
    with pytest.raises(UsageError, match='another mirrored'):
        train(latent_config(autoencoder, latents__cache_dir=folder, data__flip=True), tmp_path / 'run')


# --- what the network sees --------------------------------------------------------------------------------------------


def test_latents_are_drawn_and_scaled():
    info = LatentInfo(2, 2, scale=3.0, shift=0.5, probe=(0.0,))
    batch = {'mean': jnp.full((2000, 1, 1, 2), 1.0), 'log_variance': jnp.full((2000, 1, 1, 2), np.log(0.25))}
    drawn = Inputs(latents=info).x0(batch, jax.random.key(0))
    assert float(drawn.mean()) == pytest.approx(3 * (1.0 - 0.5), abs=0.1)
    assert float(drawn.std()) == pytest.approx(3 * 0.5, rel=0.05)
    means = Inputs(latents=info, draw=False).x0(batch, jax.random.key(0))
    np.testing.assert_allclose(means, 1.5)


def test_a_mirrored_latent_is_taken_half_of_the_time():
    info = LatentInfo(2, 2, 1.0, 0.0, (0.0,))
    zeros = jnp.zeros((1000, 1, 1, 1))
    batch = {'mean': zeros, 'log_variance': zeros, 'mirrored_mean': zeros + 1, 'mirrored_log_variance': zeros}
    x0 = Inputs(flip=True, latents=info, draw=False).x0(batch, jax.random.key(0))
    assert float(x0.mean()) == pytest.approx(0.5, abs=0.06)
    assert not Inputs(flip=True, latents=info, draw=False).x0(batch, jax.random.key(0), flip=False).any()


def test_texts_are_dropped_for_the_null_text():
    null = np.array([1, 9, 9], np.int32)
    batch = {'ids': jnp.tile(jnp.array([[1, 5, 9]]), (1000, 1))}
    inputs = Inputs(label_dropout=0.25, null_ids=null)
    ids = np.asarray(inputs.conditioning(batch, jax.random.key(0))['ids'])
    dropped = (ids == null).all(axis=1)
    assert dropped.mean() == pytest.approx(0.25, abs=0.05)
    assert (ids[~dropped] == [1, 5, 9]).all()
    assert (np.asarray(inputs.conditioning(batch, None)['ids']) == [1, 5, 9]).all()


@pytest.mark.slow
def test_encoding_on_the_fly_is_training_on_cached_means(autoencoder, tmp_path):
    """To what float16 does to the means."""
    common = {'latents__draw': False, 'train__num_steps': 4, 'evaluate__after_training': False}
    train(latent_config(autoencoder, **common), tmp_path / 'cached')
    train(latent_config(autoencoder, latents__cache=False, **common), tmp_path / 'fly')
    assert not (tmp_path / 'fly' / 'latents').exists()
    a, b = params_of(tmp_path / 'cached'), params_of(tmp_path / 'fly')
    assert max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b))) < 1e-3


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped(autoencoder, tmp_path):
    for folder, steps in (('one', (8,)), ('two', (4, 8))):
        for num in steps:
            train(latent_config(autoencoder, train__num_steps=num, train__sample_every=8), tmp_path / folder)
    a, b = params_of(tmp_path / 'one'), params_of(tmp_path / 'two')
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_run_knows_its_latents_and_keeps_its_autoencoder(autoencoder, finished):
    info = read_record(finished)[1]
    assert info.model_shape == (4, 4, 2)
    assert info.latents.scale > 0
    assert (finished / KEPT).read_bytes() == autoencoder.read_bytes()
    pipeline, step = load_pipeline(finished)
    assert step == 4
    samples = pipeline(4, steps=3, batch_size=8)
    assert samples.images.shape == (4, 8, 8, 1)
    (raw,) = pipeline.batches(4, steps=3, batch_size=8, decode=False)
    assert raw.images.shape == (4, 4, 4, 2)


@pytest.mark.slow
def test_another_autoencoder_is_refused_and_a_better_decoder_is_not(autoencoder, finished, tmp_path):
    other = exported(tmp_path / 'other', seed=7)
    with pytest.raises(UsageError, match='is not the autoencoder that this model was trained with'):
        load_pipeline(finished, autoencoder=str(other))
    with pytest.raises(UsageError, match='is not the autoencoder that this model was trained with'):
        sample(latent_config(other), finished)
    with pytest.raises(UsageError, match='is not the autoencoder'):
        train(latent_config(other, train__num_steps=6), finished)

    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    tensors = load_file(autoencoder)
    with safe_open(autoencoder, 'numpy') as file:
        metadata = file.metadata()
    tensors['decoder.conv_out.bias'] = tensors['decoder.conv_out.bias'] + 0.5
    save_file(tensors, tmp_path / 'better.safetensors', metadata)
    settings = {'num': 2, 'steps': 3, 'batch_size': 8}
    plain = load_pipeline(finished)[0](**settings).images
    better = load_pipeline(finished, autoencoder=str(tmp_path / 'better.safetensors'))[0](**settings).images
    assert better.mean() > plain.mean() + 10


@pytest.mark.slow
def test_rounding_an_encoder_to_half_precision_leaves_its_latents_the_same(autoencoder, tmp_path):
    half = exported(tmp_path, export_dtype='float16')
    infos = [read_latent_space(path)[1] for path in (autoencoder, half)]
    assert infos[0].probe != infos[1].probe
    check_same_latents(*infos, half)


def test_a_model_is_exported_with_its_autoencoder(autoencoder, finished, tmp_path):
    folder = tmp_path / 'run'
    shutil.copytree(finished, folder)
    config = latent_config('gone.safetensors')
    path = export(config, folder)
    assert path.with_name('model_autoencoder.safetensors').is_file()
    settings = {'num': 4, 'steps': 3, 'batch_size': 8}
    expected = load_pipeline(finished)[0](**settings).images
    np.testing.assert_array_equal(pretrained(str(path))(**settings).images, expected)
    shutil.rmtree(folder / 'checkpoints')
    pipeline, _ = load_source(load_config(init_from=str(path), model__attention_resolutions=()))
    np.testing.assert_array_equal(pipeline(**settings).images, expected)
    path.with_name('model_autoencoder.safetensors').unlink()
    gone = load_config(init_from=str(path), model__attention_resolutions=(), latents__autoencoder='gone')
    with pytest.raises(UsageError, match='there is no autoencoder gone'):
        load_source(gone)


def test_scores_of_a_run_on_latents(autoencoder, finished):
    report = evaluate(latent_config(autoencoder), finished)
    assert report['num'] == 10
    assert (finished / 'evaluation' / 'samples.png').exists()


@pytest.mark.slow
def test_a_codebook_has_latents_too(tmp_path):
    source = exported(tmp_path / 'vq', model='autoencoder_vq')
    train(latent_config(source), tmp_path / 'run')
    assert load_pipeline(tmp_path / 'run')[0](2, steps=3, batch_size=8).images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'latents__autoencoder': 'nothing.safetensors'}, 'there is no autoencoder nothing.safetensors'),
        ({'sample__clip': True}, r'sample\.clip=True is for pixels'),
        ({'data__resolution': 9}, 'do not fit the autoencoder'),
        ({'model__attention_resolutions': (8,)}, 'attention_resolutions'),
    ],
)
def test_what_does_not_fit_is_refused(autoencoder, tmp_path, changes, message):
    config = latent_config(autoencoder)
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    with pytest.raises(UsageError, match=message):
        train(config, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


# --- texts ------------------------------------------------------------------------------------------------------------

COLOURS = {'a red square': (255, 0, 0), 'a blue square': (0, 0, 255), 'a green square': (0, 255, 0)}


@pytest.fixture(scope='module')
def captioned(tmp_path_factory):
    folder = tmp_path_factory.mktemp('captioned')
    lines = []
    for number in range(40):
        text, value = list(COLOURS.items())[number % 3]
        save(folder, f'{number}.png', colour(*value, size=(16, 16)))
        lines.append(json.dumps({'file_name': f'{number}.png', 'text': text}))
    (folder / 'metadata.jsonl').write_text('\n'.join(lines))
    return folder


def text_config(folder, **changes) -> ConfigDict:
    config = load_config(data__name='captioned_folder', data__dir=str(folder), data__resolution=8, text__length=8)
    config.class_conditional = False
    config.model = model_section('text_unet')
    config.model.update(text_features=16, text_layers=1, text_heads=2, channels=8, channel_multipliers=(1, 2))
    config.model.update(num_res_blocks=1, attention_depths=(0, 1), num_heads=2, num_groups=4)
    config.evaluate.update(evaluators=(), num=10)
    config.optimizer.warmup_steps = 1
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    return config


@pytest.fixture(scope='module')
def text_run(captioned, tmp_path_factory):
    folder = tmp_path_factory.mktemp('text')
    train(text_config(captioned), folder)
    return folder


@pytest.mark.slow
def test_a_network_with_its_own_text_encoder_is_trained_and_generates(captioned, text_run):
    config = text_config(captioned)
    before, after = (Checkpoints(text_run).steps(), 12)
    assert before[-1] == after
    path = generate(config, text_run, ['a red square', 'a blue square'], negative_prompt='a green square', num=4)
    assert path.name.startswith('a-red-square-')
    with np.load(path.with_suffix('.npz')) as arrays:
        assert arrays['images'].shape == (4, 8, 8, 3)
    with pytest.raises(UsageError, match='needs --prompt'):
        generate(config, text_run, [])
    with pytest.raises(UsageError, match='less than the 2 prompts'):
        generate(config, text_run, ['a', 'b'], num=1)
    assert sample(config, text_run).exists()  # the texts of held-out images


@pytest.mark.slow
def test_the_text_is_what_changes_the_image_and_its_encoder_learns(text_run):
    pipeline, _ = load_pipeline(text_run)
    settings = {'steps': 3, 'batch_size': 8, 'seed': [5]}
    red, blue = (pipeline(1, prompts=text, **settings).images for text in ('a red square', 'a blue square'))
    assert (red != blue).any()
    start = load_pipeline(text_run, checkpoint='8')[0].params['text']
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), start, pipeline.params['text'])
    assert moved['encoder']['layers']['0']['mlp']['fc1']['kernel'] > 0


@pytest.mark.slow
def test_a_context_that_was_encoded_before_gives_the_same(text_run):
    pipeline, _ = load_pipeline(text_run)
    apply, params = pipeline.apply, pipeline.params
    ids = ClipTokenizer.small()(['a red square', ''], 8)
    x, t = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.full(2, 0.5)
    context = apply(params, ids, method='encode').last
    np.testing.assert_allclose(apply(params, x, t, context=context), apply(params, x, t, ids=ids), rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match='takes a text'):
        apply(params, x, t)
    with pytest.raises(UsageError, match='method must be'):
        apply(params, x, t, ids=ids, method='decode')


@pytest.mark.slow
def test_stable_diffusions_own_parts_are_trained_with(captioned, tmp_path):
    """Frozen: the autoencoder and the text encoder of a folder of diffusers; trained: a U-Net."""
    config = text_config(captioned, data__resolution=16, train__num_steps=4)
    config.model = model_section('conditional_unet')
    config.model.update(channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_depths=(0, 1))
    config.model.update(num_heads=2, num_groups=4, context_features=32)
    config.text.encoder, config.text.length = str(STABLE_DIFFUSION), 16
    config.latents.autoencoder = str(STABLE_DIFFUSION / 'vae')
    wanted = json.loads((STABLE_DIFFUSION / 'text_encoder' / 'config.json').read_text())['hidden_size']
    config.model.context_features = wanted + 1
    with pytest.raises(UsageError, match=r'features \(context_features\) of a frozen text encoder'):
        train(config, tmp_path)
    config.model.context_features = wanted
    train(config, tmp_path)
    assert not (tmp_path / KEPT).exists()
    pipeline, _ = load_pipeline(tmp_path)
    assert pipeline(2, prompts=['a red heart', 'a dog'], steps=3, batch_size=8).images.shape == (2, 16, 16, 3)
    on_the_fly = tmp_path / 'fly'
    config.data.update(crop='random', placement='stream')
    with pytest.raises(UsageError, match=r'latents\.cache=True encodes it once'):
        train(config, on_the_fly)
    config.latents.cache = False
    train(config, on_the_fly)  # streamed images, encoded in the step


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'data__name': 'digits', 'data__dir': None, 'data__resolution': None}, 'learns from captions'),
        ({'text__tokenizer': 'nowhere'}, 'nowhere'),
        ({'text__length': 2}, r'text\.length must be 3 or more'),
        ({'model': 'conditional_unet'}, 'set text.encoder'),
        ({'text__encoder': str(STABLE_DIFFUSION)}, 'has a text encoder of its own'),
    ],
)
def test_what_does_not_fit_texts_is_refused(captioned, tmp_path, changes, message):
    config = text_config(captioned)
    if 'model' in changes:
        config.model = model_section(changes.pop('model'))
    config.update_from_flattened_dict({key.replace('__', '.'): value for key, value in changes.items()})
    with pytest.raises(UsageError, match=message):
        train(config, tmp_path / 'run')


def test_an_imported_folder_generates(tmp_path):
    config = load_config(GENERATE, init_from=str(STABLE_DIFFUSION))
    config.sample.update(steps=2)
    path = generate(config, tmp_path, ['a red heart'])
    with np.load(path.with_suffix('.npz')) as arrays:
        assert arrays['images'].shape == (1, 32, 32, 3)
    with pytest.raises(UsageError, match='takes no text'):
        generate(load_config(GENERATE, init_from='pretrained:digits'), tmp_path / 'b', ['seven'])


def test_a_file_of_stable_diffusion_is_read_with_the_tokenizer_that_the_config_names(tmp_path, monkeypatch):
    path = tmp_path / 'model.safetensors'
    write_single_file(path, read_folder(STABLE_DIFFUSION))
    with pytest.raises(UsageError, match=r'--config\.text\.tokenizer'):
        load_source(load_config(GENERATE, init_from=str(path)))
    asked = {}
    monkeypatch.setattr('diffusion_jax.interop.load.load', lambda source, **options: asked.update(options, path=source))
    load_source(load_config(GENERATE, init_from=str(path), text__tokenizer='words'))
    assert (asked['path'], asked['tokenizer']) == (path, 'words')
