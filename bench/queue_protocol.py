"""The parts of bench/queue_speed.py that need no other process than the server.

Correctness first, then fenced deltas per second of server time, requests submitted per second, and
bytes that a request takes while it waits and after it has ended.
"""

import functools
import time

from queue_servers import Server

from tokenmill.producer.client import Client
from tokenmill.producer.keys import Keys
from tokenmill.producer.wire import Usage, chain_digest
from tokenmill.worker.queue import MAX_BATCH, Append, Claim, Finish, Queue, Verdict

#: What a delta carries: three flushes' worth at 50 tokens/s and 40 ms.
DELTA_TOKENS = 4
DELTA_TEXT = "some words of text, "
#: W1's mean request.
PROMPT = list(range(260))
OUTPUT_TOKENS = 60


def check(server: Server) -> None:
    """A fenced epoch, a repeat and a gap are refused, and tokens come back in order."""
    queue = Queue(server.client, Keys(), "bench-check")
    with Client(server.url) as client:
        request_id = client.submit([1, 2, 3], max_tokens=12)
        (claim,) = _claims(queue, 1)
        first, second = _append(claim, 0), _append(claim, DELTA_TOKENS)
        stale = Append(
            request_id=request_id,
            epoch=claim.epoch - 1,
            start=0,
            token_ids=(9,),
            text="",
            digest=chain_digest("", (9,)),
        )
        wanted = [Verdict.FENCED, Verdict.OK, Verdict.OK, Verdict.GAP]
        verdicts = [queue.append([item])[0] for item in (stale, first, first, _append(claim, 2000))]
        queue.append([second])
        queue.finish([_finish(claim, 2 * DELTA_TOKENS)])
        tokens = [token for delta in client.follow(request_id) for token in delta.token_ids]
        if verdicts != wanted or tokens != list(range(2 * DELTA_TOKENS)):
            raise SystemExit(f"the protocol is wrong: {verdicts}, {tokens}")
    queue.retire()
    server.clear()


def fenced_deltas(server: Server, *, batches: int) -> dict[str, float]:
    """Deltas/s of server time: inside the script, of the server's CPU, and of wall time."""
    queue = Queue(server.client, Keys(), "bench-deltas")
    with Client(server.url) as client:
        client.submit_many(client.new_request([1], max_tokens=100_000) for _ in range(MAX_BATCH))
    claims = _claims(queue, MAX_BATCH)
    given = [[_append(claim, n * DELTA_TOKENS) for claim in claims] for n in range(batches)]
    calls, inside_us = server.scripts_us()
    cpu_s, began = server.cpu_s(), time.perf_counter()
    for appends in given:
        if any(verdict is not Verdict.OK for verdict in queue.append(appends)):
            raise SystemExit("a delta was refused")
    wall_s, cpu_s = time.perf_counter() - began, server.cpu_s() - cpu_s
    calls_after, inside_us_after = server.scripts_us()
    if calls_after - calls != batches:
        raise SystemExit(f"{calls_after - calls} script calls, {batches} expected")
    deltas = batches * MAX_BATCH
    queue.retire()
    server.clear()
    return {
        "per_script_s": deltas / (inside_us_after - inside_us) * 1e6,
        "per_cpu_s": deltas / cpu_s,
        "per_wall_s": deltas / wall_s,
    }


def submits(server: Server, *, requests: int) -> dict[str, float]:
    """Requests/s of one producer: `submit_many` alone, and with `new_request` in it."""
    with Client(server.url) as client:
        built = [client.new_request([n], max_tokens=2) for n in range(requests)]
        began = time.perf_counter()
        client.submit_many(built)
        alone_s = time.perf_counter() - began
        began = time.perf_counter()
        client.submit_many(client.new_request([n], max_tokens=2) for n in range(requests))
        built_s = time.perf_counter() - began
        if client.live() != 2 * requests:
            raise SystemExit(f"{client.live()} requests are live, {2 * requests} were submitted")
    server.clear()
    return {"submit_many": requests / alone_s, "with_new_request": requests / built_s}


def memory(server: Server, *, requests: int, reply_to: str = "") -> dict[str, float]:
    """Bytes a request of W1's mean size (260 prompt ids, 60 tokens in 15 deltas) takes.

    With `reply_to` the worker commits no delta of so short an output, and its entry is in the
    reply stream still.
    """
    queue = Queue(server.client, Keys(), "bench-memory")
    with Client(server.url) as client:
        empty = server.memory()
        client.submit_many(
            client.new_request(PROMPT, max_tokens=OUTPUT_TOKENS, reply_to=reply_to)
            for _ in range(requests)
        )
        waiting = server.memory()
    left = requests
    while left:
        claims = _claims(queue, min(left, MAX_BATCH))
        starts = () if reply_to else range(0, OUTPUT_TOKENS, DELTA_TOKENS)
        for start in starts:
            queue.append([_append(claim, start) for claim in claims])
        unsent = OUTPUT_TOKENS if reply_to else 0
        queue.finish([_finish(claim, OUTPUT_TOKENS, unsent) for claim in claims])
        left -= len(claims)
    finished = server.memory()
    queue.retire()
    server.clear()
    return {"waiting": (waiting - empty) / requests, "finished": (finished - empty) / requests}


def _claims(queue: Queue, number: int) -> list[Claim]:
    claims = queue.claim(sequences=number, tokens=10**9, kv_tokens=10**9)
    if len(claims) != number:
        raise SystemExit(f"{len(claims)} requests were claimed, {number} expected")
    return claims


def _tokens(start: int) -> tuple[int, ...]:
    return tuple(range(start, start + DELTA_TOKENS))


def _append(claim: Claim, start: int) -> Append:
    return Append(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=start,
        token_ids=_tokens(start),
        text=DELTA_TEXT,
        digest=_digest(start + DELTA_TOKENS),
    )


def _finish(claim: Claim, total: int, unsent: int = 0) -> Finish:
    return Finish(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=total - unsent,
        token_ids=tuple(range(total - unsent, total)),
        text=DELTA_TEXT * (unsent // DELTA_TOKENS),
        digest=_digest(total),
        finish_reason="length",
        usage=Usage(prompt_tokens=1, completion_tokens=total),
    )


@functools.cache
def _digest(total: int) -> str:
    """Digest of the first `total` tokens; every request here has the same."""
    return chain_digest("", range(total))
