"""The same training in PyTorch and in JAX: the same weights, batches and optimizer, and the two loss curves."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jconv import interop
from jconv.errors import ParityError
from jconv.parity import comparison, page, pairing, recording
from jconv.parity.recording import Port, first_line
from jconv.parity.report import (
    MOST_IN_FLOAT32,
    MOST_IN_FLOAT64,
    MOST_WITHOUT_FLOAT64,
    Report,
    Row,
    cells,
    row_lines,
    ulp,
)
from jconv.printing import aligned, save

__all__ = ["TrainingReport", "compare_training", "optax_of"]

_Batches = Sequence[tuple[Any, Any]]
_Loss = str | tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]


@dataclass(frozen=True)
class TrainingReport:
    """What :func:`compare_training` found. ``print(report)`` shows it.

    Attributes:
        exact, plain: PyTorch's losses in float64 and in float32, one for each step, before its update.
        ours, wide: the port's in float32 and in float64; `wide` is None if that did not run.
        parts_at: the first step whose loss differs by more than rounding explains; None if there is none.
        rows: the parameters and the running means after the last step. (Of running variances Flax has another kind.)
        diagnoses: (mistake, sentence) for what explains the curves.
        comparison: where the curves part, the comparison of the first batch in train mode; None if they do not.
        notes: what was not compared and why.
        conditions: versions, optimizer, precision.
    """

    exact: np.ndarray
    plain: np.ndarray
    ours: np.ndarray
    wide: np.ndarray | None
    parts_at: int | None
    rows: tuple[Row, ...]
    diagnoses: tuple[tuple[str, str], ...]
    comparison: Report | None
    notes: tuple[str, ...]
    conditions: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether the curves and the parameters at their end are equal within rounding."""
        return self.parts_at is None and all(row.ok for row in self.rows)

    @property
    def verdict(self) -> str:
        """One sentence."""
        steps = len(self.exact)
        if self.ok:
            return f"Equal within rounding over {steps} steps: the loss goes from {self.exact[0]:.6g} to {self.exact[-1]:.6g}."
        if self.parts_at is None:
            name = next(row.name for row in self.rows if not row.ok)
            return f"The losses of {steps} steps are equal within rounding, and {name} after them is not."
        return (
            f"The losses part at step {self.parts_at} of {steps}: PyTorch has {self.exact[self.parts_at]:.8g}, the port "
            f"{self.ours[self.parts_at]:.8g}."
        )

    def cells(self) -> list[tuple[str, ...]]:
        """The table of losses as texts, its head first."""
        found = [("step", "", "PyTorch float64", "PyTorch float32", "port float32", "port float64")]
        for step, (exact, plain, ours) in enumerate(zip(self.exact, self.plain, self.ours, strict=True)):
            wide = "" if self.wide is None else f"{self.wide[step]:.12g}"
            mark = "parts" if step == self.parts_at else ""
            found.append((str(step), mark, f"{exact:.12g}", f"{plain:.8g}", f"{ours:.8g}", wide))
        return found

    def __str__(self) -> str:
        said = [f"Diagnosis, {mistake}: {text}." for mistake, text in self.diagnoses]
        ends = [*said, *self.notes, "; ".join(f"{name} {value}" for name, value in self.conditions.items())]
        failed = [row for row in self.rows if not row.ok]
        return "\n".join([self.verdict, *aligned(self.cells(), left=range(2)), *row_lines(failed), *ends])

    def to_json(self) -> str:
        """The report as a JSON object: verdict, losses, diagnoses, conditions."""
        return json.dumps(
            {
                "ok": self.ok,
                "parts_at": self.parts_at,
                "verdict": self.verdict,
                "losses": {
                    "torch_float64": _numbers(self.exact),
                    "torch_float32": _numbers(self.plain),
                    "port_float32": _numbers(self.ours),
                    "port_float64": None if self.wide is None else _numbers(self.wide),
                },
                "parameters": {row.name: row.ok for row in self.rows},
                "diagnoses": [{"mistake": mistake, "text": text} for mistake, text in self.diagnoses],
                "notes": self.notes,
                "conditions": self.conditions,
            },
            indent=1,
        )

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes one HTML page, which needs nothing else. Needs matplotlib."""
        page.write(page.training_page(self, cells), path)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws the loss curves, as .png, .svg or .pdf. Needs matplotlib."""
        save(page.loss_figure(self), path, ParityError)


def compare_training(
    torch_module: Any,
    port: Any,
    batches: _Batches,
    *,
    optimizer: Any,
    loss: _Loss = "cross_entropy",
    steps: int | None = None,
    port_optimizer: Any = None,
    load: bool = True,
    rename: Mapping[str, str] | Callable[[str], str] | None = None,
    kinds: Mapping[str, str] | None = None,
    channel_last: bool | None = None,
    port_kwargs: Mapping[str, Any] | None = None,
    float64: bool = True,
) -> TrainingReport:
    """Trains a PyTorch network and its JAX port side by side, from the same weights on the same batches.

    Both are copied, so that neither is changed. PyTorch's runs in train mode, the port in the mode that it is in.

    Args:
        torch_module: a ``torch.nn.Module``.
        port: as in :func:`jconv.parity.compare`, with parameters.
        batches: pairs of an input and a target as PyTorch takes them; they are gone through again where `steps` are more.
        optimizer: a ``torch.optim.SGD``, ``Adam`` or ``AdamW`` over the module's parameters, before its first step. Its
            settings, by parameter group, make the port's optimizer (see :func:`optax_of`).
        loss: ``"cross_entropy"`` (of class numbers), ``"mse"``, or a pair of functions of (outputs, target): PyTorch's, and
            JAX's, which is given what the port returns.
        steps: how many; by default one for each batch.
        port_optimizer: optax's, where the port has one of its own to be checked.
        load: whether to load PyTorch's weights into a copy of the port first.
        rename, kinds: as in :func:`jconv.interop.load_torch`.
        channel_last, port_kwargs: as in :func:`jconv.parity.compare`.
        float64: whether to train both in float64 too, as the judge.

    Returns:
        A :class:`TrainingReport`: ``.ok``, ``.parts_at``, ``.diagnoses``, the losses. It prints itself.

    Raises:
        ParityError: if an argument is none that can be served.

    >>> import torch
    >>> import jconv.nnx
    >>> from flax import nnx
    >>> theirs = torch.nn.Conv1d(2, 3, 3)
    >>> ours = jconv.nnx.Conv1d(2, 3, 3, rngs=nnx.Rngs(0))
    >>> sgd = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    >>> batches = [(torch.ones(4, 2, 8), torch.zeros(4, 3, 6))]
    >>> compare_training(theirs, ours, batches, optimizer=sgd, loss="mse", steps=3).ok
    True
    """
    torch = comparison.torch_or_error()
    batches = [_pair(batch) for batch in batches]
    if not batches:
        raise ParityError("batches is empty, expected pairs of an input and a target.")
    if port_optimizer is not None and not (hasattr(port_optimizer, "init") and hasattr(port_optimizer, "update")):
        raise ParityError(
            f"port_optimizer is of type {type(port_optimizer).__name__}, expected an optax.GradientTransformation."
        )
    steps = len(batches) if steps is None else steps
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ParityError(f"steps must be a whole number of at least 1, got {steps!r}.")
    theirs = _Theirs(torch_module, optimizer, batches, _torch_loss(loss), steps)
    comparison.check_dropout(theirs.module.train(), True)
    exact, exact_state = theirs.losses(torch.float64)
    plain, plain_state = theirs.losses(torch.float32)

    side = Port(port, train=True, kwargs=port_kwargs)
    if side.state is None:
        raise ParityError("The port has no parameters to train; pass a module, or (function, parameters).")
    taken, layout = comparison.laid_out(side, [batches[0][0]], theirs.module, channel_last)
    first = recording.record_torch(copy.deepcopy(torch_module).double().train(), [batches[0][0]], torch.float64)
    if load:
        side = comparison.loaded(side, torch_module, first, taken, None, rename, kinds)
    rename = comparison.paired(
        side, torch_module, first, side.record([jnp.asarray(x) for x in taken]), None, rename, kinds
    )[1]
    twins = {t.name: t for t in comparison.twins_of(side.model, torch_module, rename, kinds)}
    used = port_optimizer if port_optimizer is not None else theirs.optax(side, twins)
    notes = []
    if any(name.endswith("running_var") for name, _ in torch_module.named_buffers()):
        notes.append("Running variances were not compared: Flax divides a batch's by n, PyTorch by n - 1.")
    last = layout == "channel-last"
    mine = _Ours(side, [(np.moveaxis(x, 1, -1) if last else x, y) for x, y in batches], loss, steps, last)
    ours, ours_state = mine.losses(used, jnp.float32)
    wide, wide_state = None, None
    if float64:
        with jax.enable_x64(True):
            wide, wide_state = mine.losses(used, jnp.float64)

    parts_at = _parting(exact, plain, ours, wide)
    rows = []
    final = {t.name: t for t in comparison.twins_of(ours_state, torch_module, rename, kinds)}
    widely = {t.name: t.array for t in comparison.twins_of(wide_state, torch_module, rename, kinds)} if float64 else {}
    means = [name for name, _ in torch_module.named_buffers() if name.endswith("running_mean")]
    for name in [*dict(torch_module.named_parameters()), *means]:
        if name in final:
            array = final[name].array
            view = pairing.unchanged(exact_state[name].shape, array.shape)
            rows.append(
                Row.of("parameter", name, "/".join(final[name].path), "", exact_state[name], plain_state[name], array,
                       widely.get(name), view, "parameters", gradient=True)
            )  # fmt: skip
    found = None
    diagnoses: list[tuple[str, str]] = []
    if parts_at is not None or not all(row.ok for row in rows):
        found = comparison.compare(
            torch_module, port, batches[0][0], train=True, load=load, rename=rename, kinds=kinds,
            channel_last=channel_last, port_kwargs=port_kwargs, float64=float64,
        )  # fmt: skip
        diagnoses = [(d.mistake, f"{d.place or d.layer or '(output)'}: {d.text}") for d in found.diagnoses]
        if found.ok:
            judged = ours if wide is None else wide
            until = steps if parts_at is None else min(steps, max(parts_at + 1, 3))
            diagnoses = list(_of_optimizer(theirs, judged[:until], 1.0 if wide is not None else 16.0))
            if not diagnoses and port_optimizer is not None:
                diagnoses = [("optimizer", f"the port's optimizer is not PyTorch's, which is {_described(optimizer)}; leave "
                              "port_optimizer out, or make it by jconv.parity.optax_of")]  # fmt: skip
    conditions = {
        "optimizer": _described(optimizer), "torch": torch.__version__, "jax": jax.__version__,
        "judge": "float64 on both sides" if float64 else "PyTorch's float64", "inputs": layout,
    }  # fmt: skip
    return TrainingReport(
        exact, plain, ours, wide, parts_at, tuple(rows), tuple(diagnoses), found, tuple(notes), conditions
    )


def optax_of(optimizer: Any) -> Any:
    """The optax transformation that updates as a PyTorch optimizer of one parameter group does.

    Args:
        optimizer: a ``torch.optim.SGD``, ``Adam`` or ``AdamW``.

    Returns:
        An ``optax.GradientTransformation``.

    Raises:
        ParityError: if it is another optimizer, has several groups, or has a setting that optax has not.

    >>> import torch
    >>> adam = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=1e-3)
    >>> optax_of(adam).init(jnp.ones(3))[0].mu
    Array([0., 0., 0.], dtype=float32)
    """
    groups = optimizer.param_groups
    if len(groups) != 1:
        raise ParityError(
            f"The optimizer has {len(groups)} parameter groups, and optax_of serves one; make one for each."
        )
    return _optax(type(optimizer).__name__, groups[0])


def _optax(kind: str, group: Mapping[str, Any]) -> Any:
    try:
        import optax
    except ImportError as error:
        raise ImportError("jconv.parity needs optax for training, which is not installed; pip install optax") from error
    refused = {"maximize": False, "amsgrad": False, "dampening": 0}
    for name, fine in refused.items():
        if group.get(name, fine) != fine:
            raise ParityError(
                f"The optimizer has {name}={group[name]!r}, which optax has not; compare with {name}={fine!r}."
            )
    decay = [optax.add_decayed_weights(group["weight_decay"])] if group.get("weight_decay") else []
    rate = optax.scale(-float(group["lr"]))
    if kind == "SGD":
        momentum = [optax.trace(group["momentum"], group["nesterov"])] if group["momentum"] else []
        return optax.chain(*decay, *momentum, rate)
    if kind in ("Adam", "AdamW"):
        adam = optax.scale_by_adam(*map(float, group["betas"]), eps=group["eps"])
        decoupled = kind == "AdamW" or group.get("decoupled_weight_decay", False)
        return optax.chain(adam, *decay, rate) if decoupled else optax.chain(*decay, adam, rate)
    raise ParityError(f"The optimizer is of type {kind}, expected torch.optim.SGD, Adam or AdamW.")


def _described(optimizer: Any) -> str:
    shown = ("lr", "momentum", "nesterov", "betas", "eps", "weight_decay")
    groups = [
        ", ".join(f"{name}={group[name]}" for name in shown if group.get(name)) for group in optimizer.param_groups
    ]
    return f"{type(optimizer).__name__}({'; '.join(groups)})"


def _numbers(losses: np.ndarray) -> list[float | None]:
    return [float(loss) if np.isfinite(loss) else None for loss in losses]


def _pair(batch: Any) -> tuple[np.ndarray, np.ndarray]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ParityError(f"batches must hold pairs of an input and a target, got one of type {type(batch).__name__}.")
    x, y = batch
    return comparison.as_input(0, x), np.asarray(y.detach().cpu() if hasattr(y, "detach") else y)


def _torch_loss(loss: _Loss) -> Callable[[Any, Any], Any]:
    from torch.nn import functional as F

    if isinstance(loss, tuple) and len(loss) == 2 and all(map(callable, loss)):
        return loss[0]

    def mean_squared(out: Any, y: Any) -> Any:
        if out.shape != y.shape:
            raise ParityError(
                f"loss='mse' wants targets of the output's shape {tuple(out.shape)}, got {tuple(y.shape)}."
            )
        return F.mse_loss(out, y.to(out.dtype))

    if loss == "cross_entropy":
        return lambda out, y: F.cross_entropy(out, y.long())
    if loss == "mse":
        return mean_squared
    raise ParityError(f"loss must be 'cross_entropy', 'mse' or a pair of functions, PyTorch's and JAX's, got {loss!r}.")


class _Theirs:
    """PyTorch's training, as often as it is wanted."""

    def __init__(
        self, module: Any, optimizer: Any, batches: _Batches, loss: Callable[[Any, Any], Any], steps: int
    ) -> None:
        self.module, self.batches, self.loss, self.steps = copy.deepcopy(module), batches, loss, steps
        self.kind = type(optimizer)
        names = {id(parameter): name for name, parameter in module.named_parameters()}
        self.groups = []
        for group in getattr(optimizer, "param_groups", ()):
            if any(id(parameter) not in names for parameter in group["params"]):
                raise ParityError(
                    "The optimizer has a parameter that is none of torch_module's; make it of its parameters()."
                )
            settings = {name: value for name, value in group.items() if name != "params"}
            self.groups.append(([names[id(parameter)] for parameter in group["params"]], settings))
        if not self.groups:
            raise ParityError(
                f"optimizer is of type {type(optimizer).__name__}, expected a torch.optim.SGD, Adam or AdamW."
            )

    def optax(self, side: Port, twins: Mapping[str, interop.Twin]) -> Any:
        """optax's counterpart, with a label for each group of parameters; what PyTorch does not train stays."""
        import optax

        made: dict[int, Any] = {i: _optax(self.kind.__name__, settings) for i, (_, settings) in enumerate(self.groups)}
        trained = {name: index for index, (names, _) in enumerate(self.groups) for name in names}
        frozen = {name for name, parameter in self.module.named_parameters() if not parameter.requires_grad}
        labels = {
            tuple(part for part in twin.path if part != "params"): -1 if name in frozen else trained.get(name, -1)
            for name, twin in twins.items()
        }
        parameters, _ = side.parameters(side.state)
        if len(made) == 1 and -1 not in labels.values():
            return made[0]

        def label(path: Any, _: Any) -> int:
            words = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
            return labels.get(tuple(word for word in words if word not in ("params", "value")), 0)

        every: Any = {**made, -1: optax.set_to_zero()}
        return optax.partition(every, jax.tree_util.tree_map_with_path(label, parameters))

    def losses(
        self, dtype: Any, steps: int | None = None, kind: Any = None, **changed: Any
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The losses of a training from the first weights, and the state at its end; with settings changed, if wanted."""
        import torch

        module = copy.deepcopy(self.module).to(dtype).train()
        named = dict(module.named_parameters())
        groups = [
            {
                **settings,
                **{k: v for k, v in changed.items() if k in settings},
                "params": [named[name] for name in names],
            }
            for names, settings in self.groups
        ]
        optimizer = (kind or self.kind)(groups)
        found = []
        for step in range(steps or self.steps):
            x, y = self.batches[step % len(self.batches)]
            optimizer.zero_grad()
            try:
                with torch.enable_grad(), recording.new_tensors(dtype):
                    loss = self.loss(module(recording.as_tensor(x, dtype)), torch.from_numpy(np.array(y)))
                loss.backward()
            except (RuntimeError, TypeError, IndexError) as error:
                raise ParityError(
                    f"The PyTorch module cannot be trained on these batches: {first_line(error)}"
                ) from error
            found.append(float(loss.detach()))
            optimizer.step()
        return np.array(found), {name: value.detach().numpy() for name, value in module.state_dict().items()}

    def changes(self) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        """What somebody else's optimizer may do otherwise: a sentence, the class, the settings."""
        import torch

        _, settings = self.groups[0]
        own = self.kind.__name__
        tried: dict[str, tuple[Any, ...]] = {
            "weight_decay": (0.0,), "momentum": (0.0, 0.9, 0.99), "nesterov": (not settings.get("nesterov", False),),
            "eps": (1e-8, 1e-7, 1e-6, 1e-5, 1e-3),
            "betas": ((0.9, 0.99), (0.9, 0.98), (0.9, 0.95), (0.5, 0.999), (0.9, 0.999)),
        }  # fmt: skip
        for name, values in tried.items():
            for value in values:
                if name in settings and value != settings[name]:
                    yield f"{name} is {value}, and PyTorch's {settings[name]}", self.kind, {name: value}
        if settings.get("momentum"):
            kept = settings["momentum"]
            yield f"the gradient is damped: dampening={kept}, and PyTorch's is 0", self.kind, {"dampening": kept}
        if own in ("Adam", "AdamW"):
            other = torch.optim.AdamW if own == "Adam" else torch.optim.Adam
            way = {"Adam": "joins the gradient (L2)", "AdamW": "is decoupled from it (AdamW)"}
            text = f"the weight decay {way[other.__name__]}, and PyTorch's {way[own]}"
            yield text, other, {"decoupled_weight_decay": other is torch.optim.AdamW}
        for factor in (0.1, 10.0, 0.5, 2.0):
            rate = float(settings["lr"])
            yield (
                f"the learning rate is {factor * rate:.6g}, and PyTorch's {rate:.6g}",
                self.kind,
                {"lr": factor * rate},
            )


def _of_optimizer(theirs: _Theirs, judged: np.ndarray, factor: float) -> Iterator[tuple[str, str]]:
    """Experiments: PyTorch's training with one setting changed, against the port's curve."""
    import torch

    for text, kind, changed in theirs.changes():
        try:
            found, _ = theirs.losses(torch.float64, len(judged), kind, **changed)
        except ValueError:  # nesterov without momentum
            continue
        if np.abs(found - judged).max() <= 8 * factor * ulp(np.abs(judged).max()):
            yield "optimizer", text
            return


class _Ours:
    """The port's training."""

    def __init__(self, side: Port, batches: _Batches, loss: _Loss, steps: int, last: bool) -> None:
        self.side, self.batches, self.loss, self.steps, self.last = side, batches, loss, steps, last

    def losses(self, optimizer: Any, dtype: Any) -> tuple[np.ndarray, Any]:
        """The losses, and the model at the end."""
        import optax

        side = self.side.widened() if dtype == jnp.float64 else self.side
        parameters, rest = side.parameters(side.state)

        def step(parameters: Any, rest: Any, held: Any, x: Any, y: Any) -> Any:
            def total(parameters: Any) -> Any:
                outputs, after = side.call(side.joined(parameters, rest), x, tree=True)
                return self._loss(outputs, y), side.parameters(after)[1]

            (loss, after), gradient = jax.value_and_grad(total, has_aux=True)(parameters)
            updates, held = optimizer.update(gradient, held, parameters)
            return optax.apply_updates(parameters, updates), after, held, loss

        run, held, found = jax.jit(step), optimizer.init(parameters), []
        for index in range(self.steps):
            x, y = self.batches[index % len(self.batches)]
            x = jnp.asarray(x, dtype if x.dtype.kind == "f" else None)
            y = jnp.asarray(y, dtype if y.dtype.kind == "f" else None)
            parameters, rest, held, loss = run(parameters, rest, held, x, y)
            found.append(float(loss))
        return np.array(found), side.merged(side.joined(parameters, rest))

    def _loss(self, outputs: Any, y: Any) -> Any:
        if isinstance(self.loss, tuple):
            return self.loss[1](outputs, y)
        (out,) = jax.tree.leaves(outputs)
        if self.loss == "cross_entropy":  # classes stand last here, and second in PyTorch
            logits = jax.nn.log_softmax(out)
            return -jnp.take_along_axis(logits, y[..., None], -1).mean()
        views = list(pairing.views(y.shape, out.shape))
        if not views:
            raise ParityError(f"The port returns {out.shape}, which does not fit the target's {y.shape}.")
        return ((views[-1 if self.last else 0].bring(out) - y) ** 2).mean()


def _parting(exact: np.ndarray, plain: np.ndarray, ours: np.ndarray, wide: np.ndarray | None) -> int | None:
    """The first step at which the port is farther from PyTorch than PyTorch's own rounding, which grows, explains."""
    unit = np.maximum(np.maximum.accumulate(np.abs(plain - exact)), [2 * ulp(value) for value in np.abs(exact)])
    with np.errstate(invalid="ignore"):
        if wide is None:
            fine = np.abs(ours - exact) <= MOST_WITHOUT_FLOAT64 * unit
        else:
            fine = (np.abs(wide - exact) <= MOST_IN_FLOAT64 * unit) & (np.abs(ours - exact) <= MOST_IN_FLOAT32 * unit)
    fine |= np.isnan(exact) & np.isnan(ours)
    return None if fine.all() else int(np.argmin(fine))
