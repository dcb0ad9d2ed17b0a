"""Dataset runs in the background, as RQ jobs: one function, JSON arguments, no pickle.

A job is a slice of a run: after `SLICE_S`, or when its worker is told to stop, it hands itself back
to the queue and a later slice goes on from the journal. RQ's worker would call whatever function a
job names, and callbacks and webhooks besides; `BatchJob` lets it call `run_batch` and nothing else,
on files below one directory.
"""

import hashlib
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, NoReturn

import redis
from rq import Queue, Retry, Worker, get_current_job
from rq.exceptions import DuplicateJobError, NoSuchJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer

from tokenmill.producer.dataset import InputError
from tokenmill.producer.errors import InvalidRequest, NotFound
from tokenmill.producer.generate import generate
from tokenmill.producer.journal import Answer, OutputError
from tokenmill.producer.plan import Plan
from tokenmill.producer.progress import Outcome, Report

QUEUE = "tokenmill-batches"
RUN = "tokenmill.producer.batches.run_batch"
SLICE_S = 1800
#: A slice ends by itself; one that hangs is ended here.
TIMEOUT_S = SLICE_S + 600
KEEP_S = 7 * 86_400
#: Slices that fail, by a lost server or a killed worker, before the batch is given up.
MAX_FAILURES = 5
_MANY = 1_000_000
_SAVE_EVERY_S = 2.0
_ENDED = (JobStatus.FINISHED, JobStatus.FAILED, JobStatus.STOPPED, JobStatus.CANCELED)


class Stopped(BaseException):
    """The worker is told to stop: this slice ends here. Not an error, so nothing may swallow it."""


class BatchJob(Job):  # type: ignore[misc]
    """A job that can only be `run_batch`."""

    #: What generate is given: the server's URL, None for the embedded one.
    url: ClassVar[str | None] = None
    #: Input and output must lie below it.
    root: ClassVar[Path] = Path("/")
    check_model: ClassVar[Callable[[str], None]] = staticmethod(lambda _model: None)

    success_callback = failure_callback = stopped_callback = None

    @property
    def func(self) -> Callable[..., Any]:
        """The one function; raises InvalidRequest where the job names another."""
        if self.func_name != RUN:
            raise InvalidRequest("func_name", RUN, self.func_name)
        return run_batch

    def restore(self, raw_data: Any) -> None:
        """Read the job, without what would have us call other places."""
        super().restore(raw_data)
        self.webhooks: list[object] = []


class BatchWorker(Worker):  # type: ignore[misc]
    """RQ's forking worker; told to stop, it ends the running slice instead of waiting for it."""

    def handle_warm_shutdown_request(self) -> None:
        """Pass the signal on to the process that runs the slice."""
        if self.horse_pid:
            self.kill_horse(signal.SIGTERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStatus:
    """A batch as its queue knows it."""

    batch_id: str
    #: queued, started, finished, failed, ...
    state: str
    input: str
    output: str
    rows: int = 0
    done: int = 0
    failed: int = 0
    tokens: int = 0
    error: str = ""


def submit(server: redis.Redis, plan: Plan) -> str:
    """Enqueue a run and return its batch id; a no-op while the same run is queued or running."""
    queue = _queue(server)
    values = plan.to_mapping()
    text = json.dumps(values, sort_keys=True)
    batch_id = f"batch-{hashlib.blake2b(text.encode(), digest_size=10).hexdigest()}"
    ended = _fetch(server, batch_id)
    if ended is not None and ended.get_status() in _ENDED:
        ended.delete()
    try:
        queue.enqueue_call(
            RUN,
            args=(values,),
            job_id=batch_id,
            unique=True,
            timeout=TIMEOUT_S,
            result_ttl=KEEP_S,
            failure_ttl=KEEP_S,
            retry=Retry(max=MAX_FAILURES),
            description=f"{plan.input} -> {plan.output}",
        )
    except DuplicateJobError:
        return batch_id
    return batch_id


def status(server: redis.Redis, batch_id: str) -> BatchStatus:
    """What is known of a batch.

    Raises:
        NotFound: there is none of that id, or it ended long ago.
    """
    job = _fetch(server, batch_id)
    if job is None:
        raise NotFound(
            f"no batch {batch_id}: a wrong id, or it ended over {KEEP_S // 86_400} days ago"
        )
    return _status(job)


def list_batches(server: redis.Redis) -> Iterator[BatchStatus]:
    """All batches that are queued, running, or ended not long ago."""
    queue = _queue(server)
    ids = [
        *queue.job_ids,
        *queue.started_job_registry.get_job_ids(),
        *queue.failed_job_registry.get_job_ids(),
        *queue.finished_job_registry.get_job_ids(),
    ]
    for batch_id in dict.fromkeys(ids):
        job = _fetch(server, batch_id)
        if job is not None:
            yield _status(job)


def work(
    server: redis.Redis,
    *,
    url: str | None,
    root: Path,
    check_model: Callable[[str], None],
    burst: bool,
) -> None:
    """Run batches until told to stop, or with `burst` until there are none."""
    BatchJob.url, BatchJob.root = url, root.resolve()
    BatchJob.check_model = staticmethod(check_model)
    worker = BatchWorker(
        [_queue(server)],
        connection=server,
        job_class=BatchJob,
        serializer=JSONSerializer,
        log_job_description=False,
    )
    worker.work(burst=burst, logging_level="WARNING")


def run_batch(values: Mapping[str, Any]) -> Any:
    """One slice of a run, in the process that RQ forked for it."""
    job = get_current_job()
    signal.signal(signal.SIGTERM, _stop)
    try:
        outcome = generate(
            _below_root(Plan.from_mapping(values), BatchJob.root),
            _SavedProgress(job),
            url=BatchJob.url,
            check_model=BatchJob.check_model,
            stop_at=time.monotonic() + SLICE_S,
        )
    except Stopped:
        return Retry(max=_MANY)
    except (InputError, OutputError, InvalidRequest) as error:
        return {"error": str(error)}  # the same mistake again would not help
    return asdict(outcome) if outcome.complete else Retry(max=_MANY)


class _SavedProgress(Report):
    """A report that keeps its numbers with the job, for `batch status`."""

    def __init__(self, job: Any) -> None:
        self._job = job
        self._numbers = {"rows": 0, "done": 0, "failed": 0, "tokens": 0}
        self._next = 0.0

    def note(self, text: str) -> None:
        self._job.meta["note"] = text

    def begin(self, rows: int, done: int, failed: int) -> None:
        self._numbers |= {"rows": rows, "done": done, "failed": failed}

    def text(self, row: int, text: str, tokens: int) -> None:
        del row, text
        self._numbers["tokens"] += tokens

    def ended(self, answer: Answer) -> None:
        self._numbers["done"] += 1
        self._numbers["failed"] += not answer.ok

    def tick(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SAVE_EVERY_S
            self._save()

    def finish(self, outcome: Outcome) -> None:
        del outcome
        self._save()

    def _save(self) -> None:
        self._job.meta |= self._numbers
        self._job.save_meta()


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise Stopped


def _below_root(plan: Plan, root: Path) -> Plan:
    for name in ("input", "output"):
        path = Path(getattr(plan, name)).resolve()
        if not path.is_relative_to(root):
            remedy = "start the batch worker with another --root"
            raise InvalidRequest(name, f"a file below {root}", str(path), remedy)
    return plan


def _queue(server: redis.Redis) -> Any:
    return Queue(QUEUE, connection=server, job_class=BatchJob, serializer=JSONSerializer)


def _fetch(server: redis.Redis, batch_id: str) -> Any:
    try:
        return BatchJob.fetch(batch_id, connection=server, serializer=JSONSerializer)
    except (NoSuchJobError, ValueError):
        return None


def _status(job: Any) -> BatchStatus:
    state = job.get_status().value
    result = job.latest_result()
    value = result.return_value if result else None
    error = ""
    if isinstance(value, dict) and "error" in value:
        state, error = "failed", str(value["error"])
    elif state == "failed" and result and result.exc_string:
        error = result.exc_string.strip().splitlines()[-1]
    plan = job.args[0]
    numbers = {name: int(job.meta.get(name, 0)) for name in ("rows", "done", "failed", "tokens")}
    if isinstance(value, dict) and "rows" in value:
        numbers |= {"rows": value["rows"], "done": value["rows"], "failed": value["failed"]}
    return BatchStatus(
        batch_id=job.id,
        state=state,
        input=plan["input"],
        output=plan["output"],
        error=error,
        **numbers,
    )
