"""Whole runs, as a user starts them: killed and resumed, sampled, evaluated, diverged."""

import json
import random
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import files_below, load_config, newest_state, run, start

from diffusion_jax import TrainingDiverged, UsageError
from diffusion_jax.losses import index_probabilities
from diffusion_jax.pipelines import load_pipeline
from diffusion_jax.training.metrics import read_metrics
from diffusion_jax.training.train import train

pytestmark = pytest.mark.slow

LONG = [
    '--config.train.num_steps=40',
    '--config.train.checkpoint_every=5',
    '--config.train.eval_every=15',
    '--config.train.log_every=1',
    '--config.train.sample_every=40',
    '--config.evaluate.after_training=False',
]


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize('devices', [1, 8])
def test_a_killed_run_ends_bit_for_bit_like_an_unbroken_one(devices, tmp_path):
    status, output = run(f'--workdir={tmp_path / "unbroken"}', *LONG, devices=devices)
    assert status == 0, output

    broken = tmp_path / 'broken'
    kill_at = random.randrange(12, 36)  # by then a first save is complete, and another may be under way
    process = start(f'--workdir={broken}', *LONG, devices=devices)
    while len(read_metrics(broken)) < kill_at and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f'the run was over before step {kill_at}'

    status, output = run(f'--workdir={broken}', *LONG, devices=devices)
    assert status == 0, output
    assert 'resumed at step' in output, f'killed at {kill_at}: {output}'
    assert_same_bits(newest_state(broken), newest_state(tmp_path / 'unbroken'))

    def losses(workdir):
        return [(row['step'], row['loss']) for row in read_metrics(workdir) if 'loss' in row]

    assert losses(broken) == losses(tmp_path / 'unbroken')
    assert [step for step, _ in losses(broken)] == list(range(1, 41))


def test_a_run_leaves_what_it_promises(workdir):
    assert {'config.json', 'metrics.jsonl', 'curves.png', 'evaluation.json'} <= files_below(workdir)
    assert sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir()) == [8, 12]
    for step in (6, 12):
        picture = np.asarray(Image.open(workdir / 'samples' / f'training_step{step}.png'))
        assert picture.shape == (98, 498, 3)  # two rows, a column a class
    rows = read_metrics(workdir)
    assert [row['step'] for row in rows if 'loss' in row] == [3, 6, 9, 12]
    assert [row['step'] for row in rows if 'held_out_loss' in row] == [4, 8, 12]
    assert {'loss', 'grad_norm', 'learning_rate', 'steps_per_second', 'images_per_second'} <= set(rows[0])
    report = json.loads((workdir / 'evaluation.json').read_text())
    assert report['step'] == 12
    assert 0 <= report['scores']['class_agreement'] <= 1
    assert report['scores']['exact_copies'] == 0


def test_a_finished_run_started_again_trains_no_further(workdir):
    before = newest_state(workdir)
    assert_same_bits(train(load_config(), workdir), before)


def test_a_run_may_be_made_longer(workdir, tmp_path):
    """More steps on the same workdir: with a constant learning rate, as if it had been so from the start."""
    longer = load_config(train__num_steps=16, evaluate__after_training=False)
    straight = train(longer, tmp_path / 'straight')
    shutil.copytree(workdir, tmp_path / 'in_two')
    assert_same_bits(train(longer, tmp_path / 'in_two'), straight)


def test_a_run_that_learns_the_variance_and_draws_times_by_their_losses_resumes_bit_for_bit(tmp_path):
    changes = {
        'model__learned_variance': True,
        'loss__vlb_weight': 0.001,
        'loss__time_sampler': 'loss_history',
        'model__channel_multipliers': (1,),
        'model__attention_resolutions': (),
        'model__middle_attention': False,
        'schedule__num_timesteps': 4,  # few enough for each to have its ten losses soon
        'train__checkpoint_every': 6,
        'train__eval_every': 6,
        'train__sample_every': 12,
        'evaluate__after_training': False,
    }
    whole = load_config(**changes)
    straight = train(whole, tmp_path / 'straight')
    train(load_config(train__num_steps=6, **changes), tmp_path / 'in_two')
    assert jnp.all(newest_state(tmp_path / 'in_two').loss_history.counts >= 10)  # from here on not uniform
    assert_same_bits(train(whole, tmp_path / 'in_two'), straight)
    history = straight.loss_history
    assert history.counts.sum() == 12 * 16
    probabilities = index_probabilities(history)
    assert probabilities.max() > 1.2 * probabilities.min()
    out = np.asarray(straight.params['conv_out']['kernel'])
    assert out.shape[-1] == 2
    assert (np.abs(out).max(axis=(0, 1, 2)) > 1e-4).all()  # both the mean and the variance were trained, from zero


def test_samples_from_the_command_line(workdir):
    before = files_below(workdir)
    status, output = run(
        f'--workdir={workdir}',
        '--mode=sample',
        '--config.sample.solver=ddim',
        '--config.sample.steps=4',
        '--config.sample.eta=0.5',
        '--config.sample.guidance_scale=3',
        '--config.sample.labels=7,2',
        '--config.sample.num=6',
        '--config.sample.seed=5',
    )
    assert status == 0, output
    new = sorted(files_below(workdir) - before)
    name = 'samples/step12_ddim4_trailing_seed5_num6_labels7-2_guidance3.0_eta0.5'
    assert new == [f'{name}.npz', f'{name}.png']
    arrays = np.load(workdir / f'{name}.npz')
    np.testing.assert_array_equal(arrays['labels'], [7, 2, 7, 2, 7, 2])
    assert arrays['images'].shape == (6, 8, 8, 1)
    assert arrays['images'].dtype == np.uint8
    pipeline, step = load_pipeline(workdir)
    settings = {'labels': [7, 2], 'guidance_scale': 3.0, 'steps': 4, 'eta': 0.5, 'seed': 5}
    assert step == 12
    again = pipeline(6, **settings).images
    assert np.abs(again.astype(int) - arrays['images']).max() <= 1  # eight devices against one


def test_raw_and_averaged_parameters_are_both_there(workdir):
    state = newest_state(workdir)
    for ema, params in ((True, state.ema), (False, state.params)):
        assert_same_bits(load_pipeline(workdir, ema=ema)[0].params, params)


def test_evaluation_from_the_command_line(workdir, tmp_path):
    status, output = run(f'--workdir={workdir}', '--mode=evaluate', '--config.evaluate.num=20')
    assert status == 0, output
    assert 'class_agreement:' in output
    assert json.loads((workdir / 'evaluation.json').read_text())['num'] == 20


def test_a_loss_that_is_not_a_number_stops_the_run_and_spares_the_checkpoints(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    good = newest_state(tmp_path)
    hot = load_config(train__num_steps=20, optimizer__learning_rate=1e30, evaluate__after_training=False)
    with pytest.raises(UsageError, match='learning_rate'):
        train(hot, tmp_path)  # another config: refused
    record = (tmp_path / 'config.json').read_text()
    (tmp_path / 'config.json').write_text(record.replace('"learning_rate": 0.001', '"learning_rate": 1e+30'))
    with pytest.raises(
        TrainingDiverged, match=r'training stopped at step \d+: .*nan.*checkpoints from before: \[8, 12\]'
    ):
        train(hot, tmp_path)
    assert_same_bits(newest_state(tmp_path), good)


def test_an_unconditional_run_on_unlabelled_images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(40):
        (tmp_path / 'images').mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 16, 3), np.uint8)).save(tmp_path / 'images' / f'{i}.png')
    config = load_config(
        data__dir=str(tmp_path / 'images'),
        data__name='folder',
        data__resolution=8,
        data__flip=True,
        data__placement='host',
        sample__guidance_scale=None,
        evaluate__evaluators=('nearest_neighbour',),
        train__num_steps=8,
    )
    train(config, tmp_path / 'run')
    assert load_pipeline(tmp_path / 'run')[0](2, steps=2).images.shape == (2, 8, 8, 3)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_next_start_goes_on(number, tmp_path):
    long = [*LONG, '--config.train.checkpoint_every=1000']
    process = start(f'--workdir={tmp_path / "stopped"}', *long, '--config.train.num_steps=4000')
    while len(read_metrics(tmp_path / 'stopped')) < 7 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(number)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + number, output
    assert 'Traceback' not in output
    step = int(newest_state(tmp_path / 'stopped').step)
    assert f'stopped at step {step} and saved it: the same command goes on from there' in output
    assert 7 <= step < 1000
    end = step + 5
    for folder in ('stopped', 'unbroken'):
        status, output = run(f'--workdir={tmp_path / folder}', *long, f'--config.train.num_steps={end}')
        assert status == 0, output
    assert_same_bits(newest_state(tmp_path / 'stopped'), newest_state(tmp_path / 'unbroken'))


def test_steps_of_nan_are_skipped_up_to_the_limit(tmp_path):
    """At this learning rate every step after the first is not finite."""
    config = load_config(
        optimizer__learning_rate=1e30,
        optimizer__warmup_steps=0,
        train__log_every=1,
        train__sample_every=100,
        train__max_skipped_steps=5,
        evaluate__after_training=False,
    )
    with pytest.raises(TrainingDiverged, match=r'after 5 skipped steps.*train.max_skipped_steps'):
        train(config, tmp_path)
    rows = [row for row in read_metrics(tmp_path) if 'skipped_steps' in row]
    assert rows[-1]['skipped_steps'] >= 1


def test_dispatches_of_several_steps_on_a_mesh_resume(tmp_path):
    settings = {
        'train__steps_per_dispatch': 2,
        'train__log_every': 2,
        'mesh__fsdp': 4,
        'evaluate__after_training': False,
    }
    straight = train(load_config(**settings), tmp_path / 'straight')
    train(load_config(train__num_steps=8, **settings), tmp_path / 'in_two')
    assert_same_bits(train(load_config(**settings), tmp_path / 'in_two'), straight)
    with pytest.raises(UsageError, match=r'steps_per_dispatch=2 must divide train.log_every=3'):
        train(load_config(train__steps_per_dispatch=2), tmp_path / 'refused')


def test_a_run_goes_on_on_another_mesh(workdir, tmp_path):
    """Eight devices, replicated -> split; the loss history of both ends within rounding."""
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    before = newest_state(tmp_path)
    split = load_config(train__num_steps=16, mesh__data=2, mesh__fsdp=2, mesh__tensor=2, evaluate__after_training=False)
    after = train(split, tmp_path)
    assert int(after.step) == 16
    assert int(before.step) == 12
    assert len({leaf.sharding.spec for leaf in jax.tree.leaves(after.params)}) > 1


def test_a_killed_sampling_job_goes_on(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    arguments = [
        f'--workdir={tmp_path}',
        '--mode=sample',
        '--config.sample.num=4000',
        '--config.sample.batch_size=20',
        '--config.sample.steps=10',
    ]
    process = start(*arguments)
    while len(list(tmp_path.glob('samples/*.parts/*.npz'))) < 5 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    status, output = run(*arguments)
    assert status == 0, output
    assert 'going on after the' in output
    assert not list(tmp_path.glob('samples/*.parts'))
    [path] = tmp_path.glob('samples/*num4000*.npz')
    images = np.load(path)['images']
    assert images.shape == (4000, 8, 8, 1)
    unbroken = load_pipeline(tmp_path)[0](300, steps=10, guidance_scale=2.0, batch_size=20).images
    assert np.abs(images[:300].astype(int) - unbroken).max() <= 1  # eight devices against one


def test_a_second_start_compiles_nothing_and_a_profile_is_written(workdir, tmp_path, monkeypatch):
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
    arguments = [f'--workdir={tmp_path}', *LONG, '--config.train.sample_every=1000']
    status, output = run(*arguments, '--config.train.num_steps=13')
    assert status == 0, output
    kept = sorted(tmp_path.glob('cache/jit_step*-cache'))
    assert kept
    status, output = run(*arguments, '--config.train.num_steps=30', '--profile')
    assert status == 0, output
    assert sorted(tmp_path.glob('cache/jit_step*-cache')) == kept
    assert list(tmp_path.glob('profile/plugins/profile/*/*.xplane.pb'))
