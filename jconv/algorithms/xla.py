"""XLA's own convolution. It refuses nothing, so a plan always has an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jconv.algorithms.base import (
    Accuracy,
    Cost,
    channel_last,
    from_channel_last,
    lax_convolution,
    operand_bytes,
    refuse_unsized,
)  # fmt: skip
from jconv.device import Device, MiB
from jconv.problem import ConvProblem, Layout, is_static


@dataclass(frozen=True)
class Xla:
    """``jax.lax.conv_general_dilated``: cuDNN on GPU, the matrix units on TPU, YNNPACK or Eigen on CPU.

    With ``channel_last`` it is called as XLA:CPU does it fastest. The operands are transposed to (batch, *spatial,
    features) and (*window, in, out) first: at the top of a program XLA:CPU does that by itself; inside a loop it does
    not, and a kernel gradient, which never lies so, then runs 100 times slower. And what YNNPACK leaves to Eigen, or is
    slow with, is posed to it otherwise (:func:`_suited`). With ``eigen``, too, an image that is YNNPACK's is left to
    Eigen, which is slower on one thread, but uses all of them where YNNPACK uses one."""

    name: str = "xla"
    accuracy: Accuracy = "direct"
    channel_last: bool = False
    eigen: bool = False

    def why_not(self, problem: ConvProblem) -> str | None:
        refusal = refuse_unsized(problem) if self.channel_last else None
        if refusal is None and self.eigen:
            usual, other = (_is_ynnpacks(_suited(problem, eigen)[0]) for eigen in (False, True))
            if other or not usual:
                return "needs an image of YNNPACK's, padded to its own size"
        return refusal

    def cost(self, problem: ConvProblem, device: Device) -> Cost:
        if device.vendor_default:
            return Cost(2 * problem.macs // prod(problem.lhs_dilation), operand_bytes(problem), 0, 850, "conv")
        size = problem.dtype.itemsize
        moved, held = operand_bytes(problem), 0
        kernels = 2 if self.channel_last else 1 if problem.layout == _channel_last(problem.spatial_rank) else 3
        if self.channel_last:
            posed = _as_image(problem)
            laid, _ = _suited(posed, self.eigen)
            for of in ("lhs_shape", "rhs_shape", "output_shape"):
                shape, own = getattr(laid, of), getattr(posed, of)
                if shape != own:
                    held, kernels = held + prod(shape) * size, kernels + 1
                    moved += (prod(shape) + prod(own)) * size
            problem = laid
        threads = 1 if _is_serial(problem) else 0
        efficiency = max(1, _cpu_efficiency(problem) // _slower(problem.dtype))
        flops = 2 * problem.macs // (prod(problem.lhs_dilation) if _skips_holes(problem) else 1)
        if problem.reversed and not problem.is_weight_gradient:
            moved += 16 * prod(problem.rhs_shape) * size  # turned round and, as a rule, transposed: a scalar loop
        if problem.is_weight_gradient and problem.groups == 1:
            times = 1 if self.channel_last or problem.spatial_rank == 1 else 3  # whole, they stay in no cache
            moved += times * _passes(problem)
            held += (prod(problem.lhs_shape) + prod(problem.rhs_shape)) * size  # both transposed
        if not self.channel_last and _is_narrow_gradient(problem):
            efficiency = efficiency // 4 + 1
        if not self.channel_last and _is_bare(problem):
            moved += _reread(problem)
        return Cost(flops, moved, held if self.channel_last else 0, efficiency, "conv", kernels, threads)

    def run(self, problem: ConvProblem, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        if problem.is_empty:
            # XLA refuses a window without elements, which the kernel gradient of an empty output has.
            return jnp.zeros(problem.physical_output_shape, problem.out_dtype)
        whole, (problem, lhs) = problem, _cropped(problem, lhs)
        if 0 in lhs.shape:
            return jnp.zeros(whole.physical_output_shape, whole.out_dtype)
        if not self.channel_last:
            return lax_convolution(problem, lhs, rhs)
        lhs, rhs = channel_last(problem, lhs, rhs)
        posed = _as_image(problem)
        if posed is not problem:
            lhs, rhs = jnp.expand_dims(lhs, 1), jnp.expand_dims(rhs, 0)
        laid, written = _suited(posed, self.eigen)
        more, wide = laid.lhs_shape[1] - problem.lhs_shape[1], laid.rhs_shape[0] - problem.rhs_shape[0]
        lhs = _with_zeros(lhs, [(0, 0), *written, (0, more)])
        if any(any(pair) for pair in written):
            lhs = lax.optimization_barrier(lhs)  # XLA would fold the padding into the convolution again
        rhs = _with_zeros(rhs, [*[(0, 0)] * posed.spatial_rank, (0, more), (0, wide)])
        out = lax_convolution(laid.replace(layout=_channel_last(posed.spatial_rank)), lhs, rhs)
        sizes = (posed.output_shape[0], *posed.output_shape[2:], posed.output_shape[1])
        out = out if out.shape == sizes else lax.slice(out, (0,) * out.ndim, sizes)
        return from_channel_last(problem, out if posed is problem else lax.squeeze(out, [1]))


def _cropped(problem: ConvProblem, lhs: jax.Array) -> tuple[ConvProblem, jax.Array]:
    """Negative padding as a slice, on axes that are padded on the other side: there XLA:CPU reads outside the array.
    Elsewhere it stays: XLA aborts on some cropped arrays with holes.

    Along an axis with dilation d, of c places to crop the first m = ceil(c / d) elements go, and m d - c are padded."""
    if not any(min(pair) < 0 < max(pair) for pair in problem.padding):
        return problem, lhs
    padding, sizes = [], list(problem.lhs_shape)
    for i, (pair, d) in enumerate(zip(problem.padding, problem.lhs_dilation, strict=True)):
        if not min(pair) < 0 < max(pair):
            padding.append(pair)
            continue
        gone = [-(-max(0, -side) // d) for side in pair]
        axis, size = problem.layout.lhs_spec[2 + i], sizes[2 + i]
        low, high = min(gone[0], size), max(size - gone[1], min(gone[0], size))
        lhs = lax.slice_in_dim(lhs, low, high, axis=axis)
        sizes[2 + i] = high - low
        padding.append(tuple(side + m * d for side, m in zip(pair, gone, strict=True)))
    return problem.replace(padding=tuple(padding), lhs_shape=tuple(sizes)), lhs


def _channel_last(n: int) -> Layout:
    image = (0, n + 1, *range(1, n + 1))
    return Layout(image, (n + 1, n, *range(n)), image)


def _as_image(problem: ConvProblem) -> ConvProblem:
    """A signal of few features as an image of one row, which XLA:CPU runs 1.1 to 3 times faster."""
    p = problem
    signal = _YNNPACK and p.spatial_rank == 1 and p.groups == 1 and p.dtype == np.float32 and p.lhs_dilation == (1,)
    few = is_static(*p.rhs_shape[:2]) and min(p.rhs_shape[:2]) <= _FEW_WHERE_IT_GROWS
    if not (signal and few) or p.is_pointwise or p.is_weight_gradient:
        return problem
    (batch, features, size), (out, inner, window) = p.lhs_shape, p.rhs_shape
    return p.replace(
        lhs_shape=(batch, features, 1, size), rhs_shape=(out, inner, 1, window), layout=_channel_last(2),
        strides=(1, *p.strides), padding=((0, 0), *p.padding), lhs_dilation=(1, 1), rhs_dilation=(1, *p.rhs_dilation),
    )  # fmt: skip


def _suited(problem: ConvProblem, eigen: bool = False) -> tuple[ConvProblem, Sequence[tuple[int, int]]]:
    """The problem as XLA:CPU runs it fastest, and the padding that is written out for it; its result may have more features,
    and be longer.

    - Input features of zeros, and kernels of zeros: :func:`_filled`.
    - An image whose result is larger along an axis is Eigen's, which is 1.2 to 4 times slower of up to 64 features, and 15 times
      and more of doubles: there the padding that makes it larger is written out.
    - Of 160 features and more Eigen is up to 1.7 times faster, where the image is not tiny: there the result gets another row.
    - An image without padding gets a row of it: without any, YNNPACK runs up to five times slower.
    - A kernel gradient of few images to few features gets its padding written out: else it runs up to eight times slower."""
    laid, written = _filled(problem), [(0, 0)] * problem.spatial_rank
    excess = [max(0, n - m) for n, m in zip(problem.output_shape[2:], problem.lhs_shape[2:], strict=True)]
    known = is_static(*problem.rhs_shape[:2])
    image = _YNNPACK and _is_dense_image(problem) and not problem.is_weight_gradient and known
    fewer = min(problem.rhs_shape[:2]) if known else 0
    if _is_narrow_gradient(problem):
        written = list(problem.padding)
    elif image and any(excess) and not _is_small(laid):
        slow = fewer <= _FEW_WHERE_IT_GROWS or problem.dtype == np.float64
        if prod(problem.window) < _TAPS_FOR_A_COPY or not slow:
            return problem, written
        for i, (low, _) in enumerate(problem.padding):
            at_start = min(max(low, 0), excess[i])
            written[i] = (at_start, excess[i] - at_start)
    elif image and (eigen or fewer >= _MANY_WHERE_IT_DOES_NOT) and not (problem.is_pointwise or _is_small(problem)):
        sizes = enumerate(zip(problem.output_shape[2:], problem.lhs_shape[2:], problem.strides, strict=True))
        same = [i for i, (n, m, stride) in sizes if n == m >= _ROWS_FOR_ONE_MORE and stride == 1]
        if same and problem.dtype == np.float32:
            longest = max(same, key=lambda i: problem.lhs_shape[2 + i])
            laid = problem.replace(padding=_with_one_more(problem, longest))
    if any(any(pair) for pair in written):
        sizes = (n + low + high for n, (low, high) in zip(problem.lhs_shape[2:], written, strict=True))
        left = tuple((a - c, b - d) for (a, b), (c, d) in zip(problem.padding, written, strict=True))
        laid = laid.replace(lhs_shape=(*laid.lhs_shape[:2], *sizes), padding=left)
    if _is_bare(laid):
        shorter = (n < m for n, m in zip(laid.output_shape[2:], laid.lhs_shape[2:], strict=True))
        laid = laid.replace(padding=_with_one_more(laid, next(i for i, is_so in enumerate(shorter) if is_so)))
    return laid, written


def _with_one_more(problem: ConvProblem, axis: int) -> tuple[tuple[int, int], ...]:
    """The padding that makes the result one longer along ``axis``."""
    more = (
        (low, high + stride * (i == axis))
        for i, ((low, high), stride) in enumerate(zip(problem.padding, problem.strides, strict=True))
    )
    return tuple(more)


def _is_bare(problem: ConvProblem) -> bool:
    """True for what YNNPACK runs slowly for want of padding (measured: several taps)."""
    padded = any(side for pair in problem.padding for side in pair)
    image = _is_ynnpacks(problem) and _is_float32_image(problem) and problem.lhs_shape[2] > 1
    if padded or not image or problem.is_pointwise or problem.is_weight_gradient:
        return False
    return any(n < m for n, m in zip(problem.output_shape[2:], problem.lhs_shape[2:], strict=True))


def _is_narrow_gradient(problem: ConvProblem) -> bool:
    """True for what XLA:CPU runs slowly for its padding: a kernel gradient of few images whose cotangent has at most a
    vector of features. Measured: of four images 1.5 to 3 times, of eight not; to 17 features or more not."""
    padded = any(low > 0 or high > 0 for low, high in problem.padding)
    features, images = problem.rhs_shape[:2]
    few = features <= _LANES and is_static(images) and images <= _IMAGES
    return _is_float32_image(problem) and problem.is_weight_gradient and padded and few


def _is_dense_image(problem: ConvProblem) -> bool:
    """True for what XLA:CPU has fast convolutions for, of which some are slow cases."""
    p = problem
    dense = p.spatial_rank == 2 and p.groups == 1 and all(d == 1 for d in p.lhs_dilation)
    return dense and p.dtype in (np.float32, np.float64)


def _is_float32_image(problem: ConvProblem) -> bool:
    return _is_dense_image(problem) and problem.dtype == np.float32


def _is_ynnpacks(problem: ConvProblem) -> bool:
    """True for the dense images that XLA:CPU gives to YNNPACK, kernel gradients among them: not those of few features, nor those
    that grow, which are Eigen's."""
    grows = any(is_static(n, m) and n > m for n, m in zip(problem.output_shape[2:], problem.lhs_shape[2:], strict=True))
    return _YNNPACK and _is_dense_image(problem) and not (_is_small(problem) or grows)


def _is_small(problem: ConvProblem) -> bool:
    return is_static(*problem.rhs_shape[:2]) and max(problem.rhs_shape[:2]) <= _LANES


def _filled(problem: ConvProblem) -> ConvProblem:
    """With input features of zeros, and kernels of zeros whose results are cut off, where XLA:CPU was measured to be slow without.

    YNNPACK takes input features by fours (:func:`_is_odd`), and of up to 64 outputs the last block of 32 is at most three
    quarters full or runs 1.5 times slower. With at most 16 of both the image is Eigen's, which is up to three times slower but
    of 16 and 16."""
    if problem.is_weight_gradient or problem.is_pointwise or not (_YNNPACK and _is_float32_image(problem)):
        return problem
    (batch, features, *spatial), out = problem.lhs_shape, problem.rhs_shape[0]
    if not is_static(features, out):
        return problem
    more, wide = features, out
    if _is_small(problem) and features > out:
        more = _LANES + 4
    elif _is_small(problem) and features * out < _LANES**2:
        more, wide = features + -features % 4, _LANES + 4
    elif not _is_small(problem):
        more += -features % 4 if _is_odd(problem) else 0
        wide += -out % 32 if _is_ragged(out) else 0
    if (more, wide) == (features, out):
        return problem
    return problem.replace(lhs_shape=(batch, more, *spatial), rhs_shape=(wide, more, *problem.rhs_shape[2:]))


def _is_ragged(out: int) -> bool:
    """True for the numbers of output features that YNNPACK was measured to be 1.5 times slower with than with more of them."""
    return 24 < out < 32 or 48 < out < 64


def _is_odd(problem: ConvProblem) -> bool:
    """True for what XLA:CPU runs slowly because its input features (in a kernel gradient, the images) are no multiple of four.
    Measured in blocks of 64 output features. A last block of up to 32: 3 to 8 times slower of three input features, 1.5 to
    3 of seven and more; even counts are not. Of 33 to 48 outputs: 1.5 to 2.5 of seven and more, even ones too. Fuller
    blocks, and those of three features to 96, are not."""
    out, features = problem.rhs_shape[:2]
    if not (_YNNPACK and _is_float32_image(problem) and is_static(out, features)) or problem.is_pointwise:
        return False
    if features > 6 and 32 < out <= 48:
        return features % 4 > 0
    if features == 3 and out > 64 and out % 32 == 0:
        return False
    return out > _LANES and 0 < out % 64 <= 32 and features > 2 and features % 2 == 1


def _with_zeros(x: jax.Array, pairs: Sequence[tuple[int, int]]) -> jax.Array:
    """x with so many zeros before and after it along each axis."""
    if not any(any(pair) for pair in pairs):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) for low, high in pairs])


def _is_serial(problem: ConvProblem) -> bool:
    """True for what XLA:CPU was measured to run on one thread: groups, kernel gradients to few features, and of YNNPACK's images
    those of few features, the fewer the larger the image is."""
    out, features = problem.rhs_shape[:2]
    if problem.groups > 1:
        return True
    if problem.is_weight_gradient:
        return out <= _SERIAL
    if not _is_ynnpacks(problem) or not is_static(features):
        return False
    if prod(problem.output_shape[2:]) >= _LARGE:
        return features < 96 and features * out < 64 * 64
    return features < 64 or out < 80


def _passes(problem: ConvProblem) -> int:
    """Bytes of the cotangent, the window of a kernel gradient, that leave the caches between rows of the result, each of
    which reads all of it: from main memory, or from the last cache if it fits there."""
    window = prod(problem.rhs_shape) * problem.dtype.itemsize
    passes = prod(problem.output_shape[2:]) * -(-problem.lhs_shape[0] // _ROWS)
    return passes * window if window > _CACHE else passes * window // _SHARE * window // (window + 4 * MiB)


def _reread(problem: ConvProblem) -> int:
    """What a bare convolution costs more, in bytes: it gathers each window again, slowly where lhs leaves the cache."""
    gathered = prod(problem.window) * prod(problem.lhs_shape) * problem.dtype.itemsize
    if prod(problem.rhs_shape[1:]) >= _GATHERED:
        return 3 * gathered
    return gathered if problem.lhs_shape[1] >= _LANES and prod(problem.lhs_shape) <= _SMALL else 0


_LANES = 16
_YNNPACK = jax.__version_info__ >= (0, 10)  # whether XLA:CPU has it
_FEW_WHERE_IT_GROWS = 64  # features up to which a growing image, or a signal, is better YNNPACK's
_MANY_WHERE_IT_DOES_NOT = 160  # features from which one that does not grow is better Eigen's
_ROWS_FOR_ONE_MORE = 5  # of which one more is little
_TAPS_FOR_A_COPY = 4  # from which leaving Eigen gains more than a copy of the image takes
_IMAGES = 4  # up to which a kernel gradient is slow for its padding
_ROWS, _SHARE = 8, 2  # features whose rows are read together; how much faster the last cache is than memory
_FEW = 8  # input features of a first layer
_CACHE = 32 * MiB
_GATHERED = 200  # products of an output from which its window is gathered slowly
_SMALL = 1 << 20  # elements of lhs up to which it is gathered at all, with fewer
_SERIAL = 96  # features of a cotangent up to which XLA:CPU's kernel gradient runs on one thread
_LARGE = 10_000  # positions of an image of which YNNPACK's tasks are rows, too


def _slower(dtype: np.dtype) -> int:
    """How much further behind a matrix product than in float32: its fast convolutions know nothing else."""
    if dtype.kind in "iu":
        return 12
    if dtype.kind == "c":
        return 6 * dtype.itemsize // 8
    return 1 if dtype.itemsize <= 4 else 3


def _cpu_efficiency(problem: ConvProblem) -> int:
    """Thousandths of its best rate that XLA:CPU's convolution was measured to reach (``make bench``).

    What it knows well is a dense 2-D convolution with many products for each of many output features. Groups, their
    kernel gradients above all, and windows of three axes are loops that nothing has optimised; there holes in
    lhs are multiplied like data.
    """
    if problem.is_empty:
        return 1
    out, depth = problem.rhs_shape[0], prod(problem.rhs_shape[1:])
    if problem.batch_groups > 1:
        return max(1, 150 // problem.groups**2)
    if problem.feature_groups > 1:
        return min(200, 6 * problem.rhs_shape[1])
    unfilled = 1000
    if _is_odd(problem):
        unfilled = 1000 * problem.rhs_shape[1] // (problem.rhs_shape[1] + 18)
    if problem.is_weight_gradient:
        taps = prod(problem.output_shape[2:])
        work = out * taps * problem.lhs_shape[0]
        full, rest = out // _LANES * _LANES, out % _LANES
        vectors = 50 + 650 * full // (full + _LANES * rest)  # the rest one by one
        if taps == 1:
            return 150 * vectors // 700 * min(problem.lhs_shape[0], _LANES) // _LANES + 1
        rows = prod(problem.rhs_shape[1:])
        if problem.lhs_shape[0] < _FEW and min(problem.rhs_dilation, default=1) > 2:
            vectors //= 3
        if problem.rhs_dilation == problem.output_shape[2:]:  # of patches
            vectors //= 2
        if problem.spatial_rank == 1:
            vectors = vectors * 3 // 2
        unoptimised = 5 if problem.spatial_rank == 3 else 3 if problem.output_shape[-1] == 1 else 1
        return vectors * (work + 300) // (work + 1600) * rows // (rows + 48) // unoptimised * unfilled // 1000 + 1
    if problem.is_pointwise:
        return 850 * depth // (depth + 24) * out // (out + 8) // (2 if any(s > 1 for s in problem.strides) else 1) + 1
    work = (out * depth) ** 2
    if _skips_holes(problem):
        rows = problem.lhs_shape[0] * prod(problem.lhs_shape[2:])
        return (150 + 27 * min(out, 128) // 5) * rows // (rows + 96) + 1
    if problem.spatial_rank == 3:
        features = problem.rhs_shape[1]
        return 750 * out // (out + 64) * features // (features + 16) + 1
    efficiency = 950 * work // (work + 1800**2) + 1
    if out < _LANES:
        efficiency = efficiency * (out + 10) // (_LANES + 10) + 1
    if not _is_dense_image(problem):
        return efficiency
    strided = 3 if max(problem.strides) > 1 else 4
    if not _is_ynnpacks(problem):
        if problem.dtype == np.float64:
            return efficiency // 8 + 1  # a loop of scalars
        image = 1080 * strided // 4 * depth // (depth + 50) * out // (out + _LANES) + 1
        return image if problem.rhs_shape[1] >= _FEW else min(image, efficiency)
    many = is_static(problem.rhs_shape[1]) and min(problem.rhs_shape[:2]) >= _MANY_WHERE_IT_DOES_NOT
    peak = (760 if many else 1060) * unfilled // 1000 * (2 if _is_ragged(out) else 3) // 3 * strided // 4
    return peak * depth // (depth + 14) * out // (out + 5) + 1


def _skips_holes(problem: ConvProblem) -> bool:
    dense = problem.groups == 1 and problem.spatial_rank == 2 and not problem.is_weight_gradient
    return dense and any(d > 1 for d in problem.lhs_dilation) and all(d == 1 for d in problem.rhs_dilation)
