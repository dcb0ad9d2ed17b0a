"""`LayerProgram`: the layers of a model as one program of compiled functions, for a CPU.

Where every part of every layer has a compiled kernel, a step's layers are one start of all threads,
in memory that stays. They are the kernels that the decoder calls one by one for other models, so
the bits are the same; what falls away is Python between them, and the waking of threads. Of the
last layer, keys and values are computed of all tokens, the rest of those alone whose logits are
wanted. Steps with adapters have a program of their own, in which what they add follows each linear.

Imported only where there are such kernels, as it brings numba.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from tokenmill.engine.batch import RaggedBatch
from tokenmill.engine.kv_cache import KVCache
from tokenmill.engine.models.linear import Linear
from tokenmill.engine.models.mlp import MLP
from tokenmill.engine.models.norm import Norm
from tokenmill.engine.models.spec import ModelSpec
from tokenmill.engine.models.wanted_rows import WantedRows
from tokenmill.engine.models.weights import LayerWeights
from tokenmill.kernels import compiled_attention, compiled_rows
from tokenmill.kernels.int8_vectors import code_bytes
from tokenmill.kernels.pages import bring_in
from tokenmill.kernels.parallel import Call
from tokenmill.kernels.program import Program
from tokenmill.kernels.vectors import WIDTH

if TYPE_CHECKING:
    from tokenmill.engine.models.adapter_places import AdapterPlaces

#: Rows that there is memory for at first; then twice as many, until a step fits. A kernel may fill
#: up those of a step to a multiple of 4.
_FEWEST_ROWS = 64
#: Blocks of the cache that are brought to memory together, before they are used.
_BLOCKS = 16
#: The part that counts rows which are wrong.
_ROTATION = "rope and KV write"
#: What is put before the names of numbers that say the same of wanted rows as of all.
_WANTED = "wanted "
#: The part that steps without adapters do not have.
_ADAPTERS = "adapters"

#: With the name of the part that each call is of.
_Parts = tuple[Program, list[str]]


class _Activations:
    """The rows of a step, [R, width] each."""

    def __init__(self, spec: ModelSpec, num_rows: int) -> None:
        hidden, inner = spec.hidden_size, spec.intermediate_size
        self.num_rows = num_rows
        zeros = partial(torch.zeros, dtype=torch.float32)
        self.residual = zeros(num_rows, hidden)
        self.hidden = zeros(num_rows, hidden)
        self.qkv = zeros(num_rows, spec.q_size + 2 * spec.kv_size)
        self.attended = zeros(num_rows, spec.q_size)
        self.wanted_q = zeros(num_rows, spec.q_size)
        self.wanted_residual = zeros(num_rows, hidden)
        self.added = zeros(num_rows, hidden)
        self.gate_up = zeros(num_rows, 2 * inner)
        self.inner = zeros(num_rows, inner)
        widest = max(hidden, inner, spec.q_size)
        self.codes = torch.zeros(code_bytes(num_rows, widest), dtype=torch.uint8)
        heads = self.qkv.view(num_rows, -1, spec.head_dim)
        sizes = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
        self.q, self.k, self.v = heads.split_with_sizes(sizes, dim=1)


class LayerProgram:
    """Of one model and one cache, for layers of which `can_run` says yes."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: list[LayerWeights],
        cos_sin: list[torch.Tensor],
        cache: KVCache,
    ) -> None:
        self.cache = cache
        self._spec = spec
        self._layers = layers
        self._cos_sin = cos_sin
        self._num_blocks_used = 0
        #: From the first step with adapters on: it brings a kernel to load.
        self._places: AdapterPlaces | None = None
        self._allocate(_FEWEST_ROWS)

    def run(self, batch: RaggedBatch, embedded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """From `embedded` [T, H] to what the last layer adds to wanted rows, and their residual.

        Both are [L, H], and valid until the next run.

        Raises:
            IndexError: positions that the model lacks, or slots that the cache lacks.
        """
        count, num_rows = len(embedded), self._made[0].num_rows
        while num_rows < count:
            num_rows *= 2
        if num_rows > self._made[0].num_rows:
            self._allocate(num_rows)
        rows, keys = self._made[0], self.cache.keys[0]
        program, parts = self._ran = self._program(is_adapted=bool(batch.adapted))
        rows.residual[:count] = embedded
        self._use_blocks(int(batch.slot_mapping.max()) // keys.shape[1] + 1)
        wanted = WantedRows.of(batch)
        held: list[object] = []
        step = partial(compiled_attention.step_values, rows.q, keys, held=held)
        of_all = step(batch.cu_seqlens_q, batch.context_lens, batch.block_tables)
        of_wanted = (
            of_all if wanted.are_all else step(wanted.starts, wanted.contexts, wanted.tables)
        )
        of_all |= {"rows": count}
        of_wanted = of_wanted | {"rows": len(wanted.places)}
        if self._places and batch.adapted:
            adapted, adapted_wanted = self._places.of_step(batch.adapted, wanted)
            of_all |= adapted.numbers
            of_wanted |= adapted_wanted.numbers
        program.run(
            {
                **of_all,
                **{_WANTED + name: value for name, value in of_wanted.items()},
                "positions": batch.positions.data_ptr(),
                "slots": batch.slot_mapping.data_ptr(),
                "places": wanted.places.data_ptr(),
            }
        )
        num_wrong = program.counted(parts.index(_ROTATION))  # all its like find the same
        if num_wrong:
            wrong = compiled_rows.wrong_rows(num_wrong, count, self._cos_sin[-1], keys)
            raise IndexError(wrong)
        given = batch.logits_indices if wanted.are_all else slice(len(batch.logits_indices))
        return rows.added[given], rows.wanted_residual[given]

    def _use_blocks(self, count: int) -> None:
        """Have at least the first `count` blocks in memory: the cache's pages are fresh."""
        if count > self._num_blocks_used:
            new = slice(self._num_blocks_used, count + _BLOCKS)
            for tensor in (*self.cache.keys, *self.cache.values):
                bring_in(tensor[new])
            self._num_blocks_used = count + _BLOCKS

    def part_shares(self) -> dict[str, float]:
        """Of the last run's time, the share of each part."""
        program, parts = self._ran
        shares: dict[str, float] = dict.fromkeys(parts, 0.0)
        for part, share in zip(parts, program.shares(), strict=True):
            shares[part] += share
        return shares

    def _allocate(self, num_rows: int) -> None:
        """New memory for rows, and a program of its addresses: both or neither."""
        with torch.inference_mode(mode=False):
            rows = _Activations(self._spec, num_rows)
        plain = self._new_program(rows, is_adapted=False)
        # In one assignment: a program whose rows have gone would write to memory of others.
        self._made: tuple[_Activations, dict[bool, _Parts]] = rows, {False: plain}
        self._ran = plain

    def _program(self, *, is_adapted: bool) -> _Parts:
        rows, programs = self._made
        if is_adapted and self._places is None:
            from tokenmill.engine.models.adapter_places import AdapterPlaces

            self._places = AdapterPlaces(self._layers)
        if is_adapted not in programs:
            programs[is_adapted] = self._new_program(rows, is_adapted=is_adapted)
        return programs[is_adapted]

    def _new_program(self, rows: _Activations, *, is_adapted: bool) -> _Parts:
        named: list[tuple[str, Call]] = []
        last = len(self._layers) - 1
        for number in range(last + 1):
            named += self._key_calls(number, rows)
            named += self._rest_calls(number, rows) if number < last else self._last_calls(rows)
        chosen = [one for one in named if is_adapted or one[0] != _ADAPTERS]
        return Program([call for _, call in chosen]), [part for part, _ in chosen]

    def _key_calls(self, number: int, rows: _Activations) -> Iterator[tuple[str, Call]]:
        """Of a layer up to the queries, and to keys and values in the cache."""
        layer = self._layers[number]
        if number:
            norm = _norm_call(layer.attention_norm, rows.added, rows.residual, rows.hidden, "rows")
        else:
            norm = _norm_call(layer.attention_norm, rows.residual, None, rows.hidden, "rows")
        yield "norms", norm
        yield from self._linear_calls(layer.qkv, rows.hidden, rows.qkv, rows, "")
        keys, values = self.cache.keys[number], self.cache.values[number]
        rotated = (rows.q, rows.k, rows.v, self._cos_sin[number], keys, values)
        yield _ROTATION, compiled_rows.rope_call(*rotated, "rows", "positions", "slots")

    def _last_calls(self, rows: _Activations) -> Iterator[tuple[str, Call]]:
        """`_rest_calls` of the last layer, for wanted rows alone."""
        q = rows.q.flatten(1)
        for x, y in ((q, rows.wanted_q), (rows.residual, rows.wanted_residual)):
            yield "picking wanted rows", compiled_rows.pick_call(x, y, _WANTED + "rows", "places")
        yield from self._rest_calls(len(self._layers) - 1, rows, _WANTED)

    def _rest_calls(
        self, number: int, rows: _Activations, which: str = ""
    ) -> Iterator[tuple[str, Call]]:
        """From queries to what the MLP adds; `which`: before the names of numbers of these rows."""
        spec, layer, mlp = self._spec, self._layers[number], self._layers[number].mlp
        if not isinstance(mlp, MLP):
            raise TypeError("layers of experts have no program")
        q, residual, count = rows.q, rows.residual, which + "rows"
        if which:
            q, residual = rows.wanted_q.view(q.shape), rows.wanted_residual
        yield (
            "attention",
            compiled_attention.attention_call(
                q,
                self.cache.keys[number],
                self.cache.values[number],
                rows.attended.view(q.shape),
                spec.attention_scale,
                spec.windows[number],
                [which + name for name in compiled_attention.STEP_VALUES],
            ),
        )
        yield from self._linear_calls(layer.attention_out, rows.attended, rows.added, rows, which)
        yield "norms", _norm_call(layer.mlp_norm, rows.added, residual, rows.hidden, count)
        yield from self._linear_calls(mlp.up, rows.hidden, rows.gate_up, rows, which)
        yield "MLP's activation", compiled_rows.gate_call(rows.gate_up, rows.inner, count)
        yield from self._linear_calls(mlp.down, rows.inner, rows.added, rows, which)

    def _linear_calls(
        self, linear: Linear, x: torch.Tensor, y: torch.Tensor, rows: _Activations, which: str
    ) -> Iterator[tuple[str, Call]]:
        """A linear, and what adapters add to it."""
        for call in linear.calls(x, y, rows.codes, which + "rows"):
            yield "linears", call
        if self._places:
            yield _ADAPTERS, self._places.call(linear, x, y, which)


def _norm_call(
    norm: Norm | None, x: torch.Tensor, residual: torch.Tensor | None, y: torch.Tensor, count: str
) -> Call:
    if norm is None:
        raise TypeError("layers without a norm have no program")
    return compiled_rows.norm_call(x, residual, norm.weight, norm.eps, y, count)


def can_run(spec: ModelSpec, layers: list[LayerWeights], cache: KVCache) -> bool:
    """Whether each part of each layer is one that `LayerProgram` has a compiled function for."""
    is_plain = not (spec.parallel or spec.attention_softcap or spec.activation != "silu")
    widths = (spec.head_dim, spec.hidden_size, spec.intermediate_size)
    is_held = cache.keys[0].dtype in (torch.float32, torch.bfloat16)
    fits = is_held and all(width % WIDTH == 0 for width in widths)
    return is_plain and fits and all(_has_calls(layer) for layer in layers)


def _has_calls(layer: LayerWeights) -> bool:
    norms = layer.norms()
    if norms.keys() != {"attention_norm", "mlp_norm"} or not isinstance(layer.mlp, MLP):
        return False
    linears = (layer.qkv, layer.attention_out, layer.mlp.up, layer.mlp.down)
    return (
        layer.mlp.gated
        and all(norm.bias is None for norm in norms.values())
        and all(linear.has_calls for linear in linears)
    )
