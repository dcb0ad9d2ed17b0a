"""A dataset run: rows of a file in, answers in a file out, through the queue.

Whatever ends a run, the same command goes on with it. A row's request id is made of the run's id
and the row's number, so that sending it again is a no-op and its output is read from the start;
what has ended is in the journal. The output appears in one rename at the end, in input order.
"""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from tokenmill.producer.client import REDIS_URL, Client
from tokenmill.producer.dataset import Dataset, Layout
from tokenmill.producer.embedded import ensure_server, stop_if_idle
from tokenmill.producer.journal import Journal, OutputError, journal_path
from tokenmill.producer.output import failed_rows
from tokenmill.producer.plan import Plan
from tokenmill.producer.progress import Outcome, Report
from tokenmill.producer.run import Run


def generate(
    plan: Plan,
    report: Report,
    *,
    url: str | None = None,
    check_model: Callable[[str], None] = lambda _model: None,
    stop_at: float | None = None,
) -> Outcome:
    """Answer the rows of `plan.input` into `plan.output`, going on where an earlier run was.

    Without a server named (`url` or TOKENMILL_REDIS_URL) it uses the embedded one, and brings a
    worker when none is live. `check_model` raises for a model that such a worker cannot load.
    `stop_at` is a `time.monotonic()`: past it, the run stops with `complete` False.

    Raises:
        InputError, OutputError, InvalidRequest: the user's mistake; nothing was sent.
        ServerUnreachable, WrongServer: at the start; a server lost later is waited for.
        WorkerEnded: the worker that it brought has ended.
    """
    layout = Layout(plan.layout) if plan.layout else None
    dataset = Dataset(Path(plan.input), plan.reading, layout)
    output = Path(plan.output)
    if not plan.overwrite and output.is_file() and not journal_path(output).exists():
        return _already_there(dataset, output, report)
    with ExitStack() as stack:
        journal = stack.enter_context(
            Journal(
                output,
                digest=dataset.survey.digest,
                parameters=plan.parameters(),
                overwrite=plan.overwrite,
            )
        )
        url = url or os.environ.get(REDIS_URL) or None
        embedded = url is None
        if url is None:
            url = ensure_server()
            stack.callback(stop_if_idle)
        client = stack.enter_context(Client(url, queue=plan.queue))
        run = stack.enter_context(Run(plan, dataset, journal, client, report, embedded=embedded))
        run.prepare(check_model)
        return run.go(stop_at)


def _already_there(dataset: Dataset, output: Path, report: Report) -> Outcome:
    failed = failed_rows(dataset, output)
    if failed is None:
        raise OutputError(
            f"{output} exists and is not the output of {dataset.path}; "
            "give another --output, or replace it with --overwrite"
        )
    rows = dataset.survey.rows
    outcome = Outcome(
        rows=rows,
        answered=rows - failed,
        failed=failed,
        tokens=0,
        seconds=0.0,
        output=str(output),
        already=True,
    )
    report.finish(outcome)
    return outcome
