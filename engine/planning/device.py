"""`Device`: an engine on some hardware, as far as planning knows it. Standard library only."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from tokenmill.engine.planning.step_cost import StepCost
from tokenmill.engine.scheduler import Policy
from tokenmill.producer.errors import InvalidRequest

#: Devices that were seen, by name.
KNOWN = Path(__file__).parent / "devices"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineShape:
    """What the engine of a replica is given.

    Raises:
        InvalidRequest: a value is out of bounds.
    """

    token_budget: int
    max_num_seqs: int
    #: Tokens that the KV cache holds.
    kv_tokens: int
    block_size: int = 64
    policy: Policy = Policy.SPLITFUSE
    max_step_s: float = math.inf

    def __post_init__(self) -> None:
        for name in ("token_budget", "max_num_seqs", "block_size"):
            if getattr(self, name) < 1:
                raise InvalidRequest(name, "at least 1", getattr(self, name))
        if self.max_num_seqs > self.token_budget:
            raise InvalidRequest(
                "token_budget", f"at least max_num_seqs ({self.max_num_seqs})", self.token_budget
            )
        if self.kv_tokens < self.block_size:
            raise InvalidRequest("kv_tokens", f"a block of {self.block_size}", self.kv_tokens)
        if not self.max_step_s > 0:
            raise InvalidRequest("max_step_ms", "above 0", self.max_step_s * 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a step costs, and the engine that runs the steps."""

    cost: StepCost
    engine: EngineShape
    #: What it is, and where the numbers come from.
    device: str = ""
    source: str = ""

    @classmethod
    def read(cls, name: str) -> Self:
        """A known device by its name, or a JSON file by its path.

        Raises:
            InvalidRequest: there is none, or it does not describe a device.
        """
        path = KNOWN / f"{name}.json"
        path = path if path.is_file() else Path(name)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            known = ", ".join(known_devices())
            raise InvalidRequest("device", f"a JSON file, or one of {known}", name) from error
        return cls.from_mapping(content)

    @classmethod
    def from_mapping(cls, content: Any) -> Self:
        """From plain values, as `to_mapping` gives them.

        Raises:
            InvalidRequest: a field is unknown, missing or wrong.
        """
        try:
            engine = dict(content["engine"])
            engine["policy"] = Policy(engine.get("policy", Policy.SPLITFUSE.value))
            about = {key: str(content.get(key, "")) for key in ("device", "source")}
            cost = StepCost.from_mapping(content["cost"])
            return cls(cost=cost, engine=EngineShape(**engine), **about)
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidRequest(
                "device", 'an object with "cost" and "engine"', f"{type(error).__name__}: {error}"
            ) from error

    def to_mapping(self) -> Mapping[str, Any]:
        """Plain types; undone by `from_mapping`."""
        engine = asdict(self.engine) | {"policy": self.engine.policy.value}
        if math.isinf(self.engine.max_step_s):
            del engine["max_step_s"]
        about = {"device": self.device, "source": self.source}
        return {**about, "cost": self.cost.to_mapping(), "engine": engine}


def known_devices() -> list[str]:
    """Names that `Device.read` knows."""
    return sorted(file.stem for file in KNOWN.glob("*.json"))
