"""Small drawings as SVG: a curve with marks on it."""

import html
from collections.abc import Sequence

import numpy as np

WIDTH, HEIGHT, LEFT, BOTTOM = 560, 130, 44, 24


def curve(
    xs: Sequence[float],
    ys: Sequence[float],
    marks: Sequence[float],
    at: float,
    title: str,
    what: str,
) -> str:
    """y against x in [0, 1], drawn from 1 (noise) on the left to 0 (data), as sampling goes.

    Args:
      marks: x of small marks on the curve.
      at: x of the large one.
      what: y, in words.
    """
    xs, ys = np.asarray(xs, float), np.asarray(ys, float)
    low, high = float(ys.min()), float(ys.max())

    def place(x, y):
        across = LEFT + (1 - x) * (WIDTH - LEFT - 10)
        return across, 8 + (high - y) / max(high - low, 1e-9) * (HEIGHT - BOTTOM - 8)

    def height(x):
        return np.interp(x, xs, ys)

    points = ' '.join(f'{a:.1f},{b:.1f}' for a, b in (place(x, y) for x, y in zip(xs, ys, strict=True)))
    dots = ''.join('<circle cx="{:.1f}" cy="{:.1f}" r="2.5"/>'.format(*place(x, height(x))) for x in marks)
    now = '<circle class="now" cx="{:.1f}" cy="{:.1f}" r="6"/>'.format(*place(at, height(at)))
    floor = HEIGHT - BOTTOM + 4
    return (
        f'<svg class="dj-curve" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" '
        f'aria-label="{html.escape(title)}">'
        f'<polyline points="{points}"/>{dots}{now}'
        f'<text x="{LEFT - 6}" y="14" text-anchor="end">{high:.3g}</text>'
        f'<text x="{LEFT - 6}" y="{floor - 2}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">t = 1, noise</text>'
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(what)}</text>'
        f'<text x="{WIDTH - 10}" y="{HEIGHT - 6}" text-anchor="end">t = 0, data</text></svg>'
    )
