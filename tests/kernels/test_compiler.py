"""What is compiled is kept where only the user can write; without that place, a start goes on."""

import errno
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from numba import config, types

from tokenmill.kernels import compiler
from tokenmill.kernels.compiler import cache_directory, compiled

SIGNATURE = types.int64(types.int64)


def twice(number: int) -> int:
    return 2 * number


def thrice(number: int) -> int:
    return 3 * number


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's cache directory, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(config, "CACHE_DIR", "")
    return tmp_path


def kept(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.suffix in (".nbi", ".nbc"))


def test_machine_code_is_kept_where_only_the_user_can_write(home: Path) -> None:
    assert compiled(SIGNATURE)(twice).ctypes(21) == 42
    (directory,) = (home / "tokenmill").iterdir()
    assert directory == cache_directory()
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [path.suffix for path in kept(home)] == [".nbc", ".nbi"]
    assert kept(directory) == kept(home)
    assert compiled(SIGNATURE)(twice).cache_hits == 1
    assert config.CACHE_DIR == ""


def test_the_users_own_choice_is_kept(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path / "chosen"))
    compiled(SIGNATURE)(twice)
    assert kept(cache_directory()) == kept(tmp_path)
    assert cache_directory().parent == tmp_path / "chosen"
    assert str(tmp_path / "chosen") == config.CACHE_DIR


def test_a_change_in_any_kernel_has_a_directory_of_its_own(tmp_path: Path) -> None:
    digests = set()
    for number in range(3):
        sources = tmp_path / str(number)
        sources.mkdir()
        (sources / "vectors.py").write_text(f"WIDTH = {number % 2}")
        (sources / "compiled_rows.py").write_text("")
        digests.add(compiler._digest(sources))
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("suffix", "size"), [(".nbi", 0), (".nbc", 0), (".nbi", 50), (".nbc", 100)]
)
def test_what_is_damaged_is_compiled_anew_and_kept(
    home: Path, suffix: str, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    compiled(SIGNATURE)(twice)
    compiled(SIGNATURE)(thrice)
    (damaged,) = (path for path in kept(home) if "twice" in path.name and path.suffix == suffix)
    damaged.write_bytes(damaged.read_bytes()[:size])
    assert compiled(SIGNATURE)(twice).ctypes(21) == 42
    (said,) = caplog.messages
    assert said.startswith("a kept kernel is damaged and is compiled anew: twice, ")
    for function in (twice, thrice):
        assert compiled(SIGNATURE)(function).cache_hits == 1
    assert len(kept(home)) == 4
    assert len(caplog.messages) == 1


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    next(path for path in kept(directory) if path.suffix == ".nbi").unlink()
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)


def let_others_write(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    directory.chmod(0o770)


def let_all_write_above(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    directory.parent.chmod(0o777)


def give_it_to_another(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    owner = directory.stat().st_uid
    monkeypatch.setattr("os.getuid", lambda: owner + 1)


def lose_the_home(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("pathlib.Path.home", homeless)


def put_a_file_there(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    directory.rename(directory.with_name("away"))
    directory.write_text("")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (fill_the_disk, "OSError: .* No space left"),
        (
            let_others_write,
            r"OSError: .*kernels-\w+ must belong to user .* got user .* 770",
        ),
        (let_all_write_above, r"OSError: .*/tokenmill must belong to .* and mode 777"),
        (give_it_to_another, "OSError: .* must belong to user"),
        (lose_the_home, "OSError: Could not determine home"),
        (put_a_file_there, "FileExistsError"),
    ],
)
def test_without_it_kernels_are_compiled_and_the_log_says_so_once(
    home: Path,
    spoil: Callable[[pytest.MonkeyPatch, Path], None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiler._tell.cache_clear()
    compiled(SIGNATURE)(twice)
    spoil(monkeypatch, cache_directory())
    for _ in range(2):
        assert compiled(SIGNATURE)(twice).ctypes(21) == 42
    (said,) = caplog.messages
    assert said.startswith("kernels cannot be kept, so every start compiles them")
    assert re.search(reason, said)


def test_a_process_beside_compiles_for_all_to_come(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    modules = ["tokenmill.kernels.compiled_rows"]
    process = compiler.compile_beside(modules)
    assert process is not None
    assert process.wait(60) == 0
    assert {path.name.partition(".")[0] for path in kept(home)} == {"compiled_rows"}
    assert kept(home) == kept(cache_directory())
    assert compiler.compile_beside(modules) is None
    other = compiler.compile_beside(["tokenmill.kernels.lacking"])
    assert other is not None
    assert other.wait(60) != 0


@pytest.mark.parametrize(
    ("program", "seconds", "told"),
    [
        ("raise SystemExit(3)", 60, "status 3"),
        ("import time; time.sleep(60)", 0.01, "no end after"),
    ],
)
def test_a_process_beside_that_fails_is_told_of(
    program: str,
    seconds: float,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(compiler, "_MOST_BESIDE_S", seconds)
    process = subprocess.Popen([sys.executable, "-c", program])
    compiler.wait_for(process)
    assert process.returncode is not None
    assert told in caplog.text


def test_nothing_is_compiled_beside_within_another_program(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/bin/uwsgi")
    assert compiler.compile_beside(["tokenmill.kernels.compiled_rows"]) is None


def test_nothing_is_compiled_beside_where_it_cannot_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nowhere() -> Path:
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(compiler, "cache_directory", nowhere)
    assert compiler.compile_beside(["tokenmill.kernels.compiled_rows"]) is None


def test_two_threads_that_begin_to_use_numba_do_not_wait_for_each_other() -> None:
    """One makes a dispatcher, which is slow here between its two locks; one compiles meanwhile."""
    program = """
import threading, time
from numba import types
from numba.core.compiler_lock import _CompilerLock
from tokenmill.kernels.compiler import compiled, inner

acquire, begun = _CompilerLock.acquire, threading.Event()

def slowly(lock):
    if threading.current_thread().name == "inner":
        begun.set()
        time.sleep(0.5)
    acquire(lock)

_CompilerLock.acquire = slowly
first = threading.Thread(target=inner, args=(lambda: 1,), name="inner", daemon=True)
first.start()
begun.wait()
compiling = compiled(types.void(types.int64))
second = threading.Thread(target=compiling, args=(lambda n: None,), daemon=True)
second.start()
for thread in (first, second):
    thread.join(20)
print("alive" if first.is_alive() or second.is_alive() else "done")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "done\n"


def test_a_start_loads_every_kernel_of_a_step() -> None:
    """One that is left out would be compiled within a step."""
    program = "import sys; from tokenmill.kernels import cpu_ops; cpu_ops.load_compiled()"
    program += "; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    files = Path(compiler.__file__).parent.glob("*.py")
    kernels = {path.stem for path in files if "\n@compiled(" in path.read_text()}
    lacking = kernels - {name.rpartition(".")[2] for name in done.stdout.decode().split()}
    without = {"compiled_blocks", "compiled_low_rank"}  # of loading GGUF, and of adapters
    if not compiler.has_wide_vectors():
        without |= {"compiled_linear", "compiled_panels", "program"}
    if not compiler.has_byte_products():
        without |= {"compiled_int8"}
    assert lacking == without
