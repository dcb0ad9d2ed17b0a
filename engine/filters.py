"""`keep_likely`: top_k, top_p and min_p, by one threshold a row and without sorting the vocabulary.

On a CPU that is `compiled_filter.py`, where it takes the logits; the rest here is for others.

What is kept is always all tokens at least as likely as some token, so tokens that tie with the
last one kept are kept as well, and the order of a sort never matters.
"""

from collections.abc import Sequence as Seq

import torch

from tokenmill.engine.logprobs import logsumexp
from tokenmill.engine.sequence import Sequence
from tokenmill.kernels import cpu_ops

#: Likeliest tokens among which the threshold is looked for, and then, where it lies below, more of
#: them; what is left is sorted. Of most rows the first are enough, and take a third of the time.
HEADS = (64, 512)


def keep_likely(logits: torch.Tensor, seqs: Seq[Sequence]) -> torch.Tensor:
    """Set what top_k, top_p and min_p leave out of `logits` [R, V] to -inf, and return them.

    top_k first, then top_p over what is left, renormalised; min_p is relative to the likeliest.
    The likeliest token always stays.
    """
    vocabulary = logits.shape[1]
    if cpu_ops.can_filter(logits):
        params = [seq.params for seq in seqs]
        cpu_ops.keep_likely(logits, [(p.top_k or vocabulary, p.top_p, p.min_p) for p in params])
        return logits

    def column(values: list[float]) -> torch.Tensor:
        return logits.new_tensor(values)[:, None]

    top_k = column([float(min(s.params.top_k or vocabulary, vocabulary)) for s in seqs])
    # Rounded sums reach 1 before the last token does: a top_p of 1 must drop nothing.
    top_p = column([s.params.top_p if s.params.top_p < 1 else torch.inf for s in seqs])
    min_p = column([s.params.min_p for s in seqs])
    lowest = logits.amax(dim=-1, keepdim=True) + min_p.log()
    ranked = any(s.params.top_k or s.params.top_p < 1 for s in seqs)
    if ranked:
        lowest = torch.maximum(lowest, _ranked_threshold(logits, top_k, top_p))
    return logits.masked_fill_(logits < lowest, -torch.inf)


def _ranked_threshold(
    logits: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> torch.Tensor:
    """The lowest logit [R, 1] that top_k and top_p keep; columns [R, 1], top_p inf for none."""
    vocabulary = logits.shape[1]
    total = logsumexp(logits)
    threshold = torch.empty_like(total)
    left = torch.arange(len(logits), device=logits.device)
    for size in (*(size for size in HEADS if size < vocabulary), vocabulary):
        rows = logits if len(left) == len(logits) else logits[left]
        is_whole = size == vocabulary
        ranked = (rows.sort(descending=True) if is_whole else rows.topk(size)).values
        threshold[left], is_inside = _threshold(
            ranked, total[left], top_k[left], top_p[left], vocabulary
        )
        left = left[~is_inside]
        if not len(left):
            break
    return threshold


def _threshold(
    ranked: torch.Tensor,
    total: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    vocabulary: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Threshold [R, 1], and whether [R] it can be known from the first logits `ranked` [R, K]."""
    size = ranked.shape[1]
    beyond = torch.arange(size, device=ranked.device)[None, :] >= top_k
    kept = ranked.masked_fill(beyond, -torch.inf)
    # Renormalised over the k likeliest; exact only where all of those are here.
    total = torch.where(top_k < vocabulary, logsumexp(kept), total)
    reached = (kept - total).exp().cumsum(dim=-1)
    # A token is kept while those before it have not reached top_p: the first one always is.
    count = (reached < top_p).sum(dim=-1, keepdim=True) + 1
    count = torch.minimum(count, top_k.long())
    is_inside = (count <= size) & ((top_k <= size) | (top_k == vocabulary))
    is_inside |= torch.full_like(is_inside, size == vocabulary)
    lowest = ranked.gather(1, count.clamp(max=size) - 1)
    everything = torch.isinf(top_p) & (top_k >= vocabulary)
    return lowest.masked_fill(everything, -torch.inf), (is_inside | everything).squeeze(1)
