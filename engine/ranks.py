"""`Ranks` and `Leader`: a group of processes that meet by torch.distributed.

NCCL adds up on GPUs, gloo on CPUs. All ranks are on one machine: they find each other by a file in
a directory that only this user can read, and gloo and NCCL talk over the loopback interface.
"""

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed

from tokenmill.engine.models.shard import Shard
from tokenmill.engine.rank_processes import RankProcesses
from tokenmill.producer.errors import InvalidRequest, TokenmillError

#: For a rank to come to a sum that the others are at: kernels may be compiled on the way.
_TIMEOUT = timedelta(minutes=10)
#: For a step once serving has begun: as the stall limit of a worker.
STEP_LIMIT_S = 60.0
#: After a failed step, to learn from the end of another rank what the reason was.
_REASON_S = 2.0


class Ranks:
    """The `Group` as a rank sees it that is told what to do."""

    def __init__(self, shard: Shard, device: torch.device, rendezvous: Path) -> None:
        self.shard = shard
        self._device = device
        self._rendezvous = rendezvous

    def join(self) -> None:
        """Meet the others; each comes here when it has loaded its part."""
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        with _over_loopback():
            distributed.init_process_group(
                backend,
                init_method=f"file://{self._rendezvous}",
                rank=self.shard.rank,
                world_size=self.shard.size,
                timeout=_TIMEOUT,
            )
            self.least(0)  # NCCL connects at the first of them

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cpu" and self.shard.size > 2:
            # In the order of the ranks: gloo's own order depends on the place in the tensor, and
            # so a token's bits on the batch. Of two, either order gives the same.
            return torch.stack(self._all(x)).sum(dim=0)
        distributed.all_reduce(x)
        return x

    def _all(self, x: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(x) for _ in range(self.shard.size)]
        distributed.all_gather(parts, x)
        return parts

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        ranks = range(self.shard.size) if self.shard.rank == 0 else ()
        parts = [torch.empty_like(x) for _ in ranks]
        distributed.gather(x, parts or None, dst=0)
        return parts

    def least(self, number: int) -> int:
        least = torch.tensor(number, device=self._device)
        distributed.all_reduce(least, distributed.ReduceOp.MIN)
        return int(least.item())

    def send(self, frame: bytes) -> None:
        """Rank 0 alone sends."""

    def together(self) -> AbstractContextManager[None]:
        """Whatever fails ends this process, which rank 0 sees."""
        return nullcontext()

    def check(self) -> None:
        """A rank that rank 0 has left ends by itself."""

    def serve(self) -> None:
        """Rank 0 watches."""

    def close(self) -> None:
        """Rank 0 ends the others."""


class Leader(Ranks):
    """The `Group` as rank 0 sees it: the others are its children, told by `send`.

    Raises:
        InvalidRequest: this process has another group, or the machine too few GPUs.
    """

    def __init__(self, size: int, device: torch.device, settings: Mapping[str, object]) -> None:
        """`settings` are those of `rank.py` that are the same for all."""
        if distributed.is_initialized():
            raise InvalidRequest(
                "tensor_parallel_size", "1, as this process is in another group", size, "close it"
            )
        if device.type == "cuda" and size > torch.cuda.device_count():
            raise InvalidRequest(
                "tensor_parallel_size",
                f"at most the {torch.cuda.device_count()} GPUs that this process sees",
                size,
            )
        directory = Path(tempfile.mkdtemp(prefix="tokenmill-"))
        super().__init__(Shard(0, size), device, directory / "rendezvous")
        common = {**settings, "size": size, "rendezvous": str(self._rendezvous)}
        self._others = RankProcesses(
            [{**common, "rank": rank} for rank in range(1, size)],
            on_lost=_abort_nccl if device.type == "cuda" else lambda: None,
        )
        self._end = weakref.finalize(self, _close, self._others, directory)  # also at exit

    def join(self) -> None:
        """Wait until the others have loaded their parts, and meet them.

        Raises:
            GroupLost: one has ended instead.
        """
        self._others.wait_ready()
        with self.together():
            super().join()

    def send(self, frame: bytes) -> None:
        self._others.send(frame)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what the others do too: an error here leaves them in the midst of it.

        Raises:
            GroupLost: instead of any error that is not one of ours.
        """
        self.check()
        try:
            with self._others.step():
                yield
        except TokenmillError as error:
            self._others.give_up(str(error), 0.0)
            raise
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            self._others.give_up(f"rank 0 failed: {type(error).__name__}: {first}", _REASON_S)
            self.check()
            raise
        except BaseException:
            self._others.give_up("rank 0 was interrupted", 0.0)
            raise

    def check(self) -> None:
        self._others.check()

    def serve(self) -> None:
        self._others.watch(STEP_LIMIT_S)

    def close(self) -> None:
        self._end()


@contextmanager
def _over_loopback() -> Iterator[None]:
    """Gloo and NCCL read their interface from the environment."""
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "lo"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _abort_nccl() -> None:
    """A sum on a GPU waits for ever for a rank that has gone; then the stream goes on."""
    if distributed.is_initialized():
        distributed.distributed_c10d._abort_process_group()  # noqa: SLF001 (no public name)


def _close(others: RankProcesses, directory: Path) -> None:
    others.end()
    if distributed.is_initialized():
        with suppress(RuntimeError):  # of what was aborted
            distributed.destroy_process_group()
    shutil.rmtree(directory, ignore_errors=True)
