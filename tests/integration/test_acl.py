"""Each role under the rights of deploy/redis/users.acl: it can do its work, and nothing else."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.exceptions import NoPermissionError

from servers import Server, free_ports, running
from tokenmill.producer import scripts
from tokenmill.producer.client import Client
from tokenmill.producer.connection import connect
from tokenmill.producer.errors import ServerUnreachable, WrongServer
from tokenmill.producer.keys import Keys
from tokenmill.producer.refusals import is_about_the_server
from tokenmill.producer.sharded_operator import operator_of
from tokenmill.producer.shards import Shards
from tokenmill.producer.wire import Usage, WorkerInfo, chain_digest
from tokenmill.worker.queue import Append, Finish, Verdict
from tokenmill.worker.shards import queue_of

USERS = Path(__file__).parents[2] / "deploy" / "redis" / "users.acl"
KEYS, OTHER = Keys(), Keys("other")
AMPLE = {"sequences": 100, "tokens": 100_000, "kv_tokens": 1_000_000}
PRODUCER_SCRIPTS = ("enqueue", "cancel", "forget")
ROLES = ("producer", "worker", "operator")


@pytest.fixture
def guarded(server_kind: str) -> Iterator[Server]:
    """A server that knows the three users, and lets nobody else in."""
    with running(server_kind, "--aclfile", str(USERS), port=free_ports(1)[0]) as server:
        yield server


@pytest.fixture
def as_role(guarded: Server) -> Callable[[str], str]:
    """The URL of a role."""
    port = guarded.port
    return lambda role: f"redis://{role}:CHANGE-{role}@127.0.0.1:{port}"


def refused(server: redis.Redis, *command: Any) -> bool:
    call: Any = server.execute_command
    try:
        call(*command)
    except NoPermissionError:
        return True
    except redis.ResponseError as error:
        if re.search("ACL failure|NOPERM|can't (run|access)", str(error)):  # inside a script
            return True
        raise
    return False


def log_of(server: Server) -> list[Any]:
    """What was refused, but for the library that tells its name on connecting."""
    with server.admin() as admin:
        entries: Any = admin.acl_log()
    return [entry for entry in entries if "setinfo" not in str(entry["object"])]


def clear_log(server: Server) -> None:
    with server.admin() as admin:
        admin.acl_log_reset()


def serve_once(url: str, count: int) -> None:
    """All that a worker does, with so many requests."""
    with Shards(url, "default") as shards:
        queue = queue_of(shards, "w1")
        queue.register(WorkerInfo(worker_id="w1", model="m", host="h", pid=1, started_ms=1))
        queue.admit()
        claims = queue.claim(**AMPLE, kv_total=10**6)
        assert len(claims) == count
        queue.release(claims[0].request_id, claims[0].epoch, undo=True, reason="later")
        (again,) = queue.claim(**AMPLE)
        for claim in [again, *claims[1:]]:
            piece = Append(
                request_id=claim.request_id,
                epoch=claim.epoch,
                start=0,
                token_ids=(65,),
                text="A",
                digest=chain_digest("", (65,)),
            )
            assert queue.append([piece]) == [Verdict.OK]
            end = Finish(
                request_id=claim.request_id,
                epoch=claim.epoch,
                start=1,
                finish_reason="error" if claim is again else "stop",
                reason="",
                usage=Usage(prompt_tokens=1, completion_tokens=1),
            )
            assert queue.finish([end]) == [Verdict.OK]
        queue.renew()
        queue.wake()
        queue.reap()
        queue.wait(0.01)
        queue.retire()


def test_each_role_can_do_its_work(guarded: Server, as_role: Callable[[str], str]) -> None:
    clear_log(guarded)
    with Client(as_role("producer")) as client:
        ids = [client.submit(f"p{n}", priority=n % 3) for n in range(4)]
        replied = client.submit("r", reply_to="mine")
        gone = client.submit("gone")
        assert client.cancel(gone)
        inbox = connect(as_role("producer"))
        inbox.xadd(KEYS.inbox, {"json": '{"prompt": "plain"}'})
        inbox.xadd(KEYS.inbox, {"json": '{"prompt": 5}'})
        inbox.close()
        with Shards(as_role("worker"), "default") as shards:
            queue = queue_of(shards, "first")
            queue.claim(**AMPLE, limit=1)
            queue.admit()
            queue.retire()
        serve_once(as_role("worker"), 6)
        follower = client.follower()
        for request_id in ids:
            follower.add(request_id)
        while len(follower):
            follower.poll(1.0)
        (result,) = client.replies("mine").poll(1.0)
        assert (result.request_id, result.text) == (replied, "A")
        client.forget([*ids, replied], within_s=1)
        assert client.live() == 0
        assert client.workers() == []
    with Shards(as_role("operator"), "default") as shards:
        operator = operator_of(shards)
        operator.configure(max_live=10, result_ttl_s=60, weights={"t": 2.0}, quotas={"t": 5})
        operator.pause()
        operator.resume()
        letters = list(operator.dead())
        assert len(letters) == 2
        assert operator.retry([letters[0].request_id]) == {letters[0].request_id: "OK"}
        assert operator.drop([letters[1].request_id]) == 1
        assert operator.purge().cancelled == 1
        operator.compact(ids)
        operator.status()
        shards.server(0).info("memory")
    assert log_of(guarded) == []


@pytest.mark.parametrize("role", ROLES)
def test_nobody_rules_the_server_or_sees_other_queues(
    as_role: Callable[[str], str], role: str
) -> None:
    with connect(as_role(role)) as server:
        for command in (
            ("FLUSHALL",),
            ("FLUSHDB",),
            ("KEYS", "*"),
            ("SCAN", 0),
            ("CONFIG", "GET", "*"),
            ("CONFIG", "SET", "maxmemory", "1"),
            ("ACL", "LIST"),
            ("CLIENT", "LIST"),
            ("SHUTDOWN",),
            ("REPLICAOF", "NO", "ONE"),
            ("MONITOR",),
            ("SCRIPT", "FLUSH"),
            ("DBSIZE",),
            ("PUBLISH", "x", "y"),
            ("GET", "elsewhere"),
            ("SET", "elsewhere", "1"),
            ("HGETALL", OTHER.record("0.x")),
            ("XADD", OTHER.inbox, "*", "json", "{}"),
            ("EVAL", "return redis.call('DEL', KEYS[1])", 1, OTHER.settings),
            ("EVAL", "return redis.call('FLUSHALL')", 0),
        ):
            assert refused(server, *command), command


def test_a_role_cannot_do_what_others_do(as_role: Callable[[str], str]) -> None:
    forbidden = {
        "producer": [
            ("XREADGROUP", "GROUP", "g", "workers", "STREAMS", KEYS.lane(1, "t"), ">"),
            ("ZADD", KEYS.workers, 1, "me"),
            ("SADD", KEYS.own("w1"), "x"),
            ("HSET", KEYS.worker("w1"), "pid", 1),
            ("XADD", KEYS.dead, "*", "id", "x"),
            ("XDEL", KEYS.inbox, "0-1"),
            ("HSET", KEYS.settings, "max_live", 1),
            ("DEL", KEYS.settings),
            ("DEL", KEYS.shards),
        ],
        "worker": [
            ("HSET", KEYS.settings, "max_live", 1),
            ("DEL", KEYS.settings),
            ("DEL", KEYS.shards),
        ],
    }
    for role, commands in forbidden.items():
        with connect(as_role(role)) as server:
            for command in commands:
                assert refused(server, *command), (role, command)
    with Shards(as_role("producer"), "default") as shards:
        queue = queue_of(shards, "thief")
        with pytest.raises(
            redis.ResponseError, match=r"ACL failure|NOPERM|can't run this command"
        ) as caught:
            queue.claim(**AMPLE)
        assert is_about_the_server(caught.value)  # no request is given up for it


def test_wrong_words_are_told(as_role: Callable[[str], str], guarded: Server) -> None:
    with pytest.raises(WrongServer, match="refuses us") as caught:
        Client(as_role("producer").replace("CHANGE", "guess"))
    assert "guess" not in str(caught.value)
    with pytest.raises((WrongServer, ServerUnreachable), match=r"permission|NOPERM") as said:
        Client(as_role("producer"), queue="other")
    assert "CHANGE" not in str(said.value)


def test_every_command_of_a_script_is_granted_and_no_other() -> None:
    """What the scripts call, the users may; nobody may what nothing calls."""
    producer = Path(scripts.__file__).parent / "lua"
    worker = producer.parents[1] / "worker" / "lua"
    shared = _calls(producer / "record.lua") | _calls(producer / "place.lua")
    called = {
        "producer": shared.union(*(_calls(producer / f"{name}.lua") for name in PRODUCER_SCRIPTS)),
        "worker": shared | _calls(producer / "lane.lua") | _union(worker),
    }
    plain = {
        "producer": {"get", "set", "hgetall", "xread", "xrange", "xrevrange", "zrangebyscore"},
        "worker": {"get", "set", "xread", "xrange", "xrevrange", "hgetall", "smembers"},
    }
    server = {"hello", "ping", "time", "evalsha", "eval", "script|load", "cluster|slots"}
    called["producer"] -= {"srem"}  # of what is running, which no producer ends
    for role, names in called.items():
        granted = set(re.findall(r"[ (]\+([a-z|]+)", _line(role)))
        missing = (names | plain[role]) - granted
        assert not missing, f"{role} needs {sorted(missing)}"
        needless = granted - names - plain[role] - server
        assert not needless, f"{role} needs no {sorted(needless)}"


def _line(role: str) -> str:
    return next(line for line in USERS.read_text().splitlines() if f"user {role} " in line)


def _union(folder: Path) -> set[str]:
    return {name for path in folder.glob("*.lua") for name in _calls(path)}


def _calls(path: Path) -> set[str]:
    found = re.findall(
        r"(?:redis\.p?call|try|later)\('([A-Z]+)'(?:, '([A-Z]+)')?", path.read_text()
    )
    return {
        f"{name}|{sub}".lower() if name in ("XGROUP", "XINFO") else name.lower()
        for name, sub in found
    }


def test_worker_processes_work_under_their_rights(
    guarded: Server, as_role: Callable[[str], str], start_worker: Callable[..., Any]
) -> None:
    worker = start_worker(url=as_role("worker"))
    with Client(as_role("producer")) as client:
        results = list(client.map(["a", "b", "c"], max_tokens=5))
        assert {result.finish_reason for result in results} == {"length"}
    worker.send(signal.SIGTERM)
    assert worker.wait() == 0
    assert log_of(guarded) == []
