"""An engine's limits where the user leaves them open: KV cache, budget, step time, context."""

import math

import torch

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.cost_model import CostModel
from tokenmill.engine.device_rows import row_bytes
from tokenmill.engine.kv_cache import num_blocks_in
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.messages import CacheSize
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.step import MIN_CHUNK
from tokenmill.engine.step_graphs import MOST_TOKENS
from tokenmill.engine.worst_step import Most, kv_memory
from tokenmill.producer.errors import InvalidRequest

#: Defaults by device: token budgets (smallest, largest, multiple of), sequences, block size.
DEFAULTS = {"cpu": ((128, 512, 64), 64, 32), "cuda": ((512, 8192, 256), 256, 64)}
#: The budget is where a step does this share of the tokens per second of an endless one.
KNEE = 0.9


def num_kv_blocks(
    model: LoadedModel,
    config: EngineConfig,
    kv_dtype: torch.dtype,
    block_size: int,
    max_num_seqs: int,
) -> int:
    """Blocks of the KV cache, the same for all ranks.

    Raises:
        OutOfMemory: there is no room for two of them.
    """
    memory = config.kv_cache_memory
    if memory is None:
        longest = min(config.max_model_len or model.spec.max_position, model.spec.max_position)
        budget = config.token_budget or budgets_of(config, model.device)[1]
        size = CacheSize(2, block_size, longest, kv_dtype)
        most = Most(max(budget, max_num_seqs), max_num_seqs, longest)
        num_eos = len(model.tokenizer.eos_token_ids)
        has_rows = config.async_scheduling or config.cuda_graphs
        memory = kv_memory(
            model,
            most,
            size,
            kept=has_rows * max_num_seqs * row_bytes(longest, block_size, num_eos),
            num_pools=1 + config.cuda_graphs,
        )
    blocks = num_blocks_in(memory, model.spec, block_size=block_size, dtype=kv_dtype)
    return model.group.least(blocks)


def make_scheduler(
    model: LoadedModel, config: EngineConfig, pool: BlockPool, cost: CostModel, max_num_seqs: int
) -> Scheduler:
    """The scheduler of an engine whose steps cost that much.

    Raises:
        InvalidRequest: no step is as quick as is asked for.
    """
    budgets = budgets_of(config, model.device)
    return Scheduler(
        pool,
        token_budget=config.token_budget or max(best_budget(cost, *budgets), max_num_seqs),
        max_num_seqs=max_num_seqs,
        policy=config.policy,
        cost=cost,
        max_step_s=max_step_s(config, cost),
        window=model.spec.window,
    )


def budgets_of(config: EngineConfig, device: torch.device) -> tuple[int, int, int]:
    """The smallest and the largest budget to choose from, and what it is a multiple of."""
    least, most, multiple = DEFAULTS[device.type][0]
    # Longer steps are not captured; and the costs timed at the start are those of launches.
    return least, min(most, MOST_TOKENS) if config.cuda_graphs else most, multiple


def best_budget(cost: CostModel, least: int, most: int, multiple: int) -> int:
    """The token budget at the knee of the cost model, on a size that the device likes."""
    knee = min(max(cost.knee(KNEE), least), most)
    return math.ceil(knee / multiple) * multiple


def max_step_s(config: EngineConfig, cost: CostModel) -> float:
    """Seconds that no step is to exceed.

    Raises:
        InvalidRequest: not even the shortest step is that quick here.
    """
    if config.max_step_ms is None:
        return math.inf
    least_ms = 1000 * (cost.fit.fixed_s + cost.seconds_of(0, MIN_CHUNK))
    if config.max_step_ms < least_ms:
        raise InvalidRequest(
            "max_step_ms",
            f"at least the {least_ms:.0f} ms that {MIN_CHUNK} tokens take here",
            config.max_step_ms,
        )
    return config.max_step_ms / 1000


def max_model_len(config: EngineConfig, model: LoadedModel, cache_tokens: int) -> int:
    """The context: what is asked for, what the model was trained for, what the cache holds.

    Raises:
        InvalidRequest: more is asked for.
    """
    asked = config.max_model_len
    if asked is not None and asked > model.spec.max_position:
        raise InvalidRequest(
            "max_model_len", f"at most the model's {model.spec.max_position}", asked
        )
    if asked is not None and asked > cache_tokens:
        raise InvalidRequest(
            "max_model_len",
            f"at most the {cache_tokens} tokens that the KV cache holds",
            asked,
            "raise --kv-cache-memory",
        )
    return min(asked or model.spec.max_position, cache_tokens)
