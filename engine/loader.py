"""`load`: a model's weights and tokenizer, ready to run, from any of its sources."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from tokenmill.engine.errors import OutOfMemory
from tokenmill.engine.gguf import GGUFFile, config_from_gguf, tensors_of
from tokenmill.engine.json_file import read_json
from tokenmill.engine.models.checkpoint import tensors_of_directory
from tokenmill.engine.models.families import FAMILIES, spec_from_config
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.engine.models.weight_map import fill_weights
from tokenmill.engine.models.weights import ModelWeights, empty_weights, pack
from tokenmill.engine.sources import resolve
from tokenmill.engine.tokenizer import Tokenizer, tokenizer_from_directory, tokenizer_from_gguf
from tokenmill.producer.errors import InvalidRequest

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


def load(model: str, *, device: str = "auto", dtype: str = "auto") -> LoadedModel:
    """Load `model`: a known name, a directory, a GGUF file, or a pulled hub id.

    Raises:
        ModelNotFound: it is not on this machine.
        UnsupportedModel: its family or a feature of it is not supported.
        OutOfMemory: it does not fit the device.
        InvalidRequest: `device` or `dtype` is not one of the known, or not to be had here.
    """
    path = resolve(model)
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    with torch.inference_mode(), ThreadPoolExecutor(1) as beside:
        try:
            if path.suffix == ".gguf":
                file = GGUFFile(path)
                tokenizer = beside.submit(tokenizer_from_gguf, file.metadata)
                spec = spec_from_config(config_from_gguf(file.metadata, file.tensors))
                tensors = tensors_of(file, spec)
            else:
                tokenizer = beside.submit(tokenizer_from_directory, path)
                spec = spec_from_config(read_json(path / "config.json"))
                tensors = tensors_of_directory(path)
            weights = empty_weights(spec, kind, place)
            fill_weights(weights, spec, FAMILIES[spec.family].weight_map, tensors)
        except torch.OutOfMemoryError as error:
            raise OutOfMemory(f"{model} in {kind} does not fit {place}: {error}") from error
        return LoadedModel(model, spec, pack(weights), tokenizer.result(), place, kind)


def choose_device(device: str) -> torch.device:
    """`auto` takes a GPU where there is one.

    Raises:
        InvalidRequest: not auto, cpu or cuda; or cuda where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise InvalidRequest("device", "auto, cpu or cuda", device)
    if device == "cuda" and not torch.cuda.is_available():
        raise InvalidRequest("device", "cpu, as there is no CUDA device here", device)
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
