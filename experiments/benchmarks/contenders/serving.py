"""A contender waits in a process of its own: a line of JSON in, a line of JSON out. It sleeps while another works."""

import json
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def serve(parts: dict[str, Callable[..., dict[str, Any]]]) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print must not look like an answer
    for line in sys.stdin:
        request = json.loads(line)
        answer = parts[request.pop('part')](**request)
        answers.write(json.dumps(answer) + '\n')
        answers.flush()


def peak_host_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(function: Callable[[], Any]) -> float:
    """Seconds of a call that returns when its work is done."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began
