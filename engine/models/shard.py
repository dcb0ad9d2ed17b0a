"""`Shard`: the part of a model that one rank of a tensor-parallel group holds.

As in Megatron-LM (arXiv 1909.08053): a linear whose output is divided is followed by one whose
input is, so that attention and MLP give partial sums, each of which is added up once.

| tensor            | divided                                                            |
| ----------------- | ------------------------------------------------------------------ |
| embedding, head   | by rows: tokens of the vocabulary                                  |
| q, k, v           | by rows: KV heads, each with its query heads; with fewer KV heads  |
|                   | than ranks a KV head is held by several, its query heads divided   |
| attention_out     | by columns: the query heads                                        |
| gate, up          | by rows: inner channels, of every expert too                       |
| down              | by columns: inner channels                                         |
| biases            | with their rows; of a sum on rank 0 alone                          |
| norms, router,    | not: every rank has them                                           |
| learned positions |                                                                    |

Parts need not be equal: 3 KV heads on 2 ranks are 2 and 1. A step takes as long as the largest.
"""

from dataclasses import dataclass, replace

from tokenmill.engine.models.spec import ModelSpec
from tokenmill.producer.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Cut:
    """Places [start, stop) of the `total` along a dimension of a stored tensor."""

    dim: int
    start: int
    stop: int
    total: int


@dataclass(frozen=True, slots=True)
class Shard:
    """Part `rank` of `size`; the only one of one is the whole model."""

    rank: int = 0
    size: int = 1

    def part(self, total: int) -> range:
        """The share of `total` things; shares differ by one at most."""
        return range(total * self.rank // self.size, total * (self.rank + 1) // self.size)

    def heads(self, whole: ModelSpec) -> tuple[range, range]:
        """Query heads and KV heads; the former attend to the latter in equal groups."""
        group = whole.num_heads // whole.num_kv_heads
        if whole.num_kv_heads >= self.size:
            kv = self.part(whole.num_kv_heads)
            return range(kv.start * group, kv.stop * group), kv
        copies = self.size // whole.num_kv_heads
        number, among = divmod(self.rank, copies)
        own = Shard(among, copies).part(group)
        first = number * group
        return range(first + own.start, first + own.stop), range(number, number + 1)

    def spec(self, whole: ModelSpec) -> ModelSpec:
        """The model as this rank computes it; `vocab_size` stays that of the whole.

        Raises:
            InvalidRequest: it cannot be divided among so many.
        """
        if self.size == 1:
            return whole
        self._check(whole)
        q, kv = self.heads(whole)
        moe = whole.moe
        return replace(
            whole,
            num_heads=len(q),
            num_kv_heads=len(kv),
            intermediate_size=len(self.part(whole.intermediate_size)),
            moe=moe
            and replace(
                moe,
                intermediate_size=len(self.part(moe.intermediate_size)),
                shared_intermediate_size=len(self.part(moe.shared_intermediate_size)),
            ),
        )

    def _check(self, whole: ModelSpec) -> None:
        heads, kv_heads = whole.num_heads, whole.num_kv_heads
        possible = [n for n in range(1, heads + 1) if _divides(n, heads, kv_heads)]
        if self.size not in possible:
            raise InvalidRequest(
                "tensor_parallel_size",
                f"one of {', '.join(map(str, possible))}, as the model has {heads} heads and "
                f"{kv_heads} KV heads",
                self.size,
            )
        inner = [whole.intermediate_size]
        if whole.moe:
            inner += [whole.moe.intermediate_size, whole.moe.shared_intermediate_size]
        least = min([whole.vocab_size, *filter(None, inner)])
        if least < self.size:
            raise InvalidRequest(
                "tensor_parallel_size", f"at most the model's smallest width, {least}", self.size
            )

    def cut(self, place: str, whole: ModelSpec) -> Cut | None:
        """What this rank holds of the tensor of a place (`weight_map.py`); None: all of it."""
        if self.size == 1:
            return None
        *path, name, kind = place.split(".")
        if name in ("embedding", "lm_head"):
            return _cut(0, self.part(whole.vocab_size), whole.vocab_size)
        if name in ("gate", "up", "down"):
            inner = _inner_size(path, whole)
            if name != "down":
                return _cut(0, self.part(inner), inner)
            return _cut(1, self.part(inner), inner) if kind == "weight" else None
        is_norm = name in ("q_norm", "k_norm")
        if is_norm and whole.qk_norm != "whole":
            return None
        q, kv = self.heads(whole)
        if name in ("k", "v", "k_norm"):
            return _cut(0, kv, whole.num_kv_heads, whole.head_dim)
        if name in ("q", "q_norm"):
            return _cut(0, q, whole.num_heads, whole.head_dim)
        if name == "attention_out" and kind == "weight":
            return _cut(1, q, whole.num_heads, whole.head_dim)
        return None

    def lacks(self, place: str) -> bool:
        """Whether another rank alone has the tensor: a sum gets its bias once."""
        return self.rank > 0 and place.endswith(("attention_out.bias", "down.bias"))


#: All of a model.
WHOLE = Shard()


def _divides(size: int, heads: int, kv_heads: int) -> bool:
    """At least one head each; a KV head is whole on one rank, or on the same number as all."""
    return size <= kv_heads or (size % kv_heads == 0 and size <= heads)


def _inner_size(path: list[str], whole: ModelSpec) -> int:
    moe = whole.moe
    if moe is not None and "experts" in path:
        return moe.intermediate_size
    if moe is not None and "shared" in path:
        return moe.shared_intermediate_size
    return whole.intermediate_size


def _cut(dim: int, part: range, total: int, width: int = 1) -> Cut:
    return Cut(dim, part.start * width, part.stop * width, total * width)
