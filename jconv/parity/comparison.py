"""A PyTorch network and its port, layer by layer: where they part, and by what mistake."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jconv import interop
from jconv.errors import ParityError, StateDictError
from jconv.parity import mistakes, pairing, recording
from jconv.parity.recording import Layer, Port, Recording, first_line
from jconv.parity.report import Diagnosis, Report, Row, noise_of

__all__ = ["assert_parity", "compare"]

SECONDS_OF_EXPERIMENTS = 60


def compare(
    torch_module: Any,
    port: Any,
    *inputs: Any,
    gradients: bool = True,
    train: bool = False,
    mapping: Mapping[str, str] | None = None,
    load: bool = False,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    kinds: Mapping[str, str] | None = None,
    channel_last: bool | None = None,
    port_kwargs: Mapping[str, Any] | None = None,
    float64: bool = True,
) -> Report:
    """Runs a PyTorch network and its JAX port on the same inputs, and compares what every layer gives.

    Both run in float32 and, as the judge, in float64, where a difference that is not rounding cannot hide. Each pair of
    layers is compared after the transposition that aligns them. Where the two part, PyTorch's computation is repeated
    with the usual mistakes made on purpose, for a minute at most; one that gives the port's own numbers is the diagnosis.

    Neither network is changed: PyTorch's is copied, and so is an NNX module.

    Args:
        torch_module: a ``torch.nn.Module``, of any dtype and mode, on the CPU; it is put into the mode that `train` says.
        port: an NNX module; a bound Linen module, or ``(module, variables)``; ``(function, model_or_parameters)``, called
            as ``function(model_or_parameters, *inputs)``; or a function of the inputs. It runs in the mode that it is
            in: an NNX module wants ``model.eval()`` first. A function's layers are its ``jax.named_scope``s.
        inputs: arrays or tensors as PyTorch's module takes them, floating ones in float32.
        gradients: whether to compare the gradients of the parameters and of the inputs, of the sum of the outputs
            weighted by random numbers.
        train: whether PyTorch's module is in train mode; then the statistics that a run leaves are compared too.
        mapping: from names of PyTorch's layers to the port's, where the pairs shown by the report are wrong or missing.
        load: whether to load PyTorch's weights into a copy of the port first, by :func:`jconv.interop.load_torch`.
        rename, kinds: as in :func:`jconv.interop.load_torch`; they also say which parameters are twins.
        channel_last: whether the port takes images (N, *window, C); by default, what its call accepts.
        port_kwargs: keyword arguments of the port's call, such as ``{"train": False}``.
        float64: whether the port runs in float64, too. Without it, what is judged is whether its float32 is within 16 times
            PyTorch's own rounding error.

    Returns:
        A :class:`Report`: ``.ok``, ``.rows``, ``.first_divergent``, ``.diagnoses``. It prints itself.

    Raises:
        ParityError: if one of them cannot be called with these inputs, or if an argument is none that can be served.
        StateDictError: if `load` cannot fit the weights.
        ImportError: if torch or Flax is not installed.

    >>> import torch
    >>> import jconv.nnx
    >>> from flax import nnx
    >>> theirs = torch.nn.Conv2d(3, 4, 3, padding=1)
    >>> ours = jconv.nnx.Conv2d(3, 4, 3, padding=1, rngs=nnx.Rngs(0))
    >>> compare(theirs, ours, torch.ones(1, 3, 8, 8), load=True).ok
    True
    """
    torch = torch_or_error()
    if not isinstance(torch_module, torch.nn.Module):
        raise ParityError(
            f"torch_module is of type {type(torch_module).__name__}, expected a torch.nn.Module; pass the network itself."
        )
    arrays = [as_input(index, x) for index, x in enumerate(inputs)]
    side = Port(port, train, port_kwargs)
    try:
        doubled, single = (copy.deepcopy(torch_module).train(train) for _ in range(2))
    except RuntimeError as error:  # a tensor that a computation left, as weight_norm does
        raise ParityError(
            f"torch_module cannot be copied ({first_line(error)}); pass one that has not run yet."
        ) from error
    doubled, single = doubled.double(), single.float()
    check_dropout(doubled, train)
    notes: list[str] = []

    before = {name: buffer.detach().clone() for name, buffer in doubled.named_buffers()}
    watch = mistakes.watcher()
    exact = recording.record_torch(doubled, arrays, torch.float64, watch)
    plain = recording.record_torch(single, arrays, torch.float32)
    if watch.drops:
        raise ParityError(
            "In train mode PyTorch's dropout draws random numbers, which no port draws alike; set p=0 on both sides, or "
            "compare with train=False."
        )
    if exact.outputs and not any(np.isfinite(out).any() for out in exact.outputs):
        raise ParityError("The PyTorch module gives no finite number with these inputs, so nothing can be compared.")
    if not exact.outputs:
        raise ParityError("The PyTorch module returns no tensors that are known here; return tensors, tuples or dicts.")
    ours_inputs, layout = laid_out(side, arrays, doubled, channel_last)
    if load:
        side = loaded(side, torch_module, exact, ours_inputs, mapping, rename, kinds)
    with jax.enable_x64(False):
        side = side.replaced(recording.cast(side.model, jnp.float32, jnp.float64))
        ours = side.record([jnp.asarray(x) for x in ours_inputs])
    pairs, rename = paired(side, torch_module, exact, ours, mapping, rename, kinds)
    if not side.eager and len(ours.layers) > 1 and _unrecorded(exact, pairs):
        # Programs that JAX had traced before hide their layers. A port that runs traced only stays as it was recorded.
        with jax.enable_x64(False), contextlib.suppress(Exception):
            eager = side.eagerly()
            again = eager.record([jnp.asarray(x) for x in ours_inputs])
            if len(again.layers) > len(ours.layers):
                side, ours = eager, again
                pairs, rename = paired(side, torch_module, exact, ours, mapping, rename, kinds)
    wide: Recording | None = None
    if float64:
        with jax.enable_x64(True):
            try:
                wide = side.widened().record([_wide(x) for x in ours_inputs])
            except Exception as error:  # whatever a port says to arrays of another dtype
                notes.append(f"The port does not run in float64 ({first_line(error)}); it is judged in float32.")

    twins_in = functools.partial(twins_of, module=torch_module, rename=rename, kinds=kinds)
    last = layout == "channel-last"
    noise = {layer.name: layer for layer in plain.layers}
    exactly = {layer.name: layer for layer in wide.layers} if wide else {}
    rows: list[Row] = []
    for pair in pairs:
        rows += _rows(pair, noise[pair.theirs.name], exactly.get(pair.ours.name), last)
    _check_noise(rows)
    run = _Run(doubled, single, before, side, arrays, ours_inputs, exact, ours, wide, pairs, last)
    if gradients:
        rows += run.gradients(notes, twins_in, all(row.is_double for row in rows))
    if train:
        rows += run.statistics(plain.state, notes, twins_in)
    values = {t.name: t.array for t in twins_in(side.model)}
    diagnoses = [] if all(row.ok for row in rows) else list(run.diagnoses(rows, values))
    held = {id(layer) for pair in pairs for layer in (pair.theirs, pair.ours)}
    return Report(
        rows=tuple(rows),
        diagnoses=tuple(diagnoses),
        unpaired=(_names(exact.layers, held), _names(ours.layers, held)),
        notes=tuple(notes),
        conditions=_conditions(torch, wide, layout, train),
    )


def assert_parity(torch_module: Any, port: Any, *inputs: Any, **options: Any) -> Report:
    """:func:`compare`, as an assertion for test suites.

    Args:
        torch_module, port, inputs, options: as in :func:`compare`.

    Returns:
        The report.

    Raises:
        AssertionError: if they differ by more than rounding; its message names the first layer that diverges, the
            diagnosis, and the rows around it.

    >>> import torch
    >>> _ = assert_parity(torch.nn.Tanh(), jnp.tanh, torch.ones(2, 3))
    """
    __tracebackhide__ = True  # pytest shows the caller's line
    report = compare(torch_module, port, *inputs, **options)
    if not report.ok:
        raise AssertionError(report.summary())
    return report


class _Run:
    """Both networks with what was recorded of them."""

    def __init__(
        self, doubled: Any, single: Any, before: dict[str, Any], side: Port, arrays: list[np.ndarray], ours_inputs: list[np.ndarray],
        exact: Recording, ours: Recording, wide: Recording | None, pairs: list[pairing.Pair], last: bool,
    ) -> None:  # fmt: skip
        self.doubled, self.single, self.before, self.side = doubled, single, before, side
        self.arrays, self.ours_inputs = arrays, ours_inputs
        self.exact, self.ours, self.wide, self.pairs, self.last = exact, ours, wide, pairs, last
        self._momenta: list[Diagnosis] = []
        self.until = float("inf")

    # Gradients.

    def gradients(
        self, notes: list[str], twins: Callable[[Any], list[interop.Twin]], double: bool
    ) -> Iterator[Row]:  # fmt: skip
        outputs = [out for out in self.exact.outputs if out.dtype.kind == "f"]
        ours = [out for out in self.ours.outputs if np.issubdtype(out.dtype, np.floating) or out.dtype.kind == "V"]
        views = [
            pairing.view_of(*_finite(a, b), channel_last=self.last, whole=True)
            for a, b in zip(outputs, ours, strict=False)
        ]
        if len(outputs) != len(ours) or not outputs or None in views:
            notes.append("The gradients were not compared, for the outputs have different shapes.")
            return
        rng = np.random.default_rng(0)
        weights = [rng.standard_normal(out.shape) for out in outputs]
        exact, plain = (self._torch_gradients(module, weights) for module in (self.doubled, self.single))
        with jax.enable_x64(False):
            single = self._ours(self.side, views, weights, np.float32)
        wide: tuple[Any, list[Any]] | None = None
        if self.wide is not None:
            with jax.enable_x64(True):
                wide = self._ours(self.side.widened(), views, weights, np.float64)
        found = {twin.name: twin for twin in twins(single[0])}
        widely = {twin.name: twin.array for twin in twins(wide[0])} if wide else {}
        alone = [name for name in exact if not name.startswith("input ") and name not in found]
        for name, theirs in exact.items():
            if name.startswith("input "):
                index = int(name.split()[1])
                path, mine = name, single[1][index]
                mine64 = wide[1][index] if wide else None
            elif name in found:
                path, mine = "/".join(found[name].path), found[name].array
                mine64 = widely.get(name)
            else:
                continue
            mine = np.asarray(mine)
            mine64 = None if mine64 is None else np.asarray(mine64)
            if name.startswith("input "):
                view, why = pairing.view_of(theirs, mine, self.last, whole=True), "order"
            else:
                view, why = pairing.unchanged(theirs.shape, mine.shape), "parameters"
                if view is None:
                    alone.append(name)
                    continue
            yield Row.of(
                "gradient", name, path, "", theirs, plain[name], mine, mine64, view, why, gradient=True, double=double
            )
        if alone:
            shown = ", ".join(alone[:6]) + (", ..." if len(alone) > 6 else "")
            notes.append(
                f"Gradients that were not compared, for the port has no parameter of their name and shape ({len(alone)}): {shown}"
            )

    def _torch_gradients(self, module: Any, weights: list[np.ndarray]) -> dict[str, np.ndarray]:
        import torch

        dtype = torch.float64 if module is self.doubled else torch.float32
        inputs = [recording.as_tensor(x, dtype) for x in self.arrays]
        named = {f"input {i}": x.requires_grad_() for i, x in enumerate(inputs) if x.is_floating_point()}
        named |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        with torch.enable_grad(), recording.new_tensors(dtype):
            every = [torch.view_as_real(x) if x.is_complex() else x for x in recording.tensors_of(module(*inputs))]
            outputs = [out for out in every if out.is_floating_point()]
            pairs = zip(outputs, weights, strict=True)
            total = torch.stack([(out * torch.from_numpy(weight).to(dtype)).sum() for out, weight in pairs]).sum()
            found = torch.autograd.grad(total, list(named.values()), allow_unused=True, materialize_grads=True)
        return {name: grad.numpy() for name, grad in zip(named, found, strict=True)}

    def _ours(self, side: Port, views: list[Any], weights: list[np.ndarray], dtype: Any) -> tuple[Any, list[Any]]:
        """The gradients in the place of the parameters, and those of the inputs."""
        parameters, rest = side.parameters(side.state)
        inputs = [jnp.asarray(x, dtype if x.dtype.kind == "f" else None) for x in self.ours_inputs]
        floats = [i for i, x in enumerate(inputs) if jnp.issubdtype(x.dtype, jnp.floating)]
        leaves, tree = jax.tree.flatten(parameters)
        live = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)]

        def total(values: Any, given: Any, rest: Any) -> Any:
            every = list(leaves)
            for index, value in zip(live, values, strict=True):
                every[index] = value
            taken = list(inputs)
            for index, value in zip(floats, given, strict=True):
                taken[index] = value
            outputs, _ = side.call(side.joined(jax.tree.unflatten(tree, every), rest), *taken)
            outputs = [jnp.stack([x.real, x.imag], -1) if jnp.iscomplexobj(x) else x for x in outputs]
            outputs = [out for out in outputs if jnp.issubdtype(out.dtype, jnp.floating)]
            return sum(
                (view.bring(out) * jnp.asarray(g, out.dtype)).sum()
                for view, out, g in zip(views, outputs, weights, strict=True)
            )

        by_leaf, by_input = jax.jit(jax.grad(total, (0, 1)))(
            [leaves[i] for i in live], [inputs[i] for i in floats], rest
        )
        every = list(leaves)
        for index, value in zip(live, by_leaf, strict=True):
            every[index] = value
        given = dict(zip(floats, map(np.asarray, by_input), strict=True))
        return side.merged(side.joined(jax.tree.unflatten(tree, every), rest)), [
            given.get(i) for i in range(len(inputs))
        ]

    # What a run in train mode leaves.

    def statistics(self, plain: dict[str, np.ndarray], notes: list[str], twins: Any) -> Iterator[Row]:
        before = {name: buffer.numpy() for name, buffer in self.before.items()}
        ours = {twin.name: twin for twin in twins(self.side.merged(self.ours.state))}
        wide: dict[str, Any] = {}
        if self.wide is not None:
            wide = {twin.name: twin.array for twin in twins(self.side.merged(self.wide.state))}
        modules = dict(self.doubled.named_modules())
        norms = [layer for layer in self.exact.layers if layer.family == "batchnorm"]
        again = {layer.name.partition("#")[0] for layer in norms if "#" in layer.name}
        inputs = {layer.name: layer.inputs[0] for layer in norms if layer.name not in again}
        left = []
        biased = []
        for name, theirs in self.exact.state.items():
            layer, _, leaf = name.rpartition(".")
            momentum = getattr(modules[layer], "momentum", None)
            if theirs.dtype.kind != "f":
                continue
            if name not in ours or layer not in inputs or momentum is None:
                left.append(name)
                continue
            x = inputs[layer]
            rest = tuple(axis for axis in range(x.ndim) if axis != 1)
            batch, single = (x.mean(rest) if leaf == "running_mean" else x.var(rest)), plain[name]
            best: Any = wide.get(name, ours[name].array)
            kept = (1 - momentum) * before[name] + momentum * batch
            if leaf == "running_var" and _differ(best, theirs) and not _differ(best, kept):
                biased.append(name)
                theirs = kept
                single = kept.astype(np.float32)
            row = Row.of(
                "statistic", name, "/".join(ours[name].path), "", theirs, single, ours[name].array, wide.get(name),
                pairing.unchanged(theirs.shape, ours[name].array.shape), "parameters",
            )  # fmt: skip
            if not row.ok and leaf == "running_mean":
                whole, mine = batch - before[name], best - before[name]
                share = float((whole * mine).sum() / max((whole * whole).sum(), 1e-300))
                if share and not _differ(before[name] + share * whole, best):
                    text = (
                        f"the running mean goes {share:.4g} of the way to the batch's, and PyTorch's {momentum:.4g}; "
                        f"Flax's momentum is what is kept: momentum={1 - momentum:.4g}"
                    )
                    self._momenta.append(Diagnosis(layer, row.port, "BatchNorm momentum", text))
            yield row
        if left:
            notes.append(
                f"Buffers that were not compared ({len(left)}): {', '.join(left[:6])}{', ...' if left[6:] else ''}"
            )
        if biased:
            notes.append(
                f"{biased[0]}{f' and {len(biased) - 1} more' if len(biased) > 1 else ''}: Flax's BatchNorm divides the "
                "variance of a batch of n values by n, PyTorch's by n - 1. No port with Flax's layer is without this "
                "difference; the rest of the variance was compared."
            )

    # Diagnoses.

    def diagnoses(self, rows: Sequence[Row], values: Mapping[str, np.ndarray]) -> Iterator[Diagnosis]:
        """Of the first layer that diverges, then of every further leaf that is wrong by itself."""
        by_name: dict[str, list[Row]] = {}
        for row in rows:
            if row.part == "layer":
                by_name.setdefault(row.name.partition("[")[0], []).append(row)
        self.until = time.monotonic() + SECONDS_OF_EXPERIMENTS
        ended = 0
        first = True
        for pair in self.pairs:
            failed = any(not row.ok for row in by_name.get(pair.theirs.name, ()))
            if not failed:
                ended = max(ended, pair.theirs.calls[1])
                continue
            if first or (pair.theirs.is_leaf and pair.theirs.module is not self.doubled):
                found = next(self._found(pair, ended, first), None)
                if found is None and first:
                    found = self._weights(pair, values)
                if found is not None:
                    yield found
            first = False
        yield from self._about_gradients(rows)
        yield from self._momenta

    def _layer(self, name: str, watch: Any, before: bool = False) -> Layer | None:
        import torch

        layers = recording.record_torch(self.doubled, self.arrays, torch.float64, watch, name, before).layers
        return layers[0] if layers else None

    def _restore(self) -> None:
        """The statistics, which runs in train mode have changed."""
        for name, buffer in self.doubled.named_buffers():
            buffer.copy_(self.before[name])

    def _recorded(self, pair: pairing.Pair) -> tuple[Layer, float]:
        """The port's layer in the precision in which it diverges, and the factor of what counts as rounding there."""
        wide = None if self.wide is None else next((w for w in self.wide.layers if w.name == pair.ours.name), None)
        if wide is not None and len(wide.outputs) == len(pair.theirs.outputs):
            apart = [
                view is None or np.abs(view.bring(ours) - theirs).max(initial=0) > 4 * noise_of(theirs, theirs)
                for theirs, ours in zip(pair.theirs.outputs, wide.outputs, strict=True)
                for view in [pairing.view_of(*_finite(theirs, ours), channel_last=self.last)]
            ]
            if any(apart):
                return wide, 1.0
        elif wide is not None:
            return wide, 1.0
        return pair.ours, 16.0

    def _found(self, pair: pairing.Pair, ended: int, first: bool) -> Iterator[Diagnosis]:
        ours, factor = self._recorded(pair)
        if not pair.theirs.outputs or not ours.outputs:
            return
        layer = pair.theirs
        narrow = pair.ours.outputs[0].dtype
        dtype_text = f"the layer computes in {narrow}; give it dtype=jnp.float32, in which it is compared"
        is_narrow = narrow.itemsize == 2 and not np.issubdtype(narrow, np.integer)
        inputs = _aligned_inputs(layer, ours, self.last)
        if layer.is_leaf and inputs is not None:
            target = _targets(layer.outputs[0], ours.outputs[0], self.last)

            def alone(watch: Any) -> Any:
                return _first_output(layer.module, inputs, watch)

            base = alone(None)
            if base is None or not any(_same(base, y, factor) for y in target):
                if is_narrow:
                    yield Diagnosis(layer.name, ours.name, "precision", dtype_text)
                    return
                yield from self._tried(layer, ours, alone, target, range(10**9), base, factor, direct=True)
                return
            if not first:
                return
            target = _targets(layer.inputs[0], ours.inputs[0], self.last)
            begun, end = ended, layer.calls[0]

            def before(watch: Any) -> Any:
                seen = self._layer(layer.name, watch, before=True)
                return seen.inputs[0] if seen else None

            run, base = before, layer.inputs[0]
        else:
            if is_narrow and first:
                yield Diagnosis(layer.name, ours.name, "precision", dtype_text)
                return
            target = _targets(layer.outputs[0], ours.outputs[0], self.last)
            begun, end = (ended if first else layer.calls[0]), layer.calls[1]

            def after(watch: Any) -> Any:
                seen = self._layer(layer.name, watch)
                return seen.outputs[0] if seen else None

            run, base = after, layer.outputs[0]
        yield from self._tried(layer, ours, run, target, range(begun, end), base, factor, direct=False)

    def _tried(
        self, layer: Layer, ours: Layer, run: Callable[[Any], Any], targets: list[np.ndarray], calls: range,
        base: Any, factor: float, direct: bool,
    ) -> Iterator[Diagnosis]:  # fmt: skip
        """Experiments: the computation with one of its calls changed, against what the port gave."""
        self._restore()
        watch = mistakes.watcher(keep=calls)
        run(watch)
        single = direct and len(watch.kept) == 1
        for index, call in watch.kept.items():
            if time.monotonic() > self.until:
                return
            for target in targets:
                posed = mistakes.Call(call.name, call.function, call.given, _tensor(target) if single else None)
                for change in mistakes.changes(posed):
                    with contextlib.suppress(RuntimeError, ValueError):  # it may not fit the geometry
                        out = run(mistakes.watcher(at=index, change=_quietly(change.result)))
                        if out is not None and _same(out, target, factor, base):
                            place = layer.name if direct else f"before {layer.name}" if layer.name else "before the end"
                            yield Diagnosis(layer.name, ours.name, change.mistake, change.text, "" if direct else place)
        for target in targets:
            for mistake, text, array in mistakes.patterns(np.asarray(base), target):
                if _same(array, target, factor, base):
                    yield Diagnosis(layer.name, ours.name, mistake, text)

    def _weights(self, pair: pairing.Pair, values: Mapping[str, np.ndarray]) -> Diagnosis | None:
        """Where no experiment explains a layer, and its parameters are not PyTorch's."""
        self._restore()
        prefix = pair.theirs.name.partition("#")[0]
        for name, value in self.doubled.state_dict().items():
            mine = values.get(name)
            if (name.rpartition(".")[0] == prefix or not prefix) and mine is not None and value.is_floating_point():
                theirs = value.numpy()
                if mine.shape != theirs.shape or np.abs(mine - theirs).max(initial=0) > 4 * noise_of(theirs, theirs):
                    return Diagnosis(
                        pair.theirs.name, pair.ours.name, "weights not loaded",
                        f"the port's {name} is not PyTorch's; load it: jconv.interop.load_torch(port, torch_module), or "
                        "compare(..., load=True)",
                    )  # fmt: skip
        return None

    def _about_gradients(self, rows: Sequence[Row]) -> Iterator[Diagnosis]:
        if not all(row.ok for row in rows if row.part == "layer"):
            return
        for row in rows:
            if row.part == "gradient" and row.numbers and not row.ok and row.numbers.ours_largest == 0:
                yield Diagnosis(
                    row.name, row.port, "gradient stopped",
                    "the port's gradient is zero: look for jax.lax.stop_gradient, or an integer or rounding operation on "
                    "the way",
                )  # fmt: skip


def torch_or_error() -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError("jconv.parity needs PyTorch, which is not installed; pip install torch") from error
    return torch


def as_input(index: int, x: Any) -> np.ndarray:
    try:
        array = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    except Exception as error:
        raise ParityError(f"Input {index} cannot become an array: {first_line(error)}") from error
    if array.dtype.kind not in "fiub" and not jnp.issubdtype(array.dtype, jnp.floating):
        raise ParityError(f"Input {index} is of type {type(x).__name__}, expected an array or a tensor of numbers.")
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _wide(x: np.ndarray) -> Any:
    return jnp.asarray(x, jnp.float64 if x.dtype.kind == "f" else None)


def paired(
    side: Port, module: Any, exact: Recording, ours: Recording, mapping: Any, rename: Any, kinds: Any
) -> tuple[list[pairing.Pair], Any]:
    """The pairs of layers, and a `rename` by which the parameters of those that names did not pair are twins, too."""
    paths = {
        twin.name.rpartition(".")[0]: "/".join(twin.path[:-1]).removeprefix("params/")
        for twin in twins_of(side.model, module, rename, kinds)
    }
    pairs = pairing.pair(exact.layers, ours.layers, mapping, paths)
    holders = {name.rpartition(".")[0] for name in module.state_dict()} - {""}
    lost = {
        p.theirs.name: p.ours.name.replace("/", ".")
        for p in pairs
        if p.theirs.name in holders and p.theirs.name not in paths
    }
    return pairs, lost if rename is None and lost else rename


def loaded(
    side: Port, module: Any, exact: Recording, inputs: list[np.ndarray], mapping: Any, rename: Any, kinds: Any
) -> Port:
    """The port with PyTorch's weights, by names, or where names do not fit, by the order of the layers."""
    if side.state is None:
        raise ParityError("load=True needs a port with parameters; pass a module, or (function, parameters).")
    # An NNX module's epsilons are its own, and to be compared: from a PyTorch module load_torch would mend them.
    source = module.state_dict() if side.is_nnx else module
    try:
        return side.replaced(interop.load_torch(side.model, source, rename=rename, kinds=kinds))
    except StateDictError:
        _, found = paired(side, module, exact, side.record([jnp.asarray(x) for x in inputs]), mapping, rename, kinds)
        if found is rename:
            raise
        return side.replaced(interop.load_torch(side.model, source, rename=found, kinds=kinds))


def check_dropout(module: Any, train: bool) -> None:
    for name, layer in module.named_modules():
        if train and recording.family(type(layer).__name__) == "dropout" and getattr(layer, "p", 0):
            raise ParityError(
                f"In train mode PyTorch's {name!r} draws random numbers, which no port draws alike; set p=0 on both sides, "
                "or compare with train=False."
            )


def laid_out(
    side: Port, arrays: list[np.ndarray], module: Any, channel_last: bool | None
) -> tuple[list[np.ndarray], str]:
    """The inputs as the port takes them, and what that is called."""
    spatial = ("conv", "convtranspose", "batchnorm", "maxpool", "avgpool", "groupnorm", "instancenorm", "upsample")
    images = any(recording.family(type(layer).__name__) in spatial for layer in module.modules())
    orders = [True, False] if images else [False, True]
    failures = []
    for last in orders if channel_last is None else [channel_last]:
        taken = [np.moveaxis(x, 1, -1) if last and _is_image(x) else x for x in arrays]
        try:
            side.shapes([jax.ShapeDtypeStruct(x.shape, x.dtype) for x in taken])
        except Exception as error:  # a port's own, or Flax's
            shapes = ", ".join(str(x.shape) for x in taken)
            failures.append(f"{'channel-last' if last else 'as PyTorch takes them'} {shapes}: {first_line(error)}")
            continue
        return taken, "channel-last" if last and any(map(_is_image, arrays)) else "as PyTorch's"
    raise ParityError("The port cannot be called with these inputs, " + "; ".join(failures))


def _is_image(x: np.ndarray) -> bool:
    return x.ndim in (4, 5) or (x.ndim == 3 and x.dtype.kind == "f")


def _unrecorded(exact: Recording, pairs: Sequence[pairing.Pair]) -> bool:
    """Whether a leaf with parameters has no pair."""
    held = {id(pair.theirs) for pair in pairs}
    leaves = (layer for layer in exact.layers if layer.is_leaf and id(layer) not in held)
    return any(next(layer.module.parameters(), None) is not None for layer in leaves)


def twins_of(model: Any, module: Any, rename: Any, kinds: Any) -> list[interop.Twin]:
    from flax import nnx

    return interop.twins(model, module, rename=rename, kinds=kinds) if isinstance(model, Mapping | nnx.Module) else []


def _rows(pair: pairing.Pair, plain: Layer, wide: Layer | None, last: bool) -> Iterator[Row]:
    theirs, ours = pair.theirs, pair.ours
    many = len(theirs.outputs) > 1
    if len(theirs.outputs) != len(ours.outputs):
        what = f"{len(theirs.outputs)} arrays", f"{len(ours.outputs)} arrays"
        yield Row("layer", theirs.name, ours.name, theirs.kind, (), (), " / ".join(what), pair.why, None)
        return
    for index, (exact, mine) in enumerate(zip(theirs.outputs, ours.outputs, strict=False)):
        name = f"{theirs.name}[{index}]" if many else theirs.name
        mine64 = wide.outputs[index] if wide and index < len(wide.outputs) else None
        mine = np.asarray(mine, np.float32) if mine.dtype.kind == "V" else mine
        best = mine if mine64 is None or mine64.shape != mine.shape else mine64
        view = pairing.view_of(*_finite(exact, best), channel_last=last, whole=pair.why == "the whole")
        yield Row.of("layer", name, ours.name, theirs.kind, exact, plain.outputs[index], mine, mine64, view, pair.why)


def _check_noise(rows: Sequence[Row]) -> None:
    """A layer that PyTorch itself does not repeat judges nothing."""
    for row in rows:
        n = row.numbers
        if n is not None and n.unit > 0.1 * n.largest > 0:
            raise ParityError(
                f"PyTorch's {row.label!r} gives in float32 what it does not give in float64 (apart by {n.unit:.2g} of "
                f"{n.largest:.2g}): it draws random numbers, or float32 is not enough for it. Make it deterministic."
            )


def _finite(*arrays: Any) -> list[np.ndarray]:
    return [np.nan_to_num(np.asarray(a, np.float64)) for a in arrays]


def _names(layers: list[Layer], paired: set[int]) -> tuple[str, ...]:
    return tuple(f"{layer.name or '(output)'} ({layer.kind})" for layer in layers if id(layer) not in paired)


def _conditions(torch: Any, wide: Recording | None, layout: str, train: bool) -> dict[str, str]:
    precision = jax.config.jax_default_matmul_precision or "default"  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "torch": torch.__version__, "jax": jax.__version__, "device": next(iter(jnp.zeros(()).devices())).device_kind,
        "matmul precision": str(precision), "judge": "float64 on both sides" if wide else "PyTorch's float64",
        "inputs": layout, "mode": "train" if train else "eval",
    }  # fmt: skip


# Experiments.


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape != b.shape or float(np.abs(a - b).max(initial=0)) > 4 * noise_of(b, b)


def _same(found: Any, target: np.ndarray, factor: float, base: Any = None) -> bool:
    """Whether an experiment gives the port's numbers: within rounding, and ten times nearer than without it."""
    found = np.asarray(found)
    if found.shape != target.shape or not np.isfinite(found).all():
        return False
    apart = float(np.nan_to_num(np.abs(found - target), nan=np.inf).max(initial=0))
    before = np.inf if base is None or base.shape != target.shape else float(np.abs(base - target).max(initial=0))
    return apart <= 4 * factor * noise_of(target, target) and (base is None or apart <= 0.1 * before)


def _targets(theirs: np.ndarray, ours: np.ndarray, last: bool) -> list[np.ndarray]:
    """What the port gave, as it may lie in PyTorch's layout."""
    (wanted, given) = _finite(theirs, ours)
    view = pairing.view_of(wanted, given, last)
    if view is not None:
        return [view.bring(given)]
    return [np.moveaxis(given, -1, 1), given] if given.ndim > 2 else [given]


def _aligned_inputs(layer: Layer, ours: Layer, last: bool) -> list[np.ndarray] | None:
    """The port's own inputs of a layer in PyTorch's layout, if they fit."""
    if not layer.inputs or len(layer.inputs) != len(ours.inputs):
        return None
    pairs = [(theirs, np.asarray(mine, theirs.dtype)) for theirs, mine in zip(layer.inputs, ours.inputs, strict=True)]
    found = [(pairing.view_of(*_finite(*p), channel_last=last), p[1]) for p in pairs]
    return None if any(view is None for view, _ in found) else [view.bring(mine) for view, mine in found if view]


def _first_output(module: Any, inputs: list[np.ndarray], watch: Any) -> np.ndarray | None:
    import torch

    with torch.no_grad(), recording.new_tensors(torch.float64), watch or contextlib.nullcontext():
        try:
            out = module(*(recording.as_tensor(np.ascontiguousarray(x), torch.float64) for x in inputs))
        except (RuntimeError, TypeError, ValueError, IndexError):  # it takes keywords, or other sizes
            return None
    return out.numpy() if torch.is_tensor(out) else None


def _tensor(array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array, np.float64))


def _quietly(result: Callable[[], Any]) -> Callable[[], Any]:
    import torch

    def run() -> Any:
        with torch.no_grad():
            return result()

    return run
