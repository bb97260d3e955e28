"""What jconv adds before a program runs: rewriting and planning a network, and dispatching an eager call.

    python benchmarks/overhead.py [--runs N] [--json FILE]

- A network of 104 convolutions (ResNet-101, stock Flax Linen, 224 x 224) is traced and lowered by ``jax.jit`` and by
  ``jconv.accelerate``, each time from empty caches. *Rewriting and planning* is what ``accelerate`` adds to tracing,
  plus the plans of all its problems, over the stock tracing and lowering. The whole, with the lowering of the
  algorithms that were chosen, is printed beside it.
- An eager call of ``jconv.conv_general_dilated`` is timed against ``jax.lax``'s, on small operands, after warm-up.

One pinned core and process CPU time; medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import timing
from jax import lax

import jconv
from jconv import convolve, planner, problem
from jconv.rewrite import problems_of

BLOCKS = (3, 4, 23, 3)
GOALS = {"rewriting and planning": 0.2, "eager call": 1.3}


class Bottleneck(nn.Module):
    features: int
    strides: int
    project: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), self.strides)(y)))
        y = norm()(conv(4 * self.features, (1, 1))(y))
        if self.project:
            x = norm()(conv(4 * self.features, (1, 1), self.strides)(x))
        return nn.relu(x + y)


class ResNet101(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(64, (7, 7), 2, use_bias=False)(x)
        x = nn.max_pool(nn.relu(nn.BatchNorm(use_running_average=True)(x)), (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(BLOCKS):
            for block in range(blocks):
                x = Bottleneck(64 << stage, 2 if stage and not block else 1, block == 0)(x)
        return nn.Dense(1000)(x.mean((1, 2)))


def cold() -> None:
    """Empties JAX's caches and jconv's: no problem, plan or program is known."""
    jax.clear_caches()
    for cached in (planner.plan_given, convolve._lax_type, convolve._runner, convolve._jitted):
        cached.cache_clear()
    problem._known.clear()


def staged(jitted: Any, operands: tuple[Any, ...], timer: timing.Timer) -> dict[str, float]:
    """Seconds to trace and to lower from empty caches, without the collection of earlier runs' garbage."""
    cold()
    gc.collect()
    gc.disable()
    start = timer.now()
    traced = jitted.trace(*operands)
    middle = timer.now()
    traced.lower()
    end = timer.now()
    gc.enable()
    return {"trace": middle - start, "lower": end - middle}


def of_a_network(f: Callable[..., Any], operands: tuple[Any, ...], timer: timing.Timer) -> dict[str, float]:
    """Milliseconds, medians: stock and accelerated, tracing and lowering, and the plans of all problems."""
    samples: dict[str, list[float]] = {}
    for _ in range(timer.runs + 1):
        for name, jit in (("stock", jax.jit), ("accelerated", jconv.accelerate)):
            for phase, seconds in staged(jit(f), operands, timer).items():
                samples.setdefault(f"{name} {phase}", []).append(1e3 * seconds)
        problems = problems_of(f, *operands)
        cold()
        samples.setdefault("plans", []).append(
            1e3 * timer.once(lambda found=problems: [planner.plan(p, "cpu") for p in found])
        )
        samples.setdefault("convolutions", []).append(len(problems))
    return {name: statistics.median(values[1:]) for name, values in samples.items()}


def of_eager_calls(timer: timing.Timer) -> dict[str, float]:
    """Microseconds a call, medians."""
    x, w = jnp.ones((1, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    layout = ("NHWC", "HWIO", "NHWC")

    def call(f: Callable[..., Any], **options: Any) -> Callable[[], Any]:
        return lambda: f(x, w, (1, 1), "SAME", dimension_numbers=layout, **options).block_until_ready()

    programs = {
        "lax": call(lax.conv_general_dilated),
        "jconv": call(jconv.conv_general_dilated),
        "jconv, xla": call(jconv.conv_general_dilated, algorithm="xla"),
    }
    return {name: 1e3 * result["ms"] for name, result in timer.medians(programs).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=9, help="samples of each figure (default 9)")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    os.environ.setdefault("JCONV_STORE", "")
    timer = timing.Timer(1, options.runs, 60)
    timer.pin()

    x = jax.ShapeDtypeStruct((8, 224, 224, 3), jnp.float32)
    network = ResNet101()
    variables = jax.eval_shape(network.init, jax.random.key(0), x)
    found = of_a_network(network.apply, (variables, x), timer)
    stock = found["stock trace"] + found["stock lower"]
    added = found["accelerated trace"] - found["stock trace"] + found["plans"]
    whole = found["accelerated trace"] + found["accelerated lower"]
    eager = of_eager_calls(timing.Timer(1, 101, 60))
    ratios = {"rewriting and planning": added / stock, "eager call": eager["jconv"] / eager["lax"]}

    print(
        f"network of {found['convolutions']:.0f} convolutions, ms: "
        + ", ".join(f"{k} {v:.1f}" for k, v in found.items())
    )
    print(f"rewriting and planning: {added:.1f} ms, {added / stock:.1%} of stock tracing + lowering, {stock:.1f} ms")
    print(f"tracing + lowering with the chosen algorithms: {whole:.1f} ms, {whole / stock:.2f} times stock")
    print("eager call, us: " + ", ".join(f"{k} {v:.1f}" for k, v in eager.items()))
    print(f"eager call: {ratios['eager call']:.2f} times lax's")
    for name, goal in GOALS.items():
        print(f"{name}: {ratios[name]:.2f}, goal at most {goal}: {'met' if ratios[name] <= goal else 'missed'}")
    if options.json:
        options.json.write_text(json.dumps({"network": found, "eager": eager, "ratios": ratios}, indent=1) + "\n")


if __name__ == "__main__":
    main()
