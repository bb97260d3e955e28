"""Every transformation of JAX, against the same transformation of lax's convolution."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import AS_USERS, assert_close

import jconv

NHWC = ("NHWC", "HWIO", "NHWC")


def arrays(*shapes):
    return tuple(np.random.default_rng([i, *s]).standard_normal(s) for i, s in enumerate(shapes))


X, W = arrays((2, 6, 5, 4), (3, 2, 2, 6))
DX, DW = (np.cos(3 * a) for a in (X, W))
XS, WS = arrays((3, 2, 6, 5, 4), (3, 3, 2, 2, 6))


def conv(implementation, x, w):
    return implementation(
        x, w, (2, 1), ((1, 1), (0, 1)), rhs_dilation=(1, 2), dimension_numbers=NHWC, feature_group_count=2
    )


def loss(c, x, w):
    return jnp.sin(c(x, w)).sum()


def scalar(c, x, w):
    return (c(x, w) ** 3).sum()


def third(c, x, w):
    g1 = jax.grad(scalar, 2)
    g2 = jax.grad(lambda w: jnp.vdot(g1(c, x, w), DW))
    return jax.grad(lambda w: jnp.vdot(g2(w), DW))(w)


def scanned(c, x, w):
    def step(carry, x):
        return carry + jnp.sin(c(x, w)).sum(), c(x, w)

    return lax.scan(step, 0.0, XS)


def while_loop(c, x, w):
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] + c(x, w)), (0, c(x, w)))


def remat(policy):
    def run(c, x, w):
        f = jax.checkpoint(lambda x, w: jnp.sin(c(jnp.sin(x), w)).sum(), policy=policy)
        return jax.grad(f, (0, 1))(x, w)

    return run


def vmapped(in_axes, then=lambda c: c):
    operands = tuple(a if ax is None else np.moveaxis(b, 0, ax) for a, b, ax in zip((X, W), (XS, WS), in_axes))

    def run(c, x, w):
        return jax.vmap(then(c), in_axes)(*operands)

    return run


def grad_of(c):
    return jax.grad(functools.partial(loss, c), (0, 1))


TRANSFORMS = {
    "value": lambda c, x, w: c(x, w),
    "jit": lambda c, x, w: jax.jit(c)(x, w),
    "grad_lhs": lambda c, x, w: jax.grad(loss, 1)(c, x, w),
    "grad_rhs": lambda c, x, w: jax.grad(loss, 2)(c, x, w),
    "grad_both": lambda c, x, w: jax.grad(loss, (1, 2))(c, x, w),
    "value_and_grad_jit": lambda c, x, w: jax.jit(jax.value_and_grad(functools.partial(loss, c), (0, 1)))(x, w),
    "grad_second": lambda c, x, w: jax.grad(lambda w: jnp.vdot(jax.grad(loss, 2)(c, x, w), DW))(w),
    "grad_second_mixed": lambda c, x, w: jax.grad(lambda w: jnp.vdot(jax.grad(loss, 1)(c, x, w), DX))(w),
    "grad_third": third,
    "jvp_lhs": lambda c, x, w: jax.jvp(lambda x: c(x, w), (x,), (DX,)),
    "jvp_rhs": lambda c, x, w: jax.jvp(lambda w: c(x, w), (w,), (DW,)),
    "jvp_both": lambda c, x, w: jax.jvp(c, (x, w), (DX, DW)),
    "jvp_of_jvp": lambda c, x, w: jax.jvp(lambda x, w: jax.jvp(c, (x, w), (DX, DW))[1], (x, w), (DX, DW)),
    "jvp_of_grad": lambda c, x, w: jax.jvp(grad_of(c), (x, w), (DX, DW)),
    "grad_of_jvp": lambda c, x, w: jax.grad(lambda w: jax.jvp(functools.partial(loss, c), (x, w), (DX, DW))[1])(w),
    "jacfwd": lambda c, x, w: jax.jacfwd(c, 1)(x, w),
    "jacrev": lambda c, x, w: jax.jacrev(c, 1)(x, w),
    "hessian": lambda c, x, w: jax.hessian(functools.partial(loss, c), 1)(x, w),
    "hessian_rev_rev": lambda c, x, w: jax.jacrev(jax.jacrev(functools.partial(loss, c), 1), 1)(x, w),
    "linearize": lambda c, x, w: jax.linearize(c, x, w)[1](DX, DW),
    "linear_transpose_lhs": lambda c, x, w: jax.linear_transpose(lambda x: c(x, w), x)(jnp.sin(c(x, w))),
    "linear_transpose_rhs": lambda c, x, w: jax.linear_transpose(lambda w: c(x, w), w)(jnp.sin(c(x, w))),
    "vjp_vmapped": lambda c, x, w: jax.vmap(jax.vjp(c, x, w)[1])(jnp.stack([c(x, w), c(DX, w)])),
    "vmap_lhs": vmapped((0, None)),
    "vmap_lhs_last": vmapped((4, None)),
    "vmap_rhs": vmapped((None, 0)),
    "vmap_rhs_inner": vmapped((None, 2)),
    "vmap_both": vmapped((0, 0)),
    "vmap_both_uneven": vmapped((3, 1)),
    "vmap_grad_lhs": vmapped((0, None), grad_of),
    "vmap_grad_rhs": vmapped((None, 0), grad_of),
    "vmap_grad_both": vmapped((0, 0), grad_of),
    "vmap_vmap": lambda c, x, w: jax.vmap(lambda x: jax.vmap(lambda w: c(x, w))(WS))(XS),
    "vmap_hessian": lambda c, x, w: jax.vmap(lambda x: jax.hessian(functools.partial(loss, c), 1)(x, w))(XS),
    "vmap_jvp": lambda c, x, w: jax.vmap(lambda x, dx: jax.jvp(c, (x, w), (dx, DW)))(XS, XS),
    "grad_of_vmap": lambda c, x, w: jax.grad(lambda w: jnp.sin(jax.vmap(c, (0, None))(XS, w)).sum())(w),
    "vmap_linear_transpose": lambda c, x, w: jax.vmap(jax.linear_transpose(lambda x: c(x, w), x))(
        jax.vmap(c, (0, None))(XS, w)
    ),
    "scan": scanned,
    "grad_of_scan": lambda c, x, w: jax.grad(lambda w: scanned(c, x, w)[0])(w),
    "while": while_loop,
    "jvp_of_while": lambda c, x, w: jax.jvp(lambda w: while_loop(c, x, w)[1], (w,), (DW,)),
    "cond": lambda c, x, w: lax.cond(x.sum() > 0, c, lambda x, w: 2 * c(x, w), x, w),
    "grad_of_cond": lambda c, x, w: jax.grad(lambda w: lax.cond(x.sum() > 0, c, lambda x, w: 2 * c(x, w), x, w).sum())(w),
    "map": lambda c, x, w: lax.map(lambda x: c(x, w), XS),
    "remat": remat(None),
    "remat_dots_saveable": remat(jax.checkpoint_policies.dots_saveable),
    "remat_nothing_saveable": remat(jax.checkpoint_policies.nothing_saveable),
    "remat_everything_saveable": remat(jax.checkpoint_policies.everything_saveable),
    "hvp_jit": lambda c, x, w: jax.jit(lambda x, w: jax.jvp(grad_of(c), (x, w), (DX, DW)))(x, w),
}  # fmt: skip

FORWARD_MODE = ("jvp", "hvp", "jacfwd", "hessian", "linearize", "linear_transpose")


def both(transform, **options):
    ours = functools.partial(conv, functools.partial(jconv.conv_general_dilated, **options))
    theirs = functools.partial(conv, lax.conv_general_dilated)
    return transform(ours, X, W), transform(theirs, X, W)


def check(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jnp.result_type(a) == jnp.result_type(e)
        assert_close(a, e, "auto", np.float64, factor=8)


@pytest.mark.parametrize("algorithm", ("im2col", "xla"))
@pytest.mark.parametrize("name", TRANSFORMS)
def test_as_lax(name, algorithm):
    check(*both(TRANSFORMS[name], algorithm=algorithm))


REVERSE = [n for n in TRANSFORMS if n == "hessian_rev_rev" or not any(f in n for f in FORWARD_MODE)]


@pytest.mark.parametrize("name", REVERSE)
def test_custom_vjp_as_lax(name):
    check(*both(TRANSFORMS[name], algorithm="im2col", autodiff="custom_vjp"))


@pytest.mark.parametrize("name", ("jvp_lhs", "jvp_both", "jacfwd", "hessian", "vmap_jvp"))
def test_custom_vjp_refuses_forward_mode(name):
    with pytest.raises(jconv.ConvError, match="no forward mode.*use the default autodiff='primitive'"):
        both(TRANSFORMS[name], autodiff="custom_vjp")


@pytest.mark.parametrize("name", ("linearize", "hvp_jit"))
def test_custom_vjp_refuses_forward_mode_late(name):
    """Where JAX finds the derivative's use only after the call, the sentence is JAX's own."""
    with pytest.raises((jconv.ConvError, TypeError), match="forward"):
        both(TRANSFORMS[name], autodiff="custom_vjp")


def test_custom_vjp_keeps_two_operands():
    """What is kept for the backward pass is lhs and rhs, and never the columns."""
    f = functools.partial(
        conv, functools.partial(jconv.conv_general_dilated, algorithm="im2col", autodiff="custom_vjp")
    )
    _, backward = jax.vjp(f, X, W)
    kept = [leaf for leaf in jax.tree.leaves(backward) if hasattr(leaf, "shape")]
    assert sorted(leaf.shape for leaf in kept) == sorted([X.shape, W.shape])


def test_primitive_keeps_two_operands():
    f = functools.partial(conv, functools.partial(jconv.conv_general_dilated, algorithm="im2col"))
    _, backward = jax.vjp(f, X, W)
    kept = [leaf for leaf in jax.tree.leaves(backward) if hasattr(leaf, "shape")]
    assert sorted(leaf.shape for leaf in kept) == sorted([X.shape, W.shape])


def test_custom_vjp_is_public_api_only():
    f = functools.partial(
        conv, functools.partial(jconv.conv_general_dilated, algorithm="im2col", autodiff="custom_vjp")
    )
    text = str(jax.make_jaxpr(jax.grad(lambda x, w: f(x, w).sum(), (0, 1)))(X, W))
    assert "dot_general" in text and "= jconv[" not in text
    assert "= jconv[" in str(jax.make_jaxpr(lambda x, w: conv(jconv.conv_general_dilated, x, w))(X, W))


def test_unknown_autodiff():
    with pytest.raises(jconv.ConvError, match="autodiff must be 'primitive' or 'custom_vjp', got 'both'"):
        both(TRANSFORMS["value"], autodiff="both")


@pytest.mark.parametrize("autodiff", ("primitive", "custom_vjp"))
@pytest.mark.parametrize("algorithm", ("im2col", "xla"))
def test_profiles_say_jconv(autodiff, algorithm):
    f = functools.partial(conv, functools.partial(jconv.conv_general_dilated, algorithm=algorithm, autodiff=autodiff))
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sin(f(x, w)).sum(), (0, 1)), compiler_options=AS_USERS)
    text = gradient.lower(X, W).compile().as_text()
    assert f"jconv.{algorithm}" in text and "op_name" in text


def test_kernel_gradient_is_one_dot():
    """One product for a 3x3 window over 20x20 positions, and not 400."""
    x, w = arrays((2, 20, 20, 3), (3, 3, 3, 4))
    f = functools.partial(
        jconv.conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=NHWC, algorithm="im2col"
    )
    text = jax.jit(jax.grad(lambda w: f(x, w).sum())).lower(w).as_text()
    assert text.count("stablehlo.dot_general") == 1


def test_remat_saves_convolutions():
    """dots_saveable does not know the primitive, jconv.dots_saveable does: nothing is computed twice."""

    def count(implementation, policy, word):
        f = jax.checkpoint(lambda x, w: jnp.sin(conv(implementation, jnp.sin(x), w)).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.grad(f))(X, W)).count(word)

    lax_count = count(lax.conv_general_dilated, jax.checkpoint_policies.dots_saveable, "= conv_general_dilated[")
    assert count(jconv.conv_general_dilated, jconv.dots_saveable, "= jconv[") == lax_count == 2
    check(*both(remat(jconv.dots_saveable)))


def test_jet():
    from jax.experimental.jet import jet

    for run in (
        lambda c, x, w: jet(lambda x: jnp.sin(c(x, w)), (x,), ((DX, DX, x),)),
        lambda c, x, w: jet(c, (x, w), ((DX, x), (DW, w))),
    ):
        check(*both(run))


@pytest.mark.parametrize("autodiff", ("primitive", "custom_vjp"))
@pytest.mark.parametrize("jit", (True, False))
def test_debug_nans(autodiff, jit):
    """JAX replays what gave a NaN operation by operation, which must not come back to the primitive."""
    f = lambda x: conv(functools.partial(jconv.conv_general_dilated, autodiff=autodiff), x, W)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        (jax.jit(f) if jit else f)(X * np.inf)


@pytest.mark.parametrize("groups", (1, 2, 4))
@pytest.mark.parametrize("algorithm", ("im2col", "xla"))
def test_no_rank_promotion(groups, algorithm):
    x, w = arrays((2, 6, 5, 4), (3, 2, 4 // groups, 8))
    with jax.numpy_rank_promotion("raise"):
        jax.grad(lambda x, w: jconv.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups, algorithm=algorithm
        ).sum(), (0, 1))(x, w)  # fmt: skip


def test_gradients_keep_weak_types():
    x, w = jnp.full((1, 2, 5, 5), 1.0), jnp.full((2, 2, 3, 3), 2.0)
    for argument in (0, 1):
        ours, theirs = (
            jax.grad(lambda *a, f=f: f(*a, (1, 1), "SAME").sum(), argument)(x, w)
            for f in (jconv.conv_general_dilated, lax.conv_general_dilated)
        )
        assert (ours.weak_type, ours.dtype) == (theirs.weak_type, theirs.dtype)


def test_vmap_of_unknown_size_over_groups():
    (n,) = jax.export.symbolic_shape("n")
    shapes = [jax.ShapeDtypeStruct((n, *a.shape), a.dtype) for a in (X, W)]
    with pytest.raises(jconv.ConvError, match="their number must be known"):
        exported(lambda x, w: jax.vmap(functools.partial(conv, jconv.conv_general_dilated))(x, w), *shapes)


def test_disable_jit():
    with jax.disable_jit():
        check(*both(TRANSFORMS["grad_both"], algorithm="im2col"))


# vmap over batch groups, which lax's rule has a branch of its own for.


@pytest.mark.parametrize("axes", ((0, None), (None, 0), (0, 0), (2, 1)))
@pytest.mark.parametrize("algorithm", ("im2col", "xla"))
def test_vmap_of_batch_groups(axes, algorithm):
    xs, ws = arrays((3, 4, 5, 6, 2), (3, 2, 3, 2, 6))
    xs, ws = (a[0] if axis is None else np.moveaxis(a, 0, axis) for a, axis in zip((xs, ws), axes, strict=True))

    def run(f):
        g = functools.partial(f, window_strides=(1, 2), padding="SAME", dimension_numbers=NHWC, batch_group_count=2)
        return jax.vmap(g, axes)(xs, ws), jax.vmap(jax.grad(lambda x, w: jnp.sin(g(x, w)).sum(), (0, 1)), axes)(xs, ws)

    check(run(functools.partial(jconv.conv_general_dilated, algorithm=algorithm)), run(lax.conv_general_dilated))


@pytest.mark.parametrize("groups", (1, 2))
def test_vmap_of_nothing(groups):
    x, w = np.zeros((0, 2, 6, 5, 4)), arrays((3, 2, 4 // groups, 6))[0]
    run = lambda f: jax.vmap(lambda x: f(x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups))(x)  # noqa: E731
    check(run(jconv.conv_general_dilated), run(lax.conv_general_dilated))


# Several devices.


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))


@pytest.mark.parametrize("check_vma", (True, False))
@pytest.mark.parametrize("algorithm", ("im2col", "xla"))
@pytest.mark.parametrize("autodiff", ("primitive", "custom_vjp"))
def test_shard_map(check_vma, algorithm, autodiff):
    """The batch over one axis of the mesh; the kernel on every device, its gradient summed."""
    x, w = arrays((8, 6, 5, 4), (3, 2, 2, 6))

    def run(f):
        def step(x, w):
            def local(x, w):
                return jnp.sin(conv(f, x, w)).sum()

            if check_vma:
                gx, gw = jax.grad(local, (0, 1))(x, w)
            else:
                gx, gw = jax.grad(local, (0, 1))(x, w)
                gw = lax.psum(gw, "a")
            return conv(f, x, w), gx, gw

        specs = (P("a"), P())
        return jax.jit(
            jax.shard_map(step, mesh=mesh(), in_specs=specs, out_specs=(P("a"), P("a"), P()), check_vma=check_vma)
        )(x, w)

    check(
        run(functools.partial(jconv.conv_general_dilated, algorithm=algorithm, autodiff=autodiff)),
        run(lax.conv_general_dilated),
    )


def partitioned(implementation, groups):
    return lambda x, w: implementation(
        x, w, (2, 1), ((1, 1), (0, 1)), dimension_numbers=NHWC, feature_group_count=groups
    )


# XLA's partitioner multiplies the kernel gradient of its own convolution by the size of a mesh axis that
# no operand uses (jax 0.8.2 to 0.10.2; lax.conv_general_dilated too). So those specs are im2col's alone.
ALL_AXES = (P(("a", "b")), P(None, ("a", "b")), P("a", None, "b"))
ALGORITHM_AND_GROUPS = (("im2col", 1), ("im2col", 2), ("xla", 1))


@pytest.mark.parametrize(
    "algorithm,groups,spec",
    [
        (a, g, spec)
        for a, g in ALGORITHM_AND_GROUPS
        for spec in (*ALL_AXES, *((P("a"), P(None, "a")) if a == "im2col" else ()))
    ],
)
def test_automatic_partitioning(algorithm, groups, spec):
    """Operands sharded over a mesh: the same numbers as on one device."""
    x, w = arrays((8, 16, 10, 4), (3, 2, 4 // groups, 6))
    xs = jax.device_put(x, NamedSharding(mesh(), spec))
    f = grad_of(partitioned(functools.partial(jconv.conv_general_dilated, algorithm=algorithm), groups))
    check(jax.jit(f)(xs, w), jax.jit(grad_of(partitioned(lax.conv_general_dilated, groups)))(x, w))


def test_a_batch_that_is_spread_is_not_gathered():
    """What runs in parts on one device runs whole over several: a loop would gather the batch on each of them."""
    x, w = jnp.ones((8, 112, 112, 64)), jnp.ones((3, 3, 64, 64))
    xs = jax.device_put(x, NamedSharding(mesh(), P(("a", "b"))))

    def f(x, w):
        return jconv.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def collectives(f, *args):
        text = jax.jit(f, compiler_options=AS_USERS).lower(*args).compile().as_text()
        return {word for word in ("while", "all-gather", "all-to-all", "collective-permute") if f" {word}(" in text}

    inside = jax.shard_map(f, mesh=mesh(), in_specs=(P(("a", "b")), P()), out_specs=P(("a", "b")))
    assert collectives(f, x, w) == {"while"}
    assert collectives(f, xs, w) == set()
    assert collectives(jax.grad(lambda x, w: jnp.sum(f(x, w) ** 2), argnums=(0, 1)), xs, w) == set()
    assert not collectives(inside, xs, w) - {"while"}


@pytest.mark.parametrize("autodiff", ("primitive", "custom_vjp"))
@pytest.mark.parametrize("algorithm,groups", ALGORITHM_AND_GROUPS)
def test_explicit_mesh(algorithm, groups, autodiff):
    """Shardings are part of the types: those of lax's result and gradients, and one device's numbers."""
    x, w = arrays((8, 6, 5, 4), (3, 2, 4 // groups, 6))
    ours = partitioned(functools.partial(jconv.conv_general_dilated, algorithm=algorithm, autodiff=autodiff), groups)
    theirs = partitioned(lax.conv_general_dilated, groups)

    def run(f, x, w):
        return jax.jit(f)(x, w), jax.jit(grad_of(f))(x, w)

    numbers = run(theirs, x, w)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        xs, ws = jax.device_put(x, P("a")), jax.device_put(w, P())
        actual, types = run(ours, xs, ws), run(theirs, xs, ws)
    check(actual, numbers)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(types), strict=True):
        assert jax.typeof(a).sharding.spec == jax.typeof(e).sharding.spec


def test_out_sharding():
    x, w = arrays((8, 6, 5, 4), (3, 2, 4, 6))
    with jax.set_mesh(mesh(AxisType.Explicit)):
        xs, ws = jax.device_put(x, P("a")), jax.device_put(w, P(None, None, None, "b"))
        run = lambda f: jax.jit(  # noqa: E731
            lambda x, w: f(x, w, (1, 1), "SAME", dimension_numbers=NHWC, out_sharding=P("a", None, None, "b"))
        )(xs, ws)
        actual, expected = run(jconv.conv_general_dilated), run(lax.conv_general_dilated)
    check(actual, expected)
    assert jax.typeof(actual).sharding.spec == jax.typeof(expected).sharding.spec


# Export.


def exported(f, *args, platforms=("cpu", "cuda", "rocm", "tpu")):
    return jax.export.export(jax.jit(f), platforms=platforms)(*args)


@pytest.mark.parametrize("autodiff", ("primitive", "custom_vjp"))
def test_export_chooses_by_platform(autodiff):
    """One artifact, chosen when lowered and for what: depthwise on the CPU, the vendor's elsewhere."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 14, 14, 64), (3, 3, 1, 64))]

    def f(x, w):
        return jconv.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=64, autodiff=autodiff
        )

    assert (
        jconv.plan(
            *shapes, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=64, platform="cpu"
        ).algorithm.name
        == "depthwise"
    )
    for platform, conv_op in (("cpu", False), ("cuda", True), ("tpu", True), ("rocm", True)):
        text = exported(f, *shapes, platforms=(platform,)).mlir_module()
        assert ("stablehlo.convolution" in text) == conv_op, platform
    everywhere = exported(f, *shapes)
    text = everywhere.mlir_module()
    assert "stablehlo.convolution" in text and "stablehlo.multiply" in text
    again = jax.export.deserialize(everywhere.serialize())
    x, w = (np.random.default_rng(0).standard_normal(s.shape, np.float32) for s in shapes)
    assert_close(again.call(x, w), f(x, w), "auto", np.float32)


@pytest.mark.parametrize("algorithm", ("im2col", "xla", "auto"))
@pytest.mark.parametrize("autodiff", ("primitive", "custom_vjp"))
@pytest.mark.parametrize("groups", (1, 2, 4))
def test_export_with_symbolic_batch(algorithm, autodiff, groups):
    """A gradient step of any batch, in one artifact for four platforms."""
    (batch,) = jax.export.symbolic_shape("b")
    x, w = arrays((5, 6, 5, 4), (3, 2, 4 // groups, 8))

    def step(x, w):
        def f(x, w):
            return jnp.sin(
                jconv.conv_general_dilated(
                    x, w, (2, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups,
                    algorithm=algorithm, autodiff=autodiff,
                )
            ).sum()  # fmt: skip

        return jax.value_and_grad(f, (0, 1))(x, w)

    symbolic = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    artifact = exported(step, symbolic, jax.ShapeDtypeStruct(w.shape, w.dtype))
    for n in (1, 5):
        check(artifact.call(x[:n], w), step(x[:n], w))


def test_export_of_a_window_larger_than_its_result_with_symbolic_batch():
    """Which looks like a kernel gradient whose input features are a symbol."""
    (b,) = jax.export.symbolic_shape("b")
    x, w = arrays((3, 6, 6, 2), (6, 6, 2, 4))
    f = lambda x, w: jconv.conv_general_dilated(x, w, (1, 1), ((1, 1), (1, 1)), dimension_numbers=NHWC)  # noqa: E731
    artifact = exported(f, jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype))
    check(artifact.call(x, w), f(x, w))


def test_export_with_symbolic_image():
    """Sizes of an image unknown until the call: lax's convolution, which can."""
    b, h = jax.export.symbolic_shape("b, h")
    x, w = arrays((2, 9, 9, 3), (3, 3, 3, 4))
    f = lambda x, w: jconv.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)  # noqa: E731
    artifact = exported(f, jax.ShapeDtypeStruct((b, h, h, 3), x.dtype), jax.ShapeDtypeStruct(w.shape, w.dtype))
    check(artifact.call(x, w), f(x, w))


SPREAD = {
    "row pairs": ((4, 14, 14, 32), (7, 7, 1, 32), 32),
    "chunks": ((2, 56, 56, 16), (5, 5, 1, 16), 16),
    "parts": ((16, 56, 56, 64), (3, 3, 64, 64), 1),
    "groups": ((2, 14, 14, 64), (3, 3, 32, 64), 2),
}


@pytest.mark.parametrize("autodiff", ("primitive", "custom_vjp"))
@pytest.mark.parametrize("name", SPREAD)
def test_loops_under_shard_map(name, autodiff):
    """What an algorithm carries through a loop or a conditional varies over the mesh as its operands do."""
    lhs, rhs, groups = SPREAD[name]
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec

    def step(x, w):
        def f(x, w):
            y = jconv.conv_general_dilated(
                x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=groups, autodiff=autodiff
            )
            return jnp.sin(y).sum()

        return jax.lax.psum(jax.grad(f, 1)(x, w), "batch") if autodiff == "custom_vjp" else jax.grad(f, 1)(x, w)

    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (lhs, rhs)]
    spread = jax.shard_map(step, mesh=mesh, in_specs=(spec("batch"), spec()), out_specs=spec())
    assert jax.eval_shape(spread, *shapes).shape == rhs
    jax.jit(spread).lower(*shapes)


@pytest.mark.parametrize("groups", (1, 4))
def test_export_with_height_and_width_apart(groups):
    """Sizes of the image that are known at the call only, with padding in numbers."""
    b, h, w = jax.export.symbolic_shape("b, h, w")
    x, k = arrays((2, 6, 7, 4), (3, 3, 4 // groups, 8))

    def f(x, k):
        pads = ((1, 1), (0, 2))
        return jconv.conv_general_dilated(x, k, (1, 1), pads, dimension_numbers=NHWC, feature_group_count=groups)

    artifact = exported(f, jax.ShapeDtypeStruct((b, h, w, 4), x.dtype), jax.ShapeDtypeStruct(k.shape, k.dtype))
    check(artifact.call(x, k), f(x, k))
