import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tokenmill.producer import doctor
from tokenmill.producer.cli import tokenmill
from tokenmill.producer.doctor import Check, Status, examine
from tokenmill.producer.embedded import EmbeddedServer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading torch takes seconds, and is asked for in a test of its own."""
    found = Check(name="accelerator", status=Status.OK, detail="not looked for")
    monkeypatch.setattr(doctor, "_accelerator", lambda: found)


def examined(url: str | None, **options: Any) -> dict[str, Check]:
    return {item.name: item for item in examine(url=url, queue="default", model="m", **options)}


def test_a_good_server(server_url: str, server_kind: str, fake_worker: Any) -> None:
    fake_worker(adapters=("sql", "french"))
    found = examined(server_url)
    assert found["server"].detail.lower().startswith(server_kind)
    assert found["persistence"].status is Status.OK
    assert found["eviction"].status is Status.OK
    computes = "quantization int8, KV cache bfloat16, adapters sql french)"
    assert found["workers"].detail.startswith("fake on ")
    assert found["workers"].detail.endswith(computes)
    assert found["packages"].status is Status.OK
    assert found["model"].status is Status.WARN


def test_a_server_set_up_badly(own_server: Any) -> None:
    own_server.kill()
    own_server.options = ("--maxmemory-policy", "allkeys-lru", "--appendonly", "no")
    own_server.start()
    found = examined(own_server.url)
    assert found["eviction"].status is Status.FAIL
    assert "allkeys-lru" in found["eviction"].detail
    assert found["persistence"].remedy == "set appendonly yes"
    assert found["workers"].status is Status.WARN


def test_no_server() -> None:
    found = examined("redis://127.0.0.1:1")
    assert found["server"].status is Status.FAIL
    assert "start it" in found["server"].remedy
    assert "workers" not in found


def test_the_embedded_server_is_started_and_stopped(state: Path) -> None:
    assert examined(None)["server"].status is Status.OK
    assert not EmbeddedServer(state).answers()


def test_missing_extras(server_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_EXTRAS", {"worker": ("no_such_module",)})
    found = examined(server_url)["extra worker"]
    assert found.status is Status.WARN
    assert "pip install 'tokenmill[worker]'" in found.remedy


def test_exit_codes_and_json(server_url: str) -> None:
    good = CliRunner().invoke(tokenmill, ["doctor", "--redis", server_url])
    assert good.exit_code == 0
    assert "ok    server:" in good.stdout
    bad = CliRunner().invoke(tokenmill, ["doctor", "--redis", "redis://127.0.0.1:1", "--json"])
    assert bad.exit_code == 1
    statuses = {item["name"]: item["status"] for item in map(json.loads, bad.stdout.splitlines())}
    assert statuses["server"] == "fail"


def test_the_accelerator_is_asked_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "_ASK_TORCH", "print('9.9', '|', 'Some GPU')")
    assert doctor._accelerator().detail == "Some GPU, torch 9.9"
    monkeypatch.setattr(doctor, "_ASK_TORCH", "print('9.9', '|', '')")
    assert doctor._accelerator().detail == "no GPU, only the CPU, torch 9.9"
    monkeypatch.setattr(doctor, "_ASK_TORCH", "raise SystemExit('no driver')")
    found = doctor._accelerator()
    assert found.status is Status.FAIL
    assert "no driver" in found.detail
