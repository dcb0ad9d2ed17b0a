"""llama.cpp through its C interface: continuous batching over many sequences, as its server does.

Each step decodes one token of every running sequence and fills the batch with prompt tokens. All
sequences share one KV buffer, which was faster than `--streams` (a buffer for each).
"""

import argparse
import ctypes
from collections import deque
from collections.abc import Callable

import llama_cpp
import numpy as np
from conversation import Request, converse


class Slots:
    """A context with `sequences` slots, and the loop that keeps them busy."""

    def __init__(self, options: argparse.Namespace) -> None:
        llama_cpp.llama_backend_init()
        self._options = options
        self._model = llama_cpp.llama_model_load_from_file(
            options.model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise SystemExit(f"llama.cpp does not load {options.model}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._num_tokens = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def run(self, requests: list[Request], first: Callable[[], None]) -> list[list[int]]:
        longest = max(len(prompt) + length for prompt, length in requests)
        slots = min(self._options.sequences, len(requests))
        context = self._context(slots, -(-longest // 256) * 256)
        try:
            return self._loop(context, requests, slots, first)
        finally:
            llama_cpp.llama_free(context)

    def _context(self, slots: int, length: int):
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = slots * length
        parameters.n_seq_max = slots
        parameters.n_batch = max(self._options.batch, slots)
        parameters.n_ubatch = parameters.n_batch
        parameters.n_threads = parameters.n_threads_batch = self._options.threads
        parameters.kv_unified = not self._options.streams
        parameters.no_perf = True
        context = llama_cpp.llama_init_from_model(self._model, parameters)
        if not context:
            raise SystemExit("llama.cpp makes no context of that size")
        return context

    def _loop(
        self, context, requests: list[Request], slots: int, first: Callable[[], None]
    ) -> list[list[int]]:
        outputs: list[list[int]] = [[] for _ in requests]
        is_first = True
        waiting = deque(range(len(requests)))
        free = list(range(slots))
        running: dict[int, int] = {}  # request -> slot
        computed = [0] * len(requests)
        size = max(self._options.batch, slots)
        batch = llama_cpp.llama_batch_init(size, 0, 1)
        memory = llama_cpp.llama_get_memory(context)
        while waiting or running:
            while waiting and free:
                running[waiting.popleft()] = free.pop()
            count, ready = 0, []
            # Decoding sequences first, so that they are never held up by prompts.
            for request in sorted(running, key=lambda r: not outputs[r]):
                prompt, _ = requests[request]
                known = len(prompt) + len(outputs[request])
                take = min(known - computed[request], size - count)
                for position in range(computed[request], computed[request] + take):
                    past = position - len(prompt)
                    token = prompt[position] if past < 0 else outputs[request][past]
                    batch.token[count], batch.pos[count] = token, position
                    batch.n_seq_id[count], batch.seq_id[count][0] = 1, running[request]
                    batch.logits[count] = position == known - 1
                    if position == known - 1:
                        ready.append((request, count))
                    count += 1
                computed[request] += take
                if count == size:
                    break
            batch.n_tokens = count
            if llama_cpp.llama_decode(context, batch):
                raise SystemExit("llama_decode failed")
            for request, row in ready:
                logits = llama_cpp.llama_get_logits_ith(context, row)
                logits = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * self._num_tokens))
                outputs[request].append(int(np.frombuffer(logits.contents, np.float32).argmax()))
                if is_first:
                    first()
                    is_first = False
                if len(outputs[request]) == requests[request][1]:
                    slot = running.pop(request)
                    llama_cpp.llama_memory_seq_rm(memory, slot, -1, -1)
                    free.append(slot)
        llama_cpp.llama_batch_free(batch)
        return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--batch", type=int, default=512, help="n_batch and n_ubatch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", action="store_true", help="a KV buffer for each sequence")
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()

    def load():
        settings = {name: value for name, value in vars(options).items() if name != "model"}
        info = llama_cpp.llama_print_system_info().decode()
        return Slots(options).run, settings | {"system_info": info}

    converse(load, ["llama-cpp-python", "numpy"], is_cold=options.cold)


if __name__ == "__main__":
    main()
