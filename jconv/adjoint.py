"""The two adjoints of a convolution, each again a convolution.

Leave out the spatial axes and let m be the batch, j the input features, k the output features, g the
groups. A convolution is a contraction, and a transpose renames its letters:

    forward            [m, gj] [j, gk] -> [m, gk]      feature groups
    input gradient     [m, gk] [k, gj] -> [m, gj]      feature groups; g moved from k to j in the kernel
    weight gradient    [gj, m] [m, gk] -> [j, gk]      batch groups
    forward            [gm, j] [j, gk] -> [m, gk]      batch groups
    input gradient     [m, gk] [k, gj] -> [m, gj]      feature groups; then g moved from j to m
    weight gradient    [j, gm] [m, gk] -> [j, gk]      feature groups

Along a spatial axis let L, R, O be the sizes of lhs, rhs and the output after dilation (the output's
dilation being the stride), and lo the low padding: o[i] = sum_t rhs[t] lhs[i + t - lo], 0 <= i < O.

    input gradient     lhs'[i] = sum_t rhs[t] g[i + lo - t]: the window read from its other end, low padding
                       R - 1 - lo, high padding what makes the result L long; stride and lhs_dilation swap.
    weight gradient    rhs'[t] = sum_i g[i] lhs[t + i - lo]: low padding lo, high padding what makes the
                       result R long; stride and rhs_dilation swap, g is the window. Where the window was
                       read from its end, the result is the gradient turned round (:func:`as_weight`).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jconv.problem import ConvProblem, Layout, dilated


def input_problem(p: ConvProblem) -> ConvProblem:
    """The convolution of (output gradient, :func:`kernel_for_input`) that is d/dlhs, but for :func:`as_input`."""
    o = dilated(p.output_shape[2:], p.strides)
    low = tuple(r - 1 - lo for r, (lo, _) in zip(p.rhs_extent, p.padding, strict=True))
    high = tuple(left + r - 1 - out - lo for left, r, out, lo in zip(p.lhs_extent, p.rhs_extent, o, low, strict=True))
    lhs_spec, rhs_spec, out_spec = p.layout
    return p.replace(
        lhs_shape=p.output_shape,
        rhs_shape=(p.rhs_shape[1] * p.groups, p.rhs_shape[0] // p.groups, *p.window),
        layout=Layout(out_spec, _swapped(rhs_spec), lhs_spec),
        strides=p.lhs_dilation,
        lhs_dilation=p.strides,
        padding=tuple(zip(low, high, strict=True)),
        feature_groups=p.groups,
        batch_groups=1,
        dtype=p.out_dtype,
        preferred_element_type=None,
        out_sharding=None,
        reversed=not p.reversed,
    )


def weight_problem(p: ConvProblem) -> ConvProblem:
    """The convolution of (lhs, output gradient) that is d/drhs, but for :func:`as_weight`."""
    o = dilated(p.output_shape[2:], p.strides)
    padding = tuple(
        (lo, out - left + r - 1 - lo)
        for (lo, _), left, r, out in zip(p.padding, p.lhs_extent, p.rhs_extent, o, strict=True)
    )
    lhs_spec, rhs_spec, out_spec = p.layout
    return p.replace(
        lhs_shape=(p.lhs_shape[1], p.lhs_shape[0], *p.lhs_shape[2:]),
        rhs_shape=(p.output_shape[1], p.output_shape[0], *p.output_shape[2:]),
        layout=Layout(_swapped(lhs_spec), _swapped(out_spec), _swapped(rhs_spec)),
        strides=p.rhs_dilation,
        rhs_dilation=p.strides,
        padding=padding,
        feature_groups=p.batch_groups,
        batch_groups=p.feature_groups,
        dtype=p.out_dtype,
        preferred_element_type=None,
        out_sharding=None,
        reversed=False,
    )


def kernel_for_input(p: ConvProblem, rhs: jax.Array) -> jax.Array:
    """``rhs`` with its groups moved to where :func:`input_problem` reads them."""
    out_axis, in_axis = p.layout.rhs_spec[:2]
    return merge_axis(split_axis(rhs, out_axis, p.groups), out_axis, in_axis) if p.groups > 1 else rhs


def as_weight(p: ConvProblem, out: jax.Array) -> jax.Array:
    """The result of :func:`weight_problem` as the gradient of ``p``'s rhs."""
    return lax.rev(out, p.layout.rhs_spec[2:]) if p.reversed else out


def as_input(p: ConvProblem, out: jax.Array) -> jax.Array:
    """The result of :func:`input_problem` in the shape of ``p``'s lhs."""
    batch, features = p.layout.lhs_spec[:2]
    if p.batch_groups == 1:
        return out
    return merge_axis(split_axis(out, features, p.batch_groups), features, batch)


def split_axis(x: jax.Array, axis: int, outer: int) -> jax.Array:
    """Axis of size ``outer * inner`` into (outer, inner)."""
    return x.reshape(*x.shape[:axis], outer, x.shape[axis] // outer, *x.shape[axis + 1 :])


def merge_axis(x: jax.Array, source: int, target: int) -> jax.Array:
    """Axis ``source`` taken out and merged, as the outer part, into what is then axis ``target``."""
    x = jnp.moveaxis(x, source, target)
    return x.reshape(*x.shape[:target], x.shape[target] * x.shape[target + 1], *x.shape[target + 2 :])


def _swapped(spec: Sequence[int]) -> tuple[int, ...]:
    return (spec[1], spec[0], *spec[2:])
