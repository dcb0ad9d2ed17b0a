"""A GPU that is not there: torch's fake tensors on it, and Triton's launches handed to a function.

Fake tensors have shapes and a device and no numbers, so that whatever reads a number raises. What
of torch asks a build for CPUs for the device's guard is put in other words.
"""

import importlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

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
from tokenmill.engine.models.packed_linear import IntPacking
from tokenmill.engine.models.weights import empty_weights, pack
from tokenmill.engine.probe import Probe
from tokenmill.engine.step_graphs import StepGraphs
from tokenmill.engine.tokenizer import Tokenizer
from tokenmill.kernels import compiler
from tokenmill.producer.params import SamplingParams

DEVICE = torch.device("cuda:0")
#: Without a table of tiles: those by rule are the ones that have to compile.
H100 = SimpleNamespace(name="an H100 of this file", major=9, minor=0, multi_processor_count=132)


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


@contextmanager
def fake_gpu(launch: Callable[..., None]) -> Iterator[FakeTensorMode]:
    """Fake tensors may be on `DEVICE`; `launch(kernel, *arguments, grid=..., ...)` is a launch."""
    from triton.runtime import interpreter, jit

    if compiler.has_wide_vectors():
        # It makes a tensor as it is imported, which would be a fake one for the whole process.
        importlib.import_module("tokenmill.kernels.compiled_linear")
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def pinned(tensor: torch.Tensor) -> Any:
        locked: Any = tensor if isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)
        locked.constant = None
        locked.is_locked = True
        return locked

    def run(kernel: Any, *args: Any, **kwargs: Any) -> None:
        for tensor in tree_iter((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and tensor.device != DEVICE:
                raise AssertionError(f"{kernel} is given a tensor on {tensor.device}")
        launch(kernel, *args, **kwargs)

    with ExitStack() as stack:
        for owner, name, form in (
            (interpreter.InterpretedFunction, "run", run),
            (jit.JITFunction, "run", run),
            (torch.Tensor, "pin_memory", pinned),
            (torch.cuda, "get_device_properties", lambda _: H100),
            (torch.cuda, "get_device_capability", lambda _: (H100.major, H100.minor)),
            (FakeTensor, "__getitem__", _item),
            (FakeTensor, "__setitem__", _set_item),
            (FakeTensor, "copy_", _copy),
            (FakeTensor, "contiguous", _contiguous),
            (FakeTensor, "new_tensor", _new_tensor),
            (StepGraphs, "_capture", lambda _, work: work),
            (Probe, "check_batch_invariance", lambda *_: None),  # it reads bits
        ):
            stack.enter_context(patch.object(owner, name, form))
        yield mode


def fake_model(
    mode: FakeTensorMode, config: dict[str, Any], packing: IntPacking | None = None
) -> LoadedModel:
    """A model of these shapes in bfloat16, or with linears that are packed."""
    spec = spec_from_config(config)
    backend = Backend(models.WordLevel({f"w{n}": n for n in range(97)}, unk_token="w0"))
    tokenizer = Tokenizer(backend, eos_token_ids=[0])
    with mode:
        weights = pack(empty_weights(spec, torch.bfloat16, DEVICE, packing=packing))
    return LoadedModel("fake", spec, weights, tokenizer, DEVICE, torch.bfloat16)


def fake_engine(mode: FakeTensorMode, model: LoadedModel, config: EngineConfig) -> Engine:
    """An engine whose tokens are made up; one step ahead if it is configured so."""
    with mode:
        engine = Engine(model, config)
        if config.async_scheduling:
            rows = config.max_num_seqs or 0
            engine._executor = DeviceExecutor(
                engine._runner,
                engine.tokenizer,
                {},
                max_num_seqs=rows,
                is_captured=config.cuda_graphs,
                stream=MadeUp(mode, engine.vocab_size),
            )
    return engine


@contextmanager
def in_turns(mode: FakeTensorMode, vocabulary: int) -> Iterator[Watch]:
    """For engines in turns: numbers that are read on the host are made up."""
    tokens = itertools.cycle(range(1, vocabulary))

    def told(tensor: torch.Tensor) -> Any:
        found: Any = 0.0 if tensor.is_floating_point() else next(tokens)
        for size in reversed(tensor.shape):
            found = [found] * size
        return found

    with (
        patch.object(FakeTensor, "tolist", told),
        patch.object(runner, "encode", lambda _: b""),
        mode,
        Watch(may_wait=True) as watch,
    ):
        yield watch


def drain(engine: Engine, requests: list[tuple[int, SamplingParams]]) -> list[StepOutput]:
    """Run prompts of these lengths to their ends."""
    for number, (length, params) in enumerate(requests):
        engine.add(str(number), list(range(1, 1 + length)), params, seed=number)
    outputs: list[StepOutput] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


# -- what asks for the device's guard ----------------------------------------------------------


def _item(self: torch.Tensor, index: Any) -> Any:
    parts: list[torch.Tensor | None] = []
    for place in index if isinstance(index, tuple) else (index,):
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
            parts.append(_tensor(place))
    if any(part is not None for part in parts):
        return torch.ops.aten.index(self, parts)
    return self


def _set_item(self: torch.Tensor, index: Any, value: Any) -> None:
    parts = [_tensor(place) for place in (index if isinstance(index, tuple) else (index,))]
    value = value if isinstance(value, torch.Tensor) else self.new_full((), value)
    torch.ops.aten.index_put_(self, parts, value)


def _tensor(place: Any) -> torch.Tensor:
    return place if isinstance(place, torch.Tensor) else torch.tensor(place)


def _copy(self: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    return torch.ops.aten.copy_(self, source, non_blocking)


def _contiguous(self: torch.Tensor) -> Any:
    if self.is_contiguous():
        return self
    return torch.ops.aten.clone(self, memory_format=torch.contiguous_format)


def _new_tensor(self: torch.Tensor, data: Any) -> torch.Tensor:
    found: torch.Tensor = torch.tensor(data, dtype=self.dtype, device=self.device)
    return found
