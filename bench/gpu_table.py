"""Print what the GPU benches wrote to a directory as one table, each figure beside its target.

python bench/gpu_table.py OUTDIR
"""

import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_result import read_gpu_result

Results = dict[str, dict[str, Any]]
USUAL = ("engine", "sync", "kernels", "steps", "transformers", "start", "plan")
NAMES = (*USUAL, "tiles", "fixed_linears")
#: Least shares of rooflines, by kernel.
ATTENTION = {"decode attention": 0.85, "chunk attention": 0.70}
#: The same of steps of Llama-3.1-8B, by the beginning of their names.
STEPS = {"decode, batch 1": 0.85, "decode, batch 64": 0.80, "mixed": 0.70}
STEP_MODEL = "llama-3.1-8b: graphs"
#: Output tokens/s of the nano workload, by mode; the device's busy share; deterministic's cost.
FIRST_MARK, RATES = 18_000, {"graphs": 22_000, "fp8 KV": 30_000}
BUSY, DETERMINISTIC, PEER = 0.97, 0.10, 5.0


@dataclass(frozen=True, slots=True)
class Row:
    """A figure in words; `target` "" where there is none."""

    what: str
    which: str
    figure: str
    target: str = ""
    is_met: bool = False

    def line(self) -> str:
        verdict = f"  {'met' if self.is_met else 'MISSED'}: {self.target}" if self.target else ""
        return f"{self.what:17} {self.which:34} {self.figure}{verdict}".rstrip()


def lines(results: Results, tests: str = "") -> list[str]:
    """A line for each figure, the most telling last; hardware, versions, and what is missing."""
    found = [_origin(content) for content in results.values() if content][:1]
    found += results["plan"].get("lines", [])
    parts = (_kernels, _tiles, _fixed_linears, _start, _sync, _peer, _steps, _engine)
    rows = [row for part in parts for row in part(results)]
    found += [row.line() for row in rows]
    if tests:
        found.append(f"{'tests':17} {tests}")
    found += [f"{name}: no result" for name in USUAL if not results[name]]
    met = [row.is_met for row in rows if row.target]
    found.append(f"of {len(met)} figures with a target {sum(met)} met it")
    if any(content.get("is_tiny") for content in results.values()):
        found.append("a rehearsal with tiny shapes: no figure means anything, met or missed")
    return found


def _origin(content: dict[str, Any]) -> str:
    origin = content["provenance"]
    versions, said = origin["versions"], ""
    if ceilings := content.get("ceilings"):
        copies, products = ceilings["bytes_per_s"] / 1e12, ceilings["flops_per_s"] / 1e12
        said = f"; copies {copies:.2f} TB/s, products {products:.0f} TFLOP/s"
    return (
        f"{origin.get('gpu') or origin['cpu']}, driver {origin.get('driver')}, "
        f"Python {origin['python']}, torch {versions['torch']}, triton {versions['triton']}, "
        f"commit {origin['commit'] or 'unknown'}, {origin['date']}{said}"
    )


def _unmeasured(what: str, mode: str, figures: dict[str, Any]) -> Iterator[Row]:
    """Why a mode has no figures, or not all."""
    for key, word in (("error", "failed"), ("refused", "refused"), ("left_out", "left out")):
        if key in figures:
            yield Row(what, mode, f"{word}: {figures[key]}")


def _engine(results: Results) -> Iterator[Row]:
    """The nano workload in each mode: rate, busy share, host time."""
    modes = results["engine"].get("modes", {})
    for mode, figures in modes.items():
        yield from _unmeasured("nano", mode, figures)
        if "nano" not in figures:
            continue
        nano, first = figures["nano"], figures["runs"][0]["output_tokens_per_s"]
        rate = nano["output_tokens_per_s"]
        said = (
            f"{rate:8,.0f} output tokens/s ({first:,.0f} in its first run), "
            f"{nano['roofline']:.0%} of the bf16 roofline, {nano['steps']} steps of "
            f"{nano['step_ms']:.2f} ms, {nano['mean_batch']:.0f} sequences, "
            f"{nano['preemptions']} preemptions, budget {figures['token_budget']}"
        )
        target = RATES.get(mode, 0)
        goal = f"at least {target:,}" if target else ""
        if target and mode == "graphs":
            goal += f" (first mark {FIRST_MARK:,}: {'met' if rate >= FIRST_MARK else 'missed'})"
        yield Row("nano", mode, said, goal, rate >= target)
        if nano["host_ms_per_step"] is not None:
            host = nano["host_ms_per_step"]
            share = host / nano["step_ms"]
            text = f"{host:8.2f} ms a step, {share:.0%} of it"
            yield Row("host time", mode, text, "hidden behind the device", share < BUSY)
        yield from _profiles(mode, figures.get("profile", {}))
    yield from _deterministic(modes)


def _profiles(mode: str, profile: dict[str, Any]) -> Iterator[Row]:
    for kind, found in profile.items():
        if found["busy"] is None:
            continue
        text = (
            f"{found['busy']:8.1%} of {found['steps']} steps, {found['ms_per_step']:.2f} ms and "
            f"{found['launches_per_step']:.0f} launches each"
        )
        goal = f"at least {BUSY:.0%}" if (mode, kind) == ("graphs", "decode") else ""
        yield Row("device busy", f"{mode}, {kind}", text, goal, found["busy"] >= BUSY)
        for kernel in found["kernels"][:5] if mode == "graphs" else ():
            text = f"{kernel['us_per_step']:8.0f} us a step, {kernel['per_step']:.0f} launches"
            yield Row("", f"  {kernel['name'][:32]}", text)


def _deterministic(modes: dict[str, Any]) -> Iterator[Row]:
    both = [modes.get(mode, {}).get("nano") for mode in ("graphs", "deterministic")]
    if both[0] and both[1]:
        cost = both[0]["output_tokens_per_s"] / both[1]["output_tokens_per_s"] - 1
        text = f"{cost:8.1%} more time"
        yield Row("deterministic", "its cost", text, f"under {DETERMINISTIC:.0%}", cost < 0.1)


def _steps(results: Results) -> Iterator[Row]:
    for mode, figures in results["steps"].get("modes", {}).items():
        yield from _unmeasured("step", mode, figures)
        for name, step in figures.get("steps", {}).items():
            least = _least(STEPS, name) if mode == STEP_MODEL else 0.0
            text = (
                f"{step['ms']:8.2f} ms, {step['roofline']:.0%} of {step['roofline_ms']:.2f} ms "
                f"({step['bound']})"
            )
            goal = f"at least {least:.0%}" if least else ""
            yield Row("step", f"{mode}, {name}", text, goal, step["roofline"] >= least)


def _least(targets: dict[str, float], name: str) -> float:
    exact = targets.get(name)
    return exact if exact is not None else (targets["mixed"] if name.startswith("mixed") else 0.0)


def _kernels(results: Results) -> Iterator[Row]:
    content = results["kernels"]
    for case in content.get("kernels", []):
        least = ATTENTION.get(case["kernel"], 0.0)
        text = f"{case['ms']:10.4f} ms, {case['roofline']:.0%} of {case['bound']}"
        goal = f"at least {least:.0%}" if least else ""
        yield Row(case["kernel"], case["shape"], text, goal, case["roofline"] >= least)
    for group in content.get("left_out", []):
        yield Row("kernels", group, "left out, or in part: there was no time left")
    for error in content.get("failed", []):
        yield Row("kernels", "failed", error)


def _peer(results: Results) -> Iterator[Row]:
    if not results["transformers"]:
        return
    content = results["transformers"]
    nano = content["nano"]
    peer = nano["output_tokens_per_s"]
    part = "" if nano["is_whole"] else f", stopped after {nano['seconds']:.0f} s"
    flash = "flash attention" if content["has_flash_attention"] else "no flash attention there"
    said = f"{peer:8,.0f} output tokens/s ({flash}{part})"
    yield Row("nano", f"transformers {content['transformers']}", said)
    rates = [
        figures["nano"]["output_tokens_per_s"]
        for mode, figures in results["engine"].get("modes", {}).items()
        if "nano" in figures and mode != "fp8 KV"  # whose keys and values are not the peer's
    ]
    if rates:
        times = max(rates) / peer
        text = f"{times:8.1f} times as many"
        yield Row("nano", "tokenmill over it", text, f"at least {PEER:g}", times >= PEER)


def _sync(results: Results) -> Iterator[Row]:
    if not results["sync"]:
        return
    content = results["sync"]
    waits = sum(wait["times"] for wait in content["waits"])
    text = f"{waits:8} in {content['launches']} launches of {content['launch_ms']:.2f} ms"
    yield Row("waiting", "operations in launches", text, "none", not waits)
    for wait in content["waits"]:
        yield Row("", f"  {wait['times']} times", wait["at"])


def _start(results: Results) -> Iterator[Row]:
    for model, found in results["start"].get("models", {}).items():
        for state in ("empty cache", "warm cache"):
            one = found.get(state, {})
            if "error" in one:
                yield Row("start", f"{model}, {state}", f"failed: {one['error'][-200:]}")
            elif one:
                parts = ", ".join(f"{name} {taken:.1f}" for name, taken in one["parts_s"].items())
                text = f"{one['ready_s']:8.1f} s to ready, first token {one['first_token_s']:.1f}"
                yield Row("start", f"{model}, {state}", f"{text} ({parts})")


def _tiles(results: Results) -> Iterator[Row]:
    """The best tile of each kind beside the rule's, which comes first; what failed."""
    for kind, records in results["tiles"].get("tiles", {}).items():
        right = [record for record in records if "ms" in record]
        if right:
            best = min(right, key=lambda record: math.prod(record["ms"]))
            took = " and ".join(f"{ms:.3f}" for ms in best["ms"])
            text = f"{best['tile']} {took} ms"
            if (first := records[0]) is not best and "ms" in first:
                took = " and ".join(f"{ms:.3f}" for ms in first["ms"])
                text += f", by the rule {first['tile']} {took} ms"
            yield Row("tile", kind, text)
        for record in records:
            if "error" in record:
                yield Row("", f"  {record['tile']}", record["error"])


def _fixed_linears(results: Results) -> Iterator[Row]:
    for step in results["fixed_linears"].get("steps", []):
        other = ", ".join(step["other_bits"])
        text = (
            f"{step['fixed_ms']:10.4f} ms, {step['ratio']:.2f} times cuBLAS, with the best tiles "
            f"{step['best_tiles_ms']:.4f}{'; other bits: ' if other else ''}{other}"
        )
        yield Row("fixed linears", f"{step['model']}, {step['rows']} rows", text)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: gpu_table.py OUTDIR")
    out = Path(sys.argv[1])
    log = out / "tests.log"
    results = {name: read_gpu_result(out, f"gpu_{name}") for name in NAMES}
    print("\n".join(lines(results, tests_of(log.read_text()) if log.exists() else "")))


def tests_of(log: str) -> str:
    """What pytest counted, or else its last word."""
    said = [line.strip("= ") for line in log.splitlines()] or [""]
    counts = [line for line in said if re.search(r"\d+ (passed|failed|error)", line)]
    return [*said[-1:], *counts[-1:]][-1]


if __name__ == "__main__":
    main()
