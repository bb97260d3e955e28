"""What the command line names: ``package.module:function`` or ``path/file.py:function``, with shapes for arguments."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jconv.errors import ConvError

__all__ = ["Call", "call", "gradient", "load"]


class Call(NamedTuple):
    """A function and its arguments, and the first of them that are parameters: those of a Linen module, or none."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]
    parameters: int = 0


def load(target: str) -> Any:
    """What stands at ``module:name``. The current directory is searched as ``python -m`` searches it.

    Args:
        target: ``package.module:function`` or ``path/file.py:function``. The name may be a path of attributes,
            ``module:model.encoder``; what ends in ``()`` is called without arguments first, ``module:make()``.

    Raises:
        ConvError: if there is no such module or attribute, or if importing or calling fails.

    >>> load("math:tau.is_integer()")
    False
    """
    module, _, path = target.rpartition(":")
    if not module or not path:
        raise ConvError(f"TARGET must be package.module:function or path/file.py:function, got {target!r}")
    found = _imported(module)
    done = module + ":"
    for part in path.split("."):
        name = part.removesuffix("()")
        if not name.isidentifier():
            raise ConvError(
                f"TARGET must name attributes with dots between them, each a name or a name with () to be called, got {path!r}"
            )
        try:
            found = getattr(found, name)
        except AttributeError:
            raise ConvError(f"{done.rstrip(':.')} has no {name!r}; {_like(found)}") from None
        if part != name:
            found = _called(found, done + part)
        done += part + "."
    return found


def call(found: Any, target: str, arguments: Sequence[jax.ShapeDtypeStruct]) -> Call:
    """The call of what :func:`load` found, with these arguments.

    Args:
        found: a function, an NNX module, a Linen module, or a pair of one with its variables.
        target: as it was typed, for errors.
        arguments: shapes and dtypes. A Linen module without variables gets those that ``init`` makes of them.

    Raises:
        ConvError: if it cannot be called, or takes another number of arguments.

    >>> call(lambda x: x, "m:f", [jax.ShapeDtypeStruct((2,), jnp.float32)]).args
    (ShapeDtypeStruct(shape=(2,), dtype=float32),)
    """
    if inspect.isclass(found):
        raise ConvError(f"{target} is a class; name an instance, or {target}() to make one without arguments")
    pair: tuple[Any, ...] = found if isinstance(found, tuple) and len(found) == 2 else (found,)
    module, variables = pair[0], pair[1:]
    if _is_linen(module):
        if not variables:
            try:
                variables = (jax.eval_shape(module.init, jax.random.key(0), *arguments),)
            except Exception as error:
                raise ConvError(f"{target} cannot be initialised with these shapes: {_first_line(error)}") from error
        return Call(module.apply, (variables[0], *arguments), 1)
    if not callable(found):
        raise ConvError(
            f"{target} is of type {type(found).__name__}, which cannot be called; name a function of arrays, an NNX module, a Linen module, or a pair of one with its variables"
        )
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return Call(found, tuple(arguments))
    try:
        signature.bind(*arguments)
    except TypeError as error:
        wanted = ", ".join(signature.parameters) or "no arguments"
        remedy = "give one for each" if signature.parameters else f"write {target}() for what it returns"
        raise ConvError(f"{target} takes {wanted}, but --shape gives {len(arguments)} ({error}); {remedy}") from None
    return Call(found, tuple(arguments))


def gradient(made: Call) -> Call:
    """The gradient of the sum of all outputs: of a model by its parameters, of a function by its arguments.

    Raises:
        ConvError: if there is nothing to differentiate by.

    >>> f = Call(lambda x: x ** 2, (jnp.arange(3.0),))
    >>> g = gradient(f)
    >>> print(g.fn(*g.args)[0])
    [0. 2. 4.]
    """
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(made.fn, nnx.Module):
        of_model = nnx.grad(lambda model, *args: _summed(model(*args)))
        return Call(_titled(of_model, type(made.fn).__name__), (made.fn, *made.args))
    if made.parameters:
        variables, *args = made.args
        rest = {name: value for name, value in variables.items() if name != "params"}

        def of_module(parameters: Any, rest: Any, *args: Any) -> Any:
            return _summed(made.fn({**rest, "params": parameters}, *args))

        name = type(made.fn.__self__).__name__  # pyright: ignore[reportFunctionMemberAccess]
        return Call(_titled(jax.grad(of_module), name), (variables.get("params", {}), rest, *args))
    if not made.args:
        raise ConvError("--grad needs an argument to differentiate by; give --shape")
    numbers = tuple(range(len(made.args)))
    return Call(
        _titled(jax.grad(lambda *args: _summed(made.fn(*args)), numbers), getattr(made.fn, "__name__", "function")),
        made.args,
    )


def _titled(fn: Callable[..., Any], name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return fn(*args)

    run.__name__ = f"gradient of {name}"
    return run


def _summed(outputs: Any) -> jax.Array:
    floats = [leaf for leaf in jax.tree.leaves(outputs) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)]
    return sum((jnp.sum(jnp.real(leaf)) for leaf in floats), jnp.float32(0))


def _imported(module: str) -> Any:
    try:
        if module.endswith(".py"):
            return _from_file(module)
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(module)
    except ConvError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ConvError(
                f"there is no module {error.name!r} here or among the installed ones; name a file as path/file.py:function"
            ) from None
        raise ConvError(f"importing {module} fails: {_first_line(error)}") from error
    except (Exception, SystemExit) as error:
        raise ConvError(f"importing {module} fails: {_first_line(error)}") from error


def _from_file(path: str) -> Any:
    if not os.path.isfile(path):
        raise ConvError(f"there is no file {path!r}; name a Python file, or a module as package.module:function")
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    name = f"target_{os.path.basename(path)[:-3]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _called(found: Any, done: str) -> Any:
    try:
        return found()
    except (Exception, SystemExit) as error:
        raise ConvError(f"calling {done} fails: {_first_line(error)}") from error


def _is_linen(module: Any) -> bool:
    linen = sys.modules.get("flax.linen")
    return linen is not None and isinstance(module, linen.Module)


def _like(found: Any) -> str:
    public = [name for name, value in getattr(found, "__dict__", {}).items() if name[0] != "_" and callable(value)]
    return f"it has {', '.join(public[:8])}{', ...' if len(public) > 8 else ''}" if public else "it has no callables"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
