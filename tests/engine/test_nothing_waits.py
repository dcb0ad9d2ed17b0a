"""Nothing that is launched on a GPU makes the host wait for it, and everything it uses is there.

No GPU is needed: weights, cache and rows are torch's fake tensors, which have shapes and a device
and no numbers, so that whatever reads a number raises; copies between host and device are watched,
and kernels are not run. The tokens that an engine collects are made up.
"""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import models
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tokenmill.engine import runner
from tokenmill.engine.config import EngineConfig
from tokenmill.engine.copies import Tensors, Wait
from tokenmill.engine.device_executor import DeviceExecutor
from tokenmill.engine.engine import Engine, StepOutput
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.models.weights import empty_weights, pack
from tokenmill.engine.step_graphs import StepGraphs
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.producer.params import SamplingParams

DEVICE = torch.device("cuda:0")
CONFIG: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
}
SAMPLINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8, "top_k": 9, "top_p": 0.9},
    {"temperature": 0.9, "logprobs": 2},
    {"temperature": 0.9, "prompt_logprobs": 1},
    {"temperature": 0.7, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    {"temperature": 0.7, "logit_bias": {5: 2.0, 7: -3.0}},
    {"temperature": 0.7, "min_tokens": 4, "stop_token_ids": (3, 4)},
    {"temperature": 0.0, "regex": "[a-z ]+"},
]


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where an operation needs what is elsewhere, or copies so that the host waits."""

    def __init__(self, *, may_wait: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_operations = 0
        self._may_wait = may_wait

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, FakeTensor):
                tensor.constant = None  # what is known is copied in truth, which needs a device
        found = func(*args, **kwargs)
        self.num_operations += 1
        name = func.overloadpacket.__name__
        if name in ("to", "_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            target = args[0] if name == "copy_" else found
            is_queued = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if source.device.type != target.device.type and not self._may_wait:
                if not is_queued:
                    raise AssertionError(f"a copy that waits: {source.device} to {target.device}")
                if source.device.type == "cpu" and not getattr(source, "is_locked", False):
                    raise AssertionError("a copy from pageable memory")
        elif not (
            self._may_wait and name in ("index", "index_put_")
        ):  # they copy what they index by
            places = {
                tensor.device.type
                for tensor in tree_iter((args, kwargs))
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 0
            }
            if len(places) > 1:
                raise AssertionError(f"{func} of tensors on host and device")
        return found


def _item(self: torch.Tensor, index: Any) -> Any:
    index = index if isinstance(index, tuple) else (index,)
    parts: list[torch.Tensor | None] = []
    for place in index:
        if place is None:
            self = self.unsqueeze(len(parts))
            parts.append(None)
        elif isinstance(place, slice):
            if place != slice(None):
                stop = self.shape[len(parts)] if place.stop is None else place.stop
                self = torch.ops.aten.slice(self, len(parts), place.start or 0, stop)
            parts.append(None)
        elif isinstance(place, int):
            self = self.select(len(parts), place)
        else:
            parts.append(place if isinstance(place, torch.Tensor) else torch.tensor(place))
    if any(part is not None for part in parts):
        return torch.ops.aten.index(self, parts)
    return self


def _copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    return torch.ops.aten.copy_(self, source, non_blocking)


def _new_tensor(self: torch.Tensor, data: Any) -> torch.Tensor:
    found: torch.Tensor = torch.tensor(data, dtype=self.dtype, device=self.device)
    return found


def _contiguous(self: torch.Tensor) -> Any:
    if self.is_contiguous():
        return self
    return torch.ops.aten.clone(self, memory_format=torch.contiguous_format)


def _set_item(self: torch.Tensor, index: Any, value: Any) -> None:
    if isinstance(index, tuple) or not isinstance(index, torch.Tensor):
        parts = [
            place if isinstance(place, torch.Tensor) else torch.tensor(place)
            for place in (index if isinstance(index, tuple) else (index,))
        ]
    else:
        parts = [index]
    value = value if isinstance(value, torch.Tensor) else self.new_full((), value)
    torch.ops.aten.index_put_(self, parts, value)


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """Fake tensors on a GPU, and kernels that are launched and not run."""
    from triton.runtime import interpreter, jit

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def pinned(tensor: torch.Tensor) -> Any:
        locked: Any = tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)
        locked.constant = None
        locked.is_locked = True
        return locked

    def launch(kernel: object, *args: Any, **kwargs: Any) -> None:
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.device != DEVICE:
                raise AssertionError(f"{kernel} is given a tensor on {tensor.device}")

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", launch)
    monkeypatch.setattr(jit.JITFunction, "run", launch)
    # Torch's own forms of these ask for the device's guard, which a build for CPUs does not have.
    monkeypatch.setattr(FakeTensor, "__getitem__", _item)
    monkeypatch.setattr(FakeTensor, "__setitem__", _set_item)
    monkeypatch.setattr(FakeTensor, "copy_", _copy)
    monkeypatch.setattr(FakeTensor, "contiguous", _contiguous)
    monkeypatch.setattr(FakeTensor, "new_tensor", _new_tensor)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(StepGraphs, "_capture", lambda _, work: work)
    return mode


class MadeUp:
    """A stream that runs what is submitted on fake tensors, and gives numbers of their shape."""

    def __init__(self, mode: FakeTensorMode, vocabulary: int) -> None:
        self._mode = mode
        self._tokens = itertools.cycle(range(1, vocabulary))
        self.num_operations = 0

    def submit(self, work: Callable[[], Tensors]) -> Wait:
        with self._mode, Watch() as watch:
            found = work()
        self.num_operations += watch.num_operations

        def wait() -> Tensors:
            return tuple(
                torch.full(t.shape, next(self._tokens) if t.dtype == torch.int64 else 0.0).to(
                    t.dtype
                )
                for t in found
            )

        return wait


def make_engine(mode: FakeTensorMode, family: str, *, is_ahead: bool = False) -> Engine:
    spec = spec_from_config(CONFIG | {"model_type": family} | FAMILIES[family])
    backend = Backend(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    tokenizer = Tokenizer(backend, eos_token_ids=[0])
    config = EngineConfig(
        max_model_len=96,
        token_budget=32,
        max_num_seqs=8,
        block_size=16,
        kv_cache_memory=1 << 20,
        async_scheduling=is_ahead,
    )
    with mode:
        weights = pack(empty_weights(spec, torch.bfloat16, DEVICE))
        model = LoadedModel("fake", spec, weights, tokenizer, DEVICE, torch.bfloat16)
        return Engine(model, config)


def run(engine: Engine, samplings: list[dict[str, Any]]) -> None:
    for number, sampling in enumerate(samplings):
        params = SamplingParams(max_tokens=9, ignore_eos=True, **sampling)
        engine.add(str(number), list(range(1, 12 + 7 * number)), params, seed=number)
    outputs: list[StepOutput] = []
    while engine.has_work:
        outputs += engine.step()
    assert not [output.error for output in outputs if output.error]
    assert sum(len(output.token_ids) for output in outputs) >= 8 * len(samplings)


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_in_a_launch_waits(mode: FakeTensorMode, family: str, graphs: bool) -> None:
    engine, stream = make_engine(mode, family, is_ahead=True), MadeUp(mode, 97)
    with mode:
        engine._executor = DeviceExecutor(
            engine._runner, engine.tokenizer, {}, max_num_seqs=8, is_captured=graphs, stream=stream
        )
    run(engine, SAMPLINGS[:4])
    assert stream.num_operations > 100


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_turns_mix_no_devices(
    mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    tokens = itertools.cycle(range(1, 97))

    def told(tensor: torch.Tensor) -> Any:
        found: Any = 0.0 if tensor.is_floating_point() else next(tokens)
        for size in reversed(tensor.shape):
            found = [found] * size
        return found

    monkeypatch.setattr(FakeTensor, "tolist", told)
    monkeypatch.setattr(runner, "encode", lambda _: b"")
    engine = make_engine(mode, family)
    with mode, Watch(may_wait=True) as watch:
        run(engine, SAMPLINGS[:4])
    assert watch.num_operations > 100
