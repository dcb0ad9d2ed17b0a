"""The kernels compile for absent GPUs too: the interpreter accepts more than the compiler."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# A process of its own, because in this one the kernels may be defined for the interpreter.
COMPILE = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tokenmill.kernels.batch_rows import (
    _advance_kernel, _build_chunks_kernel, _build_tokens_kernel
)
from tokenmill.kernels.decode_attention import _decode_parts_kernel
from tokenmill.kernels.merge_parts import _merge_parts_kernel
from tokenmill.kernels.dequant_gemm import _dequant_gemm_kernel
from tokenmill.kernels.expert_order import _expert_order_kernel
from tokenmill.kernels.fixed_linear import _fixed_linear_kernel
from tokenmill.kernels.logsumexp import _logsumexp_kernel
from tokenmill.kernels.logit_edits import _allowed_kernel, _cells_kernel
from tokenmill.kernels.moe import _grouped_linear_kernel, _route_kernel, _sum_experts_kernel
from tokenmill.kernels.paged_attention import _paged_attention_kernel
from tokenmill.kernels.layer_norm import _layer_norm_kernel
from tokenmill.kernels.penalties import _penalize_kernel
from tokenmill.kernels.sampling import _draw_kernel, _highest_kernel, _merge_kernel
from tokenmill.kernels.thresholds import _gather_kernel, _levels_kernel, _search_kernel
from tokenmill.kernels.rms_norm import _rms_norm_kernel
from tokenmill.kernels.rope_kv import _rope_store_kv_kernel
from tokenmill.kernels.gated_activation import _activation_kernel
from tokenmill.kernels.soft_cap import _soft_cap_kernel

def compile_kernel(kernel, dtype, integers, floats, num_stages=3, **constants):
    def kind(name):
        wide = ("slots_ptr", "seeds_ptr", "ids_ptr", "sampled_ptr")
        wide += ("positions_ptr",) if "positions_ptr" not in integers else ()
        wide += ("last_tokens_ptr",)
        wide += ("tokens_ptr",) if "tokens_ptr" not in integers else ()
        exact = ("cos_sin_ptr", "sums_ptr", "means_ptr", "shares_ptr", "logprobs_ptr")
        exact += ("temperature_ptr", "top_p_ptr", "min_p_ptr", "scales_ptr")
        exact += ("highest_ptr", "best_ptr", "masses_ptr", "totals_ptr")
        exact += ("counts_ptr",) if "counts_ptr" not in integers else ()
        known = dict.fromkeys(wide, "*i64") | dict.fromkeys(exact, "*fp32")
        known["zeros_ptr"] = "*u8"
        if name in constants:
            return "constexpr"
        if name in known or name.endswith("_ptr"):
            return known.get(name, "*i32" if name in integers else "*" + dtype)
        return "fp32" if name in floats else "i32"

    source = ASTSource(kernel, {n: kind(n) for n in kernel.arg_names}, constants)
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    options = {"enable_fp_fusion": True, "num_stages": num_stages}
    compiled = triton.compile(source, target=target, options=options)
    print(kernel.__name__, compiled.metadata.shared)

lengths = ["cu_seqlens_q_ptr", "context_lens_ptr", "block_tables_ptr"]
forms = (("bf16", "tf32", 64, 0), ("fp32", "ieee", 16, 0), ("bf16", "tf32", 16, 50))
for dtype, precision, block_m, window in forms:
    compile_kernel(
        _paged_attention_kernel, dtype, lengths, ["score_scale", "cap_log2"], Hkv=3, G=3, D=80,
        BLOCK_SIZE=16, BLOCK_D=128, BLOCK_M=block_m, BLOCK_Q=block_m // 3, TILE=32,
        WINDOW=window, CAPPED=window > 0, PRECISION=precision, SKIP_SINGLE=window > 0,
        SEARCHED=256,
    )
    decode = {"Hkv": 3, "G": 3, "D": 256, "BLOCK_SIZE": 64, "BLOCK_D": 256, "BLOCK_M": 16}
    compile_kernel(
        _decode_parts_kernel, dtype, lengths, ["score_scale", "cap_log2"], **decode, PART=256,
        TILE=32, WINDOW=window, CAPPED=window > 0, PRECISION=precision,
        num_stages=3 if dtype == "bf16" else 2,
    )
    compile_kernel(
        _merge_parts_kernel, dtype, lengths, [], Hq=9, D=256, BLOCK_D=256, TILE=32,
        WINDOW=window, AT_ONCE=8,
    )
    compile_kernel(
        _grouped_linear_kernel, dtype, ["order_ptr", "ends_ptr"], [], PER_ROW=2, BLOCK_M=block_m,
        BLOCK_N=128, BLOCK_K=32, BLOCK_E=64, PRECISION=precision,
    )
compile_kernel(
    _route_kernel, "bf16", ["chosen_ptr"], [], TOP_K=6, NORM=True, BLOCK_E=64, BLOCK_K=8
)
for bits, group, block_m, block_n in ((4, 32, 16, 32), (8, 0, 128, 128)):
    compile_kernel(
        _dequant_gemm_kernel, "bf16", ["words_ptr"], [], BITS=bits, GROUP=group, BLOCK=128,
        HAS_BIAS=bits == 8, BLOCK_M=block_m, BLOCK_N=block_n, PRECISION="tf32",
    )
for block_m, block_n, block_k in ((64, 16, 64), (128, 128, 64)):
    compile_kernel(
        _fixed_linear_kernel, "bf16", [], [], HAS_BIAS=True, EVEN_K=block_m == 64, BAND=8,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PRECISION="tf32",
    )
compile_kernel(_expert_order_kernel, "i32", [], [], BLOCK=1024)
compile_kernel(_logsumexp_kernel, "fp32", [], [], BLOCK=4096)
compile_kernel(_sum_experts_kernel, "bf16", [], [], TOP_K=6, HAS_COMMON=True, BLOCK=1024)
drawn = ["top_k_ptr", "rows_ptr", "positions_ptr", "last_ptr", "found_ptr"]
compile_kernel(_highest_kernel, "bf16", drawn, [], BLOCK=4096)
parts = {"BLOCK": 4096, "BLOCK_P": 64}
drawn += ["candidates_ptr", "sizes_ptr"]
compile_kernel(_levels_kernel, "bf16", drawn, [], LEVELS=16, **parts)
compile_kernel(_gather_kernel, "bf16", drawn, ["margin"], LEVELS=16, **parts)
compile_kernel(_search_kernel, "bf16", drawn, [], BLOCK=2048, BLOCK_P=64)
compile_kernel(_draw_kernel, "bf16", [*drawn, "tokens_ptr"], [], WORTH=-19.5, **parts)
compile_kernel(_merge_kernel, "bf16", drawn, [], BLOCK_P=64)
edits = ["places_ptr", "counted_ptr", "rows_ptr", "lengths_ptr", "tokens_ptr", "counts_ptr"]
edits += ["prompts_ptr", "words_ptr"]
compile_kernel(_penalize_kernel, "fp32", edits, [], BLOCK=256, ABREAST=16, FEW=4, WIDE=1024)
compile_kernel(_cells_kernel, "fp32", edits, ["value"], ADD=True, BLOCK=128)
compile_kernel(_allowed_kernel, "fp32", edits, [], BLOCK=2048)
resident = ["rows_ptr", "cu_seqlens_q_ptr", "tokens_ptr", "computed_ptr", "tables_ptr"]
resident += ["context_lens_ptr", "block_tables_ptr", "is_sampled_ptr"]
compile_kernel(_build_tokens_kernel, "i32", resident, [], BLOCK_SIZE=64, BLOCK=256)
compile_kernel(_build_chunks_kernel, "i32", resident, [], BLOCK=256)
compile_kernel(_advance_kernel, "i32", resident, [])
for post in (True, False):
    compile_kernel(
        _rms_norm_kernel, "bf16", [], ["eps"], ADD=True, POST=post, NORM=not post, BLOCK=1024
    )
compile_kernel(_soft_cap_kernel, "bf16", [], ["cap"], BLOCK=2048)
compile_kernel(_layer_norm_kernel, "bf16", [], ["eps"], ADD=True, HAS_BIAS=True, BLOCK=1024)
for kind in ("silu", "gelu", "gelu_tanh", "relu"):
    compile_kernel(
        _activation_kernel, "fp16", [], [], KIND=kind, GATED=kind != "relu", BLOCK=1024
    )
for rotary, half, norm in ((32, 16, "head"), (80, 64, "whole"), (0, 1, "")):  # 0: no positions
    compile_kernel(
        _rope_store_kv_kernel, "bf16", [], ["eps"], Hq=9, Hkv=3, D=80, R=rotary, NORM=norm,
        BLOCK_Q=16, BLOCK_KV=4, BLOCK_HALF=half, BLOCK_REST=64 if rotary < 80 else 1, BLOCK_D=128,
    )
"""


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_without_a_gpu(capability: int, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, script, str(capability)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) > 30
    assert max(shared) <= 96 * 1024  # what every GPU from compute capability 8.6 on offers
