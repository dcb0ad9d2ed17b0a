"""`simulate`: the real scheduler in virtual time, on any number of replicas.

    clients --> one queue --claim what fits--> replica: schedule -> its cost in seconds -> tokens

Nothing is modelled of the policy: `Scheduler`, `BlockPool` and the capacity that a worker offers
are the ones that serve. A replica claims between its steps as workers do, first come first served.
Standard library only; ten thousand steps take about a second.
"""

import heapq
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count

from tokenmill.engine.block_pool import BlockPool
from tokenmill.engine.capacity import capacity_of
from tokenmill.engine.planning.device import Device, EngineShape
from tokenmill.engine.planning.figures import Record
from tokenmill.engine.planning.load import ClosedLoop, Lengths, OpenLoop
from tokenmill.engine.scheduler import Scheduler, SchedulerOutput
from tokenmill.engine.sequence import Sequence
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams

#: New tokens that a claim reserves KV memory for, as the claim script does.
KV_RESERVE = 256
#: What the queue takes from the last token of a request to the worker's sight of the client's next.
TURNAROUND_S = 0.003
_PARAMS = SamplingParams()


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a simulation."""

    records: list[Record]
    num_steps: int
    num_preemptions: int
    #: Of the replicas' time from the first request to the last token, the share spent in steps.
    busy: float


class Replica:
    """One engine, as far as time is concerned."""

    def __init__(self, device: Device) -> None:
        shape = device.engine
        pool = BlockPool(shape.kv_tokens // shape.block_size, shape.block_size, is_caching=False)
        self.scheduler = Scheduler(
            pool,
            token_budget=shape.token_budget,
            max_num_seqs=shape.max_num_seqs,
            policy=shape.policy,
            cost=device.cost.cost_model(shape.token_budget),
            max_step_s=shape.max_step_s,
        )
        self.num_steps = 0
        self.busy_s = 0.0
        self._cost = device.cost
        self._records: dict[Sequence, Record] = {}
        self._step: SchedulerOutput | None = None

    def claim(self, queue: deque[tuple[Sequence, Record]]) -> None:
        """Take from the front of the queue what fits."""
        if not queue:
            return
        room = capacity_of(self.scheduler)
        rows, tokens, kv_tokens = room.sequences, room.tokens, room.blocks * room.block_size
        while queue and rows > 0 and tokens > 0:
            seq, record = queue[0]
            output = min(seq.max_num_tokens - seq.num_prompt_tokens, KV_RESERVE)
            if seq.num_prompt_tokens + output > kv_tokens and self._records:
                return
            queue.popleft()
            rows, tokens = rows - 1, tokens - seq.num_prompt_tokens
            kv_tokens -= seq.num_prompt_tokens + output
            self._records[seq] = record
            self.scheduler.add(seq)

    def begin(self) -> float | None:
        """Schedule a step; its seconds, or None with nothing to do."""
        if not self._records:
            return None
        step = self._step = self.scheduler.schedule()
        seconds = self._cost.seconds((chunk.start, chunk.length) for chunk in step.chunks)
        self.num_steps += 1
        self.busy_s += seconds
        return seconds

    def end(self, now: float) -> int:
        """End the step: who was computed to its end has a token more. Returns how many ended."""
        chunks = self._step.chunks if self._step else ()
        self.scheduler.mark_computed(chunks)
        ended = 0
        for chunk in chunks:
            seq = chunk.seq
            if seq.num_uncomputed_tokens:
                continue
            seq.token_ids.append(0)
            self._records[seq].token_times.append(now)
            if seq.num_tokens >= seq.max_num_tokens:
                self.scheduler.finish(seq)
                del self._records[seq]
                ended += 1
        return ended


def simulate(
    device: Device,
    lengths: Lengths,
    loop: ClosedLoop | OpenLoop,
    *,
    replicas: int = 1,
) -> Run:
    """Run all requests to their ends.

    Raises:
        InvalidRequest: a request is larger than the KV cache.
    """
    waiting = _requests(device.engine, lengths)
    records: list[Record] = []
    fleet = [Replica(device) for _ in range(replicas)]
    idle = deque(fleet)
    queue: deque[tuple[Sequence, Record]] = deque()
    number = count()
    #: (time, tie-break, the replica whose step ends; None for an arrival).
    events: list[tuple[float, int, Replica | None]] = [
        (at, next(number), None) for at in loop.first(lengths.requests, lengths.seed)
    ]
    heapq.heapify(events)
    now = 0.0
    while events:
        now, _, replica = heapq.heappop(events)
        if replica is None:
            seq = waiting.popleft()
            records.append(Record(now, seq.num_prompt_tokens))
            queue.append((seq, records[-1]))
            if not idle:
                continue
            replica = idle.popleft()
        else:
            ended = replica.end(now)
            if loop.is_closed:
                for _ in range(min(ended, len(waiting) - _num_arrivals(events))):
                    heapq.heappush(events, (now + TURNAROUND_S, next(number), None))
        replica.claim(queue)
        seconds = replica.begin()
        if seconds is None:
            idle.append(replica)
        else:
            heapq.heappush(events, (now + seconds, next(number), replica))
    return Run(
        records,
        sum(replica.num_steps for replica in fleet),
        sum(replica.scheduler.num_preemptions for replica in fleet),
        sum(replica.busy_s for replica in fleet) / (now * replicas),
    )


def _num_arrivals(events: Iterable[tuple[float, int, Replica | None]]) -> int:
    return sum(replica is None for _, _, replica in events)


def _requests(shape: EngineShape, lengths: Lengths) -> deque[Sequence]:
    requests = deque(
        Sequence(
            seq_id=str(number),
            token_ids=[0] * prompt,
            num_prompt_tokens=prompt,
            params=_PARAMS,
            seed=0,
            max_num_tokens=prompt + output,
        )
        for number, (prompt, output) in enumerate(lengths.draw())
    )
    longest = max(seq.max_num_tokens for seq in requests)
    if longest > shape.kv_tokens // shape.block_size * shape.block_size:
        raise InvalidRequest(
            "kv_tokens", f"at least {longest}, the longest request", shape.kv_tokens
        )
    return requests
