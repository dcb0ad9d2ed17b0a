"""A model divided among ranks gives the tokens of the whole one; here the ranks are threads."""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.kv_cache import default_kv_memory, num_blocks_in
from tokenmill.engine.loader import load, load_shard
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.models.shard import Shard
from tokenmill.engine.runner import follow
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
BLOCK = 4


@dataclass
class Meeting:
    """Where the threads of a group meet."""

    size: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)
        self.inboxes: list[queue.SimpleQueue[bytes]] = [
            queue.SimpleQueue() for _ in range(self.size)
        ]

    def all_of(self, rank: int, value: Any) -> list[Any]:
        """What each rank came with."""
        self.values[rank] = value
        self.barrier.wait()
        found = [self.values[number] for number in range(self.size)]
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Thread:
    """A `Group` of threads of this process."""

    shard: Shard
    meeting: Meeting

    def join(self) -> None:
        """All are here."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack(self.meeting.all_of(self.shard.rank, x.clone())).sum(0)

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = self.meeting.all_of(self.shard.rank, x.clone())
        return [] if self.shard.rank else found

    def least(self, number: int) -> int:
        return int(min(self.meeting.all_of(self.shard.rank, number)))

    def send(self, frame: bytes) -> None:
        if self.shard.rank == 0:
            for inbox in self.meeting.inboxes[1:]:
                inbox.put(frame)

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self) -> None:
        """All are here."""

    def serve(self) -> None:
        """Threads do not hang."""

    def close(self) -> None:
        self.send(b"")


def follower(directory: Path, group: Thread, config: EngineConfig) -> None:
    spec, weights = load_shard(str(directory), CPU, torch.float32, group.shard)
    memory = config.kv_cache_memory or default_kv_memory(CPU)
    group.least(num_blocks_in(memory, spec, block_size=BLOCK, dtype=torch.float32))
    with torch.inference_mode():
        follow(spec, weights, group, iter(group.meeting.inboxes[group.shard.rank].get, b""))


@pytest.fixture
def divided(request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    """`divided(directory, size, config)`: an engine of so many ranks."""
    engines: list[tuple[Engine, list[threading.Thread]]] = []

    def make(directory: Path, size: int, config: EngineConfig) -> Engine:
        meeting = Meeting(size)
        groups = [Thread(Shard(rank, size), meeting) for rank in range(size)]
        threads = [
            threading.Thread(target=follower, args=(directory, group, config), daemon=True)
            for group in groups[1:]
        ]
        for thread in threads:
            thread.start()
        engine = Engine(load(str(directory), device="cpu", group=groups[0]), config)
        engines.append((engine, threads))
        return engine

    yield make
    for engine, threads in engines:
        engine.close()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 25}
#: Family, overrides, ranks. The tiny models have 6 heads, 2 KV heads and 331 tokens, which 2 does
#: not divide.
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {"attention_bias": True, "mlp_bias": True}, 2),
    "kv-heads-on-several-ranks": ("llama", {"tie_word_embeddings": True}, 4),
    "kv-heads-in-unequal-parts": (
        "llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72},
        2,
    ),
    "mixtral": ("mixtral", {"num_local_experts": 5, "sliding_window": 12}, 2),
    "shared-expert": (
        "qwen2_moe",
        {**EXPERTS, "shared_expert_intermediate_size": 41, "mlp_only_layers": [1]},
        2,
    ),
    "qk-norm-per-head": ("qwen3", {"head_dim": 16}, 2),
    "qk-norm-over-all-heads": ("olmo2", {}, 4),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": 12,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
        2,
    ),
    "phi": (
        "phi",
        {"rope_parameters": {"partial_rotary_factor": 0.4, "rope_theta": 1e4}, "head_dim": 20},
        2,
    ),
    "phi3": ("phi3", {}, 2),
    "falcon-7b": ("falcon", {"multi_query": True}, 2),
    "falcon-40b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 80},
        2,
    ),
    "gpt2": (
        "gpt2",
        {"n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 256, "n_inner": 80},
        2,
    ),
    "gpt-neox": ("gpt_neox", {"rope_parameters": {"partial_rotary_factor": 0.25}}, 2),
    "opt": ("opt", {"ffn_dim": 80}, 3),
}


def run(engine: Engine, prompts: list[list[int]]) -> list[tuple[int, ...]]:
    """Greedy tokens of each prompt, told with their log probabilities and those of the prompt."""
    for number, prompt in enumerate(prompts):
        params = SamplingParams(
            max_tokens=10, ignore_eos=True, logprobs=2, prompt_logprobs=1 if number == 1 else None
        )
        engine.add(str(number), prompt, params, seed=0)
    tokens: list[tuple[int, ...]] = [() for _ in prompts]
    told = 0
    while engine.has_work:
        for output in engine.step():
            tokens[int(output.seq_id)] += output.token_ids
            told += len(output.prompt_logprobs)
    assert told == len(prompts[1]) - 1
    engine.check_integrity()
    return tokens


#: One of each kind of division; `make test-all` runs the others.
QUICK = (
    "llama",
    "kv-heads-on-several-ranks",
    "shared-expert",
    "qk-norm-over-all-heads",
    "gpt2",
    "gpt-neox",
)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]
)
def test_the_tokens_of_the_whole_model(
    name: str, tiny_checkpoint: Callable[..., Any], divided: Callable[..., Engine]
) -> None:
    family, overrides, size = CASES[name]
    directory, _ = tiny_checkpoint(family, **overrides)
    generator = torch.manual_seed(1)
    prompts = [torch.randint(3, 331, (n,), generator=generator).tolist() for n in (40, 17, 3)]
    config = EngineConfig(token_budget=16, max_num_seqs=3, block_size=BLOCK, max_model_len=128)
    whole = run(Engine(load(str(directory), device="cpu"), config), prompts)
    assert run(divided(directory, size, config), prompts) == whole


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "possible"),
    [(9, 3, 4, "1, 2, 3, 6, 9"), (8, 8, 9, "1, 2, 3, 4, 5, 6, 7, 8"), (6, 2, 5, "1, 2, 4, 6")],
)
def test_what_cannot_be_divided_is_refused_with_numbers(
    heads: int, kv_heads: int, size: int, possible: str, tiny_config: Callable[..., Any]
) -> None:
    config = tiny_config(
        "llama", hidden_size=144, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    whole = spec_from_config(config.to_dict())
    with pytest.raises(InvalidRequest) as refused:
        Shard(0, size).spec(whole)
    assert str(refused.value) == (
        f"tensor_parallel_size must be one of {possible}, as the model has {heads} heads and "
        f"{kv_heads} KV heads, got {size}"
    )


def test_a_width_below_the_ranks_is_refused(tiny_config: Callable[..., Any]) -> None:
    whole = spec_from_config(tiny_config("llama", intermediate_size=3).to_dict())
    with pytest.raises(InvalidRequest, match="smallest width, 3, got 4"):
        Shard(0, 4).spec(whole)


@pytest.mark.parametrize("size", [1, 2, 4, 6, 9, 18])
def test_every_head_is_computed_once_and_sees_its_own_keys(
    size: int, tiny_config: Callable[..., Any]
) -> None:
    sizes = {"hidden_size": 72, "num_attention_heads": 18, "num_key_value_heads": 9}
    whole = spec_from_config(tiny_config("llama", **sizes).to_dict())
    seen: list[tuple[int, int]] = []
    for rank in range(size):
        heads, kv_heads = Shard(rank, size).heads(whole)
        group = len(heads) // len(kv_heads)
        seen += [(head, kv_heads[number // group]) for number, head in enumerate(heads)]
    assert seen == [(head, head // 2) for head in range(18)]
