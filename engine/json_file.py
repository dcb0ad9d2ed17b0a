"""Reading a model's JSON files."""

import json
from pathlib import Path
from typing import Any

from tokenmill.engine.errors import UnsupportedModel


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is no file.

    Raises:
        UnsupportedModel: not JSON, or not an object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UnsupportedModel(f"{path} is not JSON: {error}; pull it again") from error
    if not isinstance(content, dict):
        raise UnsupportedModel(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
