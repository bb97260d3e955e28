"""What an algorithm is, and the few steps that several of them share."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import gcd, prod
from typing import Any, Literal, Protocol, cast, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

from jconv.device import Device, MiB
from jconv.problem import ConvProblem, is_static

Unit = Literal["dot", "conv", "vector", "fft"]
Accuracy = Literal["direct", "bounded", "loose"]
Run = Callable[[ConvProblem, jax.Array, jax.Array], jax.Array]


@dataclass(frozen=True)
class Cost:
    """What a run takes, in integers.

    Attributes:
        flops: floating-point operations, two for a multiply-add.
        bytes: bytes read and written outside the unit that does the arithmetic.
        workspace: bytes of temporaries that live at once.
        efficiency: thousandths of the unit's rate that the flops run at.
        unit: what does the arithmetic: a matrix product, XLA's convolution, a fused loop, an FFT.
        kernels: fused loops and library calls that are launched, one after the other.
        threads: how many threads the arithmetic can use; 0 is as many as there are.
        reread: bytes of operands that are read many times, which are best taken in parts that stay in the cache.
        copied: whether a call or a loop writes the result, which as a part of another must be copied to its place.
    """

    flops: int
    bytes: int
    workspace: int
    efficiency: int = 1000
    unit: Unit = "dot"
    kernels: int = 1
    threads: int = 0
    reread: int = 0
    copied: bool = False


@runtime_checkable
class Algorithm(Protocol):
    """One way to compute a convolution: a frozen dataclass, hashable and compared by value, without arrays
    inside, since it is a key of JAX's caches."""

    @property
    def name(self) -> str:
        """The name that ``algorithm=`` takes."""
        ...

    @property
    def accuracy(self) -> Accuracy:
        """``"direct"``: sums of the products themselves, in some order. ``"bounded"``: other arithmetic whose
        error is no larger than direct summation's, relative to the largest value of the result. ``"loose"``: a larger error; runs only when it is named."""
        ...

    def why_not(self, problem: ConvProblem) -> str | None:
        """The reason for a refusal, or None if it can serve the problem."""
        ...

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        """What serving the problem takes; called only where :meth:`why_not` gives None."""
        ...

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The convolution, in the problem's layout; trusts the problem. Where ``problem.reversed``, the
        window is read from its end."""
        ...


def refuse_unsized(problem: ConvProblem) -> str | None:
    """The refusals that every algorithm but xla shares: nothing to compute, or sizes not known yet."""
    if problem.is_empty:
        return "needs at least one element in lhs, rhs and the output"
    contracted = (problem.lhs_shape[1], problem.rhs_shape[1]) if problem.feature_groups > 1 else ()
    sizes = (*problem.lhs_shape[2:], problem.rhs_shape[0], *problem.rhs_shape[2:], *contracted)
    if not is_static(*sizes):
        return "needs every size but the batch to be a number, not a symbol"
    return None


def operand_bytes(problem: ConvProblem) -> int:
    """Bytes to read both operands and to write the result once."""
    read = (prod(problem.lhs_shape) + prod(problem.rhs_shape)) * problem.dtype.itemsize
    return read + prod(problem.output_shape) * problem.out_dtype.itemsize


def pad_and_dilate(problem: ConvProblem, lhs: jax.Array, spatial_axes: Sequence[int]) -> jax.Array:
    """``lhs`` with the problem's padding and holes written out along ``spatial_axes``."""
    config = [(0, 0, 0)] * lhs.ndim
    for axis, (low, high), dilation in zip(spatial_axes, problem.padding, problem.lhs_dilation, strict=True):
        config[axis] = (low, high, dilation - 1)
    if not any(any(entry) for entry in config):
        return lhs
    return lax.pad(lhs, jnp.zeros((), lhs.dtype), config)


def channel_last(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The operands as (batch, *spatial, features) and (*window, in features, out features)."""
    lhs_spec, rhs_spec, _ = problem.layout
    return (
        lhs.transpose(lhs_spec[0], *lhs_spec[2:], lhs_spec[1]),
        rhs.transpose(*rhs_spec[2:], rhs_spec[1], rhs_spec[0]),
    )


def gradient_operands(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The operands of a kernel gradient as the image (N, *spatial, C) and the cotangent (N, *positions, K).

    Its problem has batch C and features N: result[t, c, k] sums image[n, s i + d t - lo, c] cotangent[n, i, k]
    over n and i, with s its ``rhs_dilation`` and d its ``strides``.
    """
    lhs_spec, rhs_spec, _ = problem.layout
    if problem.reversed:
        rhs = lax.rev(rhs, rhs_spec[2:])
    return (
        lhs.transpose(lhs_spec[1], *lhs_spec[2:], lhs_spec[0]),
        rhs.transpose(rhs_spec[1], *rhs_spec[2:], rhs_spec[0]),
    )


def from_channel_last(problem: ConvProblem, out: jax.Array) -> jax.Array:
    """(batch, *spatial, features) in the problem's layout."""
    logical = (0, out.ndim - 1, *range(1, out.ndim - 1))
    return out.transpose(tuple(logical[i] for i in inverse(problem.layout.out_spec)))


def from_gradient(problem: ConvProblem, out: jax.Array) -> jax.Array:
    """A kernel gradient (*window, C, K) in the problem's layout."""
    return from_channel_last(problem, jnp.moveaxis(out, -2, 0))


def taps(problem: ConvProblem) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each tap of the window its index in rhs and the offset in lhs that it reads first."""
    for tap in np.ndindex(*problem.window):
        offset = tuple(t * d for t, d in zip(tap, problem.rhs_dilation, strict=True))
        index = tuple(k - 1 - t for t, k in zip(tap, problem.window, strict=True)) if problem.reversed else tap
        yield index, offset


def strided(
    x: jax.Array, axes: Sequence[int], start: Sequence[int], sizes: Sequence[int], strides: Sequence[int]
) -> jax.Array:
    """``sizes[i]`` elements of ``x`` along ``axes[i]``, ``strides[i]`` apart, from ``start[i]`` on."""
    low, high, step = [0] * x.ndim, list(x.shape), [1] * x.ndim
    for axis, a, n, s in zip(axes, start, sizes, strides, strict=True):
        low[axis], high[axis], step[axis] = a, a + (n - 1) * s + 1, s
    return lax.slice(x, low, high, step)


def shifts(problem: ConvProblem) -> tuple[int, int]:
    """Of a kernel gradient as one product: the taps of the last axis for which the cotangent is :func:`shifted`, and the places
    along that axis that are summed over; (1, its own) where columns of the input for those taps take fewer bytes."""
    if problem.spatial_rank == 0:
        return 1, 1
    (*others, taps), places = problem.output_shape[2:], problem.window[-1]
    features, outputs = problem.lhs_shape[0] // problem.batch_groups, problem.rhs_shape[0] // problem.groups
    reached = places + (taps - 1) * problem.strides[-1]
    columns = reached * (prod(others) * features + taps * outputs)
    if problem.rhs_dilation[-1] == 1 and columns < places * prod(others) * taps * features:
        return taps, reached
    return 1, places


def shifted(g: jax.Array, taps: int, step: int) -> jax.Array:
    """A channel-last cotangent without strides along its last spatial axis, moved by 0, step, ... places along it, side by
    side: what the columns of an input meet that were made for no tap of that axis."""
    reach, axis = (taps - 1) * step, g.ndim - 2
    size = g.shape[axis] + reach
    g = lax.pad(g, jnp.zeros((), g.dtype), [*[(0, 0, 0)] * axis, (reach, reach, 0), (0, 0, 0)])
    starts = (reach - t * step for t in range(taps))
    return lax.concatenate([lax.slice_in_dim(g, at, at + size, axis=axis) for at in starts], g.ndim - 1)


def accumulator(problem: ConvProblem) -> np.dtype:
    """Where sums are written out, floats of 16 bits or fewer are summed in 32, as a product of matrices does."""
    narrow = jnp.issubdtype(problem.dtype, jnp.floating) and problem.out_dtype.itemsize < 4
    return np.dtype(np.float32) if narrow else problem.out_dtype


def summed(terms: Sequence[jax.Array], chains: int) -> jax.Array:
    """The sum, in chains that do not wait for one another: a single one is bound by the latency of an addition."""
    sums = [functools.reduce(operator.add, terms[i::chains]) for i in range(min(chains, len(terms)))]
    return functools.reduce(operator.add, sums)


def varying(x: Any) -> frozenset[Any]:
    """The mesh axes over which ``x`` varies inside ``shard_map``."""
    aval = jax.typeof(x)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma  # pyright: ignore[reportAttributeAccessIssue]


def vary(x: jax.Array, axes: frozenset[Any]) -> jax.Array:
    return lax.pcast(x, tuple(axes), to="varying") if axes else x


def zeros_as(x: jax.Array, shape: Sequence[int], dtype: Any) -> jax.Array:
    """Zeros that vary over the mesh axes that ``x`` varies over, as the carry of a loop over ``x`` must."""
    return vary(jnp.zeros(shape, dtype), varying(x))


def assembled(
    problem: ConvProblem,
    like: jax.Array,
    shape: Sequence[int],
    count: int,
    part: Callable[[Any], tuple[jax.Array, Mapping[int, Any]]],
) -> jax.Array:
    """A result of which a loop writes ``count`` parts in place: part(i) is an array, and where it starts along some axes. XLA:CPU
    would rewrite all of a bfloat16 one each time."""
    wide = np.dtype(np.float32) if problem.out_dtype == jnp.bfloat16 else problem.out_dtype

    def write(i: Any, out: jax.Array) -> jax.Array:
        y, starts = part(i)
        return lax.dynamic_update_slice(out, y.astype(wide), [starts.get(axis, 0) for axis in range(out.ndim)])

    return lax.fori_loop(0, count, write, zeros_as(like, shape, wide)).astype(problem.out_dtype)


def bytes_of_assembled(problem: ConvProblem) -> int:
    """Temporaries of :func:`assembled` beside a part: a wider result."""
    return 4 * prod(problem.output_shape) if problem.out_dtype == jnp.bfloat16 else 0


def unfused(f: Callable[..., jax.Array], *args: jax.Array) -> jax.Array:
    """f(*args), fused with nothing, where XLA:CPU would compute f's parts once for each use, or a slice at a moving start
    inside the loop that reads it, which is scalar then: a call that XLA does not inline."""
    return cast(jax.Array, set_xla_metadata(jax.jit(f)(*args), inlineable="false"))


def unreversed(problem: ConvProblem, rhs: jax.Array) -> tuple[ConvProblem, jax.Array]:
    """The problem that reads its window from the start, and the kernel for it: for small kernels, a cheap copy."""
    if not problem.reversed:
        return problem, rhs
    return problem.replace(reversed=False), lax.rev(rhs, problem.layout.rhs_spec[2:])


def options(problem: ConvProblem) -> dict[str, Any]:
    """What a matrix product takes over from the convolution."""
    return {"precision": problem.precision, "preferred_element_type": problem.preferred_element_type}


def over_rows(problem: ConvProblem, a: jax.Array, b: jax.Array) -> jax.Array:
    """The sum of a[..., m, i] b[..., m, j] over m. XLA:CPU does it up to five times faster with the wider operand on the
    right. Where that is a, the product is transposed, behind a barrier: XLA would fold the transpose into the product.
    A left operand that :func:`collides` gets some columns of zeros."""
    turned = wider(a, b)
    left, right = (b, a) if turned else (a, b)
    width, zeros = left.shape[-1], 0
    if collides(problem, width) and (a.ndim > 2 or pays_apart(a.shape[0], width, right.shape[-1])):
        zeros = _APART
        left = lax.pad(left, jnp.zeros((), left.dtype), [*[(0, 0, 0)] * (left.ndim - 1), (0, zeros, 0)])
    batch = tuple(range(a.ndim - 2))
    axes = (((a.ndim - 2,), (a.ndim - 2,)), (batch, batch))
    out = lax.dot_general(left, right, axes, **options(problem))
    if zeros:
        out = lax.slice_in_dim(out, 0, width, axis=out.ndim - 2)
    return jnp.swapaxes(lax.optimization_barrier(out), -1, -2) if turned else out


def wider(a: jax.Array, b: jax.Array) -> bool:
    """True if a is known to have more columns than b."""
    return is_static(a.shape[-1], b.shape[-1]) and a.shape[-1] > b.shape[-1]


def collides(problem: ConvProblem, width: int) -> bool:
    """True for the left operand of a product over rows, ``width`` columns, whose rows are a multiple of 128 bytes apart: they fall
    on few sets of the first-level cache. Measured up to 2.7 times slower in float32, no slower in other dtypes."""
    return problem.dtype == np.float32 and is_static(width) and width % _ALIASED == 0


def pays_apart(rows: int, width: int, other: int) -> bool:
    """Whether a product over ``rows`` of ``width`` and ``other`` columns gains more from columns of zeros than the copies of the
    operand and of the result take: not of few rows or columns, nor of more than XLA has at hand without new pages."""
    if not is_static(rows, other) or rows * width * 4 > 32 * MiB:
        return False
    return width > _ALIASED and rows >= max(_ROWS, 3 * other)


_ALIASED, _APART = 32, 4  # columns of float32 that are 128 bytes; how many of zeros take rows apart
_ROWS = 1024  # below which a product is too small to gain


def phases(problem: ConvProblem, i: int) -> tuple[int, int, list[list[tuple[int, int]]]]:
    """Along spatial axis i: outputs of a phase, the step of their slices, and for each phase (tap, start) of its taps.

    Let h be the dilation of lhs, d that of rhs, s the stride and lo the low padding. Output j reads lhs at
    (j s + t d - lo) / h for those taps t that make it a whole number. Write j = q P + r with P = h / gcd(s, h): then
    the taps of a phase r are the same for all q, and lhs moves by s / gcd(s, h) from q to q + 1.
    """
    h, d, s, (low, _) = problem.lhs_dilation[i], problem.rhs_dilation[i], problem.strides[i], problem.padding[i]
    count = h // gcd(s, h)
    at = [[(t, r * s + t * d - low) for t in range(problem.window[i])] for r in range(count)]
    whole = [[(t, start // h) for t, start in taps if start % h == 0] for taps in at]
    return -(-problem.output_shape[2 + i] // count), s // gcd(s, h), whole


def interleaved(parts: Sequence[jax.Array], spatial: Sequence[int], counts: Sequence[int]) -> jax.Array:
    """Phase r of axis a goes to the places r, r + counts[a], ..."""
    if len(parts) == 1:
        return parts[0]
    shape, n = parts[0].shape, len(counts)
    order, merged = [], list(shape)
    for axis in range(len(shape)):
        order.append(n + axis)
        if axis in spatial:
            i = spatial.index(axis)
            order.append(i)
            merged[axis] *= counts[i]
    return jnp.stack(parts).reshape(*counts, *shape).transpose(order).reshape(merged)


def phase_problems(
    problem: ConvProblem,
) -> Iterator[tuple[list[tuple[int, int, int]], list[tuple[int, int]], ConvProblem] | None]:
    """For each phase of :func:`phases`, in the order of the product of the axes, the taps of its kernel as
    (first, count, step) of rhs, what to cut off lhs, and its problem on what is left; None where no tap meets lhs."""
    axes = [phases(problem, i) for i in range(problem.spatial_rank)]
    for phase in product(*(of_axis for _, _, of_axis in axes)):
        if not all(phase):
            yield None
            continue
        kernel, cut, padding, dilation = [], [], [], []
        for i, taps in enumerate(phase):
            (first, at), (size, step, _) = taps[0], axes[i]
            every, apart = (taps[1][0] - first, taps[1][1] - at) if len(taps) > 1 else (1, 1)
            low, high = -at, at + (size - 1) * step + (len(taps) - 1) * apart + 1 - problem.lhs_shape[2 + i]
            start = problem.window[i] - 1 - first - (len(taps) - 1) * every if problem.reversed else first
            kernel.append((start, len(taps), every))
            cut.append((max(-low, 0), max(-high, 0)))
            padding.append((max(low, 0), max(high, 0)))
            dilation.append(apart)
        left = [n - a - b for n, (a, b) in zip(problem.lhs_shape[2:], cut, strict=True)]
        if min(left) < 1:
            yield None
            continue
        part = problem.replace(
            lhs_shape=(*problem.lhs_shape[:2], *left), rhs_shape=(*problem.rhs_shape[:2], *(n for _, n, _ in kernel)),
            strides=tuple(step for _, step, _ in axes), padding=tuple(padding),
            lhs_dilation=(1,) * problem.spatial_rank, rhs_dilation=tuple(dilation),
        )  # fmt: skip
        yield kernel, cut, part


def by_phase(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array, run: Run) -> jax.Array:
    """Holes in lhs: each phase is ``run`` on lhs without holes and every so many taps of rhs; then they interleave."""
    lhs_spec, rhs_spec, out_spec = problem.layout
    axes = [phases(problem, i) for i in range(problem.spatial_rank)]
    shape = list(problem.physical_output_shape)
    for axis, (size, _, _) in zip(out_spec[2:], axes, strict=True):
        shape[axis] = size
    parts = []
    for found in phase_problems(problem):
        if found is None:
            parts.append(jnp.zeros(shape, problem.out_dtype))
            continue
        kernel, cut, part = found
        start, sizes, steps = zip(*kernel, strict=True)
        w = strided(rhs, rhs_spec[2:], start, sizes, steps)
        x = strided(lhs, lhs_spec[2:], [low for low, _ in cut], part.lhs_shape[2:], (1,) * len(cut))
        parts.append(run(part, x, w))
    y = interleaved(parts, out_spec[2:], [len(of_axis) for _, _, of_axis in axes])
    return lax.slice(y, (0,) * y.ndim, problem.physical_output_shape)


def inverse(spec: Sequence[int]) -> tuple[int, ...]:
    """The permutation that brings logical order (batch, features, *spatial) into the layout ``spec``."""
    return tuple(spec.index(axis) for axis in range(len(spec)))


def lax_convolution(problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The problem in lax's own words."""
    if problem.reversed:
        rhs = lax.rev(rhs, problem.layout.rhs_spec[2:])
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides=problem.strides,
        padding=problem.padding,
        lhs_dilation=problem.lhs_dilation,
        rhs_dilation=problem.rhs_dilation,
        dimension_numbers=problem.layout,
        feature_group_count=problem.feature_groups,
        batch_group_count=problem.batch_groups,
        precision=problem.precision,
        preferred_element_type=problem.preferred_element_type,
        out_sharding=problem.out_sharding,
    )
