"""The command: its options and their environment variables become a configuration."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.scheduler import Policy
from tokenmill.worker import cli, process
from tokenmill.worker.config import WorkerConfig
from tokenmill.worker.loop import EngineFailed


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[WorkerConfig]:
    """The configurations of the workers that would have been run."""
    configs: list[WorkerConfig] = []

    def run(config: WorkerConfig, *, waits_for_server: bool) -> int:
        assert waits_for_server  # standard error is no terminal here
        configs.append(config)
        return 0

    monkeypatch.setattr(process, "run", run)
    monkeypatch.setattr(cli, "configure", lambda **_: None)
    return configs


def invoke(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(cli.worker, arguments, env=environment)


def test_options(started: list[WorkerConfig]) -> None:
    text = (
        "--model m --redis redis://h/0 --queue q --token-budget 512 --device cpu --dtype bfloat16 "
        "--quantization int8 "
        "--max-num-seqs 32 --max-model-len 2048 --kv-cache-memory 2GiB --kv-cache-dtype bfloat16 "
        "--policy prefill_first "
        "--threads 3 --tensor-parallel-size 2 --lease 2.5 --stall-limit 9 --exit-when-idle 5 "
        "--health-port 8000"
    )
    result = invoke(*text.split())
    assert result.exit_code == 0, result.output
    wanted = WorkerConfig(
        model="m",
        redis_url="redis://h/0",
        queue="q",
        device="cpu",
        dtype="bfloat16",
        quantization="int8",
        threads=3,
        lease_ms=2500,
        stall_limit_s=9.0,
        exit_when_idle_s=5.0,
        health_port=8000,
        engine=EngineConfig(
            token_budget=512,
            max_num_seqs=32,
            max_model_len=2048,
            kv_cache_memory=2**31,
            kv_cache_dtype="bfloat16",
            policy=Policy.PREFILL_FIRST,
            tensor_parallel_size=2,
        ),
    )
    assert started == [wanted]


def test_every_option_has_an_environment_variable(started: list[WorkerConfig]) -> None:
    values = {
        "TOKENMILL_MODEL": "m",
        "TOKENMILL_REDIS_URL": "redis://h/0",
        "TOKENMILL_TOKEN_BUDGET": "auto",
        "TOKENMILL_MAX_NUM_SEQS": "7",
        "TOKENMILL_HEALTH_PORT": "8000",
    }
    assert invoke(**values).exit_code == 0
    assert started[0].engine == EngineConfig(max_num_seqs=7)
    assert started[0].health_port == 8000
    for parameter in cli.worker.params:
        envvar: Any = parameter.envvar
        assert envvar is not None
        assert envvar.startswith("TOKENMILL_")


def test_without_a_server_it_uses_the_embedded_one(
    started: list[WorkerConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TOKENMILL_REDIS_URL", raising=False)
    monkeypatch.setattr("tokenmill.producer.embedded.ensure_server", lambda: "unix:///embedded")
    assert invoke("--model", "m").exit_code == 0
    assert started[0].redis_url == "unix:///embedded"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--redis", "redis://h"], "Missing option '--model'"),
        (["--model", "m", "--token-budget", "many"], "expected an integer or auto, got 'many'"),
        (["--model", "m", "--device", "tpu"], "'tpu' is not one of"),
    ],
)
def test_usage_errors(started: list[WorkerConfig], arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert started == []


def test_help_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from tokenmill.worker.cli import worker; "
        "worker.main(['--help'], standalone_mode=False); sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_engine_that_fails_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: WorkerConfig, **_options: bool) -> int:
        raise EngineFailed("3 steps in a row failed")

    monkeypatch.setattr(process, "run", run)
    monkeypatch.setattr(cli, "configure", lambda **_: None)
    result = invoke("--model", "m", "--redis", "redis://h")
    assert result.exit_code == 1
    assert result.output == "Error: 3 steps in a row failed\n"


def test_adapters(started: list[WorkerConfig]) -> None:
    given = ("--model", "m", "--redis", "redis://h/0")
    assert invoke(*given, "--lora", "a=x", "--lora", "b=y").exit_code == 0
    assert invoke(*given, TOKENMILL_LORA="a=x b=y").exit_code == 0
    assert [config.engine.lora for config in started] == [{"a": "x", "b": "y"}] * 2


def test_options_of_steps(started: list[WorkerConfig]) -> None:
    text = "--model m --redis redis://h/0 --max-step-ms 250 --deterministic --no-prefix-caching"
    assert invoke(*text.split()).exit_code == 0
    (config,) = started
    assert config.engine == EngineConfig(
        max_step_ms=250.0, deterministic=True, prefix_caching=False
    )
