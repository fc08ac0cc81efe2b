"""The page of a run."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from runs import load_config

from diffusion_jax.evaluation import evaluate, evaluate_pipeline
from diffusion_jax.evaluation.report import write_report
from diffusion_jax.pipelines import load_pipeline
from diffusion_jax.training.metrics import read_metrics
from diffusion_jax.training.train import train


@pytest.fixture(scope='module')
def page(workdir):
    return (workdir / 'report.html').read_text()


def test_the_page_needs_no_other_file_and_no_network(page):
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) >= 4
    assert all(source.startswith('data:image/') for source in sources)
    assert 'http' not in re.sub(r'data:[^"]*', '', page)
    for source in sources:
        kind, content = source.split(';base64,')
        content = base64.b64decode(content)
        if kind == 'data:image/png':
            assert np.asarray(Image.open(io.BytesIO(content))).std() > 0
        else:
            assert content.startswith(b'<?xml')


def test_the_page_tells_of_the_run(page, workdir):
    for title in ('Scores', 'Curves', 'From noise to image', 'Samples during training', 'Timings', 'Config'):
        assert f'<h2>{title}</h2>' in page
    value = json.loads((workdir / 'evaluation.json').read_text())['scores']['class_agreement']
    assert f'class agreement</td><td class=number>{value:.4g}' in page
    assert (workdir / 'evaluation' / 'samples.png').exists()
    assert 'The first of the samples that were scored' in page
    assert page.index('step 12') < page.index('step 6')
    assert '<td>optimizer.learning_rate</td><td class=number>0.001</td>' in page


def test_names_cannot_become_markup(workdir, tmp_path):
    config = load_config()
    config.data.dir = '<script>alert(1)</script>'
    (tmp_path / '<b>').mkdir()
    path = write_report(config, tmp_path / '<b>', load_pipeline(workdir)[0], 12)
    assert '<script>' not in path.read_text()
    assert '<b>' not in path.read_text()


@pytest.mark.slow
def test_scores_during_training_are_written_with_the_metrics(tmp_path):
    config = load_config(
        evaluate__every=6, evaluate__num_during_training=70, evaluate__evaluators=('frechet_distance',)
    )
    config.evaluate.num = 70
    train(config, tmp_path)
    rows = {row['step']: row['frechet_distance'] for row in read_metrics(tmp_path) if 'frechet_distance' in row}
    assert list(rows) == [6, 12]
    final = json.loads((tmp_path / 'evaluation.json').read_text())['scores']['frechet_distance']
    assert rows[12] == pytest.approx(final, rel=1e-6)  # the same samples


def test_an_evaluation_says_what_repeats_it_and_does(workdir, tmp_path):
    config = load_config(evaluate__evaluators=('frechet_distance', 'bits_per_dim'), evaluate__num_likelihood=8)
    config.evaluate.num = 70
    config.init_from = str(workdir)
    first, second = (evaluate(config, tmp_path / name) for name in 'ab')
    assert first['scores'] == second['scores']
    assert 0 < first['scores']['bits_per_dim'] < 20
    told = json.loads((tmp_path / 'a' / 'evaluation.json').read_text())
    assert told == json.loads(json.dumps(first))
    assert told['step'] == 12
    assert told['features']['name'] == 'digits'
    assert len(told['features']['sha256']) == 64
    assert told['config']['sample']['seed'] == 0
    assert set(told['versions']) >= {'jax', 'flax', 'numpy', 'python'}
    assert not list((tmp_path / 'a' / 'evaluation').glob('*.parts'))


@pytest.mark.slow
def test_one_two_and_eight_devices_score_the_same(workdir, tmp_path):
    import jax

    from diffusion_jax import data
    from diffusion_jax.training.sharding import make_mesh

    config = load_config(
        evaluate__evaluators=('frechet_distance', 'precision_recall', 'class_agreement', 'bits_per_dim')
    )
    config.evaluate.num, config.evaluate.num_likelihood = 70, 8
    splits = data.load('digits')
    reports = []
    for count in (1, 2, 8):
        pipeline, step = load_pipeline(workdir, mesh=make_mesh(devices=jax.devices()[:count]))
        reports.append(evaluate_pipeline(pipeline, splits, config, tmp_path / str(count), step)['scores'])
    for other in reports[1:]:
        for name, value in reports[0].items():
            if isinstance(value, float):
                assert other[name] == pytest.approx(value, rel=1e-3), name
            else:
                assert other[name] == value
