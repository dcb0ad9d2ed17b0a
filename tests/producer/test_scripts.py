from pathlib import Path

import pytest
import redis

from tokenmill.producer import scripts
from tokenmill.producer.keys import Keys
from tokenmill.producer.scripts import Script

TAG = Keys().tag


def test_runs_again_after_the_server_forgot_it(server: redis.Redis) -> None:
    cancel = Script("tokenmill.producer", "cancel")
    assert cancel(server, TAG, ["x"]) == b"NONE"
    server.script_flush()
    assert cancel(server, TAG, ["x"]) == b"NONE"


def test_includes_are_replaced() -> None:
    source = Script("tokenmill.worker", "claim").source
    assert source.startswith("#!lua")
    assert "@include" not in source
    assert source.count("local function finish_record") == 1


def test_a_script_without_shebang_is_refused() -> None:
    with pytest.raises(ValueError, match="must begin with #!lua"):
        Script("tokenmill.producer", "record")


@pytest.mark.parametrize("package", ["producer", "worker"])
def test_every_script_declares_its_arguments(package: str) -> None:
    folder = Path(scripts.__file__).parents[1] / package / "lua"
    sources = {path.stem: path.read_text() for path in folder.glob("*.lua")}
    whole = {n: source for n, source in sources.items() if source.startswith(scripts.SHEBANG)}
    assert whole
    for name, source in whole.items():
        for heading in ("-- KEYS[1]  T", "-- ARGV  ", "-- Returns  ", "-- Twice  "):
            assert heading in source, f"{name}.lua lacks {heading!r}"
