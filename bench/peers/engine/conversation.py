"""What each peer of bench/cpu_engine.py does: load a model, then run the workloads it is told to.

Standard library alone: it runs in the virtual environment of each peer. Wishes come as a line of
JSON on stdin each, {"path": workload file}; replies go as a line of JSON on stdout each. The first
line says what runs: versions, settings, seconds it took to load. With `is_cold` nothing is run to
warm up, and a line of its own, {"first": true}, says when the first token is there.

A workload file is JSON: a list of [token ids of the prompt, tokens to generate]. Ends are ignored,
the likeliest token is taken.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Request = tuple[list[int], int]
#: Runs requests, all there at once, and returns the tokens generated for each; calls the function
#: given as soon as there is a token.
Run = Callable[[Sequence[Request], Callable[[], None]], list[list[int]]]

WARM_UP = 8


def converse(
    load: Callable[[], tuple[Run, dict[str, Any]]], packages: Sequence[str], *, is_cold: bool
) -> None:
    """Answer until stdin ends; `load` returns the function that runs, and its settings."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed, by whomever, is no reply
    started = time.perf_counter()
    run, settings = load()
    seconds = time.perf_counter() - started
    versions = {name: version(name) for name in packages}
    _say(replies, {"versions": versions, "settings": settings, "load_s": seconds})
    if not is_cold:
        made_up = [([37 * n % 999 for n in range(40 + number)], 12) for number in range(WARM_UP)]
        run(made_up, lambda: None)

    def first() -> None:
        if is_cold:
            _say(replies, {"first": True})

    for line in sys.stdin:
        requests = [tuple(item) for item in json.loads(Path(json.loads(line)["path"]).read_text())]
        started = time.perf_counter()
        outputs = run(requests, first)
        seconds = time.perf_counter() - started
        lengths = [len(output) for output in outputs]
        if lengths != [length for _, length in requests]:
            raise SystemExit(f"asked for {[n for _, n in requests]} tokens, got {lengths}")
        _say(replies, {"seconds": seconds, "outputs": outputs})


def _say(replies: Any, what: dict[str, Any]) -> None:
    replies.write(json.dumps(what) + "\n")
    replies.flush()
