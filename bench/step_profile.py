"""`StepProfile`: where the wall time of steps goes, by the parts of the engine.

Each part is timed around its calls; a call inside another counts for the inner one alone.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from tokenmill.engine import engine as engine_module
from tokenmill.engine import executor as executor_module
from tokenmill.engine.models.decoder import Decoder
from tokenmill.engine.models.layer_program import LayerProgram
from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.mlp import MLP
from tokenmill.engine.models.norm import Norm
from tokenmill.engine.scheduler import Scheduler
from tokenmill.kernels import ops

#: Whose time is divided among the parts that it has itself.
_PROGRAM = "program"
#: (where, attribute, part).
PARTS: tuple[tuple[Any, str, str], ...] = (
    (engine_module.Engine, "step", "rest of the step"),
    (Decoder, "forward", "between the ops"),
    (LayerProgram, "run", _PROGRAM),
    (Decoder, "logits", "head"),
    (Linear, "__call__", "linears"),
    (MLP, "__call__", "MLP's activation"),
    (Norm, "__call__", "norms"),
    (Norm, "add", "norms"),
    (ops, "paged_attention", "attention"),
    (ops, "rope_store_kv", "rope and KV write"),
    (executor_module, "sample", "sampler"),
    (executor_module, "build_batch", "batch"),
    (Scheduler, "schedule", "scheduler"),
    (Scheduler, "mark_computed", "scheduler"),
)


class StepProfile:
    """Seconds and calls by part, and the processor time of all threads."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.cpu_s = 0.0
        #: The parts that are running, each with the seconds of the calls inside it.
        self._running: list[tuple[str, list[float]]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Time everything that runs meanwhile."""
        started = time.process_time()
        with ExitStack() as stack:
            for where, name, part in PARTS:
                timed = self._timed(getattr(where, name), part)
                stack.enter_context(patch.object(where, name, timed))
            yield
        self.cpu_s += time.process_time() - started

    def _timed(self, call: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            inside: list[float] = []
            within = self._running[-1] if self._running else ("", [])
            name = "head" if within[0] == "head" else part
            self._running.append((name, inside))
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                taken = time.perf_counter() - started
                self._running.pop()
                within[1].append(taken)
                own = {name: 1.0} if name != _PROGRAM else args[0].part_shares()
                for one, share in own.items():
                    self.seconds[one] += share * (taken - sum(inside))
                    self.calls[one] += 1

        return timed

    def figures(self) -> dict[str, object]:
        """Seconds and calls of each part, the longest first."""
        ranked = sorted(self.seconds.items(), key=lambda item: -item[1])
        return {
            "processor_s": self.cpu_s,
            "parts": {
                name: {"seconds": seconds, "calls": self.calls[name]} for name, seconds in ranked
            },
        }

    def lines(self) -> list[str]:
        """The same as a table, with each part's share."""
        total = sum(self.seconds.values())
        ranked = sorted(self.seconds.items(), key=lambda item: -item[1])
        return [
            f"  {part:18} {seconds:7.2f} s {seconds / total:6.1%} {self.calls[part]:8} calls"
            for part, seconds in ranked
        ] + [f"  processor time {self.cpu_s:.1f} s in {total:.1f} s of steps"]
