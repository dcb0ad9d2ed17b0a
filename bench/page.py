"""docs/benchmarks.md: sections between markers, each written by the bench that measured it."""

import re
from pathlib import Path


def write_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the markers of section `name`; the rest of the page is left alone."""
    page = path.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    changed, count = pattern.subn(lambda _: f"{begin}\n{text}\n{end}", page)
    if count != 1:
        raise SystemExit(f"{path} must have one section {begin} ... {end}, got {count}")
    path.write_text(changed, encoding="utf-8")
