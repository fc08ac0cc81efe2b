"""A headless Chromium on the explorer, and what a test does with it. Needs the extras explorer and browser."""

import base64
import io
import json
import tempfile
import time
from urllib.parse import urlencode

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

CHROMIUM, DRIVER = '/usr/bin/chromium', '/usr/bin/chromedriver'
SWITCHES = (
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--disable-dev-shm-usage',
    '--window-size=1360,1400',
)
PATIENCE = 120  # seconds: a shared machine may have to compile in between


def start() -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL', 'performance': 'ALL'})
    for switch in (*SWITCHES, f'--user-data-dir={tempfile.mkdtemp()}'):
        options.add_argument(switch)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


def decoded(uri: str) -> np.ndarray:
    """The pixels of a PNG's data URI, [H, W, C]."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition('base64,')[2]))))
    return pixels[..., None] if pixels.ndim == 2 else pixels


class Browser:
    """One window of a browser."""

    def __init__(self, driver: webdriver.Chrome, address: str):
        self.driver, self.address = driver, address

    def open(self, **query) -> None:
        self.driver.get(f'{self.address}?{urlencode(query)}')
        self.until(lambda: self.all('#footer .dj-footer'))

    def until(self, done, what: str = '', patience: float = PATIENCE):
        """The first true answer of done()."""
        end, failed = time.monotonic() + patience, None
        while time.monotonic() < end:
            try:
                if answer := done():
                    return answer
            except WebDriverException as error:  # the page was drawing
                failed = error
            time.sleep(0.05)
        raise AssertionError(f'the page did not come to it {what}, in {patience} s: {failed!r:.300}')

    def all(self, selector: str):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def js(self, script: str, *args):
        return self.driver.execute_script(script, *args)

    def text(self, selector: str) -> str:
        return self.js('const e = document.querySelector(arguments[0]); return e && e.textContent', selector) or ''

    def picture(self, name: str) -> np.ndarray | None:
        uri = self.js('const e = document.querySelector(arguments[0]); return e && e.src', f'#{name} img')
        return None if not uri else decoded(uri)

    def click(self, selector: str) -> None:
        element = self.until(lambda: self.all(selector))[0]
        self.js('arguments[0].scrollIntoView({block: "center"})', element)
        self.until(lambda: element.click() or True, selector, 10)

    def go_to(self, title: str) -> None:
        tab = next(element for element in self.all('button[role=tab]') if element.text.strip() == title)
        tab.click()

    def slide(self, name: str, value: float) -> None:
        """Moves a slider as a drag does: its value, and the event."""
        self.js(
            'const e = document.querySelector(arguments[0]); e.value = arguments[1];'
            "for (const name of ['input', 'change', 'pointerup']) e.dispatchEvent(new Event(name, {bubbles: true}))",
            f'#{name} input[type=range]',
            value,
        )

    def drag(self, name: str, value: float) -> None:
        """Takes a slider's knob with the mouse, moves it and lets go; the keys do the last bit."""
        knob = self.all(f'#{name} input[type=range]')[0]
        self.js('arguments[0].scrollIntoView({block: "center"})', knob)
        low, high, step, now = (float(knob.get_attribute(key) or 1) for key in ('min', 'max', 'step', 'value'))
        width = knob.size['width'] - 16

        def place(at):
            return round((at - low) / (high - low) * width - width / 2)

        actions = ActionChains(self.driver).move_to_element_with_offset(knob, place(now), 0).click_and_hold()
        actions.move_to_element_with_offset(knob, place(value), 0).release().perform()
        for _ in range(200):
            found = float(knob.get_attribute('value'))
            if abs(found - value) < step / 2:
                break
            knob.send_keys(Keys.ARROW_RIGHT if found < value else Keys.ARROW_LEFT)
        self.js("arguments[0].dispatchEvent(new Event('pointerup', {bubbles: true}))", knob)

    def dragged(self, name: str, t: float) -> float:
        """Seconds from a slider's move until the page has drawn what it says, by the page's own clock."""
        return self.driver.execute_async_script(
            """
            const [name, t, done] = arguments;
            const began = performance.now();
            const check = () => document.querySelector('#t')?.textContent.startsWith(String(t))
              ? done((performance.now() - began) / 1000) : requestAnimationFrame(check);
            const slider = document.querySelector(`#${name} input[type=range]`);
            slider.value = t;
            slider.dispatchEvent(new Event('input', {bubbles: true}));
            check();
            """,
            name,
            t,
        )

    def write(self, name: str, value: str) -> None:
        """Types into a number or a text, and leaves it."""
        field = self.all(f'#{name} input, #{name} textarea')[0]
        field.send_keys(Keys.CONTROL, 'a')
        field.send_keys(value)
        self.js('arguments[0].blur()', field)

    def choose(self, name: str, option: str) -> None:
        """An option of a dropdown."""
        field = self.all(f'#{name} input')[0]
        field.click()
        field.send_keys(Keys.CONTROL, 'a')
        field.send_keys(option.split(':')[0], Keys.ENTER)

    def code(self, tab: str) -> str:
        """The Python that the page gives."""
        folded = f'document.querySelector("#{tab}-code")'
        return self.js(
            f'const e = {folded}; const v = e && e.querySelector(".cm-content"); return v && v.cmView ? '
            'v.cmView.view.state.doc.toString() : (v ? v.innerText : "")'
        )

    def compiled(self) -> int:
        return int(self.js('return document.querySelector("#compiled").dataset.count'))

    def requests(self) -> list[str]:
        """Where the page has asked for anything since this was last called."""
        entries = [json.loads(entry['message'])['message'] for entry in self.driver.get_log('performance')]
        sent = [entry['params'] for entry in entries if entry['method'] == 'Network.requestWillBeSent']
        return [params['request']['url'] for params in sent if params.get('documentURL', '').startswith('http')]

    def plot(self, name: str) -> list[dict] | None:
        """The traces of a Plotly plot, as the page has them."""
        return self.js(
            'const p = document.querySelector(arguments[0] + " .js-plotly-plot");'
            'return p && p.data && JSON.parse(JSON.stringify(p.data))',
            f'#{name}',
        )
