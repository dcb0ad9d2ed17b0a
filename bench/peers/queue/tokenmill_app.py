"""tokenmill: `tokenmill_app.py worker|produce URL`. The real worker around an engine of no work.

A job is a request of one prompt token, its number; the engine answers it in one step with that
number and the time at which it began. PEER_DELIVERY is `stream` or `result`.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from measure import Answer, began_us, measure

from tokenmill.engine.capacity import Capacity
from tokenmill.engine.engine import StepOutput
from tokenmill.engine.sequence import FinishReason
from tokenmill.producer.client import Client
from tokenmill.producer.params import SamplingParams
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.log import configure
from tokenmill.worker.process import run

MAX_SEQS = 256


class NumberTokenizer:
    """Token ids as decimal text."""

    def encode(self, text: str) -> list[int]:
        return [int(item) for item in text.split()]

    def decode(self, token_ids: Sequence[int]) -> str:
        return " ".join(map(str, token_ids))

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return [len(messages)]


@dataclass
class NoopEngine:
    """Every sequence ends in the step after it came."""

    max_model_len: int = 4096
    model_name: str = "noop"
    quantization: str = "none"
    kv_cache_dtype: str = "float32"
    tokenizer: NumberTokenizer = field(default_factory=NumberTokenizer)
    outputs: dict[str, StepOutput] = field(default_factory=dict)

    @property
    def has_work(self) -> bool:
        return bool(self.outputs)

    def add(
        self,
        seq_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        output_ids: Sequence[int],
        seed: int,
        priority: int,
    ) -> None:
        tokens = (prompt_ids[0], began_us())
        self.outputs[seq_id] = StepOutput(seq_id, tokens, FinishReason.LENGTH)

    def abort(self, seq_id: str) -> None:
        self.outputs.pop(seq_id, None)

    def step(self) -> list[StepOutput]:
        outputs, self.outputs = list(self.outputs.values()), {}
        return outputs

    def capacity(self) -> Capacity:
        free = MAX_SEQS - len(self.outputs)
        return Capacity(tokens=100_000, blocks=10_000, sequences=free, block_size=32)

    def close(self) -> None:
        """Nothing runs beside it."""


def work(url: str) -> int:
    configure(as_json=True, level=logging.WARNING)
    return run(WorkerConfig(model="noop", redis_url=url), make_engine=lambda _: NoopEngine())


def produce_streams(url: str) -> None:
    """Tokens as they come, a stream a request."""
    client = Client(url)

    def submit(numbers: Sequence[int]) -> list[str]:
        return client.submit_many(client.new_request([n], max_tokens=2) for n in numbers)

    def collect(request_ids: Sequence[str]) -> Iterator[Answer]:
        tokens: dict[str, tuple[int, ...]] = {}
        for delta in client.follow_many(request_ids):
            tokens[delta.request_id] = tokens.get(delta.request_id, ()) + delta.token_ids
            if delta.finish_reason:
                yield tokens.pop(delta.request_id)

    measure(submit, collect)


def produce_replies(url: str) -> None:
    """Whole outputs, by one reply stream."""
    client = Client(url)
    replies = client.replies("bench")

    def submit(numbers: Sequence[int]) -> list[str]:
        return client.submit_many(
            client.new_request([n], max_tokens=2, reply_to="bench") for n in numbers
        )

    def collect(request_ids: Sequence[str]) -> Iterator[Answer]:
        left = set(request_ids)
        while left:
            for result in replies.poll(1.0):
                left.remove(result.request_id)
                yield result.token_ids

    measure(submit, collect)


if __name__ == "__main__":
    delivery = {"stream": produce_streams, "result": produce_replies}[os.environ["PEER_DELIVERY"]]
    sys.exit({"worker": work, "produce": delivery}[sys.argv[1]](sys.argv[2]))
