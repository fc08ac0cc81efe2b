"""Plotly figures as plain dicts: what they hold can be looked at without Plotly."""

from collections.abc import Sequence
from typing import Any

import numpy as np

COLOURS = ('#2166ac', '#b2182b', '#1b7837', '#e08214', '#762a83', '#01665e', '#8c510a', '#c51b7d', '#4d4d4d', '#35978f')


def numbers(values: Any) -> list[float | None]:
    """Floats for JSON: what is not finite is a gap."""
    return [float(value) if np.isfinite(value) else None for value in np.asarray(values, np.float64)]


def axis(panel: int) -> str:
    return '' if panel == 0 else str(panel + 1)


def points(panel: int, x: Any, y: Any, name: str, legend: bool = True, **looks: Any) -> dict[str, Any]:
    """A trace of panel 0, 1, ..: those of one name are shown and hidden together."""
    return {
        'type': 'scatter',
        'x': numbers(x),
        'y': numbers(y),
        'name': name,
        'legendgroup': name,
        'showlegend': legend,
        'xaxis': f'x{axis(panel)}',
        'yaxis': f'y{axis(panel)}',
        **looks,
    }


def panels(
    titles: Sequence[str], x_title: str, log: Sequence[int] = (), columns: int = 2, height: int = 640
) -> dict[str, Any]:
    """A layout of panels side by side, of which those in `log` have a logarithmic y."""
    rows = -(-len(titles) // columns)
    layout: dict[str, Any] = {
        'height': height,
        'hovermode': 'closest',
        'template': 'none',
        'margin': {'l': 60, 'r': 20, 't': 40, 'b': 50},
        'legend': {'orientation': 'h', 'y': -0.1},
        'paper_bgcolor': 'white',
        'plot_bgcolor': 'white',
        'font': {'family': 'sans-serif', 'size': 12},
        'annotations': [],
    }
    for k, title in enumerate(titles):
        row, column = divmod(k, columns)
        left, right = column / columns + 0.03 * bool(column), (column + 1) / columns - 0.03 * (column + 1 < columns)
        top, bottom = 1 - row / rows - 0.08 * bool(row), 1 - (row + 1) / rows + 0.04 * (row + 1 < rows)
        layout[f'xaxis{axis(k)}'] = {
            'domain': [left, right],
            'anchor': f'y{axis(k)}',
            'title': {'text': x_title if row + 1 == rows else ''},
            'gridcolor': '#e5e5e5',
            'zeroline': False,
        }
        layout[f'yaxis{axis(k)}'] = {
            'domain': [bottom, top],
            'anchor': f'x{axis(k)}',
            'gridcolor': '#e5e5e5',
            'zeroline': False,
            'exponentformat': 'power',
            **({'type': 'log'} if k in log else {}),
        }
        layout['annotations'].append(
            {
                'text': title,
                'x': left,
                'y': top,
                'xref': 'paper',
                'yref': 'paper',
                'xanchor': 'left',
                'yanchor': 'bottom',
                'showarrow': False,
                'font': {'size': 13},
            }
        )
    return layout
