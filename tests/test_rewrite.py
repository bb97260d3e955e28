"""accelerate(fn) and install(): any JAX program with jconv's convolutions, and nothing else changed."""

import functools
import gc
import threading
import weakref

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.custom_derivatives import linear_call
from jax.experimental import checkify, io_callback
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_transforms import DW, NHWC, TRANSFORMS, W, X, arrays, check, conv, mesh
from tolerances import assert_close

import jconv
from jconv import convolve, rewrite
from jconv.convolve import conv_p
from jconv.planner import named
from jconv.rewrite import problem_of, problems_of, steps_of

stock = functools.partial(conv, lax.conv_general_dilated)


def posed_in(jaxpr):
    """The problems of jconv's primitive."""
    return [s.equation.params["problem"] for s in steps_of(jaxpr) if s.equation.primitive is conv_p]


def equations(jaxpr):
    """Every equation of a jaxpr and of those inside it, wherever they stand in the parameters."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: isinstance(v, ClosedJaxpr | Jaxpr)
        ):
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from equations(value)


def count(f, *args):
    """(lax's, jconv's) convolutions in the program."""
    found = [e.primitive for e in equations(jax.make_jaxpr(f)(*args))]
    return found.count(lax.conv_general_dilated_p), found.count(conv_p)


def swapped(f, *args):
    """All of lax's convolutions are jconv's, one for one."""
    theirs, ours = count(f, *args), count(jconv.accelerate(f), *args)
    assert theirs[0] > 0 and ours == (0, theirs[0]), (theirs, ours)
    return True


def same(f, *args):
    """The program's values, types and structure, with every convolution swapped."""
    assert swapped(f, *args)
    check(jconv.accelerate(f)(*args), jax.jit(f)(*args))


# Every transformation, on both sides.


@functools.cache
def by_lax(name):
    return jax.jit(functools.partial(TRANSFORMS[name], stock))(X, W)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformed_accelerated(name):
    assert count(functools.partial(TRANSFORMS[name], jconv.accelerate(stock)), X, W)[0] == 0


EAGERLY = ("value", "grad_both", "linearize", "vmap_both")
JITTED = ("grad_third", "jvp_of_grad", "linear_transpose_rhs", "vmap_grad_rhs", "hessian", "scan", "cond", "remat")


@pytest.mark.parametrize("name", (*EAGERLY, *JITTED))
def test_transformed_accelerated_values(name):
    f = functools.partial(TRANSFORMS[name], jconv.accelerate(stock))
    check((f if name in EAGERLY else jax.jit(f))(X, W), by_lax(name))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_accelerated_transformed(name):
    f = functools.partial(TRANSFORMS[name], stock)
    assert swapped(f, X, W)
    check(jconv.accelerate(f)(X, W), by_lax(name))


# Constructs that hold jaxprs.


def switch(x, w):
    return lax.switch(x.astype(int).sum() % 3, [stock, lambda x, w: 2 * stock(x, w), lambda x, w: -stock(x, w)], x, w)


def fori(x, w):
    return lax.fori_loop(0, 3, lambda i, y: y + i * stock(x, w), stock(x, w))


def condition_of_while(x, w):
    return lax.while_loop(lambda s: stock(s, w).sum() < 1e3, lambda s: s * 1.5 + 1, x)


def associative(x, w):
    return lax.associative_scan(lambda a, b: a + jnp.tanh(stock(x, w).mean()) * b, jnp.arange(4.0))


def nested_jit(x, w):
    @jax.jit
    def layer(x, w):
        return jnp.sin(stock(x, w))

    return layer(x, w) + layer(2 * x, w) + jax.jit(layer)(x, w)


def rematerialised(policy):
    def f(x, w):
        g = jax.checkpoint(lambda x, w: jnp.sin(stock(jnp.sin(x), w)).sum(), policy=policy)
        return jax.grad(lambda x, w: g(x, w) ** 2, (0, 1))(x, w)

    return f


def solved(x, w):
    """The inverse of x -> 4 x + conv(x) for a symmetric kernel, by an iteration and its transpose."""
    k = jnp.asarray(np.array([[[0.2, 0.5, 0.2]]]))
    matvec = lambda v: 4 * v + lax.conv(v[None, None], k, (1,), "SAME")[0, 0]
    solve = lambda matvec, b: jax.scipy.sparse.linalg.cg(matvec, b, maxiter=30)[0]
    return lax.custom_linear_solve(matvec, x[0, 0, :, 0], solve, symmetric=True)


CONSTRUCTS = {
    "switch": switch,
    "grad of switch": jax.grad(lambda x, w: switch(x, w).sum(), (0, 1)),
    "fori": fori,
    "condition of while": condition_of_while,
    "associative_scan": associative,
    "nested jit": nested_jit,
    "grad of nested jit": jax.grad(lambda x, w: nested_jit(x, w).sum(), (0, 1)),
    "remat": rematerialised(None),
    "remat dots": rematerialised(jax.checkpoint_policies.dots_saveable),
    "remat names": rematerialised(jax.checkpoint_policies.save_only_these_names("none")),
    "linear solve": solved,
    "grad of linear solve": jax.grad(lambda x, w: jnp.sin(solved(x, w)).sum()),
    "no array": lambda x, w: (None, {"y": stock(x, w), "none": None}, ()),
    "einsum beside": lambda x, w: jnp.einsum("nhwc,nhwc->n", stock(x, w), stock(x, w)),
    "closed_over": lambda x, w: stock(x, jnp.asarray(W)),
    "jnp.convolve": lambda x, w: jnp.convolve(x.ravel(), w.ravel()),
    "scipy": lambda x, w: jax.scipy.signal.convolve2d(x[0, :, :, 0], w[:, :, 0, 0]),
    "avg_pool beside": lambda x, w: nn.avg_pool(stock(x, w), (2, 2)),
}


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_construct(name):
    same(CONSTRUCTS[name], X, W)


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_grad_of_accelerated_construct(name):
    if "while" in name:
        pytest.skip("no reverse mode")

    def loss(f):
        return lambda x, w: sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(f(x, w)))

    f = CONSTRUCTS[name]
    g = jax.grad(loss(jconv.accelerate(f)), (0, 1))
    assert count(g, X, W)[0] == 0
    if not name.startswith("grad of"):
        check(jax.jit(g)(X, W), jax.jit(jax.grad(loss(f), (0, 1)))(X, W))


def test_no_convolution():
    f = lambda x: (jnp.sin(x), x)
    check(jconv.accelerate(f)(X), f(X))
    assert jconv.accelerate(lambda: None)() is None
    assert jconv.accelerate(lambda x: None)(X) is None


def test_shared_stays_shared():
    """A layer that is called twice is one jaxpr, before and after: what JAX caches by it is cached."""
    layer = jax.jit(lambda x, w: jnp.sin(stock(x, w)))
    jaxpr = jax.make_jaxpr(jconv.accelerate(lambda x, w: layer(x, w) + layer(2 * x, w)))(X, W)
    layers = [e.params["jaxpr"] for e in equations(jaxpr) if e.params.get("name") == "<lambda>"]
    inner = [j for j in layers if any(e.primitive is conv_p for e in j.eqns)]
    assert len(inner) == 2 and inner[0] is inner[1]
    text = jconv.accelerate(lambda x, w: layer(x, w) + layer(2 * x, w)).lower(X, W).as_text()
    assert text.count("stablehlo.sine") == 1


def test_the_memo_keeps_nothing_alive():
    def run():
        f = jconv.accelerate(lambda x, w: jax.nn.relu(jax.jit(lambda x, w: jnp.sin(stock(x, w)))(x, w)))
        return weakref.ref(jax.make_jaxpr(f)(X, W).eqns[0].params["jaxpr"].jaxpr)

    gone = run()
    jax.clear_caches()
    gc.collect()
    assert gone() is None
    assert all(len(memo) == 0 for memo in rewrite._memos.values())


def test_idempotent():
    f = lambda x, w: (
        jnp.sin(stock(x, w)) + conv(functools.partial(jconv.conv_general_dilated, algorithm="im2col"), x, w)
    )
    once, twice = jconv.accelerate(f), jconv.accelerate(jconv.accelerate(f))
    assert count(once, X, W) == count(twice, X, W) == (0, 2)
    wishes = [e.params["wish"] for e in equations(jax.make_jaxpr(twice)(X, W)) if e.primitive is conv_p]
    assert sorted(getattr(wish, "name", "") for wish in wishes) == ["", "im2col"]
    check(twice(X, W), f(X, W))


# Rules that are traced later.


def with_vjp(symbolic_zeros=False, in_forward=True):
    """2 conv(x, w), whose rules hold convolutions of their own, and sin(x) in the gradient for x."""
    traced = []

    @jax.custom_vjp
    def f(x, w, name):
        return 2 * stock(x, w)

    def forward(x, w, name):
        traced.append("forward")
        x, w = (getattr(a, "value", a) for a in (x, w))
        return 2 * (stock(x, w) if in_forward else jnp.zeros((2, 3, 4, 6))), (x, w)

    def backward(residuals, g):
        traced.append("backward")
        x, w = residuals
        if isinstance(g, jax.custom_derivatives.SymbolicZero):
            return None, None, None
        dx, dw = jax.vjp(stock, x, w)[1](3 * g)
        return dx + jnp.sin(x), dw, None

    f.defvjp(forward, backward, symbolic_zeros=symbolic_zeros)
    return lambda x, w: f(x, w, {"k": 1.0}), traced


@pytest.mark.parametrize("symbolic_zeros", (False, True))
def test_custom_vjp(symbolic_zeros):
    f, traced = with_vjp(symbolic_zeros)
    loss = lambda f: lambda x, w: jnp.sin(f(x, w)).sum()
    ours = jconv.accelerate(f)
    check(ours(X, W), f(X, W))
    assert traced == []  # never early
    g = jax.grad(loss(ours), (0, 1))
    g = jax.jit(g)
    check(g(X, W), jax.jit(jax.grad(loss(f), (0, 1)))(X, W))
    assert traced[:2] == ["forward", "backward"]
    assert count(g, X, W)[0] == 0 and count(jax.grad(loss(f), (0, 1)), X, W)[0] > 0
    assert count(lambda x: jax.grad(loss(ours))(x, W), X)[0] == 0
    same(jax.grad(loss(f), (0, 1)), X, W)
    xs, ws = jnp.stack([X, 2 * X]), jnp.stack([W, W])
    check(jax.jit(jax.vmap(g))(xs, ws), jax.jit(jax.vmap(jax.grad(loss(f), (0, 1))))(xs, ws))


@pytest.mark.parametrize("where", ("forward", "backward"))
def test_custom_vjp_of_one_rule(where):
    """The convolution in one rule only: the other, and the function itself, have none."""

    @jax.custom_vjp
    def f(x, w):
        return jnp.sin(x)

    convolved = lambda x, w: x * stock(x, w).sum()
    f.defvjp(
        lambda x, w: (convolved(x, w) if where == "forward" else jnp.sin(x), (x, w)),
        lambda r, g: (convolved(g, r[1]) if where == "backward" else g, jnp.zeros_like(r[1])),
    )
    g = lambda f: jax.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1))
    assert count(jconv.accelerate(f), X, W) == (0, 0)
    assert count(g(f), X, W) == (1, 0) and count(g(jconv.accelerate(f)), X, W) == (0, 1)
    check(jax.jit(g(jconv.accelerate(f)))(X, W), jax.jit(g(f))(X, W))
    scan = lambda f: lambda x, w: lax.scan(lambda c, _: (f(c, w), None), x, length=2)[0]
    check(jax.jit(g(jconv.accelerate(scan(f))))(X, W), jax.jit(g(scan(f)))(X, W))
    assert count(g(jconv.accelerate(scan(f))), X, W)[0] == 0


def test_custom_vjp_with_nondiff_arguments():
    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
    def f(act, x, w, scale):
        return scale * act(stock(x, w))

    def forward(act, x, w, scale):
        return f(act, x, w, scale), (x, w)

    def backward(act, scale, residuals, g):
        return jax.vjp(lambda x, w: scale * act(stock(x, w)), *residuals)[1](g)

    f.defvjp(forward, backward)
    loss = lambda x, w: f(jnp.tanh, x, w, 3).sum()
    check(jax.jit(jax.grad(jconv.accelerate(loss), (0, 1)))(X, W), jax.jit(jax.grad(loss, (0, 1)))(X, W))
    assert count(jax.grad(jconv.accelerate(loss), (0, 1)), X, W)[0] == 0


@pytest.mark.parametrize("symbolic_zeros", (False, True))
def test_custom_jvp(symbolic_zeros):
    traced = []

    @jax.custom_jvp
    def f(x, w):
        return jnp.sin(stock(x, w))

    def rule(primals, tangents):
        traced.append(1)
        (x, w), (dx, dw) = primals, tangents
        zero = jax.custom_derivatives.SymbolicZero
        out = stock(x, w)
        parts = [0 * out]
        parts += [] if isinstance(dx, zero) else [stock(dx, w)]
        parts += [] if isinstance(dw, zero) else [stock(x, dw)]
        return jnp.sin(out), 5 * jnp.cos(out) * sum(parts)

    f.defjvp(rule, symbolic_zeros=symbolic_zeros)
    ours = jconv.accelerate(f)
    check(ours(X, W), f(X, W))
    assert traced == []
    for g in (
        lambda f: jax.grad(lambda x, w: (f(x, w) ** 2).sum(), (0, 1)),
        lambda f: lambda x, w: jax.jvp(f, (x, w), (x, DW)),
        lambda f: lambda x, w: jax.jvp(lambda w: f(x, w), (w,), (DW,)),
        lambda f: lambda x, w: jax.jvp(jax.grad(lambda w: f(x, w).sum()), (w,), (DW,)),
    ):
        check(jax.jit(g(ours))(X, W), jax.jit(g(f))(X, W))
        assert count(g(ours), X, W)[0] == 0


def test_custom_vmap():
    @jax.custom_batching.custom_vmap
    def f(x, w):
        return stock(x, w)

    @f.def_vmap
    def rule(size, in_batched, x, w):
        assert in_batched == [True, False]
        return 10 * jax.vmap(stock, (0, None))(x, w), True

    xs = jnp.stack([X, 2 * X])
    ours, theirs = jax.vmap(jconv.accelerate(f), (0, None)), jax.vmap(f, (0, None))
    check(ours(xs, W), theirs(xs, W))
    assert count(ours, xs, W) == (0, 1)
    same(jax.vmap(f, (0, None)), xs, W)


def test_policies_know_the_convolution():
    """What dots_saveable saves of lax's, it saves of jconv's: the convolution runs once, and its gradients."""
    f = jax.checkpoint(lambda x, w: jnp.sin(stock(x, w)).sum(), policy=jax.checkpoint_policies.dots_saveable)
    assert count(jax.grad(jconv.accelerate(f)), X, W)[1] == count(jax.grad(f), X, W)[0] == 2
    g = jax.checkpoint(lambda x, w: jnp.sin(stock(x, w)).sum())
    assert count(jax.grad(jconv.accelerate(g)), X, W)[1] == count(jax.grad(g), X, W)[0] == 3


# Effects, sharding, donation, static arguments.


def test_callbacks_in_order():
    """Ordered callbacks stay in order, inside loops too, and each runs once a call."""
    seen = []

    def f(x, w):
        io_callback(lambda: seen.append("first"), None, ordered=True)
        y = stock(x, w)

        def step(carry, i):
            io_callback(lambda i: seen.append(int(i)), None, i, ordered=True)
            return carry + stock(x, w).sum(), None

        total, _ = lax.scan(step, y.sum(), jnp.arange(3))
        got = io_callback(lambda t: np.float64(2 * t), jax.ShapeDtypeStruct((), np.float64), total, ordered=True)
        jax.debug.callback(lambda g: seen.append("last"), got, ordered=True)
        return got

    ours = jconv.accelerate(f)
    for _ in range(2):
        value = ours(X, W)
        jax.effects_barrier()
    assert seen == ["first", 0, 1, 2, "last"] * 2
    assert count(ours, X, W)[0] == 0
    check(value, f(X, W))


def test_pure_callback_and_debug_print(capfd):
    f = lambda x, w: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((2, 3, 4, 6), np.float64), stock(x, w))
    same(f, X, W)

    def g(x, w):
        jax.debug.print("the size is {}", stock(x, w).size)
        return stock(x, w)

    jconv.accelerate(g)(X, W)
    jax.effects_barrier()
    assert "the size is 144" in capfd.readouterr().out


@pytest.mark.parametrize("check_vma", (True, False))
def test_shard_map(check_vma):
    x, w = arrays((8, 6, 5, 4), (3, 2, 2, 6))

    def step(x, w):
        dx, dw = jax.grad(lambda x, w: jnp.sin(stock(x, w)).sum(), (0, 1))(x, w)
        return stock(x, w), dx, dw if check_vma else lax.psum(dw, "a")

    f = jax.shard_map(step, mesh=mesh(), in_specs=(P("a"), P()), out_specs=(P("a"), P("a"), P()), check_vma=check_vma)
    same(f, x, w)
    problems = posed_in(jax.make_jaxpr(jconv.accelerate(f))(x, w).jaxpr)
    assert len(problems) == 4 and all(p.out_sharding is None for p in problems)  # they are planned as elsewhere
    loss = lambda f: lambda x, w: sum(y.sum() for y in f(x, w))
    check(jax.jit(jax.grad(loss(jconv.accelerate(f)), (0, 1)))(x, w), jax.jit(jax.grad(loss(f), (0, 1)))(x, w))


def test_accelerated_inside_shard_map():
    """Axis names and what varies over them are the surrounding program's."""
    x, w = arrays((8, 6, 5, 4), (3, 2, 2, 6))
    local = lambda x, w: lax.psum(jnp.sin(stock(x, w)).sum(), "a")
    run = lambda f: jax.jit(jax.shard_map(f, mesh=mesh(), in_specs=(P("a"), P()), out_specs=P()))(x, w)
    check(run(jconv.accelerate(local)), run(local))
    rows = lambda x: lax.psum(stock(x, W), "i")
    check(jax.vmap(jconv.accelerate(rows), axis_name="i")(x[:, None]), jax.vmap(rows, axis_name="i")(x[:, None]))


def test_sharding_constraint_and_shardings_of_a_jit():
    x, w = arrays((8, 6, 5, 4), (3, 2, 2, 6))
    m = mesh()
    place = lambda *spec: NamedSharding(m, P(*spec))

    def f(x, w):
        return jnp.sin(lax.with_sharding_constraint(stock(x, w), place("a")))

    assert jconv.accelerate(f)(x, w).sharding.is_equivalent_to(jax.jit(f)(x, w).sharding, 4)
    jitted = jax.jit(lambda x, w: jnp.sin(stock(x, w)), in_shardings=(place("a"), place()), out_shardings=place("b"))
    y = jconv.accelerate(jitted)(x, w)
    assert y.sharding.is_equivalent_to(place("b"), 4)
    check(y, jitted(x, w))
    check(jconv.accelerate(f)(jax.device_put(x, place("a")), w), f(x, w))


@pytest.mark.parametrize("given", (False, True))
def test_explicit_mesh(given):
    """Shardings in types; derivatives give every convolution an out_sharding."""
    x, w = arrays((8, 6, 5, 4), (3, 2, 4, 6))
    sharding = {"out_sharding": P("a", None, None, "b")} if given else {}

    def f(x, w):
        y = lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC, **sharding)
        return jnp.sin(y)

    both = lambda f: lambda x, w: (f(x, w), jax.grad(lambda x, w: f(x, w).sum(), (0, 1))(x, w))
    with jax.set_mesh(mesh(AxisType.Explicit)):
        xs = jax.device_put(x, P("a"))
        ws = jax.device_put(w, P(None, None, None, "b") if given else P())
        expected = jax.jit(both(f))(xs, ws)
        for actual in (both(jconv.accelerate(f))(xs, ws), jconv.accelerate(both(f))(xs, ws)):
            for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                assert jax.typeof(a).sharding.spec == jax.typeof(e).sharding.spec
        assert count(jconv.accelerate(both(f)), xs, ws)[0] == 0
    check(jax.device_get(actual), jax.device_get(expected))


def test_donation():
    f = lambda x, w: (stock(x, w), x + 1)
    for ours in (
        jconv.accelerate(f, donate_argnums=0),
        jconv.accelerate(f, donate_argnames="x"),
        jconv.accelerate(jax.jit(f, donate_argnums=(0,))),
    ):
        x, w = jnp.array(X), jnp.array(W)
        y = ours(x, w)
        assert x.is_deleted() and not w.is_deleted()
        check(y, f(X, W))
        assert "tf.aliasing_output" in ours.lower(X, W).as_text()


def test_static_arguments():
    traced = []

    def f(x, w, act, *, n=1, flag=False):
        traced.append((n, flag))
        assert isinstance(n, int) and isinstance(flag, bool)
        return act(stock(x, w)) if flag else n * stock(x, w)

    for ours in (
        jconv.accelerate(f, static_argnums=2, static_argnames=("n", "flag")),
        jconv.accelerate(jax.jit(f, static_argnums=(2,), static_argnames=("n", "flag"))),
        jconv.accelerate(jax.jit(f, static_argnums=2), static_argnames=["n", "flag"]),
        jax.jit(jconv.accelerate(f, static_argnames=("act", "n", "flag")), static_argnames=("act", "n", "flag")),
    ):
        traced.clear()
        for _ in range(2):
            check(ours(X, W, jnp.tanh, flag=True), f(X, W, jnp.tanh, flag=True))
            check(ours(X, W, jnp.tanh, n=3), f(X, W, jnp.tanh, n=3))
        assert len(traced) == 4 + 2  # the expected ones', and two of its own


def test_arguments_as_without():
    """Pytrees, keywords, weak types, integers, keys, scalars."""

    def f(tree, /, k, *more, scale=2.0, key=None):
        noise = jax.random.normal(key, X.shape) if key is not None else 0
        y = stock(tree["x"] + noise, tree["w"][0])
        return {"y": y * scale, "k": k + 1, "more": more, "key": key, "weak": scale + 1, "none": None}

    args = ({"x": X, "w": [W, None]}, np.int32(3), 1, True, (2.5, jnp.arange(3)))
    key = jax.random.key(0)
    actual, expected = (g(*args, scale=3, key=key) for g in (jconv.accelerate(f), jax.jit(f)))
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert jax.typeof(a) == jax.typeof(e)
    check(actual.pop("y"), expected.pop("y"))
    assert (jax.random.key_data(actual["key"]) == jax.random.key_data(key)).all()
    assert jax.typeof(jconv.accelerate(lambda x: lax.conv(x, x, (1,), "SAME"))(jnp.ones((1, 1, 1)))).weak_type is False


def test_weak_types_of_a_convolution():
    f = lambda x: lax.conv(lax.full_like(x, 1.0), x, (1,), "SAME")
    x = jnp.broadcast_to(jnp.asarray(2.0), (1, 1, 1))
    assert jax.typeof(x).weak_type
    assert jax.typeof(jconv.accelerate(f)(x)) == jax.typeof(jax.jit(f)(x))


def test_tracers_from_outside():
    def outer(accelerate):
        def f(x, w):
            g = accelerate(lambda w: jnp.sin(stock(x, w)).sum())  # x is closed over
            return jax.value_and_grad(g)(w), jax.vmap(g)(jnp.stack([w, 2 * w]))

        return f

    ours, theirs = outer(jconv.accelerate), outer(lambda g: g)
    check(jax.jit(ours)(X, W), jax.jit(theirs)(X, W))
    jvp = lambda f: jax.jit(lambda x, w: jax.jvp(f, (x, w), (jnp.cos(x), DW)))
    check(jvp(ours)(X, W), jvp(theirs)(X, W))
    assert count(ours, X, W)[0] == 0


def test_array_references():
    if not hasattr(jax, "new_ref"):
        pytest.skip("no references in this jax")

    def f(ref, x, w):
        ref[...] = ref[...] + stock(x, w).sum()
        return stock(x, w)

    ours, theirs = jax.new_ref(jnp.zeros(())), jax.new_ref(jnp.zeros(()))
    check(jconv.accelerate(f)(ours, X, W), jax.jit(f)(theirs, X, W))
    check(ours[...], theirs[...])
    assert float(ours[...]) != 0


# The kinds of convolution.

DTYPES = ("float32", "float64", "bfloat16", "float16", "complex64", "complex128", "int32", "int8", "uint8")


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype(dtype):
    from tolerances import assert_close

    x, w = (np.round(4 * a).astype(int).astype(dtype) if "int" in dtype else a.astype(dtype) for a in (X, W))
    f = jconv.accelerate(stock)
    assert swapped(stock, x, w)
    y = f(x, w)
    assert y.dtype == dtype
    assert_close(y, stock(x, w), "auto", dtype, factor=2)


OPTIONS = {
    "strides and holes": dict(window_strides=(2, 1), padding=((2, 1), (0, 3)), lhs_dilation=(2, 3), rhs_dilation=(2, 1)),
    "negative padding": dict(window_strides=(1, 1), padding=((-1, 1), (0, -1))),
    "batch groups": dict(window_strides=(1, 1), padding="SAME", batch_group_count=2),
    "feature groups": dict(window_strides=(1, 1), padding="SAME", feature_group_count=2),
    "highest": dict(window_strides=(1, 1), padding="VALID", precision="highest"),
    "1x1": dict(window_strides=(2, 1), padding="VALID"),
    "two precisions": dict(window_strides=(1, 1), padding="VALID", precision=("highest", "default")),
    "preferred": dict(window_strides=(1, 1), padding="VALID", preferred_element_type=np.float64),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    """Each is the problem that jconv's own function poses, which has its measured times; so are its derivatives'."""
    options = OPTIONS[name]
    window = (1, 1) if name == "1x1" else (3, 2)
    x, w = arrays((4, 4, 7, 6), (6, 2 if name == "feature groups" else 4, *window))
    dtype = np.float32 if name == "preferred" else np.float64
    x, w = x.astype(dtype), w.astype(dtype)
    f = lambda x, w: lax.conv_general_dilated(x, w, **options)
    ours = lambda x, w: jconv.conv_general_dilated(x, w, **options)
    check(jconv.accelerate(f)(x, w), f(x, w))
    posed = lambda f: posed_in(jax.make_jaxpr(f)(x, w).jaxpr)
    assert posed(jconv.accelerate(f)) == posed(ours) != []
    if name != "preferred":  # whose derivatives lax cannot take
        gradient = lambda f: jax.grad(lambda x, w: jnp.sin(f(x, w)).sum(), (0, 1))
        same(gradient(f), x, w)
        assert posed(jconv.accelerate(gradient(f))) == posed(gradient(ours))


@pytest.mark.parametrize("dimensions", ((2,), (3, 2), (0, 2, 3)))
def test_turned_kernels(dimensions):
    """A kernel that is turned round along its window, and no other, is read from its end."""
    x, w = arrays((4, 4, 7, 6), (6, 4, 3, 2))
    f = lambda x, w: lax.conv(x, lax.rev(w, dimensions), (1, 1), "SAME")
    same(f, x, w)
    (problem,) = posed_in(jax.make_jaxpr(jconv.accelerate(f))(x, w).jaxpr)
    assert problem.reversed == (len(dimensions) == 2)
    g = lambda x, w: lax.conv(lax.rev(x, (2, 3)), lax.rev(lax.rev(w, (2, 3)), (2, 3)), (1, 1), "SAME") + w.sum()
    same(g, x, w)


def test_default_matmul_precision():
    """What held when lax's equation was made, and not what holds when it is read."""
    with jax.default_matmul_precision("highest"):
        f = jax.make_jaxpr(stock)(X, W)
    (equation,) = [e for e in equations(f) if e.primitive is lax.conv_general_dilated_p]
    assert problem_of(equation).precision == lax.Precision.HIGHEST
    plain = jax.make_jaxpr(stock)(X, W)
    (equation,) = [e for e in equations(plain) if e.primitive is lax.conv_general_dilated_p]
    with jax.default_matmul_precision("highest"):
        assert problem_of(equation).precision is None


def test_problem_of():
    found = [problem_of(e) for e in jax.make_jaxpr(lambda x, w: jnp.sin(stock(x, w)))(X, W).eqns]
    ours = posed_in(jax.make_jaxpr(lambda x, w: conv(jconv.conv_general_dilated, x, w))(X, W).jaxpr)
    assert [p for p in found if p] == ours and len(ours) == 1
    assert found[-1] is None
    again = jax.make_jaxpr(lambda x, w: conv(jconv.conv_general_dilated, x, w))(X, W).eqns
    assert [problem_of(e) for e in again if problem_of(e)] == ours


def test_what_jconv_cannot_express_is_left(monkeypatch):
    monkeypatch.setattr(rewrite, "_problem", lambda *_: None)
    assert count(jconv.accelerate(stock), X, W) == (1, 0)
    check(jconv.accelerate(stock)(X, W), stock(X, W))


@pytest.mark.parametrize("algorithm", ("im2col", "winograd", "xla"))
def test_algorithm(algorithm):
    """A named one serves where it can: winograd not the strided layer, and no error."""

    def f(x, a, b):
        y = lax.conv_general_dilated(x, a, (1, 1), "SAME", dimension_numbers=NHWC)
        return lax.conv_general_dilated(y, b, (2, 2), "SAME", dimension_numbers=NHWC)

    operands = arrays((1, 8, 8, 4), (3, 3, 4, 4), (3, 3, 4, 4))
    ours = jconv.accelerate(f, algorithm=algorithm)
    wishes = [e.params["wish"].name for e in equations(jax.make_jaxpr(ours)(*operands)) if e.primitive is conv_p]
    assert wishes == [algorithm] * 2
    check(ours(*operands), f(*operands))
    chosen = [jax.make_jaxpr(ours)(*operands), ours.lower(*operands).as_text(debug_info=True)]
    assert f"jconv.{algorithm}" in chosen[1] or f"jconv_{algorithm}" in chosen[1]


# One trace, one compilation.


def test_compiled_once(caplog):
    traced = []

    def f(x, w):
        traced.append(1)
        return jnp.sin(stock(x, w))

    ours = jconv.accelerate(f)
    first = ours(X, W)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for _ in range(3):
            check(ours(jnp.asarray(X) + 0, W), first)
        compiled = [r.message for r in caplog.records if "<lambda>" in r.message or "Compiling jit(f)" in r.message]
    assert traced == [1] and ours._cache_size() <= 2 and not compiled
    ours(X[:1], W)
    assert len(traced) == 2
    g = jax.jit(jax.grad(lambda x, w: ours(x, w).sum()))
    for _ in range(2):
        g(X, W)
    assert len(traced) == 2  # the trace of the first call serves the gradient
    ours.clear_cache()
    ours(X, W)
    assert len(traced) == 3


def test_as_a_jitted_function():
    ours = jconv.accelerate(stock)
    assert isinstance(ours, jax.stages.Wrapped)
    check(ours.lower(X, W).compile()(X, W), stock(X, W))
    assert ours.trace(X, W).jaxpr.out_avals[0].shape == ours.eval_shape(X, W).shape == (2, 3, 4, 6)


def test_decorator():
    @jconv.accelerate
    def f(x, w):
        """What it does."""
        return stock(x, w)

    @functools.partial(jconv.accelerate, static_argnames="n")
    def g(x, w, n):
        return n * stock(x, w)

    class Layer:
        @jconv.accelerate
        def call(self, x):
            return stock(x, self.w)

        def __init__(self, w):
            self.w = w

    jax.tree_util.register_pytree_node(Layer, lambda s: ((s.w,), None), lambda _, c: Layer(*c))
    assert f.__name__ == "f" and f.__doc__ == "What it does." and "f" in repr(f)
    check(f(X, W), stock(X, W))
    check(g(X, W, n=2), 2 * stock(X, W))
    check(Layer(jnp.asarray(W)).call(X), stock(X, W))


def test_export():
    ours = jconv.accelerate(lambda x, w: jnp.sin(stock(x, w)))
    (batch,) = jax.export.symbolic_shape("b")
    symbolic = (jax.ShapeDtypeStruct((batch, *X.shape[1:]), X.dtype), jax.ShapeDtypeStruct(W.shape, W.dtype))
    outside, inside = jax.jit(jax.grad(lambda x, w: ours(x, w).sum())), jax.grad(lambda x, w: stock(x, w).sum())
    for f in (ours, outside, jconv.accelerate(inside)):
        artifact = jax.export.export(f, platforms=("cpu", "cuda", "tpu"))(*symbolic)
        again = jax.export.deserialize(artifact.serialize())
        check(again.call(X, W), f(X, W))
        check(jconv.accelerate(again.call)(X, W), f(X, W))


def test_disabled_jit():
    """Python's control flow on values, as without."""
    seen = []

    def f(x, w):
        if x.sum() > -1e9:
            seen.append(1)
        return stock(x, w)

    with jax.disable_jit():
        check(jconv.accelerate(f)(X, W), f(X, W))
        check(jax.grad(lambda x: jconv.accelerate(f)(x, W).sum())(X), jax.grad(lambda x: f(x, W).sum())(X))
    assert len(seen) == 4


# Errors.


def test_errors():
    with pytest.raises(jconv.AlgorithmError, match="algorithm must be 'auto' or one of .*, got 'nonsense'"):
        jconv.accelerate(stock, algorithm="nonsense")
    with pytest.raises(jconv.ConvError, match="fn must be a function of arrays, got int; pass what you would jit"):
        jconv.accelerate(3)

    async def later(x):
        return x

    with pytest.raises(jconv.ConvError, match="fn must return arrays, got later"):
        jconv.accelerate(later)
    with pytest.raises(jconv.ConvError, match="f needs the value of an array; name arguments .* in static_argnums"):

        def f(x, n):
            return x if n > 0 else -x

        jconv.accelerate(f)(X, 1)
    with pytest.raises(TypeError, match="str"):
        jconv.accelerate(lambda x, mode: x)(X, "same")
    with pytest.raises(TypeError, match="object"):
        jconv.accelerate(lambda x: object())(X)
    with pytest.raises(KeyError, match="mine"):
        jconv.accelerate(lambda x: {}["mine"])(X)


# Flax.


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(4, 6, (3, 3), rngs=rngs, param_dtype=jnp.float64)
        self.shared = self.again = nnx.Conv(6, 6, (3, 3), rngs=rngs, param_dtype=jnp.float64)
        self.norm = nnx.BatchNorm(6, rngs=rngs, param_dtype=jnp.float64)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), int))

    def __call__(self, x):
        self.calls[...] += 1
        return self.drop(self.norm(self.again(nnx.relu(self.shared(self.first(x))))))

    def scaled(self, x, by, *, twice=False):
        return (2 if twice else 1) * by * self(x)


def states(*nodes):
    return [jax.tree.map(_data, nnx.to_pure_dict(nnx.state(n))) for n in nodes]


def _data(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def alike(actual, expected):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-6, atol=1e-6)


def image():
    return jnp.asarray(arrays((2, 6, 5, 4))[0])


def train(wrap):
    """Three steps of a network with statistics, noise, a shared layer, an optimizer and a metric."""
    net = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(net, optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)
    metric = nnx.metrics.Average("loss")

    def step(net, optimizer, metric, x):
        def loss(net):
            return (net(x) ** 2).mean()

        value, grads = nnx.value_and_grad(loss)(net)
        optimizer.update(net, grads)
        metric.update(loss=value)
        return value

    step = wrap(step)
    values = [step(net, optimizer, metric, image()) for _ in range(3)]
    assert net.again is net.shared and int(net.calls[...]) == int(optimizer.step[...]) == 3
    assert net.drop.rngs is None or int(net.drop.rngs.count[...]) == 3
    return values, states(net, optimizer, metric)


@pytest.mark.parametrize(
    "wrap",
    (
        jconv.accelerate,
        lambda f: jconv.accelerate(nnx.jit(f, donate_argnums=(0, 1, 2))),
        lambda f: nnx.jit(jconv.accelerate(f, donate_argnames=("net", "optimizer"))),
    ),
    ids=("plain", "of nnx.jit", "in nnx.jit"),
)
def test_nnx_train_step(wrap):
    alike(train(wrap), trained_by_flax())


@functools.cache
def trained_by_flax():
    return train(nnx.jit)


def test_nnx_is_swapped_and_traced_once():
    net, traced = Net(nnx.Rngs(0)), []

    def f(net, x):
        traced.append(1)
        return net(x)

    ours = jconv.accelerate(f)
    for n in (1, 2, 3):
        ours(net, image())
        assert int(net.calls[...]) == n
    assert len(traced) <= 2  # nnx.jit itself traces anew when a graph's caches settle
    text = ours.lower(net, image()).as_text(debug_info=True)
    assert "jconv." in text
    graph, state = nnx.split(net)
    pure = lambda state, x: nnx.merge(graph, state)(x)
    assert count(pure, state, image()) == (3, 0) and count(jconv.accelerate(pure), state, image()) == (0, 3)


def forward(run):
    net = Net(nnx.Rngs(0))
    return run(net, image()), states(net)


@pytest.mark.parametrize(
    "run",
    (
        lambda net, x: jconv.accelerate(net)(x),
        lambda net, x: jconv.accelerate(net.__call__)(x),
        lambda net, x: jconv.accelerate(lambda tree, x: tree["a"][0](x))({"a": [net]}, x),
        lambda net, x: jconv.accelerate(lambda x, net: net(x))(x, net=net),
        lambda net, x: jconv.accelerate(lambda net, f, x: f(net, x), static_argnums=1)(net, Net.__call__, x),
        lambda net, x: jconv.accelerate(net.scaled, static_argnums=1, static_argnames="twice")(x, 1, twice=False),
        lambda net, x: jconv.accelerate(nnx.jit(Net.scaled, static_argnums=2))(net, x, 1),
        lambda net, x: jconv.accelerate(jconv.accelerate(net))(x),
        lambda net, x: nnx.jit(lambda net, x: jconv.accelerate(net)(x))(net, x),
        lambda net, x: jconv.accelerate(lambda a, b, x: (a is b, a(x))[1])(net, net, x),
    ),
    ids=("module", "method", "nested", "keyword", "static", "static method", "static of nnx.jit", "twice", "inner", "aliased"),
)  # fmt: skip
def test_nnx_state_survives(run):
    alike(forward(run), by_flax())


@functools.cache
def by_flax():
    return forward(lambda net, x: nnx.jit(lambda net, x: net(x))(net, x))


@pytest.mark.parametrize("side", ("inside", "outside"))
def test_nnx_grad(side):
    def run(accelerate):
        net = Net(nnx.Rngs(0))
        loss = lambda net, x: (net(x) ** 2).mean()
        f = nnx.jit(nnx.value_and_grad(accelerate(loss))) if side == "inside" else accelerate(nnx.value_and_grad(loss))
        value, grads = f(net, image())
        return value, nnx.to_pure_dict(grads), states(net)

    def jitted(f):
        return nnx.jit(f) if side == "outside" else f

    alike(run(jconv.accelerate), run(jitted))


def test_nnx_that_return_or_make_nodes():
    net = Net(nnx.Rngs(0))
    same_one, made = jconv.accelerate(lambda net: (net, nnx.Linear(2, 3, rngs=nnx.Rngs(0))))(net)
    assert same_one is net and made.kernel.shape == (2, 3)

    def grow(net):
        net.more = nnx.Param(jnp.ones(3))

    assert jconv.accelerate(grow)(net) is None
    assert net.more.shape == (3,)


def test_nnx_variables_and_split_state():
    step = nnx.Variable(jnp.zeros((), int))

    def f(step, x, w):
        step[...] += 1
        return stock(x, w)

    check(jconv.accelerate(f)(step, X, W), stock(X, W))
    assert int(step[...]) == 1
    net = Net(nnx.Rngs(0))
    graph, state = nnx.split(net)

    @functools.partial(jconv.accelerate, static_argnums=0)
    def pure(graph, state, x):
        net = nnx.merge(graph, state)
        return net(x), nnx.state(net)

    y, state = pure(graph, state, image())
    nnx.update(net, state)
    assert int(net.calls[...]) == 1 and y.shape == (2, 6, 5, 6)


def test_nnx_closed_over_is_an_error():
    net = Net(nnx.Rngs(0))
    with pytest.raises(Exception, match="Cannot (mutate|extract)|different trace level"):
        jconv.accelerate(lambda x: net(x))(image())
    assert int(net.calls[...]) == 0


def test_nnx_vmapped():
    net = nnx.Conv(4, 6, (3, 3), rngs=nnx.Rngs(0), param_dtype=jnp.float64)
    xs = jnp.stack([image(), 2 * image()])
    run = lambda f: nnx.vmap(f, in_axes=(None, 0))(net, xs)
    check(run(jconv.accelerate(lambda net, x: net(x))), run(lambda net, x: net(x)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(6, (3, 3), param_dtype=jnp.float64)(x)
        x = nn.BatchNorm(use_running_average=not train, param_dtype=jnp.float64)(x)
        x = nn.remat(nn.Conv)(6, (3, 3), strides=2, param_dtype=jnp.float64)(nn.relu(x))
        return nn.Dropout(0.3, deterministic=not train)(x).mean((1, 2))


def test_linen_train_step():
    net, x = LinenNet(), image()
    variables = net.init(jax.random.key(0), x, False)
    optimizer = optax.sgd(1e-2, momentum=0.9)

    def step(params, stats, state, key, x):
        def loss(params):
            y, new = net.apply(
                {"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"], rngs={"dropout": key}
            )
            return (y**2).mean(), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(grads, state)
        return value, optax.apply_updates(params, updates), stats, state

    def run(step):
        params, stats, state = variables["params"], variables["batch_stats"], optimizer.init(variables["params"])
        for i in range(2):
            value, params, stats, state = step(params, stats, state, jax.random.key(i), x)
        return value, params, stats

    alike(run(jconv.accelerate(step, donate_argnums=(2,))), run(jax.jit(step)))
    params, stats = variables["params"], variables["batch_stats"]
    assert swapped(step, params, stats, optimizer.init(params), jax.random.key(0), x)
    apply = jconv.accelerate(net.apply, static_argnames="train")
    # Jitted like ours: on some CPUs BatchNorm's float32 root is another one eagerly.
    stock = jax.jit(net.apply, static_argnames="train")
    check(apply(variables, x, train=False), stock(variables, x, train=False))


# The whole process.


@pytest.fixture
def clean():
    """JAX's tables before and after."""
    before = tables()
    yield
    assert tables() == before


def tables():
    named = {**mlir._platform_specific_lowerings, "default": mlir._lowerings}
    rules = [(p, table.get(q)) for p, table in named.items() for q in (lax.conv_general_dilated_p, rewrite.stock_p)]
    return [r for r in rules if r[1]], convolve.run_algorithm


def planned(f, *args):
    """True if the program's convolution is one of jconv's algorithms, and not lax's own."""
    text = f.lower(*args).as_text()
    assert ("stablehlo.convolution" in text) != ("stablehlo.dot_general" in text)
    return "stablehlo.dot_general" in text


def pointwise(x, w):
    return lax.conv(x, w, (1, 1), "VALID")


A, B = arrays((2, 8, 5, 5), (6, 8, 1, 1))


def test_install(clean):
    f = jax.jit(lambda x, w: pointwise(x, w))
    expected = f(A, B)  # compiled before
    assert not planned(f, A, B)
    jconv.install()
    try:
        assert planned(f, A, B)
        check(f(A, B), expected)
        check(pointwise(A, B), expected)  # eager
        g = jax.jit(jax.grad(lambda w: jnp.sin(pointwise(A, w)).sum()))
        gradient = g(B)
    finally:
        jconv.uninstall()
    assert not planned(f, A, B)
    check(gradient, g(B))
    with pytest.raises(jconv.ConvError, match=r"uninstall\(\) needs an install\(\)"):
        jconv.uninstall()


def test_install_reaches_what_was_compiled_before(clean, monkeypatch):
    lowered = []
    choose = convolve.choose
    monkeypatch.setattr(convolve, "choose", lambda *a: lowered.append(1) or choose(*a))
    f = jax.jit(pointwise)
    f(A, B)
    with jconv.install():
        f(A, B)
        assert lowered == [1]
        f(A, B)
        assert lowered == [1]
    f(A, B)
    assert lowered == [1]


def test_install_is_counted(clean):
    f = jax.jit(pointwise)
    with jconv.install():
        with jconv.install():
            assert planned(f, A, B)
        assert planned(f, A, B)
        jconv.install()
        jconv.uninstall()
        assert planned(f, A, B)
    assert not planned(f, A, B)


def test_install_ends_with_an_error(clean):
    with pytest.raises(KeyError), jconv.install():
        raise KeyError


COMPOSED = {
    "xla": ((1, 4, 8, 8), (6, 4, 3, 3), {}),
    "channel_last": ((1, 4, 8, 8), (6, 4, 3, 3), {}),
    "groupwise": ((1, 8, 8, 8), (6, 4, 3, 3), {"feature_group_count": 2}),
    "phase": ((1, 4, 5, 5), (6, 4, 3, 3), {"lhs_dilation": (2, 2)}),
    "volume": ((1, 4, 5, 5, 5), (6, 4, 3, 3, 3), {}),
}


@pytest.mark.parametrize("how", ("primitive", "custom_vjp", "eager", "disable_jit", "planned"))
@pytest.mark.parametrize("algorithm", COMPOSED)
def test_algorithms_made_of_lax_convolutions(algorithm, how, clean, monkeypatch):
    """Inside an algorithm lax's convolution is lax's: the planner is asked about none of them again."""
    lhs, rhs, geometry = COMPOSED[algorithm]
    x, w = arrays(lhs, rhs)
    n = len(lhs) - 2
    wish, asked = named(algorithm), []

    def f(implementation, **options):
        return lambda x, w: implementation(x, w, (1,) * n, [(1, 1)] * n, **geometry, **options)

    def choose(problem, _, platform, devices=1):
        asked.append(problem)
        return wish if wish.why_not(problem) is None else named("xla")

    expected = f(lax.conv_general_dilated)(x, w)
    autodiff = "custom_vjp" if how == "custom_vjp" else "primitive"
    run = f(jconv.conv_general_dilated, algorithm=algorithm, autodiff=autodiff)
    if how == "planned":
        run = f(lax.conv_general_dilated)
    if how not in ("eager", "disable_jit"):
        run = jax.jit(lambda x, w, run=run: (run(x, w) + run(x, w)) / 2)
    monkeypatch.setattr(convolve, "choose", choose)
    with jconv.install(), jax.disable_jit(how == "disable_jit"):
        check(run(x, w), expected)
        assert len(set(asked)) == 1, asked  # the call's own problem, whatever lax convolutions served it
        if how == "custom_vjp":  # whose algorithms themselves are batched, as they were traced
            check(jax.vmap(run, (0, None))(np.stack([x, 2 * x]), w), np.stack([expected, 2 * np.asarray(expected)]))
            assert len(set(asked)) == 1
        if how == "planned":
            assert f"jconv.{algorithm}" in run.lower(x, w).as_text(debug_info=True)


@pytest.mark.parametrize("name", ("grad_both", "vmap_both", "grad_of_scan", "remat", "cond", "while"))
def test_transforms_under_install(name, clean):
    f = functools.partial(TRANSFORMS[name], stock)
    with jconv.install():
        check(jax.jit(f)(X, W), by_lax(name))
        check(jconv.accelerate(f)(X, W), by_lax(name))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "complex64", "int32"))
def test_dtypes_under_install(dtype, clean):
    from tolerances import assert_close

    x, w = (np.round(4 * a).astype(dtype) for a in (A, B))
    expected = pointwise(x, w)
    with jconv.install():
        assert_close(pointwise(x, w), expected, "auto", dtype, factor=2)


def test_export_under_install(clean):
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((2, 14, 14, 64), (3, 3, 1, 64))]
    f = jax.jit(
        lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=64)
    )
    plain = jax.export.export(f, platforms=("cpu",))(*shapes).mlir_module()
    assert "stablehlo.convolution" in plain
    with jconv.install():
        for platform, lax_op in (("cpu", False), ("cuda", True), ("tpu", True)):
            text = jax.export.export(f, platforms=(platform,))(*shapes).mlir_module()
            assert ("stablehlo.convolution" in text) == lax_op, platform
        everywhere = jax.export.export(f, platforms=("cpu", "cuda", "tpu"))(*shapes)
        (batch,) = jax.export.symbolic_shape("b")
        symbolic = jax.export.export(f)(jax.ShapeDtypeStruct((batch, 14, 14, 64), jnp.float32), shapes[1])
    assert "stablehlo.convolution" in jax.export.export(f, platforms=("cpu",))(*shapes).mlir_module()
    x, w = (np.random.default_rng(0).standard_normal(s.shape, np.float32) for s in shapes)
    for artifact in (everywhere, symbolic):
        np.testing.assert_allclose(artifact.call(x, w), f(x, w), rtol=1e-4, atol=1e-4)


def test_shardings_under_install(clean):
    x, w = arrays((8, 6, 5, 4), (3, 2, 4, 6))
    f = lambda x, w: lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)
    local = jax.shard_map(f, mesh=mesh(), in_specs=(P("a"), P()), out_specs=P("a"))
    expected = f(x, w)
    with jconv.install():
        check(jax.jit(local)(x, w), expected)
        with jax.set_mesh(mesh(AxisType.Explicit)):
            y = jax.jit(f)(jax.device_put(x, P("a")), jax.device_put(w, P()))
        assert jax.typeof(y).sharding.spec[0] == "a"
        check(jax.device_get(y), expected)


def test_threads_install(clean):
    """Installs and uninstalls from many threads, with compilations between them."""
    expected, errors = pointwise(A, B), []

    def work(i):
        try:
            for j in range(3):
                with jconv.install():
                    f = jax.jit(lambda x, w, j=j: pointwise(x, w) + i + j)
                    check(f(A, B), np.asarray(expected) + i + j)
                    assert planned(jax.jit(pointwise), A, B)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert errors == []
    assert not planned(jax.jit(pointwise), A, B)


def test_install_refuses_an_unknown_jax(clean, monkeypatch):
    monkeypatch.delattr(mlir, "_platform_specific_lowerings")
    with pytest.raises(jconv.ConvError, match=r"does not know how jax .* keeps its lowering rules; wrap functions"):
        jconv.install()
    monkeypatch.undo()
    assert not planned(jax.jit(pointwise), A, B)


# What a review found.


def test_a_symbolic_batch_beside_a_window_larger_than_the_output():
    (batch,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct(s, np.float32) for s in ((batch, 3, 7, 7), (10, 3, 7, 7))]
    f = lambda x, w: lax.conv(x, w, (1, 1), "VALID")
    exported = jax.export.export(jax.jit(jconv.accelerate(f)))(*shapes)
    x, w = (np.random.default_rng(0).standard_normal((n, 3, 7, 7), np.float32) for n in (16, 10))
    assert_close(exported.call(x, w), f(x, w), "auto", np.float32)


@pytest.mark.parametrize("wrap", (jax.jit, lambda f: functools.partial(jax.jit(f))), ids=("jit", "partial"))
def test_a_jitted_function_of_a_module_keeps_its_state(wrap):
    module = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    jconv.accelerate(wrap(lambda m, x: m(x)))(module, jnp.arange(12.0).reshape(4, 3))
    np.testing.assert_allclose(module.mean[...], [0.045, 0.055, 0.065], rtol=1e-6)


def test_a_named_algorithm_under_custom_vjp_is_left_alone():
    x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 1, 1))
    f = lambda x, w: jconv.conv_general_dilated(x, w, (1, 1), "SAME", algorithm="xla", autodiff="custom_vjp")
    assert "stablehlo.convolution" in jconv.accelerate(f).lower(x, w).as_text()
    assert problems_of(f, x, w) == []


def test_the_outer_algorithm_is_the_one():
    x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 1, 1))
    inner = jconv.accelerate(lambda x, w: lax.conv(x, w, (1, 1), "SAME"), algorithm="im2col")
    assert "stablehlo.convolution" in jconv.accelerate(inner, algorithm="xla").lower(x, w).as_text()
    assert "stablehlo.convolution" not in jconv.accelerate(inner).lower(x, w).as_text()


def test_rules_in_thunks_are_swapped():
    x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 1, 1))
    conv = lambda x, w: lax.conv(x, w, (1, 1), "SAME")

    @jax.custom_vjp
    def custom(x, w):
        return conv(x, w)

    custom.defvjp(lambda x, w: (conv(x, w), (x, w)), lambda r, g: (r[0] * g.sum(), r[1] * g.sum()), optimize_remat=True)
    linear = lambda x, w: linear_call(lambda w, x: conv(x, w), lambda w, g: conv(g, w.swapaxes(0, 1)), w, x)
    for f in (custom, linear):
        jaxpr = jax.make_jaxpr(jax.grad(lambda x, w, f=f: jconv.accelerate(f)(x, w).sum()))(x, w)
        names = [s.equation.primitive.name for s in steps_of(jaxpr.jaxpr)]
        assert "conv_general_dilated" not in names and "jconv" in names


def test_checkify_names_the_convolution_that_makes_a_nan():
    x, w = jnp.full((1, 3, 8, 8), jnp.inf), jnp.zeros((4, 3, 1, 1))
    f = jconv.accelerate(lambda x, w: lax.conv(x, w, (1, 1), "SAME"))
    error, _ = checkify.checkify(f, errors=checkify.nan_checks)(x, w)
    assert "nan generated by primitive: jconv" in error.get()


def test_a_static_argument_is_handed_over_as_it_is():
    class Config:
        pass

    jax.tree_util.register_pytree_node(Config, lambda c: ((), None), lambda *_: Config())
    config = Config()
    config.factor = 3.0
    assert jconv.accelerate(lambda c, x: x * c.factor, static_argnums=0)(config, 2.0) == 6.0


def test_what_needs_a_value_is_refused_in_a_sentence():
    for f in (np.asarray, lambda x: list(range(x)), lambda x: 1 if x > 0 else 2):
        with pytest.raises(jconv.ConvTypeError, match="needs the value of an array"):
            jconv.accelerate(lambda x, f=f: f(x))(3)


def test_a_block_may_uninstall_itself():
    with pytest.raises(KeyError), jconv.install():
        jconv.uninstall()
        raise KeyError


def test_an_install_that_fails_leaves_no_trace(monkeypatch):
    before = mlir._lowerings[lax.conv_general_dilated_p]
    register = mlir.register_lowering

    def failing(primitive, *args, **options):
        if primitive is lax.conv_general_dilated_p:
            raise RuntimeError("no")
        return register(primitive, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(mlir, "register_lowering", failing)
        with pytest.raises(RuntimeError):
            jconv.install()
    assert mlir._lowerings[lax.conv_general_dilated_p] is before
    with pytest.raises(jconv.ConvError):
        jconv.uninstall()


def test_plans_and_tune_see_laxs_convolutions():
    x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
    loss = lambda w: (lax.conv(x, w, (1, 1), "SAME") ** 2).sum()
    found = [p.problem for p in jconv.plans(jax.grad(loss), w)]
    assert found == problems_of(jax.grad(jconv.accelerate(loss)), w) and len(found) == 2
    assert [row.problem for row in jconv.tune(jax.grad(loss), w, seconds=0).rows] == found


def test_a_decorator_with_arguments():
    @jconv.accelerate(static_argnames="stride")
    def f(x, w, stride):
        return lax.conv(x, w, (stride, stride), "SAME")

    assert f(jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3)), stride=2).shape == (1, 4, 4, 4)


def test_a_linen_module_is_refused_in_a_sentence():
    with pytest.raises(jconv.ConvTypeError, match="apply"):
        jconv.accelerate(nn.Conv(8, (3, 3)))
