"""One description of a convolution: every argument is parsed here, once; later code trusts it."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jconv.errors import ConvError, ConvTypeError

Layout = lax.ConvDimensionNumbers
Pads = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class ConvProblem:
    """A convolution without its operands: frozen, hashable, a jit-static value and a cache key.

    Shapes are in logical order whatever the layout: ``lhs_shape`` is (batch, features, *spatial)
    and ``rhs_shape`` (out features, in features / groups, *window). Padding is explicit and may be
    negative. ``reversed`` says that the window is read from its end, as input gradients do: a kernel
    need not be copied to be turned round. Build one with :meth:`of`, which resolves ``'SAME'``, ``'NHWC'``
    and ``None``.

    >>> import jax, jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32)
    >>> w = jax.ShapeDtypeStruct((3, 3, 3, 16), jnp.float32)
    >>> p = ConvProblem.of(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    >>> p.padding, p.output_shape, p.macs
    (((0, 1), (0, 1)), (8, 16, 16, 16), 884736)
    """

    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    layout: Layout
    strides: tuple[int, ...]
    padding: Pads
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_groups: int
    batch_groups: int
    dtype: np.dtype
    precision: Any = None
    preferred_element_type: np.dtype | None = None
    out_sharding: NamedSharding | PartitionSpec | None = None
    reversed: bool = False

    @classmethod
    def of(
        cls,
        lhs: Any,
        rhs: Any,
        window_strides: Sequence[int],
        padding: str | Sequence[tuple[int, int]],
        lhs_dilation: Sequence[int] | None = None,
        rhs_dilation: Sequence[int] | None = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        precision: Any = None,
        preferred_element_type: Any = None,
        out_sharding: Any = None,
    ) -> ConvProblem:
        """The problem that ``jax.lax.conv_general_dilated`` with these arguments poses.

        Args:
            lhs, rhs: anything with ``shape`` and ``dtype``, such as arrays or ShapeDtypeStructs.
            window_strides, ...: as in ``jax.lax.conv_general_dilated``.

        Raises:
            ConvError: for values that describe no convolution (:class:`ConvTypeError` where lax
                raises ``TypeError``), with the argument, what came, and the remedy.
        """
        given = (
            window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_group_count,
            batch_group_count, precision, preferred_element_type, out_sharding,
        )  # fmt: skip
        key = _key(lhs, rhs, given)
        known = None if key is None else _known.get(key)
        if known is None:
            known = cls._of(lhs, rhs, *given)
            if key is not None:
                if len(_known) >= _MOST_KNOWN:
                    _known.clear()
                _known[key] = known
        return known

    @classmethod
    def _of(
        cls, lhs: Any, rhs: Any, window_strides: Any, padding: Any, lhs_dilation: Any, rhs_dilation: Any,
        dimension_numbers: Any, feature_group_count: Any, batch_group_count: Any, precision: Any,
        preferred_element_type: Any, out_sharding: Any,
    ) -> ConvProblem:  # fmt: skip
        lhs_dtype, rhs_dtype = _dtype("lhs", lhs), _dtype("rhs", rhs)
        if lhs_dtype != rhs_dtype:
            raise ConvTypeError(
                f"lhs and rhs need the same dtype, got {lhs_dtype} and {rhs_dtype}; cast one of them with .astype()"
            )
        layout = layout_of(lhs.shape, rhs.shape, dimension_numbers)
        n = len(layout.rhs_spec) - 2
        lhs_shape = tuple(lhs.shape[d] for d in layout.lhs_spec)
        rhs_shape = tuple(rhs.shape[d] for d in layout.rhs_spec)
        strides = positive_tuple("window_strides", window_strides, n)
        lhs_dil = positive_tuple("lhs_dilation", (1,) * n if lhs_dilation is None else lhs_dilation, n)
        rhs_dil = positive_tuple("rhs_dilation", (1,) * n if rhs_dilation is None else rhs_dilation, n)
        feature_groups = integer("feature_group_count", feature_group_count, 1)
        batch_groups = integer("batch_group_count", batch_group_count, 1)
        _check_groups(lhs_shape, rhs_shape, feature_groups, batch_groups)
        pads = _pads(padding, lhs_shape[2:], rhs_shape[2:], strides, lhs_dil, rhs_dil)
        out_dtype = _preferred(lhs_dtype, preferred_element_type)
        problem = cls(
            lhs_shape, rhs_shape, layout, strides, pads, lhs_dil, rhs_dil, feature_groups, batch_groups,
            lhs_dtype, canonical_precision(precision), out_dtype, _sharding(out_sharding),
        )  # fmt: skip
        for axis, size in enumerate(problem.padded):
            if is_static(size) and size < 0:
                raise ConvError(
                    f"padding {pads[axis]} takes more than spatial axis {axis} has: "
                    f"{problem.lhs_shape[2 + axis]} elements; negative padding may remove at most all of them"
                )
        return problem

    @cached_property
    def lhs_extent(self) -> tuple[int, ...]:
        """Spatial sizes of lhs after its dilation."""
        return dilated(self.lhs_shape[2:], self.lhs_dilation)

    @cached_property
    def rhs_extent(self) -> tuple[int, ...]:
        """Window sizes after the dilation of rhs."""
        return dilated(self.rhs_shape[2:], self.rhs_dilation)

    @cached_property
    def padded(self) -> tuple[int, ...]:
        """Spatial sizes of lhs after dilation and padding."""
        return tuple(s + lo + hi for s, (lo, hi) in zip(self.lhs_extent, self.padding, strict=True))

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """Logical shape (batch, features, *spatial) of the result."""
        spatial = tuple(
            max(0, (p - r) // s + 1) if is_static(p, r) else (p - r) // s + 1
            for p, r, s in zip(self.padded, self.rhs_extent, self.strides, strict=True)
        )
        return (self.lhs_shape[0] // self.batch_groups, self.rhs_shape[0], *spatial)

    @cached_property
    def physical_output_shape(self) -> tuple[int, ...]:
        """The shape of the result as it lies in memory."""
        spec = tuple(self.layout.out_spec)
        return tuple(self.output_shape[spec.index(axis)] for axis in range(len(spec)))

    @property
    def out_dtype(self) -> np.dtype:
        return self.dtype if self.preferred_element_type is None else self.preferred_element_type

    @property
    def spatial_rank(self) -> int:
        return len(self.strides)

    @property
    def groups(self) -> int:
        """Feature groups or batch groups; at most one of them is above 1."""
        return max(self.feature_groups, self.batch_groups)

    @property
    def window(self) -> tuple[int, ...]:
        return self.rhs_shape[2:]

    @property
    def macs(self) -> int:
        """Multiply-adds of direct summation, padding counted as if it were data."""
        return prod(self.output_shape) * prod(self.rhs_shape[1:])

    @property
    def is_pointwise(self) -> bool:
        return all(is_static(k) and k == 1 for k in self.window)

    @property
    def is_depthwise(self) -> bool:
        """True for one input feature a group; its kernel gradient is a problem of another shape."""
        return self.feature_groups > 1 and self.rhs_shape[1] == 1

    @cached_property
    def is_weight_gradient(self) -> bool:
        """True for the shape of a kernel gradient: a large window that yields a small output, or one whose holes are
        as wide as the output, as that of patches. Batch groups, which the kernel gradient of feature groups has, tip
        the balance. False where sizes are symbols."""
        window, output = prod(self.window), prod(self.output_shape[2:])
        if not is_static(window, output):
            return False
        of_patches = output > 1 and self.rhs_dilation == self.output_shape[2:] and max(self.strides) == 1
        return window > output or of_patches or (self.batch_groups > 1 and window == output)

    @cached_property
    def is_empty(self) -> bool:
        return any(is_static(d) and d == 0 for d in (*self.lhs_shape, *self.rhs_shape, *self.output_shape))

    def replace(self, **changes: Any) -> ConvProblem:
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        parts = [f"{self.dtype} {_x(self.lhs_shape)} * {_x(self.rhs_shape)} -> {_x(self.output_shape)}"]
        one = (1,) * self.spatial_rank
        for name, value, default in (
            ("strides", self.strides, one),
            ("padding", self.padding, ((0, 0),) * self.spatial_rank),
            ("lhs_dilation", self.lhs_dilation, one),
            ("rhs_dilation", self.rhs_dilation, one),
            ("feature_groups", self.feature_groups, 1),
            ("batch_groups", self.batch_groups, 1),
            ("precision", self.precision, None),
            ("preferred_element_type", self.preferred_element_type, None),
            ("reversed", self.reversed, False),
        ):
            if value != default:
                parts.append(f"{name} {value}")
        return ", ".join(parts)


# The problems of arguments that were parsed before: an eager call spends more time on parsing than on anything else.

_MOST_KNOWN = 4096
_known: dict[Any, ConvProblem] = {}


def _key(lhs: Any, rhs: Any, given: tuple[Any, ...]) -> Any:
    """The arguments, hashable, with the settings that they are read under; None where equal keys might not mean equal
    problems: 1, 1.0 and True are equal, and not all are admitted."""
    try:
        config: Any = jax.config
        return (
            _exact(lhs.shape), lhs.dtype, _exact(rhs.shape), rhs.dtype, _exact(given),
            config.jax_enable_x64, config.jax_default_matmul_precision,
        )  # fmt: skip
    except (AttributeError, TypeError):
        return None


def _exact(value: Any) -> Any:
    kind = type(value)
    if kind in _ATOMS:
        return value
    if kind in _SEQUENCES:
        for v in value:
            if type(v) is not int:
                return tuple(map(_exact, value))
        return tuple(value)
    if isinstance(value, np.dtype | type):
        return value
    raise TypeError


_ATOMS = frozenset((int, str, type(None), lax.Precision))
_SEQUENCES = frozenset((tuple, list, lax.ConvDimensionNumbers))


def dilated(sizes: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Sizes after ``d - 1`` holes between neighbours; nothing stays nothing."""
    return tuple(0 if is_static(s) and s == 0 else 1 + d * (s - 1) for s, d in zip(sizes, dilation, strict=True))


def is_static(*dims: Any) -> bool:
    """False if a dimension is symbolic, as in an export with a symbolic batch."""
    for d in dims:  # noqa: SIM110 - a plan asks a hundred times
        if type(d) is not int and hasattr(d, "scope"):
            return False
    return True


def integer(name: str, value: Any, minimum: int) -> int:
    """``value`` as an int of at least ``minimum``; strings, booleans and fractions are refused."""
    if isinstance(value, bool | np.bool_ | str | bytes):
        raise ConvTypeError(f"{name} must be an integer, got {value!r}; write it as a number such as {max(minimum, 1)}")
    try:
        number = operator.index(value)
    except TypeError:
        raise ConvTypeError(
            f"{name} must be an integer known at trace time, got {value!r}; pass a Python int"
        ) from None
    if number < minimum:
        raise ConvError(f"{name} must be at least {minimum}, got {number}")
    return number


def entries(name: str, value: Any, length: int) -> tuple[Any, ...]:
    """``value`` as a tuple of ``length`` entries; strings, sets and single numbers are refused."""
    try:
        found = None if isinstance(value, str | bytes | set | frozenset | dict) else tuple(value)
    except TypeError:
        found = None
    if found is None:
        raise ConvTypeError(f"{name} must be a sequence of {length} integers, got {value!r}")
    if len(found) != length:
        raise ConvError(f"{name} has {len(found)} entries, got {found}, but needs {length}, as the operands' rank says")
    return found


def positive_tuple(name: str, value: Any, length: int) -> tuple[int, ...]:
    """``value`` as a tuple of ``length`` integers of at least 1."""
    return tuple(integer(f"{name}[{i}]", v, 1) for i, v in enumerate(entries(name, value, length)))


def _x(shape: Sequence[Any]) -> str:
    return "x".join(map(str, shape))


def _dtype(name: str, operand: Any) -> np.dtype:
    if not hasattr(operand, "shape") or not hasattr(operand, "dtype"):
        raise ConvTypeError(f"{name} must be an array, got {type(operand).__name__}; wrap it in jnp.asarray(...)")
    dtype = operand.dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        raise ConvTypeError(f"{name} has dtype {dtype}, which cannot be multiplied; pass numbers")
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))


def layout_of(lhs_shape: Sequence[int], rhs_shape: Sequence[int], numbers: Any) -> Layout:
    """``dimension_numbers`` of any form as axes in logical order (batch, features, *spatial)."""
    n = len(lhs_shape)
    if n != len(rhs_shape):
        raise ConvTypeError(
            f"lhs and rhs need the same number of dimensions, got shapes {tuple(lhs_shape)} and {tuple(rhs_shape)}; "
            "add the batch dimension or the missing window dimensions"
        )
    if n < 2:
        raise ConvTypeError(f"lhs and rhs need a batch and a feature dimension, got shapes {lhs_shape} and {rhs_shape}")
    try:
        layout = lax.conv_dimension_numbers(tuple(lhs_shape), tuple(rhs_shape), numbers)
        specs = Layout(*(tuple(operator.index(d) for d in spec) for spec in layout))
    except (TypeError, ValueError, IndexError) as error:
        raise ConvTypeError(f"dimension_numbers {numbers!r} do not describe rank {n}: {error}") from None
    for name, spec in zip(("lhs_spec", "rhs_spec", "out_spec"), specs, strict=True):
        if sorted(spec) != list(range(n)):
            raise ConvTypeError(f"dimension_numbers.{name} must order the axes 0 to {n - 1}, got {spec}")
    return specs


def _check_groups(lhs_shape: Any, rhs_shape: Any, feature_groups: int, batch_groups: int) -> None:
    batch, features = lhs_shape[:2]
    out_features, in_features = rhs_shape[:2]
    if feature_groups > 1 and batch_groups > 1:
        raise ConvError(
            f"feature_group_count and batch_group_count cannot both be above 1, got {feature_groups} and {batch_groups}"
        )
    if features % feature_groups != 0:
        raise ConvError(
            f"feature_group_count must divide the features of lhs, got {feature_groups} groups for {features} features"
        )
    if features // feature_groups != in_features:
        raise ConvError(
            f"lhs has {features} features in {feature_groups} group(s), so rhs needs {features // feature_groups} "
            f"input features, got {in_features} (rhs is {tuple(rhs_shape)} as out features, in features, *window); "
            "check dimension_numbers and feature_group_count"
        )
    for name, groups in (("feature_group_count", feature_groups), ("batch_group_count", batch_groups)):
        if out_features % groups != 0:
            raise ConvError(
                f"{name} must divide the output features of rhs, got {groups} groups for {out_features} features"
            )
    if batch_groups > 1 and batch % batch_groups != 0:
        raise ConvError(
            f"batch_group_count must divide the batch of lhs, got {batch_groups} groups for a batch of {batch}"
        )


def _pads(padding: Any, spatial: Any, window: Any, strides: Any, lhs_dilation: Any, rhs_dilation: Any) -> Pads:
    n = len(strides)
    if isinstance(padding, str):
        if any(d != 1 for d in lhs_dilation):
            raise ConvError(
                f"padding {padding!r} has no agreed meaning with lhs_dilation {lhs_dilation}; "
                "give (low, high) pairs or use conv_transpose"
            )
        try:
            pads = lax.padtype_to_pads(spatial, dilated(window, rhs_dilation), strides, padding)
        except (RuntimeError, ValueError, TypeError):
            raise ConvError(
                f"padding must be 'SAME', 'SAME_LOWER', 'VALID' or {n} (low, high) pairs, got {padding!r}"
            ) from None
        return tuple((_pad(lo), _pad(hi)) for lo, hi in pads)
    try:
        pads = tuple((_pad(lo), _pad(hi)) for lo, hi in padding)
    except (TypeError, ValueError):
        raise ConvError(
            f"padding must be 'SAME', 'SAME_LOWER', 'VALID' or {n} (low, high) pairs of integers, got {padding!r}"
        ) from None
    if len(pads) != n:
        raise ConvTypeError(f"padding has {len(pads)} pairs, got {pads}, but the operands have {n} spatial dimensions")
    return pads


def _pad(value: Any) -> int:
    if isinstance(value, bool | np.bool_):
        raise TypeError("a bool is no size")
    return operator.index(value) if is_static(value) else value


def _preferred(dtype: np.dtype, preferred: Any) -> np.dtype | None:
    if preferred is None:
        return None
    try:
        wanted = np.dtype(jax.dtypes.canonicalize_dtype(preferred))
    except TypeError:
        raise ConvTypeError(f"preferred_element_type must be a dtype, got {preferred!r}") from None
    kinds = {"i": "if", "u": "uf", "f": "f", "c": "c"}
    kind, wanted_kind = (_kind(d) for d in (dtype, wanted))
    if wanted_kind not in kinds.get(kind, wanted_kind):
        raise ConvTypeError(
            f"preferred_element_type {wanted} cannot hold products of {dtype}: integers go to integers of the same sign "
            "or to floats, floats to floats, complex to complex"
        )
    if wanted.itemsize < dtype.itemsize:
        raise ConvTypeError(
            f"preferred_element_type must not be narrower than the operands, got {wanted} for {dtype}; "
            "cast the result instead"
        )
    return None if wanted == dtype else wanted


def _kind(dtype: np.dtype) -> str:
    """numpy's letter for the kind of a dtype, and ``f`` for bfloat16 and its like, which numpy does not know."""
    return "f" if jnp.issubdtype(dtype, jnp.floating) else dtype.kind


def canonical_precision(precision: Any) -> Any:
    """What lax admits, hashable; None takes ``jax.default_matmul_precision`` as lax does."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if precision is None or isinstance(precision, lax.DotAlgorithm | lax.DotAlgorithmPreset):
        return precision
    if isinstance(precision, str) and precision in lax.DotAlgorithmPreset.__members__:
        return lax.DotAlgorithmPreset[precision]
    try:
        if isinstance(precision, bool | int):
            raise TypeError
        if isinstance(precision, tuple | list):
            left, right = precision
            return (lax.Precision(left), lax.Precision(right))
        return lax.Precision(precision)
    except (ValueError, TypeError):
        raise ConvError(
            "precision must be None, a jax.lax.Precision, its name such as 'highest', or a pair of them, "
            f"got {precision!r}"
        ) from None


def _sharding(sharding: Any) -> NamedSharding | PartitionSpec | None:
    if sharding is None or isinstance(sharding, NamedSharding | PartitionSpec):
        return sharding
    raise ConvTypeError(f"out_sharding must be None, a NamedSharding or a PartitionSpec, got {sharding!r}")
