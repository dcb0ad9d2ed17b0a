"""`check`: everything that a run left behind, held against what was promised."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import redis

from journal import read_journal
from mix import Job, epoch_of, job, letters
from tokenmill.producer.keys import Keys
from tokenmill.producer.wire import chain_digest, unpack_token_ids

#: Of each kind of fault, as many are described.
SHOWN = 5
#: Keys that may be left: ended requests until their time is over, and what is trimmed.
KEPT = ("r", "o", "ctl", "settings", "shards")


@dataclass
class Report:
    """What is wrong is at zero in a correct run; `terminals` is then one for each request."""

    requests: int = 0
    #: Of these, through a reply stream; through the plain inbox.
    bulk: int = 0
    plain: int = 0
    tokens: int = 0
    #: How many requests have so many terminal entries.
    terminals: dict[int, int] = field(default_factory=dict)
    finished: dict[str, int] = field(default_factory=dict)
    # -- wrong
    #: Accepted and without an end, or with tokens missing.
    lost: int = 0
    #: Tokens or terminals that came again.
    duplicated: int = 0
    #: Entries out of order: of positions, or of epochs.
    reordered: int = 0
    #: Tokens, text or digests that nobody should have written.
    foreign: int = 0
    #: Written under an epoch after a later one had been claimed, or an epoch claimed twice.
    stale: int = 0
    #: Ended in a way that nothing asked for.
    wrong_ends: int = 0
    #: A worker was told that its end of a request was written, and it was not.
    false_ends: int = 0
    #: A reader saw something else than the output holds now.
    forked: int = 0
    #: Snapshots in which the indexes contradicted each other.
    contradictions: int = 0
    #: Writes that the server refused as impossible.
    refused: int = 0
    #: Processes that ended by themselves.
    crashed: int = 0
    #: Keys left of a queue that has nothing to do.
    left_over: int = 0
    # -- what happened
    resumes: int = 0
    fenced: int = 0
    gaps: int = 0
    failed_steps: int = 0
    #: Of a lossy server: requests sent again; readers who were told that an output is gone or
    #: another; and who had read the end of an output that then came out otherwise.
    resubmitted: int = 0
    told: int = 0
    outlived: int = 0
    #: The first few of what is wrong, in words.
    examples: list[str] = field(default_factory=list)

    @property
    def is_right(self) -> bool:
        return not any(getattr(self, name) for name in WRONG) and set(self.terminals) <= {1}

    def note(self, kind: str, text: str) -> None:
        """Count something wrong."""
        count = getattr(self, kind)
        setattr(self, kind, count + 1)
        if count < SHOWN:
            self.examples.append(f"{kind}: {text}")

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


WRONG = (
    "lost",
    "duplicated",
    "reordered",
    "foreign",
    "stale",
    "wrong_ends",
    "false_ends",
    "forked",
    "contradictions",
    "refused",
    "crashed",
    "left_over",
)


@dataclass(frozen=True, slots=True)
class Piece:
    """A delta, as the server keeps it or as a reader got it."""

    start: int
    tokens: tuple[int, ...]
    text: str
    digest: str
    finish: str


def check(
    report: Report,
    servers: Mapping[int, redis.Redis],
    queue: str,
    seed: str,
    home: Path,
    *,
    is_lossy: bool = False,
) -> Report:
    """Read outputs, journals and logs of a run that has come to rest.

    `servers` are connections, by shard. `is_lossy`: they have lost their last moments now and then.
    Then epochs are given again, and ends that somebody was told of are gone; what holds is that
    each request has one end in the servers' state, and that no reader got a token twice, or a
    changed one, without being told.
    """
    journals = [line for path in home.glob("producer-*") for line in read_journal(path)]
    sent = sorted({line["sent"] for line in journals if "sent" in line})
    refused_cancels = {line["cancel"] for line in journals if line.get("ok") is False}
    logs = _read_logs(home, report)
    seen = _read_by_readers(home, report, is_lossy=is_lossy)
    report.resubmitted = len({line["again"] for line in journals if "again" in line})
    has_readers = any(home.glob("reader-*"))
    terminals: Counter[int] = Counter()
    finished: Counter[str] = Counter()
    bulk = plain = 0
    for number in sent:
        item = job(seed, number)
        server = servers[int(item.request_id.partition(".")[0])]
        if item.reply_to:
            kept = seen.get(number, [])
            pieces, epochs = _reply(server, queue, item, kept, is_lossy=is_lossy)
        else:
            pieces, epochs = _output(server, queue, item)
        terminals[sum(bool(piece.finish) for piece in pieces)] += 1
        tokens = _check_order(report, f"output of {number}", pieces)
        _check_content(report, item, pieces, tokens, epochs)
        _check_end(report, item, pieces, len(tokens), number in refused_cancels)
        if pieces:
            finished[pieces[-1].finish] += 1
        if not is_lossy:
            _check_fences(report, item, tokens, epochs, logs.claims.get(item.request_id, []))
            if pieces:
                told = logs.ends.get(item.request_id, [])
                _check_claimed_end(report, number, pieces[-1], epochs[-1], told)
        if has_readers and not item.reply_to:
            got = seen.get(number, [])
            read = _check_order(report, f"reader of {number}", got)
            if is_lossy and _joined(got) != _joined(pieces):
                # It had read the end before the server lost that: then it holds a whole output.
                report.outlived += 1
                _check_content(report, item, got, read, [])
                _check_end(report, item, got, len(read), False)
            else:
                _compare(report, number, pieces, got)
        report.tokens += len(tokens)
        report.resumes += len({epoch_of(token) for token in tokens}) - bool(tokens)
        bulk += bool(item.reply_to)
        plain += item.is_plain
    report.requests, report.bulk, report.plain = len(sent), bulk, plain
    report.terminals, report.finished = dict(terminals), dict(finished)
    for shard, server in servers.items():
        _check_left_over(report, server, f"{{{queue}:{shard}}}:")
    return report


def _output(server: redis.Redis, queue: str, item: Job) -> tuple[list[Piece], list[int]]:
    """The entries of an output, and the epoch written beside each."""
    keys = Keys.of(queue, item.request_id)
    entries: Any = server.xrange(keys.output(item.request_id))
    pieces, epochs = [], []
    for name, fields in entries:
        tokens = unpack_token_ids(fields[b"t"])
        end = int(name.partition(b"-")[0])
        pieces.append(
            Piece(
                end - len(tokens),
                tokens,
                fields[b"x"].decode(),
                fields[b"h"].decode(),
                fields.get(b"f", b"").decode(),
            )
        )
        epochs.append(int(fields[b"e"]))
    return pieces, epochs


def _reply(
    server: redis.Redis, queue: str, item: Job, kept: list[Piece], *, is_lossy: bool
) -> tuple[list[Piece], list[int]]:
    """What a collector kept, with what the record says of it."""
    record_key = Keys.of(queue, item.request_id).record(item.request_id)
    record: Any = server.hmget(record_key, "epoch", "digest", "finish")
    epoch, digest, finish = (value.decode() if value else "" for value in record)
    if is_lossy and finish:  # it was kept once, perhaps before the server lost that
        return [replace(p, digest=chain_digest("", p.tokens)) for p in kept], [0] * len(kept)
    stored = [replace(piece, digest=digest) for piece in kept if piece.finish == finish]
    return stored, [int(epoch)] * len(stored)


def _check_order(report: Report, where: str, pieces: list[Piece]) -> list[int]:
    """The tokens, each position once."""
    tokens: list[int] = []
    is_ended = False
    for piece in pieces:
        if is_ended:
            report.note("duplicated", f"{where}: goes on after its end")
        if piece.start < len(tokens):
            report.note("duplicated", f"{where}: token {piece.start} after {len(tokens)}")
        elif piece.start > len(tokens):
            report.note("lost", f"{where}: token {piece.start} after {len(tokens)}")
        tokens[piece.start :] = piece.tokens
        is_ended = is_ended or bool(piece.finish)
    epochs = [epoch_of(token) for token in tokens]
    if epochs != sorted(epochs):
        report.note("reordered", f"{where}: epochs {epochs}")
    return tokens


def _check_content(
    report: Report, item: Job, pieces: list[Piece], tokens: list[int], epochs: list[int]
) -> None:
    if epochs != sorted(epochs):
        report.note("reordered", f"output of {item.number}: entries of epochs {epochs}")
    if tokens != item.tokens([epoch_of(token) for token in tokens]):
        report.note("foreign", f"output of {item.number}: a token that no right run generates")
    for piece, epoch in zip_longest(pieces, epochs):
        if (
            epoch is not None
            and not item.reply_to
            and any(epoch_of(token) != epoch for token in piece.tokens)
        ):
            report.note("foreign", f"output of {item.number}: token and entry differ in epoch")
        if letters(piece.tokens) != piece.text:
            report.note("foreign", f"output of {item.number}: text of other tokens")
        if piece.digest != chain_digest("", tokens[: piece.start + len(piece.tokens)]):
            report.note("foreign", f"output of {item.number}: digest of other tokens")


def _check_end(
    report: Report, item: Job, pieces: list[Piece], total: int, was_cancel_refused: bool
) -> None:
    if not pieces or not pieces[-1].finish:
        report.note("lost", f"{item.number} has no end")
        return
    finish = pieces[-1].finish
    allowed = {"length"}
    if item.may_expire:
        allowed.add("expired")
    if item.cancel_after_s is not None and not was_cancel_refused:
        allowed.add("cancelled")
    if finish not in allowed:
        report.note("wrong_ends", f"{item.number} ended as {finish}, not {allowed}")
    if finish == "length" and total != item.max_tokens:
        report.note("lost", f"{item.number} has {total} of {item.max_tokens} tokens")


@dataclass
class Logs:
    """What the workers said, by request id."""

    #: Epoch and reason of each end that a worker was told was written.
    ends: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    #: Epoch of each claim, and how many tokens were committed then.
    claims: dict[str, list[tuple[int, int]]] = field(default_factory=dict)


def _read_logs(home: Path, report: Report) -> Logs:
    logs = Logs()
    for line in (line for path in home.glob("worker-*") for line in read_journal(path)):
        event = line.get("event")
        report.fenced += event == "request_fenced"
        report.gaps += event == "request_gap"
        report.failed_steps += event == "step_failed"
        if event == "request_refused":
            report.note("refused", line["reason"])
        if event == "thread_failed":
            report.note("crashed", line["error"])
        if event == "request_finished":
            end = (line["epoch"], line["finish_reason"])
            logs.ends.setdefault(line["request_id"], []).append(end)
        if event == "request_claimed":
            claim = (line["epoch"], line["committed"])
            logs.claims.setdefault(line["request_id"], []).append(claim)
    return logs


def _check_fences(
    report: Report, item: Job, tokens: list[int], epochs: list[int], claims: list[tuple[int, int]]
) -> None:
    """From a claim on, nothing is written under an earlier epoch; and no epoch is given twice."""
    if len({epoch for epoch, _ in claims}) < len(claims):
        report.note("stale", f"{item.number}: claimed as {claims}")
    for epoch, committed in claims:
        before = [epoch_of(token) for token in tokens[:committed]]
        after = [*(epoch_of(token) for token in tokens[committed:]), *epochs[-1:]]
        if any(e >= epoch for e in before) or any(e < epoch for e in after):
            report.note(
                "stale", f"{item.number}: claimed at {committed} as {epoch}; {before} {after}"
            )


def _check_claimed_end(
    report: Report, number: int, last: Piece, epoch: int, told: list[tuple[int, str]]
) -> None:
    for claimed in told:
        if claimed != (epoch, last.finish):
            what = f"{claimed[1]} under epoch {claimed[0]}"
            report.note("false_ends", f"{number}: {what}, it is {last.finish} under {epoch}")


def _read_by_readers(home: Path, report: Report, *, is_lossy: bool) -> dict[int, list[Piece]]:
    seen: dict[int, list[Piece]] = {}
    for path in [*home.glob("reader-*"), *home.glob("collector-*")]:
        for line in read_journal(path):
            if is_lossy and ("changed" in line or "gone" in line):  # told: it reads anew
                report.told += "changed" in line
                seen.pop(line.get("changed", line.get("gone", -1)), None)
                continue
            if "again" in line:
                if is_lossy:  # it was deleted, and the server has lost that
                    continue
                report.note("duplicated", f"reply of {line['again']} came twice")
                continue
            if "changed" in line:
                report.note("forked", f"reader of {line['changed']}: the output changed")
                continue
            piece = Piece(
                line.get("start", 0),
                tuple(line["tokens"]),
                line["text"],
                line.get("digest", ""),
                line["finish"],
            )
            seen.setdefault(line["n"], []).append(piece)
    return seen


def _compare(report: Report, number: int, output: list[Piece], seen: list[Piece]) -> None:
    """A reader got exactly what the output holds."""
    if sum(bool(piece.finish) for piece in seen) != 1:
        report.note("lost", f"reader of {number}: {len(seen)} deltas without one end")
    if _joined(seen) != _joined(output):
        report.note("forked", f"reader of {number}: not what the output holds")


def _joined(pieces: list[Piece]) -> tuple[tuple[int, ...], str, str]:
    tokens = tuple(token for piece in pieces for token in piece.tokens)
    finish = pieces[-1].finish if pieces else ""
    return tokens, "".join(piece.text for piece in pieces), finish


def _check_left_over(report: Report, server: redis.Redis, prefix: str) -> None:
    for key in server.scan_iter(match=f"{prefix}*", count=1000):
        name = key.decode().removeprefix(prefix)
        if name.startswith(("inbox", "reply:")) and not server.xlen(key):
            continue
        if name.partition(":")[0] not in KEPT:
            report.note("left_over", key.decode())
