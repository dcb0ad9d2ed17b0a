"""Status, limits, purge, dead letters and compaction, by the class and by the commands."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result

from tokenmill.producer import operator as operator_module
from tokenmill.producer.cli import tokenmill
from tokenmill.producer.client import Client
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.keys import Keys
from tokenmill.producer.operator import Operator, Purged
from tokenmill.producer.wire import Usage, chain_digest
from tokenmill.worker.queue import Append, Claim, Finish, Queue

MakeQueue = Callable[..., Queue]
KEYS = Keys()
AMPLE: dict[str, Any] = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}


@pytest.fixture
def operator(server: redis.Redis) -> Operator:
    return Operator(server, KEYS)


@pytest.fixture
def run(server_url: str) -> Callable[..., Result]:
    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        result = CliRunner().invoke(tokenmill, [*arguments, "--redis", server_url], input=stdin)
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result

    return invoke


def end(queue: Queue, claim: Claim, *token_ids: int, reason: str = "") -> None:
    finish = Finish(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=0,
        token_ids=token_ids,
        text="!" * len(token_ids),
        digest=chain_digest("", token_ids),
        finish_reason="error" if reason else "stop",
        reason=reason,
        usage=Usage(prompt_tokens=1, completion_tokens=len(token_ids)),
    )
    queue.finish([finish])


def fail(client: Client, queue: Queue, reason: str = "the model broke", **fields: Any) -> str:
    request_id = client.submit("x", **fields)
    (claim,) = queue.claim(**AMPLE)
    end(queue, claim, 1, 2, reason=reason)
    return request_id


def test_status_counts_every_state(
    client: Client, server: redis.Redis, operator: Operator, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    fail(client, queue)
    client.submit_many(client.new_request("x") for _ in range(4))
    one, two = queue.claim(**AMPLE, limit=2)
    queue.release(two.request_id, two.epoch, undo=True, delay_ms=60_000)
    server.xadd(KEYS.inbox, {"json": "{}"})
    status = operator.status()
    assert (status.live, status.waiting, status.running, status.parked) == (4, 2, 1, 1)
    assert (status.inbox, status.dead, status.workers) == (1, 1, 1)
    assert status.tenants == {"default": 4}
    assert 0 <= status.oldest_s < 60
    assert not status.paused
    end(queue, one)


def test_status_as_text_and_json(client: Client, run: Callable[..., Result]) -> None:
    client.submit("x")
    run("queue", "set", "--weight", "gold=3", "--quota", "free=10")
    run("queue", "pause")
    text = run("queue", "status").stdout
    assert "queue default: 1 live; paused, go on with: tokenmill queue resume" in text
    assert "weight:gold = 3" in text
    fields = json.loads(run("queue", "status", "--json").stdout)
    assert (fields["waiting"], fields["paused"]) == (1, True)
    run("queue", "resume")
    assert json.loads(run("queue", "status", "--json").stdout)["paused"] is False


def test_resume_wakes_who_waits(client: Client, operator: Operator, make_queue: MakeQueue) -> None:
    operator.pause()
    client.submit("x")
    queue = make_queue()
    assert queue.claim(**AMPLE) == []
    assert queue.wait(0.01) is False
    operator.resume()
    assert queue.wait(5) is True
    assert len(queue.claim(**AMPLE)) == 1


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"max_live": 0}, "max_live"),
        ({"result_ttl_s": 0}, "result_ttl_s"),
        ({"weights": {"a": 0}}, "weight of a"),
        ({"weights": {"a b": 1}}, "tenant"),
        ({"quotas": {"a": -1}}, "quota of a"),
    ],
)
def test_bad_limits_are_refused_and_nothing_is_set(
    operator: Operator, server: redis.Redis, setting: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"{named} must be"):
        operator.configure(**{"dead_ttl_s": 5, **setting})
    assert not server.exists(KEYS.settings)


def test_bad_pairs_name_the_option(run: Callable[..., Result]) -> None:
    result = run("queue", "set", "--weight", "gold")
    assert result.exit_code == 2
    assert "--weight must be TENANT=N" in result.stderr


def test_purge_takes_what_nobody_runs(
    server_url: str, server: redis.Redis, operator: Operator, make_queue: MakeQueue
) -> None:
    queue = make_queue()
    with Client(server_url, tenant="a") as a, Client(server_url, tenant="b") as b:
        kept = [a.submit("x", priority=priority) for priority in (0, 2)]
        claims = queue.claim(**AMPLE)
        queue.release(claims[1].request_id, claims[1].epoch, undo=True, delay_ms=60_000)
        a.submit_many(a.new_request("x", priority=priority) for priority in (0, 1, 2) * 300)
        b.submit_many(b.new_request("x") for _ in range(3))
        assert operator.purge(tenant="a", priority=1).cancelled == 300
        assert operator.purge(tenant="b").cancelled == 3
        assert operator.purge().cancelled == 601  # the parked one too
        assert a.result(kept[1], timeout_s=0).reason == "purged by an operator"
        status = operator.status()
        assert (status.live, status.running, status.waiting) == (1, 1, 0)
        assert not server.exists(KEYS.lanes(1))
    end(queue, claims[0])
    queue.claim(**AMPLE)
    names = (key.decode().removeprefix(KEYS.tag + ":") for key in server.scan_iter())
    assert {name.partition(":")[0] for name in names} <= {"r", "o", "ctl", "workers", "w"}


def test_purge_asks_first(client: Client, run: Callable[..., Result]) -> None:
    client.submit("x")
    refused = run("queue", "purge", stdin="n\n")
    assert refused.exit_code == 1
    assert "1 requests wait on queue default; cancel those, all?" in refused.stderr
    assert run("queue", "purge", stdin="y\n").stdout == "1 cancelled\n"
    assert run("queue", "purge", "--yes", "--json").stdout == '{"cancelled": 0, "foreign": 0}\n'


def test_dead_letters_are_listed_with_reasons(
    client: Client, make_queue: MakeQueue, run: Callable[..., Result]
) -> None:
    queue = make_queue()
    first, second = fail(client, queue, "too long"), fail(client, queue, "too short")
    lines = run("dead", "list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [second, first]
    assert lines[1].endswith("default  1 attempt  too long")
    shown = run("dead", "list", "--limit", "1")
    assert len(shown.stdout.splitlines()) == 1
    assert "and 1 more" in shown.stderr


@pytest.mark.parametrize("reply_to", ["", "mine"])
def test_retry_runs_a_dead_letter_from_its_first_token(
    client: Client,
    server: redis.Redis,
    operator: Operator,
    make_queue: MakeQueue,
    reply_to: str,
) -> None:
    queue = make_queue()
    request_id = fail(client, queue, reply_to=reply_to)
    assert operator.retry([request_id, "0." + "9" * 26]) == {
        request_id: "OK",
        "0." + "9" * 26: "no dead letter of that id",
    }
    assert operator.retry([request_id])[request_id] == "no dead letter of that id"
    assert list(operator.dead()) == []
    (claim,) = queue.claim(**AMPLE)
    assert (claim.request_id, claim.token_ids, claim.attempts) == (request_id, (), 1)
    assert server.ttl(KEYS.record(request_id)) == -1
    end(queue, claim, 7)
    assert client.result(request_id, timeout_s=5).token_ids == (7,)


def test_retry_and_drop_by_command(
    client: Client, make_queue: MakeQueue, run: Callable[..., Result]
) -> None:
    queue = make_queue()
    first, second = fail(client, queue), fail(client, queue)
    assert run("dead", "drop", first).stdout == "1 dropped\n"
    gone = run("dead", "retry", first)
    assert (gone.exit_code, gone.stdout) == (
        1,
        f"{first}: its payload is not kept any more\n0 run again\n",
    )
    assert run("dead", "retry", "--all").stdout == "1 run again\n"
    assert [claim.request_id for claim in queue.claim(**AMPLE)] == [second]
    assert run("dead", "retry").exit_code == 2


def test_a_retry_of_all_stops_at_a_full_queue_and_loses_nothing(
    client: Client, operator: Operator, make_queue: MakeQueue, run: Callable[..., Result]
) -> None:
    queue = make_queue()
    ids = {fail(client, queue) for _ in range(5)}
    operator.configure(max_live=3)
    client.submit("x")
    told = run("dead", "retry", "--all")
    assert told.exit_code == 1
    assert "2 run again\n3 stay dead letters: the queue is full (max_live); raise it" in told.stdout
    status = operator.status()
    assert (status.live, status.dead, status.tenants) == (3, 3, {"default": 3})
    left = {letter.request_id for letter in operator.dead()}
    verdicts = [
        json.loads(line)
        for line in run("dead", "retry", "--all", "--json").stdout.split("\n")
        if line
    ]
    assert {row["id"] for row in verdicts} == left
    assert {row["verdict"] for row in verdicts} == {"the queue is full (max_live)"}
    operator.configure(max_live=100)
    assert run("dead", "retry", "--all").stdout == "3 run again\n"
    assert {claim.request_id for claim in queue.claim(**AMPLE)} > ids


def test_a_retry_keeps_to_the_quota_of_each_tenant(
    server_url: str, operator: Operator, make_queue: MakeQueue, run: Callable[..., Result]
) -> None:
    queue = make_queue()
    with Client(server_url, tenant="a") as a, Client(server_url, tenant="b") as b:
        for client in (a, a, a, b):
            fail(client, queue)
    operator.configure(quotas={"a": 2})
    told = run("dead", "retry", "--all")
    assert told.exit_code == 1
    assert "3 run again\n1 stay dead letters: the quota of its tenant is full" in told.stdout
    status = operator.status()
    assert (status.tenants, status.dead) == ({"a": 2, "b": 1}, 1)


def test_a_purge_takes_what_was_there_when_it_began(
    client: Client, operator: Operator, make_queue: MakeQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A producer that enqueues as fast as it purges: it must end, and leave what came later."""
    before = client.submit_many(client.new_request("x") for _ in range(1500))
    after: list[str] = []
    purge_lane = operator_module._PURGE

    def purge(*arguments: Any) -> Any:
        assert len(after) < 3000, "it does not end"
        after.extend(client.submit_many(client.new_request("y") for _ in range(500)))
        return purge_lane(*arguments)

    monkeypatch.setattr(operator_module, "_PURGE", purge)
    assert operator.purge() == Purged(cancelled=len(before))
    assert client.result(before[-1], timeout_s=0).finish_reason == "cancelled"
    assert operator.status().waiting == len(after) >= 1500
    claims = make_queue().claim(**AMPLE)
    assert [claim.request_id for claim in claims] == after[: len(claims)]


def test_a_purge_passes_over_what_is_foreign(
    server_url: str, server: redis.Redis, operator: Operator, run: Callable[..., Result]
) -> None:
    server.xadd(KEYS.lane(1, "a"), {"foo": "bar"})  # before any enqueue made the lane
    with Client(server_url, tenant="a") as a, Client(server_url, tenant="b") as b:
        ids = [a.submit("x"), b.submit("x")]
        server.xadd(KEYS.lane(1, "b"), {"id": "no such", "cost": "?", "most": "1"})
        server.xadd(KEYS.lane(1, "b"), {"id": "0.gone", "cost": "1", "most": "1"})
        server.zadd(KEYS.lanes(1), {"c": 0})
        server.set(KEYS.lane(1, "c"), "not a stream")
        told = run("queue", "purge", "--yes")
        assert told.stdout == "2 cancelled\n"
        assert "3 entries or keys in the lanes are none of ours" in told.stderr
        assert [a.result(name, timeout_s=0).finish_reason for name in ids] == ["cancelled"] * 2
    assert server.get(KEYS.lane(1, "c")) == b"not a stream"
    assert not server.exists(KEYS.lane(1, "a"), KEYS.lane(1, "b"))


def test_compact_joins_what_was_written_in_pieces(
    client: Client, server: redis.Redis, operator: Operator, make_queue: MakeQueue
) -> None:
    request_id = client.submit("x")
    queue = make_queue()
    (claim,) = queue.claim(**AMPLE)
    for start in range(3):
        piece = Append(
            request_id=request_id,
            epoch=claim.epoch,
            start=start,
            token_ids=(start,),
            text="ab"[start : start + 1],
            digest=chain_digest("", range(start + 1)),
        )
        queue.append([piece])
    assert operator.compact([request_id]) == 0  # it runs
    finish = Finish(
        request_id=request_id,
        epoch=claim.epoch,
        start=3,
        finish_reason="length",
        digest=chain_digest("", range(3)),
        usage=Usage(prompt_tokens=1, completion_tokens=3),
    )
    queue.finish([finish])
    before = client.result(request_id)
    assert operator.compact([request_id]) == 1
    assert server.xlen(KEYS.output(request_id)) == 1
    assert server.ttl(KEYS.output(request_id)) > 86_000
    assert client.result(request_id) == before
    assert operator.compact([request_id]) == 0
