"""The tensors of a checkpoint, one at a time: safetensors, or the older .bin shards of torch."""

from collections.abc import Iterator
from pathlib import Path

import torch

from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.json_file import read_json

#: A named tensor as a checkpoint stores it.
NamedTensors = Iterator[tuple[str, torch.Tensor]]


def tensors_of_directory(directory: Path) -> NamedTensors:
    """Every tensor of a directory's weight files, mapped from disk; safetensors where there are.

    Raises:
        UnsupportedModel: there is no such file, or one is broken.
    """
    safetensors = _shards(directory, "model.safetensors", "*.safetensors")
    for file in safetensors:
        yield from _safetensors(file)
    if safetensors:
        return
    shards = _shards(directory, "pytorch_model.bin", "pytorch_model*.bin")
    if not shards:
        raise UnsupportedModel(
            f"{directory} holds no *.safetensors and no pytorch_model*.bin; pull the model again"
        )
    for file in shards:
        yield from _torch_file(file)


def tensors_of_file(file: Path) -> NamedTensors:
    """Every tensor of one weight file, mapped from disk.

    Raises:
        UnsupportedModel: it is broken.
    """
    yield from _safetensors(file) if file.suffix == ".safetensors" else _torch_file(file)


def _shards(directory: Path, name: str, pattern: str) -> list[Path]:
    """The files that the index names, or the only file: others may hold the same weights again."""
    index = read_json(directory / f"{name}.index.json")
    if index:
        named = index.get("weight_map")
        return sorted({directory / file for file in named.values()}) if named else []
    if (directory / name).is_file():
        return [directory / name]
    return sorted(directory.glob(pattern))


def _safetensors(file: Path) -> NamedTensors:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                yield name, shard.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UnsupportedModel(
            f"{file} is not a whole safetensors file: {error}; pull it again"
        ) from error


def _torch_file(file: Path) -> NamedTensors:
    """A .bin file is a pickle: torch's restricted reader builds tensors alone from it."""
    try:
        try:
            stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            stored = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes can lead the reader to any class
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModel(
            f"{file} is not a whole file of weights alone: {first}; use its safetensors form"
        ) from error
    if not isinstance(stored, dict):
        raise UnsupportedModel(f"{file} must hold a dict of tensors, got {type(stored).__name__}")
    for name, tensor in stored.items():
        if not isinstance(tensor, torch.Tensor):
            raise UnsupportedModel(f"{file} must hold tensors alone, got {name} of another type")
        yield str(name), tensor
