"""Claim to be tested on a GPU: nothing in a launch makes the host wait for the device.

Random traffic through an engine one step ahead in graphs: filters, seeds, log probabilities,
penalties, biases, `min_tokens`, ends, aborts, a cache of few blocks. torch warns of every operation
that waits while a step is launched; where it stood is told and counted. Captures do wait, once a
size, and are left out. Then the books must balance, and every request must have ended.

    python bench/gpu_sync.py --out OUTDIR [--steps 400] [--tiny]
"""

import random
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from gpu_device import QWEN3_06B, check_device, gpu_arguments, tiny, write_gpu_result
from gpu_engine import random_model
from gpu_modes import BEST

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.producer.params import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
#: What torch's warnings of operations that wait say.
WAITS = "called a synchronizing"
#: Whose waiting does not count: a size is captured once.
CAPTURE = "_capture"


class Waits:
    """Where launches wait, how often, and how many launches there were."""

    def __init__(self) -> None:
        self.launches = 0
        self.seconds = 0.0
        self.places: Counter[str] = Counter()

    def warned(self, message: Warning | str, *_: object) -> None:
        """For `warnings.showwarning`: count by the lines of ours that led there."""
        frames = traceback.extract_stack()
        if WAITS not in str(message) or any(frame.name == CAPTURE for frame in frames):
            return
        ours = [f for f in frames if _is_ours(f.filename)][-4:]
        self.places[" < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in ours[::-1])] += 1

    def launching(self, launch: Callable[..., Any]) -> Callable[..., Any]:
        """The same, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            with _warning(self.warned):
                ticket = launch(*args, **kwargs)
            self.launches += 1
            self.seconds += time.perf_counter() - started
            return ticket

        return watched


def _is_ours(file: str) -> bool:
    path = Path(file).resolve()
    return ROOT in path.parents and path.parent != ROOT / "bench"


@contextmanager
def _warning(show: Callable[..., None]) -> Iterator[None]:
    """torch warns of what waits, each time, by `show`."""
    has_gpu = torch.cuda.is_available()
    with warnings.catch_warnings(), patch.object(warnings, "showwarning", show):
        warnings.simplefilter("always")
        if has_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if has_gpu:
                torch.cuda.set_sync_debug_mode("default")


def drawn_params(draw: random.Random, vocabulary: int, most: int) -> SamplingParams:
    """Some of all that a request can ask for."""
    asked: dict[str, Any] = {"max_tokens": draw.randint(1, most), "temperature": 0.0}
    if draw.random() < 0.8:
        asked["temperature"] = draw.choice([0.6, 1.0])
        asked["top_k"] = draw.choice([0, 0, 1, 20])
        asked["top_p"] = draw.choice([1.0, 1.0, 0.9])
        asked["min_p"] = draw.choice([0.0, 0.0, 0.05])
    if draw.random() < 0.3:
        asked["logprobs"] = draw.randint(0, 3)
    if draw.random() < 0.1:
        asked["prompt_logprobs"] = 1
    if draw.random() < 0.2:
        asked["presence_penalty"], asked["frequency_penalty"] = 0.3, 0.2
    if draw.random() < 0.2:
        asked["repetition_penalty"] = 1.2
    if draw.random() < 0.2:
        asked["logit_bias"] = {draw.randrange(vocabulary): 2.0}
    if draw.random() < 0.2:
        asked["min_tokens"] = draw.randint(0, asked["max_tokens"])
        asked["stop_token_ids"] = (draw.randrange(vocabulary),)
    return SamplingParams(**asked)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Requests come for so many steps or seconds; the most that wait, and their most tokens."""

    steps: int
    seconds: float
    waiting: int
    prompt: int
    output: int

    def run(self, engine: Engine) -> dict[str, int]:
        """Requests that come, go and are aborted, to the end of the last."""
        draw = random.Random(0)
        ends, added, ended, open_ids = time.perf_counter() + self.seconds, 0, 0, set[str]()
        while True:
            is_over = engine.stats().num_steps >= self.steps or time.perf_counter() > ends
            while not is_over and len(engine.scheduler.waiting) < self.waiting:
                length = draw.randint(1, self.prompt)
                prompt = [draw.randrange(engine.vocab_size) for _ in range(length)]
                params = drawn_params(draw, engine.vocab_size, self.output)
                engine.add(str(added), prompt, params, seed=added)
                open_ids.add(str(added))
                added += 1
            if open_ids and draw.random() < 0.05:
                name = draw.choice(sorted(open_ids))
                engine.abort(name)
                open_ids.discard(name)
            if not open_ids:
                break
            for output in engine.step():
                if output.finish_reason is not None:
                    open_ids.discard(output.seq_id)
                    ended += 1
        engine.check_integrity()
        return {"steps": engine.stats().num_steps, "requests": added, "ended": ended}


def main() -> None:
    parser = gpu_arguments(__doc__, 40)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    check_device(options)
    model = random_model(tiny(QWEN3_06B) if options.tiny else QWEN3_06B)
    size: dict[str, Any] = {"token_budget": 512, "max_num_seqs": 32, "kv_cache_memory": 512 << 20}
    if options.tiny:
        size = {"token_budget": 32, "max_num_seqs": 4, "kv_cache_memory": 1 << 18, "block_size": 16}
    engine = Engine(
        model, EngineConfig(max_model_len=256 if options.tiny else 1024, **size, **BEST)
    )
    waits = Waits()
    executor = engine._executor  # noqa: SLF001 (a launch is nobody else's)
    traffic = Traffic(options.steps, options.seconds, waiting=8, prompt=400, output=60)
    if options.tiny:
        traffic = Traffic(10, options.seconds, waiting=1, prompt=20, output=4)
    with patch.object(executor, "launch", waits.launching(executor.launch)):
        found = traffic.run(engine)
    content = {
        "is_tiny": options.tiny,
        "traffic": found,
        "launches": waits.launches,
        "launch_ms": 1e3 * waits.seconds / max(waits.launches, 1),
        "waits": [{"at": at, "times": times} for at, times in waits.places.most_common()],
    }
    write_gpu_result(options.out, "gpu_sync", content)
    for at, times in waits.places.most_common():
        print(f"{times} x {at}")


if __name__ == "__main__":
    main()
