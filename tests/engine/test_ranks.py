"""A group of real processes that meet by gloo: how they begin, compute and end."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from children import children_of
from questions import QUESTIONS
from tiny_llama import write_tiny_llama
from tokenmill.engine import ranks
from tokenmill.engine.errors import GroupLost
from tokenmill.engine.models.shard import Shard
from tokenmill.engine.pipeline import Pipeline
from tokenmill.engine.rank_processes import RankProcesses
from tokenmill.engine.ranks import Ranks
from tokenmill.producer.errors import InvalidRequest

PROMPTS = ["w3 w4 w5 w6 w7 w8 w9", "w100 w200", "w5"]
CPU: dict[str, Any] = {"device": "cpu", "kv_cache_memory": 1 << 20}


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_llama(tmp_path_factory.mktemp("tiny_llama")))


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_two_ranks_answer_as_one_and_a_dead_one_takes_the_other_down(tiny_llama: str) -> None:
    alone = Pipeline(tiny_llama, **CPU)(PROMPTS, max_tokens=20, ignore_eos=True, seed=1)
    warm: dict[str, Any] = {
        "max_tokens": 20,
        "ignore_eos": True,
        "seed": 1,
        "temperature": 1.0,
        "top_p": 0.9,
    }
    before = set(children_of(os.getpid()))
    with Pipeline(tiny_llama, tensor_parallel_size=2, **CPU) as pair:
        (rank,) = set(children_of(os.getpid())) - before
        answers = pair(PROMPTS, max_tokens=20, ignore_eos=True, seed=1, logprobs=2)
        assert [a.token_ids for a in answers] == [a.token_ids for a in alone]
        assert {len(a.logprobs) for a in answers} == {20}
        os.kill(rank, signal.SIGTERM)  # rank 0 decides
        again = pair(PROMPTS, **warm)
        assert [a.token_ids for a in pair(PROMPTS, **warm)] == [a.token_ids for a in again]
        os.kill(rank, signal.SIGKILL)
        killed_at = time.monotonic()
        with pytest.raises(GroupLost, match="rank 1 was killed by SIGKILL"):
            pair(PROMPTS, max_tokens=4000, ignore_eos=True)
        assert time.monotonic() - killed_at < 5.0
        with pytest.raises(GroupLost, match="rank 1 was killed by SIGKILL"):
            pair.engine.capacity()
    assert set(children_of(os.getpid())) == before


def test_joining_that_fails_leaves_the_environment_as_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*arguments: object, **settings: object) -> None:
        assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"
        raise RuntimeError("timed out")

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr("torch.distributed.init_process_group", fail)
    with pytest.raises(RuntimeError, match="timed out"):
        Ranks(Shard(1, 2), torch.device("cpu"), tmp_path / "rendezvous").join()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0"
    assert "NCCL_SOCKET_IFNAME" not in os.environ


@pytest.mark.slow
def test_a_stopped_rank_ends_the_group(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "STEP_LIMIT_S", 2.0)
    before = set(children_of(os.getpid()))
    with Pipeline(tiny_llama, tensor_parallel_size=2, **CPU) as pair:
        (rank,) = set(children_of(os.getpid())) - before
        pair(PROMPTS, max_tokens=5, ignore_eos=True)
        os.kill(rank, signal.SIGSTOP)
        stopped_at = time.monotonic()
        with pytest.raises(GroupLost, match="a step took longer than 2 s"):
            pair(PROMPTS, max_tokens=5, ignore_eos=True)
        assert time.monotonic() - stopped_at < 10.0
    assert set(children_of(os.getpid())) == before


def test_a_rank_that_cannot_load_its_part_is_said_with_its_reason(tmp_path: Path) -> None:
    lost: list[str] = []
    settings = {
        "model": str(tmp_path / "none"),
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "rank": 1,
        "size": 2,
    }
    others = RankProcesses([settings], on_lost=lambda: lost.append("lost"))
    with pytest.raises(GroupLost, match=r"rank 1 failed: model must be one of .* got '/.*none'"):
        others.wait_ready()
    others.end()
    assert lost == ["lost"]


def test_more_ranks_than_can_divide_it_are_refused(tiny_llama: str) -> None:
    before = children_of(os.getpid())
    with pytest.raises(InvalidRequest, match="must be one of 1, 2, 4, 6, as the model has 6 heads"):
        Pipeline(tiny_llama, tensor_parallel_size=3, **CPU)
    assert children_of(os.getpid()) == before


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_smollm2_with_its_3_kv_heads_in_unequal_parts(size: int) -> None:
    alone = Pipeline("smollm2", device="cpu")(QUESTIONS, max_tokens=32)
    with Pipeline("smollm2", device="cpu", tensor_parallel_size=size) as group:
        together = group(QUESTIONS, max_tokens=32)
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
