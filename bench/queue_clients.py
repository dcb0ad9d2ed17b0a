"""Clients of a closed loop through Redis: each sends a request when its last one has ended."""

import random
import time
from collections.abc import Sequence

from tokenmill.engine.planning.figures import Record
from tokenmill.producer.client import Client

VOCABULARY = 49152
#: A request that says nothing for so long is an error of the bench.
SILENCE_S = 120.0


def closed_loop(
    client: Client, lengths: Sequence[tuple[int, int]], clients: int, *, seed: int = 0
) -> list[Record]:
    """Run requests of these (prompt, output) lengths, `clients` of them at a time.

    Times are those at which this process read.

    All clients live in this thread, which reads all streams at once: it is a few percent of a core.
    """
    draw = random.Random(seed)
    left = [
        ([draw.randrange(VOCABULARY) for _ in range(prompt)], output)
        for prompt, output in reversed(lengths)
    ]
    follower = client.follower()
    records: list[Record] = []
    running: dict[str, Record] = {}
    missing: dict[str, int] = {}

    def send() -> None:
        prompt, output = left.pop()
        request = client.new_request(prompt, max_tokens=output, ignore_eos=True)
        record = Record(time.perf_counter(), len(prompt))
        client.submit_many([request])
        records.append(record)
        running[request.request_id], missing[request.request_id] = record, output
        follower.add(request.request_id)

    for _ in range(min(clients, len(left))):
        send()
    heard = time.perf_counter()
    while running:
        deltas = follower.poll(1.0)
        now = time.perf_counter()
        heard = now if deltas else heard
        if now - heard > SILENCE_S:
            raise SystemExit(f"{len(running)} requests say nothing for {SILENCE_S:g} s")
        for delta in deltas:
            running[delta.request_id].token_times += [now] * len(delta.token_ids)
            missing[delta.request_id] -= len(delta.token_ids)
            if delta.finish_reason:
                if delta.finish_reason != "length" or missing.pop(delta.request_id):
                    raise SystemExit(f"{delta.request_id} ended early: {delta}")
                del running[delta.request_id]
                if left:
                    send()
    return records
