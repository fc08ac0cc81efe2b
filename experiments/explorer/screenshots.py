"""Opens each tab of the explorer in headless Chromium and writes what it shows to docs/explorer/.

    python experiments/explorer/screenshots.py

Needs the extras explorer and browser, and Debian's chromium and chromium-driver. The latents and the prompt are of a
tiny Stable Diffusion, untrained, that the tests have; `--text_model=FOLDER` takes one that draws something.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / 'tests' / 'explorer'))

import numpy as np  # noqa: E402
from browsing import Browser, start  # noqa: E402
from PIL import Image  # noqa: E402

from diffusion_jax import data, explorer  # noqa: E402
from diffusion_jax.compilation import use_cache  # noqa: E402
from diffusion_jax.explorer import subject as subjects  # noqa: E402
from diffusion_jax.pipelines import load_pipeline  # noqa: E402

FOLDER = ROOT / 'docs' / 'explorer'
LARGEST = 150_000  # bytes of a screenshot
VIEWS = {
    'forward': ({'tab': 'forward', 'image': 7, 't': 0.35}, '#chain img'),
    'reverse': (
        {'tab': 'reverse', 'label': 'Bag', 'seed': 3, 'second': 'dpmpp_2m', 'steps': 12, 'state': 7},
        '#apart img',
    ),
    'schedules': (
        {'tab': 'schedules', 'names': 'linear,cosine,flow', 'zero': 'true', 'shift': 3, 'steps': 8},
        '#schedules-plot .js-plotly-plot',
    ),
    'network': (
        {'tab': 'network', 'image': 7, 'label': 'Sneaker', 'block': 'up.0.blocks.0.res', 'without': 'skip 0'},
        '#network_carried img',
    ),
    'guidance': ({'tab': 'guidance', 'label': 'Sandal', 'scale': 3}, '#row_15 img'),
    'samplers': ({'tab': 'samplers', 'solvers': 'ddim,dpmpp_2m,ddpm'}, '#samplers-paths .js-plotly-plot'),
}
TEXT_VIEWS = {
    'latents': ({'tab': 'latents', 'fraction': 0.4}, '#latent_between img'),
    'prompt': ({'tab': 'prompt', 'prompt': 'a red heart', 'steps': 10, 'images': 2}, '#attention_1 img'),
}


def shot(browser: Browser, name: str, query: dict, wanted: str) -> None:
    """Waits for what the view is about, and takes the whole page."""
    browser.open(**query)
    browser.until(lambda: browser.all(wanted) and not browser.all('.dj-note'))
    time.sleep(2)  # Plotly draws
    height = int(browser.js('return document.documentElement.scrollHeight'))
    browser.driver.set_window_size(1300, min(max(height + 140, 700), 1700))
    time.sleep(1)
    path = FOLDER / f'{name}.png'
    browser.driver.save_screenshot(str(path))
    picture = Image.open(path).convert('RGB')
    pixels = np.asarray(picture)
    used = np.flatnonzero((pixels != 255).any(axis=(1, 2)))
    picture = picture.crop((0, 0, picture.width, min(int(used[-1]) + 16, picture.height)))
    picture.save(path, optimize=True)
    if path.stat().st_size > LARGEST:  # then in fewer colours
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f'{path.relative_to(ROOT)}: {size / 1000:.0f} kB')
    if size > LARGEST:
        raise SystemExit(f'{path} is larger than {LARGEST} bytes.')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--text_model', default=str(ROOT / 'tests' / 'fixtures' / 'interop' / 'sd1'))
    parser.add_argument('--latent_model', help='the folder of a run on latents of Fashion-MNIST')
    arguments = parser.parse_args()
    use_cache(ROOT / 'runs' / 'pretrained_fashion_mnist')
    from diffusion_jax.interop.load import load

    shown = [
        (subjects.shipped(), VIEWS),
        (subjects.given(load(arguments.text_model), Path(arguments.text_model).name), TEXT_VIEWS),
    ]
    if arguments.latent_model:
        pipeline, _ = load_pipeline(arguments.latent_model)
        images = data.examples('fashion_mnist').images
        shown.append((subjects.given(pipeline, 'Fashion-MNIST in latents', images), {'latents': TEXT_VIEWS['latents']}))
    driver = start()
    try:
        for subject, views in shown:
            blocks = explorer.build(subject)
            _, address, _ = explorer.serve(blocks, port=0, block=False)
            for name, (query, wanted) in views.items():
                shot(Browser(driver, address), name, query, wanted)
            blocks.close()
    finally:
        driver.quit()


if __name__ == '__main__':
    main()
