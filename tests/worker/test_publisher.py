"""What reaches the stream, when, and what the server's verdicts do; on a real server, by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import redis

from scripted_engine import ScriptedTokenizer, scripted_token
from tokenmill.engine.engine import StepOutput
from tokenmill.engine.sequence import FinishReason
from tokenmill.producer.client import Client
from tokenmill.producer.keys import Keys
from tokenmill.producer.wire import chain_digest
from tokenmill.worker import publisher as publisher_module
from tokenmill.worker.output import Output
from tokenmill.worker.queue import Queue
from written import entries, state

pytestmark = pytest.mark.placed("")

KEYS = Keys()
MakeParts = Callable[..., Any]
OutputOf = Callable[[str], Any]


def test_first_token_at_once_then_gathered(
    client: Client, server: redis.Redis, make_parts: MakeParts
) -> None:
    parts = make_parts()
    early = client.submit("abc", max_tokens=100)
    parts.claim()
    parts.step()
    parts.loop.turn()
    parts.publisher.turn()  # opens a flush interval
    late = client.submit("def", max_tokens=100)
    parts.claim()
    for _ in range(3):  # within that interval
        parts.loop.turn()
        parts.publisher.turn()
    assert [key for key, _, _ in entries(server, early)] == ["1-0", "2-0"]
    assert [key for key, _, _ in entries(server, late)] == ["1-0"]
    parts.clock.sleep(publisher_module.FLUSH_S)
    parts.publisher.turn()
    assert [key for key, _, _ in entries(server, early)] == ["1-0", "2-0", "5-0"]
    assert [key for key, _, _ in entries(server, late)] == ["1-0", "3-0"]


def test_a_drain_writes_what_is_unsent_before_it_releases(
    client: Client, server: redis.Redis, make_parts: MakeParts
) -> None:
    parts = make_parts()
    request_id = client.submit("abc", max_tokens=100)
    parts.claim()
    for _ in range(5):
        parts.loop.turn()
        parts.publisher.turn()
    assert len(entries(server, request_id)) < 5
    parts.publisher.drain()
    parts.publisher.run()
    assert entries(server, request_id)[-1][0] == "5-0"
    assert state(server, request_id) == "park"


def test_an_append_call_carries_at_most_64_requests(
    client: Client, make_parts: MakeParts, spied_queue: Any
) -> None:
    parts = make_parts(queue=spied_queue, max_num_seqs=100)
    for number in range(80):
        client.submit(f"n{number}", max_tokens=50)
    while len(parts.engine.sequences) < 80:
        parts.claim()
        parts.step()
    spied_queue.calls.clear()
    parts.step()
    assert [len(batch) for name, batch in spied_queue.calls if name == "append"] == [64, 16]


def test_the_end_carries_the_last_tokens_and_usage(
    client: Client, make_parts: MakeParts, output_of: OutputOf
) -> None:
    parts = make_parts()
    request_id = client.submit("abc", max_tokens=3)
    parts.claim()
    parts.step(3)
    result = output_of(request_id)
    prompt = list(b"abc")
    assert result.token_ids == tuple(scripted_token(prompt, n, 1) for n in range(3))
    assert result.text == parts.engine.tokenizer.decode(result.token_ids)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, 3)
    assert parts.publisher.num_held == 0


def stop_after(prompt: str, count: int) -> str:
    """A stop string that the text completes with token `count`, not earlier."""
    tokens = [scripted_token(list(prompt.encode()), n, 1) for n in range(count)]
    text: str = ScriptedTokenizer().decode(tokens)
    stop = text[-3:]
    assert text.find(stop) == len(text) - 3
    return stop


def test_a_stop_string_cuts_the_text_and_aborts_the_sequence(
    client: Client, make_parts: MakeParts, output_of: OutputOf
) -> None:
    parts = make_parts()
    request_id = client.submit("abc", max_tokens=100, stop=[stop_after("abc", 9)])
    parts.claim()
    parts.step(12)
    result = output_of(request_id)
    assert result.finish_reason == "stop"
    assert len(result.token_ids) == 9
    assert result.text == parts.engine.tokenizer.decode(result.token_ids)[:6]
    assert parts.engine.aborted == [f"{request_id}#1"]
    assert not parts.engine.has_work


def test_a_worker_that_died_before_the_end_of_a_stopped_text_leaves_only_the_end(
    client: Client,
    make_parts: MakeParts,
    make_queue: Callable[..., Queue],
    output_of: OutputOf,
    server: redis.Redis,
) -> None:
    client.submit("abc", max_tokens=100, stop=[stop_after("abc", 6)])
    queue = make_queue("w1")
    (claim,) = queue.claim(sequences=1, tokens=1, kv_tokens=9999)
    output = Output(claim, ScriptedTokenizer(), prompt_tokens=3)
    output.feed([scripted_token(list(b"abc"), n, 1) for n in range(9)])
    assert output.is_stopped
    queue.append([output.to_append()])  # all is committed, and then it is killed
    server.zadd(KEYS.workers, {"w1": 1})
    parts = make_parts("w2")
    parts.queue.reap()
    parts.claim()
    parts.publisher.turn()
    result = output_of(claim.request_id)
    assert (result.finish_reason, len(result.token_ids)) == ("stop", 6)
    assert result.text == parts.engine.tokenizer.decode(result.token_ids)[:3]
    assert parts.inbox.take().admissions == ()


def test_cancel_finishes_with_what_there_is(
    client: Client, make_parts: MakeParts, output_of: OutputOf
) -> None:
    parts = make_parts()
    request_id, other = client.submit("abc", max_tokens=100), client.submit("x", max_tokens=100)
    parts.claim()
    parts.step(4)
    assert client.cancel(request_id)
    parts.step(2)
    result = output_of(request_id)
    assert result.finish_reason == "cancelled"
    assert len(result.token_ids) == 5
    assert len(result.text) == 5
    assert list(parts.engine.sequences) == [f"{other}#1"]


def test_cancel_reaches_a_request_that_gets_no_tokens(
    client: Client, make_parts: MakeParts, output_of: OutputOf
) -> None:
    parts = make_parts()
    request_id = client.submit("abc", max_tokens=100)
    parts.claim()
    parts.publisher.turn()
    client.cancel(request_id)
    parts.clock.sleep(1.1)
    parts.publisher.turn()
    assert output_of(request_id).finish_reason == "cancelled"
    assert parts.inbox.take().aborts == (f"{request_id}#1",)


def test_the_digest_goes_on_over_epochs(
    client: Client, make_parts: MakeParts, server: redis.Redis
) -> None:
    request_id = client.submit("abc", max_tokens=9)
    first = make_parts("w1")
    first.claim()
    first.step(4)
    first.publisher._drain()
    second = make_parts("w2")
    second.claim()
    second.step(6)
    tokens = [token for _, piece, _ in entries(server, request_id) for token in piece]
    assert len(tokens) == 9
    digest: Any = server.hget(KEYS.record(request_id), "digest")
    assert digest.decode() == chain_digest("", tokens)


def test_an_ended_request_is_given_back_by_its_end(
    client: Client, make_parts: MakeParts, output_of: OutputOf
) -> None:
    parts = make_parts()
    request_id = client.submit("abc", max_tokens=9)
    parts.claim()
    seq_id = f"{request_id}#1"
    parts.publisher.put([StepOutput(seq_id, (1,), FinishReason.STOP)])
    parts.publisher.give_back([seq_id], undo=True)
    parts.publisher.turn()
    assert output_of(request_id).finish_reason == "stop"


def test_tokens_of_an_unknown_sequence_are_ignored(make_parts: MakeParts) -> None:
    parts = make_parts()
    parts.publisher.put([StepOutput("0.unknown#1", (1, 2))])
    parts.publisher.turn()
    assert parts.publisher.num_held == 0


def test_with_a_reply_stream_tokens_are_committed_in_checkpoints(
    client: Client, make_parts: MakeParts
) -> None:
    parts = make_parts()
    request_id = client.submit("hello", max_tokens=600, reply_to="mine")
    parts.claim()
    offsets = set()
    for _ in range(599):
        parts.step()
        offsets.add(int(client._shards.server(0).hget(Keys().record(request_id), "offset") or 0))
    assert offsets == {0, 256, 512}
    parts.step(3)
    (result,) = client.replies("mine").poll(1)
    assert len(result.token_ids) == 600


def test_a_cancel_is_seen_between_checkpoints(client: Client, make_parts: MakeParts) -> None:
    parts = make_parts()
    request_id = client.submit("hello", max_tokens=200, reply_to="mine")
    parts.claim()
    parts.step(5)
    client.cancel(request_id)
    parts.clock.sleep(2)
    parts.step(2)
    (result,) = client.replies("mine").poll(1)
    assert result.finish_reason == "cancelled"
    assert result.token_ids
