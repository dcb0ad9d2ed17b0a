"""GGUF: a file written here is read back; a broken one is refused, never a traceback."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize

from tokenmill.engine import gguf
from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.gguf import GGUFFile, TensorInfo, _half_split, config_from_gguf
from tokenmill.kernels import cpu_ops


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_array("words", ["a", "é", ""])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_bool("yes", True)
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    writer.add_tensor("plain", values)
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
        writer.add_tensor(kind.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_and_tensors_are_read(written: Path) -> None:
    file = GGUFFile(written)
    assert file.metadata["llama.block_count"] == 2
    assert file.metadata["words"] == ["a", "é", ""]
    assert file.metadata["numbers"] == [1, -2, 3]
    assert file.metadata["yes"] is True
    expected = torch.arange(64.0).reshape(2, 32)
    assert torch.equal(file.tensor("plain"), expected)
    assert (file.tensor("Q8_0") - expected).abs().max() <= 0.26
    assert (file.tensor("Q4_0") - expected).abs().max() <= 4.3


@pytest.mark.parametrize("piece", [1, 32, 40, 1 << 18])
def test_pieces_make_the_whole(written: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_PIECE", piece)
    monkeypatch.setattr(cpu_ops, "can_dequantize", lambda _ggml_type: False)
    kind = GGMLQuantizationType.Q8_0
    values = np.arange(64, dtype=np.float32).reshape(2, 32)
    expected = torch.from_numpy(dequantize(quantize(values, kind), kind))
    assert torch.equal(GGUFFile(written).tensor("Q8_0"), expected)
    assert torch.equal(GGUFFile(written).tensor("plain"), torch.from_numpy(values))


@pytest.mark.parametrize("kind", [GGMLQuantizationType.F16, GGMLQuantizationType.Q5_1])
def test_types_that_no_kernel_takes_are_read(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 96, dtype=np.float32).reshape(3, 32)
    path = tmp_path / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("x", quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = torch.from_numpy(dequantize(quantize(values, kind), kind))
    assert torch.equal(GGUFFile(path).tensor("x"), expected)


@pytest.mark.parametrize("length", [0, 3, 20, 100, 200])
def test_a_file_cut_short_is_refused(written: Path, length: int) -> None:
    written.write_bytes(written.read_bytes()[:length])
    with pytest.raises(UnsupportedModel, match="GGUF"):
        GGUFFile(written)


def test_a_row_of_parts_of_blocks_is_refused(written: Path) -> None:
    file = GGUFFile(written)
    info = file.tensors["Q8_0"]
    file.tensors["Q8_0"] = TensorInfo((2, 31), info.ggml_type, info.offset)
    with pytest.raises(UnsupportedModel, match="rows of Q8_0 must be whole blocks of 32, got 31"):
        file.tensor("Q8_0")


def test_a_tensor_cut_short_is_refused(written: Path) -> None:
    written.write_bytes(written.read_bytes()[:-40])
    file = GGUFFile(written)
    assert torch.equal(file.tensor("plain"), torch.arange(64.0).reshape(2, 32))
    with pytest.raises(UnsupportedModel, match="Q4_0 is cut short"):
        file.tensor("Q4_0")


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (b"PK\x03\x04", "must start with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version must be 2 or 3, got 1"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), "not a whole GGUF file"),
    ],
    ids=["zip", "version", "huge string"],
)
def test_rubbish_is_refused(tmp_path: Path, head: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(head + b"\0" * 64)
    with pytest.raises(UnsupportedModel, match=message):
        GGUFFile(path)


def test_another_architecture_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"architecture must be 'llama', got 'bert'"):
        config_from_gguf({"general.architecture": "bert"}, {})


def test_interleaved_pairs_become_halves() -> None:
    rows = torch.tensor([[0.0], [10.0], [1.0], [11.0], [100.0], [110.0], [101.0], [111.0]])
    expected = [0.0, 1.0, 10.0, 11.0, 100.0, 101.0, 110.0, 111.0]
    assert _half_split(rows, num_heads=2).flatten().tolist() == expected
