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
    found += [
        f"{'step':18} {name:32} {step['ms']:10.4f} ms {step['roofline']:7.1%} of "
        f"{step['roofline_ms']:.2f} ms"
        for name, step in results["gpu_steps"].get("steps", {}).items()
    ]
    rates = {
        name: results[name]["nano"]["output_tokens_per_s"]
        for name in ("gpu_engine", "gpu_transformers")
        if results[name]
    }
    found += [f"{name:18} {'nano':32} {rate:10.0f} output tokens/s" for name, rate in rates.items()]
    if len(rates) == 2:
        ratio = rates["gpu_engine"] / rates["gpu_transformers"]
        found.append(f"{'ratio':18} {'tokenmill / transformers':32} {ratio:10.2f}")
    if any(content.get("is_tiny") for content in results.values()):
        found.append("a rehearsal with tiny shapes: the figures mean nothing")
    return found


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
