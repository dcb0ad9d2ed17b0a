"""`PeerEngine`: another engine in its own virtual environment, at its best settings, beside ours.

Each virtual environment lies under one directory, made as the first lines of its requirements file
in bench/peers/ say: vllm, vllm-zen, llamacpp, transformers. A peer is started once, stopped by
SIGSTOP while others are measured (vLLM's processes poll), and warmed up by a few short requests.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from peer_model import PeerModel
from workloads import ROOT

RUNNERS = ROOT / "bench" / "peers" / "engine"
#: vLLM compiles at its first start, for minutes.
START_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Peer:
    """How a peer is run; `weights` is what its model is read from: hf, f16 or q8_0."""

    name: str
    environment: str
    runner: str
    weights: str
    arguments: Sequence[str] = ()
    #: Its results are to be those of float32, but for rounding.
    is_exact: bool = True
    variables: Mapping[str, str] = field(default_factory=dict)
    #: Intel's OpenMP, which vLLM asks for in its log, instead of torch's own.
    has_intel_openmp: bool = False

    def command(self, environments: Path, model: PeerModel) -> list[str]:
        path = model.hugging_face if self.weights == "hf" else model.gguf(self.weights)
        return [
            str(python_of(environments, self.environment)),
            str(RUNNERS / f"{self.runner}_runner.py"),
            "--model",
            str(path),
            *self.arguments,
        ]


def end_in_order() -> None:
    """Have SIGTERM end this process as an error does, so that its peers are ended too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def vllm_variables(environments: Path, *, has_intel_openmp: bool = False) -> dict[str, str]:
    """What makes vLLM use both cores; and the allocator that its documentation asks for.

    What it compiles ahead of time it cannot load again with torch 2.13 (`finalize_loading`), and
    compiles at every start; inductor's own cache works.
    """
    cores = sorted(os.sched_getaffinity(0))
    allocator = next(environments.glob("tcmalloc/**/libtcmalloc_minimal.so.4"), None)
    libraries = [str(allocator)] if allocator else []
    libraries += [str(environments / "vllm" / "lib" / "libiomp5.so")] if has_intel_openmp else []
    preload = {"LD_PRELOAD": ":".join(libraries)} if libraries else {}
    return {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(len(cores)),
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        **preload,
    }


def python_of(environments: Path, name: str) -> Path:
    """The interpreter of a peer's virtual environment."""
    python = environments / name / "bin" / "python"
    if not python.exists():
        requirements = "vllm" if name == "vllm-zen" else name
        raise SystemExit(f"{python} must be there; see bench/peers/{requirements}.txt")
    return python


PEERS = {
    peer.name: peer
    for peer in (
        Peer("vllm-f32", "vllm", "vllm", "hf"),
        Peer("vllm-bf16", "vllm", "vllm", "hf", ("--dtype", "bfloat16"), is_exact=False),
        Peer("vllm-f32-iomp", "vllm", "vllm", "hf", has_intel_openmp=True),
        Peer("vllm-zen-f32", "vllm-zen", "vllm", "hf"),
        Peer("vllm-zen-bf16", "vllm-zen", "vllm", "hf", ("--dtype", "bfloat16"), is_exact=False),
        Peer("llamacpp-f16", "llamacpp", "llamacpp", "f16"),
        Peer("llamacpp-f16-16", "llamacpp", "llamacpp", "f16", ("--sequences", "16")),
        Peer("llamacpp-f16-streams", "llamacpp", "llamacpp", "f16", ("--streams",)),
        Peer("llamacpp-q8_0", "llamacpp", "llamacpp", "q8_0", is_exact=False),
        Peer("transformers", "transformers", "transformers", "hf"),
        Peer("transformers-continuous", "transformers", "transformers", "hf", ("--continuous",)),
    )
}


class PeerEngine:
    """A running peer; `outputs` are the tokens of the last run, `about` what it says of itself."""

    def __init__(self, peer: Peer, environments: Path, model: PeerModel) -> None:
        self.peer = peer
        self.outputs: list[list[int]] = []
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        variables = {}
        if peer.runner == "vllm":
            variables = vllm_variables(environments, has_intel_openmp=peer.has_intel_openmp)
        clean = {name: v for name, v in os.environ.items() if name != "GOMP_SPINCOUNT"}
        started = time.perf_counter()
        self._process = subprocess.Popen(
            peer.command(environments, model),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            process_group=0,
            env={**clean, **variables, **peer.variables},
        )
        try:
            self.about = self._reply() | {"start_s": time.perf_counter() - started}
            self._wait_for_warm_up()
        except BaseException:
            self._kill()
            raise
        self._signal(signal.SIGSTOP)

    def run(self, requests: Sequence[tuple[list[int], int]]) -> float:
        """Seconds for requests of (prompt, tokens to generate)."""
        self._signal(signal.SIGCONT)
        try:
            reply = self._ask(requests)
        finally:
            self._signal(signal.SIGSTOP)
        self.outputs = reply["outputs"]
        return float(reply["seconds"])

    def _wait_for_warm_up(self) -> None:
        self._ask([([1, 2, 3], 2)])

    def _ask(self, requests: Sequence[tuple[list[int], int]]) -> dict[str, Any]:
        assert self._process.stdin is not None
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(requests, file)
            file.flush()
            self._process.stdin.write(json.dumps({"path": file.name}) + "\n")
            self._process.stdin.flush()
            return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = "".join(self._log.readlines()[-15:])
            raise SystemExit(f"{self.peer.name} ended:\n{last}")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        self._kill()
