"""`sample`: one token per row of logits, and its log probability.

Noise is keyed by (seed, position, token id), never by batch or history, so a request gives the same
tokens alone or in a batch, and goes on as it would have on another worker. A token is drawn as
argmax(logits / temperature + Gumbel noise), which is an exact draw from the softmax.
"""

import math
from collections.abc import Collection
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING, Any

import torch

from tokenmill.engine.copies import to_device
from tokenmill.engine.filters import keep_likely
from tokenmill.engine.logprobs import SLICE_ELEMENTS, logprobs_of
from tokenmill.engine.penalties import apply_bias, apply_penalties
from tokenmill.engine.sequence import Sequence
from tokenmill.engine.token_masks import apply_constraints, forbid_early_end
from tokenmill.kernels import cpu_ops
from tokenmill.producer.logprobs import TokenLogprobs

if TYPE_CHECKING:
    from tokenmill.kernels.sampling import Drawn

_MASK = 0xFFFFFFFF
#: Instead of a token, where the logits are no numbers, or none is left to choose.
NO_TOKEN = -1


def sample(
    logits: torch.Tensor, seqs: Seq[Sequence], eos_token_ids: Collection[int]
) -> tuple[list[int], list[TokenLogprobs | None]]:
    """The next token of each sequence, and its log probabilities where they are asked for.

    The token is `NO_TOKEN` where the highest logit is not finite.

    `logits` [L, V] float32 are changed. On a CPU rows are taken in slices, so that what is
    allocated beside them does not grow with the batch; on a GPU the host would wait for each.
    """
    tokens: list[int] = []
    logprobs: list[TokenLogprobs | None] = []
    step = max(1, len(seqs) if logits.is_cuda else SLICE_ELEMENTS // logits.shape[1])
    for start in range(0, len(seqs), step):
        rows, part = logits[start : start + step], seqs[start : start + step]
        asked = [row for row, seq in enumerate(part) if seq.params.logprobs is not None]
        raw = rows[asked] if asked else rows
        chosen = _choose(rows, part, eos_token_ids)
        told: dict[int, TokenLogprobs] = {}
        if asked:
            num_top = [part[row].params.logprobs or 0 for row in asked]
            tokens_asked = [max(chosen[row], 0) for row in asked]
            told = dict(zip(asked, logprobs_of(raw, tokens_asked, num_top), strict=True))
        tokens += chosen
        logprobs += [told.get(row) for row in range(len(part))]
    return tokens, logprobs


def _choose(logits: torch.Tensor, seqs: Seq[Sequence], eos_token_ids: Collection[int]) -> list[int]:
    edit(logits, seqs, eos_token_ids)
    if logits.is_cuda:
        return draw_by_kernel(logits, seqs).tokens.tolist()
    drawn = [row for row, seq in enumerate(seqs) if seq.params.temperature > 0]
    if len(drawn) == len(seqs):
        return _draw(logits, seqs)
    tokens = _highest(logits)
    if drawn:
        for row, token in zip(drawn, _draw(logits[drawn], [seqs[n] for n in drawn]), strict=True):
            tokens[row] = token
    return tokens


def _highest(logits: torch.Tensor) -> list[int]:
    """Of each row of `logits` [R, V], on a CPU, the token of the highest, if that is finite."""
    rows = logits.numpy()  # torch's argmax takes 7 times as long
    found = rows.argmax(axis=-1)
    highest = rows[range(len(rows)), found].tolist()
    return [
        token if math.isfinite(value) else NO_TOKEN
        for token, value in zip(found.tolist(), highest, strict=True)
    ]


def edit(logits: torch.Tensor, seqs: Seq[Sequence], eos_token_ids: Collection[int]) -> None:
    """Change `logits` [R, V] in place as requests ask, before a token is drawn from them."""
    apply_bias(logits, seqs)
    apply_penalties(logits, seqs)
    forbid_early_end(logits, seqs, eos_token_ids)
    apply_constraints(logits, seqs)


def draw_by_kernel(logits: torch.Tensor, seqs: Seq[Sequence]) -> "Drawn":
    """Each sequence's token among `logits` [R, V], and its log probability, on the device.

    Temperature, filters and noise are those of the form in torch; logarithms are the device's.
    """
    from tokenmill.kernels.sampling import sample as draw

    params = [seq.params for seq in seqs]

    def column(values: list[Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        # A tensor of its own: for pointers that are no multiples of 16 kernels are compiled anew.
        return to_device(torch.tensor(values, dtype=dtype), logits.device)

    return draw(
        logits,
        temperature=column([p.temperature for p in params]),
        top_k=column([p.top_k for p in params], torch.int32),
        top_p=column([p.top_p for p in params]),
        min_p=column([p.min_p for p in params]),
        seeds=column([signed64(seq.seed) for seq in seqs], torch.int64),
        positions=column([seq.num_tokens for seq in seqs], torch.int64),
        is_filtered=any(p.is_ranked for p in params),
    )


def _draw(logits: torch.Tensor, seqs: Seq[Sequence]) -> list[int]:
    """The argmax of scaled and filtered logits [R, V] plus Gumbel noise."""
    scaled = _scaled(logits, seqs)
    if cpu_ops.can_draw(scaled):
        return cpu_ops.draw(scaled, [noise_key(seq.seed, seq.num_tokens) for seq in seqs])
    return _highest(gumbel_noise(seqs, scaled.shape[1], scaled.device).add_(scaled))


def _scaled(logits: torch.Tensor, seqs: Seq[Sequence]) -> torch.Tensor:
    """Logits [R, V] by temperature, less what filters leave out."""
    temperature = logits.new_tensor([s.params.temperature for s in seqs])
    # The largest becomes 0, so that no temperature, however small, makes it overflow.
    logits = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperature.clamp(min=1e-6)[:, None])
    filtered = [
        row
        for row, seq in enumerate(seqs)
        if seq.params.top_k or seq.params.top_p < 1 or seq.params.min_p > 0
    ]
    if len(filtered) == len(seqs):
        keep_likely(logits, seqs)
    elif filtered:
        index = torch.tensor(filtered, device=logits.device)
        logits[index] = keep_likely(logits[index], [seqs[row] for row in filtered])
    return logits


def gumbel_noise(seqs: Seq[Sequence], vocabulary: int, device: torch.device) -> torch.Tensor:
    """Standard Gumbel noise [R, V] float32, keyed by (seed, position, token id)."""
    keys = [noise_key(seq.seed, seq.num_tokens) for seq in seqs]
    low = torch.tensor([_signed(k & _MASK) for k in keys], dtype=torch.int32, device=device)
    high = torch.tensor([_signed(k >> 32) for k in keys], dtype=torch.int32, device=device)
    token = torch.arange(vocabulary, dtype=torch.int32, device=device)[None, :]
    return gumbel_of(_mix32(_mix32(token ^ low[:, None]) + high[:, None]))


def gumbel_of(bits: torch.Tensor) -> torch.Tensor:
    """Gumbel noise from random int32: always finite, as 23 bits and a half are exact in float32."""
    uniform = ((bits >> 9) & 0x7FFFFF).float().add_(0.5).mul_(2.0**-23)  # never 0, never 1
    return uniform.log_().neg_().log_().neg_()


def noise_key(seed: int, position: int) -> int:
    """64 well-mixed bits of (seed, position): splitmix64's finaliser, twice."""
    return _mix64(_mix64(seed) + position * 0x9E3779B97F4A7C15)


def _mix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & (2**64 - 1)
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return value ^ (value >> 31)


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's 32-bit finaliser on int32, shifts made logical by masks."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _signed(0x85EBCA6B)
    x = x ^ ((x >> 13) & 0x7FFFF)
    x = x * _signed(0xC2B2AE35)
    return x ^ ((x >> 16) & 0xFFFF)


def signed64(value: int) -> int:
    """The 64 bits of `value`, as those of a signed number."""
    return ((value + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
