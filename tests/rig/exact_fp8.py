"""Triton's interpreter with the conversion to float8_e4m3fn that processors have.

Its own loses carries, rounds ties up and small numbers down, and makes a number of what is none.
"""

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def convert_as_processors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round to the nearest, ties to even, and saturate at 448."""
    own = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if target != tl.float8e4nv or source != tl.float32:
            return own(values, source, target, rounding)
        floats = torch.from_numpy(np.ascontiguousarray(values)).clamp(-448.0, 448.0)
        return floats.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)
