"""Bad input: one clear message, a non-zero exit, and nothing written."""

import sys

import pytest
from runs import TINY, files_below, load_config, run

from diffusion_jax import UsageError, command_line
from diffusion_jax.evaluation import evaluate
from diffusion_jax.pipelines.workdir import export, sample
from diffusion_jax.training.train import train


def test_a_refusal_is_one_message_without_a_traceback(tmp_path):
    status, output = run(f'--workdir={tmp_path / "run"}', '--config.sample.solver=dimm')
    assert status == 1
    assert output.startswith("error: unknown solver 'dimm'. Did you mean 'ddim'? Valid choices: ddim, ddpm, ")
    assert len(output.strip().splitlines()) == 1
    assert not (tmp_path / 'run').exists()


def test_help_shows_the_modes_and_an_example():
    status, output = run('--help')
    assert status in (0, 1)  # absl's own choice
    for word in (
        'train, sample, generate, evaluate, export, explore',
        '--mode',
        '--workdir',
        'python main.py --config=configs/digits.py',
    ):
        assert word in output


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], r'--config is missing.*configs/cifar10.py, configs/digits.py'),
        (['--config=configs/digit.py', '--workdir=x'], r"unknown config file.*Did you mean 'configs/digits.py'"),
        (['--config=configs/digits.py'], '--workdir is missing'),
        (['--config=configs/digits.py', '--workdir=x', '--mode=trian'], "unknown mode 'trian'. Did you mean 'train'"),
        (
            ['--config=configs/digits.py', '--workdir=x', '--config.sample.step=5'],
            r"key of configs/digits.py: 'sample.step'. Did you mean 'sample.steps'.*sample.seed",
        ),
        (['--config=configs/digits.py', '--workdir=x', '--config.sample.steps=many'], 'sample.steps=many'),
        (['--config=configs/digits.py', '--workdir=x', '--colour=red'], "Unknown command line flag 'colour'"),
    ],
)
def test_bad_flags_are_refused(arguments, message, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(TINY.parent.parent.parent)
    with pytest.raises(UsageError, match=message):
        parse(arguments, monkeypatch)


def parse(arguments, monkeypatch):
    """The flags of main.py, in a set of their own."""
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file('config', None, lock_config=True, flag_values=values)
    flags.DEFINE_string('workdir', None, '', flag_values=values)
    flags.DEFINE_string('mode', 'train', '', flag_values=values)
    flags.DEFINE_integer('verbosity', -1, '', flag_values=values)  # absl's own
    argv = ['main.py', *arguments]
    monkeypatch.setattr(flags, 'FLAGS', values)
    monkeypatch.setattr(sys, 'argv', argv)
    return command_line._parse(argv)


def test_a_pretrained_model_needs_neither_config_nor_workdir(monkeypatch):
    monkeypatch.chdir(TINY.parent.parent.parent)
    source = '--config.init_from=pretrained:digits'
    parse(['--mode=sample', source], monkeypatch)
    values = sys.modules['absl.flags'].FLAGS
    assert values.workdir == 'runs/pretrained_digits'
    assert values.config.data.name == 'digits'
    assert values.config.init_from == 'pretrained:digits'
    parse(['--mode=evaluate', '--config=configs/fashion_mnist.py', source, '--workdir=x'], monkeypatch)
    values = sys.modules['absl.flags'].FLAGS
    assert (values.workdir, values.config.data.name) == ('x', 'fashion_mnist')
    with pytest.raises(UsageError, match='--config is missing'):  # training is a run of its own
        parse([source], monkeypatch)


def test_to_generate_by_a_model_that_is_there_needs_neither_config_nor_workdir(monkeypatch):
    monkeypatch.chdir(TINY.parent.parent.parent)
    parse(['--mode=generate', '--config.init_from=somewhere'], monkeypatch)
    values = sys.modules['absl.flags'].FLAGS
    assert values.workdir == 'runs/generated'
    assert values.config.sample.solver is None
    parse(['--mode=generate', '--config.init_from=somewhere', '--workdir=x'], monkeypatch)
    assert sys.modules['absl.flags'].FLAGS.workdir == 'x'
    with pytest.raises(UsageError, match='--config is missing'):
        parse(['--mode=generate'], monkeypatch)


def test_to_explore_needs_nothing_and_takes_what_there_is(monkeypatch):
    monkeypatch.chdir(TINY.parent.parent.parent)
    parse(['--mode=explore'], monkeypatch)
    values = sys.modules['absl.flags'].FLAGS
    assert values.config.init_from == 'pretrained:fashion_mnist'
    assert values.workdir == 'runs/pretrained_fashion_mnist'
    parse(['--mode=explore', '--config.init_from=pretrained:digits'], monkeypatch)
    assert sys.modules['absl.flags'].FLAGS.config.data.name == 'digits'
    parse(['--mode=explore', '--config.init_from=somewhere'], monkeypatch)
    values = sys.modules['absl.flags'].FLAGS
    assert (values.config.init_from, values.workdir) == ('somewhere', 'runs/explored')
    parse(['--mode=explore', '--config=configs/digits.py', '--workdir=x'], monkeypatch)
    assert sys.modules['absl.flags'].FLAGS.config.init_from is None
    with pytest.raises(UsageError, match='--config is missing'):
        parse(['--mode=explore', '--workdir=x'], monkeypatch)


@pytest.mark.parametrize('server', [{'port': 80}, {'share': True}])
def test_port_and_share_are_for_exploring(server):
    with pytest.raises(UsageError, match='go with --mode=explore, not sample'):
        command_line.start('sample', load_config(), 'x', **server)


@pytest.mark.parametrize('texts', [{'prompts': ['a']}, {'negative_prompt': 'a'}, {'num': 1}])
def test_texts_are_for_generating(texts):
    with pytest.raises(UsageError, match='go with --mode=generate, not sample'):
        command_line.start('sample', load_config(), 'x', **texts)


def test_a_broken_config_file_is_named(tmp_path, monkeypatch):
    for text, message in [
        ('def get_config(:', 'invalid syntax'),
        (
            'from diffusion_jax.config import default_config\n'
            'def get_config():\n    c = default_config()\n    c.train.num_step = 3\n    return c\n',
            'num_step',
        ),
    ]:
        (tmp_path / 'broken.py').write_text(text)
        with pytest.raises(UsageError, match=f'broken.py cannot be read.*{message}'):
            parse([f'--config={tmp_path / "broken.py"}', '--workdir=x'], monkeypatch)


def with_unknown_key(config):
    with config.unlocked():
        config.train.numsteps = 3
    return config


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'data__name': 'mnist'}, "unknown dataset 'mnist'.*cifar10, digits, fashion_mnist, folder"),
        ({'data__name': 'cifar10', 'data__dir': 'no/such/folder'}, 'no/such/folder'),
        ({'data__name': 'digits', 'data__dir': 'somewhere'}, "option of dataset 'digits'.*'data_dir'"),
        ({'data__name': 'folder'}, "'folder' needs the options data_dir, resolution"),
        ({'data__resolution': 9}, 'resolution 9 cannot be halved 1 times'),
        ({'schedule__name': 'cosin'}, "unknown schedule 'cosin'. Did you mean 'cosine'"),
        ({'schedule__num_timesteps': 0}, 'num_timesteps must be at least 1'),
        ({'loss__prediction': 'epsilon'}, 'Valid choices: eps, flow, v, x0'),
        ({'loss__weighting__name': 'snr'}, 'min_snr, p2, simple, truncated_snr'),
        ({'loss__time_sampler': 'normal'}, 'stratified, uniform'),
        ({'optimizer__name': 'sgd'}, 'adam, adamw'),
        ({'model__name': 'vit'}, "unknown model 'vit'"),
        ({'model__attention_resolutions': (3,)}, 'attention_resolutions has 3'),
        ({'seed': -1}, 'seed must be 0 or more'),
        ({'label_dropout': 1.5}, r'label_dropout must be in \[0, 1\]'),
        ({'ema_decay': 1.0}, r'ema_decay must be in \[0, 1\)'),
        ({'train__num_steps': 0}, 'train.num_steps must be at least 1'),
        ({'train__checkpoint_every': 0}, 'train.checkpoint_every must be at least 1'),
        ({'train__batch_size': 12}, 'multiple of the 8 parts'),
        ({'sample__steps': 101}, r'steps must be in 1\.\.100'),
        ({'sample__spacing': 'even'}, 'leading, leading_offset, linspace'),
        ({'sample__labels': '3,12'}, r'labels must be among 0\.\.9'),
        ({'sample__variance': 'small'}, "option of solver 'ddim'"),
        ({'class_conditional': False}, 'unconditional'),
        ({'class_conditional': False, 'sample__guidance_scale': None}, 'class_agreement needs'),
        ({'evaluate__evaluators': ('fid',)}, "unknown evaluator 'fid'"),
        ({'evaluate__num': 0}, 'evaluate.num must be at least 1'),
    ],
)
def test_a_config_that_cannot_be_trained_writes_nothing(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        train(load_config(**changes), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_config_with_an_unknown_key_writes_nothing(tmp_path):
    with pytest.raises(UsageError, match=r'unknown keys: train\.numsteps\..*train\.num_steps'):
        train(with_unknown_key(load_config()), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('mode', [sample, evaluate, export])
def test_without_a_run_there_is_nothing_to_sample(mode, tmp_path):
    with pytest.raises(UsageError, match=r'no run in .*--mode=train'):
        mode(load_config(), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('mode', [train, sample, evaluate, export])
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'model__channels': 16}, r'another config.*model\.channels: 8 -> 16'),
        ({'seed': 1, 'data__flip': True}, r'data\.flip: False -> True; seed: 0 -> 1'),
    ],
)
def test_a_workdir_of_another_config_is_left_alone(mode, changes, message, workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
    with pytest.raises(UsageError, match=message):
        mode(load_config(**changes), workdir)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*')} == before


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'sample__solver': 'eular'}, "unknown solver 'eular'"),
        ({'sample__labels': '10'}, r'labels must be among 0\.\.9'),
        ({'sample__checkpoint': 'last'}, 'best, newest'),
        ({'sample__num': 0}, 'at least 1'),
    ],
)
def test_samples_that_cannot_be_drawn_write_nothing(changes, message, workdir):
    before = files_below(workdir)
    with pytest.raises(UsageError, match=message):
        sample(load_config(**changes), workdir)
    assert files_below(workdir) == before


def test_a_run_without_a_checkpoint_yet_says_so(workdir, tmp_path):
    (tmp_path / 'config.json').write_text((workdir / 'config.json').read_text())
    with pytest.raises(UsageError, match='no checkpoint in'):
        sample(load_config(), tmp_path)
    (tmp_path / 'config.json').write_text('{"config"')
    with pytest.raises(UsageError, match='damaged'):
        sample(load_config(), tmp_path)
