"""What numba has no words for: fixed vectors of float32, in LLVM's instructions.

Each function works on memory at addresses (int64). The order of every sum is fixed by its code, and
fused multiply-adds are said outright, so that a result's bits depend on nothing but its inputs.
"""

import inspect
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

#: Elements of a vector; on processors with shorter ones LLVM takes several.
WIDTH = 16
#: Rows that a product takes at a time.
ROWS = 4

FLOAT, INT, INDEX = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VECTOR, INTS = ir.VectorType(FLOAT, WIDTH), ir.VectorType(INT, WIDTH)
_LOG2_E, _LN2_HIGH, _LN2_LOW = 1.44269504088896341, 0.693359375, -2.12194440e-4
#: exp(r) = 1 + r + r^2 p(r) for |r| <= ln(2) / 2, from Cephes' expf.
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
#: Where exp would leave the normal numbers.
_LEAST, _MOST = -87.0, 88.0


class Emitter:
    """Shorthand for the instructions that the functions below share."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def pointer(self, address: Any, offset: int = 0, *, kind: ir.Type = VECTOR) -> Any:
        """Of `kind` at `address` plus `offset` floats."""
        address = self.builder.add(address, INDEX(4 * offset)) if offset else address
        return self.builder.inttoptr(address, kind.as_pointer())

    def load(self, address: Any, offset: int = 0) -> Any:
        return self.builder.load(self.pointer(address, offset), align=4)

    def store(self, vector: Any, address: Any, offset: int = 0) -> None:
        self.builder.store(vector, self.pointer(address, offset), align=4)

    def ask_for(self, address: Any, offset: int = 0) -> None:
        """Have the cache line at `address` brought to the second-level cache."""
        module, name = self.builder.module, "llvm.prefetch.p0"
        bytes_at = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [bytes_at, INT, INT, INT])
        found = module.globals.get(name) or ir.Function(module, kind, name)
        line = self.pointer(address, offset, kind=ir.IntType(8))
        self.builder.call(found, [line, INT(0), INT(2), INT(1)])

    def spread(self, address: Any, offset: int = 0) -> Any:
        """The float at `address` in every element."""
        value = self.builder.load(self.pointer(address, offset, kind=FLOAT), align=4)
        return self.splat(value)

    def splat(self, value: Any) -> Any:
        undefined = ir.Constant(VECTOR, ir.Undefined)
        first = self.builder.insert_element(undefined, value, INT(0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(INTS, [0] * WIDTH))

    def of(self, value: float) -> Any:
        return ir.Constant(VECTOR, [value] * WIDTH)

    def call(self, name: str, *vectors: Any) -> Any:
        module = self.builder.module
        kind = ir.FunctionType(VECTOR, [VECTOR] * len(vectors))
        name = f"llvm.{name}.v{WIDTH}f32"
        found = module.globals.get(name) or ir.Function(module, kind, name)
        return self.builder.call(found, vectors)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Multiply a and b and add c, rounded once."""
        return self.call("fma", a, b, c)

    def step(self, address: Any, floats: Any) -> Any:
        return self.builder.add(address, self.builder.mul(floats, INDEX(4)))

    def loop(
        self, count: Any, state: list[Any], body: Callable[[Any, list[Any]], list[Any]]
    ) -> Any:
        """Run body(number, state) `count` times (at least once); returns the last state."""
        before = self.builder.block
        inside = self.builder.append_basic_block("loop")
        after = self.builder.append_basic_block("after")
        self.builder.branch(inside)
        self.builder.position_at_end(inside)
        number = self.builder.phi(INDEX)
        number.add_incoming(INDEX(0), before)
        carried = [self.builder.phi(value.type) for value in state]
        for phi, value in zip(carried, state, strict=True):
            phi.add_incoming(value, before)
        new = body(number, list(carried))
        following = self.builder.add(number, INDEX(1))
        end = self.builder.block
        number.add_incoming(following, end)
        for phi, value in zip(carried, new, strict=True):
            phi.add_incoming(value, end)
        self.builder.cbranch(self.builder.icmp_signed("<", following, count), inside, after)
        self.builder.position_at_end(after)
        return new

    def reduced(self, vector: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """One number from all elements, always in the same order."""
        width = WIDTH
        while width > 1:
            width //= 2
            mask = ir.Constant(INTS, [(n + width) % WIDTH for n in range(WIDTH)])
            vector = combine(vector, self.builder.shuffle_vector(vector, vector, mask))
        return self.builder.extract_element(vector, INT(0))

    def larger(self, a: Any, b: Any) -> Any:
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def exp(self, x: Any) -> Any:
        """Below `_LEAST` 0, from `_MOST` on that of `_MOST`."""
        is_least = self.builder.fcmp_ordered("<", x, self.of(_LEAST))
        is_most = self.builder.fcmp_ordered(">", x, self.of(_MOST))
        x = self.builder.select(is_most, self.of(_MOST), x)
        power = self.call("floor", self.fma(x, self.of(_LOG2_E), self.of(0.5)))
        rest = self.fma(power, self.of(-_LN2_HIGH), x)
        rest = self.fma(power, self.of(-_LN2_LOW), rest)
        value = self.of(_EXP[0])
        for factor in _EXP[1:]:
            value = self.fma(value, rest, self.of(factor))
        value = self.fma(value, self.builder.fmul(rest, rest), rest)
        value = self.builder.fadd(value, self.of(1.0))
        whole = self.builder.fptosi(power, INTS)
        shifted = self.builder.shl(
            self.builder.add(whole, ir.Constant(INTS, [127] * WIDTH)),
            ir.Constant(INTS, [23] * WIDTH),
        )
        value = self.builder.fmul(value, self.builder.bitcast(shifted, VECTOR))
        return self.builder.select(is_least, self.of(0.0), value)


def as_function(emit: Callable[..., Any], result: Any, num_arguments: int) -> Any:
    """`emit(emitter, *values)` as a function of int64 that numba can call."""
    signature = result(*[types.int64] * num_arguments)

    def codegen(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        returned = emit(Emitter(builder), *values)
        return context.get_dummy_value() if result is types.void else returned

    def typed(_context: Any, *_arguments: Any) -> Any:
        return signature, codegen

    names = ["context", *(f"a{number}" for number in range(num_arguments))]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typed.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, kind) for name in names]
    )
    return intrinsic(typed)


def product(vectors: int, *, is_added: bool) -> Any:
    """Of (a, a_stride, b, b_stride, c, c_stride, count): addresses, and strides in floats.

    c [4, 16 * vectors] = a [4, count] @ b [count, 16 * vectors], summed up in order; or += that.
    """

    def emit(
        e: Emitter,
        a: Any,
        a_stride: Any,
        b: Any,
        b_stride: Any,
        c: Any,
        c_stride: Any,
        count: Any,
    ) -> None:
        rows, outs = [a], [c]
        for _ in range(ROWS - 1):
            rows.append(e.step(rows[-1], a_stride))
            outs.append(e.step(outs[-1], c_stride))
        sums = [
            e.load(out, WIDTH * n) if is_added else e.of(0.0)
            for out in outs
            for n in range(vectors)
        ]

        def add(number: Any, state: list[Any]) -> list[Any]:
            b_row, *sums = state
            loaded = [e.load(b_row, WIDTH * n) for n in range(vectors)]
            new = [e.step(b_row, b_stride)]
            for row in range(ROWS):
                factor = e.spread(e.step(rows[row], number))
                new += [e.fma(factor, loaded[n], sums[row * vectors + n]) for n in range(vectors)]
            return new

        _, *sums = e.loop(count, [b, *sums], add)
        for place, value in enumerate(sums):
            e.store(value, outs[place // vectors], WIDTH * (place % vectors))

    return as_function(emit, types.void, 7)


def _gate(e: Emitter, gate: Any, up: Any, target: Any, count: Any) -> None:
    def body(number: Any, state: list[Any]) -> list[Any]:
        offset = e.builder.mul(number, INDEX(WIDTH))
        z = e.load(e.step(gate, offset))
        below = e.builder.fadd(e.exp(e.builder.fneg(z)), e.of(1.0))
        gated = e.builder.fmul(e.builder.fdiv(z, below), e.load(e.step(up, offset)))
        e.store(gated, e.step(target, offset))
        return state

    e.loop(count, [], body)


#: Of (gate, up, target, count): target = silu(gate) * up, of `count` vectors.
gate_silu = as_function(_gate, types.void, 4)


def _sum_of_squares(e: Emitter, row: Any, count: Any) -> Any:
    def add(number: Any, state: list[Any]) -> list[Any]:
        part = e.load(e.step(row, e.builder.mul(number, INDEX(WIDTH))))
        return [e.fma(part, part, state[0])]

    (squares,) = e.loop(count, [e.of(0.0)], add)
    return e.reduced(squares, e.builder.fadd)


#: Of (row, count): the sum of the squares of the `count` vectors at `row`.
sum_of_squares = as_function(_sum_of_squares, types.float32, 2)


def turned(e: Emitter, rows: list[Any]) -> list[Any]:
    """The columns of a matrix [16, 16] of its rows."""
    half = WIDTH // 2
    # Four times: interleaving the halves of a matrix's rows turns the bits of (row, column) by one.
    low = ir.Constant(INTS, [n // 2 + (n % 2) * WIDTH for n in range(WIDTH)])
    high = ir.Constant(INTS, [half + n // 2 + (n % 2) * WIDTH for n in range(WIDTH)])
    for _ in range(WIDTH.bit_length() - 1):
        rows = [
            e.builder.shuffle_vector(rows[n], rows[n + half], mask)
            for n in range(half)
            for mask in (low, high)
        ]
    return rows


def _transpose(e: Emitter, source: Any, stride: Any, target: Any, target_stride: Any) -> None:
    rows = []
    for _ in range(WIDTH):
        rows.append(e.load(source))
        source = e.step(source, stride)
    for row in turned(e, rows):
        e.store(row, target)
        target = e.step(target, target_stride)


#: Of (source, stride, target, target_stride): target [16, 16] = source [16, 16] transposed.
transpose = as_function(_transpose, types.void, 4)


def _pointers(kind: Any, element: ir.Type) -> Any:
    """Of an address: the pointer to elements there, from which numba makes an array."""

    def codegen(_context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        return Emitter(builder).pointer(values[0], kind=element)

    def typed(context: Any, address: Any) -> Any:  # noqa: ARG001 (numba reads the names)
        return types.CPointer(kind)(types.int64), codegen

    return intrinsic(typed)


floats, int32s = _pointers(types.float32, FLOAT), _pointers(types.int32, INT)
int64s = _pointers(types.int64, INDEX)


def _fetch_add(e: Emitter, address: Any, number: Any) -> Any:
    return e.builder.atomic_rmw("add", e.pointer(address, kind=INDEX), number, "monotonic")


#: Of (address, number): adds to the int64 there, for all threads at once; returns what it was.
fetch_add = as_function(_fetch_add, types.int64, 2)


def _call(e: Emitter, function: Any, data: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [INDEX]).as_pointer()
    e.builder.call(e.builder.inttoptr(function, kind), [data])


#: Of (function, data): calls the C function of one int64 at an address.
call = as_function(_call, types.void, 2)


def _ask(e: Emitter, function: Any) -> Any:
    kind = ir.FunctionType(INT, []).as_pointer()
    return e.builder.sext(e.builder.call(e.builder.inttoptr(function, kind), []), INDEX)


#: Of (function): what the C function at an address returns, an int; it takes nothing.
ask = as_function(_ask, types.int64, 1)


def _arrive(e: Emitter, address: Any) -> None:
    e.builder.atomic_rmw("add", e.pointer(address, kind=INDEX), INDEX(1), "release")


#: Of (address): adds 1 to the int64 there; who sees it sees all that was written before.
arrive = as_function(_arrive, types.void, 1)


def _seen(e: Emitter, address: Any) -> Any:
    return e.builder.load_atomic(e.pointer(address, kind=INDEX), "acquire", 8)


#: Of (address): the int64 there, after what others wrote before they changed it.
seen = as_function(_seen, types.int64, 1)


def _pause(e: Emitter) -> None:
    kind = ir.FunctionType(ir.VoidType(), [])
    name = "llvm.x86.sse2.pause"
    e.builder.call(
        e.builder.module.globals.get(name) or ir.Function(e.builder.module, kind, name), []
    )


#: Of nothing: what a processor should do in a loop that waits for another.
pause = as_function(_pause, types.void, 0)


def _cycles(e: Emitter) -> Any:
    module, name = e.builder.module, "llvm.readcyclecounter"
    kind = ir.FunctionType(INDEX, [])
    return e.builder.call(module.globals.get(name) or ir.Function(module, kind, name), [])


#: Of nothing: the processor's counter of cycles, which goes at one speed.
cycles = as_function(_cycles, types.int64, 0)
