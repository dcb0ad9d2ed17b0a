"""Adapters through the queue: a worker with a real engine, requests that name them, on a server."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiny_llama import write_tiny_llama
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.pipeline import Pipeline
from tokenmill.producer.client import Client
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.shards import Shards
from tokenmill.worker.config import WorkerConfig, parse_lora
from tokenmill.worker.process import Worker, load_engine

pytestmark = pytest.mark.placed("")

SAMPLING = {"max_tokens": 20, "ignore_eos": True}
PROMPT = tuple(range(5, 45))


@pytest.fixture
def tiny_llama(tmp_path: Path) -> str:
    directory = tmp_path / "llama"
    directory.mkdir()
    return str(write_tiny_llama(directory))


@pytest.fixture
def lora(tmp_path: Path) -> dict[str, str]:
    return {name: write_adapter(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))}


def write_adapter(directory: Path, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    directory.mkdir()
    tensors = {}
    for layer in range(2):
        module = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, 48, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.randn(48, 4, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return str(directory)


@contextmanager
def serving(url: str, name: str, model: str, lora: dict[str, str]) -> Iterator[None]:
    engine_config = EngineConfig(lora=lora, token_budget=32, max_num_seqs=8, block_size=8)
    config = WorkerConfig(model=model, redis_url=url, device="cpu", engine=engine_config)
    engine = load_engine(config)
    with Shards(url, "default") as shards:
        worker = Worker(config, name, shards)
        thread = threading.Thread(target=worker.run, args=[engine])
        thread.start()
        try:
            yield
        finally:
            worker.stop()
            thread.join(20)


def test_each_request_is_answered_with_the_adapter_that_it_names(
    server_url: str, client: Client, tiny_llama: str, lora: dict[str, str]
) -> None:
    pipeline = Pipeline(tiny_llama, device="cpu", lora=lora, token_budget=32)
    expected = {
        adapter: pipeline([PROMPT], adapter=adapter, **SAMPLING)[0].token_ids
        for adapter in ("", "a", "b")
    }
    assert len(set(expected.values())) == 3
    asked = [("", ""), ("", "a"), ("", "b"), ("a", ""), (tiny_llama, "b"), ("b", "b"), ("", "")]
    ids = [
        client.submit(PROMPT, model=model, adapter=adapter, **SAMPLING) for model, adapter in asked
    ]
    refused = {
        client.submit(PROMPT, adapter="sql"): "adapter must be one of those that are loaded here "
        "(a, b), got 'sql'; load it with --lora NAME=DIRECTORY",
        client.submit(PROMPT, model="sql"): f"model must be {tiny_llama!r} or one of its adapters "
        "(a, b), as served here, got 'sql'",
        client.submit(PROMPT, model="a", adapter="b"): "adapter must be 'a', as the model is, "
        "got 'b'",
    }
    with serving(server_url, "w1", tiny_llama, lora):
        for request_id, (model, adapter) in zip(ids, asked, strict=True):
            name = adapter or model.replace(tiny_llama, "")
            assert client.result(request_id, timeout_s=30).token_ids == expected[name]
        for request_id, reason in refused.items():
            result = client.result(request_id, timeout_s=30)
            assert (result.finish_reason, result.reason) == ("error", reason)
        (info,) = client.workers()
        assert info.models == (tiny_llama, "a", "b")
        assert (info.quantization, info.kv_cache_dtype) == ("none", "float32")


def test_another_worker_goes_on_with_the_adapter(
    server_url: str, client: Client, tiny_llama: str, lora: dict[str, str]
) -> None:
    sampling = {"max_tokens": 400, "ignore_eos": True}
    pipeline = Pipeline(tiny_llama, device="cpu", lora=lora, token_budget=32)
    (whole,) = pipeline([PROMPT], adapter="b", **sampling)
    request_id = client.submit(PROMPT, adapter="b", **sampling)
    with serving(server_url, "w1", tiny_llama, lora):
        first = next(iter(client.follow(request_id)))
    assert not first.finish_reason
    with serving(server_url, "w2", tiny_llama, lora):
        assert client.result(request_id, timeout_s=30).token_ids == whole.token_ids


@pytest.mark.parametrize("texts", [["sql"], ["=dir"], ["sql="], ["a=x", "a=y"]])
def test_what_names_no_directory_once_is_refused(texts: list[str]) -> None:
    with pytest.raises(InvalidRequest, match="lora must be NAME=DIRECTORY, each name once"):
        parse_lora(texts)


def test_a_directory_may_have_an_equals_sign() -> None:
    assert parse_lora(["a=/x/r=8", "b=y"]) == {"a": "/x/r=8", "b": "y"}
