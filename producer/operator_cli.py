"""`tokenmill queue` and `tokenmill dead`: what an operator does at night."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import islice

import click

from tokenmill.producer.client import REDIS_URL
from tokenmill.producer.commands import FAILED
from tokenmill.producer.embedded import ensure_server
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.operator import FULL, OVER_QUOTA, DeadLetter, QueueStatus
from tokenmill.producer.options import json_option, option, server_options
from tokenmill.producer.sharded_operator import OperatorLike, operator_of
from tokenmill.producer.shards import Shards


@click.group("queue")
def queue_group() -> None:
    """Look at a queue, pause it, purge it, set its limits."""


@queue_group.command("status")
@server_options
@json_option
def status_command(*, url: str | None, queue: str, as_json: bool) -> None:
    """Show what the queue holds."""
    with _operator(url, queue) as operator:
        status = operator.status()
    click.echo(json.dumps(asdict(status)) if as_json else _shown(status))


@queue_group.command("pause")
@server_options
def pause_command(*, url: str | None, queue: str) -> None:
    """Give workers nothing more; what runs goes on, and requests are still taken in."""
    with _operator(url, queue) as operator:
        operator.pause()
    click.echo(f"queue {queue} is paused; go on with: tokenmill queue resume --queue {queue}")


@queue_group.command("resume")
@server_options
def resume_command(*, url: str | None, queue: str) -> None:
    """Undo pause."""
    with _operator(url, queue) as operator:
        operator.resume()
    click.echo(f"queue {queue} goes on")


@queue_group.command("purge")
@option("--tenant", default="", help="Only this tenant's.")
@option("--priority", type=click.IntRange(0, 2), help="Only of this priority.")
@option("--yes", is_flag=True, help="Do not ask.")
@server_options
@json_option
def purge_command(
    *, tenant: str, priority: int | None, yes: bool, url: str | None, queue: str, as_json: bool
) -> None:
    """Cancel every request that waits or is parked now. What runs is left alone."""
    with _operator(url, queue) as operator:
        if not yes:
            status = operator.status()
            which = f" of tenant {tenant}" if tenant else ""
            which += f" of priority {priority}" if priority is not None else ""
            number = status.waiting + status.parked
            text = f"{number:,} requests wait on queue {queue}; cancel those{which or ', all'}?"
            click.confirm(text, abort=True, err=True)
        purged = operator.purge(tenant=tenant, priority=priority)
    if as_json:
        click.echo(json.dumps(asdict(purged)))
        return
    click.echo(f"{purged.cancelled:,} cancelled")
    if purged.foreign:
        text = f"{purged.foreign:,} entries or keys in the lanes are none of ours"
        click.echo(f"{text}: entries were dropped, keys of another type left", err=True)


@queue_group.command("set")
@option("--max-live", type=int, help="Most requests that have not ended; more are refused.")
@option("--result-ttl", type=float, metavar="SECONDS", help="How long results are kept.")
@option("--dead-ttl", type=float, metavar="SECONDS", help="How long dead letters are kept.")
@option("--weight", multiple=True, metavar="TENANT=N", help="The tenant's share of the tokens.")
@option("--quota", multiple=True, metavar="TENANT=N", help="Its most live requests; 0: no limit.")
@server_options
def set_command(
    *,
    max_live: int | None,
    result_ttl: float | None,
    dead_ttl: float | None,
    weight: tuple[str, ...],
    quota: tuple[str, ...],
    url: str | None,
    queue: str,
) -> None:
    """Set limits; what is not named stays as it is."""
    weights = {name: float(value) for name, value in _pairs("--weight", weight)}
    quotas = {name: int(value) for name, value in _pairs("--quota", quota)}
    with _operator(url, queue) as operator:
        operator.configure(
            max_live=max_live,
            result_ttl_s=result_ttl,
            dead_ttl_s=dead_ttl,
            weights=weights,
            quotas=quotas,
        )
        settings = operator.status().settings
    for name, value in sorted(settings.items()):
        click.echo(f"{name} = {value}")


@click.group("dead")
def dead_group() -> None:
    """Dead letters: requests that ended as an error."""


@dead_group.command("list")
@option("--limit", type=click.IntRange(1), default=20, help="Most to show, the latest first.")
@server_options
@json_option
def list_command(*, limit: int, url: str | None, queue: str, as_json: bool) -> None:
    """Show the latest dead letters with their reasons."""
    with _operator(url, queue) as operator:
        total = operator.status().dead
        letters = list(islice(operator.dead(), limit))
    for letter in letters:
        click.echo(json.dumps(asdict(letter)) if as_json else _line(letter))
    if total > len(letters) and not as_json:
        click.echo(f"... and {total - len(letters):,} more: --limit {total}", err=True)


@dead_group.command("retry")
@click.argument("request_ids", metavar="[ID]...", nargs=-1)
@option("--all", "is_all", is_flag=True, help="Every dead letter.")
@server_options
@json_option
def retry_command(
    *, request_ids: tuple[str, ...], is_all: bool, url: str | None, queue: str, as_json: bool
) -> None:
    """Run dead letters again, from their first token. Exit code 1 when one could not be.

    What a full queue or quota has no room for stays a dead letter.
    """
    with _operator(url, queue) as operator:
        verdicts = operator.retry(_chosen(operator, request_ids, is_all=is_all))
    failed = {name: why for name, why in verdicts.items() if why != "OK"}
    left = Counter(why for why in failed.values() if why in (FULL, OVER_QUOTA))
    if as_json:
        for name, why in verdicts.items():
            click.echo(json.dumps({"id": name, "verdict": why}))
    else:
        for name, why in failed.items():
            if why not in left:
                click.echo(f"{name}: {why}")
        click.echo(f"{len(verdicts) - len(failed):,} run again")
        for why, count in left.items():
            remedy = "raise it with `tokenmill queue set`, or retry when there is room"
            click.echo(f"{count:,} stay dead letters: {why}; {remedy}")
    if failed:
        raise click.exceptions.Exit(FAILED)


@dead_group.command("drop")
@click.argument("request_ids", metavar="[ID]...", nargs=-1)
@option("--all", "is_all", is_flag=True, help="Every dead letter.")
@server_options
@json_option
def drop_command(
    *, request_ids: tuple[str, ...], is_all: bool, url: str | None, queue: str, as_json: bool
) -> None:
    """Forget dead letters."""
    with _operator(url, queue) as operator:
        dropped = operator.drop(_chosen(operator, request_ids, is_all=is_all))
    click.echo(json.dumps({"dropped": dropped}) if as_json else f"{dropped:,} dropped")


def _chosen(operator: OperatorLike, request_ids: tuple[str, ...], *, is_all: bool) -> Iterable[str]:
    if is_all == bool(request_ids):
        raise InvalidRequest("ID", "one or more ids, or --all", list(request_ids))
    return [letter.request_id for letter in operator.dead()] if is_all else request_ids


def _pairs(name: str, values: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    for value in values:
        tenant, _, number = value.partition("=")
        try:
            float(number) if name == "--weight" else int(number)
        except ValueError as error:
            raise InvalidRequest(name, "TENANT=N with a number", value) from error
        yield tenant, number


def _shown(status: QueueStatus) -> str:
    paused = f"; paused, go on with: tokenmill queue resume --queue {status.queue}"
    lines = [
        f"queue {status.queue}: {status.live:,} live{paused if status.paused else ''}",
        f"  waiting  {status.waiting:>9,}" + _age(status.oldest_s),
        f"  running  {status.running:>9,}  on {status.workers:,} workers",
        f"  parked   {status.parked:>9,}",
        f"  inbox    {status.inbox:>9,}",
        f"  dead     {status.dead:>9,}" + ("  see: tokenmill dead list" if status.dead else ""),
    ]
    if status.tenants:
        lines.append("live by tenant")
        ranked = sorted(status.tenants.items(), key=lambda item: (-item[1], item[0]))
        lines += [f"  {count:>9,}  {name}" for name, count in ranked[:20]]
    if status.settings:
        lines.append("settings")
        lines += [f"  {name} = {value}" for name, value in sorted(status.settings.items())]
    return "\n".join(lines)


def _age(seconds: float) -> str:
    return f"  the oldest for {seconds:,.1f} s" if seconds else ""


def _line(letter: DeadLetter) -> str:
    at = datetime.fromtimestamp(letter.died_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    attempts = f"{letter.attempts} attempt{'s' if letter.attempts != 1 else ''}"
    return f"{letter.request_id}  {at}Z  {letter.tenant}  {attempts}  {letter.reason}"


@contextmanager
def _operator(url: str | None, queue: str) -> Iterator[OperatorLike]:
    with Shards(url or os.environ.get(REDIS_URL) or ensure_server(), queue) as shards:
        yield operator_of(shards)
