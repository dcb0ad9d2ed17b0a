"""transformers: `generate` on padded batches of requests of like length, or continuous batching.

A padded batch runs until its longest answer is there; only the tokens asked for are counted.
"""

import argparse
import os
from collections.abc import Callable

import torch
from conversation import Request, converse
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig


class Padded:
    """Batches of `rows` requests, sorted by the length of their answers, padded on the left."""

    def __init__(self, model, rows: int) -> None:
        self._model = model
        self._rows = rows

    @torch.inference_mode()
    def run(self, requests: list[Request], first: Callable[[], None]) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in requests]
        order = sorted(range(len(requests)), key=lambda n: requests[n][1])
        for start in range(0, len(order), self._rows):
            rows = order[start : start + self._rows]
            width = max(len(requests[n][0]) for n in rows)
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, number in enumerate(rows):
                prompt = requests[number][0]
                ids[row, width - len(prompt) :] = torch.tensor(prompt)
                mask[row, width - len(prompt) :] = 1
            most = max(requests[n][1] for n in rows)
            answers = self._model.generate(
                ids,
                attention_mask=mask,
                generation_config=GenerationConfig(
                    max_new_tokens=most, do_sample=False, eos_token_id=None, pad_token_id=0
                ),
            )
            first()
            for row, number in enumerate(rows):
                outputs[number] = answers[row, width : width + requests[number][1]].tolist()
        return outputs


class Continuous:
    """One manager for every run; blocks are not shared, so that no prompt is remembered."""

    def __init__(self, model) -> None:
        self._manager = model.init_continuous_batching(
            GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=1),
            ContinuousBatchingConfig(
                allow_block_sharing=False, num_blocks=256, max_batch_tokens=512
            ),
        )
        self._manager.start()

    def run(self, requests: list[Request], first: Callable[[], None]) -> list[list[int]]:
        names = {
            self._manager.add_request(prompt, max_new_tokens=length): number
            for number, (prompt, length) in enumerate(requests)
        }
        outputs: list[list[int]] = [[] for _ in requests]
        while names:
            result = self._manager.get_result(timeout=60)
            if result is None or result.error:
                raise SystemExit(f"continuous batching failed: {result and result.error}")
            first()
            if result.is_finished():
                outputs[names.pop(result.request_id)] = list(result.generated_tokens)
        return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=16, help="requests in a padded batch")
    parser.add_argument("--continuous", action="store_true")
    options = parser.parse_args()

    def load():
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
        runner = Continuous(model) if options.continuous else Padded(model, options.rows)
        settings = {name: value for name, value in vars(options).items() if name != "model"}
        return runner.run, settings | {"threads": torch.get_num_threads()}

    converse(load, ["transformers", "torch"], is_cold=False)
    os._exit(0)  # the thread of continuous batching never ends by itself


if __name__ == "__main__":
    main()
