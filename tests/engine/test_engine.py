"""The engine: resume at the exact token, aborts, ends, refusals, capacity."""

import gc
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.cost_model import CostModel
from tokenmill.engine.engine import Engine
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.models.weights import empty_weights, pack, random_weights
from tokenmill.engine.probe import Probe
from tokenmill.engine.runner import Runner
from tokenmill.engine.sequence import FinishReason
from tokenmill.engine.sizing import best_budget, budgets_of
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    """Two random layers over 97 tokens; token 0 ends."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    spec = spec_from_config(
        {
            "model_type": "llama",
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
        }
    )
    cpu = torch.device("cpu")
    weights = empty_weights(spec, torch.float32, cpu)
    random_weights(weights, seed=3)
    backend = Backend(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    return LoadedModel(
        "tiny", spec, pack(weights), Tokenizer(backend, eos_token_ids=[0]), cpu, torch.float32
    )


def make_engine(tiny: LoadedModel, **config: Any) -> Engine:
    return Engine(tiny, EngineConfig(**(DEFAULTS | config)))


def run(engine: Engine) -> dict[str, tuple[list[int], FinishReason | None]]:
    got: dict[str, tuple[list[int], FinishReason | None]] = {}
    while engine.has_work:
        for output in engine.step():
            tokens, _ = got.setdefault(output.seq_id, ([], None))
            got[output.seq_id] = (tokens + list(output.token_ids), output.finish_reason)
    engine.check_integrity()
    return got


DEFAULTS: dict[str, Any] = {"token_budget": 16, "max_num_seqs": 4, "block_size": 4}
PROMPT = [5, 9, 31, 4, 77, 12, 60]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("done", [1, 5, 19])
def test_a_resumed_sequence_goes_on_as_it_would_have(
    tiny: LoadedModel, temperature: float, done: int
) -> None:
    params = SamplingParams(max_tokens=20, temperature=temperature, ignore_eos=True)
    whole, resumed = make_engine(tiny), make_engine(tiny, token_budget=5)
    whole.add("a", PROMPT, params, seed=11)
    tokens, _ = run(whole)["a"]
    resumed.add("other", [1, 2, 3], params, seed=1)
    resumed.add("a", PROMPT, params, output_ids=tokens[:done], seed=11)
    assert run(resumed)["a"] == (tokens[done:], FinishReason.LENGTH)


@pytest.mark.parametrize("done", [3, 7, 15])
def test_penalties_go_on_after_a_resume(tiny: LoadedModel, done: int) -> None:
    """Penalties and min_tokens count from the first token of the output, not from the resume."""
    params = SamplingParams(
        max_tokens=20,
        min_tokens=18,
        temperature=1.0,
        repetition_penalty=1.4,
        presence_penalty=0.5,
        frequency_penalty=1.5,
        logit_bias=dict.fromkeys((9, 12, 20, 42), 9.0),
        stop_token_ids=(31, 33),
    )
    whole, resumed, plain = make_engine(tiny), make_engine(tiny), make_engine(tiny)
    whole.add("a", PROMPT, params, seed=11)
    tokens, reason = run(whole)["a"]
    assert len(tokens) >= 18
    resumed.add("a", PROMPT, params, output_ids=tokens[:done], seed=11)
    assert run(resumed)["a"] == (tokens[done:], reason)
    # The same from there on as if those tokens were a prompt: nothing was counted, so it differs.
    shorter = replace(params, max_tokens=20 - done, min_tokens=max(18 - done, 0))
    plain.add("a", PROMPT + tokens[:done], shorter, seed=11)
    assert run(plain)["a"] != (tokens[done:], reason)


def test_a_bias_for_an_unknown_token_is_refused(tiny: LoadedModel) -> None:
    with pytest.raises(InvalidRequest, match="logit_bias must be token ids below 97, got 97"):
        make_engine(tiny).add("a", PROMPT, SamplingParams(logit_bias={97: 1.0}), seed=0)


def test_preempted_sequences_give_the_same_tokens(tiny: LoadedModel) -> None:
    """A cache of 12 blocks for four sequences that end at 27 tokens: some must be recomputed."""
    params = SamplingParams(max_tokens=20, temperature=1.0, ignore_eos=True)

    def tokens_of(engine: Engine) -> dict[str, tuple[list[int], FinishReason | None]]:
        engine.scheduler.output_lengths.record(1)  # admit all at once
        for number in range(4):
            engine.add(str(number), [number + 1, *PROMPT[1:]], params, seed=number)
        return run(engine)

    block_bytes = 2 * 2 * 2 * 8 * 4 * 4  # keys and values, layers, heads, head_dim, tokens, bytes
    small = make_engine(tiny, kv_cache_memory=12 * block_bytes)
    assert tokens_of(small) == tokens_of(make_engine(tiny))
    assert small.scheduler.num_preemptions > 0


def test_a_sequence_that_is_complete_already_ends_without_a_step(tiny: LoadedModel) -> None:
    engine = make_engine(tiny)
    engine.add("a", PROMPT, SamplingParams(max_tokens=3), output_ids=[4, 5, 6], seed=0)
    assert run(engine) == {"a": ([], FinishReason.LENGTH)}


def test_the_end_token_stops_and_is_not_given(tiny: LoadedModel) -> None:
    engine = make_engine(tiny)
    params = SamplingParams(max_tokens=100, temperature=5.0, top_k=8)
    for seed in range(8):
        engine.add(str(seed), PROMPT, params, seed=seed)
    for tokens, reason in run(engine).values():
        assert 0 not in tokens
        assert (reason is FinishReason.STOP) == (len(tokens) < 100)


def test_a_stop_token_stops(tiny: LoadedModel) -> None:
    engine = make_engine(tiny)
    engine.add("a", PROMPT, SamplingParams(max_tokens=9, ignore_eos=True), seed=0)
    tokens, _ = run(engine)["a"]
    first = tokens.index(tokens[4])
    params = SamplingParams(max_tokens=9, ignore_eos=True, stop_token_ids=(tokens[4],))
    engine.add("a", PROMPT, params, seed=0)
    assert run(engine)["a"] == (tokens[:first], FinishReason.STOP)


def test_abort_frees_everything(tiny: LoadedModel) -> None:
    engine = make_engine(tiny)
    for number in range(6):
        engine.add(str(number), PROMPT, SamplingParams(max_tokens=50, ignore_eos=True), seed=0)
    engine.step()
    for number in range(6):
        engine.abort(str(number))
    engine.abort("unknown")
    assert not engine.has_work
    assert engine.step() == []
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


def test_the_context_ends_a_sequence(tiny: LoadedModel) -> None:
    engine = make_engine(tiny, max_model_len=10)
    engine.add("a", PROMPT, SamplingParams(max_tokens=500, ignore_eos=True), seed=0)
    tokens, reason = run(engine)["a"]
    assert (len(PROMPT) + len(tokens), reason) == (10, FinishReason.LENGTH)


def test_a_shared_prefix_is_computed_once(tiny: LoadedModel) -> None:
    """40 prompts of 64 shared and 8 own tokens: over 85% are not computed, nothing else changes."""
    shared = [(7 * n) % 96 + 1 for n in range(64)]
    params = SamplingParams(max_tokens=6, temperature=0.5, ignore_eos=True)

    def answers(engine: Engine) -> dict[str, tuple[list[int], FinishReason | None]]:
        for number in range(40):
            own = [(number * n) % 96 + 1 for n in range(1, 9)]
            engine.add(str(number), shared + own, params, seed=number)
        return run(engine)

    on, off = make_engine(tiny), make_engine(tiny, prefix_caching=False)
    assert answers(on) == answers(off)
    assert on.stats().num_cached_tokens == 39 * 64
    assert off.stats().num_computed_tokens == 40 * (72 + 5)
    assert on.stats().num_computed_tokens == off.stats().num_computed_tokens - 39 * 64
    assert on.stats().hit_rate > 0.85


def test_prompt_logprobs_are_told_although_the_prompt_is_cached(tiny: LoadedModel) -> None:
    engine = make_engine(tiny)
    prompt = [(7 * n) % 96 + 1 for n in range(40)]
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    engine.add("warm", prompt, params, seed=0)
    run(engine)
    engine.add("a", prompt, replace(params, prompt_logprobs=0), seed=0)
    told = 0
    while engine.has_work:
        told += sum(len(output.prompt_logprobs) for output in engine.step())
    assert told == 39


def test_the_budget_is_chosen_by_timing_and_aligned(tiny: LoadedModel) -> None:
    engine = make_engine(tiny, token_budget=None)
    stats = engine.stats()
    assert stats.token_budget in range(128, 513, 64)
    assert stats.cost.num_steps >= 6
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks


@pytest.mark.parametrize(
    ("knee", "budget"), [(0, 128), (129, 192), (400, 448), (9000, 512)], ids=str
)
def test_the_best_budget_is_aligned_and_bounded(
    monkeypatch: pytest.MonkeyPatch, knee: float, budget: int
) -> None:
    cost = CostModel()
    monkeypatch.setattr(CostModel, "knee", lambda *_: knee)
    assert best_budget(cost, 128, 512, 64) == budget


def test_steps_that_are_captured_are_no_longer_than_graphs_are() -> None:
    device = torch.device("cuda")
    assert budgets_of(EngineConfig(), device) == (512, 8192, 256)
    assert budgets_of(EngineConfig(cuda_graphs=True), device) == (512, 2048, 256)


def test_an_impossible_step_time_is_refused_with_the_possible_one(tiny: LoadedModel) -> None:
    with pytest.raises(InvalidRequest, match=r"max_step_ms must be at least the .* ms that 16"):
        make_engine(tiny, max_step_ms=1e-6)


def test_a_step_time_limit_changes_no_tokens(tiny: LoadedModel) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    answers = []
    for limit in (None, 500.0):
        engine = make_engine(tiny, max_step_ms=limit)
        engine.add("a", PROMPT * 9, params, seed=0)
        answers.append(run(engine))
    assert answers[0] == answers[1]


def test_deterministic_starts_only_where_it_holds(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_engine(tiny, deterministic=True)
    monkeypatch.setattr(Probe, "is_batch_invariant", lambda *_: False)
    with pytest.raises(InvalidRequest, match="deterministic must be a device whose results"):
        make_engine(tiny, deterministic=True)


def test_capacity_counts_what_is_only_remembered_as_free(tiny: LoadedModel) -> None:
    engine = make_engine(tiny)
    idle = engine.capacity()
    engine.add("a", [1] * 60, SamplingParams(max_tokens=4, ignore_eos=True), seed=0)
    run(engine)
    assert engine.stats().num_cached_blocks > 0
    assert engine.capacity() == idle


def test_two_thousand_requests_leave_every_block_free_and_memory_flat(tiny: LoadedModel) -> None:
    engine = make_engine(tiny, token_budget=128, max_num_seqs=64)
    params = SamplingParams(max_tokens=3, ignore_eos=True)

    def serve(first: int, last: int) -> tuple[int, int]:
        """Bytes of Python's objects and of the process, after it."""
        for start in range(first, last, 100):
            for number in range(start, start + 100):
                prompt = [number % 97, number // 97, *PROMPT] * 2
                engine.add(str(number), prompt, params, seed=number)
            assert len(run(engine)) == 100
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return tracemalloc.get_traced_memory()[0], pages * os.sysconf("SC_PAGE_SIZE")

    tracemalloc.start()
    try:
        python, process = serve(0, 1000)
        python_after, process_after = serve(1000, 2000)
    finally:
        tracemalloc.stop()
    pool = engine.scheduler.pool
    assert pool.num_free == pool.num_blocks
    assert python_after - python < 200 * 1000, "200 bytes a request are a leak"
    assert process_after - process < 16 << 20


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt must be at least one token, got 0"),
        ([1] * 128, "prompt must be shorter than the context of 128 tokens, got 128; shorten it"),
        ([1, 97], "prompt must be token ids below 97, got 97"),
        ([-1], "prompt must be token ids below 97"),
    ],
    ids=["empty", "long", "unknown", "negative"],
)
def test_a_bad_prompt_is_refused_and_costs_nothing(
    tiny: LoadedModel, prompt: list[int], message: str
) -> None:
    engine = make_engine(tiny)
    with pytest.raises(InvalidRequest, match=message):
        engine.add("a", prompt, SamplingParams(), seed=0)
    assert not engine.has_work


def test_the_parts_of_the_start_are_timed(tiny: LoadedModel) -> None:
    seconds = make_engine(tiny).start_times.seconds
    assert list(seconds) == ["kv_cache", "steps"]
    assert all(second > 0 for second in seconds.values())


def test_capacity_falls_with_work_and_comes_back(tiny: LoadedModel) -> None:
    engine = make_engine(tiny)
    idle = engine.capacity()
    assert (idle.tokens, idle.sequences, idle.block_size) == (32, 5, 4)
    engine.add("a", [1] * 40, SamplingParams(max_tokens=4, ignore_eos=True), seed=0)
    busy = engine.capacity()
    assert busy.tokens == 0
    assert busy.sequences == 4
    assert busy.blocks < idle.blocks
    run(engine)
    assert engine.capacity() == idle


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"token_budget": 8, "max_num_seqs": 9}, "token_budget must be at least max_num_seqs"),
        ({"max_model_len": 200}, "max_model_len must be at most the model's 128, got 200"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer of at least 1, got 0"),
    ],
    ids=["budget", "context", "rows"],
)
def test_a_bad_configuration_is_refused(
    tiny: LoadedModel, config: dict[str, int], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_engine(tiny, **config)


def test_a_request_whose_logits_are_no_numbers_ends_alone(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a damaged adapter: the others of the step lose nothing."""
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    engine = make_engine(tiny)
    engine.add("good", [1, 2, 3], params, seed=1)
    usual = run(engine)["good"]
    logits, damaged = Runner.logits, [True]

    def logits_of(self: Runner, start: int, stop: int) -> torch.Tensor:
        rows = logits(self, start, stop)
        if damaged:
            rows[0] = float("nan")
            damaged.clear()
        return rows

    monkeypatch.setattr(Runner, "logits", logits_of)
    engine.add("bad", [4, 5], params, seed=1)
    engine.add("good", [1, 2, 3], params, seed=1)
    first = {output.seq_id: output for output in engine.step()}
    assert first["bad"].finish_reason is FinishReason.ERROR
    assert first["bad"].token_ids == ()
    assert "logits must be finite" in first["bad"].error
    tokens, reason = run(engine)["good"]
    assert ([*first["good"].token_ids, *tokens], reason) == usual
    engine.check_integrity()
