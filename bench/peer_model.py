"""The weights that tokenmill runs, in the formats of its peers: all of them get the same model.

SmolLM2-135M-Instruct comes as a GGUF of 4-bit blocks, which tokenmill expands to float32. Written
from those float32 values: a Hugging Face directory (float32 safetensors; vLLM, transformers) and
GGUF files in f16 and Q8_0 (llama.cpp), once, below the user's cache directory.

    python bench/peer_model.py    # writes them, and checks transformers' logits against ours
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants
from safetensors.torch import save_file

from tokenmill.engine.config import EngineConfig
from tokenmill.engine.engine import Engine
from tokenmill.engine.gguf import GGUFFile, config_from_gguf, tensors_of
from tokenmill.engine.loader import load
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.probe import Probe
from tokenmill.engine.sources import cache_home, pull
from tokenmill.engine.tokenizer import tokenizer_from_gguf

MODEL = "smollm2"
#: Raised when what is written changes.
FORMAT = 1


@dataclass(frozen=True, slots=True)
class PeerModel:
    """Where the forms of the model lie."""

    directory: Path

    @property
    def hugging_face(self) -> Path:
        return self.directory / "hf"

    def gguf(self, kind: str) -> Path:
        """`kind` is f16 or q8_0."""
        return self.directory / f"{MODEL}-{kind}.gguf"


def peer_model() -> PeerModel:
    """The forms of the model, written if they are not there."""
    place = PeerModel(cache_home() / "peers" / f"{MODEL}-{FORMAT}")
    if not place.directory.is_dir():
        place.directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.directory.parent) as scratch:
            part = PeerModel(Path(scratch) / "part")
            part.hugging_face.mkdir(parents=True)
            source = GGUFFile(pull(MODEL))
            _write_hugging_face(source, part.hugging_face)
            for kind in ("f16", "q8_0"):
                _write_gguf(source, part.gguf(kind), kind)
            part.directory.rename(place.directory)
    return place


def _write_hugging_face(source: GGUFFile, directory: Path) -> None:
    config = config_from_gguf(source.metadata, source.tensors)
    tokenizer = tokenizer_from_gguf(source.metadata)
    tokens = source.metadata["tokenizer.ggml.tokens"]
    ids = {name: source.metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    special = {f"{name}_token": tokens[number] for name, number in ids.items()}
    shape = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "dtype": "float32",
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["eos"],
    }
    files: dict[str, dict[str, Any]] = {
        "config.json": config | shape,
        "generation_config.json": {"eos_token_id": sorted(tokenizer.eos_token_ids)},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": source.metadata["tokenizer.chat_template"],
            "model_max_length": config["max_position_embeddings"],
            "pad_token": special["eos_token"],
            **special,
        },
    }
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=2))
    (directory / "tokenizer.json").write_text(tokenizer.to_json())
    tensors = {
        name: tensor.contiguous() for name, tensor in tensors_of(source, spec_from_config(config))
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _write_gguf(source: GGUFFile, path: Path, kind: str) -> None:
    """Matrices in `kind`, vectors in float32; the metadata as they are."""
    types = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}
    file_types = {"f16": 1, "q8_0": 7}  # what general.file_type calls them
    writer = GGUFWriter(path, source.metadata["general.architecture"])
    for name, field in GGUFReader(source.path).fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        is_array = field.types[0] is GGUFValueType.ARRAY
        item_type = field.types[-1] if is_array else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=item_type)
    writer.add_uint32("general.file_type", file_types[kind])
    for name in source.tensors:
        values = source.tensor(name).numpy()
        if values.ndim == 1:
            writer.add_tensor(name, values)
        elif kind == "f16":
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, quants.quantize(values, types[kind]), raw_dtype=types[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def largest_difference(place: PeerModel) -> float:
    """Largest difference between transformers' logits and ours, over 96 random tokens."""
    from transformers import AutoModelForCausalLM

    ids = [37 * position % 49152 for position in range(96)]  # as `Probe` makes them up
    theirs = AutoModelForCausalLM.from_pretrained(place.hugging_face, dtype=torch.float32)
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0, -1]
    engine = Engine(load(MODEL, device="cpu"), EngineConfig(token_budget=128))
    probe = Probe(engine._runner)  # noqa: SLF001 (the logits of a step are nobody else's)
    return float((probe.logits([(0, len(ids))])[0] - expected).abs().max())


def main() -> None:
    place = peer_model()
    difference = largest_difference(place)
    print(f"{place.directory}: transformers' logits differ from ours by at most {difference:.1e}")
    if difference > 1e-3:
        shutil.rmtree(place.directory)
        raise SystemExit("they must differ by less than 1e-3; what was written is removed")


if __name__ == "__main__":
    main()
