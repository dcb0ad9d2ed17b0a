"""One step ahead, from rows on the device: the tokens of an engine that waits for every step."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

import host_kernels
from tokenmill.engine import logprobs, step_graphs
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.device_executor import DeviceExecutor
from tokenmill.engine.device_rows import DeviceRows
from tokenmill.engine.device_step import StepShape
from tokenmill.engine.engine import Engine, StepOutput
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.models.weights import empty_weights, pack, random_weights
from tokenmill.engine.scheduler import Chunk, Policy
from tokenmill.engine.sequence import FinishReason, Sequence, SequenceStatus
from tokenmill.engine.step_graphs import decode_sizes
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

# Read when a kernel is defined, that is when its module is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

EXAMPLES = int(os.environ.get("TOKENMILL_AHEAD", "25"))
ROWS, BLOCK, LENGTH = 3, 4, 64
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "logprobs": 2},
    {"temperature": 1.2, "min_tokens": 5, "stop_token_ids": tuple(range(3, 60))},
    {"temperature": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "logprobs": 0},
    {"temperature": 0.5, "logit_bias": {7: 4.0, 9: 3.0}, "prompt_logprobs": 1},
    {"temperature": 2.0, "min_p": 0.02, "stop_token_ids": tuple(range(10, 40)), "logprobs": 0},
    {
        "temperature": 1.0,
        "logit_bias": dict.fromkeys((1, *range(50, 60)), 9.0),
        "repetition_penalty": 2.5,
        "presence_penalty": -1.0,
        "min_tokens": 7,
        "stop_token_ids": tuple(range(30, 56)),
        "logprobs": 1,
    },
]


def make_model(window: int | None) -> LoadedModel:
    config = {
        "model_type": "mistral",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "sliding_window": window,
    }
    spec = spec_from_config(config)
    cpu = torch.device("cpu")
    weights = empty_weights(spec, torch.float32, cpu)
    random_weights(weights, seed=3)
    backend = Backend(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    tokenizer = Tokenizer(backend, eos_token_ids=[0, 1, 2])
    return LoadedModel("tiny", spec, pack(weights), tokenizer, cpu, torch.float32)


MODELS = {window: make_model(window) for window in (None, 9)}


@pytest.fixture
def _plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    host_kernels.put_in(monkeypatch)


def make_engine(window: int | None, **config: Any) -> Engine:
    sizes: dict[str, Any] = {"token_budget": 8, "max_num_seqs": ROWS, "block_size": BLOCK}
    engine = Engine(MODELS[window], EngineConfig(**(sizes | config)))
    engine.scheduler.output_lengths.record(1)  # admit all at once, so that some are preempted
    return engine


def ahead(engine: Engine, *, is_captured: bool = False, num_ahead: int = 1) -> Engine:
    """The same engine, one step ahead of a device that works when it is waited for."""
    engine._executor = DeviceExecutor(
        engine._runner,
        engine.tokenizer,
        engine._adapters,
        max_num_seqs=engine.scheduler.max_num_seqs,
        is_captured=is_captured,
        stream=host_kernels.LateStream(),
    )
    engine._num_ahead = num_ahead
    return engine


@dataclass(frozen=True)
class Request:
    """A sequence that comes before step `step`, and is aborted so many steps later; 0: never."""

    step: int
    prompt: int
    content: int
    output: int
    sampling: int
    abort_after: int

    @property
    def prompt_ids(self) -> list[int]:
        return [(self.content * 17 + 7 * p) % 90 + 5 for p in range(self.prompt)]

    @property
    def params(self) -> SamplingParams:
        sampling = dict(SAMPLINGS[self.sampling])
        if "min_tokens" in sampling:
            sampling["min_tokens"] = min(sampling["min_tokens"], self.output)
        return SamplingParams(max_tokens=self.output, **sampling)


@dataclass(frozen=True)
class Traffic:
    """Requests, and the engine they meet."""

    requests: list[Request]
    blocks: int
    budget: int
    window: int | None
    is_caching: bool
    policy: Policy
    is_captured: bool
    num_ahead: int


REQUESTS = st.builds(
    Request,
    step=st.integers(0, 12),
    prompt=st.integers(1, 24),
    content=st.integers(0, 2),
    output=st.integers(1, 14),
    sampling=st.integers(0, len(SAMPLINGS) - 1),
    abort_after=st.sampled_from([0, 0, 0, 1, 2, 5]),
)
TRAFFIC = st.builds(
    Traffic,
    requests=st.lists(REQUESTS, min_size=1, max_size=6),
    blocks=st.sampled_from([10, 13, 40]),
    budget=st.sampled_from([4, 8, 40]),
    window=st.sampled_from([None, None, 9]),
    is_caching=st.booleans(),
    policy=st.sampled_from([Policy.SPLITFUSE, Policy.SPLITFUSE, *Policy]),
    is_captured=st.booleans(),
    num_ahead=st.sampled_from([1, 1, 1, 0]),
)


def busy(*, is_captured: bool) -> Traffic:
    """More than the cache holds, so that some lose their blocks."""
    samplings = (0, 7, 2, 3, 4, 7)
    requests = [Request(n // 2, 9 + n, n % 2, 14, s, 5 * (n == 3)) for n, s in enumerate(samplings)]
    return Traffic(requests, 13, 8, None, True, Policy.SPLITFUSE, is_captured, 1)


class Answer:
    """All that an engine gave of a sequence."""

    def __init__(self) -> None:
        self.outputs: list[StepOutput] = []

    @property
    def token_ids(self) -> list[int]:
        return [token for output in self.outputs for token in output.token_ids]

    @property
    def all(self) -> tuple[object, ...]:
        logprobs = [row for output in self.outputs for row in output.logprobs]
        told = [row for output in self.outputs for row in output.prompt_logprobs]
        return self.token_ids, self.outputs[-1].finish_reason, logprobs, told


def answers(engine: Engine, requests: list[Request], *, aborts: bool) -> dict[str, Answer]:
    found = {str(number): Answer() for number in range(len(requests))}
    step = 0
    while engine.has_work or step <= max(r.step for r in requests):
        for number, request in enumerate(requests):
            if request.step == step:
                engine.add(str(number), request.prompt_ids, request.params, seed=number + (1 << 63))
            if aborts and request.abort_after and request.step + request.abort_after == step:
                engine.abort(str(number))
        for output in engine.step():
            found[output.seq_id].outputs.append(output)
        engine.check_integrity()
        step += 1
        assert step < 2000, "it does not end"
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    return found


@pytest.mark.usefixtures("_plain_kernels")
@example(busy(is_captured=False))
@example(busy(is_captured=True))
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(TRAFFIC)
def test_whatever_comes_and_goes_the_answers_are_the_same(traffic: Traffic) -> None:
    block_bytes = MODELS[None].spec.kv_token_elements * 4 * BLOCK
    config = {
        "token_budget": traffic.budget,
        "prefix_caching": traffic.is_caching,
        "policy": traffic.policy,
    }
    requests = [
        replace(r, output=min(r.output, traffic.blocks * BLOCK - r.prompt))
        for r in traffic.requests
    ]
    expected = answers(make_engine(traffic.window, **config), requests, aborts=False)
    engine = ahead(
        make_engine(traffic.window, kv_cache_memory=traffic.blocks * block_bytes, **config),
        is_captured=traffic.is_captured,
        num_ahead=traffic.num_ahead,
    )
    for seq_id, answer in answers(engine, requests, aborts=True).items():
        if any(o.finish_reason is not None for o in answer.outputs):
            assert answer.all == expected[seq_id].all
        else:
            length = len(answer.token_ids)
            assert answer.token_ids == expected[seq_id].token_ids[:length]


def steady(count: int) -> list[Request]:
    """One request of each sampling, all at once."""
    return [Request(0, 5 + n, n, 12, n % len(SAMPLINGS), 0) for n in range(count)]


@pytest.mark.parametrize("is_captured", [False, True])
def test_the_kernels_give_the_same_answers(
    monkeypatch: pytest.MonkeyPatch, *, is_captured: bool
) -> None:
    """The kernels that build and advance rows and draw tokens, compiled or interpreted."""
    monkeypatch.setattr(step_graphs, "TOKEN_MULTIPLE", 16)
    requests = [replace(r, output=4) for r in steady(6)[2:]]
    expected = answers(make_engine(None), requests, aborts=False)
    found = answers(ahead(make_engine(None), is_captured=is_captured), requests, aborts=False)
    assert {key: a.token_ids for key, a in found.items()} == {
        key: a.token_ids for key, a in expected.items()
    }


@pytest.mark.usefixtures("_plain_kernels")
def test_a_step_is_launched_before_the_last_one_is_known() -> None:
    """One token more is on its way than is known, and none behind the last."""
    engine = ahead(make_engine(None))
    engine.add("a", [5, 6, 7], SamplingParams(max_tokens=3, ignore_eos=True), seed=0)
    assert engine.step() == []
    outputs, (seq,) = [], engine.scheduler.running
    for num_tokens in (5, 6):
        outputs += engine.step()
        assert (seq.num_tokens, len(seq.token_ids)) == (num_tokens, num_tokens - 1)
    outputs += engine.step()
    assert engine.stats().num_steps == 3
    assert [len(output.token_ids) for output in outputs] == [1, 1, 1]
    assert not engine.has_work


@pytest.mark.usefixtures("_plain_kernels")
@pytest.mark.parametrize("failing", ["build_step", "advance", "receive"])
def test_a_step_that_fails_leaves_an_engine_that_can_go_on(
    monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Whoever stays is computed again; what was on its way fails nobody that comes later."""
    from tokenmill.kernels import batch_rows

    requests = [replace(r, sampling=1) for r in steady(4)]
    expected = answers(make_engine(None), requests, aborts=False)
    engine = ahead(make_engine(None))
    found = {str(number): Answer() for number in range(4)}
    for number, request in enumerate(requests):
        engine.add(str(number), request.prompt_ids, request.params, seed=number + (1 << 63))
    for count in range(200):
        with monkeypatch.context() as patch:
            if count in (1, 5, 9):
                patch.delattr(DeviceRows if failing == "receive" else batch_rows, failing)
            try:
                outputs = engine.step()
            except AttributeError:
                continue
        for output in outputs:
            found[output.seq_id].outputs.append(output)
    assert not engine.has_work
    engine.check_integrity()
    assert {key: a.token_ids for key, a in found.items()} == {
        key: a.token_ids for key, a in expected.items()
    }


@pytest.mark.parametrize("num_ahead", [0, 1])
def test_logits_that_are_no_numbers_end_their_request_alone(
    monkeypatch: pytest.MonkeyPatch, *, num_ahead: int
) -> None:
    """With the error of a CPU, though the next step is on its way; by the kernels themselves."""
    requests = [
        Request(0, 5, 0, 3, 1, 0),
        Request(0, 6, 1, 4, 2, 0),
        Request(1, 4, 2, 3, 0, 0),
    ]
    found = []
    config = {"token_budget": 40}
    plain, late = make_engine(None, **config), make_engine(None, **config)
    for engine in (plain, ahead(late, num_ahead=num_ahead)):
        logits_of, damaged = engine._runner._decoder.narrow_logits, list[float]()

        def logits(
            hidden: torch.Tensor,
            logits_of: Any = logits_of,
            damaged: list[float] = damaged,
        ) -> torch.Tensor:
            """Of the second step, the second request's are no numbers."""
            rows: torch.Tensor = logits_of(hidden)
            damaged.append(0)
            if len(damaged) == 2:
                rows[1, 3] = torch.nan
            return rows

        monkeypatch.setattr(engine._runner._decoder, "narrow_logits", logits)
        found.append(answers(engine, requests, aborts=False))
    expected, by_kernels = found
    assert expected["1"].outputs[-1].finish_reason is FinishReason.ERROR
    assert "logits must be finite" in expected["1"].outputs[-1].error
    assert [len(expected[key].token_ids) for key in "012"] == [3, 1, 3]
    for key, answer in expected.items():
        assert by_kernels[key].token_ids == answer.token_ids
        assert by_kernels[key].outputs[-1].error == answer.outputs[-1].error


@pytest.mark.usefixtures("_plain_kernels")
def test_penalties_do_not_wait() -> None:
    """A token for each step, but for the first, which gives what the prompt does."""
    engine = ahead(make_engine(None, token_budget=40))
    for number, sampling in enumerate([SAMPLINGS[4], SAMPLINGS[5], SAMPLINGS[3]]):
        params = SamplingParams(max_tokens=9, ignore_eos=True, **sampling)
        engine.add(str(number), [5, 6, 7], params, seed=0)
    while engine.has_work:
        engine.step()
    assert engine.stats().num_steps == 9


@pytest.mark.usefixtures("_plain_kernels")
def test_log_probabilities_are_measured_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few logits at a time, whether they were changed or not."""
    requests = [Request(0, 5 + n, n, 6, n, 0) for n in (2, 6, 7)]
    expected = answers(make_engine(None), requests, aborts=False)
    monkeypatch.setattr(logprobs, "SLICE_ELEMENTS", 97)
    found = answers(ahead(make_engine(None)), requests, aborts=False)
    assert {key: answer.all for key, answer in found.items()} == {
        key: answer.all for key, answer in expected.items()
    }


@pytest.mark.usefixtures("_plain_kernels")
def test_a_name_taken_anew_gets_nothing_of_the_step_before() -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    plain, engine = make_engine(None), ahead(make_engine(None))
    plain.add("a", [9, 8], params, seed=1)
    engine.add("a", [5, 6, 7], params, seed=0)
    engine.step()
    engine.abort("a")
    engine.add("a", [9, 8], params, seed=1)
    outputs: list[list[int]] = []
    for one in (plain, engine):
        outputs.append([])
        while one.has_work:
            outputs[-1] += [token for output in one.step() for token in output.token_ids]
    assert outputs[0] == outputs[1]


def test_changes_in_a_table_are_sent_and_nothing_twice() -> None:
    """A window makes blocks stand in for others; most steps change no table."""
    rows = DeviceRows(2, 16, BLOCK, torch.device("cpu"))
    seq = Sequence(
        seq_id="a",
        token_ids=list(range(5, 19)),
        num_prompt_tokens=14,
        params=SamplingParams(temperature=0.5, top_k=3, top_p=0.25, min_p=0.125),
        seed=2**64 - 1,
        max_num_tokens=16,
        status=SequenceStatus.RUNNING,
    )
    for start, length, table, size in (
        (0, 6, [7, 3], 2 + 1 + 14 + 10),  # table, computed, tokens, sampling
        (6, 6, [7, 3, 9, 1], 2),
        (12, 1, [3, 3, 9, 1], 1),
        (13, 1, [3, 3, 9, 1], 0),
    ):
        seq.block_table = table
        message = rows.lay_out([Chunk(seq, start, length)], 3).message
        received = rows.receive(message)
        assert received.head.rows.tolist() == [0, -1, -1]
        assert received.head.starts.tolist() == [0, length, length, length]
        assert rows.tables[0, : len(table)].tolist() == table
        assert rows.tokens[0, :14].tolist() == seq.token_ids
        assert rows.computed[0] == start
        rows.computed[0] += length
        assert message.sizes[-2:] == [size, size]
    assert [v[0].item() for v in (rows.temperature, rows.top_p, rows.min_p)] == [0.5, 0.25, 0.125]
    assert rows.seeds.tolist() == [-1, 0]
    assert rows.top_k.tolist() == [3, 0]
    seq.status = SequenceStatus.FINISHED
    assert rows.lay_out([], 2).message.numbers.tolist() == [-1, -1, -1, -1, 0, 0, 0, 0]


def test_constraints_wait_for_their_token(smollm2: LoadedModel) -> None:
    """A constraint knows every token before the next one is drawn; others are told of none."""
    samplings: list[dict[str, Any]] = [
        {"regex": "[a-c]{2}[0-9]{3}", "temperature": 0.9},
        {"temperature": 0.9, "frequency_penalty": 0.9, "logprobs": 1},
        {},
    ]

    def tokens(engine: Engine) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {str(number): [] for number in range(len(samplings))}
        for number, sampling_params in enumerate(samplings):
            params = SamplingParams(max_tokens=8, **sampling_params)
            engine.compile(params)
            engine.add(str(number), [5, 6, 7 + number], params, seed=3)
        while engine.has_work:
            for output in engine.step():
                found[output.seq_id] += output.token_ids
        engine.check_integrity()
        return found

    config = EngineConfig(token_budget=64, max_num_seqs=ROWS)
    expected = tokens(Engine(smollm2, config))
    with pytest.MonkeyPatch.context() as patch:
        host_kernels.put_in(patch)
        assert tokens(ahead(Engine(smollm2, config))) == expected


def test_it_is_refused_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="async_scheduling must be left out where a model"):
        EngineConfig(async_scheduling=True, tensor_parallel_size=2)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for name in ("async_scheduling", "cuda_graphs"):
        with pytest.raises(InvalidRequest, match=f"{name} must be left out on a CPU"):
            make_engine(None, **{name: True})


def test_sizes_are_padded_to_few() -> None:
    assert decode_sizes(1) == [1]
    assert decode_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert decode_sizes(256)[-4:] == [160, 192, 224, 256]
    assert len(decode_sizes(256)) == 14
    engine = make_engine(None, max_num_seqs=20, token_budget=40, kv_cache_memory=1 << 22)
    executor = DeviceExecutor(
        engine._runner, engine.tokenizer, {}, max_num_seqs=20, is_captured=True
    )
    graphs = executor._graphs
    assert graphs is not None
    most = LENGTH // BLOCK
    for shape, padded in (
        (StepShape(3, 3, 1, 1), StepShape(4, 4, most, 1)),
        (StepShape(17, 17, 16, 1), StepShape(20, 20, most, 1)),
        (StepShape(5, 4, 2, 2), StepShape(256, 20, most, 256)),
        (StepShape(2048, 20, 2, 200), StepShape(2048, 20, most, 2048)),
        (StepShape(2049, 20, 2, 200), None),
    ):
        assert graphs.padded(shape) == padded


@pytest.mark.usefixtures("_plain_kernels")
def test_a_size_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is captured first serves every later step of its size, whatever is in it."""
    captured: list[object] = []

    def capture(self: step_graphs.StepGraphs, work: Callable[[], None]) -> Callable[[], None]:
        captured.append(work)
        return work

    monkeypatch.setattr(step_graphs.StepGraphs, "_capture", capture)
    requests = [replace(r, sampling=n % 2) for n, r in enumerate(steady(7))]
    expected = answers(make_engine(None), requests, aborts=False)
    engine = ahead(make_engine(None), is_captured=True)
    found = answers(engine, requests, aborts=False)
    assert {key: a.all for key, a in found.items()} == {key: a.all for key, a in expected.items()}
    assert len(captured) == 3  # one and two sequences that decode, and a mixed step
    assert engine.stats().num_steps > 20
