"""Plain stand-ins for the kernels of a step, and a stream that runs work when it is waited for."""

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tokenmill.engine import sampler
from tokenmill.engine.copies import Tensors, Wait
from tokenmill.engine.logprobs import logsumexp, measure
from tokenmill.engine.sequence import Sequence
from tokenmill.producer.params import SamplingParams

if TYPE_CHECKING:
    from tokenmill.kernels.sampling import Drawn


class LateStream:
    """Runs nothing before somebody waits: who reads a launched step's results too early fails."""

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []

    def submit(self, work: Callable[[], Tensors]) -> Wait:
        found: list[Tensors] = []
        self._work.append(lambda: found.append(work()))

        def wait() -> Tensors:
            while not found:
                first = self._work.pop(0)
                try:
                    first()
                except Exception:  # what is queued behind it does not run either
                    self._work.clear()
                    raise
            return tuple(tensor.clone() for tensor in found[0])

        return wait


def build_step(
    rows: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    *,
    tokens: torch.Tensor,
    computed: torch.Tensor,
    tables: torch.Tensor,
    block_size: int,
    ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    last_tokens: torch.Tensor,
) -> None:
    """As `kernels/batch_rows.py` says."""
    for padded, value in ((ids, 0), (positions, 0), (slots, -1), (context_lens, 0)):
        padded.fill_(value)
    block_tables.fill_(0)
    last_tokens.fill_(0)
    starts = cu_seqlens_q.tolist()
    for place, row in enumerate(rows.tolist()):
        if row < 0:
            continue
        begin, end = starts[place], starts[place + 1]
        first = int(computed[row])
        seen = torch.arange(first, first + end - begin)
        ids[begin:end] = tokens[row, seen].long()
        positions[begin:end] = seen
        slots[begin:end] = tables[row, seen // block_size].long() * block_size + seen % block_size
        context_lens[place] = first + end - begin
        block_tables[place] = tables[row]
        last_tokens[place] = end - 1


def advance(
    rows: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    is_sampled: torch.Tensor,
    sampled: torch.Tensor,
    *,
    tokens: torch.Tensor,
    computed: torch.Tensor,
) -> None:
    """As `kernels/batch_rows.py` says."""
    for place, row in enumerate(rows.tolist()):
        if row >= 0:
            computed[row] += cu_seqlens_q[place + 1] - cu_seqlens_q[place]
            if is_sampled[place] and computed[row] < tokens.shape[1]:
                tokens[row, computed[row]] = max(int(sampled[place]), 0)


def sample(
    logits: torch.Tensor,
    *,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    is_filtered: bool,
) -> "Drawn":
    """As `kernels/sampling.py` says, by the sampler of a CPU."""
    from tokenmill.kernels.sampling import Drawn

    if not is_filtered:
        top_k, top_p = torch.zeros_like(top_k), torch.ones_like(top_p)
    resident = (temperature, top_k, top_p, min_p, seeds)
    columns = [*(column[rows] for column in resident), positions]
    seqs = [
        Sequence(
            seq_id="",
            token_ids=[0] * position,
            num_prompt_tokens=position,
            params=SamplingParams(
                temperature=round(heat, 4), top_k=k, top_p=round(p, 4), min_p=round(least, 4)
            ),
            seed=seed % (1 << 64),
            max_num_tokens=position + 1,
        )
        for heat, k, p, least, seed, position in zip(*(c.tolist() for c in columns), strict=True)
    ]
    chosen, _ = sampler.sample(logits.clone(), seqs, ())
    tokens = torch.tensor(chosen)
    logprobs, _, _ = measure(logits, tokens.clamp(min=0), 0)
    return Drawn(tokens, logprobs, logsumexp(logits).flatten())


def write_cells(memory: torch.Tensor, cells: torch.Tensor, values: torch.Tensor) -> None:
    """As `kernels/batch_rows.py` says."""
    memory[cells.long()] = values


def add_cells(
    logits: torch.Tensor,
    places: torch.Tensor,
    *,
    rows: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """As `kernels/logit_edits.py` says."""
    for place in places.tolist():
        row = rows[place]
        logits[place, tokens[row, : counts[row]].long()] += values[row, : counts[row]]


def set_cells(
    logits: torch.Tensor,
    places: torch.Tensor,
    value: float,
    *,
    rows: torch.Tensor,
    counts: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """As `kernels/logit_edits.py` says."""
    for place in places.tolist():
        row = rows[place]
        logits[place, tokens[row, : counts[row]].long()] = value


def keep_allowed(logits: torch.Tensor, places: torch.Tensor, words: torch.Tensor) -> None:
    """As `kernels/logit_edits.py` says."""
    for place, masks in zip(places.tolist(), words, strict=True):
        bits = (masks[:, None] >> torch.arange(32)) & 1
        logits[place, bits.flatten()[: logits.shape[1]] == 0] = -torch.inf


def penalize(
    logits: torch.Tensor,
    places: torch.Tensor,
    counted: torch.Tensor,
    *,
    rows: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
    tokens: torch.Tensor,
    counts: torch.Tensor,
    prompts: torch.Tensor,
    repetition: torch.Tensor,
    presence: torch.Tensor,
    frequency: torch.Tensor,
) -> None:
    """As `kernels/penalties.py` says: counts are those of the tokens when they are relied on."""
    for place, known in zip(places.tolist(), counted.tolist(), strict=True):
        row, length = rows[place], int(lengths[place])
        assert length <= longest
        ids, prompt = tokens[row, :length].tolist(), int(prompts[row])
        assert counts[row, :known].tolist() == counts_of(ids[:known], prompt)
        counts[row, :length] = torch.tensor(counts_of(ids, prompt), dtype=torch.int32)
        for token in set(ids):
            z, times = logits[place, token], ids[prompt:].count(token)
            z = z / repetition[row] if z > 0 else z * repetition[row]
            z = z - times * frequency[row]
            logits[place, token] = z - presence[row] if times else z


def counts_of(ids: list[int], prompt: int) -> list[int]:
    """Where a token is first, how often it is in the output; elsewhere -1."""
    return [
        ids[prompt:].count(token) if token not in ids[:place] else -1
        for place, token in enumerate(ids)
    ]


#: By module, what stands in for a kernel.
PLAIN: dict[str, tuple[Callable[..., Any], ...]] = {
    "batch_rows": (build_step, advance, write_cells),
    "logit_edits": (add_cells, set_cells, keep_allowed),
    "penalties": (penalize,),
    "sampling": (sample,),
}


def put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put all of them in the place of the kernels."""
    for name, functions in PLAIN.items():
        module = importlib.import_module(f"tokenmill.kernels.{name}")
        for function in functions:
            monkeypatch.setattr(module, function.__name__, function)
