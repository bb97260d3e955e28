"""What every layer of a network takes in and gives out, on PyTorch's side and on JAX's.

PyTorch is watched by forward hooks, NNX by wrapping ``__call__`` of the classes that a module is made of, Linen by
its method interceptors, and a plain function by its named scopes. Layers stand in the order in which they finish.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jconv.errors import ParityError, needs_flax
from jconv.rewrite import scopes_of

__all__ = ["Layer", "Port", "Recording", "record_torch"]


@dataclass(eq=False)
class Layer:
    """One call of one layer.

    Attributes:
        name: its path, with ``#2`` for the second call; empty for the whole network.
        kind: the name of its class.
        family: what it does, whatever the library: ``"conv"``, ``"batchnorm"``; empty where nobody knows.
        inputs, outputs: its arrays, in its own layout.
        is_leaf: True if it called no other layer.
        module: PyTorch's module.
        calls: how many of PyTorch's functions had been called when it began and when it ended.
    """

    name: str
    kind: str
    family: str
    inputs: list[Any]
    outputs: list[Any] = field(default_factory=list)
    is_leaf: bool = True
    module: Any = None
    calls: tuple[int, int] = (0, 0)


@dataclass(eq=False)
class Recording:
    """A run of a network.

    Attributes:
        layers: in the order in which they finished, the whole network last.
        outputs: the arrays that it returned.
        state: what the run left of its state: PyTorch's buffers by name, or the port's tree.
    """

    layers: list[Layer]
    outputs: list[Any]
    state: Any


# PyTorch.


def record_torch(
    module: Any, inputs: Sequence[Any], dtype: Any, watch: Any = None, only: str | None = None, before: bool = False
) -> Recording:
    """Runs a PyTorch module, which is left as it was but for its buffers.

    Args:
        module: on the CPU, in the mode and the dtype that it shall run in.
        inputs: numpy arrays; floating ones are cast to `dtype`, which is also what the module's own new tensors have.
        watch: a ``TorchFunctionMode`` with a counter ``count`` of the calls that it saw.
        only: the name of the one layer that is recorded; the run ends with it.
        before: whether the run ends before that layer, with its inputs recorded.
    """
    import torch

    layers: list[Layer] = []
    open_: list[Layer] = []
    times: Counter[str] = Counter()
    removers = []

    def count() -> int:
        return 0 if watch is None else watch.count

    def begin(name: str, layer: Any, args: Any, kwargs: Any) -> None:
        times[name] += 1
        described = _described(name, times[name], layer)
        wanted = only is None or described[0] == only
        called = Layer(*described, _arrays((args, kwargs)) if wanted else [], module=layer)
        called.calls = (count(), 0)
        for outer in open_:
            outer.is_leaf = False
        open_.append(called)
        if wanted and before:
            layers.append(called)
            raise _Stop

    def end(layer: Any, args: Any, kwargs: Any, out: Any) -> None:
        called = open_.pop()
        if only is None or called.name == only:
            called.outputs, called.calls = _arrays(out), (called.calls[0], count())
            layers.append(called)
            if only is not None:
                raise _Stop

    out: Any = ()
    try:
        for name, layer in module.named_modules():
            if only is None or name == only.partition("#")[0]:
                begins = functools.partial(begin, name)
                removers.append(layer.register_forward_pre_hook(begins, prepend=True, with_kwargs=True))
                removers.append(layer.register_forward_hook(end, with_kwargs=True))
        with torch.no_grad(), new_tensors(dtype), watch or contextlib.nullcontext(), contextlib.suppress(_Stop):
            out = module(*(as_tensor(x, dtype) for x in inputs))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ParityError(f"The PyTorch module cannot be called with these inputs: {first_line(error)}") from error
    finally:
        for remover in removers:
            remover.remove()
    state = {name: buffer.detach().clone().numpy() for name, buffer in module.named_buffers()}
    return Recording(layers, [] if only is not None else _arrays(out), state)


_DEFAULT_DTYPE = threading.RLock()


@contextlib.contextmanager
def new_tensors(dtype: Any) -> Iterator[None]:
    """The dtype of the tensors that PyTorch modules make as they run: PyTorch has one for all threads."""
    import torch

    with _DEFAULT_DTYPE:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)


class _Stop(Exception):
    pass


def as_tensor(x: Any, dtype: Any) -> Any:
    import torch

    tensor = torch.from_numpy(np.array(x))
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def tensors_of(tree: Any) -> list[Any]:
    """The tensors in a PyTorch structure, in the order in which JAX flattens it: dicts by their sorted keys."""
    import torch

    found = []
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)
        elif isinstance(leaf, Mapping):  # of a class that JAX does not know
            found += tensors_of(dict(leaf))
    return found


def _arrays(tree: Any) -> list[np.ndarray]:
    """The tensors in a PyTorch structure, copied, since layers work in place."""
    import torch

    return [
        as_real((x.detach().clone() if x.dtype != torch.bfloat16 else x.detach().float()).numpy())
        for x in tensors_of(tree)
    ]


def as_real(array: Any) -> np.ndarray:
    """An array of real numbers: complex ones as pairs, truth values as 0 and 1."""
    array = np.asarray(array)
    if array.dtype.kind == "c":
        return np.stack([array.real, array.imag], -1)
    return array.astype(np.uint8) if array.dtype.kind == "b" else array


_FAMILIES = {
    "bn": "batchnorm", "dense": "linear", "densegeneral": "linear", "embed": "embedding", "fc": "linear",
    "lineargeneral": "linear", "ln": "layernorm", "swish": "silu",
}  # fmt: skip
_KNOWN = {
    "adaptiveavgpool", "adaptivemaxpool", "avgpool", "batchnorm", "conv", "convtranspose", "dropout", "elu",
    "embedding", "flatten", "gelu", "groupnorm", "hardswish", "hardsigmoid", "identity", "instancenorm", "layernorm",
    "leakyrelu", "linear", "maxpool", "mish", "pixelshuffle", "prelu", "relu", "relu6", "rmsnorm", "sigmoid", "silu",
    "softmax", "tanh", "upsample",
}  # fmt: skip


def family(name: str) -> str:
    """What a layer does by its class's or its scope's name; empty where that is not known.

    >>> family("ConvTranspose2d"), family("bn1"), family("Block")
    ('convtranspose', 'batchnorm', '')
    """
    word = re.sub(r"_?\d*$", "", re.sub(r"[123]d", "", name.lower().removeprefix("lazy"))).replace("_", "")
    word = name.lower() if name.lower() == "relu6" else _FAMILIES.get(word, word)
    return word if word in _KNOWN else ""


def _described(name: str, times: int, layer: Any) -> tuple[str, str, str]:
    classes = [cls.__name__ for cls in type(layer).__mro__]
    return _counted(name, times), classes[0], next(filter(None, map(family, classes)), "")


def _counted(name: str, times: int) -> str:
    return name if times == 1 else f"{name}#{times}"


def first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


# The port.


class Port:
    """The JAX side: a function of a state and of inputs.

    Args:
        given: an NNX module; a Linen module that is bound to variables; a pair of a Linen module and its variables; a
            pair of a function and its first argument, which is a module or a tree of arrays; or a function of the
            inputs alone.
        train: whether a Linen module may change its collections.
        kwargs: keyword arguments of its call.

    Raises:
        ParityError: if it is none of these.
    """

    def __init__(self, given: Any, train: bool = False, kwargs: Mapping[str, Any] | None = None) -> None:
        with needs_flax("jconv.parity"):
            from flax import linen as nn
            from flax import nnx

        options = dict(kwargs or {})
        fn, state = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        if inspect.isclass(fn) and issubclass(fn, (nn.Module, nnx.Module)):
            raise ParityError(f"The port is a class, {fn.__name__}, expected an instance; make one.")
        if isinstance(fn, nn.Module):
            if state is None and fn.scope is not None:
                fn, state = fn.unbind()
            if state is None:
                raise ParityError(
                    f"The port is a Linen module, {type(fn).__name__}, without variables; pass (module, variables)."
                )
            if not isinstance(state, Mapping) or "params" not in state and len(state):
                raise ParityError(
                    f"The variables of {type(fn).__name__} must be what its init returned, {{'params': ...}}, got "
                    f"{sorted(state) if isinstance(state, Mapping) else type(state).__name__}."
                )
            module, mutable = fn, [name for name in state if name != "params"] if train else False
            self._fn = lambda variables, *inputs: module.apply(variables, *inputs, mutable=mutable, **options)
        elif isinstance(fn, nnx.Module) and state is None:
            self._fn, state = (lambda model, *inputs: model(*inputs, **options)), fn
        elif callable(fn):
            self._fn = lambda state, *inputs: fn(*([state] if isinstance(given, tuple) else []), *inputs, **options)
        else:
            raise ParityError(
                f"The port is of type {type(given).__name__}, expected an NNX module, (Linen module, variables), "
                "(function, parameters) or a function of the inputs."
            )
        self.is_nnx = isinstance(state, nnx.Module)
        self.eager = False  # whether to run operation by operation
        self.graph: Any
        self.state: Any
        self.graph, self.state = nnx.split(state) if self.is_nnx else (None, state)

    @property
    def model(self) -> Any:
        """The state as the user gave it: an NNX module (a copy), or a tree."""
        return self.merged(self.state)

    def merged(self, state: Any) -> Any:
        from flax import nnx

        # Variables belong to the trace that made them, so they are made anew.
        return nnx.merge(self.graph, jax.tree.map(lambda a: a, state)) if self.is_nnx else state

    def replaced(self, model: Any) -> Port:
        """The same function of another module or tree."""
        from flax import nnx

        other = copy.copy(self)
        other.graph, other.state = nnx.split(model) if self.is_nnx else (None, model)
        return other

    def eagerly(self) -> Port:
        """The same, run operation by operation."""
        other = copy.copy(self)
        other.eager = True
        return other

    def widened(self) -> Port:
        """The same in float64, where layers that name float32 as their dtype compute in float64, too."""
        from flax import nnx

        model = cast(self.model, jnp.float64)
        for _, layer in nnx.iter_graph(model) if self.is_nnx else ():
            dtype = getattr(layer, "dtype", None)
            if isinstance(layer, nnx.Module) and dtype is not None and np.dtype(dtype) == np.float32:
                layer.dtype = jnp.float64  # pyright: ignore[reportAttributeAccessIssue]
        return self.replaced(model)

    def parameters(self, state: Any) -> tuple[Any, Any]:
        """What is differentiated by, and the rest."""
        from flax import nnx

        if self.is_nnx:
            parameters, rest = nnx.split_state(state, nnx.Param, ...)
            return parameters, rest
        if isinstance(state, dict) and "params" in state:
            return {"params": state["params"]}, {name: tree for name, tree in state.items() if name != "params"}
        return state, {}

    def joined(self, parameters: Any, rest: Any) -> Any:
        from flax import nnx

        if self.is_nnx:
            return nnx.merge_state(parameters, rest)
        return {**parameters, **rest} if isinstance(parameters, dict) else parameters

    def call(self, state: Any, *inputs: Any, watch: _Watch | None = None, tree: bool = False) -> tuple[Any, Any]:
        """The arrays that it returns, or with `tree` what it returns, and the state that it leaves."""
        from flax import nnx

        model = self.merged(state)
        if watch is not None and self.is_nnx:
            watch.name(model)
        out: Any = self._fn(model, *inputs)
        after = nnx.state(model) if self.is_nnx else state
        if not self.is_nnx and _has_changes(out, state):
            out, after = out[0], {**state, **out[1]}
        return out if tree else jax.tree.leaves(out), after

    def shapes(self, inputs: Sequence[Any]) -> list[Any]:
        """The shapes of what it returns; raises what the port raises."""
        return jax.eval_shape(lambda s, x: self.call(s, *x)[0], self.state, list(inputs))

    def record(self, inputs: Sequence[Any]) -> Recording:
        """Runs it as one compiled program, which returns what every layer gave; where layers lie in programs of
        their own (``scan``, ``remat``, an inner ``jit``), operation by operation."""
        try:
            return self._recorded(inputs, self.eager)
        except jax.errors.UnexpectedTracerError:
            pass
        try:
            recording = self._recorded(inputs, eager=True)
        except Exception as error:
            try:  # It runs traced only. Inner programs that JAX keeps are traced by now, and not entered again.
                return self._recorded(inputs, eager=False)
            except jax.errors.UnexpectedTracerError:
                raise error from None
        self.eager = True
        return recording

    def _recorded(self, inputs: Sequence[Any], eager: bool) -> Recording:
        meta: list[Layer] = []

        def program(state: Any, inputs: Sequence[Any]) -> Any:
            meta.clear()
            (outputs, after), layers = self._watched(state, inputs)
            meta.extend(layers)
            return outputs, after, [(layer.inputs, layer.outputs) for layer in layers]

        with jax.disable_jit() if eager else contextlib.nullcontext():
            run = program if eager else jax.jit(program)
            outputs, after, arrays = run(self.state, list(inputs))
        arrays = [given if not _holds_tracers(given) else ([], []) for given in arrays]
        for layer, (taken, given) in zip(meta, arrays, strict=True):
            layer.inputs, layer.outputs = [*map(as_real, taken)], [*map(as_real, given)]
        outputs = [as_real(out) for out in outputs]
        meta = [layer for layer in meta if layer.outputs or not layer.name]
        whole = meta.pop().kind if meta and not meta[-1].name else "function"
        meta.append(Layer("", whole, "", [np.asarray(x) for x in inputs], outputs, is_leaf=not meta))
        return Recording(meta, outputs, after)

    def _watched(self, state: Any, inputs: Sequence[Any]) -> tuple[tuple[list[Any], Any], list[Layer]]:
        watch = _Watch()
        with _PATCHING, watch.linen(), watch.nnx():
            result = self.call(state, *inputs, watch=watch)
        if watch.layers:
            return result, watch.layers
        leaves, tree = jax.tree.flatten((state, list(inputs)))

        def flat(*leaves: Any) -> Any:
            state, inputs = tree.unflatten(leaves)
            return self.call(state, *inputs)

        result, scopes = scopes_of(flat, *leaves)
        times: Counter[str] = Counter()
        parents = {name.rpartition("/")[0] for name, _ in scopes}
        layers = []
        for name, outputs in scopes:
            times[name] += 1
            called = _counted(name, times[name])
            layers.append(Layer(called, "scope", family(name.rpartition("/")[2]), [], outputs, name not in parents))
        return result, layers


_PATCHING = threading.RLock()  # classes are patched for the whole process


def _holds_tracers(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def _has_changes(out: Any, state: Any) -> bool:
    """Whether a Linen module returned its changed collections, too, as ``apply(..., mutable=[...])`` does."""
    collections = isinstance(state, Mapping) and "params" in state and isinstance(out, tuple) and len(out) == 2
    return collections and isinstance(out[1], Mapping) and set(out[1]) <= {*state, "intermediates"}


class _Watch:
    """Records the layers that are called while it is entered."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self._open: list[tuple[Layer, int]] = []
        self._times: Counter[str] = Counter()
        self._names: dict[int, str] = {}
        self._thread = threading.get_ident()
        self._kept: list[Any] = []  # so that no id is given twice

    def name(self, module: Any, prefix: str = "") -> None:
        """Gives an NNX module and what is in it their paths for names."""
        from flax import nnx

        self._kept.append(module)
        for path, node in nnx.iter_graph(module):
            if isinstance(node, nnx.Module):
                self._names.setdefault(id(node), "/".join(filter(None, (prefix, *map(str, path)))))

    def _called(self, name: str, layer: Any, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        if self._open and self._open[-1][1] == id(layer):  # super().__call__
            return call()
        self._times[name] += 1
        record = Layer(*_described(name, self._times[name], layer), _numbers((args, kwargs)))
        for outer, _ in self._open:
            outer.is_leaf = False
        self._open.append((record, id(layer)))
        try:
            out = call()
        finally:
            self._open.pop()
        record.outputs = _numbers(out)
        self.layers.append(record)
        return out

    @contextlib.contextmanager
    def linen(self) -> Iterator[None]:
        from flax import linen as nn

        def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            if context.method_name != "__call__":
                return call(*args, **kwargs)
            name = "/".join(map(str, context.module.path))
            return self._called(name, context.module, lambda: call(*args, **kwargs), args, kwargs)

        with nn.intercept_methods(interceptor):
            yield

    @contextlib.contextmanager
    def nnx(self) -> Iterator[None]:
        from flax import nnx

        def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
            def __call__(layer: Any, *args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != self._thread:
                    return original(layer, *args, **kwargs)
                if id(layer) not in self._names:
                    self.name(layer, type(layer).__name__ if self._open else "")
                name = self._names[id(layer)]
                return self._called(name, layer, lambda: original(layer, *args, **kwargs), args, kwargs)

            return __call__

        changed: dict[type, Any] = {}
        for cls in _subclasses(nnx.Module):
            if "__call__" in vars(cls):
                changed[cls] = cls.__call__
        try:
            for cls, original in changed.items():
                cls.__call__ = wrapped(original)
            yield
        finally:
            for cls, original in changed.items():
                cls.__call__ = original


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_subclasses(child) for child in cls.__subclasses__()))


def _numbers(tree: Any) -> list[Any]:
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, jax.Array | np.ndarray)]


def cast(tree: Any, dtype: Any, of: Any = jnp.floating) -> Any:
    """The tree with its arrays of floating dtypes, or of the dtype `of` alone, in another dtype."""
    return jax.tree.map(
        lambda a: jnp.asarray(a, dtype) if hasattr(a, "dtype") and jnp.issubdtype(a.dtype, of) else a, tree
    )
