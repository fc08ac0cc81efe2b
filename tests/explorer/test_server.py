"""The server: what hostile callers send over its HTTP API, who may read what, and who waits for whom."""

import json
import shutil
import threading
import time
import urllib.error
import urllib.request
import uuid

import jax
import numpy as np
import pytest
from pages import pictures_of
from runs import ROOT, load_config

from diffusion_jax import explorer, pretrained
from diffusion_jax.explorer import build, checks, serve
from diffusion_jax.images import to_uint8
from diffusion_jax.pipelines import stepwise

pytestmark = pytest.mark.browser

DIGITS = ROOT / 'diffusion_jax' / 'shipped' / 'digits.safetensors'


def window(driver, address):
    """A `browsing.Browser`: imported here, as this file is read where there is no Selenium, too."""
    from browsing import Browser

    return Browser(driver, address)


def near(ours, theirs):
    return bool(np.abs(ours.astype(int) - theirs.astype(int)).max() <= 1)


class Client:
    """A session that speaks to the page's HTTP API, as a program would."""

    def __init__(self, address: str):
        self.address = address.rstrip('/')
        self.session = uuid.uuid4().hex
        self.config = self.get('/config')

    def get(self, path: str):
        with urllib.request.urlopen(self.address + path, timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, path: str, body, timeout: float = 60):
        """(status, answer)"""
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {'Content-Type': 'application/json'}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors='replace')

    def number_of(self, label: str, event: str) -> dict:
        """The dependency that an event of the widget with this elem_id starts."""
        (widget,) = [c['id'] for c in self.config['components'] if c['props'].get('elem_id') == label]
        return next(d for d in self.config['dependencies'] if [widget, event] in [list(t) for t in d['targets']])

    def call(self, label: str, event: str, data: list):
        """Of an event that is answered at once."""
        body = {'data': data, 'fn_index': self.number_of(label, event)['id'], 'session_hash': self.session}
        return self.post('/gradio_api/run/predict', body)

    def join(self, label: str, event: str, data: list) -> str:
        """Of an event that waits in the queue: its number."""
        body = {'data': data, 'fn_index': self.number_of(label, event)['id'], 'session_hash': self.session}
        status, answer = self.post('/gradio_api/queue/join', body)
        assert status == 200, answer
        return answer['event_id']

    def messages(self, patience: float = 120):
        """What the queue says to this session."""
        url = f'{self.address}/gradio_api/queue/data?session_hash={self.session}'
        with urllib.request.urlopen(url, timeout=patience) as stream:
            for line in stream:
                if line.startswith(b'data:'):
                    message = json.loads(line[5:])
                    yield message
                    if message['msg'] in ('close_stream', 'process_completed'):
                        return

    def result(self):
        return [message for message in self.messages() if message['msg'] == 'process_completed'][-1]


@pytest.fixture
def client(address):
    return Client(address)


FORWARD = [3, "the model's", '1000', 0.5, 0, None]
REVERSE = ['7', 1.5, 0, 'ddim', 'none', 6, 0]


def test_the_api_answers_what_the_page_shows(client):
    status, answer = client.call('forward-t', 'input', FORWARD)
    assert status == 200
    assert {'image', 'jump', 'chain', 'eps'} <= set(pictures_of(answer['data'][0]))


@pytest.mark.parametrize(
    'changes',
    [
        {3: 1e308},
        {3: None},
        {3: 'half'},
        {3: [0.5]},
        {3: {'a': 1}},
        {0: 10**12},
        {0: -1},
        {0: '../../etc/passwd'},
        {1: '__import__("os")'},
        {1: None},
        {1: ['cosine']},
        {2: '99999999'},
        {2: 99999999},
        {4: 2**63},
        {4: -5},
        {5: {'path': '/etc/passwd'}},
    ],
)
def test_hostile_values_are_refused_and_the_server_goes_on(client, changes):
    data = [changes.get(k, value) for k, value in enumerate(FORWARD)]
    began = time.monotonic()
    status, answer = client.call('forward-t', 'input', data)
    assert time.monotonic() - began < 30
    text = answer if isinstance(answer, str) else json.dumps(answer)
    assert 'Traceback' not in text
    assert '/root' not in text
    assert 'site-packages' not in text
    if status == 200 and 5 not in changes:
        assert 'dj-message' in answer['data'][0]
    assert client.call('forward-t', 'input', FORWARD)[0] == 200


@pytest.mark.parametrize(
    'body', [{}, {'data': []}, {'data': [1] * 5000, 'fn_index': 0}, {'data': 'x', 'fn_index': 'y'}, []]
)
def test_requests_that_are_none_do_no_harm(client, body):
    status, answer = client.post('/gradio_api/run/predict', body)
    assert status >= 400
    assert 'Traceback' not in str(answer)
    assert client.call('forward-t', 'input', FORWARD)[0] == 200


@pytest.mark.parametrize('steps', [101, 10**9, -1, 1e300])
def test_a_run_that_is_too_long_is_refused(client, steps):
    data = [*REVERSE[:5], steps, 0]
    client.join('reverse-draw', 'click', data)
    answer = client.result()
    text = json.dumps(answer)
    assert 'steps must be' in text or 'is greater than' in text or 'is less than' in text or not answer['success']
    assert 'Traceback' not in text


@pytest.mark.parametrize(
    'path',
    [
        '/gradio_api/file=/etc/passwd',
        '/gradio_api/file=/etc/../etc/passwd',
        '/gradio_api/file=../../../../etc/passwd',
        '/gradio_api/file=%2Fetc%2Fpasswd',
        '/gradio_api/file=setup.cfg',
        '/gradio_api/file=./main.py',
        '/gradio_api/file=diffusion_jax/shipped/digits.safetensors',
        '/gradio_api/file=file:///etc/passwd',
        '/gradio_api/file//etc/passwd',
        '/file=/etc/passwd',
        '/static/../../../../../etc/passwd',
        '/assets/..%2f..%2f..%2f..%2fetc%2fpasswd',
        '/gradio_api/proxy=http://127.0.0.1:1/',
    ],
)
def test_no_file_can_be_read(client, path):
    try:
        with urllib.request.urlopen(client.address + path, timeout=30) as answer:
            status, content = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    assert b'root:' not in content
    assert b'[metadata]' not in content
    assert status >= 400, (path, content[:200])


def test_a_file_of_the_server_is_no_upload(client):
    for path in ('/etc/passwd', __file__):
        (widget,) = [d for d in client.config['dependencies'] if any(t[1] == 'upload' for t in d['targets'])]
        data = [{'path': path, 'meta': {'_type': 'gradio.FileData'}}]
        body = {'data': data, 'fn_index': widget['id'], 'session_hash': client.session}
        status, answer = client.post('/gradio_api/run/predict', body)
        assert status >= 400
        assert 'root:' not in str(answer)


def test_an_upload_that_is_too_large_is_refused(client):
    boundary = 'x' * 20
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'.encode()
    body = head + bytes(checks.MAX_UPLOAD_BYTES + 10) + f'\r\n--{boundary}--\r\n'.encode()
    kind = {'Content-Type': f'multipart/form-data; boundary={boundary}'}
    request = urllib.request.Request(f'{client.address}/gradio_api/upload', body, kind)
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request, timeout=60)
    assert refusal.value.code == 413


def test_it_listens_on_this_machine_alone(address):
    assert address.startswith('http://127.0.0.1:')
    config = Client(address).config
    assert not config.get('analytics_enabled')
    assert config.get('space_id') is None


def test_the_schema_of_the_api_is_empty(client):
    info = client.get('/gradio_api/info')
    assert info['named_endpoints'] == {}


def test_two_sessions_do_not_mix(address, digits):
    one, two = Client(address), Client(address)
    for client, seed in ((one, 1), (two, 2)):
        client.join('reverse-draw', 'click', [*REVERSE[:2], seed, *REVERSE[3:]])
        assert client.result()['success']
    for client, seed in ((one, 1), (two, 2), (one, 1)):
        status, answer = client.call('reverse-moment', 'input', [None, 4])
        assert status == 200
        settings = {'labels': [7], 'guidance_scale': 1.5, 'seed': seed, 'solver': 'ddim', 'steps': 6}
        expected = to_uint8(digits.pipeline.trajectory(1, **settings).x[4, 0])
        found = pictures_of(answer['data'][0])['x_t']
        assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1
    stranger = Client(address)
    assert 'press Draw' in stranger.call('reverse-moment', 'input', [None, 4])[1]['data'][0]


@pytest.mark.parametrize(('tab', 'query'), [('reverse', {'steps': '100'}), ('guidance', {'steps': '40'})])
def test_a_run_that_is_stopped_frees_the_server(browser, monkeypatch, tab, query):
    """Its calls end, the page says so and goes on saying it, and another session's run is served at once."""
    made = []
    advance = stepwise._advance

    def slow(*args, **kwargs):
        made.append(time.monotonic())
        time.sleep(0.15)
        return advance(*args, **kwargs)

    monkeypatch.setattr(stepwise, '_advance', slow)
    browser.open(tab=tab, **query)
    browser.until(lambda: len(made) > 5)
    browser.click(f'#{tab}-stop')
    browser.until(lambda: 'stopped' in browser.text(f'#{tab}-stopped'))
    time.sleep(1)
    stopped_at = len(made)
    assert stopped_at < 30
    time.sleep(1.5)
    assert len(made) == stopped_at
    # A picture that was on its way has arrived by now.
    assert 'stopped' in browser.text(f'#{tab}-stopped')
    assert len(made) == stopped_at
    other = Client(browser.address)
    other.join('reverse-draw', 'click', REVERSE)
    assert other.result()['success']
    assert len(made) == stopped_at + 6


def test_who_goes_away_stops_the_run(address, monkeypatch):
    made = []
    advance = stepwise._advance

    def slow(*args, **kwargs):
        made.append(1)
        time.sleep(0.15)
        return advance(*args, **kwargs)

    monkeypatch.setattr(stepwise, '_advance', slow)
    client = Client(address)
    client.join('reverse-draw', 'click', [*REVERSE[:5], 100, 0])
    messages = client.messages()
    while len(made) < 3:
        next(messages)
    messages.close()  # and the connection with it
    for _ in range(40):
        before = len(made)
        time.sleep(1)
        if len(made) == before:
            break
    assert len(made) < 90


def test_one_sampler_at_a_time_and_light_requests_are_not_kept_waiting(address, monkeypatch):
    running, most = [0], [0]
    advance = stepwise._advance

    def slow(*args, **kwargs):
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.1)
        result = advance(*args, **kwargs)
        running[0] -= 1
        return result

    monkeypatch.setattr(stepwise, '_advance', slow)
    clients = [Client(address) for _ in range(3)]
    for client in clients:
        client.join('reverse-draw', 'click', REVERSE)
    results = []
    threads = [threading.Thread(target=lambda c=client: results.append(c.result())) for client in clients]
    for thread in threads:
        thread.start()
    began = time.monotonic()
    status, _ = Client(address).call('forward-t', 'input', FORWARD)
    assert status == 200
    assert time.monotonic() - began < 5
    for thread in threads:
        thread.join(120)
    assert len(results) == 3
    assert all(result['success'] for result in results)
    assert most[0] == 1


def test_what_fails_at_the_first_view_is_said_in_its_own_tab(browser):
    browser.open(tab='guidance', low='5', high='-5')
    message = browser.until(lambda: browser.text('#guidance-message .dj-message'))
    assert 'low < high' in message


def nothing(workdir, folder):
    return load_config(), folder / 'nothing'


def half_a_file(workdir, folder):
    (folder / 'half.safetensors').write_bytes(DIGITS.read_bytes()[:-1000])
    return load_config(init_from=str(folder / 'half.safetensors')), folder / 'nothing'


def another_file(workdir, folder):
    return load_config(init_from=str(ROOT / 'README.md')), folder / 'nothing'


def damaged_checkpoints(workdir, folder):
    shutil.copytree(workdir, folder / 'damaged')
    for path in (folder / 'damaged' / 'checkpoints').rglob('*'):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return load_config(), folder / 'damaged'


@pytest.mark.parametrize(
    ('damage', 'said'),
    [
        (nothing, 'no run in'),
        (half_a_file, 'half.safetensors is no safetensors file, or is damaged'),
        (another_file, 'README.md'),
        (damaged_checkpoints, 'none of the checkpoints in'),
    ],
)
def test_a_broken_model_says_so_on_the_page(driver, workdir, tmp_path, monkeypatch, damage, said):
    config, folder = damage(workdir, tmp_path)
    built = []
    monkeypatch.setattr(explorer, 'serve', lambda blocks, port, share: built.append(blocks))
    explorer.explore(config, folder)
    (blocks,) = built
    _, address, _ = serve(blocks, port=0, block=False)
    try:
        driver.get(address)
        browser = window(driver, address)
        browser.until(lambda: said in browser.text('#broken'))
    finally:
        blocks.close()


def test_tabs_are_those_of_the_model(driver, digits, stable, unlabelled):
    always = ['Forward', 'Reverse', 'Schedules']
    for subject, wanted in (
        (digits, [*always, 'U-Net', 'Guidance', 'Samplers']),
        (stable, [*always, 'U-Net', 'Guidance', 'Samplers', 'Latents', 'Prompt']),
        (unlabelled, [*always, 'U-Net', 'Samplers']),
    ):
        blocks = build(subject)
        _, address, _ = serve(blocks, port=0, block=False)
        try:
            browser = window(driver, address)
            browser.open(tab='reverse', steps='3')
            found = browser.until(lambda b=browser: [tab.text for tab in b.all('button[role=tab]') if tab.text])
            assert found == wanted
            browser.until(lambda b=browser: b.picture('change') is not None)
            assert bool(browser.all('#reverse-label')) == bool(subject.pipeline.num_classes)
            assert bool(browser.all('#reverse-scale')) == (subject is not unlabelled)
            if subject is stable:
                browser.go_to('Latents')
                browser.until(lambda b=browser: b.picture('latent_back') is not None)
                browser.slide('latents-fraction', 1.0)
                browser.until(lambda b=browser: near(b.picture('latent_between'), b.picture('latent_other_back')))
                browser.go_to('Prompt')
                browser.slide('prompt-steps', 3)
                browser.click('#prompt-draw')
                browser.until(
                    lambda b=browser: b.picture('attention_1') is not None and 'of 4' in b.text('#prompt_call')
                )
                settings = {'prompts': ['a picture'], 'guidance_scale': 5.0, 'seed': 0, 'steps': 3}
                expected = subject.pipeline(1, **settings).images[0]
                assert np.abs(browser.picture('prompt_image_0').astype(int) - expected).max() <= 2
        finally:
            blocks.close()


def test_the_page_opens_with_eight_devices_too(driver):
    """A batch of one on a mesh of several: the pipeline rounds it up."""
    from dataclasses import replace

    from diffusion_jax.explorer import shipped

    subject = replace(shipped('digits'), pipeline=pretrained('digits'))
    assert len(jax.devices()) == 8
    blocks = build(subject)
    _, address, _ = serve(blocks, port=0, block=False)
    try:
        browser = window(driver, address)
        browser.open(tab='network')
        browser.until(lambda: browser.picture('network_activations') is not None)
    finally:
        blocks.close()


def test_two_windows_at_once(address, browser):
    """Two browsers, two views: neither sees the other's."""
    from browsing import start

    second = window(start(), address)
    try:
        browser.open(tab='reverse', seed='1', steps='4')
        second.open(tab='reverse', seed='2', steps='4')
        for each in (browser, second):
            each.until(lambda w=each: 'state 4 of 4' in w.text('#x_t'))
        browser.slide('reverse-moment', 2)
        browser.until(lambda: 'state 2 of 4' in browser.text('#x_t'))
        assert 'state 4 of 4' in second.text('#x_t')
        assert not np.array_equal(browser.picture('x0'), second.picture('x0'))
    finally:
        second.driver.quit()
