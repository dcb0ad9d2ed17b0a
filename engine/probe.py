"""`Probe`: steps made up to learn about the device, run before the engine serves."""

import time
from collections.abc import Sequence as Seq
from typing import Any

import torch

from tokenmill.engine.batch import build_batch
from tokenmill.engine.cost_model import Timing, kv_tokens_read
from tokenmill.engine.runner import Runner
from tokenmill.engine.scheduler import Chunk
from tokenmill.engine.sequence import Sequence
from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.params import SamplingParams

#: A chunk of a sequence of its own: (start, length).
Shape = tuple[int, int]
#: Time for the steps that the cost model starts from, and how often each is run within it.
COST_S, COST_ROUNDS = 1.0, 3
#: On a GPU kernels and tiles are chosen by the number of rows, those of tokens and of sequences:
#: so many are beside a sequence that all kinds are met (`kernels/fixed_linear.py`).
TOKENS_BESIDE = (14, 63, 64, 130, 400, 600, 1100, 2700)
SEQS_BESIDE = (14, 63, 64, 200)


def sequence_of(length: int, vocabulary: int, **sampling: Any) -> Sequence:
    """A sequence of `length` tokens that nobody asked for."""
    return Sequence(
        seq_id="",
        token_ids=[37 * p % vocabulary for p in range(length)],
        num_prompt_tokens=length,
        params=SamplingParams(**sampling),
        seed=0,
        max_num_tokens=length,
    )


class Probe:
    """Runs steps on a cache that nobody uses yet; what they leave in it is never read."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._max_model_len = runner.size.max_model_len

    @torch.inference_mode()
    def logits(self, shapes: Seq[Shape]) -> torch.Tensor:
        """Logits [S, V] behind the last token of each chunk of one step."""
        num_blocks, block_size = self._runner.size.num_blocks, self._runner.size.block_size
        chunks, used = [], 0
        for start, length in shapes:
            end = start + length
            seq = sequence_of(end, self._runner.vocab_size)
            count = -(-end // block_size)
            seq.block_table = [block % num_blocks for block in range(used, used + count)]
            used += count
            chunks.append(Chunk(seq, start, length))
        self._runner.forward(build_batch(chunks, block_size))
        return self._runner.logits(0, len(chunks))

    def timings(self) -> list[Timing]:
        """Steps of different sizes and contexts, within about `COST_S` seconds."""
        context = max(min(512, self._max_model_len - 64), 0)
        on_cpu = self._runner.device.type == "cpu"
        lengths = (16, 1, 64, 128) if on_cpu else (16, 1, 256, 1024, 2048)
        shapes: list[list[Shape]] = [[(0, min(n, self._max_model_len))] for n in lengths]
        shapes += [[(context, 1)] * 16, [(context, min(64, self._max_model_len - context))]]
        for shape in shapes[:1] if on_cpu else shapes:
            self._timed(shape)  # the first touches the weights, and on a GPU compiles kernels
        ends = time.perf_counter() + COST_S
        found: list[Timing] = []
        for shape in shapes * COST_ROUNDS:
            found.append(self._timed(shape))
            if time.perf_counter() > ends and len(found) >= len(shapes):
                break
        return found

    def time_again(self, timings: Seq[Timing]) -> tuple[Timing, Timing] | None:
        """The largest of `timings` that was one prompt: (as it was, as it is now)."""
        prompts = [t for t in timings if t.kv_tokens == kv_tokens_read(0, t.tokens)]
        prompts = [t for t in prompts if 0 < t.tokens <= self._max_model_len]
        if not prompts:
            return None
        before = max(prompts, key=lambda timing: timing.tokens)
        self._timed([(0, 1)])  # touches the weights
        return before, self._timed([(0, before.tokens)])

    def _timed(self, shapes: Seq[Shape]) -> Timing:
        started = time.perf_counter()
        self.logits(shapes).argmax(dim=-1).tolist()  # to the host, as a step does
        seconds = time.perf_counter() - started
        tokens = sum(length for _, length in shapes)
        return Timing(tokens, sum(kv_tokens_read(*shape) for shape in shapes), seconds)

    def check_batch_invariance(self, most_tokens: int, most_seqs: int) -> None:
        """Refuse where a sequence's logits depend on what else is computed, up to so much of it.

        Raises:
            InvalidRequest: they do, on this device and in this dtype.
        """
        if not self.is_batch_invariant(most_tokens, most_seqs):
            raise InvalidRequest(
                "deterministic",
                "a device whose results do not depend on the batch",
                f"{self._runner.device.type} in {self._runner.dtype}".replace("torch.", ""),
                "leave it out, or use float32 on a CPU",
            )

    def is_batch_invariant(self, most_tokens: int, most_seqs: int) -> bool:
        """Whether a sequence's logits have the same bits whole, in chunks and beside others."""
        length = min(230, self._max_model_len)
        others = [(0, 5), (length // 2, 1)]
        whole = self.logits([(0, length)])[0]
        self.logits([(0, length // 3), *others])
        self.logits([(length // 3, length - length // 3 - 1)])
        steps = [[], others]
        if self._runner.device.type != "cpu":
            steps += self.crowds(length, most_tokens, most_seqs)
        return all(torch.equal(whole, self.logits([(length - 1, 1), *s])[0]) for s in steps)

    def crowds(self, length: int, most_tokens: int, most_seqs: int) -> list[list[Shape]]:
        """What may be beside a sequence of that length, as far as there are blocks for it."""
        longest, block_size = self._max_model_len, self._runner.size.block_size
        left = self._runner.size.num_blocks - -(-length // block_size)
        crowds = [[(0, 1)] * count for count in SEQS_BESIDE]
        for count in (*TOKENS_BESIDE, most_tokens - 1):
            chunks = [longest] * (count // longest) + [count % longest]
            crowds.append([(0, chunk) for chunk in chunks if chunk])
        return [
            crowd
            for crowd in crowds
            if len(crowd) < most_seqs
            and sum(chunk for _, chunk in crowd) < most_tokens
            and sum(-(-chunk // block_size) for _, chunk in crowd) <= left
        ]
