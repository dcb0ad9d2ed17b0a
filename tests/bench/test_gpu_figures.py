"""What the GPU benches make of what they measure: shares, needs, waits, targets, modes."""

import gzip
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.planning.device import Device
from tokenmill.producer.errors import InvalidRequest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.fixture(autouse=True)
def _bench_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


# -- traces ------------------------------------------------------------------------------------


def test_busy_is_what_kernels_cover_of_the_time_after_the_warm_up(tmp_path: Path) -> None:
    from gpu_trace import DEVICE_KINDS, figures_of, spans_of

    def event(name: str, start: float, took: float, kind: str = "kernel") -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "name": name, "ts": start, "dur": took}

    events = [
        event("first", 0, 5),  # within the first tenth, as the gap behind it is
        event("a", 20, 40),
        event("copy", 30, 10, "gpu_memcpy"),  # beside a
        event("b", 70, 30),
        event("host", 0, 100, "cuda_runtime"),
        {"ph": "M", "name": "process_name"},
    ]
    path = tmp_path / "trace.json.gz"
    with gzip.open(path, "wt") as file:
        json.dump({"traceEvents": events[::-1]}, file)
    found = figures_of(spans_of(path, DEVICE_KINDS), 2)
    assert found["busy"] == pytest.approx(70 / 90)
    assert found["ms_per_step"] == pytest.approx(0.05)
    assert found["launches_per_step"] == 2
    assert found["kernels"][0] == {"name": "a", "us_per_step": 20, "per_step": 0.5}
    gaps = {gap["name"]: gap["us_per_step"] for gap in found["gaps"]}
    assert gaps == {"first -> a": 7.5, "a -> b": 5}


def test_a_trace_without_a_device_has_no_share() -> None:
    from gpu_trace import figures_of

    assert figures_of([], 3) == {"steps": 3, "busy": None}


# -- needs -------------------------------------------------------------------------------------


def test_a_step_needs_its_weights_once_and_reads_and_computes_by_its_chunks() -> None:
    from gpu_device import LLAMA_2_7B
    from roofline import need, step_need

    spec = spec_from_config(LLAMA_2_7B)
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32000
    one = step_need(spec, [(0, 1)])
    assert one.bytes == 2 * weights + 2 * spec.kv_token_elements
    assert one.flops == 2 * weights + 4 * 32 * 4096
    both = step_need(spec, [(1000, 1), (500, 24)], 1, 1)
    assert both.bytes == weights + (1001 + 524) * spec.kv_token_elements
    pairs = 1001 + 24 * 500 + 24 * 25 // 2
    body = weights - 4096 * 32000
    assert both.flops == 2 * body * 25 + 2 * 2 * 4096 * 32000 + 4 * 32 * 4096 * pairs
    halved = need(spec, [(100, 20)], 2, 2)
    assert halved.bytes == need(spec, [(100, 20)]).bytes / 2


def test_a_step_reads_the_experts_that_its_tokens_choose() -> None:
    from gpu_device import MIXTRAL_8_LAYERS
    from roofline import step_need

    spec = spec_from_config(MIXTRAL_8_LAYERS)
    expert = 8 * 3 * 4096 * 14336 * 2
    one, many = step_need(spec, [(0, 1)]), step_need(spec, [(0, 1)] * 64)
    kv = 2 * spec.kv_token_elements
    assert many.bytes - one.bytes - 63 * kv == pytest.approx(6 * expert, rel=1e-6)
    assert many.flops == pytest.approx(64 * one.flops)


# -- waits -------------------------------------------------------------------------------------


def test_what_waits_in_a_launch_is_counted_where_it_stood_but_for_captures() -> None:
    from gpu_sync import Waits

    from tokenmill.engine import step_graphs

    assert step_graphs.StepGraphs._capture.__name__ == "_capture"  # whose waits do not count

    def wait() -> str:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("the mode does not detect all synchronizing operations", stacklevel=1)
        return "ticket"

    def _capture() -> str:
        return wait()

    waits = Waits()
    for launch in (wait, wait, _capture):
        assert waits.launching(launch)() == "ticket"
    assert waits.launches == 3
    assert list(waits.places.values()) == [2]
    assert next(iter(waits.places)).startswith("test_gpu_figures.py:")


# -- modes -------------------------------------------------------------------------------------


def test_modes_are_measured_or_refused_or_failed_or_left_out(tmp_path: Path) -> None:
    from gpu_modes import ModeRun, Note

    def measure(name: str, note: Note) -> None:
        if name == "fp8 KV":
            raise InvalidRequest("kv_cache_dtype", "auto", "fp8")
        note({"runs": [1]})
        if name == "ahead":
            raise RuntimeError("an error of the device")

    run = ModeRun(tmp_path, "gpu_some", {"is_tiny": True}, 60)
    with pytest.raises(SystemExit, match="failed: ahead"):
        run.run(["graphs", "fp8 KV", "ahead"], measure, 30)
    late = ModeRun(tmp_path, "gpu_late", {}, 0)
    late.run(["graphs"], measure, 30)
    modes = json.loads((tmp_path / "gpu_some.json").read_text())["modes"]
    assert modes["graphs"].keys() == {"runs", "seconds"}
    assert modes["fp8 KV"] == {"refused": "kv_cache_dtype must be auto, got 'fp8'"}
    assert modes["ahead"] == {"runs": [1], "error": "RuntimeError: an error of the device"}
    late_modes = json.loads((tmp_path / "gpu_late.json").read_text())["modes"]
    assert late_modes == {"graphs": {"left_out": "there was no time left"}}


def test_what_was_measured_before_an_error_is_kept_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpu_modes import ModeRun, chosen_modes

    path = tmp_path / "gpu_some.json"
    begun = {"graphs": {"runs": [1], "seconds": 1.0}, "in turns": {"runs": [1]}}
    path.write_text(json.dumps({"modes": begun}))
    monkeypatch.setenv("GPU_BENCH_GOES_ON", "1")
    run = ModeRun(tmp_path, "gpu_some", {}, 60)
    with pytest.raises(SystemExit, match="failed: in turns"):
        run.run([*begun, "ahead"], lambda name, note: note({"runs": [2]}), 30)
    modes = json.loads(path.read_text())["modes"]
    assert modes["graphs"] == begun["graphs"]
    assert modes["in turns"] == {"runs": [1], "error": "the process ended"}
    assert modes["ahead"]["runs"] == [2]
    assert chosen_modes("ahead, graphs") == ["ahead", "graphs"]
    with pytest.raises(SystemExit, match="got fast"):
        chosen_modes("fast")


def test_after_an_error_of_a_device_the_program_begins_again_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu_device
    from gpu_modes import ModeRun, Note

    def measure(name: str, note: Note) -> None:
        raise RuntimeError("an illegal address")

    begun: list[tuple[str, list[str]]] = []

    def execv(program: str, arguments: list[str]) -> None:
        begun.append((program, arguments))
        raise SystemExit  # it would not return

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(gpu_device, "gpu_provenance", dict)
    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(sys, "argv", ["bench/gpu_engine.py", "--seconds", "60"])
    monkeypatch.setenv("GPU_BENCH_GOES_ON", "")
    with pytest.raises(SystemExit):
        ModeRun(tmp_path, "gpu_some", {}, 60).run(["graphs", "ahead"], measure, 30)
    assert begun[0][1][1:-1] == ["bench/gpu_engine.py", "--seconds", "60", "--seconds"]
    assert 50 <= int(begun[0][1][-1]) <= 60
    assert os.environ["GPU_BENCH_GOES_ON"] == "1"
    modes = json.loads((tmp_path / "gpu_some.json").read_text())["modes"]
    assert modes == {"graphs": {"error": "RuntimeError: an illegal address"}}


# -- the table ---------------------------------------------------------------------------------


def nano(rate: float, host: float | None) -> dict[str, Any]:
    figures = {
        "output_tokens_per_s": rate,
        "roofline": 0.7,
        "steps": 1100,
        "step_ms": 5.0,
        "mean_batch": 130,
        "preemptions": 0,
        "host_ms_per_step": host,
    }
    return {"nano": figures, "runs": [figures], "token_budget": 2048}


def test_of_an_interrupted_log_the_counts_are_told() -> None:
    from gpu_table import tests_of

    assert tests_of("gw1 PASSED\n== 2 failed, 8 passed in 9s ==\nInterrupted\n") == (
        "2 failed, 8 passed in 9s"
    )
    assert tests_of("no tests ran") == "no tests ran"
    assert tests_of("") == ""


def test_every_figure_stands_beside_its_target() -> None:
    from gpu_table import NAMES, lines

    origin = {
        "gpu": "H100",
        "python": "3.12",
        "versions": {"torch": "2.11", "triton": "3.6.0"},
        "commit": "abc",
        "date": "2026-11-24",
    }
    step = {"ms": 6.0, "roofline": 0.81, "roofline_ms": 5.0, "bound": "memory"}
    results: dict[str, dict[str, Any]] = {name: {"provenance": origin} for name in NAMES}
    results["engine"] |= {
        "modes": {
            "graphs": nano(20_000, 2.0),
            "deterministic": nano(19_000, None),
            "fp8 KV": {"refused": "not here"},
        }
    }
    results["steps"] |= {
        "modes": {
            "llama-3.1-8b: graphs": {"steps": {"decode, batch 1": step, "decode, batch 64": step}}
        }
    }
    cases = [
        {"kernel": "decode attention", "shape": "1 x 512", "ms": 1, "roofline": 0.9, "bound": "m"},
        {"kernel": "chunk attention", "shape": "4096", "ms": 1, "roofline": 0.5, "bound": "c"},
    ]
    results["kernels"] |= {"kernels": cases}
    results["tiles"] |= {
        "tiles": {
            "decode_attention 128 2 2": [
                {"tile": [16, 64, 4, 3], "ms": [2.0, 1.0]},
                {"tile": [16, 64, 4, 4], "ms": [1.5, 1.0]},
                {"tile": [16, 128, 4, 4], "error": "no room"},
            ]
        }
    }
    results |= {"start": {}, "transformers": {}, "sync": {}}
    table = lines(results, "90 passed in 60 s")
    text = "\n".join(table)
    assert "tests             90 passed in 60 s" in text
    assert "MISSED: at least 22,000 (first mark 18,000: met)" in text
    assert "2.00 ms a step, 40% of it  met: hidden behind the device" in text
    assert "5.3% more time  met: under 10%" in text
    assert "refused: not here" in text
    assert [line.rsplit("  ", 1)[1] for line in table if line.startswith("step")] == [
        "MISSED: at least 85%",
        "met: at least 80%",
    ]
    assert [
        line.rsplit("  ", 1)[1] for line in table if "t least" in line and "attention" in line
    ] == [
        "met: at least 85%",
        "MISSED: at least 70%",
    ]
    assert (
        "[16, 64, 4, 4] 1.500 and 1.000 ms, by the rule [16, 64, 4, 3] 2.000 and 1.000 ms" in text
    )
    assert "[16, 128, 4, 4]                  no room" in text
    assert "start: no result" in text
    assert table[-1] == "of 7 figures with a target 4 met it"


# -- on paper ----------------------------------------------------------------------------------


def test_a_larger_model_on_several_gpus_costs_its_share_of_weights_and_two_sums_a_layer() -> None:
    from gpu_plan import LLAMA_8B, LLAMA_70B, Group, lines, scaled

    def step(tokens: int) -> float:  # about what an H100 should do
        return max(5.6e-3, 2 * 7.5e9 * tokens / 560e12)

    measured = Device.from_mapping(
        {
            "device": "made up",
            "cost": {
                "points": [[n, step(n)] for n in (1, 64, 256, 512, 2048)],
                "kv_token_s": 5e-8,
                "rows_per_read": 128,
            },
            "engine": {"token_budget": 2048, "max_num_seqs": 128, "kv_tokens": 300_000},
        }
    )
    assert LLAMA_8B.weights == pytest.approx(7.5e9, rel=0.01)
    assert LLAMA_70B.weights == pytest.approx(68.7e9, rel=0.01)
    device = scaled(measured, LLAMA_8B, LLAMA_70B, Group())
    assert device.cost.kv_token_s == pytest.approx(5e-8 * 80 / 32 / 4)
    one = device.cost.points[0][1]
    assert one == pytest.approx(5.6e-3 * 68.7 / 7.5 / 4 + 160 * 12e-6, rel=0.02)
    assert device.engine.kv_tokens == pytest.approx(
        (0.88 * 320e9 - 2 * 68.7e9) / (4 * 80 * 8 * 128), rel=0.01
    )
    alone = scaled(measured, LLAMA_8B, LLAMA_8B, Group(1, sum_s=0.0))
    assert alone.cost.points == measured.cost.points
    assert lines(device)[3].endswith("times")
