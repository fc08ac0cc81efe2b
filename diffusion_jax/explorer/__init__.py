"""The explorer: a page that looks into a trained model, live.

    python main.py --mode=explore                      # the Fashion-MNIST model that ships
    from diffusion_jax import explorer; explorer.launch()    # in a notebook, too

It needs the extra `explorer`: pip install -e '.[explorer]'.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.errors import UsageError
from diffusion_jax.explorer import checks
from diffusion_jax.explorer.subject import Subject, broken, given, of_config, shipped
from diffusion_jax.pipelines.images import ImagePipeline

__all__ = ['Subject', 'build', 'launch', 'of_config', 'serve', 'shipped']

PORT = 7860


def _gradio() -> Any:
    """Gradio, told to report nothing, or a `UsageError` that says how to install it."""
    os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
    os.environ.setdefault('HF_HUB_DISABLE_TELEMETRY', '1')
    try:
        import gradio
        import plotly  # noqa: F401  (the plots need it: better said now)
    except ImportError as error:
        raise UsageError(
            f"the explorer needs Gradio and Plotly ({error}): install them with pip install -e '.[explorer]'."
        ) from error
    return gradio


def build(subject: Subject | Exception | None = None) -> Any:
    """The page of a model as `gradio.Blocks`, not yet served.

    Args:
      subject: the model; the one that ships by default. Or what kept it from being read, which the page then says.

    Raises:
      UsageError: Gradio is not installed.
    """
    gr = _gradio()
    from diffusion_jax.explorer import assembly

    if isinstance(subject, Exception):
        return assembly.build_broken(gr, broken(subject))
    return assembly.build(gr, subject or shipped())


def serve(blocks: Any, port: int = PORT, share: bool = False, block: bool = True, **options: Any) -> Any:
    """Serves a page on this machine alone; `share` asks Gradio for a public link as well.

    Nothing is written outside a temporary folder, and no file can be read over HTTP but those that Gradio itself put
    there. Options are those of `gradio.Blocks.launch`.
    """
    gr = _gradio()
    from diffusion_jax.explorer import page

    if not 0 <= port <= 65535:
        raise UsageError(f'--port must be in 0..65535 (0: any that is free), got {port}.')
    if 'GRADIO_TEMP_DIR' not in os.environ:  # one a process, gone with it
        os.environ['GRADIO_TEMP_DIR'] = tempfile.mkdtemp(prefix='diffusion_jax_explorer_')
        atexit.register(shutil.rmtree, os.environ['GRADIO_TEMP_DIR'], ignore_errors=True)
    blocks.queue(default_concurrency_limit=1, max_size=page.QUEUE, api_open=False)
    fonts = {'font': ['system-ui', 'sans-serif'], 'font_mono': ['ui-monospace', 'monospace']}
    settings = {
        'server_name': '127.0.0.1',
        'server_port': port or None,
        'share': share,
        'inbrowser': False,
        'quiet': True,
        'show_error': False,
        'allowed_paths': [],
        'max_file_size': checks.MAX_UPLOAD_BYTES,
        'enable_monitoring': False,
        'ssr_mode': False,
        'pwa': False,
        'mcp_server': False,
        'footer_links': [],
        'state_session_capacity': 100,
        'theme': gr.themes.Base(**fonts),
        'css': page.CSS,
        'head': page.SCRIPT,
        'prevent_thread_lock': True,
    }
    app, local, public = blocks.launch(**{**settings, **options})
    if block:
        print(f'the explorer is at {public or local} (Ctrl-C ends it)', flush=True)
        blocks.block_thread()
    return app, local, public


def launch(
    pipeline: ImagePipeline | None = None,
    *,
    name: str = 'your model',
    images: np.ndarray | None = None,
    share: bool = False,
    port: int = 0,
    block: bool = False,
    **options: Any,
) -> Any:
    """Opens the explorer on a pipeline: in a notebook, below the cell; in a script, at the address that it returns.

    Args:
      pipeline: the model; by default the Fashion-MNIST model that ships.
      name: of it, for the reader.
      images: real ones, uint8 [N, H, W, C] of its shape, to put noise on; by default what the model draws.
      share: a public link through Gradio's servers, for a notebook that runs elsewhere. Colab needs none.
      port: on 127.0.0.1; 0 takes one that is free.
      block: whether to stay until Ctrl-C.
      options: of `gradio.Blocks.launch`.

    Raises:
      UsageError: Gradio is not installed, or the images do not fit.
    """
    subject = shipped() if pipeline is None else given(pipeline, name, images)
    return serve(build(subject), port, share, block, **options)


def explore(config: Any, workdir: str | Path, port: int = PORT, share: bool = False) -> None:
    """`--mode=explore`: the page of a config's run, or of its `init_from`; it says so if the model cannot be read."""
    import logging

    from diffusion_jax.compilation import use_cache

    _gradio()
    use_cache(workdir)
    try:
        subject: Subject | Exception = of_config(config, workdir)
    except Exception as error:
        logging.getLogger(__name__).warning('the model cannot be read: %s', error)
        subject = error
    serve(build(subject), port, share)
