"""Copies between host and device that nobody waits for, and `Stream`, which says when to wait."""

from collections.abc import Callable
from typing import Protocol

import torch

#: What work on the device gives, and what brings it to the host.
Tensors = tuple[torch.Tensor, ...]
Wait = Callable[[], Tensors]


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host's tensor on the device, by a copy that is queued there.

    Each copy has pinned memory of its own, which torch keeps until the copy has been made.
    """
    if device.type == "cpu":
        return tensor
    if not tensor.numel():  # there is nothing to pin
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Stream(Protocol):
    """Where work is queued, in order."""

    def submit(self, work: Callable[[], Tensors]) -> Wait:
        """Queue work; returns what waits for it and gives its results, on the host."""
        ...


class DeviceStream:
    """The current stream of a device: what is launched there is queued."""

    def submit(self, work: Callable[[], Tensors]) -> Wait:
        """Launch the work, and copies of what it gives to pinned memory, behind it."""
        found = tuple(tensor.to("cpu", non_blocking=True) for tensor in work())
        if not torch.cuda.is_available():
            return lambda: found
        # Never run on a device.
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()

        def wait() -> Tensors:
            done.synchronize()
            return found

        return wait
