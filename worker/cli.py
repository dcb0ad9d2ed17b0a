"""`tokenmill worker`: serve a model. Imports no torch before it starts."""

import gc
import logging
import os
import sys
from functools import partial
from typing import Any

import click

from tokenmill.engine.config import KV_CACHE_DTYPES, EngineConfig
from tokenmill.engine.scheduler import Policy
from tokenmill.worker.config import WorkerConfig, parse_bytes, parse_lora
from tokenmill.worker.log import configure

#: Turns that a thread of torch spins while it waits for its peers. libgomp's own choice spins for
#: milliseconds, on the core that the server or a producer needs (docs/decisions/0005).
SPIN_COUNT = "3000"

#: An option whose help names its environment variable.
_option = partial(click.option, show_envvar=True)


def _auto(value: str) -> int | None:
    """An integer, or `auto` (None): chosen from device and model."""
    if value == "auto":
        return None
    try:
        return int(value)
    except ValueError as error:
        raise click.BadParameter(f"expected an integer or auto, got {value!r}") from error


@click.command()
@_option(
    "--model", envvar="TOKENMILL_MODEL", required=True, help="Name, directory, .gguf or hub id."
)
@_option(
    "--redis",
    "url",
    envvar="TOKENMILL_REDIS_URL",
    metavar="URL",
    help="redis://, rediss:// or unix://; without one, the embedded server.",
)
@_option("--queue", envvar="TOKENMILL_QUEUE", default="default", help="Name of the queue.")
@_option(
    "--token-budget",
    envvar="TOKENMILL_TOKEN_BUDGET",
    type=_auto,
    metavar="N|auto",
    default="auto",
    show_default=True,
    help="Most tokens in one forward pass; auto times a few at the start.",
)
@_option(
    "--device",
    envvar="TOKENMILL_DEVICE",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="auto takes a GPU where there is one.",
)
@_option(
    "--dtype",
    envvar="TOKENMILL_DTYPE",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="auto is bfloat16 on a GPU and float32 on a CPU.",
)
@_option(
    "--quantization",
    envvar="TOKENMILL_QUANTIZATION",
    type=click.Choice(["none", "int8", "fp8"]),
    default="none",
    show_default=True,
    help="Compute linears in 8 bits: int8 on a CPU, fp8 on a GPU that has it.",
)
@_option(
    "--lora",
    envvar="TOKENMILL_LORA",
    multiple=True,
    metavar="NAME=DIRECTORY",
    help="Load a LoRA adapter that requests may name; repeatable.",
)
@_option(
    "--tensor-parallel-size",
    envvar="TOKENMILL_TENSOR_PARALLEL_SIZE",
    type=int,
    metavar="N",
    default=1,
    show_default=True,
    help="Divide the model among N GPUs of this machine.",
)
@_option(
    "--max-num-seqs",
    envvar="TOKENMILL_MAX_NUM_SEQS",
    type=_auto,
    metavar="N|auto",
    default="auto",
    help="Most sequences at once.",
)
@_option(
    "--max-model-len",
    envvar="TOKENMILL_MAX_MODEL_LEN",
    type=_auto,
    metavar="N|auto",
    default="auto",
    help="Most tokens of a sequence.",
)
@_option(
    "--kv-cache-memory",
    envvar="TOKENMILL_KV_CACHE_MEMORY",
    metavar="BYTES",
    help="Memory for the KV cache, such as 2GiB.",
)
@_option(
    "--kv-cache-dtype",
    envvar="TOKENMILL_KV_CACHE_DTYPE",
    type=click.Choice(KV_CACHE_DTYPES),
    default="auto",
    help="auto is the model's, and bfloat16 with int8; fp8 on a GPU alone.",
)
@_option(
    "--policy",
    envvar="TOKENMILL_POLICY",
    type=click.Choice([policy.value for policy in Policy]),
    default=Policy.SPLITFUSE.value,
    help="How a step is filled; the others are for comparison.",
)
@_option(
    "--prefix-caching/--no-prefix-caching",
    envvar="TOKENMILL_PREFIX_CACHING",
    default=True,
    show_default=True,
    help="Compute a prefix that prompts share once.",
)
@_option(
    "--max-step-ms",
    envvar="TOKENMILL_MAX_STEP_MS",
    type=float,
    metavar="MS",
    help="Cut prompts so that no forward pass takes longer, as far as can be predicted.",
)
@_option(
    "--deterministic",
    envvar="TOKENMILL_DETERMINISTIC",
    is_flag=True,
    help="The same results whatever else is computed, or no start; a GPU is slower with it.",
)
@_option(
    "--async-scheduling/--no-async-scheduling",
    envvar="TOKENMILL_ASYNC_SCHEDULING",
    default=False,
    show_default=True,
    help="On a GPU, launch each step before the one before it has ended. Never run on one yet.",
)
@_option(
    "--cuda-graphs/--enforce-eager",
    envvar="TOKENMILL_CUDA_GRAPHS",
    default=False,
    show_default=True,
    help="On a GPU, run steps as CUDA graphs. Never run on one yet.",
)
@_option("--threads", envvar="TOKENMILL_THREADS", type=int, help="CPU threads of the model.")
@_option(
    "--lease",
    "lease_s",
    envvar="TOKENMILL_LEASE",
    type=float,
    default=15.0,
    metavar="SECONDS",
    help="Silence after which others take over.",
)
@_option(
    "--stall-limit",
    "stall_limit_s",
    envvar="TOKENMILL_STALL_LIMIT",
    type=float,
    default=60.0,
    metavar="SECONDS",
    help="A longer step counts as hung.",
)
@_option(
    "--exit-when-idle",
    "exit_when_idle_s",
    envvar="TOKENMILL_EXIT_WHEN_IDLE",
    type=float,
    metavar="SECONDS",
    help="End after so long without work.",
)
@_option(
    "--health-port",
    envvar="TOKENMILL_HEALTH_PORT",
    type=int,
    metavar="PORT",
    help="Serve /livez, /startedz and /readyz here.",
)
@_option("--verbose", "-v", envvar="TOKENMILL_VERBOSE", is_flag=True, help="Log every request.")
@_option("--json", "as_json", envvar="TOKENMILL_JSON", is_flag=True, help="Log as JSON lines.")
@click.pass_context
def worker(
    context: click.Context,
    /,
    *,
    url: str | None,
    token_budget: int | None,
    lora: tuple[str, ...],
    tensor_parallel_size: int,
    max_num_seqs: int | None,
    max_model_len: int | None,
    kv_cache_memory: str | None,
    kv_cache_dtype: str,
    policy: str,
    prefix_caching: bool,
    max_step_ms: float | None,
    deterministic: bool,
    async_scheduling: bool,
    cuda_graphs: bool,
    lease_s: float,
    verbose: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Serve a model: take requests from the queue, stream their tokens back.

    SIGTERM or Ctrl-C stops it in order: what runs is given back, and another worker goes on at the
    exact token. A second one quits at once.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when torch is loaded, below
    configure(as_json=as_json, level=logging.DEBUG if verbose else logging.INFO)
    config = WorkerConfig(
        redis_url=url or _embedded(),
        lease_ms=int(lease_s * 1000),
        engine=EngineConfig(
            token_budget=token_budget,
            tensor_parallel_size=tensor_parallel_size,
            lora=parse_lora(lora),
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_memory=None if kv_cache_memory is None else parse_bytes(kv_cache_memory),
            policy=Policy(policy),
            prefix_caching=prefix_caching,
            max_step_ms=max_step_ms,
            deterministic=deterministic,
            async_scheduling=async_scheduling,
            cuda_graphs=cuda_graphs,
        ),
        **settings,
    )
    gc.disable()  # what is imported stays: to look through it again and again takes 0.2 s
    from tokenmill.engine.errors import GroupLost
    from tokenmill.worker.loop import EngineFailed
    from tokenmill.worker.process import WorkerFailed, run

    gc.freeze()
    gc.enable()
    try:
        # Somebody at a terminal wants to know of a wrong address; a container is started with its
        # server, and would only be started again.
        status = run(config, waits_for_server=not sys.stderr.isatty())
    except (EngineFailed, GroupLost, WorkerFailed) as error:
        raise click.ClickException(str(error)) from error  # status 1: not the user's mistake
    context.exit(status)


def _embedded() -> str:
    from tokenmill.producer.embedded import ensure_server

    return ensure_server()
