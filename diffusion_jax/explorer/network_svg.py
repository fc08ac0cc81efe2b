"""A network's map as SVG: a U of levels, its skip connections across, what each block is on hovering."""

import html
from collections.abc import Collection, Sequence

from diffusion_jax.models.inspection import NetworkBlock

WIDTH, BLOCK, GAP, MARGIN = 860, 26, 6, 18
COLUMN = 210
COLOURS = {
    'res_block': '#9ecae1',
    'attention': '#fdae6b',
    'transformer': '#fdae6b',
    'dit_block': '#fdae6b',
    'downsample': '#c7c7c7',
    'upsample': '#c7c7c7',
}
OTHER = '#d9d9e8'


def described(block: NetworkBlock) -> str:
    """A block in words, for hovering."""
    words = [block.path, block.kind.replace('_', ' ')]
    if block.output_shape is not None:
        words.append(f'gives {"x".join(map(str, block.output_shape))}')
    if block.heads:
        words.append(f'{block.heads} head{"s" * (block.heads > 1)}')
    words.append(f'{block.num_params:,} parameters')
    if block.skip_out is not None:
        words.append(f'makes skip {block.skip_out}')
    if block.skip_in is not None:
        words.append(f'takes skip {block.skip_in}')
    return ', '.join(words)


def _label(block: NetworkBlock) -> str:
    size = '' if block.resolution is None else f' {block.resolution[0]}x{block.resolution[1]}'
    channels = '' if block.channels is None else f'x{block.channels}' if size else f' {block.channels}'
    return f'{block.kind.replace("_", " ")}{size}{channels}'


def _places(blocks: Sequence[NetworkBlock]) -> tuple[dict[str, tuple[float, float]], float]:
    """(path -> the left upper corner, height): the way down left, up right, the middle between; the rest on top."""
    step = BLOCK + GAP
    places: dict[str, tuple[float, float]] = {}
    sides = {side: [block for block in blocks if block.side == side] for side in (None, 'down', 'middle', 'up')}
    across = (WIDTH - 2 * MARGIN) // (COLUMN + 10)
    for k, block in enumerate(sides[None]):
        places[block.path] = (MARGIN + (k % across) * (COLUMN + 10), MARGIN + (k // across) * step)
    top = MARGIN + -(-len(sides[None]) // across) * step + 14
    for k, block in enumerate(sides['down']):
        places[block.path] = (MARGIN, top + k * step)
    # The way up ends where the way down began.
    up, down = len(sides['up']), len(sides['down'])
    rows = max(up, down)
    for k, block in enumerate(sides['up']):
        places[block.path] = (WIDTH - MARGIN - COLUMN, top + (rows - 1 - k) * step)
    for k, block in enumerate(sides['middle']):
        places[block.path] = ((WIDTH - COLUMN) / 2, top + (rows + k) * step)
    bottom = max((y for _, y in places.values()), default=0.0) + BLOCK + MARGIN
    return places, bottom


def drawing(blocks: Sequence[NetworkBlock], chosen: str, removed: Collection[int] = ()) -> str:
    """The map as SVG. Elements with `data-block` are blocks; skips that are removed are dashed.

    Args:
      chosen: the path of the block that is marked.
      removed: numbers of skip connections.
    """
    places, height = _places(blocks)
    lines, boxes = [], []
    makers = {block.skip_out: block for block in blocks if block.skip_out is not None}
    for block in blocks:
        if block.skip_in in makers:
            (x0, y0), (x1, y1) = places[makers[block.skip_in].path], places[block.path]
            gone = ' class="gone"' if block.skip_in in removed else ''
            start, end = f'{x0 + COLUMN} {y0 + BLOCK / 2}', f'{x1} {y1 + BLOCK / 2}'
            middle = (x0 + COLUMN + x1) / 2
            lines.append(
                f'<path{gone} d="M {start} C {middle} {y0 + BLOCK / 2} {middle} {y1 + BLOCK / 2} {end}">'
                f'<title>skip {block.skip_in}</title></path>'
                f'<text class="skip" x="{x0 + COLUMN + 6}" y="{y0 + BLOCK / 2 - 3}">{block.skip_in}</text>'
            )
        x, y = places[block.path]
        mark = ' class="chosen"' if block.path == chosen else ''
        name = html.escape(block.path)
        boxes.append(
            f'<g data-block="{name}"{mark}><title>{html.escape(described(block))}</title>'
            f'<rect x="{x}" y="{y}" width="{COLUMN}" height="{BLOCK}" rx="4" fill="{COLOURS.get(block.kind, OTHER)}"/>'
            f'<text x="{x + 8}" y="{y + BLOCK / 2 + 4}">{html.escape(_label(block))}</text></g>'
        )
    return (
        f'<svg class="dj-map" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" role="img" '
        f'aria-label="map of the network">'
        f'{"".join(lines)}{"".join(boxes)}</svg>'
    )
