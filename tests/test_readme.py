"""The README's words are true: its example runs as written, its names exist."""

import re

import jax
import jax.numpy as jnp
from runs import ROOT

from diffusion_jax import samplers
from diffusion_jax.evaluation import EVALUATORS
from diffusion_jax.evaluation.features import FEATURES

README = (ROOT / 'README.md').read_text()
SAMPLING = (ROOT / 'docs' / 'sampling.md').read_text()
EVALUATION = (ROOT / 'docs' / 'evaluation.md').read_text()


def test_the_library_example_runs_as_written():
    (example,) = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
    names = {}
    exec(example, names)
    assert names['images'].shape == (4, 16, 16, 3)
    assert jnp.isfinite(names['images']).all()
    assert jnp.abs(names['gradient']['conv_out']['kernel']).max() > 0
    statements = [line for line in example.splitlines() if line.strip()]
    assert len(statements) <= 20


def test_every_file_that_it_names_is_there():
    for target in re.findall(r'\]\(([^)#:]+)\)', README) + re.findall(r'--config=(\S+\.py)', README):
        assert (ROOT / target).exists(), target
    for page in (ROOT / 'docs').glob('*.md'):
        for target in re.findall(r'\]\(([^)#:]+)\)', page.read_text()):
            assert (page.parent / target).exists(), (page, target)


def test_the_page_on_sampling_runs_as_written():
    """Its first example, and those that start from images; the one on guidance needs a network with labels."""
    first, guided, editing = re.findall(r'```python\n(.*?)```', SAMPLING, re.DOTALL)
    names = {}
    exec(first, names)
    names |= {'images': names['images'][:2], 'key': jax.random.key(3), 'mask': jnp.ones((8, 8, 1)).at[:, 4:].set(0)}
    exec(editing, names)
    for name in ('varied', 'noise', 'back', 'between', 'filled'):
        assert jnp.isfinite(names[name]).all(), name
    assert jnp.abs(names['back'] - names['images']).max() < 0.2
    compile(guided, 'sampling.md', 'exec')


def test_the_page_on_sampling_holds_the_table_of_solvers_and_every_spacing():
    assert samplers.describe() in SAMPLING
    for spacing in samplers.SPACINGS:
        assert f'`{spacing}`' in SAMPLING


def test_every_config_is_in_its_table():
    for path in (ROOT / 'configs').glob('*.py'):
        assert f'(configs/{path.name})' in README


def test_the_page_on_evaluation_names_all_there_is_and_runs_as_written(capsys):
    for name in (*EVALUATORS, *FEATURES, 'auto'):
        assert f'`{name}`' in EVALUATION
    (example,) = re.findall(r'```python\n(.*?)```', EVALUATION, re.DOTALL)
    # With the model whose data come with scikit-learn, and the fewest samples that 64 features take.
    exec(example.replace('fashion_mnist', 'digits').replace('1000', '65'), {})
    assert "'frechet_distance': " in capsys.readouterr().out
