"""Convolution by its definition, in numpy and float64 (or exact integers): the judge of every algorithm."""

from __future__ import annotations

import numpy as np

from jconv import ConvProblem
from jconv.problem import dilated


def convolve(p: ConvProblem, lhs: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """The sum over taps and features for each output element, in the problem's layout."""
    wide = np.complex128 if lhs.dtype.kind == "c" else np.int64 if lhs.dtype.kind in "iu" else np.float64
    x = lhs.astype(wide).transpose(p.layout.lhs_spec)
    w = rhs.astype(wide).transpose(p.layout.rhs_spec)
    if p.reversed:
        w = np.flip(w, tuple(range(2, w.ndim)))
    x = _pad(p, _with_holes(x, p.lhs_dilation))
    groups, (batch, out_features, *positions) = p.groups, p.output_shape
    out = np.zeros((batch, out_features, *positions), wide)
    for g in range(groups):
        rows = slice(g * batch, (g + 1) * batch) if p.batch_groups > 1 else slice(None)
        features = p.rhs_shape[1]
        columns = slice(g * features, (g + 1) * features) if p.feature_groups > 1 else slice(None)
        width = out_features // groups
        outs = slice(g * width, (g + 1) * width)
        for position in np.ndindex(*positions):
            window = tuple(
                slice(i * s, i * s + (k - 1) * d + 1, d)
                for i, s, k, d in zip(position, p.strides, p.window, p.rhs_dilation, strict=True)
            )
            part = x[(rows, columns, *window)]
            axes = tuple(range(1, part.ndim))
            out[(slice(None), outs, *position)] = np.tensordot(part, w[outs], (axes, axes))
    return out.transpose(np.argsort(p.layout.out_spec))


def _with_holes(x: np.ndarray, dilation: tuple[int, ...]) -> np.ndarray:
    sizes = [0 if s == 0 else (s - 1) * d + 1 for s, d in zip(x.shape[2:], dilation, strict=True)]
    out = np.zeros((*x.shape[:2], *sizes), x.dtype)
    out[(slice(None), slice(None), *(slice(None, None, d) for d in dilation))] = x
    return out


def _pad(p: ConvProblem, x: np.ndarray) -> np.ndarray:
    for axis, (low, high) in enumerate(p.padding, start=2):
        crop = [slice(None)] * x.ndim
        crop[axis] = slice(max(-low, 0), x.shape[axis] - max(-high, 0))
        width = [(0, 0)] * x.ndim
        width[axis] = (max(low, 0), max(high, 0))
        x = np.pad(x[tuple(crop)], width)
    return x


def trimmed(p: ConvProblem) -> ConvProblem:
    """``p`` without the high padding that no window reaches, which strides can leave over."""
    o = dilated(p.output_shape[2:], p.strides)
    return p.replace(
        padding=tuple(
            (lo, out + r - 1 - left - lo)
            for (lo, _), left, r, out in zip(p.padding, p.lhs_extent, p.rhs_extent, o, strict=True)
        )
    )
