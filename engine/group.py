"""`Group`: the ranks that compute one model together, as each of them sees it.

Rank 0 alone schedules and samples; it sends every step to the others (`runner.py`), which meet it
in the collectives of the decoder.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch

from tokenmill.engine.models.shard import WHOLE, Shard


class Group(Protocol):
    """Collectives must be called by all ranks, in the same order."""

    @property
    def shard(self) -> Shard: ...
    def join(self) -> None:
        """Wait until every rank has loaded its part; the first call of all."""
        ...

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of the ranks' `x`, the same bits on all of them; `x` may become it."""
        ...

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Of each rank its `x`, on rank 0; nothing on the others."""
        ...

    def least(self, number: int) -> int:
        """The least of the ranks' numbers."""
        ...

    def send(self, frame: bytes) -> None:
        """From rank 0 to all others."""
        ...

    def together(self) -> AbstractContextManager[None]:
        """Around what the others do at the same time: if it fails, the group is lost."""
        ...

    def check(self) -> None:
        """Raise `GroupLost` if a rank has gone."""
        ...

    def serve(self) -> None:
        """All is warm: from now on a step that takes very long means that a rank hangs."""
        ...

    def close(self) -> None:
        """End the other ranks."""
        ...


class Alone:
    """The one rank of a model that is not divided."""

    shard = WHOLE

    def join(self) -> None:
        """Nobody else loads anything."""

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x]

    def least(self, number: int) -> int:
        return number

    def send(self, frame: bytes) -> None:
        """There is nobody else."""

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self) -> None:
        """It is there."""

    def serve(self) -> None:
        """It is its own."""

    def close(self) -> None:
        """There is nobody to end."""


ALONE = Alone()
