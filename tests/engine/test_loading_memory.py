"""Loading: the weights are in memory once, and not twice while they come in."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# A process of its own. RssAnon leaves out the pages of mapped files, which the kernel takes back
# when it needs them: what is read there is the checkpoint itself, which is never copied whole.
MEASURE = """
import re, sys, threading
from pathlib import Path
import torch
from tokenmill.engine.loader import load_shard
from tokenmill.engine.models.shard import Shard
from tokenmill.kernels import cpu_ops

def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

torch.ones(512, 512) @ torch.ones(512, 512)
if cpu_ops.can_pack(torch.ones(64, 64)):
    cpu_ops.pack(torch.ones(64, 64))  # loads the compiler
before, peak, done = resident(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, resident())

watcher = threading.Thread(target=watch)
watcher.start()
shard = Shard(*map(int, sys.argv[2:]))
model = load_shard(sys.argv[1], torch.device("cpu"), torch.float32, shard)
done.set()
watcher.join()
print(before, peak, resident())
"""
SIZES = {
    "vocab_size": 8192,
    "hidden_size": 768,
    "intermediate_size": 2560,
    "num_hidden_layers": 5,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Any]
) -> tuple[Path, Any]:
    """200 MB of float32 weights, an untied head among them: the directory and the model."""
    directory = tmp_path_factory.mktemp("checkpoint")
    return directory, write_checkpoint(directory, "llama", **SIZES)


@pytest.mark.parametrize(
    ("form", "rank", "ranks"),
    [
        ("safetensors", 0, 1),
        ("bin", 0, 1),
        pytest.param("safetensors", 1, 2, marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_loading_is_at_most_1_3_times_the_weights(
    form: str, rank: int, ranks: int, checkpoint: tuple[Path, Any], tmp_path: Path
) -> None:
    import torch

    directory, model = checkpoint
    size = sum(weight.nbytes for weight in model.parameters())
    if form == "bin":
        shutil.copy(directory / "config.json", tmp_path)
        shutil.copy(directory / "tokenizer.json", tmp_path)
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        directory = tmp_path
    command = [sys.executable, "-c", MEASURE, str(directory), str(rank), str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, peak, after = map(int, done.stdout.split())
    assert size > 190e6
    size //= ranks
    assert after - before > 0.9 * size, "the weights must be in memory for this to mean anything"
    assert peak - before <= 1.3 * size, (before, peak, after, size)
