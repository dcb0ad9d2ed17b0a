"""A rank of a group that is not the first: `python -m tokenmill.engine.rank`, by `RankProcesses`.

It loads its part of the model, meets the others, and repeats what rank 0 runs. It ends with its
standard input, at once, whatever it is in: so rank 0 cannot leave it behind.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenmill.engine.rank_processes import LENGTH
from tokenmill.producer.errors import TokenmillError

#: If a sum fails because rank 0 has gone, this process has ended by then.
_ORPHAN_S = 1.0


def main() -> int:
    """Serve until standard input ends; returns the exit status if something fails."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(messages,), daemon=True).start()

    def tell(**said: object) -> None:
        print(json.dumps(said), file=told, flush=True)

    try:
        _serve(json.loads(messages.get()), _all_of(messages), lambda: tell(ready=True))
    except TokenmillError as error:
        tell(error=str(error))
    except Exception as error:  # noqa: BLE001 - rank 0 is to know, whatever it is
        time.sleep(_ORPHAN_S)
        traceback.print_exc()
        tell(error=f"{type(error).__name__}: {error}")
    return 1


def _serve(
    settings: Mapping[str, Any], messages: Iterator[bytes], tell_ready: Callable[[], None]
) -> None:
    import torch

    from tokenmill.engine.kv_cache import choose_kv_cache_dtype, default_kv_memory, num_blocks_in
    from tokenmill.engine.loader import DTYPES, choose_device, load_shard
    from tokenmill.engine.models.shard import Shard
    from tokenmill.engine.ranks import Ranks
    from tokenmill.engine.runner import follow

    shard = Shard(settings["rank"], settings["size"])
    device, dtype = choose_device(settings["device"], shard), DTYPES[settings["dtype"]]
    torch.set_num_threads(settings["threads"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    spec, weights = load_shard(settings["model"], device, dtype, shard)
    tell_ready()
    group = Ranks(shard, device, Path(settings["rendezvous"]))
    group.join()
    memory = settings["kv_cache_memory"] or default_kv_memory(device)
    held = choose_kv_cache_dtype(settings["kv_cache_dtype"], device, dtype)
    group.least(num_blocks_in(memory, spec, block_size=settings["block_size"], dtype=held))
    with torch.inference_mode():
        follow(spec, weights, group, messages)


def _all_of(messages: "queue.SimpleQueue[bytes]") -> Iterator[bytes]:
    while True:
        yield messages.get()


def _read(messages: "queue.SimpleQueue[bytes]") -> None:
    pipe = sys.stdin.buffer
    while head := pipe.read(LENGTH.size):
        (length,) = LENGTH.unpack(head)
        messages.put(pipe.read(length))
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
