"""`tokenmill plan`: what it prints, and that it needs no torch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from tokenmill.engine import loader
from tokenmill.engine.errors import ModelNotFound
from tokenmill.producer.errors import InvalidRequest
from tokenmill.worker.plan_cli import plan

SMALL = ["--prompt-tokens", "100", "--output-tokens", "10", "--requests", "20"]
COST = ["--cost", "0.01,0.0001,0.000001", *SMALL]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(plan, arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def test_a_table_and_the_replicas() -> None:
    out = run(*COST, "--clients", "1,4", "--rate", "2", "--replicas-for", "3", "--sla", "2")
    assert [line.split()[:2] for line in out.splitlines() if "clients" in line or "/s  " in line][
        1:
    ] == [["1", "clients"], ["4", "clients"], ["2", "/s"]]
    assert "3 requests/s, 95% with a first token within prompt/512 s and 2 tokens/s: 1 repl" in out


def test_json_holds_the_device_and_every_load(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    out = json.loads(run(*COST, "--clients", "2", "--json", "--save-device", str(path)))
    (load,) = out["loads"]
    assert load["clients"] == 2
    assert load["requests"] == 20
    assert set(load["effective_per_s"]) == {"2", "4", "6"}
    again = json.loads(run("--device", str(path), *SMALL, "--clients", "2", "--json"))
    assert again == out


def test_a_plot_is_written_as_svg_and_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = [tmp_path / "plan.svg", tmp_path / "plan.png"]
    run(*COST, "--clients", "1,2", *(part for file in files for part in ("--plot", str(file))))
    assert files[0].read_text().startswith("<?xml")
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (SMALL, "device must be one of --device, --model, --cost and --points, got 'none'"),
        ([*COST, "--points", "1:1,2:2"], "got 'cost and points'"),
        ([*COST, "--clients", "0"], "clients must be at least 1, got 0"),
        ([*COST, "--rate", "-1"], "rate must be requests per second, above 0"),
        ([*COST, "--replicas", "0"], "replicas must be at least 1, got 0"),
        ([*COST, "--plot", "picture.gif"], "plot must be a file that ends in .svg or .png"),
        ([*COST, "--requests", "0"], "requests must be at least 1, got 0"),
        (["--cost", "1", *SMALL], "cost must be two or three numbers of seconds"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        run(*arguments)
    assert message in str(caught.value)


def test_numbers_that_are_none_are_refused() -> None:
    assert "expected numbers with commas between, got '1,two'" in run(*COST, "--clients", "1,two")
    assert "expected tokens:seconds,tokens:seconds" in run("--points", "1:1:1", *SMALL)


def test_planning_loads_no_torch_and_no_matplotlib() -> None:
    code = (
        "import sys; from tokenmill.worker.plan_cli import plan; "
        f"plan({COST!r}, standalone_mode=False); "
        "print(sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_quantized_worker_is_measured_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[tuple[str, str]] = []

    def load(model: str, *, device: str, quantization: str) -> None:
        loaded.append((model, quantization))
        raise ModelNotFound("not here")

    monkeypatch.setattr(loader, "load", load)
    command = ["--model", "tiny", "--quantization", "int8", *SMALL]
    found = CliRunner().invoke(plan, command)
    assert isinstance(found.exception, ModelNotFound)
    assert loaded == [("tiny", "int8")]
