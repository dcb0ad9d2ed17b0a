"""`kept_result`: what a bench that was cut short measured, for `--resume` to go on with.

Figures of different code, of another machine or of another day are not compared with each other,
so they are not put into one result either.
"""

import datetime as dt
import json
from dataclasses import asdict
from typing import Any

from workloads import RESULTS, Workload, provenance

OLDEST = dt.timedelta(days=1)


def kept_result(name: str, workload: Workload | None = None) -> dict[str, Any]:
    """The content of bench/results/`name`.json; empty where there is none.

    Raises:
        SystemExit: it is of another commit, machine, version or workload, or over a day old.
    """
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text())
    if reason := _objection(content, workload):
        raise SystemExit(
            f"--resume would mix figures: {path} is {reason}; "
            "without --resume the bench writes it anew"
        )
    return content


def _objection(content: dict[str, Any], workload: Workload | None) -> str | None:
    """Why new figures do not belong beside those of `content`."""
    was, now = content["provenance"], provenance()
    if workload and content.get("workload") != asdict(workload):
        return f"of the workload {content.get('workload')}, not {asdict(workload)}"
    for key in ("commit", "cpu", "python", "versions"):
        if was.get(key) != now[key]:
            return f"of {key} {was.get(key)}, not {now[key]}"
    if str(now["commit"]).endswith("-dirty"):
        return f"of {now['commit']}, which may be any code: commit it first"
    then = dt.datetime.fromisoformat(f"{was['date']}T{was.get('time', '00:00')}+00:00")
    if dt.datetime.now(dt.UTC) - then > OLDEST:
        return f"of {then:%Y-%m-%d %H:%M} UTC, over a day ago"
    return None
