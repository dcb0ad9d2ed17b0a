"""`Job`: one request of a run, and every token it may have; a pure function of (seed, number).

A token depends on the prompt, the seed of its noise, its position, the token before it and the
epoch that generated it, which is also part of it:

    token    [ 19 bits: crc of all these | 12 bits: epoch ]

So a token that a stale worker, a wrong resume, another request or a wrong offset brought into an
output is seen wherever it is, even where its neighbours look right.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from tokenmill.producer.params import derived_seed
from tokenmill.producer.request_id import request_id_for

EPOCH_BITS = 12
EPOCHS, HASHES = 1 << EPOCH_BITS, 1 << 19
TENANTS = 5
#: Of the queue of a run; producers and readers have jobs in each.
SHARDS = 2
#: The one reply stream of a run.
REPLIES = "bulk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a producer sends and a checker expects."""

    number: int
    request_id: str
    prompt: str
    max_tokens: int
    tenant: str
    priority: int
    #: The noise; None: derived from the id by the worker.
    seed: int | None
    #: Short in some: these may end as expired.
    deadline_s: float
    #: Seconds after the submit, or None.
    cancel_after_s: float | None
    #: The reply stream of the whole output; "": a stream of deltas.
    reply_to: str
    #: Sent as JSON by a plain XADD.
    is_plain: bool

    @property
    def may_expire(self) -> bool:
        return self.deadline_s < 100

    def tokens(self, epochs: Sequence[int]) -> list[int]:
        """The tokens of an output whose n-th was generated in the n-th of these epochs."""
        found: list[int] = []
        seed = derived_seed(self.request_id) if self.seed is None else self.seed
        for epoch in epochs:
            found.append(token(self.prompt.encode(), seed, found, epoch))
        return found


def job(seed: str, number: int) -> Job:
    """The job of a number in the run of a seed."""
    rng = random.Random(f"{seed}/{number}")
    kind = rng.random()
    return Job(
        number=number,
        request_id=request_id_for(f"chaos {seed} {number}", number // 2 % SHARDS),
        prompt=f"chaos {seed} {number} " + "x" * rng.randrange(60),
        max_tokens=rng.choice([1, 2, 7, 20, 40, 60, 90, 160]),
        tenant=f"t{rng.randrange(TENANTS)}",
        priority=rng.choice([0, 1, 1, 2]),
        seed=rng.randrange(1000) if rng.random() < 0.5 else None,
        deadline_s=rng.uniform(0.2, 4.0) if kind < 0.05 else 86_400,
        cancel_after_s=rng.uniform(0.0, 2.0) if 0.05 <= kind < 0.13 else None,
        reply_to=REPLIES if rng.random() < 0.3 else "",
        is_plain=rng.random() < 0.1,
    )


def token(prompt: bytes, seed: int, before: Sequence[int], epoch: int) -> int:
    """The next token after `before`."""
    last = before[-1] if before else 0
    crc = zlib.crc32(b"%s %d %d %d %d" % (prompt, seed, len(before), last, epoch))
    return crc % HASHES << EPOCH_BITS | epoch % EPOCHS


def epoch_of(token_id: int) -> int:
    """The epoch that generated a token."""
    return token_id % EPOCHS


def letters(token_ids: Sequence[int]) -> str:
    """The text of tokens: one letter each."""
    return "".join(chr(97 + (token_id >> EPOCH_BITS) % 26) for token_id in token_ids)
