"""Times models of Flax, Equinox, Haiku and Keras as they are, and through ``jconv.accelerate``.

    python benchmarks/models.py [--only REGEX] [--runs N] [--budget SECONDS] [--quick] [--again] [--readme]

The models are those of ``zoo.py``, at the sizes below; the extra ``models`` installs what they need. Stock is the
library's own jit: ``jax.jit``, or ``nnx.jit``. Forward is inference; a train step is loss, gradients, plain SGD and the
batch norms' statistics, one program. Keras's model is called by its ``stateless_call``. A program whose result is not
stock's is not timed.

One pinned core and process CPU time; interleaved medians. Results go to ``results/models-float32-1t.json``, and
``--readme`` writes them between the README's markers. Compare under ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``, as
``make bench`` does.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ledger
import numpy as np
import timing
import zoo

import jconv

README = ledger.ROOT / "README.md"
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"
FORWARD, STEP = MODES = ("forward", "train step")
PACKAGES = ("jconv", "jax", "flax", "equinox", "dm-haiku", "keras")
# The size of an image, the batches of forward and train step, and what else the model is built with.
SIZES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "Flax Linen ResNet-18": (224, 1, 4, {"width": 64}),
    "Flax NNX ResNet": (32, 1, 32, {"width": 16}),
    "Equinox separable net": (128, 1, 8, {"width": 32}),
    "Haiku ResNet-18": (224, 1, 4, {}),
    "Haiku MobileNetV1": (224, 1, 4, {"whole": True}),
    "Keras MobileNetV2": (224, 1, 4, {"alpha": 1.0}),
    "Flax U-Net": (128, 1, 4, {"width": 32}),
    "Flax diffusion": (32, 4, 8, {"width": 64}),
}
QUICK = ("Equinox separable net",)
MOST_DIFFERENCE = 1e-3


def program(model: zoo.Model, mode: str, jit: Callable[..., Any]) -> Callable[[], Any]:
    """A call without arguments, which waits for its result and returns it: outputs, or loss and gradients."""
    call, variables, batch = jit(model.forward if mode == FORWARD else model.step), model.fresh(), model.batch(0)
    return lambda: jax.block_until_ready(call(variables, batch))


def vector(result: Any, mode: str) -> np.ndarray:
    """What must agree: the outputs, or the loss."""
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(result if mode == FORWARD else result[0])])


def measure(timer: timing.Timer, model: zoo.Model, mode: str) -> dict[str, Any]:
    """One row of the results, but for its names."""
    programs = {"stock": program(model, mode, model.jit), "jconv": program(model, mode, jconv.accelerate)}
    results, first = {}, {}
    for name, run in programs.items():
        start = timer.now()
        results[name] = vector(run(), mode)
        first[name] = timer.now() - start
    difference = float(np.abs(results["jconv"] - results["stock"]).max() / np.abs(results["stock"]).max())
    if not difference <= MOST_DIFFERENCE:
        sys.exit(f"models: {mode}: jconv's result differs from stock's by {difference:.1e}, at most {MOST_DIFFERENCE}")
    others = timing.Bystanders()
    times = timer.medians(programs)
    return {
        "contenders": {name: times[name] | {"first_call_s": first[name]} for name in programs},
        "difference": difference,
        "others": others.cores(),
    }


def table(data: dict[str, Any]) -> str:
    """The README's block."""
    c, states = data["conditions"], sorted({row["state"] for row in data["rows"].values()})
    heads = ("model", "mode", "input", "stock ms", "accelerate ms", "stock / accelerate")
    lines = [
        f"Measured on {c['cpu']}, one pinned core, {c['clock']}, interleaved medians, allocator {c['malloc']}. "
        f"Code: {'; '.join(states)}. `python benchmarks/models.py` shows it.",
        "",
        "| " + " | ".join(heads) + " |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in data["rows"].values():
        stock, ours = (row["contenders"][name]["ms"] for name in ("stock", "jconv"))
        lines.append(
            f"| {row['network']} | {row['mode']} | {row['input']} | {_number(stock)} | {_number(ours)} | "
            f"{_number(stock / ours)} |"
        )
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def write_readme(block: str) -> None:
    text = README.read_text()
    if BEGIN not in text or END not in text:
        sys.exit(f"models: the README has no {BEGIN} and {END} to write between")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    README.write_text(re.sub(pattern, lambda _: f"{BEGIN}\n\n{block}\n\n{END}", text, flags=re.S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that 'NAME, MODE' must match")
    parser.add_argument("--runs", type=int, default=7, help="interleaved samples of each program (default 7)")
    parser.add_argument("--budget", type=float, default=30, help="seconds for one model and mode (default 30)")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} only, into results/quick")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--readme", action="store_true", help="write the table into the README")
    parser.add_argument("--output", type=Path, help="a folder, by default results/")
    options = parser.parse_args()
    os.environ.setdefault("JCONV_STORE", "")
    timer = timing.Timer(1, options.runs, options.budget)
    timer.pin()
    folder = options.output or (ledger.RESULTS / "quick" if options.quick else ledger.RESULTS)
    conditions = ledger.conditions("models", 1, timing.CLOCKS[1], "float32", options.quick)
    try:
        book = ledger.Ledger(folder / "models-float32-1t.json", conditions, PACKAGES)
    except ledger.Unlike as error:
        sys.exit(f"models: {error}")
    for name, (size, *batches, given) in SIZES.items():
        for mode, batch in zip(MODES, batches, strict=True):
            shape = f"{batch}x{size}x{size}x3"
            key = f"{name}|{mode}|{shape}"
            if not re.search(options.only, f"{name}, {mode}") or (options.quick and name not in QUICK):
                continue
            if options.again or not book.has(key):
                model = zoo.MODELS[name](size=size, batch=batch, **given)
                book.add(key, {"network": name, "mode": mode, "input": shape} | measure(timer, model, mode))
                jax.clear_caches()
            row = book.data["rows"][key]["contenders"]
            print(f"{key}: stock {row['stock']['ms']:.1f} ms, accelerate {row['jconv']['ms']:.1f} ms", flush=True)
    print(table(book.data))
    if options.readme:
        write_readme(table(book.data))


if __name__ == "__main__":
    main()
