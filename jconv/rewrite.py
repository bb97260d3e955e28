"""lax's convolutions as jconv's, in any JAX program: ``accelerate`` for one function, ``install`` for the process.

``accelerate`` traces a function, swaps each ``conv_general_dilated`` equation of its jaxpr, and of the jaxprs inside
it, for jconv's primitive, and stages the result as one inner jit. Rules that JAX traces later (those of custom_jvp,
custom_vjp and custom_vmap) are rewritten when they are traced. ``install`` re-registers the lowering of lax's
primitive instead, so that no program need be traced anew.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
from jax import lax
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero
from jax.extend import linear_util
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, Var, jaxpr_as_fun
from jax.extend.core.primitives import custom_jvp_call_p, custom_vjp_call_p, remat_p
from jax.interpreters import ad, batching, mlir
from jax.interpreters.partial_eval import dce_jaxpr

from jconv import convolve
from jconv.algorithms.base import Algorithm
from jconv.convolve import AlgorithmLike, conv_p
from jconv.errors import ConvError, ConvTypeError
from jconv.planner import named
from jconv.problem import ConvProblem

Numbers = int | Sequence[int] | None
Names = str | Iterable[str] | None


def accelerate(
    fn: Callable[..., Any] | None = None,
    *,
    algorithm: AlgorithmLike = "auto",
    static_argnums: Numbers = None,
    static_argnames: Names = None,
    donate_argnums: Numbers = None,
    donate_argnames: Names = None,
) -> Callable[..., Any]:
    """``fn``, jitted, with jconv's convolution in place of each of lax's: those of Flax, Haiku, jax.numpy, and so on.

    Convolutions inside ``jit``, ``scan``, ``while``, ``cond``, ``checkpoint``, ``shard_map``, custom derivatives and
    the like are swapped too; those that jconv cannot express stay lax's. ``grad(accelerate(f))`` differentiates
    jconv's convolution, ``accelerate(grad(f))`` swaps those that lax's derivatives are made of; the problems are the
    same. Under ``jax.disable_jit`` the function runs as it is.

    Args:
        fn: None, where it is a decorator with arguments; else a function of pytrees of arrays, traced as ``jax.jit`` traces it, once for each signature. The settings
            of one that is jitted (static and donated arguments, shardings) hold without being named again. A Flax
            NNX module may be ``fn``, or its method, or any argument: then ``fn`` runs as under ``nnx.jit``, and what
            it does to the state of its arguments is done to the caller's objects.
        algorithm: ``"auto"``, a name, or an Algorithm, which serves where it can; the planner chooses elsewhere.
        static_argnums, static_argnames, donate_argnums, donate_argnames: as in ``jax.jit``.

    Returns:
        A function to keep and call again, since its programs are kept with it; it has ``lower``, ``trace``, ``eval_shape`` and ``clear_cache``, as ``jax.jit`` returns; every
        transformation of JAX takes it, and ``jax.export``.

    Raises:
        AlgorithmError: if no algorithm has that name.
        ConvTypeError: if ``fn`` is no function, and in the call, if it needs the value of an argument.

    >>> x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
    >>> f = accelerate(lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME").sum())
    >>> float(f(x, w)), "= jconv[" in str(jax.make_jaxpr(jax.grad(f))(x, w))
    (5808.0, True)
    """
    wish = named(algorithm)
    if fn is None:
        return functools.partial(
            accelerate, algorithm=algorithm, static_argnums=static_argnums, static_argnames=static_argnames,
            donate_argnums=donate_argnums, donate_argnames=donate_argnames,
        )  # fmt: skip
    linen = sys.modules.get("flax.linen")
    if linen is not None and isinstance(fn, linen.Module):
        raise ConvTypeError(f"fn must be a function of arrays, got the Linen module {_name(fn)}; pass its apply method")
    if not callable(fn):
        raise ConvTypeError(f"fn must be a function of arrays, got {type(fn).__name__}; pass what you would jit")
    if any(kind(fn) for kind in (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)):
        raise ConvTypeError(f"fn must return arrays, got {_name(fn)}, whose calls return an iterator or a coroutine")
    settings = {
        "static_argnums": _numbers(static_argnums),
        "static_argnames": _names(static_argnames),
        "donate_argnums": _numbers(donate_argnums),
        "donate_argnames": _names(donate_argnames),
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    if isinstance(fn, _Accelerated):
        return _Accelerated(fn._fn, fn._wish if wish is None else wish, _merged(fn._settings, settings))
    return _Accelerated(fn, wish, settings)


class _Accelerated:
    """A jitted function of arrays, and, from the first call that holds an NNX graph node, one of graphs."""

    def __init__(self, fn: Callable[..., Any], wish: Algorithm | None, settings: dict[str, Any]) -> None:
        functools.update_wrapper(self, fn, updated=())
        self._fn, self._wish, self._settings = fn, wish, settings

    @property
    def _swap(self) -> Swap:
        return _ToOurs(self._wish)

    @functools.cached_property
    def _of_arrays(self) -> Any:
        fn, settings = self._fn, self._settings
        if _is_jitted(fn):
            fn, settings = fn.__wrapped__, _merged(_settings_of(fn), settings)  # pyright: ignore[reportFunctionMemberAccess]
        return jax.jit(_rewriting(fn, self._swap), **settings)

    @functools.cached_property
    def _of_graphs(self) -> Any:
        nnx, fn, settings = sys.modules["flax.nnx"], self._fn, self._settings
        node = _graph_of(fn)
        if node is not None:
            fn = type(node).__call__ if fn is node else fn.__func__  # pyright: ignore[reportFunctionMemberAccess]
            settings = {k: tuple(i + (i >= 0) for i in v) if "nums" in k else v for k, v in settings.items()}
        inner = fn if _is_jitted(fn) else getattr(fn, "jitted_fn", None)
        if _is_jitted(inner):
            found = _settings_of(inner)
            settings = _merged({k: v for k, v in found.items() if k.startswith(("static", "donate"))}, settings)
        graphs = nnx.jit(_unjitted(fn), **settings)
        if not _is_jitted(getattr(graphs, "jitted_fn", None)):
            raise ConvError(
                f"accelerate knows no way to keep the state of NNX modules with flax {sys.modules['flax'].__version__}; "
                "pass nnx.split's GraphDef as a static argument and its State as a pure one"
            )
        pure = graphs.jitted_fn
        graphs.jitted_fn = jax.jit(_rewriting(pure.__wrapped__, self._swap), **_settings_of(pure))
        return graphs if node is None else functools.partial(graphs, node)

    def _serving(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nnx = sys.modules.get("flax.nnx")
        if nnx is None or not hasattr(nnx, "Optimizer"):
            return self._of_arrays
        graphs = _graph_of(self._fn) is not None or _hold_graphs(nnx, args, kwargs)
        return self._of_graphs if graphs else self._of_arrays

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._serving(args, kwargs)(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        return _method(self._serving(args, kwargs), "trace")(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return _method(self._serving(args, kwargs), "lower")(*args, **kwargs)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        return _method(self._serving(args, kwargs), "eval_shape")(*args, **kwargs)

    def clear_cache(self) -> None:
        self.__dict__.pop("_of_graphs", None)
        self._of_arrays.clear_cache()

    def _cache_size(self) -> int:
        return self._of_arrays._cache_size()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __repr__(self) -> str:
        return f"<accelerated {_name(self._fn)}>"


Turns = Mapping[Any, Any]  # the equations that turn an array round, by the variable that they define


def problem_of(equation: Any, turns: Turns | None = None) -> ConvProblem | None:
    """The problem that an equation of a jaxpr poses, lax's convolution or jconv's.

    Args:
        equation: one of ``jaxpr.eqns``.
        turns: the ``rev`` equations of that jaxpr by their variables. lax's input gradient turns the kernel round
            first; with them the problem is the one that reads the kernel from its end instead, as jconv's does.

    Returns:
        A ConvProblem; None for any other equation, and for a convolution that a ConvProblem cannot express.

    >>> jaxpr = jax.make_jaxpr(lambda x, w: jax.lax.conv(x, w, (1,), "VALID"))(jnp.ones((1, 2, 5)), jnp.ones((3, 2, 3)))
    >>> print(problem_of(jaxpr.eqns[0]))
    float32 1x2x5 * 3x2x3 -> 1x3x3
    """
    if equation.primitive is conv_p:
        return equation.params["problem"]
    if equation.primitive is not lax.conv_general_dilated_p:
        return None
    lhs, rhs = equation.invars
    problem = _problem(lhs.aval, rhs.aval, equation.params)
    turn = turns.get(rhs) if turns and isinstance(rhs, Var) else None
    if problem is None or turn is None:
        return problem
    whole = sorted(turn.params["dimensions"]) == sorted(problem.layout.rhs_spec[2:])
    return problem.replace(reversed=True) if whole else problem


class Step(NamedTuple):
    """An equation of a program, with its place in it.

    Attributes:
        equation: of a jaxpr; it holds no program of its own, or one that works on scalars.
        runs: how often it runs, the lengths of all scans around it multiplied.
        in_while: True inside a ``while``, whose turns nobody knows: ``runs`` counts one.
        scopes: the names around it, of ``jax.named_scope`` and of Linen's modules.
        transposed: True if reverse mode made it.
        around: the equations whose programs it is in, the outermost first.
        turns: those of its jaxpr that turn an array round, for :func:`problem_of`.
    """

    equation: Any
    runs: int
    in_while: bool
    scopes: tuple[str, ...]
    transposed: bool
    around: tuple[Any, ...]
    turns: Turns

    @property
    def frames(self) -> list[tuple[str, int, str]]:
        """(file, line, function) of the calls that led to it, the innermost first."""
        tracebacks = (equation.source_info.traceback for equation in (self.equation, *reversed(self.around)))
        return [(f.file_name, f.line_num, f.function_name) for t in tracebacks if t is not None for f in t.frames]


def program_of(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Jaxpr:
    """The jaxpr of ``fn(*args, **kwargs)`` as :func:`accelerate` traces it, with nothing swapped.

    Args:
        fn: as in :func:`accelerate`; one that is accelerated has its convolutions swapped.
        args, kwargs: pytrees of arrays or ``jax.ShapeDtypeStruct``s, NNX modules among them.

    >>> [e.primitive.name for e in program_of(lambda x: 2 * x, 1.0).eqns]
    ['jit']
    """
    traced = (fn if isinstance(fn, _Accelerated) else _Observed(fn, None, {})).trace(*args, **kwargs)
    return getattr(traced, "traced", traced).jaxpr.jaxpr


def problems_of(fn: Callable[..., Any], *args: Any) -> list[ConvProblem]:
    """The problem of every convolution in ``fn(*args)``, lax's as :func:`accelerate` poses it, in the program's order.

    >>> x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 3, 3))
    >>> [str(p) for p in problems_of(lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID"), x, w)]
    ['float32 1x3x8x8 * 4x3x3x3 -> 1x4x6x6']
    """
    steps = (s for s in steps_of(program_of(fn, *args)) if not any(map(convolve.is_runner, s.around)))
    found = (problem_of(step.equation, step.turns) for step in steps)
    return [problem for problem in found if problem is not None]


def needed(program: Jaxpr) -> Jaxpr:
    """A program without what none of its results needs, as XLA runs it.

    >>> len(list(steps_of(needed(program_of(lambda x: (jnp.sin(x), x)[1], 1.0)))))
    0
    """
    return dce_jaxpr(program, [True] * len(program.outvars))[0]


def steps_of(jaxpr: Jaxpr) -> Iterator[Step]:
    """The equations of a program in its order, those inside ``jit``, ``scan``, ``cond`` (every branch) and the like.

    >>> f = lambda x: jax.lax.scan(lambda c, _: (jnp.sin(c), None), x, length=5)[0]
    >>> [(s.equation.primitive.name, s.runs) for s in steps_of(program_of(f, 1.0))]
    [('sin', 5)]
    """
    return _steps(jaxpr, 1, False, ())


def _steps(jaxpr: Any, runs: int, in_while: bool, around: tuple[Any, ...]) -> Iterator[Step]:
    turned = _turns(jaxpr)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inner = [] if name.startswith(_ON_SCALARS + _NOT_ENTERED) else _programs_in(equation.params)
        if not inner:
            names = [n for e in (*around, equation) for n in e.source_info.name_stack.stack]
            scopes = [n.name for n in names if type(n).__name__ == "Scope"]
            transposed = any(n.name == "transpose" for n in names if type(n).__name__ == "Transform")
            yield Step(
                equation, runs, in_while, tuple(scope for scope in scopes if scope != _RECOMPUTED),
                transposed and _RECOMPUTED not in scopes, around, turned,
            )  # fmt: skip
        turns = equation.params["length"] if name == "scan" else 1
        for program in inner:
            yield from _steps(program, runs * turns, in_while or name == "while", (*around, equation))


def scopes_of(fn: Callable[..., Any], *args: Any) -> tuple[Any, list[tuple[str, list[Any]]]]:
    """Runs a function; what it returns, and what each of its named scopes gave, in the order in which they ended.

    A scope gives what its last equation gave. The programs of ``jit``, ``checkpoint`` and custom derivatives are
    entered, those of loops and branches are not.

    Args:
        fn: a function of arrays, with ``jax.named_scope`` around its layers.
        args: arrays, or pytrees of them.

    >>> def f(x):
    ...     with jax.named_scope("twice"):
    ...         y = 2 * x
    ...     return y + 1
    >>> scopes_of(f, jnp.float32(1))
    (Array(3., dtype=float32), [('twice', [Array(2., dtype=float32)])])
    """
    traced, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
    ended: list[tuple[str, list[Any]]] = []
    open_: dict[tuple[str, ...], list[Any]] = {}

    def give(path: tuple[str, ...], values: list[Any]) -> None:
        around = [path[:depth] for depth in range(1, len(path) + 1)]
        for scope in [scope for scope in reversed(open_) if scope not in around]:
            ended.append(("/".join(scope), open_.pop(scope)))
        open_.update(dict.fromkeys(around, values))

    def run(jaxpr: Any, consts: Sequence[Any], values: Sequence[Any], above: tuple[str, ...]) -> list[Any]:
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *values), strict=True))
        for equation in jaxpr.eqns:
            stack = equation.source_info.name_stack.stack
            path = above + tuple(n.name for n in stack if type(n).__name__ == "Scope")
            operands = [known[v] if isinstance(v, Var) else v.val for v in equation.invars]
            inner = next((equation.params[name] for name in _INLINED if name in equation.params), None)
            if inner is not None and equation.primitive.name in _ENTERED:
                program, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
                results = run(program, consts, operands, path)
            else:
                found = equation.primitive.get_bind_params(equation.params)
                functions, params = found if isinstance(found, tuple) else ((), found)  # jax 0.8, 0.10
                results = equation.primitive.bind(*functions, *operands, **params)
                results = list(results) if equation.primitive.multiple_results else [results]
                give(path, results)
            known.update(zip(equation.outvars, results, strict=True))
        return [known[v] if isinstance(v, Var) else v.val for v in jaxpr.outvars]

    results = run(traced.jaxpr, traced.consts, jax.tree.leaves(args), ())
    give((), [])
    return jax.tree.unflatten(jax.tree.structure(shape), results), ended


_ENTERED = ("jit", "pjit", "checkpoint", "remat2", "custom_jvp_call", "custom_vjp_call", "closed_call")
_INLINED = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_ON_SCALARS = ("reduce", "scatter", "select_and_scatter")
_RECOMPUTED = "rematted_computation"  # what jax.checkpoint runs anew


def _turns(jaxpr: Any) -> Turns:
    return {e.outvars[0]: e for e in jaxpr.eqns if e.primitive is lax.rev_p}


def _programs_in(params: dict[str, Any]) -> list[Any]:
    found = jax.tree.leaves(list(params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns"))
    return [program for program in found if hasattr(program, "eqns")]


def _problem(lhs: Any, rhs: Any, params: dict[str, Any]) -> ConvProblem | None:
    given = {name: value for name, value in params.items() if name not in ("precision", "out_sharding")}
    precision, sharding = params["precision"], params["out_sharding"]
    if isinstance(precision, tuple) and precision[0] == precision[1]:
        precision = precision[0]
    if sharding is not None and jax.sharding.AxisType.Explicit not in getattr(sharding.mesh, "axis_types", ()):
        sharding = None  # derivatives name one in a mesh of any kind
    try:
        # lax has put the default of jax_default_matmul_precision where none was given.
        return ConvProblem.of(lhs, rhs, **given, out_sharding=sharding).replace(precision=precision)
    except ConvError:
        return None


# A call with its convolutions swapped. A swap is a function of lax's equation, and of those that turn an array round, to
# another equation or to itself.

Swap = Callable[[Any, Turns], Any]


@dataclass(frozen=True)
class _ToOurs:
    wish: Algorithm | None

    def __call__(self, equation: Any, turns: Turns) -> Any:
        problem = problem_of(equation, turns)
        if problem is None:
            return equation
        lhs, rhs = equation.invars
        if problem.reversed:
            rhs = turns[rhs].invars[0]
        params = {"problem": problem, "wish": self.wish}
        return equation.replace(primitive=conv_p, invars=[lhs, rhs], params=params)


class _Observed(_Accelerated):
    """A program as it is."""

    @property
    def _swap(self) -> Swap:
        return _unchanged


def _unchanged(equation: Any, _: Turns) -> Any:
    return equation


_NEEDS_A_VALUE = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def _rewriting(fn: Callable[..., Any], swap: Swap) -> Callable[..., Any]:
    @functools.wraps(fn)
    def run(*args: Any, **kwargs: Any) -> Any:
        if jax.config.jax_disable_jit:  # pyright: ignore[reportAttributeAccessIssue]
            return fn(*args, **kwargs)
        try:
            return _call(fn, swap, args, kwargs)
        except _NEEDS_A_VALUE as error:
            raise ConvTypeError(
                f"accelerate traces its function as jax.jit does, but {_name(fn)} needs the value of an array; name "
                f"arguments that are no arrays in static_argnums or static_argnames, or use lax.cond and its like "
                f"({str(error).splitlines()[0]})"
            ) from error

    return run


def _call(fn: Callable[..., Any], swap: Swap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``fn(*args, **kwargs)`` under a trace, as one inner jit with its convolutions swapped. What is no tracer among the
    leaves of the arguments is static."""
    whole = tuple(_has_no_tracer(x) for x in args), {name: _has_no_tracer(x) for name, x in kwargs.items()}
    leaves, tree = jax.tree.flatten((args, kwargs))
    traced = [isinstance(leaf, Tracer) for leaf in leaves]
    out_tree: Any = None

    @functools.wraps(fn)
    def pure(*live: Any) -> Any:
        nonlocal out_tree
        rest = iter(live)
        a, k = tree.unflatten([next(rest) if is_live else leaf for leaf, is_live in zip(leaves, traced, strict=True)])
        a = [x if same else y for same, x, y in zip(whole[0], args, a, strict=True)]
        out = fn(*a, **{name: kwargs[name] if same else k[name] for name, same in whole[1].items()})
        out_tree = jax.tree.structure(out)
        return out

    live = [leaf for leaf, is_live in zip(leaves, traced, strict=True) if is_live]
    closed = jax.make_jaxpr(jax.jit(pure))(*live)
    return out_tree.unflatten(jaxpr_as_fun(_rewritten(closed, swap))(*live))


def _has_no_tracer(x: Any) -> bool:
    """True for a static argument, which is handed over as it is."""
    return not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(x))


# Jaxprs. What was rewritten stays shared where it was shared, or JAX would trace and lower each use of it on its own.
# A memo lives as long as the jaxpr that it is for; None stands for the jaxpr itself.

_memos: dict[Swap, WeakKeyDictionary[Any, Any]] = {}
_NOT_ENTERED = ("pallas_call",)


def _rewritten(jaxpr: Any, swap: Swap) -> Any:
    """A Jaxpr or ClosedJaxpr with every lax convolution swapped; itself where none was."""
    memo = _memos.setdefault(swap, WeakKeyDictionary())
    if jaxpr in memo:
        found = memo[jaxpr]
        return jaxpr if found is None else found
    if isinstance(jaxpr, ClosedJaxpr):
        inner = _rewritten(jaxpr.jaxpr, swap)
        new = None if inner is jaxpr.jaxpr else ClosedJaxpr(inner, jaxpr.consts)
    else:
        turns = _turns(jaxpr)
        equations = [_equation(equation, swap, turns) for equation in jaxpr.eqns]
        same = all(a is b for a, b in zip(equations, jaxpr.eqns, strict=True))
        new = None if same else jaxpr.replace(eqns=equations)
    memo[jaxpr] = new
    return jaxpr if new is None else new


def _equation(equation: Any, swap: Swap, turns: Turns) -> Any:
    primitive, params = equation.primitive, equation.params
    if primitive is lax.conv_general_dilated_p:
        return swap(equation, turns)
    if primitive is conv_p or primitive.name in _NOT_ENTERED or convolve.is_runner(equation):
        return equation
    new = {name: _value(value, swap) for name, value in params.items()}
    if primitive is custom_jvp_call_p:
        new["jvp_jaxpr_fun"] = _later(params["jvp_jaxpr_fun"], swap)
    elif primitive is custom_vjp_call_p:
        new["fwd_jaxpr_thunk"] = _later(params["fwd_jaxpr_thunk"], swap)
        new["bwd"] = _backward(params["bwd"], swap)
    elif primitive is remat_p and params.get("policy") is not None:
        new["policy"] = _Policy(params["policy"])
    elif primitive.name in _THUNKS:
        thunk = _THUNKS[primitive.name]
        new[thunk] = functools.partial(_traced_later, params[thunk], swap)
    elif primitive.name == "custom_vmap_call":
        new["rule"] = _mapped(params["rule"], swap)
    return equation if all(new[name] is params[name] for name in new) else equation.replace(params=new)


def _value(value: Any, swap: Swap) -> Any:
    if isinstance(value, ClosedJaxpr | Jaxpr):
        return _rewritten(value, swap)
    if isinstance(value, tuple | list):
        new = [_value(v, swap) for v in value]
        if any(a is not b for a, b in zip(new, value, strict=True)):
            return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    return value


# Rules that JAX traces when they are needed, if ever.


_THUNKS = {"remat_opt": "fun_jaxpr_thunk", "linear_call": "transpose_thunk"}


def _traced_later(thunk: Callable[[], Any], swap: Swap) -> Any:
    return _value(thunk(), swap)


def _later(thunk: Any, swap: Swap) -> Any:
    """A function of which inputs have derivatives, that gives a jaxpr first."""

    def rewritten(*zeros: Any) -> Any:
        jaxpr, *rest = thunk.call_wrapped(*zeros)
        return (_rewritten(jaxpr, swap), *rest)

    return linear_util.wrap_init(rewritten, debug_info=thunk.debug_info)


def _backward(rule: Any, swap: Swap) -> Any:
    """A flat function of residuals and cotangents, symbolic zeros among them, to cotangents, zeros among them."""

    def rewritten(*operands: Any) -> Any:
        live = [x for x in operands if not _is_symbolic(x)]
        symbolic: list[Any] = []

        def numeric(*live: Any) -> list[Any]:
            rest = iter(live)
            out = rule.call_wrapped(*(x if _is_symbolic(x) else next(rest) for x in operands))
            symbolic[:] = [x if _is_symbolic(x) else ... for x in out]
            return [x for x in out if not _is_symbolic(x)]

        closed = jax.make_jaxpr(jax.jit(numeric))(*live)
        results = iter(jaxpr_as_fun(_rewritten(closed, swap))(*live))
        return [next(results) if x is ... else x for x in symbolic]

    return linear_util.wrap_init(rewritten, debug_info=rule.debug_info)


def _is_symbolic(x: Any) -> bool:
    return x is None or isinstance(x, ad.Zero | SymbolicZero)


def _mapped(rule: Any, swap: Swap) -> Any:
    """``custom_vmap``'s rule: a function of the axis's size, which arguments are mapped, and the arguments."""

    @functools.wraps(rule)
    def rewritten(size: int, in_batched: Any, *args: Any) -> Any:
        out_batched: Any = None

        def pure(args: Any) -> Any:
            nonlocal out_batched
            out, out_batched = rule(size, in_batched, *args)
            return out

        return _call(pure, swap, (args,), {}), out_batched

    return rewritten


@dataclass(frozen=True)
class _Policy:
    """A checkpoint policy that meets jconv's convolution under lax's name."""

    policy: Callable[..., Any]

    def __call__(self, primitive: Any, *avals: Any, **params: Any) -> Any:
        return self.policy(lax.conv_general_dilated_p if primitive is conv_p else primitive, *avals, **params)


# Arguments.


def _is_jitted(fn: Any) -> bool:
    return isinstance(fn, _JITTED)


_JITTED = type(jax.jit(lambda: None))


def _unjitted(fn: Any) -> Any:
    """What ``jax.jit`` was given: it would flatten a module, and lose what is done to it."""
    if isinstance(fn, functools.partial):
        return functools.partial(_unjitted(fn.func), *fn.args, **fn.keywords)
    return fn.__wrapped__ if _is_jitted(fn) else fn


def _settings_of(jitted: Any) -> dict[str, Any]:
    """The arguments that ``jax.jit`` was given to make this function."""
    try:
        info = jitted._jit_info
        return {
            "static_argnums": tuple(info.static_argnums),
            "static_argnames": tuple(info.static_argnames),
            "donate_argnums": tuple(info.donate_argnums),
            "donate_argnames": tuple(info.donate_argnames),
            "in_shardings": _placed(info.in_shardings_treedef, info.in_shardings_leaves, info.in_layouts_leaves),
            "out_shardings": _placed(info.out_shardings_treedef, info.out_shardings_leaves, info.out_layouts_leaves),
            "keep_unused": info.keep_unused,
            "inline": info.inline,
            "compiler_options": dict(info.compiler_options_kvs) or None,
        }
    except AttributeError as error:
        raise ConvError(
            f"accelerate cannot read the settings of a jitted function with jax {jax.__version__}; pass the plain "
            "function, and name its static and donated arguments"
        ) from error


def _placed(tree: Any, shardings: Any, layouts: Any) -> Any:
    from jax.experimental.layout import Format

    pairs = zip(shardings, layouts, strict=True) if any(x is not None for x in layouts) else ()
    return tree.unflatten([Format(layout, sharding) for sharding, layout in pairs] or shardings)


def _merged(found: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    return {**found, **{k: tuple(dict.fromkeys((*found.get(k, ()), *v))) for k, v in given.items()}}


def _numbers(value: Numbers) -> tuple[int, ...] | None:
    return value if value is None else (value,) if isinstance(value, int) else tuple(value)


def _names(value: Names) -> tuple[str, ...] | None:
    return value if value is None else (value,) if isinstance(value, str) else tuple(value)


def _name(fn: Any) -> str:
    return getattr(fn, "__name__", None) or type(fn).__name__


def _method(serving: Any, name: str) -> Callable[..., Any]:
    if isinstance(serving, functools.partial):
        return functools.partial(getattr(serving.func, name), *serving.args)
    return getattr(serving, name)


# NNX graph nodes: jax.jit takes them as pytrees, and loses what a function does to them.


def _graph_of(fn: Any) -> Any:
    """The NNX node that ``fn`` is, or whose method it is."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is None:
        return None
    owner = fn.__self__ if inspect.ismethod(fn) else fn
    return owner if isinstance(owner, (nnx.Pytree, nnx.Variable)) else None


def _hold_graphs(nnx: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    kinds = (nnx.Pytree, nnx.Variable)
    if any(isinstance(x, kinds) for x in (*args, *kwargs.values())):
        return True
    try:
        leaves, tree = jax.tree.flatten((args, kwargs))
        return any(issubclass(kind, kinds) for kind in set(map(type, leaves))) or _made_of(tree, kinds)
    except (TypeError, ValueError):  # unhashable or unordered: jit says so
        return any(
            isinstance(x, kinds) for x in jax.tree.leaves((args, kwargs), is_leaf=lambda x: isinstance(x, kinds))
        )


@functools.lru_cache(maxsize=4096)
def _made_of(tree: Any, kinds: tuple[type, ...]) -> bool:
    """True if a node of the tree, at any depth, is of one of the kinds."""
    node = tree.node_data()
    if node is None:
        return False
    return issubclass(node[0], kinds) or any(_made_of(child, kinds) for child in tree.children())


# The whole process.

_lock = threading.RLock()
_installs = 0
_rules: dict[str | None, Any] = {}  # lax's own, while jconv's stands in their place


class _Installation:
    """What :func:`install` returns: at the end of its ``with`` block it uninstalls."""

    def __enter__(self) -> _Installation:
        return self

    def __exit__(self, *_: Any) -> None:
        with _lock:
            if _installs > 0:  # else it was undone inside
                uninstall()


def install() -> _Installation:
    """From here on, every lax convolution that is compiled in this process is planned and lowered as jconv's.

    For programs that cannot be wrapped in :func:`accelerate`: a library's training loop. It replaces the lowering
    rules of ``lax.conv_general_dilated`` and clears JAX's caches, so that what was compiled before is compiled anew.
    It may be called again, from any thread; each call needs its own :func:`uninstall`. Derivatives are lax's.

    Returns:
        A context manager that uninstalls at its end; it may be ignored.

    Raises:
        ConvError: if this version of JAX keeps its rules otherwise than those that jconv knows.

    >>> f = jax.jit(lambda x, w: jax.lax.conv(x, w, (1, 1), "SAME"))
    >>> x, w = jnp.ones((1, 3, 8, 8)), jnp.ones((4, 3, 1, 1))
    >>> with install():
    ...     planned = f.lower(x, w).as_text()
    >>> [("stablehlo.convolution" in text) for text in (planned, f.lower(x, w).as_text())]
    [False, True]
    """
    global _installs
    with _lock:
        if _installs == 0:
            _register()
        _installs += 1
    return _Installation()


def uninstall() -> None:
    """Undoes one :func:`install`; after the last, JAX's rules are what they were, and its caches are empty.

    Raises:
        ConvError: if there is none to undo.

    >>> _ = install()
    >>> uninstall()
    """
    global _installs
    with _lock:
        if _installs == 0:
            raise ConvError("uninstall() needs an install() before it; there is none that was not undone")
        _installs -= 1
        if _installs == 0:
            _restore()


def _register() -> None:
    """At every moment a thread that compiles finds a rule, and no algorithm's convolution is planned again."""
    tables = _tables()
    _rules.update({platform: table[lax.conv_general_dilated_p] for platform, table in tables.items()})
    try:
        for platform in tables:
            mlir.register_lowering(stock_p, _rules[platform].rule, platform=platform)
        convolve.run_algorithm = _with_stock
        jax.clear_caches()
        mlir.register_lowering(lax.conv_general_dilated_p, _planned)
        for platform, table in tables.items():
            if platform is not None:
                del table[lax.conv_general_dilated_p]
        jax.clear_caches()
    except BaseException:
        _restore()
        raise


def _restore() -> None:
    for platform, entry in _rules.items():
        if platform is not None:
            mlir._platform_specific_lowerings[platform][lax.conv_general_dilated_p] = entry
    mlir._lowerings[lax.conv_general_dilated_p] = _rules[None]
    mlir.register_lowering(stock_p, _as_lax)
    for platform in _rules:
        if platform is not None:
            mlir._platform_specific_lowerings[platform].pop(stock_p, None)
    convolve.run_algorithm = _run_algorithm
    _rules.clear()
    jax.clear_caches()


def _tables() -> dict[str | None, Any]:
    """JAX's tables of lowering rules that have one for lax's convolution, by platform; None is any other."""
    try:
        tables = {None: mlir._lowerings, **mlir._platform_specific_lowerings}
        found = {platform: table for platform, table in tables.items() if lax.conv_general_dilated_p in table}
        known = None in found and all(callable(t[lax.conv_general_dilated_p].rule) for t in found.values())
    except (AttributeError, TypeError):
        known, found = False, {}
    if not known:
        raise ConvError(
            f"install() does not know how jax {jax.__version__} keeps its lowering rules; "
            "wrap functions in jconv.accelerate, or use jax 0.8.2 to 0.10.2"
        )
    return found


def _planned(ctx: Any, lhs: Any, rhs: Any, **params: Any) -> Any:
    """The lowering of lax's convolution while jconv is installed."""
    left, right = ctx.avals_in
    problem = _problem(left, right, params)
    ours = functools.partial(conv_p.bind, problem=problem, wish=None)
    stock = functools.partial(stock_p.bind, **params)
    return mlir.lower_fun(stock if problem is None else ours, multiple_results=False)(ctx, lhs, rhs)


# lax's convolution under another name, for algorithms that are made of it: its rules are lax's own.

stock_p = Primitive("conv_general_dilated")
stock_p.def_effectful_abstract_eval(lax.conv_general_dilated_p.abstract_eval)
_as_lax = mlir.lower_fun(lax.conv_general_dilated_p.bind, multiple_results=False)
mlir.register_lowering(stock_p, _as_lax)
_run_algorithm = convolve.run_algorithm


def _to_stock(equation: Any, _: Turns) -> Any:
    return equation.replace(primitive=stock_p)


def _with_stock(run: Callable[..., Any], *operands: Any) -> Any:
    with jax.disable_jit(False):
        closed = jax.make_jaxpr(run)(*operands)
    (out,) = jaxpr_as_fun(_rewritten(closed, _to_stock))(*operands)
    return out


@stock_p.def_impl
def _evaluate_stock(*operands: Any, **params: Any) -> Any:
    with jax.disable_jit(False):
        return jax.jit(functools.partial(stock_p.bind, **params))(*operands)


def _batch_stock(operands: Any, axes: Any, **params: Any) -> Any:
    batched = jax.vmap(functools.partial(lax.conv_general_dilated_p.bind, **params), axes)
    return _with_stock(batched, *operands), 0


batching.primitive_batchers[stock_p] = _batch_stock
