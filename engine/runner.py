"""`Runner`: the forward passes of one rank. What rank 0 runs, it makes the others run with it.

    rank 0   engine -> runner -> message --+--> decoder
    others                                 +--> follow -> runner -> decoder

The ranks meet in the sums of the decoder. Rank 0 gets the logits; the others forget theirs.
"""

from collections.abc import Iterable

import torch

from tokenmill.engine.batch import RaggedBatch
from tokenmill.engine.group import Group
from tokenmill.engine.kv_cache import allocate_kv_cache
from tokenmill.engine.messages import CacheSize, Rows, decode, encode
from tokenmill.engine.models.decoder import Decoder
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.engine.models.weights import ModelWeights


class Runner:
    """A decoder and its KV cache; calls on rank 0 are repeated by the other ranks of the group.

    Raises:
        OutOfMemory: the device has no room for the cache.
        GroupLost: in every call, when another rank has gone, or the ranks are no longer in step.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: ModelWeights,
        size: CacheSize,
        group: Group,
    ) -> None:
        self.device = weights.embedding.device
        self.dtype = weights.embedding.dtype
        self.size = size
        self.vocab_size = spec.vocab_size
        self._group = group
        self._hidden = torch.empty(0)
        with group.together():
            group.send(encode(size))
            self._decoder = Decoder(spec, weights, size.max_model_len, group)
            self._cache = allocate_kv_cache(
                spec,
                size.num_blocks,
                block_size=size.block_size,
                dtype=size.dtype,
                device=self.device,
            )

    def forward(self, batch: RaggedBatch) -> None:
        """Compute one step; `logits` then has those of its wanted tokens."""
        with self._group.together():
            self._group.send(encode(batch))
            self._hidden = self._decoder.forward(batch.to(self.device), self._cache)

    def hidden(self, batch: RaggedBatch) -> torch.Tensor:
        """Compute a step that is on the device of the one rank; last hidden states [L, H]."""
        return self._decoder.forward(batch, self._cache)

    def new_hidden(self, count: int) -> torch.Tensor:
        """Memory for that many last hidden states."""
        width = self._decoder.spec.hidden_size
        return torch.empty(count, width, dtype=self.dtype, device=self.device)

    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] float32 of those."""
        return self._decoder.logits(hidden)

    def narrow_logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same numbers, in 16 bits where there are no more."""
        return self._decoder.narrow_logits(hidden)

    def logits(self, start: int, stop: int) -> torch.Tensor:
        """Logits [stop - start, V] float32 of wanted tokens of the last step."""
        with self._group.together():
            self._group.send(encode(Rows(start, stop)))
            return self._decoder.logits(self._hidden[start:stop])


def follow(spec: ModelSpec, weights: ModelWeights, group: Group, messages: Iterable[bytes]) -> None:
    """Run what rank 0 says until `messages` end: the life of every other rank.

    Raises:
        OutOfMemory: the device has no room for the cache.
        ValueError: a message before the first `CacheSize`.
    """
    runner: Runner | None = None
    for data in messages:
        message = decode(data)
        if isinstance(message, CacheSize):
            runner = Runner(spec, weights, message, group)
        elif runner is None:
            raise ValueError("the first message must be a CacheSize")
        elif isinstance(message, RaggedBatch):
            runner.forward(message)
        else:
            runner.logits(message.start, message.stop)
