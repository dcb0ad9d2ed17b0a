"""`tokenmill batch`: dataset runs in the background. RQ is imported when a command runs."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import redis

from tokenmill.producer.address import Address, Kind
from tokenmill.producer.client import REDIS_URL
from tokenmill.producer.commands import FAILED, check_model
from tokenmill.producer.connection import connect
from tokenmill.producer.embedded import ensure_server
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.options import (
    given_sampling,
    json_option,
    option,
    plan_options,
    sampling_options,
    server_options,
)
from tokenmill.producer.plan import Plan

if TYPE_CHECKING:
    from tokenmill.producer.batches import BatchStatus


@click.group()
def batch() -> None:
    """Run `generate` in the background, by RQ workers."""


@batch.command("submit")
@plan_options
@sampling_options
@server_options
@json_option
def submit_command(
    *, url: str | None, as_json: bool, plan: dict[str, Any], **sampling: Any
) -> None:
    """Enqueue the answering of INPUT into the file given with -o, and print the batch's id."""
    from tokenmill.producer.batches import submit

    paths = {name: str(Path(plan[name]).absolute()) for name in ("input", "output")}
    made = Plan(**plan | paths, sampling=given_sampling(**sampling))
    with _server(url) as server:
        batch_id = submit(server, made)
    click.echo(json.dumps({"id": batch_id}) if as_json else batch_id)


@batch.command("worker")
@option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=Path(),
    help="Read and write files below this directory only (default: the current one).",
)
@option("--burst", is_flag=True, help="End when no batch is queued.")
@server_options
def worker_command(*, root: Path, burst: bool, url: str | None, queue: str) -> None:
    """Run the batches that were submitted, one at a time."""
    from tokenmill.producer.batches import work

    del queue  # a batch names the queue of its requests itself
    with _server(url) as server:
        work(server, url=url, root=root, check_model=check_model, burst=burst)


@batch.command("status")
@click.argument("batch_id", metavar="ID")
@server_options
@json_option
def status_command(*, batch_id: str, url: str | None, queue: str, as_json: bool) -> None:
    """Show how far the batch ID is. Exit code 1 when it has failed."""
    from tokenmill.producer.batches import status

    del queue
    with _server(url) as server:
        found = status(server, batch_id)
    _show(found, as_json=as_json)
    if found.state == "failed":
        raise click.exceptions.Exit(FAILED)


@batch.command("list")
@server_options
@json_option
def list_command(*, url: str | None, queue: str, as_json: bool) -> None:
    """List the batches that are queued, running, or ended in the last days."""
    from tokenmill.producer.batches import list_batches

    del queue
    with _server(url) as server:
        for found in list_batches(server):
            _show(found, as_json=as_json)


def _show(found: "BatchStatus", *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    rows = f"{found.done}/{found.rows or '?'} rows"
    failed = f", {found.failed} failed" if found.failed else ""
    click.echo(f"{found.batch_id}  {found.state}  {rows}{failed}  {found.input} -> {found.output}")
    if found.error:
        click.echo(f"    {found.error}")


@contextmanager
def _server(url: str | None) -> Iterator[redis.Redis]:
    url = url or os.environ.get(REDIS_URL) or ensure_server()
    address = Address.parse(url)
    if address.kind is Kind.CLUSTER:
        remedy = "RQ cannot keep them on a cluster; run: tokenmill generate"
        raise InvalidRequest("redis url", "one server or Sentinels", address.shown, remedy)
    server = connect(url)
    try:
        yield server
    finally:
        server.close()
