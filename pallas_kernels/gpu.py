"""What the Pallas kernels for Hopper GPUs share.

A block of a kernel has warpgroups that compute and one more that copies what they need from global
memory (GMEM) to shared memory (SMEM), from which the matrix units read.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from pallas_kernels.tpu import padded

ROWS = 64
"""Rows of a product of the matrix units, which a warpgroup holds in its registers."""

COMPUTING = 2
"""Warpgroups of a block that compute."""

FEATURES = 64
"""Features are filled up to a multiple of it: 128 bytes, a row of what the copy engine writes."""

REGISTERS, REGISTERS_COPYING = 240, 24
"""Registers of a thread that computes, and of one that copies."""

SMEM_BYTES = 227 * 1024
"""Shared memory of a block."""

PROCESSORS = 132
"""Of a Hopper GPU, H100 (SXM) or H200, the most that one has: see `processors`."""

MATRIX = plgpu.Layout.WGMMA
"""How a matrix lies in the registers of a warpgroup."""

OF_ROWS = MATRIX.reduce(1)
"""How values of the rows of a matrix lie beside it."""

OF_COLUMNS = MATRIX.reduce(0)
"""How values of its columns do."""

LINE = 128
"""Numbers of which each thread of a warpgroup has one."""


def run(
    body: Callable[[Any, Any, Any, dict[str, Array]], None],
    arguments: Any,
    results: Any,
    scratch: Any,
    *,
    name: str,
    grid: dict[str, int],
    exact: bool,
) -> Any:
    """Runs a kernel with `COMPUTING` warpgroups that compute, and one that copies.

    Args:
      body: gets references to the arguments, to the results and to the scratch, and where it is in
        the grid by name; "warpgroup" is one of the names. The last warpgroup is the one to copy.
      arguments: pytree of arrays.
      results: pytree of the results' types.
      scratch: pytree of what a block needs in SMEM, barriers among it.
      name: of the kernel, for reports.
      grid: names and sizes; the first one varies fastest.
      exact: whether the hardware's approximations of functions are too coarse.
    """
    arrays, arguments = jax.tree.flatten(arguments)
    types, results = jax.tree.flatten(results)
    spaces, scratch = jax.tree.flatten(scratch)

    def entry(*refs: Any) -> None:
        place = {axis: jax.lax.axis_index(axis) for axis in (*grid, "warpgroup")}
        ins, outs = refs[: len(arrays)], refs[len(arrays) :]

        def scoped(*spaces: Any) -> None:
            inside = arguments.unflatten(ins), results.unflatten(outs), scratch.unflatten(spaces)
            body(*inside, place)

        pl.run_scoped(scoped, *spaces, collective_axes="warpgroup")

    entry.__name__ = name
    outs = plgpu.kernel(
        entry,
        out_type=types,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=COMPUTING + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=not exact, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
    )(*arrays)
    return results.unflatten(outs)


def processors() -> int:
    """Returns how many the GPU has, if there is one."""
    here = jax.devices()[0] if jax.default_backend() == "gpu" else None
    return min(getattr(here, "core_count", PROCESSORS), PROCESSORS)


class Work(NamedTuple):
    """What the blocks of a kernel have to do, in items."""

    sizes: Mapping[str, int]
    """Names and numbers of what an item is one of; the first one varies fastest."""
    persistent: bool
    """Whether there is a block for each processor, which does several items, one after the other:
    what it copies for the next one comes while it ends the last one."""

    @property
    def count(self) -> int:
        """Returns the number of items."""
        return math.prod(self.sizes.values())

    @property
    def grid(self) -> dict[str, int]:
        """Returns that of the kernel."""
        if self.persistent:
            return {"processor": min(processors(), self.count)}
        return dict(self.sizes)

    def each(
        self,
        place: dict[str, Array],
        visit: Callable[[dict[str, Array], Any], Any],
        carry: Any,
    ) -> Any:
        """Does the items of a block, and returns what was returned for the last one.

        Args:
          place: where the block is in the grid.
          visit: gets the place of an item, and what it returned for the one before.
          carry: what it gets first.
        """
        if not self.persistent:
            return visit(place, carry)
        blocks = self.grid["processor"]

        def turn(i: Array, carry: Any) -> Any:
            # There and back, as items come in the order of how much they are.
            here = place["processor"]
            here = jnp.where(jax.lax.rem(i, 2) == 0, here, blocks - 1 - here)
            rest, item = i * blocks + here, {}
            for name, size in self.sizes.items():
                item[name], rest = jax.lax.rem(rest, size), jax.lax.div(rest, size)
            return visit(item, carry)

        rounds, left = divmod(self.count, blocks)
        here = place["processor"]
        here = blocks - 1 - here if rounds % 2 else here
        return jax.lax.fori_loop(0, rounds + (here < left).astype(jnp.int32), turn, carry)


def smem(shape: Sequence[int], dtype: DTypeLike, inner: int = 64) -> Any:
    """Returns SMEM for matrices that the matrix units read, or the copy engine moves.

    Args:
      shape: the last dimension is a multiple of 64.
      dtype: of the elements.
      inner: least size along which products of the matrix are summed, 64 or 32.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = 128 if inner >= 64 else 64
    transforms = plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle)
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


Parts = Sequence[Any]
"""A matrix for the matrix units, which know 16 bits: as it is, or float32 as two of bfloat16."""


def in_parts(x: Float[Array, "*shape"]) -> list[Array]:
    """Returns an array as the matrix units take it: a float32 as a value and what it left over.

    The sum of both has 16 bits.
    """
    if x.dtype != jnp.float32:
        return [x]
    high = x.astype(jnp.bfloat16)
    return [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def filled(array: Array, tokens: int, features: int, value: float = 0) -> list[Array]:
    """Returns the parts of [B, tokens, heads, features], filled up with a value."""
    return in_parts(padded(padded(array, 1, tokens, value), 3, features, value))


def whole(size: int, multiple: int = FEATURES) -> int:
    """Returns the next multiple from a size on."""
    return -(-size // multiple) * multiple


def product(a: Parts, b: Parts, meanwhile: Callable[[], None] | None = None) -> Array:
    """Returns a @ b, float32, in the registers of a warpgroup.

    Args:
      a: [64, inner] in SMEM or in registers.
      b: [inner, columns] in SMEM.
      meanwhile: called when the matrix units have begun.
    """
    return product_and(a, b, meanwhile or (lambda: None))[0]


def product_and(a: Parts, b: Parts, meanwhile: Callable[[], Any]) -> tuple[Array, Any]:
    """Returns a @ b, see `product`, and what is returned by what is done meanwhile."""
    return _added(None, [(a, b)], meanwhile)


def sum_of_products(pairs: Sequence[tuple[Parts, Parts]], total: Array | None = None) -> Array:
    """Returns the sum of a total and of a @ b over pairs of them: see `product`."""
    return _added(total, pairs, lambda: None)[0]


def accumulated(
    total: Array | None, a: Parts, b: Parts, meanwhile: Callable[[], None] | None = None
) -> Array:
    """Returns total + a @ b: see `product`; None is a total of 0."""
    return accumulated_and(total, a, b, meanwhile or (lambda: None))[0]


def accumulated_and(
    total: Array | None, a: Parts, b: Parts, meanwhile: Callable[[], Any]
) -> tuple[Array, Any]:
    """Returns total + a @ b, and what is returned by what is done meanwhile."""
    return _added(total, [(a, b)], meanwhile)


def _added(
    total: Array | None, pairs: Sequence[tuple[Parts, Parts]], meanwhile: Callable[[], Any]
) -> tuple[Array, Any]:
    def multiply(sums: Any) -> tuple[Array, Any]:
        if total is not None:
            sums[...] = total
        for a, b in pairs:
            _issue(sums, a, b)
        found = meanwhile()
        return sums[...], found

    return pl.run_scoped(multiply, _space(*pairs[0]))


def product_beside(
    first: tuple[Parts, Parts],
    second: Sequence[tuple[Parts, Parts]],
    begun: Callable[[], Any],
    meanwhile: Callable[[Array, Any], Any],
    *,
    start: Array | None = None,
    total: Array | None = None,
) -> tuple[Any, Array]:
    """Returns what is made of a product, and a sum of products that was made meanwhile.

    Args:
      first: matrices of the product, see `product`.
      second: matrices of the sum.
      begun: called when the matrix units have both.
      meanwhile: gets the first product, while they are at the sum, and what `begun` returned.
      start: what the first product is added to.
      total: what the sum is added to.
    """
    counts = [len(_pairs(*pair)) for pair in second]

    def multiply(product: Any, sums: Any) -> tuple[Any, Array]:
        for ref, value in ((product, start), (sums, total)):
            if value is not None:
                ref[...] = value
        _issue(product, *first)
        for pair in second:
            _issue(sums, *pair)
        before = begun()
        made = plgpu.wgmma_accumulator_load(product, wait_n=sum(counts))
        # Barriers, as compilers would use products before they are there, and would write what is
        # made of them over what is still to be multiplied.
        found = meanwhile(jax.lax.optimization_barrier(made), before)
        return jax.lax.optimization_barrier((found, sums[...]))

    return pl.run_scoped(multiply, *(_space(*pairs[0]) for pairs in ([first], second)))


def _space(a: Parts, b: Parts) -> Any:
    return plgpu.ACC((a[0].shape[0], b[0].shape[1]), jnp.float32)


def _issue(total: Any, a: Parts, b: Parts) -> None:
    for left, right in _pairs(a, b):
        plgpu.wgmma(total, left, right)


def _pairs(a: Parts, b: Parts) -> list[tuple[Any, Any]]:
    """Returns what is to be multiplied, the smallest first, but for what is below the last part."""
    places = itertools.product(reversed(range(len(a))), range(len(b)))
    count = max(len(a), len(b))
    places = sorted((place for place in places if sum(place) < count), key=sum, reverse=True)
    return [(a[i], b[j]) for i, j in places]


def store(target: Any, value: Array) -> None:
    """Writes what a warpgroup has in its registers to GMEM, with no way through SMEM."""
    if hasattr(plgpu, "store"):
        plgpu.store(target, value, optimized=False)
    else:  # JAX 0.11
        target[...] = value


def loaded(parts: Parts) -> Array:
    """Returns a matrix in registers, float32."""
    return sum(plgpu.load(part, layout=MATRIX).astype(jnp.float32) for part in parts)


def transposed(matrix: Parts) -> list[Any]:
    """Returns references to the transposes of matrices in SMEM."""
    return [part.T for part in matrix]


def at(matrix: Parts, index: Array) -> list[Any]:
    """Returns references to one of several matrices that lie in SMEM."""
    return [part.at[index] for part in matrix]


def matrix(value: float | Array, shape: tuple[int, int]) -> Array:
    """Returns a float32 matrix of one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), MATRIX)


def of_rows(value: float, rows: int = ROWS) -> Array:
    """Returns float32 values of rows, all the same."""
    return plgpu.layout_cast(jnp.full((rows,), value, jnp.float32), OF_ROWS)


def line(ref: Any) -> Array:
    """Returns `LINE` numbers that lie anywhere, each in a thread."""
    return plgpu.load(ref, layout=plgpu.Layout.WG_STRIDED((LINE,), 1), optimized=False)


def line_of(value: float) -> Array:
    """Returns `LINE` float32 numbers, all the same."""
    return plgpu.layout_cast(
        jnp.full((LINE,), value, jnp.float32), plgpu.Layout.WG_STRIDED((LINE,), 1)
    )


def across(values: Array, shape: tuple[int, int]) -> Array:
    """Returns values of rows as a matrix."""
    return jax.lax.broadcast_in_dim(values, shape, (0,))


def down(values: Array, shape: tuple[int, int]) -> Array:
    """Returns values of columns as a matrix."""
    return jax.lax.broadcast_in_dim(values, shape, (1,))


_INVERSE = 0x7EE80000
_STEP = 3.16920044, -3.34635445, 1.17724537


def reciprocal(x: Array) -> Array:
    """Returns 1 / x of numbers of 1 and more, to 2.2e-5 of it; of infinity, and from 2^127 on, 0.

    Units for special functions are few, and take exponentials. The exponent of a number, taken from
    a constant, is that of its inverse: between 0.906 and 0.989 of it, d, as what is left of the
    number is taken from it, too. A polynomial then approximates 1 / d there, with the least error.
    """
    x = jnp.minimum(x, float(np.int32(_INVERSE).view(np.float32)))
    inverse = _INVERSE - jax.lax.bitcast_convert_type(x, jnp.int32)
    inverse = jax.lax.bitcast_convert_type(inverse, jnp.float32)
    d, (a, b, c) = x * inverse, _STEP
    return inverse * (a + d * (b + d * c))


def log1p(x: Array) -> Array:
    """Returns log(1 + x), to the last digits where x is small."""
    # Kahan's: the error of 1 + x is in both factors.
    above = 1 + x
    return jnp.where(above == 1, x, jnp.log(above) * (x / jnp.where(above == 1, 1, above - 1)))


def expm1(x: Array) -> Array:
    """Returns exp(x) - 1, to the last digits where x is small."""
    small = x * (1 + x * (1 / 2 + x * (1 / 6)))
    return jnp.where(jnp.abs(x) < 2.0**-6, small, jnp.exp(x) - 1)


def iota(size: int, layout: Any, start: Array | None = None) -> Array:
    """Returns the numbers of rows, or of columns, from a first one on.

    They are made where they are used: kept from one step of a loop to the next they would take
    registers. What they are made of would, too, if the first one did not belong to the step.
    """
    numbers = plgpu.broadcasted_iota(jnp.int32, (size,), 0, layout=layout)
    return jax.lax.optimization_barrier(numbers if start is None else start + numbers)
