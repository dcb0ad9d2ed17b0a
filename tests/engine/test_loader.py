"""Loading: a broken or foreign model directory is refused by name, never with a traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tokenmill.engine.errors import OutOfMemory, UnsupportedModel
from tokenmill.engine.kv_cache import allocate_kv_cache
from tokenmill.engine.loader import choose_device, choose_dtype, load
from tokenmill.engine.models.families import spec_from_config
from tokenmill.engine.pipeline import Pipeline
from tokenmill.producer.errors import InvalidRequest

Checkpoint = Callable[..., tuple[Path, Any]]


@pytest.fixture
def directory(tiny_checkpoint: Checkpoint) -> Path:
    return tiny_checkpoint("llama")[0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda p: p.write_text("{"), r"config\.json is not JSON"),
        ("config.json", lambda p: p.write_text("[]"), "must hold a JSON object, got list"),
        ("config.json", lambda p: p.write_text("{}"), "model_type must be one of"),
        ("model.safetensors", truncate, "not a whole safetensors file"),
        ("model.safetensors", lambda p: p.write_bytes(b""), "not a whole safetensors file"),
        ("model.safetensors", lambda p: p.write_text("version https://git-lfs"), "not a whole"),
        ("model.safetensors", lambda p: p.unlink(), r"holds no \*\.safetensors and no pytorch"),
        ("tokenizer.json", lambda p: p.write_text("{"), "is not a tokenizer"),
        ("tokenizer.json", lambda p: p.unlink(), r"must hold a tokenizer\.json"),
        (
            "tokenizer_config.json",
            lambda p: p.write_text("{"),
            r"tokenizer_config\.json is not JSON",
        ),
        ("generation_config.json", lambda p: p.write_text("nul"), "is not JSON"),
    ],
)
def test_a_broken_file_is_named(
    directory: Path, file: str, change: Callable[[Path], object], message: str
) -> None:
    change(directory / file)
    with pytest.raises(UnsupportedModel, match=message):
        load(str(directory), device="cpu")


def test_other_shapes_and_missing_tensors_are_refused(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    with pytest.raises(UnsupportedModel, match=r"must have shape \(99, 48\), got \(331, 48\)"):
        load(str(directory), device="cpu")
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(UnsupportedModel, match="lacks 9 tensors"):
        load(str(directory), device="cpu")
    (directory / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UnsupportedModel, match=r"no known place: model\.layers\.2"):
        load(str(directory), device="cpu")


def test_the_same_weights_under_another_name_are_left_alone(directory: Path) -> None:
    shutil.copy(directory / "model.safetensors", directory / "consolidated.safetensors")
    assert load(str(directory), device="cpu").spec.num_layers == 3


def test_shards_are_found_by_their_index(tiny_checkpoint: Checkpoint) -> None:
    directory, model = tiny_checkpoint("llama")
    expected = load(str(directory), device="cpu").weights.embedding
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="40KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    assert torch.equal(load(str(directory), device="cpu").weights.embedding, expected)


def as_bin(directory: Path, **options: bool) -> Path:
    """The checkpoint in two .bin shards with their index, as torch writes them."""
    stored = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(stored)
    shards = {f"pytorch_model-0000{n + 1}-of-00002.bin": names[n::2] for n in range(2)}
    for file, chosen in shards.items():
        torch.save({name: stored[name] for name in chosen}, directory / file, **options)
    index = {name: file for file, chosen in shards.items() for name in chosen}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    return directory / next(iter(shards))


@pytest.mark.parametrize("mapped", [True, False], ids=["zip", "before torch 1.6"])
def test_bin_shards_are_read(directory: Path, mapped: bool) -> None:
    expected = load(str(directory), device="cpu").weights
    as_bin(directory, _use_new_zipfile_serialization=mapped)
    loaded = load(str(directory), device="cpu").weights
    assert torch.equal(loaded.embedding, expected.embedding)
    rows = torch.randn(3, 48)
    for ours, theirs in zip(loaded.linears(), expected.linears(), strict=True):
        if ours is not loaded.layers[0].attention_out:
            continue
        assert torch.equal(ours(rows), theirs(rows))


def test_safetensors_are_preferred_to_bin(directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"rubbish")
    load(str(directory), device="cpu")


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self._path, "run")


@pytest.mark.parametrize("mapped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_bin_file_with_code_is_refused_and_not_run(directory: Path, mapped: bool) -> None:
    shard = as_bin(directory)
    trace = directory / "trace"
    torch.save({"x": Evil(trace)}, shard, _use_new_zipfile_serialization=mapped)
    with pytest.raises(UnsupportedModel, match=r"not a whole file of weights alone: .*; use its"):
        load(str(directory), device="cpu")
    assert not trace.exists()


@pytest.mark.parametrize(
    "content", [b"", b"rubbish", b"PK\x03\x04 rubbish", b"version https://git-lfs"], ids=str
)
def test_a_broken_bin_file_is_refused(directory: Path, content: bytes) -> None:
    as_bin(directory).write_bytes(content)
    with pytest.raises(UnsupportedModel, match="is not a whole file of weights alone"):
        load(str(directory), device="cpu")


def test_a_bin_file_of_something_else_is_refused(directory: Path) -> None:
    shard = as_bin(directory)
    torch.save([1, 2], shard)
    with pytest.raises(UnsupportedModel, match="must hold a dict of tensors, got list"):
        load(str(directory), device="cpu")
    torch.save({"x": 1}, shard)
    with pytest.raises(UnsupportedModel, match="tensors alone, got x of another type"):
        load(str(directory), device="cpu")


def test_a_template_that_cannot_be_read_leaves_plain_texts(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{% nonsense %}")
    tokenizer = load(str(directory), device="cpu").tokenizer
    assert tokenizer.encode("w5 w7") == [5, 7]
    with pytest.raises(InvalidRequest, match="chat template cannot be read"):
        tokenizer.apply_chat_template([{"role": "user", "content": "w5"}])


def test_a_cache_too_large_for_the_machine_is_refused() -> None:
    config = {"model_type": "llama", "vocab_size": 9, "hidden_size": 64, "num_hidden_layers": 1}
    spec = spec_from_config(config | {"intermediate_size": 9, "num_attention_heads": 4})
    with pytest.raises(OutOfMemory, match="lower --kv-cache-memory"):
        allocate_kv_cache(
            spec, 1 << 40, block_size=16, dtype=torch.float32, device=torch.device("cpu")
        )


def test_unknown_devices_and_types_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="device must be auto, cpu or cuda, got 'tpu'"):
        choose_device("tpu")
    with pytest.raises(InvalidRequest, match="dtype must be auto, float32"):
        choose_dtype("int4", torch.device("cpu"))


def test_a_tied_head_is_kept_once_where_it_lies_in_panels(tiny_checkpoint: Checkpoint) -> None:
    directory, reference = tiny_checkpoint("llama", vocab_size=384, tie_word_embeddings=True)
    prompt = [7, 380, 64, 63, 128]
    with torch.inference_mode():
        expected = reference.generate(
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
    (answer,) = Pipeline(str(directory), device="cpu")(prompt, max_tokens=8, ignore_eos=True)
    assert list(answer.token_ids) == expected[0, len(prompt) :].tolist()
    weights = load(str(directory), device="cpu").weights
    if weights.lm_head.layout != "panels":
        pytest.skip("this processor has no panels")
    tables = {t.data_ptr(): t.nbytes for t in (weights.embedding, weights.lm_head.weight)}
    assert list(tables.values()) == [384 * 48 * 4]
    assert weights.nbytes == sum(p.nbytes for p in reference.parameters())
