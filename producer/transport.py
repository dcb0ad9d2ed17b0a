"""`Transport`: does what `steps` ask for, on the connections of a queue's shards."""

import time
from typing import Any

from tokenmill.producer.shards import ReadsStreams, Shards
from tokenmill.producer.steps import Call, Calls, Effect, Sleep


class Transport:
    """For one thread at a time; several may share the `shards`."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._reader: ReadsStreams | None = None

    def __call__(self, effect: Effect) -> Any:
        if isinstance(effect, Call):
            return getattr(self._shards.server(effect.shard), effect.method)(*effect.arguments)
        if isinstance(effect, Calls):
            with self._shards.server(effect.shard).pipeline(transaction=False) as pipeline:
                for method, arguments in effect.calls:
                    getattr(pipeline, method)(*arguments)
                return pipeline.execute()
        if isinstance(effect, Sleep):
            return time.sleep(effect.seconds)
        if self._reader is None:
            self._reader = self._shards.reader()
        return self._reader.xread(dict(effect.streams), count=effect.count, block=effect.block_ms)
