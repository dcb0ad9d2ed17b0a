"""Print what the GPU benches wrote to a directory, as one table.

python bench/gpu_table.py OUTDIR
"""

import json
import sys
from pathlib import Path
from typing import Any


def lines(results: dict[str, dict[str, Any]]) -> list[str]:
    """Hardware and versions, then a line for each figure; what is missing is said."""
    found = [f"{name}: no result" for name, content in results.items() if not content]
    for content in results.values():
        if content:
            origin = content["provenance"]
            found.append(
                f"{origin['gpu'] or origin['cpu']}, driver {origin.get('driver')}, "
                f"{origin['versions']}, commit {origin['commit']}, {origin['date']}"
            )
            break
    found += [
        f"{case['kernel']:18} {case['shape']:32} {case['ms']:10.4f} ms "
        f"{case['roofline']:7.1%} of {case['bound']}"
        for case in results["gpu_kernels"].get("kernels", [])
    ]
    for mode, steps in results["gpu_steps"].get("modes", {}).items():
        found += _failure("step", mode, steps) or [
            f"{'step':18} {name + ', ' + mode:32} {step['ms']:10.4f} ms {step['roofline']:7.1%} of "
            f"{step['roofline_ms']:.2f} ms"
            for name, step in steps.items()
        ]
    found += _rates(results)
    if any(content.get("is_tiny") for content in results.values()):
        found.append("a rehearsal with tiny shapes: the figures mean nothing")
    return found


def _rates(results: dict[str, dict[str, Any]]) -> list[str]:
    """The nano workload in each way, and beside transformers the best of them."""
    found: list[str] = []
    rates: dict[str, float] = {}
    for mode, figures in results["gpu_engine"].get("modes", {}).items():
        failure = _failure("nano", mode, figures)
        found += failure
        if not failure:
            rates[mode] = figures["nano"]["output_tokens_per_s"]
            busy = figures["profile"]["decode"]["device_busy"]
            share = "" if busy is None else f", device busy {busy:.1%} of decode steps"
            found.append(f"{'nano':18} {mode:32} {rates[mode]:10.0f} output tokens/s{share}")
    if results["gpu_transformers"]:
        peer = results["gpu_transformers"]["nano"]["output_tokens_per_s"]
        found.append(f"{'nano':18} {'transformers':32} {peer:10.0f} output tokens/s")
        if rates:
            ratio = max(rates.values()) / peer
            found.append(f"{'ratio':18} {'tokenmill / transformers':32} {ratio:10.2f}")
    return found


def _failure(what: str, mode: str, figures: dict[str, Any]) -> list[str]:
    return [f"{what:18} {mode:32} failed: {figures['error']}"] if "error" in figures else []


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("usage: gpu_table.py OUTDIR")
    names = ("gpu_kernels", "gpu_steps", "gpu_engine", "gpu_transformers")
    paths = {name: Path(sys.argv[1]) / f"{name}.json" for name in names}
    results = {
        name: json.loads(path.read_text()) if path.exists() else {} for name, path in paths.items()
    }
    print("\n".join(lines(results)))


if __name__ == "__main__":
    main()
