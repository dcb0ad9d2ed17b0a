"""Where all layers have a window: blocks that it has passed are free, and nobody misses them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.block_table import BlockTables
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel, load
from tokenmill.engine.sequence import Sequence
from tokenmill.producer.params import SamplingParams

WINDOW, BLOCK = 21, 4


@pytest.fixture
def mistral(tiny_checkpoint: Callable[..., tuple[Path, Any]]) -> tuple[LoadedModel, Any]:
    directory, reference = tiny_checkpoint("mistral", sliding_window=WINDOW)
    return load(str(directory), device="cpu"), reference


def poison(engine: Engine) -> None:
    """Overwrite every block that no running sequence holds: who reads one gets NaN."""
    held = {block for seq in engine.scheduler.running for block in seq.held_blocks}
    free = [b for b in range(engine.scheduler.pool.num_blocks) if b not in held]
    for layer in (*engine._runner._cache.keys, *engine._runner._cache.values):
        layer[free] = torch.nan


@pytest.mark.parametrize("blocks", [27, 80], ids=["tight", "roomy"])
def test_blocks_behind_the_window_are_free_and_never_read(
    mistral: tuple[LoadedModel, Any], blocks: int
) -> None:
    """The tokens of transformers, with far fewer blocks than three sequences have tokens."""
    model, reference = mistral
    block_bytes = model.spec.kv_token_elements * 4 * BLOCK
    engine = Engine(
        model,
        EngineConfig(
            token_budget=16, max_num_seqs=3, block_size=BLOCK, prefix_caching=False,
            kv_cache_memory=blocks * block_bytes,
        ),
    )  # fmt: skip
    engine.scheduler.output_lengths.record(1)
    prompts = [[(7 * n + 31 * p) % 320 + 5 for p in range(60 + 5 * n)] for n in range(3)]
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, SamplingParams(max_tokens=30, ignore_eos=True), seed=0)
    outputs: dict[str, list[int]] = {str(number): [] for number in range(3)}
    most = 0
    while engine.has_work:
        for output in engine.step():
            outputs[output.seq_id] += output.token_ids
        engine.check_integrity()
        most = max([most, *(len(seq.held_blocks) for seq in engine.scheduler.running)])
        poison(engine)
    assert most <= -(-(WINDOW + 16) // BLOCK) + 2
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    for prompt, answer in zip(prompts, outputs.values(), strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + answer])).logits
        assert answer == logits[0, len(prompt) - 1 : -1].argmax(dim=-1).tolist()


def make_sequence(length: int) -> Sequence:
    return Sequence(
        seq_id="a",
        token_ids=list(range(length)),
        num_prompt_tokens=length,
        params=SamplingParams(),
        seed=0,
        max_num_tokens=length + 1,
    )


def test_a_prefix_is_cached_as_long_as_its_end_is() -> None:
    """What the window of the next query does not reach may have been evicted."""
    pool = BlockPool(12, BLOCK)
    tables = BlockTables(pool, window=9)
    seq = make_sequence(40)
    for _ in range(10):
        tables.grow(seq, BLOCK)
        tables.mark_computed(seq, BLOCK)
    assert (len(seq.block_table), seq.num_dropped_blocks) == (10, 8)
    assert pool.num_free == 12 - 2
    tables.release(seq)
    pool.free(pool.allocate(2 + 6))  # the blank ones, and the six that were dropped first
    again = make_sequence(41)
    tables.begin(again, tables.cached(again))
    assert (again.num_computed_tokens, again.num_dropped_blocks) == (40, 8)
    assert again.block_table[:8] == [again.block_table[8]] * 8
    pool.check_integrity([again.held_blocks])
    tables.release(again)
    pool.free(pool.allocate(12))  # all
    assert tables.cached(make_sequence(41)) == []


def test_layers_that_see_all_keep_every_block(
    tiny_checkpoint: Callable[..., tuple[Path, Any]],
) -> None:
    """Gemma 2 mixes windows and full attention; its blocks hold both."""
    directory, _ = tiny_checkpoint("gemma2", sliding_window=WINDOW, head_dim=8)
    model = load(str(directory), device="cpu")
    assert WINDOW in model.spec.windows
    assert model.spec.window is None
