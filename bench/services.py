"""What bench/cpu_serving.py drives: vLLM behind its HTTP server, and a tokenmill worker on Redis.

Each runs in processes of its own; a vLLM server is stopped by SIGSTOP while others are measured.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from closed_loop import Request, Stream
from peer_engine import python_of, vllm_variables

from tokenmill.producer.client import Client

START_TIMEOUT_S = 600.0


class Tokenmill:
    """A worker on the embedded server of $TOKENMILL_STATE_DIR, read through `Client`."""

    def __init__(self, max_step_ms: float) -> None:
        self.name = f"tokenmill max-step-ms {max_step_ms:g}"
        self._queue = f"bench-{max_step_ms:g}"
        command = [sys.executable, "-m", "tokenmill.producer.cli", "worker", "--model", "smollm2"]
        command += ["--queue", self._queue, "--max-step-ms", str(max_step_ms)]
        command += ["--no-prefix-caching"]  # as there is none at vLLM
        self._client = Client(queue=self._queue)
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while not self._client.workers():
            if self._process.poll() is not None:
                raise SystemExit(f"the worker ended with {self._process.returncode}")
            time.sleep(0.02)

    @contextmanager
    def running(self) -> Iterator[None]:
        """It waits for work without spending any time, so it always runs."""
        yield

    @contextmanager
    def connect(self) -> Iterator[Stream]:
        with Client(queue=self._queue) as client:

            def stream(request: Request) -> Iterator[Sequence[int]]:
                prompt, length = request
                sent = client.submit(prompt, max_tokens=length, ignore_eos=True)
                for delta in client.follow(sent):
                    yield delta.token_ids

            yield stream

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(30)
        self._client.close()


class VLLM:
    """vLLM's OpenAI server, streaming; prompts are cut to `budget` tokens a step."""

    def __init__(
        self,
        environments: Path,
        model: Path,
        *,
        budget: int,
        dtype: str,
        environment: str,
        is_eager: bool,
    ) -> None:
        self.name = f"{environment} {dtype} budget {budget}" + (" eager" if is_eager else "")
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        command = [str(python_of(environments, environment))]
        command += ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += ["--served-model-name", "model", "--port", str(self._port)]
        command += ["--host", "127.0.0.1", "--dtype", dtype, "--max-model-len", "2048"]
        command += ["--max-num-batched-tokens", str(budget), "--max-num-seqs", str(min(budget, 64))]
        command += ["--enable-chunked-prefill", "--no-enable-prefix-caching"]
        command += ["--kv-cache-memory-bytes", str(2 << 30), "--disable-uvicorn-access-log"]
        command += ["--enforce-eager"] if is_eager else []
        self._process = subprocess.Popen(
            command,
            stdout=self._log,
            stderr=self._log,
            process_group=0,
            env=os.environ | vllm_variables(environments),
        )
        started = time.monotonic()
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > started + START_TIMEOUT_S:
                self._signal(signal.SIGKILL)
                self._log.seek(0)
                raise SystemExit(f"{self.name} did not start:\n{self._log.read()[-3000:]}")
            time.sleep(0.2)
        with self.connect() as stream:  # warm
            for _ in stream(([37 * n % 999 for n in range(300)], 16)):
                pass
        self._signal(signal.SIGSTOP)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let it run meanwhile."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    @contextmanager
    def connect(self) -> Iterator[Stream]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=300)

        def stream(request: Request) -> Iterator[Sequence[int]]:
            prompt, length = request
            body = {
                "model": "model",
                "prompt": prompt,
                "max_tokens": length,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "return_token_ids": True,
            }
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise SystemExit(f"{self.name} answers {response.status}: {response.read()!r}")
            for line in response:
                if line.startswith(b"data: {"):
                    yield json.loads(line[6:])["choices"][0]["token_ids"] or []

        try:
            yield stream
        finally:
            connection.close()

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._log.close()

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


Service = Tokenmill | VLLM
