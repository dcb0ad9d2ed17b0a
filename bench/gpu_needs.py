"""What the GPU benches need of Python, and whether it is here; standard library only.

    python bench/gpu_needs.py [--tiny]

Exits with 1 where something is missing that no part can do without.
"""

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from workloads import commit

#: Import name -> what cannot be done without it; "" where nothing can.
NEEDS = {
    "torch": "",
    "triton": "",
    "tokenizers": "",
    "jinja2": "",
    "numpy": "",
    "safetensors": "",
    "pytest": "the tests",
    "pytest_timeout": "the tests",
    "xdist": "the tests in several processes",
    "transformers": "the comparison with it",
}


def missing() -> dict[str, str]:
    """What is not installed, and what falls away with it."""
    return {name: lost for name, lost in NEEDS.items() if find_spec(name) is None}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def main() -> None:
    versions = ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "transformers"))
    code = commit() or "unknown (TOKENMILL_COMMIT may say it)"
    print(f"Python {platform.python_version()}, {versions}, commit {code}")
    lost = missing()
    for name, without in lost.items():
        print(f"{name} is not installed; without it: {without or 'nothing runs'}")
    if "" in lost.values():
        raise SystemExit(1)
    try:
        import numba  # noqa: F401
    except ModuleNotFoundError:
        pass  # a CPU does without it
    except ImportError as error:
        print(f"numba does not load, so tests that compare with a CPU fail: {error}")
    import torch

    if torch.cuda.is_available():
        of = torch.cuda.get_device_properties(0)
        print(f"{of.name}, {of.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}")
    elif "--tiny" not in sys.argv:
        raise SystemExit("expected a CUDA device, got none; --tiny is a rehearsal without")


if __name__ == "__main__":
    main()
