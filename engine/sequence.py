"""`Sequence`: the engine's side of one request. Standard library only.

    token_ids   [ prompt ............ | output ...... ]
                0          num_prompt_tokens     num_tokens
    KV cache    [ computed ............... | scheduled | ]
                0            num_computed_tokens

Tokens that a launched step draws are pending until they are on the host: they count in
`num_tokens`, at its end, and are not in `token_ids`.

There is no phase flag: a sequence catches up with its length inside the token budget, and
"prefilling" is a property. Only `engine/` mutates a sequence.
"""

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenmill.engine.token_counts import TokenCounts
from tokenmill.producer.params import SamplingParams

if TYPE_CHECKING:
    from tokenmill.engine.constraint import Constraint


class SequenceStatus(enum.Enum):
    """Where a sequence stands; PREEMPTED waits like WAITING, but has run before."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class FinishReason(enum.Enum):
    """Why a sequence ended; the values are the words on the wire."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """Tokens, progress and KV blocks of one request; compared by identity."""

    seq_id: str
    #: Prompt followed by output. A resumed sequence starts with the output it already has.
    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    #: Key of the sampling noise, together with the position.
    seed: int
    #: The length at which it ends: prompt + max_tokens, capped by the context.
    max_num_tokens: int
    #: 0 goes first.
    priority: int = 1
    #: Sort key given by the scheduler: arrival, with the head start of the priority.
    order: tuple[int, int] = (0, 0)
    #: Times that others were admitted although this one, waiting longer, did not fit.
    times_passed: int = 0
    #: Tokens whose KV is in the cache.
    num_computed_tokens: int = 0
    #: Drawn by launched steps, and not known to the host yet.
    num_pending_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    #: Blocks at the begin of the table that have been given back (`engine/block_table.py`).
    num_dropped_blocks: int = 0
    #: Full blocks at the begin of the table whose contents the pool has been told of.
    num_known_blocks: int = 0
    #: Of its full blocks, as far as they were needed (`block_pool.extend_hashes`).
    block_hashes: list[bytes] = field(default_factory=list)
    status: SequenceStatus = SequenceStatus.WAITING
    #: Prompt tokens whose log probability has been told, or need not be; the first has none.
    num_told_tokens: int = 1
    #: Kept by the sampler where there are penalties; made anew from `token_ids` when missing.
    counts: TokenCounts | None = None
    #: Not to be admitted yet: its constraint is being compiled.
    is_blocked: bool = False
    #: What the output may be; None for anything.
    constraint: "Constraint | None" = None

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens

    @property
    def num_skippable_tokens(self) -> int:
        """Tokens that need not be computed if their KV is known: all whose output is not wanted."""
        wants_prompt = self.params.prompt_logprobs is not None
        if wants_prompt and self.num_told_tokens < self.num_prompt_tokens:
            return self.num_told_tokens - 1
        return self.num_tokens - 1

    @property
    def held_blocks(self) -> list[int]:
        """The blocks of its table that it has a reference to."""
        return self.block_table[self.num_dropped_blocks :]

    @property
    def is_prefilling(self) -> bool:
        """More than its newest token is missing from the cache."""
        return len(self.token_ids) + self.num_pending_tokens - self.num_computed_tokens > 1

    @property
    def is_awaited(self) -> bool:
        """Its next step waits for its pending token: it may have none, or must know the token."""
        if not self.num_pending_tokens:
            return False
        return self.constraint is not None or self.num_tokens >= self.max_num_tokens
