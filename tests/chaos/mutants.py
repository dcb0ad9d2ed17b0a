"""Faults planted into the scripts, in the process that calls `plant` and nowhere else."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tokenmill.producer.scripts import Script
from tokenmill.worker import queue


@dataclass(frozen=True, slots=True)
class Edit:
    """In a script of the worker, `old` occurs once and becomes `new`."""

    script: str
    old: str
    new: str


def _script(name: str) -> Script:
    found: Script = getattr(queue, f"_{name.upper()}")
    return found


SCRIPTS = ("claim", "append", "finish", "release", "reap")
_RISE_IN_PARK = Edit("reap", "  r.epoch = r.epoch + 1\n  if r.cancel", "  if r.cancel")
_RISE_IN_CLAIM = Edit("claim", "r.attempts = r.epoch + 1,", "r.attempts = r.epoch,")
_RISE_IN_EXPIRY = "  r.epoch = r.epoch + 1\n  finish_record(T, r, now, { finish = 'exp"
_IS_THERE = Edit("append", "if offset >= start + count then", "if false then")
_IS_NEXT = Edit("append", "if offset ~= start then", "if false then")
_OWN = "  later('SADD', own, r.id)\n"
_DELIVERED = "  r.state = 'park' --"

MUTANTS: dict[str, tuple[Edit, ...]] = {
    # Without the epoch check.
    "append_by_anybody": (
        Edit("append", " or tonumber(r[2]) ~= epoch or r[6] ~= worker then", " then"),
    ),
    "finish_by_anybody": (
        Edit("finish", "not r or r.epoch ~= epoch or r.worker ~= worker", "not r"),
    ),
    # Without the offset check.
    "append_anywhere": (_IS_THERE, _IS_NEXT),
    "append_beyond": (_IS_NEXT,),
    "finish_anywhere": (Edit("finish", "if r.offset ~= start then", "if false then"),),
    # Acknowledged, or forgotten, before the end.
    "ack_at_claim": (
        Edit("claim", _DELIVERED, f"  drop_entry(head.lane, head.entry)\n{_DELIVERED}"),
    ),
    "disown_at_claim": (Edit("claim", _OWN, ""),),
    "drop_at_claim": (Edit("claim", _OWN, f"{_OWN}  redis.call('ZREM', T .. ':live', r.id)\n"),),
    "end_unwritten": (
        Edit("finish", "try('XADD', output,", "(function() return true end)(output,"),
    ),
    # A reap that hands over under the same epoch, takes from the living, or ends under the epoch
    # of the worker.
    "reap_keeps_epoch": (_RISE_IN_PARK,),
    "nobody_raises_epoch": (_RISE_IN_PARK, _RISE_IN_CLAIM),
    "reap_the_living": (
        Edit("reap", "':workers', '-inf', int(now)", "':workers', '-inf', '+inf'"),
    ),
    "expire_keeps_epoch": (Edit("reap", _RISE_IN_EXPIRY, _RISE_IN_EXPIRY.partition("\n")[2]),),
}


def plant(mutant: str) -> None:
    """Break the scripts as a mutant says; "" leaves them whole.

    Raises:
        ValueError: the scripts are not what the mutant was written for.
    """
    for edit in MUTANTS[mutant] if mutant else ():
        script = _script(edit.script)
        if script.source.count(edit.old) != 1:
            raise ValueError(f"{mutant}: {edit.script}.lua must contain {edit.old!r} once")
        script.source = script.source.replace(edit.old, edit.new)
        script._sha = ""


@contextmanager
def planted(mutant: str) -> Iterator[None]:
    """In this process, for a while."""
    whole = {name: _script(name).source for name in SCRIPTS}
    plant(mutant)
    try:
        yield
    finally:
        for name, source in whole.items():
            _script(name).source, _script(name)._sha = source, ""
