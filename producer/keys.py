"""Every key of a queue, its type and its meaning; the Lua scripts build the same names.

All carry the tag `T = {<queue>:<shard>}`, so that one shard lives in one cluster slot and a script
may touch everything in it. The shard is part of a request id: a reader finds it without a look-up.

    key                     type     content
    T:shards                string   number of shards, in shard 0 alone; absent: 1. Written once
    T:settings              hash     max_live, result_ttl_ms, dead_ttl_ms, paused, weight:<tenant>,
                                     quota:<tenant>: read by the scripts, set by operators
    T:inbox                 stream   requests as one field, json or msgpack, from any language;
                                     an entry is deleted in the step that enqueues or refuses it
    T:in:<prio>:<tenant>    stream   waiting and running references; fields id, cost, most. Group
                                     `g` at 0 with the one consumer `workers`: who runs what is in
                                     the records. Deleted when empty
    T:lanes:<prio>          zset     tenant -> virtual time (tokens / weight); lanes that may have
                                     work
    T:aged                  hash     priority -> tokens that its betters were served while it waited
    T:opened                hash     <prio>:<tenant> -> virtual time that the lane was opened with
    T:tenants               hash     tenant -> requests that have not ended
    T:r:<id>                hash     the record: fields below
    T:o:<id>                stream   output. `<tokens so far>-0`: e epoch, t token ids, x text,
                                     h digest. One terminal `<n>-1`: the same, and f finish reason,
                                     y why, p prompt tokens, c completion tokens
    T:reply:<name>          stream   whole outputs of the requests that name it: id, and the fields
                                     of a terminal entry of `T:o:<id>`. Its reader deletes them
    T:live                  zset     id -> deadline, of every request that has not ended
    T:park                  zset     id -> not before: released, failed and orphaned requests
    T:workers               zset     worker -> lease expiry
    T:own:<worker>          set      ids that the worker runs
    T:w:<worker>            hash     registration (model, host, pid, started_ms, version,
                                     quantization, kv_cache_dtype, adapters: names as JSON) and the
                                     last claim (claim_seq, claim_ids), for a repeated call
    T:ctl                   stream   t wake | cancel: what idle workers block on; trimmed
    T:dead                  stream   dead letters: id, tenant, attempts, reason; trimmed

Record: `state` wait | run | park | end; `epoch` rises with every change of owner; `offset` of
committed tokens; `digest` of those; `attempts`; `worker`; `tenant`, `priority`, `entry` (where its
reference is); `deadline`; `cost` prompt tokens, `most` new tokens; `print` fingerprint; `payload`;
`cancel` asked for; `finish` and `reason`; `dead`, its entry in `T:dead`; `created`, `claimed`,
`ended` in ms. `charged` to its lane. With a `reply` stream also the
checkpoints committed so far, `tokens:<offset>`, `text:<offset>` and `logprobs:<offset>` for each
offset in `starts`, and in the end `at`, its entry there. Times are the server's.
"""

from dataclasses import dataclass

from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.request_id import check_request_id
from tokenmill.producer.wire import check_name

#: The consumer group of every input stream.
GROUP = "g"


@dataclass(frozen=True, slots=True)
class Keys:
    """Names the keys of one shard of a queue."""

    queue: str = "default"
    shard: int = 0

    def __post_init__(self) -> None:
        check_name("queue", self.queue)
        if not 0 <= self.shard < 2**16:
            raise InvalidRequest("shard", "from 0 to 65535", self.shard)

    @classmethod
    def of(cls, queue: str, request_id: str) -> "Keys":
        """The keys of the shard that a request lives in."""
        return cls(queue, int(check_request_id(request_id).partition(".")[0]))

    @property
    def tag(self) -> str:
        """What every key begins with."""
        return f"{{{self.queue}:{self.shard}}}"

    @property
    def shards(self) -> str:
        return f"{self.tag}:shards"

    @property
    def settings(self) -> str:
        return f"{self.tag}:settings"

    def lane(self, priority: int, tenant: str) -> str:
        """The input stream of a tenant."""
        return f"{self.tag}:in:{priority}:{tenant}"

    def lanes(self, priority: int) -> str:
        return f"{self.tag}:lanes:{priority}"

    def record(self, request_id: str) -> str:
        return f"{self.tag}:r:{request_id}"

    def output(self, request_id: str) -> str:
        return f"{self.tag}:o:{request_id}"

    def reply(self, name: str) -> str:
        return f"{self.tag}:reply:{name}"

    @property
    def inbox(self) -> str:
        return f"{self.tag}:inbox"

    @property
    def tenants(self) -> str:
        return f"{self.tag}:tenants"

    @property
    def aged(self) -> str:
        return f"{self.tag}:aged"

    @property
    def live(self) -> str:
        return f"{self.tag}:live"

    @property
    def park(self) -> str:
        return f"{self.tag}:park"

    @property
    def workers(self) -> str:
        return f"{self.tag}:workers"

    def own(self, worker_id: str) -> str:
        return f"{self.tag}:own:{worker_id}"

    def worker(self, worker_id: str) -> str:
        return f"{self.tag}:w:{worker_id}"

    @property
    def control(self) -> str:
        return f"{self.tag}:ctl"

    @property
    def dead(self) -> str:
        return f"{self.tag}:dead"
