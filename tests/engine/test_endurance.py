"""2,000 requests of all kinds through one engine leave every block free, and memory flat."""

import gc
import random
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import load
from tokenmill.producer.params import SamplingParams

REQUESTS, AHEAD, SAMPLE_EVERY, WARM_UP = 2000, 24, 100, 5
#: Fewer than 16 sequences ask for.
BLOCKS = 120
#: Bytes between samples at the median: the allocator takes some megabytes now and then, while what
#: leaks with each request shows in every sample.
FLAT_BYTES = 128 << 10
#: Objects of Python that 1,500 requests may leave behind: fewer than one for ten.
FLAT_OBJECTS = 150


@pytest.fixture
def engine(
    tiny_checkpoint: Callable[..., tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    directory, _ = tiny_checkpoint("llama")
    model = load(str(directory), device="cpu")
    memory = BLOCKS * 4 * 4 * model.spec.kv_token_elements
    engine = Engine(
        model, EngineConfig(token_budget=64, max_num_seqs=16, block_size=4, kv_cache_memory=memory)
    )
    # It expects every output to end with the next token, and admits too many.
    monkeypatch.setattr(engine.scheduler.output_lengths, "expect", lambda so_far=0: so_far + 1)
    yield engine
    torch.set_num_threads(threads)


def resident() -> int:
    """Bytes of this process that are no file's."""
    gc.collect()
    status = Path("/proc/self/status").read_text()
    (found,) = re.findall(r"RssAnon:\s+(\d+) kB", status)
    return int(found) << 10


def request(draw: random.Random) -> tuple[list[int], SamplingParams]:
    shared = [7 + draw.randrange(3)] * draw.randrange(0, 40)
    prompt = shared + [draw.randrange(3, 331) for _ in range(draw.randrange(1, 40))]
    return prompt, SamplingParams(
        max_tokens=draw.randrange(1, 24),
        temperature=draw.choice([0.0, 1.0]),
        top_p=draw.choice([1.0, 0.9]),
        repetition_penalty=draw.choice([1.0, 1.2]),
        logprobs=draw.choice([None, 2]),
        prompt_logprobs=draw.choice([None, None, 1]),
        ignore_eos=draw.random() < 0.5,
    )


@pytest.mark.slow
def test_every_block_is_free_and_memory_is_flat(engine: Engine) -> None:
    draw = random.Random(0)
    alive: list[str] = []
    ended, sent, sizes, objects = 0, 0, list[int](), list[int]()
    while ended < REQUESTS:
        while sent < REQUESTS and len(alive) < AHEAD:
            prompt, params = request(draw)
            engine.add(str(sent), prompt, params, seed=sent)
            alive.append(str(sent))
            sent += 1
        over = [output.seq_id for output in engine.step() if output.finish_reason is not None]
        if draw.random() < 0.05 and (left := [name for name in alive if name not in over]):
            over.append(draw.choice(left))
            engine.abort(over[-1])
        for name in over:
            alive.remove(name)
        if ended // SAMPLE_EVERY != (ended + len(over)) // SAMPLE_EVERY:
            sizes.append(resident())
            objects.append(len(gc.get_objects()))
            engine.check_integrity()
        ended += len(over)
    pool = engine.scheduler.pool
    assert engine.stats().num_preemptions > 0
    assert pool.num_free == pool.num_blocks == BLOCKS
    assert not engine.has_work
    print("RssAnon, MiB:", [size >> 20 for size in sizes], "objects:", objects)
    steps = [after - before for before, after in pairwise(sizes[WARM_UP:])]
    assert median(steps) < FLAT_BYTES
    assert min(objects[-3:]) - max(objects[WARM_UP : WARM_UP + 3]) < FLAT_OBJECTS
