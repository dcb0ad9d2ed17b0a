"""What a decode step launches on a GPU, counted without one.

Contexts are of one part of attention; of more it is one launch more in each layer.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fake_gpu import DEVICE, fake_gpu, fake_model
from tokenmill.engine.batch import RaggedBatch
from tokenmill.engine.kv_cache import allocate_kv_cache
from tokenmill.engine.models.decoder import Decoder

CONFIG: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
CAPS = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 30.0}
#: Of each family what differs, launches of a layer, and of a step beside its layers.
FAMILIES: dict[str, tuple[dict[str, Any], int, int]] = {
    "llama": ({}, 9, 4),
    "qwen3": ({}, 9, 4),
    "gemma2": ({"sliding_window": 6, "query_pre_attn_scalar": 16, **CAPS}, 9, 6),
    "gemma3_text": ({"layer_types": ["full_attention"] * 4, "query_pre_attn_scalar": 16}, 9, 5),
    "olmo2": ({}, 9, 3),
    "mixtral": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 13, 4),
    "qwen2_moe": (
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
        17,
        4,
    ),
    "opt": ({"ffn_dim": 96, "word_embed_proj_dim": 64}, 9, 6),
    "phi": ({}, 9, 4),
}
#: They say where a tensor lies, or reserve memory.
FREE = {
    *("view", "_unsafe_view", "t", "transpose", "split_with_sizes", "slice", "select", "flatten"),
    *("empty", "empty_like", "new_empty", "expand", "unsqueeze", "detach", "device"),
}


class Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Names of torch's operations that launch something."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        name = func.overloadpacket.__name__
        self._names += [name] if name not in FREE else []
        return func(*args, **(kwargs or {}))


def launches(family: str, num_layers: int, *, is_padded: bool) -> list[str]:
    """Of a decode step of six sequences and its logits."""
    names: list[str] = []

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        names.append(kernel.fn.__name__)

    with fake_gpu(launch) as mode:
        config, *_ = FAMILIES[family]
        config = CONFIG | {"model_type": family, "num_hidden_layers": num_layers} | config
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:num_layers]
        model = fake_model(mode, config)
        with mode, torch.no_grad():  # in which composed operations come in parts
            cache = allocate_kv_cache(
                model.spec, 8, block_size=16, dtype=torch.bfloat16, device=DEVICE
            )
            decoder = Decoder(model.spec, model.weights, 64)

            def new(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
                return torch.empty(shape, dtype=dtype, device=DEVICE)

            batch = RaggedBatch(
                new(6),
                new(6),
                new(6),
                new(7, dtype=torch.int32),
                new(6, dtype=torch.int32),
                new(6, 2, dtype=torch.int32),
                new(6),
                max_query_len=1,
                is_padded=is_padded,
            )
            with Count(names):
                decoder.narrow_logits(decoder.forward(batch, cache))
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_no_more_than_these(family: str) -> None:
    _, most_of_layer, most_beside = FAMILIES[family]
    two, four = (launches(family, layers, is_padded=True) for layers in (2, 4))
    assert (len(four) - len(two)) / 2 <= most_of_layer, four
    assert 2 * len(two) - len(four) <= most_beside, two
