"""What a port usually gets wrong, as experiments: PyTorch's own computation with one call changed.

A mistake is not guessed from a pattern. Each row of the table changes one call of a PyTorch function, as the mistake
would have, and the computation runs anew in float64; if that gives what the port gave, within rounding, the mistake is
found. What :func:`patterns` reads off the two arrays is applied to PyTorch's, and held against the port's, too. So nothing
is diagnosed that does not explain the port's numbers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Call", "Change", "changes", "patterns", "watcher"]


class Change(NamedTuple):
    """What the port may have done instead of a call.

    Attributes:
        mistake: its name in a few words.
        text: a sentence: what the port does, what PyTorch does, the remedy.
        result: computes what the call would then have given.
    """

    mistake: str
    text: str
    result: Callable[[], Any]


@dataclass(frozen=True)
class Call:
    """A call of a PyTorch function.

    Attributes:
        name: of the function.
        function: itself.
        given: its arguments by name.
        expected: what the port gave in its place, where that is known: its layer consists of this call.
    """

    name: str
    function: Callable[..., Any]
    given: dict[str, Any]
    expected: Any = None

    def __getattr__(self, name: str) -> Any:
        try:
            return self.given[name]
        except KeyError:
            raise AttributeError(name) from None

    def again(self, **changed: Any) -> Any:
        first, *others = ({**self.given, **changed}).items()
        rest = self.given.get("rest", ())
        return self.function(first[1], *rest, **{name: value for name, value in others if name != "rest"})


_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_POOL = ("input", "kernel_size", "stride", "padding")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "conv": {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1},
    "conv_transpose": {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1},
    "avg_pool": {"stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True},
    "max_pool": {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False},
    "linear": {"bias": None}, "gelu": {"approximate": "none"}, "leaky_relu": {"negative_slope": 0.01},
    "batch_norm": {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5},
    "layer_norm": {"weight": None, "bias": None, "eps": 1e-5},
    "group_norm": {"weight": None, "bias": None, "eps": 1e-5},
    "dropout": {"p": 0.5}, "cat": {"dim": 0}, "softmax": {"dim": None}, "log_softmax": {"dim": None},
    "interpolate": {"size": None, "scale_factor": None, "mode": "nearest", "align_corners": None, "antialias": False},
    "pad": {"mode": "constant", "value": None},
}  # fmt: skip
_SIGNATURES: dict[str, tuple[str, ...]] = {
    **{f"conv{n}d": _CONV for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
    **{f"avg_pool{n}d": (*_POOL, "ceil_mode", "count_include_pad", "divisor_override") for n in (1, 2, 3)},
    **{f"max_pool{n}d": (*_POOL, "dilation", "ceil_mode", "return_indices") for n in (1, 2, 3)},
    "linear": ("input", "weight", "bias"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    "layer_norm": ("input", "normalized_shape", "weight", "bias", "eps"),
    "group_norm": ("input", "num_groups", "weight", "bias", "eps"),
    "interpolate": ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
    "pad": ("input", "pad", "mode", "value"),
    "softmax": ("input", "dim"),
    "log_softmax": ("input", "dim"),
    "dropout": ("input", "p", "training", "inplace"),
    "cat": ("tensors", "dim"),
    "add": ("input", "other"),
    "pixel_shuffle": ("input", "upscale_factor"),
    "leaky_relu": ("input", "negative_slope", "inplace"),
    "gelu": ("input", "approximate"),
}
_ALIASES = {"add_": "add", "__iadd__": "add", "relu_": "relu", "concat": "cat", "dropout2d": "dropout"}
_RESHAPES = ("flatten", "reshape", "view")


def _base(name: str) -> str:
    """``conv2d`` is ``conv``."""
    return name[:-2] if name[-2:] in ("1d", "2d", "3d") else name


def _activations() -> dict[str, Callable[[Any], Any]]:
    """Under the words of the sentences."""
    from torch.nn import functional as F

    return {
        "no activation": lambda x: x, "relu": F.relu, "relu6": F.relu6, "gelu": F.gelu,
        "gelu (tanh approximation)": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu, "tanh": F.tanh,
        "sigmoid": F.sigmoid, "elu": F.elu, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
        "softplus": F.softplus, "mish": F.mish, "leaky_relu (slope 0.01)": F.leaky_relu,
        "leaky_relu (slope 0.2)": lambda x: F.leaky_relu(x, 0.2),
        "leaky_relu (slope 0.1)": lambda x: F.leaky_relu(x, 0.1),
    }  # fmt: skip


_ACTIVATIONS = (
    "relu", "relu6", "gelu", "silu", "tanh", "sigmoid", "elu", "hardswish", "hardsigmoid", "softplus", "mish",
    "leaky_relu", "hardtanh",
)  # fmt: skip


def watcher(at: int = -1, change: Callable[[], Any] | None = None, keep: range = range(0)) -> Any:
    """A ``TorchFunctionMode`` that counts the calls that the table knows.

    Args:
        at: the number of the call that gives ``change()`` instead.
        keep: the numbers of the calls that are kept, as ``kept``.
    """
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    class Watcher(TorchFunctionMode):
        count = 0

        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[int, Call] = {}
            self.drops = False  # whether dropout drew random numbers

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            name = getattr(func, "__name__", "")
            name = _ALIASES.get(name, name)
            self.drops |= (
                name == "dropout" and bool(kwargs.get("training", args[2:3] == (True,))) and _rate(args, kwargs) > 0
            )
            if name not in _TABLE or not args or not _is_float(args[0], Tensor):
                return func(*args, **kwargs)
            index, self.count = self.count, self.count + 1
            if index in keep:
                copies = [_copied(a, Tensor) for a in args], {k: _copied(v, Tensor) for k, v in kwargs.items()}
                self.kept[index] = _bound(name, func, *copies)
            return change() if change is not None and index == at else func(*args, **kwargs)

    return Watcher()


def _rate(args: Any, kwargs: Any) -> float:
    return float(kwargs.get("p", args[1] if len(args) > 1 else 0.5))


def _is_float(value: Any, tensor: type) -> bool:
    """Not a counter, or a shape."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, tensor) and first.is_floating_point()  # pyright: ignore[reportAttributeAccessIssue]


def _copied(value: Any, tensor: type) -> Any:
    """Layers that work in place must not change what is kept."""
    if isinstance(value, list | tuple) and any(isinstance(v, tensor) for v in value):
        return [_copied(v, tensor) for v in value]
    return value.clone() if isinstance(value, tensor) else value  # pyright: ignore[reportAttributeAccessIssue]


def _bound(name: str, func: Any, args: Any, kwargs: Any) -> Call:
    if name in _RESHAPES:
        return Call(name, func, {"input": args[0], "rest": tuple(args[1:]) + tuple(kwargs.values())})
    names = _SIGNATURES.get(name, ("input",))
    given = {**dict(zip(names, args, strict=False)), **{k: v for k, v in kwargs.items() if k in names or k == "other"}}
    return Call(name, func, given | {k: v for k, v in _DEFAULTS.get(_base(name), {}).items() if k not in given})


def changes(call: Call) -> Iterator[Change]:
    """What a port may have done instead of this call."""
    for mistakes in _TABLE[call.name]:
        yield from mistakes(call)


# Convolutions.


def _windows(call: Call) -> range:
    return range(2, call.weight.ndim)


def _ints(value: Any, n: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * n


def _kernel(call: Call) -> Iterator[Change]:
    """Kernels that were turned, transposed or sorted wrongly."""
    w, spatial = call.weight, _windows(call)
    transposed = "transpose" in call.name
    said = "PyTorch's transposed convolution turns it, Flax's ConvTranspose does not" if transposed else (
        "PyTorch's convolution is a correlation and does not turn it"
    )  # fmt: skip
    yield Change(
        "kernel flipped",
        f"the kernel is turned round along its window: {said}; flip it once when it is loaded (jconv.interop does)",
        lambda: call.again(weight=w.flip(list(spatial))),
    )
    for axis in spatial if len(spatial) > 1 else ():
        yield Change(
            "kernel flipped",
            f"the kernel is turned round along axis {axis} alone; turn it along all axes of its window, or none",
            lambda axis=axis: call.again(weight=w.flip([axis])),
        )
    for order in itertools.permutations(spatial):
        if order != tuple(spatial) and [w.shape[a] for a in order] == [w.shape[a] for a in spatial]:
            yield Change(
                "kernel transposed",
                f"the axes of the window stand in the order {tuple(a - 2 for a in order)}; PyTorch's kernel (out, in, "
                "*window) becomes Flax's by transpose(*window, in, out), which keeps the window's order",
                lambda order=order: call.again(weight=w.permute(0, 1, *order)),
            )
    if w.shape[0] == w.shape[1]:
        for flipped in (False, True):
            yield Change(
                "kernel channels swapped",
                "input and output channels of the kernel are swapped"
                + (", and the window is turned round" if flipped else "")
                + "; PyTorch has (out, in, *window) for a convolution and (in, out, *window) for a transposed one",
                lambda flipped=flipped: call.again(
                    weight=(w.flip(list(spatial)) if flipped else w).transpose(0, 1)
                ),
            )  # fmt: skip
    yield Change(
        "channels reversed",
        "the input's channels are read in reverse order (BGR for RGB); reverse one side's",
        lambda: call.again(input=call.input.flip(1)),
    )


def _dealt(x: Any, first: int) -> Any:
    """The channels of axis 1, dealt to `first` groups in turn."""
    return x.reshape(x.shape[0], first, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


def _groups(call: Call) -> Iterator[Change]:
    g, w = call.groups, call.weight
    if g == 1:
        return
    transposed = "transpose" in call.name
    outputs = w.shape[1] * g if transposed else w.shape[0]
    text = (
        "the {} channels are dealt to the {} groups in turn; in PyTorch a group's channels stand together: reshape "
        "channels as (groups, channels of a group), in this order"
    )

    for first in dict.fromkeys((g, outputs // g)):
        yield Change(
            "groups reshaped", text.format("output", g), lambda first=first: _dealt(call.again(), first)
        )  # fmt: skip
    for first in dict.fromkeys((g, call.input.shape[1] // g)):
        yield Change(
            "groups reshaped",
            text.format("input", g),
            lambda first=first: call.again(input=_dealt(call.input, first)),
        )

    def rows(first: int) -> Any:
        shuffled = w.reshape(first, -1, *w.shape[1:]).transpose(0, 1).reshape(w.shape)
        return call.again(weight=shuffled)

    for first in dict.fromkeys((g, w.shape[0] // g)):
        yield Change("groups reshaped", text.format("kernel's", g), lambda first=first: rows(first))
    if transposed:
        i, o, window = w.shape[0] // g, w.shape[1], w.shape[2:]

        def columns(first: int | None) -> Any:
            """Of Flax's kernel (in / groups, out), dealt in turn, or reshaped from PyTorch's as if it had no groups."""
            kernel = w.reshape(i, g * o, *window)
            if first is not None:
                kernel = w.reshape(g, i, o, *window).transpose(0, 1).reshape(i, first, -1, *window).transpose(1, 2)
            return call.again(weight=kernel.reshape(i, g, o, *window).transpose(0, 1).reshape(w.shape))

        for first in dict.fromkeys((None, g, o)):
            yield Change(
                "groups reshaped",
                f"PyTorch's kernel (in, out / groups, *window) became (*window, in / groups, out) with its {g} groups in "
                "the wrong places; reshape in as (groups, in / groups) first, and put the groups before the outputs "
                "(jconv.interop does)",
                lambda first=first: columns(first),
            )


def _bias(call: Call) -> Iterator[Change]:
    if call.bias is not None:
        yield Change(
            "bias missing", "the bias is left out; add it, or load it", lambda: call.again(bias=None)
        )  # fmt: skip


def _weight(call: Call) -> Iterator[Change]:
    if call.weight is not None:
        yield Change(
            "scale missing", "the factor of each channel (weight) is left out; load it", lambda: call.again(weight=None)
        )


def _padded(x: Any, pads: list[tuple[int, int]], **options: Any) -> Any:
    from torch.nn import functional as F

    return F.pad(x, [side for pair in reversed(pads) for side in pair], **options)


def _same_padding(call: Call, window: tuple[int, ...], strides: tuple[int, ...], odd_low: bool = False) -> Any:
    pads = []
    for size, k, s in zip(call.input.shape[2:], window, strides, strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        sides = (total // 2, total - total // 2)
        pads.append(sides[::-1] if odd_low else sides)
    return pads


def _conv_padding(call: Call) -> Iterator[Change]:
    n = len(_windows(call))
    strides, dilation = _ints(call.stride, n), _ints(call.dilation, n)
    window = tuple((k - 1) * d + 1 for k, d in zip(call.weight.shape[2:], dilation, strict=True))
    x = call.input
    yield Change(
        "SAME padding",
        f"padding 'SAME' puts {_same_padding(call, window, strides)} around the image, and PyTorch has padding={call.padding!r} on "
        "both sides; with a stride they differ: write the padding as pairs",
        lambda: call.again(input=_padded(x, _same_padding(call, window, strides)), padding=0),
    )
    yield Change(
        "SAME padding",
        f"padding 'SAME_LOWER' puts {_same_padding(call, window, strides, True)} around the image, and PyTorch has "
        f"padding={call.padding!r} on both sides; write the padding as pairs",
        lambda: call.again(input=_padded(x, _same_padding(call, window, strides, True)), padding=0),
    )
    if call.padding != "valid" and (isinstance(call.padding, str) or any(_ints(call.padding, n))):
        yield Change(
            "padding missing",
            f"the image is not padded, and PyTorch has padding={call.padding!r}",
            lambda: call.again(padding=0),
        )
    if not isinstance(call.padding, str):
        pads = [(p, p) for p in _ints(call.padding, n)]
        for mode in ("reflect", "replicate", "circular"):
            yield Change(
                "padding mode",
                f"the image is padded by mode {mode!r}, and PyTorch pads zeros",
                lambda mode=mode: call.again(input=_padded(x, pads, mode=mode), padding=0),
            )
    for name in ("stride", "dilation"):
        if any(value != 1 for value in _ints(call.given[name], n)):
            yield Change(
                f"{name} missing",
                f"the {name} is 1, and PyTorch has {name}={call.given[name]!r}",
                lambda name=name: call.again(**{name: 1}),
            )
    if not isinstance(call.padding, str):
        yield from _other_dilation(call, dilation, _ints(call.padding, n))


def _other_dilation(call: Call, dilation: tuple[int, ...], padding: tuple[int, ...]) -> Iterator[Change]:
    """With the padding that gives the same size; what was padded before the call is cropped."""
    window = call.weight.shape[2:]
    others = [(1,) * len(window)] if any(d != 1 for d in dilation) else [(d,) * len(window) for d in (2, 3)]
    for other in others:
        added = [(k - 1) * (o - d) for k, o, d in zip(window, other, dilation, strict=True)]
        if not any(added) or any(a % 2 for a in added):
            continue
        pads = [(p + a // 2, p + a // 2) for p, a in zip(padding, added, strict=True)]
        yield Change(
            "dilation",
            f"the dilation is {other}, with the padding that keeps the size, and PyTorch has dilation={dilation}",
            lambda other=other, pads=pads: call.again(input=_padded(call.input, pads), padding=0, dilation=other),
        )


def _transposed_padding(call: Call) -> Iterator[Change]:
    """The whole result, cut or filled to the port's size at another place, with the kernel turned or not."""
    if call.expected is None or call.expected.ndim != call.input.ndim:
        return
    w, sizes = call.weight, call.expected.shape[2:]

    def cut(low: int, flipped: bool) -> Any:
        weight = w.flip(list(_windows(call))) if flipped else w
        whole = call.again(weight=weight, bias=None, padding=0, output_padding=0)
        pads = [(-low, size - (full - low)) for size, full in zip(sizes, whole.shape[2:], strict=True)]
        out = _padded(whole, pads)
        return out if call.bias is None else out + call.bias.reshape(-1, *(1,) * len(sizes))

    extent = (max(w.shape[2:]) - 1) * max(_ints(call.dilation, len(sizes))) + 1
    for flipped, low in itertools.product((False, True), range(extent)):
        turned = ", and its kernel is not turned round as PyTorch's is" if flipped else ""
        yield Change(
            "transposed convolution padding",
            f"the transposed convolution cuts {low} from the low side of its whole result, and PyTorch's "
            f"padding={call.padding!r}, output_padding={call.output_padding!r} cuts another part{turned}; "
            "jconv's ConvTranspose layers take PyTorch's arguments",
            lambda low=low, flipped=flipped: cut(low, flipped),
        )


def _rounded(x: Any, bits: int) -> Any:
    """Rounded to ``bits`` of mantissa."""
    import torch

    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * 2.0 ** (bits + 1)) / 2.0 ** (bits + 1), exponent)


def _precision(call: Call) -> Iterator[Change]:
    for name, bits in (("bfloat16", 7), ("TF32", 10), ("float16", 10)):
        yield Change(
            "precision",
            f"the operands are rounded to {name}; ask for precision='highest', or jax.default_matmul_precision",
            lambda bits=bits: call.again(input=_rounded(call.input, bits), weight=_rounded(call.weight, bits)),
        )


# Linear layers and what stands before them.


def _linear(call: Call) -> Iterator[Change]:
    w = call.weight
    if w.shape[0] == w.shape[1]:
        yield Change(
            "kernel transposed",
            "the matrix is not transposed; PyTorch's weight is (out, in), Flax's kernel (in, out)",
            lambda: call.again(weight=w.T),
        )


def _flattened(call: Call) -> Iterator[Change]:
    x = call.input
    if x.ndim < 4:
        return
    names = "HWC" if x.ndim == 4 else "*window, channels"
    yield Change(
        "flatten order",
        f"the image is flattened channel-last ({names}), and PyTorch flattens it channel-first; transpose before the "
        "reshape: x.transpose(0, 3, 1, 2).reshape(len(x), -1)",
        lambda: call.again(input=x.movedim(1, -1)),
    )
    if x.ndim == 4:
        yield Change(
            "flatten order",
            "the image's axes stand in the order (W, H, C) where it is flattened, and PyTorch's are (C, H, W)",
            lambda: call.again(input=x.permute(0, 3, 2, 1)),
        )


# Norms, dropout.


def _epsilon(call: Call) -> Iterator[Change]:
    if call.expected is None:
        return
    found = _epsilon_of(call)
    if found is None:
        return
    text = f"epsilon is {found:.3g}, and PyTorch's is {call.eps:.3g}; give the layer epsilon={call.eps:.3g} (PyTorch's \
default is 1e-5, that of Flax's LayerNorm and GroupNorm 1e-6, TensorFlow's BatchNorm has 1e-3)"
    yield Change("norm epsilon", text, lambda: call.again(eps=found))


def _epsilon_of(call: Call) -> float | None:
    """Of the values that somebody would have typed, the one that comes nearest to the port's result."""
    import torch

    candidates = [d * 10.0**-e for e in range(1, 13) for d in (1, 2, 5)]
    if call.expected.shape != call.input.shape:
        return None
    distances = [float(torch.abs(call.again(eps=eps) - call.expected).max()) for eps in candidates]
    best = int(np.argmin(distances))
    return None if candidates[best] == call.eps else candidates[best]


def _batch_statistics(call: Call) -> Iterator[Change]:
    if not call.training:
        yield Change(
            "BatchNorm in train mode",
            "BatchNorm uses the statistics of the batch, and PyTorch its running ones; call model.eval(), in Linen pass "
            "use_running_average=True, or hold both in train mode with train=True",
            lambda: call.again(running_mean=None, running_var=None, training=True),
        )
    elif call.running_mean is not None:
        yield Change(
            "BatchNorm in eval mode",
            "BatchNorm uses its running statistics, and PyTorch those of the batch; call model.train(), or in Linen pass "
            "use_running_average=False",
            lambda: call.again(training=False),
        )
    if call.running_var is not None and not call.training:
        yield Change(
            "BatchNorm statistics",
            "BatchNorm's running statistics are those that it began with, mean 0 and variance 1; load them",
            lambda: call.again(running_mean=call.running_mean * 0, running_var=call.running_var * 0 + 1),
        )
        yield Change(
            "BatchNorm statistics",
            "BatchNorm holds the standard deviation where its variance belongs",
            lambda: call.again(running_var=call.running_var**0.5),
        )


def _number_of_groups(call: Call) -> Iterator[Change]:
    channels = call.input.shape[1]
    for number in (n for n in range(1, channels + 1) if channels % n == 0 and n != call.num_groups):
        yield Change(
            "number of groups",
            f"GroupNorm has {number} groups, and PyTorch's {call.num_groups}",
            lambda number=number: call.again(num_groups=number),
        )

    def dealt() -> Any:
        x, g = call.input, call.num_groups

        back = call.function(_dealt(x, channels // g), g, None, None, call.eps)
        y = _dealt(back, g)
        shape = (1, -1, *(1,) * (x.ndim - 2))
        return y * call.weight.reshape(shape) + call.bias.reshape(shape) if call.weight is not None else y

    yield Change("groups reshaped", "GroupNorm deals the channels to its groups in turn; in PyTorch a group's channels \
stand together: reshape channels as (groups, channels of a group)", dealt)  # fmt: skip


def _dropped(call: Call) -> Iterator[Change]:
    if call.expected is None or call.expected.shape != call.input.shape:
        return
    import torch

    def masked() -> Any:
        """What is left over, if it is as much of it, and scaled as much, as dropout leaves and scales."""
        kept = call.expected != 0
        share = float(kept.double().mean())
        ratio = (call.expected / call.input)[kept & (call.input != 0)]
        factor = float(ratio.median()) if len(ratio) else 1.0
        expected = 1 / factor if factor else 0.0
        spread = (expected * abs(1 - expected) / kept.numel()) ** 0.5
        is_dropout = factor > 1 and abs(share - expected) <= 5 * spread
        return torch.where(kept, call.input * factor, 0) if is_dropout else call.input

    yield Change(
        "dropout in train mode",
        "dropout drops, and PyTorch's does not in eval mode; call model.eval(), or in Linen pass deterministic=True",
        masked,
    )


# Pooling, resizing, padding, joining.


def _pooled(call: Call) -> Iterator[Change]:
    from torch.nn import functional as F

    n = int(call.name[-2])
    x = call.input
    window = _ints(call.kernel_size, n)
    strides = window if call.stride in (None, []) else _ints(call.stride, n)
    pads = _ints(call.padding, n)
    average = call.name.startswith("avg")
    own = "avg_pool" if average else "max_pool"
    other = getattr(F, f"{'max' if average else 'avg'}_pool{n}d")
    yield Change(
        "ceil_mode",
        f"{own} rounds its size the other way: PyTorch has ceil_mode={call.ceil_mode}; the last window, which leaves the "
        "image, counts only with ceil_mode=True, so pad the high side",
        lambda: call.again(ceil_mode=not call.ceil_mode),
    )
    if average:
        yield Change(
            "count_include_pad",
            f"the average counts the padding the other way: PyTorch has count_include_pad={call.count_include_pad}; pass "
            "count_include_pad to Flax's avg_pool",
            lambda: call.again(count_include_pad=not call.count_include_pad),
        )
        if not call.ceil_mode:

            def clipped() -> Any:
                ones = call.function(x * 0 + 1, call.kernel_size, strides, pads, True, False)
                return call.function(x, call.kernel_size, strides, pads, True, True) / ones if ones is not None else x

            yield Change("ceil_mode", "the average has ceil_mode=True, and divides by another count", clipped)
    fill = 0.0 if average else -math.inf
    for low in (False, True):
        around = _same_padding(call, window, strides, low)
        yield Change(
            "SAME padding",
            f"padding 'SAME' puts {around} around the image, and PyTorch has padding={call.padding!r} on both sides; "
            "write the padding as pairs",
            lambda around=around: call.function(_padded(x, around, value=fill), window, strides),
        )
        if average:

            def counted(around: Any = around) -> Any:
                ones = call.function(_padded(x * 0 + 1, around), window, strides)
                return call.function(_padded(x, around), window, strides) / ones

            yield Change("SAME padding", f"padding 'SAME' puts {around} around the image, which the average does not count",
                         counted)  # fmt: skip
    if any(pads):
        around = [(p, p) for p in pads]
        yield Change(
            "padding missing",
            f"the image is not padded, and PyTorch has padding={call.padding!r}",
            lambda: call.again(padding=0),
        )
        if not average:
            yield Change(
                "padding value",
                "the image is padded with zeros, and PyTorch's max_pool pads with minus infinity",
                lambda: call.function(_padded(x, around), window, strides, 0, 1, call.ceil_mode),
            )
    if strides != window:
        yield Change(
            "stride missing",
            f"the stride of the pool is its window, and PyTorch has stride={call.stride!r}",
            lambda: call.again(stride=window),
        )
    yield Change(
        "kind of pooling",
        f"the port takes the {'maximum' if average else 'mean'} of a window, and PyTorch its "
        f"{'mean' if average else 'maximum'}",
        lambda: other(x, window, strides, pads, ceil_mode=call.ceil_mode),
    )


def _resized(call: Call) -> Iterator[Change]:
    linear = {3: "linear", 4: "bilinear", 5: "trilinear"}.get(call.input.ndim, "bilinear")
    modes = ["nearest", "nearest-exact", linear, *(["bicubic"] if call.input.ndim == 4 else [])]
    for mode in sorted(modes, key=lambda mode: mode != call.mode):
        smooth = mode in (linear, "bicubic")
        for corners in (False, True) if smooth else (None,):
            for antialias in (False, True) if smooth and call.input.ndim == 4 and not corners else (False,):
                if (mode, corners or False, antialias) == (call.mode, call.align_corners or False, call.antialias):
                    continue
                same = mode == call.mode and antialias == bool(call.antialias)
                mistake = "align_corners" if same else "antialias" if mode == call.mode else "interpolation mode"
                text = (
                    f"the port resizes with mode={mode!r}, align_corners={bool(corners)}, antialias={antialias}, and PyTorch "
                    f"with mode={call.mode!r}, align_corners={bool(call.align_corners)}, "
                    f"antialias={bool(call.antialias)}; jax.image.resize has align_corners=False and antialias=True"
                )
                yield Change(
                    mistake,
                    text,
                    lambda mode=mode, corners=corners, antialias=antialias: call.again(
                        mode=mode, align_corners=corners, antialias=antialias
                    ),
                )


def _pads(call: Call) -> Iterator[Change]:
    for mode in ("constant", "reflect", "replicate", "circular"):
        if mode != call.mode:
            yield Change(
                "padding mode",
                f"the image is padded by mode {mode!r}, and PyTorch's mode is {call.mode!r}",
                lambda mode=mode: call.again(mode=mode),
            )
    pairs = list(zip(call.pad[::2], call.pad[1::2], strict=True))
    for sides in ([p for pair in reversed(pairs) for p in pair], [p for low, high in pairs for p in (high, low)]):
        if list(sides) != list(call.pad):
            yield Change(
                "padding sides",
                f"the pads stand on other sides; PyTorch's pad={tuple(call.pad)!r} begins at the last axis, low side first",
                lambda sides=sides: call.again(pad=list(sides)),
            )
    yield Change(
        "padding missing", f"the image is not padded, and PyTorch pads {tuple(call.pad)!r}", lambda: call.input
    )


def _joined(call: Call) -> Iterator[Change]:
    yield Change(
        "order of concatenation",
        "the parts are concatenated in another order",
        lambda: call.again(tensors=list(reversed(call.tensors))),
    )


def _added(call: Call) -> Iterator[Change]:
    import torch

    for kept, left in (("input", "other"), ("other", "input")):
        if isinstance(call.given[kept], torch.Tensor):
            yield Change(
                "addition missing",
                "a term of a sum (a residual connection, say) is left out",
                lambda kept=kept, left=left: call.given[kept] + 0 * call.given[left],
            )


def _normalised(call: Call) -> Iterator[Change]:
    for dim in range(call.input.ndim):
        if dim != (call.dim or 0) % call.input.ndim:
            yield Change(
                "softmax axis",
                f"softmax runs along PyTorch's axis {dim}, and PyTorch's along {call.dim}; channel-last moves the axis",
                lambda dim=dim: call.again(dim=dim),
            )


def _activation(call: Call) -> Iterator[Change]:
    name = _base(call.name)
    for words, function in _activations().items():
        missing = words == "no activation"
        both_gelu = words.startswith("gelu") and name == "gelu"
        if words == name and not both_gelu:
            continue
        hint = "; pass approximate=False to jax.nn.gelu, whose default is the approximation" if both_gelu else ""
        yield Change(
            "activation missing" if missing else "gelu approximation" if both_gelu else "activation",
            f"the port has {words}, and PyTorch {name}{hint}",
            lambda function=function: function(call.input),
        )


def _shuffled(call: Call) -> Iterator[Change]:
    def turned() -> Any:
        x, r = call.input, call.upscale_factor
        n, c, h, w = x.shape
        y = x.reshape(n, r, r, c // (r * r), h, w)
        return y.permute(0, 3, 4, 1, 5, 2).reshape(n, c // (r * r), h * r, w * r)

    yield Change(
        "pixel shuffle order",
        "the channels are split as (block, features), and PyTorch splits them as (features, block)",
        turned,
    )


_TABLE: dict[str, tuple[Callable[[Call], Iterator[Change]], ...]] = {
    **{f"conv{n}d": (_bias, _kernel, _conv_padding, _groups, _precision) for n in (1, 2, 3)},
    **{
        f"conv_transpose{n}d": (_bias, _kernel, _groups, _transposed_padding, _precision) for n in (1, 2, 3)
    },
    "linear": (_bias, _linear, _precision),
    "batch_norm": (_batch_statistics, _epsilon, _bias, _weight),
    "layer_norm": (_epsilon, _bias, _weight),
    "group_norm": (_epsilon, _bias, _weight, _number_of_groups),
    "dropout": (_dropped,),
    **{f"{kind}_pool{n}d": (_pooled,) for kind in ("avg", "max") for n in (1, 2, 3)},
    "interpolate": (_resized,),
    "pad": (_pads,),
    "cat": (_joined,),
    "add": (_added,),
    "softmax": (_normalised,),
    "log_softmax": (_normalised,),
    "pixel_shuffle": (_shuffled,),
    **dict.fromkeys(_RESHAPES, (_flattened,)),
    **dict.fromkeys(_ACTIVATIONS, (_activation,)),
}  # fmt: skip


def patterns(base: Any, port: Any) -> Iterator[tuple[str, str, Any]]:
    """What may be read off the two arrays alone: (mistake, sentence, the array that it would give)."""
    base, port = np.asarray(base, np.float64), np.asarray(port, np.float64)
    if base.shape != port.shape or base.size == 0 or not np.isfinite(base).all() or not np.isfinite(port).all():
        return
    if base.ndim >= 4:
        if base.shape[-1] == base.shape[-2]:
            yield "axes swapped", "height and width are swapped", base.swapaxes(-1, -2)
        for axis in range(2, base.ndim):
            yield "mirrored", f"the image is mirrored along axis {axis - 2} of its window", np.flip(base, axis)
    if base.ndim >= 2 and base.shape[1] > 1:
        order = _order(base, port)
        if order is not None:
            shown = order if len(order) <= 8 else f"{order[:8]}..."
            yield (
                "channel order",
                f"the channels stand in another order: the port's are PyTorch's {shown}",
                base[:, order],
            )
        rest = tuple(axis for axis in range(base.ndim) if axis != 1)
        offset = (port - base).mean(rest, keepdims=True)
        if base.size // base.shape[1] > 1:
            yield "bias added", "every channel has an offset that PyTorch does not have: a bias too many", base + offset
            norm = (base * base).sum(rest, keepdims=True)
            factors = np.divide((base * port).sum(rest, keepdims=True), norm, where=norm > 0, out=np.ones_like(norm))
            yield "channel scale", "every channel is scaled by a factor of its own", base * factors
    factor = float((base * port).sum() / max((base * base).sum(), 1e-300))
    if base.size > 1:
        yield "scale", f"everything is {factor:.6g} times PyTorch's", base * factor


def _order(base: np.ndarray, port: np.ndarray) -> list[int] | None:
    """The order of channels under which the two have the same sums, if there is one."""
    sums = [np.moveaxis(a, 1, 0).reshape(a.shape[1], -1) for a in (base, port)]
    weights = np.random.default_rng(0).standard_normal(sums[0].shape[1])
    left, right = (a @ weights for a in sums)
    order = np.argsort(left)[np.argsort(np.argsort(right))]
    return None if (order == np.arange(len(order))).all() else [int(i) for i in order]
