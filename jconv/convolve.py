"""The differentiable convolution: a bilinear JAX primitive, and the same rules as a ``jax.custom_vjp``.

The primitive's parameters are a :class:`ConvProblem` and the algorithm that the caller named, if any.
Which algorithm runs is decided when the program is lowered, and for the platform that it is lowered
for. The transposes bind the primitive again on the adjoint problems, and the batching rule folds the
mapped axis into a batch, a feature or a group axis, so that every transformation of JAX stays inside
the family and each of its members is planned on its own.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import checkify, jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jconv.adjoint import as_input, as_weight, input_problem, kernel_for_input, merge_axis, split_axis, weight_problem
from jconv.algorithms.base import Algorithm, lax_convolution, vary, varying
from jconv.errors import AlgorithmError, ConvError, ConvTypeError
from jconv.planner import choose, resolve
from jconv.problem import ConvProblem, is_static

Autodiff = Literal["primitive", "custom_vjp"]
AlgorithmLike = str | Algorithm
Bind = Callable[[jax.Array, jax.Array, ConvProblem], jax.Array]

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def convolve(
    lhs: Any, rhs: Any, problem: ConvProblem, algorithm: AlgorithmLike = "auto", autodiff: Autodiff = "primitive"
) -> jax.Array:
    """The convolution that ``problem`` describes, of operands that have its shapes and dtype.

    Args:
        lhs, rhs: arrays in the problem's layout.
        problem: from :meth:`ConvProblem.of`.
        algorithm: ``"auto"``, a name, or an Algorithm. A named one serves this call, or it is an
            error; in derivatives and under ``vmap``, where the problem is another one, it serves
            where it can and the planner chooses where it cannot.
        autodiff: ``"primitive"`` for every transformation of JAX; ``"custom_vjp"`` for the same
            rules in public JAX API only, reverse mode only.

    Raises:
        AlgorithmError: if the named algorithm cannot serve the problem.
        ConvError: for an unknown ``autodiff``.
    """
    bind = _binder(problem, algorithm, autodiff)
    return bind(*_equally_varying(_array(lhs), _array(rhs)), problem)


def input_gradient(
    grad: Any, rhs: Any, problem: ConvProblem, algorithm: AlgorithmLike = "auto", autodiff: Autodiff = "primitive"
) -> jax.Array:
    """d/dlhs of ``sum(grad * convolve(lhs, rhs, problem))``, in lhs's layout and shape."""
    bind = _binder(input_problem(problem), algorithm, autodiff)
    return _input_rule(bind, *_equally_varying(_array(grad), _array(rhs)), problem)


def weight_gradient(
    lhs: Any, grad: Any, problem: ConvProblem, algorithm: AlgorithmLike = "auto", autodiff: Autodiff = "primitive"
) -> jax.Array:
    """d/drhs of ``sum(grad * convolve(lhs, rhs, problem))``, in rhs's layout and shape."""
    bind = _binder(weight_problem(problem), algorithm, autodiff)
    return _weight_rule(bind, *_equally_varying(_array(lhs), _array(grad)), problem)


def as_operand(name: str, value: Any) -> jax.Array:
    """``value`` as a JAX array; only what already is an array is taken, as in ``jax.lax``."""
    if isinstance(value, jax.Array):
        return value
    if not isinstance(value, np.ndarray | np.generic):
        raise ConvTypeError(f"{name} must be an array, got {type(value).__name__}; wrap it in jnp.asarray(...)")
    return jnp.asarray(value)


def _array(x: Any) -> jax.Array:
    return x if isinstance(x, jax.Array) else jnp.asarray(x)


def _binder(problem: ConvProblem, algorithm: AlgorithmLike, autodiff: str) -> Bind:
    wish = resolve(algorithm, problem)
    if autodiff == "primitive":
        return functools.partial(_bind, wish=wish)
    if autodiff == "custom_vjp":
        return functools.partial(_reverse_only, wish=wish)
    raise ConvError(f"autodiff must be 'primitive' or 'custom_vjp', got {autodiff!r}")


# The two rules. `bind` computes a problem: the primitive's, or the custom_vjp function's.


def _input_rule(bind: Bind, grad: jax.Array, rhs: jax.Array, p: ConvProblem, out_sharding: Any = None) -> jax.Array:
    kernel = kernel_for_input(p, _cast(rhs, grad.dtype))
    out = bind(grad, kernel, input_problem(p).replace(out_sharding=out_sharding))
    return _cast(as_input(p, out), p.dtype)


def _weight_rule(bind: Bind, lhs: jax.Array, grad: jax.Array, p: ConvProblem, out_sharding: Any = None) -> jax.Array:
    out = bind(_cast(lhs, grad.dtype), grad, weight_problem(p).replace(out_sharding=out_sharding))
    return _cast(as_weight(p, out), p.dtype)


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    """``x`` itself where the dtype is right, which keeps a weak type weak."""
    return x if x.dtype == dtype else x.astype(dtype)


# The primitive.

conv_p = Primitive("jconv")


def _bind(lhs: jax.Array, rhs: jax.Array, problem: ConvProblem, wish: Algorithm | None) -> jax.Array:
    with jax.named_scope("jconv"):
        return conv_p.bind(*_equally_varying(lhs, rhs), problem=problem, wish=wish)


@functools.lru_cache(maxsize=4096)
def _jitted(problem: ConvProblem, wish: Algorithm | None) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return jax.jit(functools.partial(_bind, problem=problem, wish=wish))


@conv_p.def_impl
def _evaluate(lhs: jax.Array, rhs: jax.Array, *, problem: ConvProblem, wish: Algorithm | None) -> jax.Array:
    types = jax.typeof(lhs), jax.typeof(rhs)
    # Its own type rule makes the primitive's result weak, and places it in an explicit mesh.
    if _explicit_sharding(types[0]) is not None or all(aval.weak_type for aval in types):
        with jax.disable_jit(False):
            return _jitted(problem, wish)(lhs, rhs)
    # The algorithm itself, and not the primitive, so that JAX can replay it under debug_nans and disable_jit.
    placed = [x.devices() for x in (lhs, rhs) if hasattr(x, "devices")]
    platform = next(iter(placed[0])).platform if placed else jax.default_backend()
    return _runner(choose(problem, wish, platform, max(map(len, placed), default=1)), problem)(lhs, rhs)


@conv_p.def_abstract_eval
def _abstract(lhs: Any, rhs: Any, *, problem: ConvProblem, wish: Algorithm | None) -> Any:
    return _lax_type(lhs, rhs, problem)


@functools.lru_cache(maxsize=4096)
def _lax_type(lhs: Any, rhs: Any, problem: ConvProblem) -> Any:
    """The result's type by lax's own rules for shapes, dtypes, weak types, shardings and varying axes."""
    return jax.make_jaxpr(functools.partial(lax_convolution, problem))(lhs, rhs).out_avals[0]


def _lower(ctx: Any, lhs: Any, rhs: Any, *, problem: ConvProblem, wish: Algorithm | None, platform: str) -> Any:
    # Algorithms are traced without the shardings of an explicit mesh: the partitioner places them.
    ctx = ctx.replace(avals_in=[_unsharded(aval) for aval in ctx.avals_in])
    problem = problem.replace(out_sharding=None)
    chosen = choose(problem, wish, platform, _partitions(ctx.module_context.axis_context))
    return mlir.lower_fun(_runner(chosen, problem), multiple_results=False)(ctx, lhs, rhs)


def _partitions(context: Any) -> int:
    """Over how many devices the partitioner may spread the arrays of a program; inside ``shard_map`` those of the axes
    that are left to it."""
    if hasattr(context, "mesh"):
        return prod(size for axis, size in context.mesh.shape.items() if axis not in context.manual_axes)
    return getattr(context, "num_devices", 1)


def run_algorithm(run: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """``jconv.install`` has another in its place, so that a lax convolution of an algorithm's stays lax's."""
    return run(*operands)


_RUNNER = "jconv."  # what no function's own name begins with


def is_runner(equation: Any) -> bool:
    """True for the inner jit that an algorithm runs in, under ``autodiff="custom_vjp"``: its lax convolutions are its own."""
    return str(equation.params.get("name", "")).startswith(_RUNNER)


@functools.lru_cache(maxsize=4096)
def _runner(algorithm: Algorithm, problem: ConvProblem) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The algorithm as an inner jit, so that equal convolutions of a program are traced and lowered once."""

    def run(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        with jax.named_scope(f"jconv.{algorithm.name}"):
            out = run_algorithm(functools.partial(algorithm.run, problem), lhs, rhs)
        if out.shape != problem.physical_output_shape or out.dtype != problem.out_dtype:
            raise AlgorithmError(
                f"algorithm {algorithm.name!r} gave {out.dtype}{list(out.shape)}, but the convolution's result is "
                f"{problem.out_dtype}{list(problem.physical_output_shape)}; mend its run()"
            )
        return out

    run.__name__ = _RUNNER + algorithm.name
    return jax.jit(run)


for _platform in _PLATFORMS:
    mlir.register_lowering(conv_p, functools.partial(_lower, platform=_platform), platform=_platform)
mlir.register_lowering(conv_p, functools.partial(_lower, platform="default"))


def _transpose_lhs(grad: Any, lhs: Any, rhs: Any, *, problem: ConvProblem, wish: Algorithm | None) -> Any:
    return _input_rule(functools.partial(_bind, wish=wish), grad, rhs, problem, _explicit_sharding(lhs.aval))


def _transpose_rhs(grad: Any, lhs: Any, rhs: Any, *, problem: ConvProblem, wish: Algorithm | None) -> Any:
    return _weight_rule(functools.partial(_bind, wish=wish), lhs, grad, problem, _explicit_sharding(rhs.aval))


ad.defbilinear(conv_p, _transpose_lhs, _transpose_rhs)


def _batch(operands: Any, axes: Any, *, problem: ConvProblem, wish: Algorithm | None) -> tuple[jax.Array, int]:
    """vmap stays inside the family: the mapped axis becomes batch, output features, or groups."""
    (lhs, rhs), (lhs_axis, rhs_axis) = operands, axes
    size = lhs.shape[lhs_axis] if lhs_axis is not None else rhs.shape[rhs_axis]
    lhs_spec, rhs_spec, out_spec = problem.layout
    p = problem
    if is_static(size) and size == 0:
        return jnp.zeros((0, *p.physical_output_shape), p.out_dtype), 0
    if rhs_axis is None and p.batch_groups == 1:
        folded, target = p.replace(lhs_shape=_times(p.lhs_shape, 0, size)), out_spec[0]
        lhs = merge_axis(lhs, lhs_axis, lhs_spec[0])  # pyright: ignore[reportArgumentType]
    elif lhs_axis is None and p.groups == 1:
        folded, target = p.replace(rhs_shape=_times(p.rhs_shape, 0, size)), out_spec[1]
        rhs = merge_axis(rhs, rhs_axis, rhs_spec[0])  # pyright: ignore[reportArgumentType]
    else:
        if not is_static(size):
            raise ConvError(
                f"vmap over the kernel of groups, or over both operands, makes {size} groups; their number must be known"
            )
        lhs = jnp.broadcast_to(lhs, (size, *lhs.shape)) if lhs_axis is None else jnp.moveaxis(lhs, lhs_axis, 0)
        rhs = jnp.broadcast_to(rhs, (size, *rhs.shape)) if rhs_axis is None else jnp.moveaxis(rhs, rhs_axis, 0)
        rhs = merge_axis(rhs, 0, rhs_spec[0])
        grouped = 0 if p.batch_groups > 1 else 1
        lhs = merge_axis(lhs, 0, lhs_spec[grouped])
        groups = {"batch_groups" if grouped == 0 else "feature_groups": p.groups * size}
        folded = p.replace(
            lhs_shape=_times(p.lhs_shape, grouped, size), rhs_shape=_times(p.rhs_shape, 0, size), **groups
        )
        target = out_spec[1]
    out = _bind(lhs, rhs, folded, wish)
    return split_axis(out, target, size), target


batching.primitive_batchers[conv_p] = _batch


# lax's rule for a bilinear primitive, whose convention for the series is its own to change.
jet.jet_rules[conv_p] = functools.partial(jet.jet_rules[lax.conv_general_dilated_p].func, conv_p)


# So that checkify names the convolution that makes a NaN; it has no public door for rules.
_checks = getattr(sys.modules[checkify.checkify.__module__], "error_checks", {})
if lax.conv_general_dilated_p in _checks:
    _checks[conv_p] = functools.partial(_checks[lax.conv_general_dilated_p].func, conv_p)


def dots_saveable(prim: Any, *args: Any, **params: Any) -> bool:
    """:func:`jax.checkpoint_policies.dots_saveable`, which knows jconv's convolutions too.

    >>> f = jax.checkpoint(lambda x: jnp.sin(x), policy=dots_saveable)
    >>> float(jax.grad(f)(0.0))
    1.0
    """
    return prim is conv_p or jax.checkpoint_policies.dots_saveable(prim, *args, **params)


# The same rules by public API alone.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _custom(lhs: jax.Array, rhs: jax.Array, problem: ConvProblem, wish: Algorithm | None) -> jax.Array:
    if _explicit_sharding(jax.typeof(lhs)) is not None:
        return _in_explicit_mesh(lhs, rhs, problem, wish)
    return _by_platform(lhs, rhs, problem=problem, wish=wish)


def _by_platform(lhs: jax.Array, rhs: jax.Array, *, problem: ConvProblem, wish: Algorithm | None) -> jax.Array:
    with jax.named_scope("jconv"):
        default = choose(problem, wish, "default")
        chosen = {platform: choose(problem, wish, platform) for platform in _PLATFORMS}
        others = {platform: _runner(a, problem) for platform, a in chosen.items() if a != default}
        if not others:
            return _runner(default, problem)(lhs, rhs)
        return lax.platform_dependent(lhs, rhs, default=_runner(default, problem), **others)


def _custom_forward(lhs: Any, rhs: Any, problem: ConvProblem, wish: Algorithm | None) -> Any:
    return _custom(lhs, rhs, problem, wish), (lhs, rhs)


def _custom_backward(problem: ConvProblem, wish: Algorithm | None, operands: Any, grad: Any) -> Any:
    lhs, rhs = operands
    bind = functools.partial(_custom, wish=wish)
    to_lhs, to_rhs = (_explicit_sharding(jax.typeof(x)) for x in operands)
    return _input_rule(bind, grad, rhs, problem, to_lhs), _weight_rule(bind, lhs, grad, problem, to_rhs)


def _in_explicit_mesh(lhs: jax.Array, rhs: jax.Array, problem: ConvProblem, wish: Algorithm | None) -> jax.Array:
    """The algorithm with its shardings left to the partitioner; the result's is the one that lax gives it."""
    result = _lax_type(jax.typeof(lhs), jax.typeof(rhs), problem)
    inner = functools.partial(_by_platform, problem=problem.replace(out_sharding=None), wish=wish)
    automatic: Any = jax.sharding.auto_axes
    return automatic(inner, out_sharding=result.sharding)(lhs, rhs)


_custom.defvjp(_custom_forward, _custom_backward)


def _reverse_only(lhs: jax.Array, rhs: jax.Array, problem: ConvProblem, wish: Algorithm | None) -> jax.Array:
    try:
        return _custom(lhs, rhs, problem, wish)
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise ConvError(
            "autodiff='custom_vjp' has no forward mode (jvp, jacfwd, linearize, hessian); "
            "use the default autodiff='primitive'"
        ) from error


# Types of operands inside shard_map and under explicit meshes.


def _equally_varying(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Under ``shard_map(check_vma=True)``, both operands cast to vary over the union of their mesh axes."""
    left, right = varying(lhs), varying(rhs)
    if left == right:
        return lhs, rhs
    return vary(lhs, right - left), vary(rhs, left - right)


def _explicit_sharding(aval: Any) -> Any:
    sharding = getattr(aval, "sharding", None)
    if sharding is None or jax.sharding.AxisType.Explicit not in getattr(sharding.mesh, "axis_types", ()):
        return None
    return sharding


def _unsharded(aval: Any) -> Any:
    sharding = _explicit_sharding(aval)
    return aval if sharding is None else aval.update(sharding=sharding.update(spec=(None,) * aval.ndim))


def _times(shape: tuple[int, ...], axis: int, factor: int) -> tuple[int, ...]:
    return (*shape[:axis], shape[axis] * factor, *shape[axis + 1 :])
