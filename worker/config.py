"""`WorkerConfig`: what a user may set of a worker, checked on construction."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from tokenmill.engine.config import EngineConfig
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.wire import check_name

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}i": 1024**power for power, unit in enumerate("KMGT", start=1)}
_LORA = re.compile(r"([^=]+)=(.+)", re.DOTALL)
_BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGT]i?)?B?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """One worker: which model, which queue, and how it behaves.

    Raises:
        InvalidRequest: a value is out of bounds; the error names it.
    """

    #: A known name, a directory, a GGUF file or a hub id.
    model: str
    redis_url: str
    queue: str = "default"
    device: str = "auto"
    dtype: str = "auto"
    #: How the weights of linears are held, see `engine.models.quantization`.
    quantization: str = "none"
    #: CPU threads of the model; None leaves torch its default.
    threads: int | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    #: Without a sign of life for so long, others take over what this worker runs.
    lease_ms: int = 15_000
    #: A step longer than this counts as hung: the lease is no longer renewed, `/livez` fails.
    stall_limit_s: float = 60.0
    #: Time to write and release everything after SIGTERM.
    drain_s: float = 10.0
    #: End by itself after so long without work; None runs for ever.
    exit_when_idle_s: float | None = None
    #: Port of `/livez`, `/startedz` and `/readyz`; None serves none, 0 takes a free one.
    health_port: int | None = None

    def __post_init__(self) -> None:
        if not self.model:
            raise InvalidRequest("model", "the name of a model", self.model, "give --model")
        check_name("queue", self.queue)
        if self.threads is not None and not 1 <= self.threads <= 4096:
            raise InvalidRequest("threads", "from 1 to 4096", self.threads)
        if not 100 <= self.lease_ms <= 3_600_000:
            raise InvalidRequest("lease_ms", "from 100 to 3600000", self.lease_ms)
        for name in ("stall_limit_s", "drain_s", "exit_when_idle_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 86_400:
                raise InvalidRequest(name, "above 0 and up to 86400 seconds", value)
        if self.health_port is not None and not 0 <= self.health_port < 2**16:
            raise InvalidRequest("health_port", "a port from 0 to 65535", self.health_port)


def parse_lora(texts: Iterable[str]) -> dict[str, str]:
    """Directories of adapters by name, of texts such as `sql=/models/sql`.

    Raises:
        InvalidRequest: one is of another form, or a name is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        match = _LORA.fullmatch(text)
        if match is None or match[1] in found:
            raise InvalidRequest("lora", "NAME=DIRECTORY, each name once", text)
        found[match[1]] = match[2]
    return found


def parse_bytes(text: str) -> int:
    """A number of bytes as people write it: `2GiB`, `500M`, `1073741824`.

    Raises:
        InvalidRequest: it is none.
    """
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise InvalidRequest("kv_cache_memory", "bytes such as 2GiB, 500MB or 1073741824", text)
    number, unit = match.group(1), (match.group(2) or "")
    return int(float(number) * _UNITS[unit[:1].upper() + unit[1:].lower()])
