"""`Plan`: what a dataset run is told to do."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from tokenmill.producer.dataset import Reading
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.journal import OutputError
from tokenmill.producer.params import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to do: everything that a run needs to know, in plain types."""

    input: str
    output: str
    #: "" for what the queue serves, the input names, or the default.
    model: str = ""
    #: How a worker that the run brings holds the weights; "" for the worker's own choice.
    quantization: str = ""
    #: What it holds keys and values as; "" for its own choice.
    kv_cache_dtype: str = ""
    #: LoRA adapters of a worker that is brought along, each as NAME=DIRECTORY.
    lora: Sequence[str] = ()
    #: "" to look at the file, or a `Layout`.
    layout: str = ""
    prompt_field: str = "prompt"
    answer_field: str = "answer"
    raw: bool = False
    ignore_row_model: bool = False
    sampling: Mapping[str, Any] = field(default_factory=dict)
    queue: str = "default"
    priority: int = 1
    window: int = 256
    overwrite: bool = False

    def __post_init__(self) -> None:
        SamplingParams.from_mapping(self.sampling)
        if not 1 <= self.window <= 100_000:
            raise InvalidRequest("window", "from 1 to 100000", self.window)
        names = [text.partition("=")[0] for text in self.lora]
        for text in self.lora:
            name, _, directory = text.partition("=")
            if not (name and directory and names.count(name) == 1):
                raise InvalidRequest("lora", "NAME=DIRECTORY, each name once", text)
        if Path(self.input).absolute() == Path(self.output).absolute():
            raise OutputError(f"output must be another file than the input, got {self.output}")

    @property
    def reading(self) -> Reading:
        """How the rows are read and written."""
        return Reading(
            prompt_field=self.prompt_field,
            answer_field=self.answer_field,
            raw=self.raw,
            sampling=self.sampling,
        )

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Self:
        """From plain values, as an RQ job carries them.

        Raises:
            InvalidRequest: an unknown field, or a wrong one.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise InvalidRequest("plan", "the fields of a plan", str(error)) from error

    def to_mapping(self) -> dict[str, Any]:
        """Plain types; undone by `from_mapping`."""
        return asdict(self)

    def parameters(self) -> dict[str, Any]:
        """What the answers depend on, beside the model: with others it would be another run."""
        names = ("layout", "prompt_field", "answer_field", "raw", "ignore_row_model")
        values = {name: getattr(self, name) for name in names} | {"sampling": dict(self.sampling)}
        for name in ("quantization", "kv_cache_dtype"):
            if chosen := getattr(self, name):
                values[name] = chosen
        if self.lora:
            values["lora"] = list(self.lora)
        plain: dict[str, Any] = json.loads(json.dumps(values))
        return plain
