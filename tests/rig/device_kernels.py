"""The kernels of a GPU in the place of a CPU's, interpreted: what `ops` does for CUDA tensors."""

import functools

import pytest

from tokenmill.kernels import cpu_ops, ops


def put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those of experts and of sampling, which are not called through `ops`."""
    from tokenmill.kernels import gated_activation, layer_norm, rms_norm, rope_kv, soft_cap

    for module, names in (
        (rms_norm, ("rms_norm", "add_rms_norm")),
        (layer_norm, ("layer_norm", "add_layer_norm")),
        (gated_activation, ("gated_activation", "activation")),
        (rope_kv, ("rope_store_kv",)),
        (soft_cap, ("soft_cap",)),
    ):
        for name in names:
            monkeypatch.setattr(ops, name, getattr(module, name))
    attend = functools.partial(ops._attention_on_gpu, out=None)
    monkeypatch.setattr(ops, "paged_attention", attend)
    monkeypatch.setattr(cpu_ops, "has_programs", lambda _: False)
