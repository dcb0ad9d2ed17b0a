"""The nano workload: 256 requests, prompts and outputs uniform in 100-1024 tokens, seed 0."""

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch

from tokenmill.engine.engine import Engine, StepOutput
from tokenmill.producer.params import SamplingParams

#: (prompt, tokens to generate).
Request = tuple[list[int], int]
TEMPERATURE = 0.6
#: Token ids of prompts are below.
VOCABULARY = 10_000


def nano_requests(requests: int, low: int, high: int, vocabulary: int) -> list[Request]:
    """Requests whose lengths are uniform in [low, high]."""
    draw = random.Random(0)
    prompts = [
        [draw.randrange(vocabulary) for _ in range(draw.randint(low, high))]
        for _ in range(requests)
    ]
    return [(prompt, draw.randint(low, high)) for prompt in prompts]


def other_prompts(requests: Sequence[Request], turn: int, vocabulary: int) -> list[Request]:
    """The same lengths, and other tokens each turn: nothing is found in the prefix cache."""
    return [([(t + turn) % vocabulary for t in prompt], length) for prompt, length in requests]


def add_all(engine: Engine, requests: Sequence[Request]) -> None:
    for number, (prompt, output) in enumerate(requests):
        params = SamplingParams(max_tokens=output, temperature=TEMPERATURE, ignore_eos=True)
        engine.add(str(number), prompt, params, seed=number)


def is_prefilling(engine: Engine) -> bool:
    scheduler = engine.scheduler
    return bool(scheduler.waiting) or any(seq.is_prefilling for seq in scheduler.running)


def run_workload(engine: Engine, requests: Sequence[Request]) -> dict[str, float | None]:
    """Drain the workload: rates over wall time, and what of a step the host waited.

    `host_ms_per_step`: wall time less the waiting for tokens that are on their way; None where an
    engine in turns waits within torch, unseen. `allocations` should be none after the first run.

    Raises:
        RuntimeError: a request ended with an error, or with fewer tokens than asked for.
    """
    before, allocated = engine.stats(), num_allocations()
    started, steps, generated = time.perf_counter(), 0, 0
    add_all(engine, requests)
    with waiting() as waited:
        while engine.has_work:
            generated += num_tokens(engine.step())
            steps += 1
    seconds = time.perf_counter() - started
    after = engine.stats()
    expected = sum(output for _, output in requests)
    if generated != expected:
        raise RuntimeError(f"expected {expected} tokens, got {generated}")
    return {
        "seconds": seconds,
        "steps": steps,
        "output_tokens": generated,
        "output_tokens_per_s": generated / seconds,
        "total_tokens_per_s": (generated + sum(len(p) for p, _ in requests)) / seconds,
        "mean_batch": generated / steps,
        "preemptions": after.num_preemptions - before.num_preemptions,
        "step_ms": 1e3 * seconds / steps,
        "allocations": num_allocations() - allocated,
        "host_ms_per_step": 1e3 * (seconds - waited[0]) / steps if waited[0] else None,
    }


def num_allocations() -> int:
    """Blocks of memory that torch has asked CUDA for, of the device and pinned: each waits."""
    if not torch.cuda.is_available():
        return 0
    device, host = torch.cuda.memory_stats(), torch.cuda.host_memory_stats()
    return int(device.get("num_device_alloc", 0)) + int(host.get("num_host_alloc", 0))


def num_tokens(outputs: Sequence[StepOutput]) -> int:
    """Tokens of a step.

    Raises:
        RuntimeError: a request ended with an error.
    """
    if errors := [output.error for output in outputs if output.error]:
        raise RuntimeError(errors[0])
    return sum(len(output.token_ids) for output in outputs)


@contextmanager
def waiting() -> Iterator[list[float]]:
    """The list's number grows by the seconds that are spent waiting for events of the device."""
    spent = [0.0]
    plain = torch.cuda.Event.synchronize

    def synchronize(event: torch.cuda.Event) -> None:
        started = time.perf_counter()
        plain(event)
        spent[0] += time.perf_counter() - started

    with patch.object(torch.cuda.Event, "synchronize", synchronize):
        yield spent
