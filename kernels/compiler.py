"""`compiled`: a function compiled by numba for this processor, kept on disk for the next process.

Imported only where a compiled kernel is used; `is_available` asks first, at no cost.

Numba unpickles what it has kept and runs its machine code, so it is kept where nobody else can
write: in `cache_directory`. The directory's name has a digest of all kernels, since numba itself
looks at one file alone and would keep what was made of an older `vectors.py`.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger(__name__)
#: While numba's settings, which are those of the whole process, are ours.
_LOCK = threading.Lock()
#: Seconds that the process beside has at the most; it needs some 10.
_MOST_BESIDE_S = 180


@functools.cache
def is_available() -> bool:
    """Whether numba is there, and the processor multiplies and adds in one instruction."""
    if importlib.util.find_spec("numba") is None:
        return False
    from llvmlite.binding import get_process_triple

    return not get_process_triple().startswith("x86") or _has("fma")


@functools.cache
def has_wide_vectors() -> bool:
    """Whether there are registers for sixteen vectors of sixteen floats, as AVX-512 has."""
    return is_available() and _has("avx512f")


@functools.cache
def has_byte_products() -> bool:
    """Whether sixteen times four products of 8-bit integers are added in one instruction (VNNI)."""
    return has_wide_vectors() and _has("avx512vnni")


def _has(feature: str) -> bool:
    from llvmlite.binding import get_host_cpu_features

    return bool(get_host_cpu_features().get(feature, False))


@functools.cache
def _prepare() -> None:
    """Have numba make its context before anything is compiled.

    Two threads that begin to use numba wait for each other for ever, if one makes a dispatcher,
    which takes the lock of the context and then that of the compiler, and the other compiles, which
    takes them the other way round. A context that is there is read without a lock.
    """
    from numba.core.registry import cpu_target

    _ = cpu_target.target_context


def compiled(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a function that `parallel.run` calls; compiling takes seconds the first time."""
    from numba import cfunc

    _prepare()

    def kept(function: Callable[..., Any]) -> Any:
        with _keeping():
            return cfunc(signature, cache=True)(function)

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            try:
                return kept(function)
            except OSError:  # there is no place: nothing to repair
                raise
            except Exception as error:  # noqa: BLE001 (unpickling what is damaged raises anything)
                LOGGER.warning(
                    "a kept kernel is damaged and is compiled anew: %s, %s: %s",
                    function.__name__,
                    type(error).__name__,
                    error,
                )
                _remove(function)
                return kept(function)
        except Exception as error:  # noqa: BLE001 (a kernel that cannot be kept can still run)
            _tell(f"{type(error).__name__}: {error}")
        return cfunc(signature)(function)

    return decorate


def compile_beside(modules: Sequence[str]) -> "subprocess.Popen[bytes] | None":
    """Start a process that compiles `modules`, for all to come; None where they are kept already.

    Numba compiles one function at a time in a process, so the first start has a second one.
    """
    if not Path(sys.executable).name.startswith("python"):  # Python within another program
        return None
    try:
        kept = {path.name.partition(".")[0] for path in cache_directory().rglob("*.nbi")}
        if kept.issuperset(module.rpartition(".")[2] for module in modules):
            return None
        command = [sys.executable, "-P", "-c", f"import {', '.join(modules)}"]
        nothing = subprocess.DEVNULL
        return subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing)
    except OSError:  # they are compiled here, one after the other
        return None


def wait_for(process: "subprocess.Popen[bytes]") -> None:
    """Wait for `compile_beside`; what it has not compiled is compiled in this process."""
    try:
        process.wait(_MOST_BESIDE_S)
        ended = f"exit status {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        ended = f"no end after {_MOST_BESIDE_S} s"
    if process.returncode:
        LOGGER.warning(
            "kernels were to be compiled by a process beside this one, which had %s: "
            "this one compiles them",
            ended,
        )


def inner(function: Callable[..., Any]) -> Any:
    """Decorate a function that compiled ones call: Python cannot, which saves compiling time."""
    from numba import njit

    _prepare()
    return njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def _remove(function: Callable[..., Any]) -> None:
    """What is kept of a function; numba names its files by the function and its first line."""
    name = f"{function.__name__}-{function.__code__.co_firstlineno}"
    for path in cache_directory().rglob(f"*{name}.*.nb[ci]"):
        path.unlink(missing_ok=True)


def cache_directory() -> Path:
    """Where compiled kernels are kept: below $NUMBA_CACHE_DIR, or in the user's cache directory.

    Raises:
        OSError: the user has no home, or another user could write there.
    """
    from numba import config

    name = f"kernels-{_digest(Path(__file__).parent)}"
    if config.CACHE_DIR:  # chosen by the user, who may share it
        return Path(config.CACHE_DIR) / name
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError as error:
        raise OSError(str(error)) from error
    directory = home / "tokenmill" / name
    directory.parent.mkdir(parents=True, exist_ok=True)
    directory.mkdir(mode=stat.S_IRWXU, exist_ok=True)
    _check(directory.parent, stat.S_IWOTH)
    _check(directory, stat.S_IRWXG | stat.S_IRWXO)
    return directory


def _check(directory: Path, forbidden: int) -> None:
    """That a directory is this user's, with none of the forbidden bits in its mode."""
    status = directory.stat()
    if status.st_uid != os.getuid() or status.st_mode & forbidden:
        raise OSError(
            f"{directory} must belong to user {os.getuid()} and have none of mode {forbidden:o}, "
            f"got user {status.st_uid} and mode {stat.S_IMODE(status.st_mode):o}"
        )


@functools.cache
def _digest(sources: Path) -> str:
    """Of the names and contents of all kernels."""
    told = [(path.name, path.read_bytes()) for path in sorted(sources.glob("*.py"))]
    return hashlib.blake2b(repr(told).encode(), digest_size=8).hexdigest()


@contextmanager
def _keeping() -> Iterator[None]:
    """Have numba keep what it compiles in `cache_directory` and nowhere else."""
    from numba import config

    with _LOCK:  # inside it no other thread takes our setting for the user's
        ours = {
            "CACHE_DIR": str(cache_directory()),
            "CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
        }
        before = {name: getattr(config, name, "") for name in ours}
        try:
            for name, value in ours.items():
                setattr(config, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(config, name, value)


@functools.cache
def _tell(reason: str) -> None:
    """Say once what has gone wrong, and what follows."""
    LOGGER.warning("kernels cannot be kept, so every start compiles them, for seconds: %s", reason)
