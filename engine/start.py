"""`start_engine`: a model and its engine, on one device or divided among several."""

import torch

from tokenmill.engine.adapters import check_adapters
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.group import ALONE, Group
from tokenmill.engine.kv_cache import choose_kv_cache_dtype
from tokenmill.engine.loader import DTYPES, choose_device, choose_dtype, load, read_spec
from tokenmill.engine.sizing import DEFAULTS
from tokenmill.engine.start_times import StartTimes


def start_engine(
    model: str,
    config: EngineConfig,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "none",
    threads: int | None = None,
) -> Engine:
    """Load `model`, with the other ranks if there are to be any, and make an engine of it.

    `threads`: CPU threads of each rank; None leaves torch its default, divided among the ranks.

    Raises:
        ModelNotFound, UnsupportedModel, OutOfMemory, InvalidRequest, GroupLost: as `load` and
            `Engine` do.
    """
    times = StartTimes()
    # What cannot be had is refused in a second, not after the model is loaded.
    if config.lora:
        check_adapters(config.lora, model, read_spec(model))
    if threads is not None:
        torch.set_num_threads(threads)
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    choose_kv_cache_dtype(config.kv_cache_dtype, place, kind, quantization)
    group = _start_group(model, config, place, kind, threads=threads)
    try:
        loaded = load(model, device=device, dtype=dtype, quantization=quantization, group=group)
        times.end("model")
        return Engine(loaded, config, times)
    except BaseException:
        group.close()
        raise


def _start_group(
    model: str,
    config: EngineConfig,
    place: torch.device,
    kind: torch.dtype,
    *,
    threads: int | None,
) -> Group:
    size = config.tensor_parallel_size
    if size == 1:
        return ALONE
    from tokenmill.engine.ranks import Leader

    if threads is None and place.type == "cpu":
        torch.set_num_threads(max(torch.get_num_threads() // size, 1))
    *_, block_size = DEFAULTS[place.type]
    settings = {
        "model": model,
        "device": place.type,
        "dtype": next(name for name, known in DTYPES.items() if known is kind),
        "threads": torch.get_num_threads(),
        "block_size": config.block_size or block_size,
        "kv_cache_memory": config.kv_cache_memory,
        "kv_cache_dtype": config.kv_cache_dtype,
    }
    return Leader(size, place, settings)
