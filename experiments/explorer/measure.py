"""How long the explorer takes: to its first view, cold and warm; to answer a drag of t; to draw 20 steps.

    python experiments/explorer/measure.py

Each in a browser, headless Chromium, on `python main.py --mode=explore`. Needs the extras explorer and browser.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / 'tests' / 'explorer'))

from browsing import Browser, start  # noqa: E402

PORT = 7931
ADDRESS = f'http://127.0.0.1:{PORT}/'
DRAGS = 40


def served(cache: str) -> subprocess.Popen:
    """The command, once it answers."""
    process = subprocess.Popen(
        [sys.executable, 'main.py', '--mode=explore', f'--port={PORT}'],
        cwd=ROOT,
        env=os.environ | {'JAX_COMPILATION_CACHE_DIR': cache, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'},
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        try:
            urllib.request.urlopen(ADDRESS, timeout=5).close()
            return process
        except OSError:
            time.sleep(0.05)
    raise SystemExit('the explorer did not start.')


def first_view(browser: Browser, cache: str) -> tuple[float, float, subprocess.Popen]:
    """(seconds from the command until the server answers, from there until the first pictures are there, the server)"""
    began = time.monotonic()
    process = served(cache)
    answers = time.monotonic()
    browser.driver.get(ADDRESS)
    browser.until(lambda: browser.text('#t'))
    return answers - began, time.monotonic() - answers, process


def end(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait(30)


def main() -> None:
    cache = tempfile.mkdtemp()
    driver = start()
    browser = Browser(driver, ADDRESS)
    try:
        for kind in ('cold', 'warm'):
            start_s, view_s, process = first_view(browser, cache)
            print(f'{kind}: {start_s:.1f} s from the command to the server, {view_s:.1f} s more to the first view')
            if kind == 'cold':
                draw(browser)
                end(process)
        compiled = browser.compiled()
        times = []
        for k in range(DRAGS):
            t = round(0.05 + 0.9 * ((k * 7) % DRAGS) / DRAGS, 3)
            times.append(1000 * browser.dragged('forward-t', t))
        print(
            f'dragging t: median {statistics.median(times):.0f} ms, 95% {sorted(times)[int(0.95 * DRAGS)]:.0f} ms, '
            f'{browser.compiled() - compiled} programs compiled'
        )
        print(f'20 steps, first time in this process: {draw(browser):.2f} s')
        print(f'20 steps, warm: {statistics.median(draw(browser, seed) for seed in (1, 2, 3)):.2f} s')
        end(process)
    finally:
        driver.quit()
        shutil.rmtree(cache, ignore_errors=True)


def draw(browser: Browser, seed: int = 0) -> float:
    """Seconds from Draw until the sample is there."""
    browser.go_to('Reverse')
    browser.until(lambda: 'of 20' in browser.text('#x_t') and browser.all('#change'))
    browser.write('reverse-seed', str(seed + 100))
    before = browser.js('return document.querySelector("#x0 img").src')
    began = time.monotonic()
    browser.click('#reverse-draw')
    browser.until(
        lambda: browser.all('#change') and browser.js('return document.querySelector("#x0 img").src') != before
    )
    return time.monotonic() - began


if __name__ == '__main__':
    main()
