"""A random Llama of some thousand weights, written without transformers."""

import json
from pathlib import Path

CONFIG = {
    "model_type": "llama",
    "vocab_size": 331,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
}


def write_tiny_llama(directory: Path) -> Path:
    """Config, weights and a tokenizer of the words w0, w1, ...; returns `directory`."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    generator = torch.Generator().manual_seed(0)
    hidden, inner, rows = 48, 80, 331

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.15

    tensors = {
        "model.embed_tokens.weight": weight(rows, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": weight(rows, hidden),
    }
    for number in range(2):
        layer = f"model.layers.{number}."
        tensors |= {
            f"{layer}input_layernorm.weight": torch.ones(hidden),
            f"{layer}post_attention_layernorm.weight": torch.ones(hidden),
            f"{layer}self_attn.q_proj.weight": weight(hidden, hidden),
            f"{layer}self_attn.k_proj.weight": weight(16, hidden),
            f"{layer}self_attn.v_proj.weight": weight(16, hidden),
            f"{layer}self_attn.o_proj.weight": weight(hidden, hidden),
            f"{layer}mlp.gate_proj.weight": weight(inner, hidden),
            f"{layer}mlp.up_proj.weight": weight(inner, hidden),
            f"{layer}mlp.down_proj.weight": weight(hidden, inner),
        }
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(rows)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory
