"""`EngineConfig`: what a user may set of an engine, checked on construction."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tokenmill.engine.scheduler import Policy
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import MAX_ADAPTER_CHARS

KV_CACHE_DTYPES = ("auto", "float32", "bfloat16", "float16", "fp8")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """None means: chosen from the device and the model.

    Raises:
        InvalidRequest: a value is out of bounds; the error names it.
    """

    #: Most tokens in one forward pass.
    token_budget: int | None = None
    #: Most sequences running at once.
    max_num_seqs: int | None = None
    #: Most tokens of a sequence, prompt and output.
    max_model_len: int | None = None
    #: Tokens in a KV block.
    block_size: int | None = None
    #: Bytes for the KV cache, of each rank.
    kv_cache_memory: int | None = None
    #: What the KV cache holds, of `KV_CACHE_DTYPES` (`kv_cache.choose_kv_cache_dtype`).
    kv_cache_dtype: str = "auto"
    policy: Policy = Policy.SPLITFUSE
    #: Whether the KV cache keeps the blocks of prefixes that have been computed, for others.
    prefix_caching: bool = True
    #: Prompts are cut so that no step is predicted to take longer, in milliseconds.
    max_step_ms: float | None = None
    #: A request's logits are the same to the last bit whatever else is computed; refuse to start
    #: where they are not. On a GPU it costs time.
    deterministic: bool = False

    #: Launch each step on a GPU before the tokens of the one before it are known.
    async_scheduling: bool = False
    #: Run steps on a GPU as CUDA graphs, padded to few sizes.
    cuda_graphs: bool = False
    #: Ranks that the model is divided among, each a process with a device of its own.
    tensor_parallel_size: int = 1
    #: Adapters that requests may name: name -> directory (`engine/adapters.py`).
    lora: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, low in (
            ("token_budget", 1),
            ("max_num_seqs", 1),
            ("max_model_len", 2),
            ("block_size", 1),
            ("kv_cache_memory", 1),
            ("tensor_parallel_size", 1),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < low):
                raise InvalidRequest(name, f"an integer of at least {low}", value)
        if self.max_step_ms is not None and not self.max_step_ms > 0:
            raise InvalidRequest("max_step_ms", "above 0", self.max_step_ms)
        if self.policy not in tuple(Policy):
            names = ", ".join(policy.value for policy in Policy)
            raise InvalidRequest("policy", f"a Policy: {names}", self.policy)
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            names = ", ".join(KV_CACHE_DTYPES)
            raise InvalidRequest("kv_cache_dtype", names, self.kv_cache_dtype)
        for adapter in self.lora:
            if not adapter.isprintable() or not 1 <= len(adapter) <= MAX_ADAPTER_CHARS:
                expected = f"names of 1 to {MAX_ADAPTER_CHARS} printable characters"
                raise InvalidRequest("lora", expected, adapter)
        if self.lora and self.tensor_parallel_size > 1:
            expected = "not given where a model is divided among ranks"
            raise InvalidRequest("lora", expected, sorted(self.lora), "merge it into the model")
        for name in ("async_scheduling", "cuda_graphs"):
            if getattr(self, name) and self.tensor_parallel_size > 1:
                raise InvalidRequest(name, "left out where a model is divided among ranks", True)
        budget, seqs = self.token_budget, self.max_num_seqs
        if budget is not None and seqs is not None and seqs > budget:
            raise InvalidRequest(
                "token_budget",
                f"at least max_num_seqs ({seqs})",
                budget,
                "raise --token-budget or lower --max-num-seqs",
            )
