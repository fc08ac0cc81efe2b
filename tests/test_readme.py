"""The README's words are true: its example runs as written, its names exist."""

import re

import jax.numpy as jnp
from runs import ROOT

README = (ROOT / 'README.md').read_text()


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


def test_every_config_is_in_its_table():
    for path in (ROOT / 'configs').glob('*.py'):
        assert f'(configs/{path.name})' in README
