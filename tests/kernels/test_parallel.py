"""Which libgomp compiled kernels run on: torch's, whatever else is loaded."""

from pathlib import Path

import pytest
import torch

from tokenmill.kernels.parallel import _loaded_libgomps, _torchs_libgomp

PACKAGE = Path(torch.__file__).resolve().parent
OTHERS = {"/usr/lib/libgomp.so.1.0.0", f"{PACKAGE.parent}/torchaudio.libs/libgomp-0.so"}


@pytest.mark.parametrize("own", ["torch/lib/libgomp.so.1", "torch.libs/libgomp-a1.so.1.0.0"])
def test_torchs_own_of_several(own: str, caplog: pytest.LogCaptureFixture) -> None:
    path = str(PACKAGE.parent / own)
    assert _torchs_libgomp({*OTHERS, path}) == path
    assert caplog.messages == []


def test_the_only_one() -> None:
    assert _torchs_libgomp({"/usr/lib/libgomp.so.1.0.0"}) == "/usr/lib/libgomp.so.1.0.0"


@pytest.mark.parametrize("paths", [set(), OTHERS])
def test_where_it_is_not_known_the_log_says_so(
    paths: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert _torchs_libgomp(paths) is None
    (said,) = caplog.messages
    assert "compiled kernels run on one thread" in said
    assert all(path in said for path in paths)


def test_it_is_found_here() -> None:
    paths = _loaded_libgomps()
    assert _torchs_libgomp(paths) in paths
