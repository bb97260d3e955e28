"""The table of convolutions that tests and benchmarks share. A case is named ``role:variant``.

Shapes are logical: lhs (batch, features, *spatial), rhs (out features, in features / groups, *window).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jconv import ConvProblem

CHANNEL_LAST = {
    0: ("NC", "IO", "NC"),
    1: ("NWC", "WIO", "NWC"),
    2: ("NHWC", "HWIO", "NHWC"),
    3: ("NDHWC", "DHWIO", "NDHWC"),
}
CHANNEL_FIRST = {
    0: ("NC", "OI", "NC"),
    1: ("NCW", "OIW", "NCW"),
    2: ("NCHW", "OIHW", "NCHW"),
    3: ("NCDHW", "OIDHW", "NCDHW"),
}


@dataclass(frozen=True)
class Case:
    name: str
    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    strides: tuple[int, ...] | None = None
    padding: Any = "VALID"
    lhs_dilation: tuple[int, ...] | None = None
    rhs_dilation: tuple[int, ...] | None = None
    feature_groups: int = 1
    batch_groups: int = 1
    layout: Any = None

    @property
    def rank(self) -> int:
        return len(self.lhs) - 2

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of conv_general_dilated."""
        return {
            "window_strides": self.strides or (1,) * self.rank,
            "padding": self.padding,
            "lhs_dilation": self.lhs_dilation,
            "rhs_dilation": self.rhs_dilation,
            "dimension_numbers": self.layout or CHANNEL_LAST[self.rank],
            "feature_group_count": self.feature_groups,
            "batch_group_count": self.batch_groups,
        }

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The physical shapes of lhs and rhs."""
        lhs_spec, rhs_spec, _ = self.arguments["dimension_numbers"]
        return _physical(self.lhs, lhs_spec, "NC", rhs_spec), _physical(self.rhs, rhs_spec, "OI", rhs_spec)

    def problem(self, dtype: Any = np.float32, **changes: Any) -> ConvProblem:
        lhs, rhs = (jax.ShapeDtypeStruct(shape, dtype) for shape in self.shapes())
        return ConvProblem.of(lhs, rhs, **{**self.arguments, **changes})

    def operands(self, dtype: Any, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Reproducible operands: normal numbers, or small integers for an integer dtype."""
        rng = np.random.default_rng([seed, len(self.name), *self.name.encode()])
        return tuple(draw(rng, shape, dtype) for shape in self.shapes())  # type: ignore[return-value]


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    dtype = np.dtype(dtype)
    if dtype.kind in "iu":
        return rng.integers(0 if dtype.kind == "u" else -4, 5, shape).astype(dtype)
    values = rng.standard_normal(shape)
    if dtype.kind == "c":
        return (values + 1j * rng.standard_normal(shape)).astype(dtype)
    return values.astype(dtype)


def _physical(logical: tuple[int, ...], spec: str, channels: str, rhs_spec: str) -> tuple[int, ...]:
    spatial = [c for c in rhs_spec if c not in "OI"]
    sizes = dict(zip([*channels, *spatial], logical, strict=True))
    return tuple(sizes[c] for c in spec)


C = Case
CASES: tuple[Case, ...] = (
    # dense
    C("dense_1d:valid", (2, 3, 11), (4, 3, 3)),
    C("dense_1d:same", (2, 3, 11), (4, 3, 4), padding="SAME"),
    C("dense_1d:same_lower", (2, 3, 11), (4, 3, 4), padding="SAME_LOWER"),
    C("dense_1d:causal", (2, 3, 11), (4, 3, 3), padding=((4, 0),), rhs_dilation=(2,)),
    C("dense_2d:valid", (2, 3, 7, 8), (4, 3, 3, 3)),
    C("dense_2d:same", (2, 3, 7, 8), (4, 3, 3, 3), padding="SAME"),
    C("dense_2d:even_window_same", (1, 3, 7, 8), (4, 3, 2, 4), padding="SAME"),
    C("dense_2d:asymmetric_padding", (2, 3, 6, 7), (4, 3, 3, 2), padding=((2, 0), (1, 3))),
    C("dense_2d:5x5", (1, 4, 9, 9), (3, 4, 5, 5), padding="SAME"),
    C("dense_2d:one_by_three", (2, 3, 6, 7), (4, 3, 1, 3), padding="SAME"),
    C("dense_2d:three_by_one", (2, 3, 6, 7), (4, 3, 3, 1), padding="SAME"),
    C("dense_2d:one_channel", (2, 1, 6, 7), (1, 1, 3, 3), padding="SAME"),
    C("dense_2d:wide", (1, 17, 6, 5), (33, 17, 3, 3), padding="SAME"),
    C("dense_2d:wide_five_by_one", (2, 20, 5, 7), (24, 20, 5, 1), padding="SAME"),
    C("dense_2d:batch_5", (5, 2, 4, 4), (3, 2, 2, 2)),
    C("dense_3d:valid", (1, 2, 5, 6, 4), (3, 2, 3, 3, 2)),
    C("dense_3d:same", (2, 2, 4, 5, 4), (3, 2, 3, 3, 3), padding="SAME"),
    # strided
    C("strided_1d:two", (2, 3, 12), (4, 3, 3), (2,), ((1, 1),)),
    C("strided_1d:over_window", (2, 3, 13), (4, 3, 2), (3,)),
    C("strided_2d:two", (2, 3, 8, 8), (4, 3, 3, 3), (2, 2), ((1, 1), (1, 1))),
    C("strided_2d:stride_tail", (2, 3, 8, 9), (4, 3, 3, 3), (3, 2)),
    C("strided_2d:same", (1, 3, 9, 8), (4, 3, 3, 3), (2, 2), "SAME"),
    C("strided_2d:uneven", (2, 3, 9, 8), (4, 3, 3, 2), (1, 3), "SAME"),
    C("strided_2d:stem_7x7", (1, 3, 16, 16), (5, 3, 7, 7), (2, 2), ((3, 3), (3, 3))),
    C("strided_2d:odd_features", (2, 3, 9, 8), (20, 3, 3, 3), (2, 2), ((1, 1), (0, 1))),
    C("strided_3d:two", (1, 2, 6, 5, 6), (3, 2, 3, 3, 3), (2, 2, 2), ((1, 1),) * 3),
    C("patchify_2d:4x4", (2, 3, 8, 12), (5, 3, 4, 4), (4, 4)),
    C("patchify_2d:tail", (2, 3, 9, 10), (5, 3, 4, 4), (4, 4)),
    C("patchify_3d:tubelet", (1, 2, 4, 6, 6), (4, 2, 2, 3, 3), (2, 3, 3)),
    # dilated
    C("dilated_1d:wavenet", (1, 3, 20), (4, 3, 2), padding=((8, 0),), rhs_dilation=(8,)),
    C("dilated_2d:two", (2, 3, 9, 9), (4, 3, 3, 3), padding=((2, 2), (2, 2)), rhs_dilation=(2, 2)),
    C("dilated_2d:uneven_stride", (2, 3, 10, 9), (4, 3, 3, 2), (2, 1), "SAME", rhs_dilation=(2, 3)),
    C("dilated_3d:two", (1, 2, 6, 6, 5), (3, 2, 2, 2, 2), rhs_dilation=(2, 1, 2)),
    # kernel gradients that shift the cotangent, and groups in one loop
    C("shifted_2d:dilated", (2, 16, 9, 10), (8, 16, 3, 3), padding="SAME", rhs_dilation=(2, 2)),
    C("shifted_3d:narrow", (1, 8, 3, 4, 5), (4, 8, 3, 3, 3), padding="SAME"),
    C("shifted_groups_2d:dilated", (2, 16, 9, 11), (16, 4, 3, 3), padding="SAME", rhs_dilation=(1, 2), feature_groups=4),
    C("strided_groups_2d:of_three", (2, 6, 9, 8), (4, 3, 3, 3), (2, 2), ((1, 1), (1, 1)), feature_groups=2),
    # pointwise
    C("pointwise_0d:matmul", (3, 4), (5, 4)),
    C("pointwise_1d:plain", (2, 5, 9), (7, 5, 1)),
    C("pointwise_2d:plain", (2, 5, 4, 6), (7, 5, 1, 1)),
    C("pointwise_2d:strided", (2, 5, 5, 6), (7, 5, 1, 1), (2, 2)),
    C("pointwise_2d:padded", (2, 5, 4, 6), (7, 5, 1, 1), padding=((1, 2), (0, 1))),
    C("pointwise_2d:cropped", (2, 5, 5, 6), (7, 5, 1, 1), padding=((-1, 0), (0, -2))),
    C("pointwise_2d:padded_strided", (2, 5, 4, 6), (7, 5, 1, 1), (2, 3), ((1, 2), (2, 1))),
    C("pointwise_2d:holes", (2, 5, 4, 3), (7, 5, 1, 1), padding=((1, 0), (0, 2)), lhs_dilation=(2, 3)),
    C("pointwise_2d:holes_strided", (1, 3, 4, 3), (2, 3, 1, 1), (2, 2), ((1, 1), (2, 0)), lhs_dilation=(3, 2)),
    C("pointwise_2d:grouped", (2, 6, 4, 4), (9, 2, 1, 1), feature_groups=3),
    C("pointwise_3d:plain", (1, 4, 3, 4, 2), (6, 4, 1, 1, 1)),
    # depthwise and grouped
    C("depthwise_1d:causal", (2, 6, 12), (6, 1, 4), padding=((3, 0),), feature_groups=6),
    C("depthwise_2d:same", (2, 6, 7, 7), (6, 1, 3, 3), padding="SAME", feature_groups=6),
    C("depthwise_2d:strided", (2, 6, 8, 8), (6, 1, 3, 3), (2, 2), ((1, 1), (1, 1)), feature_groups=6),
    C("depthwise_2d:5x5", (1, 4, 7, 9), (4, 1, 5, 5), padding="SAME", feature_groups=4),
    C("depthwise_2d:multiplier", (2, 3, 6, 6), (6, 1, 3, 3), padding="SAME", feature_groups=3),
    C("depthwise_2d:dilated", (1, 4, 9, 9), (4, 1, 3, 3), padding="SAME", rhs_dilation=(2, 2), feature_groups=4),
    C("depthwise_3d:same", (1, 3, 4, 5, 4), (3, 1, 3, 3, 3), padding="SAME", feature_groups=3),
    C("depthwise_2d:7x7_on_7", (2, 5, 7, 7), (5, 1, 7, 7), padding="SAME", feature_groups=5),
    C("depthwise_2d:blocks", (1, 192, 4, 5), (192, 1, 7, 7), padding="SAME", feature_groups=192),
    C("depthwise_2d:blocks_of_rows", (2, 40, 37, 33), (40, 1, 4, 4), padding=((1, 2), (2, 1)), feature_groups=40),
    C("depthwise_2d:prime_sizes", (3, 5, 23, 19), (5, 1, 3, 3), (2, 1), ((1, 1), (0, 1)), feature_groups=5),
    C("depthwise_2d:holes", (2, 3, 5, 4), (6, 1, 3, 4), (1, 2), ((2, 1), (1, -1)), (2, 3), (1, 2), feature_groups=3),
    C("depthwise_3d:strided", (2, 4, 4, 6, 5), (4, 1, 3, 3, 3), (1, 2, 2), ((1, 1),) * 3, feature_groups=4),
    C("grouped_2d:many_of_four", (2, 48, 6, 5), (24, 4, 3, 3), padding="SAME", feature_groups=12),
    C("grouped_2d:of_sixteen_strided", (3, 32, 7, 6), (64, 16, 3, 3), (2, 2), ((1, 1), (1, 1)), feature_groups=2),
    C("grouped_2d:dilated_fold", (2, 6, 9, 7), (6, 2, 3, 2), padding="SAME", rhs_dilation=(2, 3), feature_groups=3),
    C("large_window_1d:depthwise", (2, 3, 40), (3, 1, 17), padding=((16, 0),), feature_groups=3),
    C("large_window_1d:long_signal", (1, 2, 90), (4, 1, 5), padding=((4, 0),), feature_groups=2),
    C("large_window_2d:depthwise", (2, 3, 12, 11), (3, 1, 9, 7), padding="SAME", feature_groups=3),
    C("large_window_3d:depthwise", (1, 2, 6, 5, 6), (2, 1, 5, 3, 4), padding="SAME", feature_groups=2),
    C("large_window_2d:dilated", (1, 2, 13, 14), (2, 1, 4, 3), padding="SAME", rhs_dilation=(2, 3), feature_groups=2),
    C("grouped_1d:two", (2, 6, 9), (4, 3, 3), padding="SAME", feature_groups=2),
    C("grouped_2d:two", (2, 6, 7, 6), (4, 3, 3, 3), padding="SAME", feature_groups=2),
    C("grouped_2d:stride_tail", (2, 6, 8, 7), (9, 2, 3, 3), (3, 2), feature_groups=3),
    C("grouped_3d:two", (1, 4, 4, 4, 4), (6, 2, 2, 2, 2), feature_groups=2),
    # holes in the input: transposed convolutions and input gradients
    C("transposed_1d:two", (2, 3, 6), (4, 3, 4), padding=((2, 2),), lhs_dilation=(2,)),
    C("transposed_2d:4x4", (1, 3, 5, 4), (4, 3, 4, 4), padding=((2, 2), (2, 2)), lhs_dilation=(2, 2)),
    C("transposed_2d:2x2_unet", (2, 4, 3, 4), (3, 4, 2, 2), padding=((1, 1), (1, 1)), lhs_dilation=(2, 2)),
    C("transposed_2d:output_padding", (1, 3, 4, 4), (4, 3, 3, 3), padding=((1, 2), (1, 2)), lhs_dilation=(2, 2)),
    C("transposed_2d:grouped", (1, 4, 4, 4), (6, 2, 3, 3), padding=((2, 2), (1, 1)), lhs_dilation=(2, 1), feature_groups=2),
    C("transposed_3d:two", (1, 2, 3, 3, 2), (3, 2, 2, 2, 2), padding=((1, 1),) * 3, lhs_dilation=(2, 2, 2)),
    C("holes_2d:both_dilations", (1, 3, 5, 6), (4, 3, 2, 3), (2, 1), ((1, 2), (3, 0)), (2, 3), (3, 2)),
    # batch groups and the shapes of kernel gradients
    C("batch_groups_1d:two", (4, 3, 8), (6, 3, 3), batch_groups=2),
    C("batch_groups_2d:three", (6, 2, 5, 6), (3, 2, 3, 3), padding="SAME", batch_groups=3),
    C("batch_groups_2d:large_window", (6, 2, 7, 7), (6, 2, 5, 5), padding=((1, 1), (1, 1)), batch_groups=3),
    C("batch_groups_3d:large_window", (4, 2, 4, 4, 4), (4, 2, 3, 4, 3), batch_groups=2),
    C("kernel_gradient_1d:window_9", (3, 2, 9), (4, 2, 9), padding=((1, 1),)),
    C("kernel_gradient_2d:window_6x6", (3, 2, 6, 6), (4, 2, 6, 6), padding=((1, 1), (1, 1))),
    C("kernel_gradient_2d:strided", (3, 2, 9, 9), (4, 2, 4, 4), padding=((1, 0), (1, 0)), rhs_dilation=(2, 2)),
    C("kernel_gradient_2d:grouped", (3, 4, 6, 6), (4, 2, 5, 5), padding=((1, 0), (1, 0)), feature_groups=2),
    C("kernel_gradient_3d:window_4", (2, 2, 4, 4, 4), (3, 2, 4, 4, 4), padding=((1, 1),) * 3),
    # negative padding
    C("cropped_1d:both", (2, 3, 12), (4, 3, 3), padding=((-2, -1),)),
    C("cropped_2d:one_side", (2, 3, 9, 8), (4, 3, 3, 3), (2, 1), ((-1, 2), (1, -2))),
    C("cropped_2d:of_holes", (1, 3, 5, 5), (4, 3, 3, 3), padding=((-1, 1), (2, -2)), lhs_dilation=(2, 2)),
    # layouts
    C("layout_1d:channel_first", (2, 3, 9), (4, 3, 3), padding="SAME", layout=CHANNEL_FIRST[1]),
    C("layout_2d:channel_first", (2, 3, 7, 6), (4, 3, 3, 3), (2, 1), "SAME", layout=CHANNEL_FIRST[2]),
    C("layout_2d:channel_first_pointwise", (2, 3, 5, 6), (4, 3, 1, 1), (2, 1), layout=CHANNEL_FIRST[2]),
    C("layout_2d:channel_first_depthwise", (2, 4, 6, 6), (4, 1, 3, 3), padding="SAME", feature_groups=4, layout=CHANNEL_FIRST[2]),
    C("layout_2d:mixed", (2, 3, 7, 6), (4, 3, 3, 2), padding="SAME", layout=("NCHW", "HWIO", "NHWC")),
    C("layout_2d:scrambled", (2, 3, 7, 6), (4, 3, 3, 2), (2, 1), ((1, 0), (2, 1)), layout=("HNCW", "WOHI", "CWNH")),
    C("layout_2d:scrambled_pointwise", (2, 3, 5, 6), (4, 3, 1, 1), layout=("HNCW", "WOHI", "CWNH")),
    C("layout_2d:scrambled_grouped", (2, 6, 5, 6), (4, 3, 3, 2), feature_groups=2, layout=("CHWN", "HIOW", "WCHN")),
    C("layout_3d:channel_first", (1, 2, 4, 5, 4), (3, 2, 2, 3, 2), layout=CHANNEL_FIRST[3]),
    # edges
    C("edge_2d:single_output", (2, 3, 4, 5), (4, 3, 4, 5)),
    C("edge_2d:single_pixel", (2, 3, 1, 1), (4, 3, 3, 3), padding="SAME"),
    C("edge_2d:window_beyond_input", (2, 3, 2, 2), (4, 3, 5, 5), padding=((3, 3), (3, 3))),
    C("edge_2d:padding_only_windows", (1, 2, 3, 3), (2, 2, 2, 2), padding=((3, 0), (0, 4))),
    C("edge_1d:no_batch", (0, 3, 8), (4, 3, 3)),
    C("edge_2d:no_features", (2, 2, 5, 5), (0, 2, 4, 4)),
    C("edge_2d:no_features_of_a_point", (2, 2, 4, 4), (0, 2, 1, 1)),
    C("edge_2d:no_output", (2, 3, 3, 3), (4, 3, 5, 2)),
    # these once failed
    C("once_2d:crop_one_side_pad_the_other", (1, 8, 9, 8), (8, 8, 3, 3), padding=((0, 0), (-1, 1))),
    C("once_2d:crop_and_pad_both_axes", (2, 8, 9, 8), (8, 8, 3, 3), padding=((-1, 1), (-1, 1))),
    C("once_2d:padding_beyond_the_window", (2, 8, 7, 6), (8, 8, 3, 3), (2, 1), padding=((4, 0), (4, 0))),
    C("once_2d:crop_of_holes", (1, 4, 5, 6), (4, 4, 3, 3), padding=((-2, 3), (1, -3)), lhs_dilation=(3, 2)),
    C("once_2d:aborted", (1, 1, 7, 1), (2, 1, 2, 3), padding=((-2, 0), (1, 1)), lhs_dilation=(2, 1), layout=("WHCN", "IHOW", "CNHW")),
    C("once_1d:nothing_left_of_holes", (1, 2, 1), (3, 2, 1), padding=((-1, 1),), lhs_dilation=(2,)),
    C("once_2d:large_strided_depthwise", (1, 2, 28, 28), (2, 1, 13, 13), (2, 2), ((6, 6), (6, 6)), feature_groups=2),
)  # fmt: skip

BY_NAME = {case.name: case for case in CASES}
