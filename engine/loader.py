"""`load`: a model's weights and tokenizer, ready to run, from any of its sources."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tokenmill.engine.errors import OutOfMemory, UnsupportedModel
from tokenmill.engine.gguf import GGUFFile, config_from_gguf, tensors_of
from tokenmill.engine.group import ALONE, Group
from tokenmill.engine.json_file import read_json
from tokenmill.engine.models.checkpoint import NamedTensors, tensors_of_directory
from tokenmill.engine.models.families import FAMILIES, spec_from_config
from tokenmill.engine.models.quantization import Scheme, choose_quantization, why_not_kept
from tokenmill.engine.models.shard import WHOLE, Shard
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.engine.models.stored_weights import StoredWeights, stored_weights
from tokenmill.engine.models.weight_map import WeightMap, fill_weights, place_of
from tokenmill.engine.models.weights import ModelWeights, empty_weights, pack
from tokenmill.engine.sources import resolve
from tokenmill.engine.tokenizer import Tokenizer, tokenizer_from_directory, tokenizer_from_gguf
from tokenmill.kernels import cpu_ops
from tokenmill.producer.errors import InvalidRequest

LOGGER = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model on its device; `name` is what the user called it."""

    name: str
    spec: ModelSpec
    weights: ModelWeights
    tokenizer: Tokenizer
    device: torch.device
    dtype: torch.dtype
    #: The ranks that the model is divided among; spec and weights are those of this one.
    group: Group = ALONE
    #: The format in which linears stay as the checkpoint has them quantized; "" where they are
    #: floats, or made so.
    stored_as: str = ""
    #: What its linears are computed by, of `quantization.QUANTIZATIONS`.
    quantization: str = "none"


def load(
    model: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantization: str = "none",
    group: Group = ALONE,
) -> LoadedModel:
    """Load `model`: a known name, a directory, a GGUF file, or a pulled hub id.

    Of a model that is divided among the ranks of a group, the part of this one.

    Raises:
        ModelNotFound: it is not on this machine.
        UnsupportedModel: its family or a feature of it is not supported.
        OutOfMemory: it does not fit the device.
        InvalidRequest: `device`, `dtype` or `quantization` is not one of the known, or not to be
            had here; or the model cannot be divided among so many ranks.
    """
    place = choose_device(device, group.shard)
    kind = choose_dtype(dtype, place)
    scheme = choose_quantization(quantization, place, kind, group.shard)
    path = resolve(model)
    file = GGUFFile(path) if path.suffix == ".gguf" else None
    # One after the other: both hold Python's lock, and the weights wait for the kernels alone.
    with ThreadPoolExecutor(1) as beside:
        kernels = beside.submit(cpu_ops.load_compiled) if place.type == "cpu" else None
        tokenizer = beside.submit(_tokenizer, path, file)
        try:
            stored = None if file else stored_weights(read_json(path / "config.json"))
            spec, weights = _load_weights(path, file, place, kind, group.shard, scheme)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"{model} in {kind} does not fit {place}: {error}") from error
        if kernels is not None:
            kernels.result()
        return LoadedModel(
            model,
            spec,
            weights,
            tokenizer.result(),
            place,
            kind,
            group,
            stored.name if stored and weights.layers[0].qkv.is_quantized else "",
            quantization,
        )


def load_shard(
    model: str, device: torch.device, dtype: torch.dtype, shard: Shard
) -> tuple[ModelSpec, ModelWeights]:
    """What a rank that samples nothing needs: its part of the model, as it computes it.

    Raises:
        ModelNotFound, UnsupportedModel, OutOfMemory, InvalidRequest: as for `load`.
    """
    path = resolve(model)
    file = GGUFFile(path) if path.suffix == ".gguf" else None
    return _load_weights(path, file, device, dtype, shard)


def read_spec(model: str) -> ModelSpec:
    """What a model is, whole; its weights are not read.

    Raises:
        ModelNotFound, UnsupportedModel: as for `load`.
    """
    path = resolve(model)
    return _spec(path, GGUFFile(path) if path.suffix == ".gguf" else None)


def _spec(path: Path, file: GGUFFile | None) -> ModelSpec:
    if file is not None:
        return spec_from_config(config_from_gguf(file.metadata, file.tensors))
    return spec_from_config(read_json(path / "config.json"))


def _tokenizer(path: Path, file: GGUFFile | None) -> Tokenizer:
    return tokenizer_from_gguf(file.metadata) if file else tokenizer_from_directory(path)


@torch.inference_mode()
def _load_weights(
    path: Path,
    file: GGUFFile | None,
    device: torch.device,
    dtype: torch.dtype,
    shard: Shard,
    scheme: Scheme | None = None,
) -> tuple[ModelSpec, ModelWeights]:
    stored, why_floats = None, ""
    whole = _spec(path, file)
    if file is not None:
        tensors = tensors_of(file, whole)
    else:
        tensors = tensors_of_directory(path)
        stored = stored_weights(read_json(path / "config.json"))
    weight_map = FAMILIES[whole.family].weight_map
    if stored is not None:
        if weight_map.transposed:
            raise UnsupportedModel(f"{stored.name} of {whole.family}: choose the unquantized model")
        why_floats = _no_packing(stored, device, dtype, shard, scheme) or _mixed(
            stored, tensors_of_directory(path), weight_map
        )
        tensors = stored.floats(tensors) if why_floats else stored.kept(tensors, device)
    packing = stored.packing if stored and not why_floats else None
    spec = shard.spec(whole)
    weights = empty_weights(spec, dtype, device, shard, packing)
    fill_weights(weights, whole, weight_map, tensors, shard)
    pack(weights, scheme)
    _log_memory(weights, dtype, stored, why_floats, scheme)
    return spec, weights


def _no_packing(
    stored: StoredWeights,
    device: torch.device,
    dtype: torch.dtype,
    shard: Shard,
    scheme: Scheme | None,
) -> str:
    """Why the weights of a checkpoint cannot stay as they are stored; "" if they can."""
    if stored.packing is None:
        return "there is no kernel for this form of them"
    return why_not_kept(stored.packing, device, dtype, shard, scheme)


def _mixed(stored: StoredWeights, tensors: NamedTensors, names: WeightMap) -> str:
    """The same, if not all linears of the layers are quantized, or others are; reads no values.

    What chooses experts is not: it is float in every scheme.
    """
    for name, tensor in tensors:
        place, kind = place_of(name, names) or "", name.rpartition(".")[2]
        is_linear = place.startswith("layers.") and not place.endswith(("router", "shared_gate"))
        is_plain = kind == "weight" and tensor.dim() == 2
        is_odd = not is_linear if stored.is_part(kind, tensor) else is_linear and is_plain
        if is_odd:
            return f"{name} is not stored as the others are"
    return ""


def _log_memory(
    weights: ModelWeights,
    dtype: torch.dtype,
    stored: StoredWeights | None,
    why_floats: str,
    scheme: Scheme | None,
) -> None:
    held = scheme.name if scheme else str(dtype).removeprefix("torch.")
    size = f"{weights.nbytes / 2**20:,.1f} MiB"
    if stored is None:
        LOGGER.info("weights are held as %s, in %s", held, size)
    elif not why_floats:
        LOGGER.info("weights stored as %s stay so, in %s", stored.name, size)
    else:
        what = (stored.name, held, size, why_floats)
        LOGGER.warning("weights stored as %s are held as %s, in %s: %s", *what)


def choose_device(device: str, shard: Shard = WHOLE) -> torch.device:
    """`auto` takes a GPU where there is one; each rank of a group has its own.

    Raises:
        InvalidRequest: not auto, cpu or cuda; or cuda where there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise InvalidRequest("device", "auto, cpu or cuda", device)
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("device", "cpu, as there is no CUDA device here", device)
    if device == "cuda" and shard.size > 1:
        return torch.device(device, shard.rank)
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU.

    Raises:
        InvalidRequest: not auto, float32, bfloat16 or float16.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise InvalidRequest("dtype", f"auto, {', '.join(DTYPES)}", dtype)
    return DTYPES[dtype]
