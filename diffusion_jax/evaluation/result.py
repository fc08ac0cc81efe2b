"""What an evaluator says."""

from typing import Any, NamedTuple

import numpy as np


class Result(NamedTuple):
    """Scores by name (numbers, or dicts of them), and pictures by name, uint8 [h, w, 3]."""

    scores: dict[str, Any]
    pictures: dict[str, np.ndarray]
