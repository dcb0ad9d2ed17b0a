"""`load_adapters`: LoRA adapters (arXiv 2106.09685) in PEFT's format, as the decoder applies them.

    outputs += (x @ A.T) @ B.T * alpha / rank        A [rank, in], B [out, rank]

The parts of a fused linear (qkv, gate and up) may have an A and a B each. They become one pair for
all of it: the As below each other, each B in the rows of its part, and zeros elsewhere.
"""

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenmill.engine.errors import OutOfMemory
from tokenmill.engine.json_file import read_json
from tokenmill.engine.loader import LoadedModel
from tokenmill.engine.models.checkpoint import tensors_of_file
from tokenmill.engine.models.families import FAMILIES
from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.low_rank import Adapter, LowRank
from tokenmill.engine.models.mlp import MLP
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.engine.models.weight_map import place_of, split_fused
from tokenmill.engine.models.weights import ModelWeights, empty_weights
from tokenmill.producer.errors import InvalidRequest

LOGGER = logging.getLogger(__name__)

CONFIG, WEIGHTS, OLDER_WEIGHTS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
_PAIR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
#: Fields of a config that are read here, that serve training, or that the tensors tell. Any other
#: that is set asks for something else to be computed.
_KNOWN = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights", "target_modules"),
        *("task_type", "inference_mode", "lora_dropout", "fan_in_fan_out", "auto_mapping"),
        *("base_model_name_or_path", "revision", "peft_version", "layers_to_transform"),
        *("layers_pattern", "exclude_modules", "megatron_core", "qalora_group_size"),
        *("eva_config", "loftq_config", "corda_config", "runtime_config"),
    )
)
#: Ways to begin training that leave the model's own weights as they are.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_MERGE = "merge it into a copy of the model"


@dataclass(frozen=True, slots=True)
class _Place:
    """Outputs [start, start + size) of a linear [in] -> [out]."""

    linear: Linear
    inputs: int
    outputs: int
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class _Part:
    """A module's A, the rows of its B that go to each place, and what they are to be times."""

    a: torch.Tensor
    placed: list[tuple[_Place, torch.Tensor]]
    scale: float


_Parts = list[_Part]


def load_adapters(model: LoadedModel, directories: Mapping[str, str]) -> dict[str, Adapter]:
    """Adapters by name, in the dtype of the model and on its device.

    Raises:
        InvalidRequest: one has another form, asks for what is not supported, or does not fit.
        UnsupportedModel: a file of one is damaged.
        OutOfMemory: the device has no room for them.
    """
    try:
        return {
            files.name: _adapter(files, model.dtype, model.device)
            for files in _files(directories, model.name, model.spec, model.weights)
        }
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(f"the adapters do not fit {model.device}: {error}") from error


def check_adapters(directories: Mapping[str, str], model: str, spec: ModelSpec) -> None:
    """Refuse what `load_adapters` would, before the weights of the model are read.

    Raises:
        InvalidRequest, UnsupportedModel: as `load_adapters` does.
    """
    shapes = empty_weights(spec, torch.float32, torch.device("meta"))
    for files in _files(directories, model, spec, shapes):
        files.parts()


def _files(
    directories: Mapping[str, str], model: str, spec: ModelSpec, weights: ModelWeights
) -> "Iterator[_Files]":
    if model in directories:
        raise InvalidRequest("lora", "named otherwise than the model", model)
    places = dict(_places(weights, spec)) if directories else {}
    for name, directory in directories.items():
        yield _Files(name, Path(directory).expanduser(), spec, places)


@torch.inference_mode()
def _adapter(files: "_Files", dtype: torch.dtype, device: torch.device) -> Adapter:
    rank, parts = files.parts()
    adapter = {linear: _fused(pairs, dtype, device) for linear, pairs in parts.items()}
    size = sum(pair.nbytes for pair in adapter.values()) / 2**20
    LOGGER.info("adapter %s: rank %d, %d linears, %.1f MiB", files.name, rank, len(adapter), size)
    return adapter


def _fused(pairs: _Parts, dtype: torch.dtype, device: torch.device) -> LowRank:
    """The parts of one linear as one pair for all of it."""
    place = pairs[0].placed[0][0]
    down = torch.cat([part.a for part in pairs]).to(device, dtype)
    up = torch.zeros(place.outputs, len(down), dtype=dtype, device=device)
    column = 0
    for part in pairs:
        for at, rows in part.placed:
            columns = slice(column, column + len(part.a))
            up[at.start : at.start + at.size, columns] = (rows.float() * part.scale).to(up)
        column += len(part.a)
    return LowRank(down, up)


@dataclass(frozen=True, slots=True)
class _Files:
    """The files of one adapter, as they are stored."""

    name: str
    directory: Path
    spec: ModelSpec
    places: Mapping[str, _Place]

    def parts(self) -> tuple[int, dict[Linear, _Parts]]:
        """Its rank, and what it adds to each linear."""
        config = read_json(self._file(CONFIG))
        rank, scale = self._scale(config)
        parts: dict[Linear, _Parts] = defaultdict(list)
        modules = self._modules()
        self._check_targets(config.get("target_modules"), modules)
        for module, (a, b) in modules.items():
            placed = self._placed(module, a, b, rank)
            parts[placed[0][0].linear].append(_Part(a, placed, scale))
        return rank, parts

    def _file(self, *names: str) -> Path:
        for name in names:
            if (self.directory / name).is_file():
                return self.directory / name
        expected = f"a directory with {names[0]}, as PEFT writes it"
        raise InvalidRequest(f"lora.{self.name}", expected, str(self.directory))

    def _scale(self, config: Mapping[str, Any]) -> tuple[int, float]:
        """Rank and scale, of a config that asks for nothing else."""
        kind, rank, alpha = (config.get(key) for key in ("peft_type", "r", "lora_alpha"))
        if kind != "LORA":
            raise self._refused("peft_type", "LORA", kind, _MERGE)
        for field, value in config.items():
            if field not in _KNOWN and value and value != "none":
                raise self._refused(field, "not set", value, _MERGE)
        if config.get("init_lora_weights") not in _PLAIN_STARTS:
            remedy = "let PEFT convert it to a plain one (path_initial_model_for_weight_conversion)"
            value = config["init_lora_weights"]
            raise self._refused(
                "init_lora_weights", "true, gaussian, eva or orthogonal", value, remedy
            )
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise self._refused("r", "an integer of at least 1", rank)
        if (
            not isinstance(alpha, int | float)
            or isinstance(alpha, bool)
            or not math.isfinite(alpha)
        ):
            raise self._refused("lora_alpha", "a number", alpha)
        return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def _modules(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and B of each module of the file, as they are stored."""
        found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for key, tensor in tensors_of_file(self._file(WEIGHTS, OLDER_WEIGHTS)):
            match = _PAIR.fullmatch(key)
            if match is None or tensor.dim() != 2 or not tensor.is_floating_point():
                expected = "lora_A and lora_B of linears alone, two-dimensional floats"
                raise self._refused(WEIGHTS, expected, key, _MERGE)
            found[match[1]][match[2]] = tensor
        if not found or any(len(pair) != 2 for pair in found.values()):
            got = next((module for module, pair in found.items() if len(pair) != 2), "nothing")
            raise self._refused(WEIGHTS, "lora_A and lora_B of each module", got, "save it again")
        return {module: (pair["A"], pair["B"]) for module, pair in found.items()}

    def _check_targets(self, targets: object, modules: Mapping[str, object]) -> None:
        for target in targets if isinstance(targets, list) else ():
            if not any(f".{module}".endswith(f".{target}") for module in modules):
                expected = "modules that the file has tensors of"
                raise self._refused("target_modules", expected, target, "save it again")

    def _placed(
        self, module: str, a: torch.Tensor, b: torch.Tensor, rank: int
    ) -> list[tuple[_Place, torch.Tensor]]:
        """Where the rows of a module's B belong."""
        spec = self.spec
        path = place_of(f"{module}.weight", FAMILIES[spec.family].weight_map) or ""
        prefix, _, fused = path.rpartition(".")
        try:
            split = [(f"{prefix}.{part}", rows) for part, rows in split_fused(fused, b, spec)]
        except RuntimeError:  # of another number of rows
            split = []
        placed = [(self.places[name], rows) for name, rows in split if name in self.places]
        if split and len(placed) < len(split):
            expected = "linears of attention and of MLPs that are no experts"
            raise self._refused("target_modules", expected, module, _MERGE)
        shapes = [(len(rows), place.size) for place, rows in placed]
        inputs = placed[0][0].inputs if placed else a.shape[1]
        is_fit = all(got == size for got, size in shapes) and a.shape == (rank, inputs)
        if not placed or not is_fit or b.shape[1] != rank:
            expected = f"shaped as its model and r={rank} say"
            got = f"A {tuple(a.shape)} and B {tuple(b.shape)}"
            remedy = "give the model that it was trained on"
            raise self._refused(module, expected, got, remedy)
        return placed

    def _refused(self, field: str, expected: str, got: object, remedy: str = "") -> InvalidRequest:
        return InvalidRequest(f"lora.{self.name}.{field}", expected, got, remedy)


def _places(weights: ModelWeights, spec: ModelSpec) -> Iterator[tuple[str, _Place]]:
    """What can be adapted, by the names of `weight_map.py`."""
    hidden, qkv = spec.hidden_size, spec.q_size + 2 * spec.kv_size
    for number, layer in enumerate(weights.layers):
        prefix, start = f"layers.{number}.", 0
        for part, size in (("q", spec.q_size), ("k", spec.kv_size), ("v", spec.kv_size)):
            yield prefix + part, _Place(layer.qkv, hidden, qkv, start, size)
            start += size
        out = _Place(layer.attention_out, spec.q_size, hidden, 0, hidden)
        yield prefix + "attention_out", out
        if isinstance(layer.mlp, MLP):
            yield from _mlp(prefix, layer.mlp, hidden, spec.intermediate_size)
        elif layer.mlp.shared is not None and spec.moe is not None:
            inner = spec.moe.shared_intermediate_size
            yield from _mlp(prefix + "shared.", layer.mlp.shared, hidden, inner)


def _mlp(prefix: str, mlp: MLP, hidden: int, inner: int) -> Iterator[tuple[str, _Place]]:
    if mlp.gated:
        yield prefix + "gate", _Place(mlp.up, hidden, 2 * inner, 0, inner)
        yield prefix + "up", _Place(mlp.up, hidden, 2 * inner, inner, inner)
    else:
        yield prefix + "up", _Place(mlp.up, hidden, inner, 0, inner)
    yield prefix + "down", _Place(mlp.down, inner, hidden, 0, hidden)
