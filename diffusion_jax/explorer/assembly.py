"""All tabs on one page: those that a model has something to show in."""

from typing import Any

from diffusion_jax.explorer import (
    forward,
    guidance_grid,
    latent_view,
    network,
    pictures,
    prompt,
    reverse,
    schedule_plot,
    solver_plot,
)
from diffusion_jax.explorer.page import SECONDS_KEPT, Page
from diffusion_jax.explorer.subject import Subject, settings_of

TITLE = 'diffusion explorer'


def tabs_of(subject: Subject) -> dict[str, Any]:
    """Name -> module of the tabs that a model has, in their order."""
    has = settings_of(subject)
    everything = {
        'forward': (forward, True),
        'reverse': (reverse, True),
        'schedules': (schedule_plot, True),
        'network': (network, network.has_map(subject)),
        'guidance': (guidance_grid, has['guided']),
        'samplers': (solver_plot, True),
        'latents': (latent_view, has['latents']),
        'prompt': (prompt, has['text']),
    }
    return {name: module for name, (module, wanted) in everything.items() if wanted}


def build(gr: Any, subject: Subject) -> Any:
    page = Page(subject)
    with gr.Blocks(
        title=f'{TITLE}: {subject.name}', analytics_enabled=False, delete_cache=(600, SECONDS_KEPT)
    ) as blocks:
        page.footer = gr.HTML(page.footer_text(), render=False, elem_id='footer')
        page.ready = gr.Textbox(visible=False)
        items = {}
        with gr.Tabs() as tabs:
            for name, module in tabs_of(subject).items():
                with gr.Tab(module.TITLE, id=name, elem_id=f'tab-{name}') as items[name]:
                    module.tab(page)
        page.footer.render()
        for name, item in items.items():
            page.selected(item, name)
        page.loaded(blocks, tabs)
        page.wire_stops()
    return blocks


def build_broken(gr: Any, text: str) -> Any:
    """A page that says why there is nothing to see."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.HTML(pictures.message(text), elem_id='broken')
    return blocks
