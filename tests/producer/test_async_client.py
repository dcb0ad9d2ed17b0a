"""What is asyncio's own: cancelled tasks, many of them, and several shards in one loop."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis

from tokenmill.producer.async_client import AsyncClient
from tokenmill.producer.errors import InvalidRequest, ServerUnreachable
from tokenmill.producer.keys import Keys
from tokenmill.producer.operator import Operator
from tokenmill.producer.wire import Delta

pytestmark = pytest.mark.everywhere


async def text_of(client: AsyncClient, request_id: str) -> str:
    return "".join([delta.text async for delta in client.follow(request_id)])


def in_use(client: AsyncClient) -> int:
    """Connections that somebody reads from."""
    shards: Any = client._shards
    return sum(len(server.connection_pool._in_use_connections) for server in shards._blocking)


def test_many_tasks_share_a_client(server_url: str, echo_worker: None) -> None:
    async def main() -> list[str]:
        async with AsyncClient(server_url) as client:
            ids = [await client.submit(f"text {number}") for number in range(20)]
            return await asyncio.gather(*(text_of(client, request_id) for request_id in ids))

    assert asyncio.run(main()) == [f"text {number}" for number in range(20)]


def test_requests_of_many_shards_are_followed_and_mapped(
    server_url: str, echo_worker: None
) -> None:
    async def main() -> None:
        async with AsyncClient(server_url) as client:
            prompts = [f"text {number}" for number in range(20)]
            ids = await client.submit_many(client.new_request(prompt) for prompt in prompts)
            deltas: list[Delta] = [delta async for delta in client.follow_many(ids)]
            texts = ["".join(d.text for d in deltas if d.request_id == name) for name in ids]
            assert texts == prompts
            results = [r.text async for r in client.map(prompts, window=6, ordered=True)]
            assert results == prompts
            assert in_use(client) == 0

    asyncio.run(main())


def test_a_cancelled_follow_gives_its_connection_back(server_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(server_url) as client:
            ids = [await client.submit("x") for _ in range(8)]
            deltas = client.follow_many(ids)
            reading = asyncio.ensure_future(anext(deltas))
            while not in_use(client):
                await asyncio.sleep(0)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert in_use(client) == 0
            assert await client.live() == 8  # it goes on
            assert await client.cancel(ids[0])
            assert (await client.result(ids[0], timeout_s=5)).finish_reason == "cancelled"

    asyncio.run(main())


@pytest.mark.parametrize("left", [1, 2])
def test_the_read_of_a_request_that_was_left_is_given_up(
    server_url: str, server: redis.Redis, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """As on a cluster: a read for each shard; here all are on one server."""
    if server.get(Keys("three").shards) is None:
        monkeypatch.setenv("TOKENMILL_SHARDS", "3")

    async def main() -> None:
        async with AsyncClient(server_url, queue="three") as client:
            shards: Any = client._shards
            if not shards.is_cluster:
                shards.is_cluster = True
                shards._servers *= 3
                shards._blocking *= 3
            ids: dict[int, str] = {}
            while len(ids) < 3:
                request_id = client.new_request("x").request_id
                ids[shards.number_of(request_id)] = request_id
            for request_id in ids.values():
                await client.submit("x", request_id=request_id)
            follower = client.follower()
            for request_id in ids.values():
                follower.add(request_id)
            assert await follower.poll(0.01) == []
            for number in range(3 - left):
                follower.remove(ids[number])
                await client.cancel(ids[number])  # its last delta comes
                await asyncio.wait([follower._perform._reads[number].task])
            await client.cancel(ids[2])
            deltas: list[Delta] = []
            while not deltas:
                deltas = await follower.poll(1)
            assert [delta.request_id for delta in deltas] == [ids[2]]
            await follower.aclose()
            assert in_use(client) == 0

    asyncio.run(main())


def test_a_cancelled_map_cancels_what_is_in_flight(server_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(server_url) as client:

            async def consume() -> None:
                async for _ in client.map(["x"] * 10, window=4):
                    pytest.fail("nobody answers")

            task = asyncio.ensure_future(consume())
            while await client.live() < 4:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await client.live() == 0
            assert in_use(client) == 0

    asyncio.run(main())


def test_a_cancelled_map_cancels_what_a_quota_let_in(server_url: str, server: redis.Redis) -> None:
    Operator(server, Keys()).configure(quotas={"default": 10})

    async def main() -> None:
        async with AsyncClient(server_url) as client:
            results = client.map(["x"] * 20, window=20)
            task = asyncio.ensure_future(anext(results))
            while await client.live() < 10:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await client.live() == 0

    asyncio.run(main())


def test_map_takes_an_asynchronous_source_as_it_comes(server_url: str, echo_worker: None) -> None:
    """Each prompt is made of an answer: neither may wait for the other."""

    async def main() -> list[str]:
        answers: asyncio.Queue[str] = asyncio.Queue()

        async def prompts() -> AsyncIterator[str]:
            yield "a"
            for _ in range(3):
                answer = await answers.get()
                yield f"{answer}b"
                yield f"{answer}c"

        texts = []
        async with AsyncClient(server_url) as client, asyncio.timeout(20):
            async for result in client.map(prompts(), window=4, max_tokens=20):
                texts.append(result.text)
                answers.put_nowait(result.text)
        return texts

    texts = asyncio.run(main())
    assert len(texts) == 7
    assert texts[0] == "a"
    assert {texts[1], texts[2]} == {"ab", "ac"}


def test_map_keeps_the_order_of_a_quick_asynchronous_source(
    server_url: str, echo_worker: None
) -> None:
    async def prompts() -> AsyncIterator[str]:
        for number in range(200):
            yield f"text {number}"

    async def main() -> list[str]:
        async with AsyncClient(server_url) as client:
            found = client.map(prompts(), window=32, ordered=True, max_tokens=20)
            return [result.text async for result in found]

    assert asyncio.run(main()) == [f"text {number}" for number in range(200)]


@pytest.mark.parametrize("is_left", [False, True])
def test_map_ends_with_its_asynchronous_source(server_url: str, is_left: bool) -> None:
    """By its error, or left by its caller: what is in flight is cancelled, the source is closed."""
    closed = []

    async def prompts() -> AsyncIterator[str]:
        try:
            yield "one"
            yield "two"
            if is_left:
                await asyncio.Event().wait()
            raise KeyError("row 3")
        finally:
            closed.append(True)

    async def main() -> int:
        async with AsyncClient(server_url) as client:
            found = client.map(prompts(), max_tokens=20)
            with pytest.raises(TimeoutError if is_left else KeyError):
                await asyncio.wait_for(anext(found), 0.3)
            await found.aclose()  # type: ignore[attr-defined]
            return await client.live()

    assert asyncio.run(main()) == 0
    assert closed == [True]


def test_a_client_that_is_not_open_says_so(server_url: str) -> None:
    client = AsyncClient(server_url)
    with pytest.raises(InvalidRequest, match="async with"):
        client.new_request("x")
    with pytest.raises(InvalidRequest, match="async with"):
        asyncio.run(client.submit("x"))


def test_a_reader_goes_on_after_a_crash(own_server: Any) -> None:
    async def main() -> None:
        async with AsyncClient(own_server.url) as client:
            with own_server.admin() as admin:
                admin.config_set("appendfsync", "always")
            request_id = await client.submit("x")
            reading = asyncio.ensure_future(text_of(client, request_id))
            while not in_use(client):
                await asyncio.sleep(0)
            own_server.kill()
            with pytest.raises(ServerUnreachable, match="does not answer"):
                await client.submit("y")
            own_server.start()
            assert await client.cancel(request_id)
            assert await reading == ""

    asyncio.run(main())


def test_a_result_of_a_reply_stream_is_waited_for_through_a_crash(own_server: Any) -> None:
    async def main() -> None:
        async with AsyncClient(own_server.url) as client:
            with own_server.admin() as admin:
                admin.config_set("appendfsync", "always")
            request_id = await client.submit("x", reply_to="mine")
            reading = asyncio.ensure_future(client.result(request_id))
            while not in_use(client):
                await asyncio.sleep(0)
            own_server.kill()
            with pytest.raises(ServerUnreachable, match="does not answer"):
                await client.submit("y")
            with pytest.raises(ServerUnreachable, match="does not answer"):
                await client.submit("y")
            own_server.start()
            assert await client.cancel(request_id)
            assert (await reading).finish_reason == "cancelled"

    asyncio.run(main())


def test_no_server(tmp_path: Any) -> None:
    with pytest.raises(ServerUnreachable, match="start it"):
        asyncio.run(AsyncClient(f"unix://{tmp_path}/none").open())
