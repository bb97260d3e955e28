"""The house: floors, light imports, examples that run, and the same words everywhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jconv
from jconv import bench, device, store, target

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "jconv"

# As docs/design.md lists them.
FLOORS = {
    module: floor
    for floor, modules in enumerate(
        (
            ("errors",),
            ("device", "problem", "checkpoint", "slots", "parity.mistakes", "printing"),
            ("adjoint", "store", "algorithms.base", "algorithms", "parity.page"),
            (
                "algorithms.xla",
                "algorithms.depthwise",
                "algorithms.grouped",
                "algorithms.groupwise",
                "algorithms.pointwise",
                "algorithms.patches",
                "algorithms.direct",
                "algorithms.winograd",
                "algorithms.im2col",
                "algorithms.fold",
                "algorithms.fft",
                "algorithms.volume",
                "algorithms.phase",
                "algorithms.tiling",
                "algorithms.exchanged",
                "algorithms.widened",
                "interop",
            ),
            ("algorithms.table",),
            ("planner", "parity.tolerances"),
            ("convolve", "functional.arguments"),
            ("rewrite",),
            ("lax", "grad", "tuning", "functional.nd", "functional.pad", "functional.fold", "parity.recording"),
            ("functional.conv", "layers", "explaining", "parity.pairing"),
            ("functional", "target", "bench", "parity.report"),
            ("nnx", "linen", "parity.comparison"),
            ("parity.training", "parity.sweeping"),
            ("parity",),
            ("cli", "pytest_plugin"),
            ("__main__",),
        ),
        start=1,
    )
    for module in modules
}
MODULES = sorted(
    ".".join(p.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for p in PACKAGE.rglob("*.py")
    if p != PACKAGE / "__init__.py"
)


def source(module):
    path = PACKAGE / Path(*module.split("."))
    return (path / "__init__.py") if path.is_dir() else path.with_suffix(".py")


def imports(module):
    """(imported module, True if at the top level) for every import of a file."""
    tree = ast.parse(source(module).read_text())
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, top
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            if not all(name.removeprefix("jconv.") in MODULES for name in names):
                yield node.module, top
            for name in names:
                yield name, top


def test_every_file_has_a_floor():
    assert set(MODULES) == set(FLOORS)


@pytest.mark.parametrize("module", MODULES)
def test_floors(module):
    """A file imports only from floors below its own."""
    for imported, _ in imports(module):
        name = imported.removeprefix("jconv.")
        if imported.startswith("jconv.") and name in FLOORS:
            assert FLOORS[name] < FLOORS[module], f"{module} imports {name}"


@pytest.mark.parametrize("module", MODULES)
def test_who_may_import_what(module):
    for imported, top in imports(module):
        package = imported.split(".")[0]
        if package == "flax":
            inside = module in ("interop", "slots", "parity.recording", "parity.comparison")
            assert module in ("nnx", "linen") or (inside and not top)
        if package == "typer":
            assert module == "cli"
        if package == "rich":
            tables = ("tuning", "explaining", "bench", "parity.report", "parity.sweeping")
            assert module == "cli" or (module in tables and not top)
        if package == "matplotlib":
            assert module in ("printing", "parity.page") and not top
        if package == "platformdirs":
            assert module == "store" and not top
        if package == "torch":
            assert not top and module.startswith(("parity.", "cli")), f"{module} imports {imported}"
        if package in ("optax", "pytest"):
            assert (module, top) in (("parity.training", False), ("pytest_plugin", True))
        if imported.startswith(("jax.interpreters", "jax.extend")):
            assert module in ("convolve", "rewrite")
        assert not imported.startswith("jax._src")


def test_import_is_light():
    """`import jconv` loads jax and numpy; Flax comes with jconv.nnx, and torch never."""
    code = """
import sys
import jax, numpy
before = set(sys.modules)
import jconv
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not new & {"flax", "torch", "safetensors", "rich", "optax", "matplotlib", "platformdirs"}, new
jconv.tune, jconv.explain
assert not {"flax", "rich", "typer", "platformdirs", "matplotlib"} & set(sys.modules)
jconv.nnx, jconv.linen, jconv.interop
assert "flax" in sys.modules and "torch" not in sys.modules
assert {"nnx", "linen", "interop", "tune", "tuning", "explain"} <= set(dir(jconv))
try:
    jconv.nonsense
except AttributeError as error:
    assert "nonsense" in str(error)
else:
    raise SystemExit("no AttributeError")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "who, use",
    [
        ("jconv.nnx", "jconv.nnx"),
        ("jconv.nnx", "import jconv.nnx"),
        ("jconv.linen", "from jconv.linen import Conv2d"),
        ("jconv.interop", "jconv.interop.load_torch({'kernel': np.zeros((3, 2))}, {'weight': np.zeros((2, 3))})"),
        ("jconv.interop", "jconv.interop.to_torch({'kernel': np.zeros((3, 2))})"),
    ],
)
def test_without_flax_a_sentence_says_who_needs_it(who, use):
    code = f"""
import sys
import numpy as np
import jconv

class NoFlax:
    def find_spec(self, name, path=None, target=None):
        if name == "flax":
            raise ModuleNotFoundError("No module named 'flax'", name=name)

sys.meta_path.insert(0, NoFlax())
try:
    {use}
except ImportError as error:
    assert str(error) == "{who} needs Flax, which is not installed; pip install flax", error
else:
    raise SystemExit("no ImportError")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_docstring_examples():
    """Every `>>>` in the package, in a fresh process with JAX's defaults."""
    code = f"""
import doctest, importlib, sys
import jax, jax.numpy as jnp
total = 0
for name in {MODULES!r}:
    module = importlib.import_module("jconv." + name)
    result = doctest.testmod(module, extraglobs={{"jax": jax, "jnp": jnp}}, optionflags=doctest.NORMALIZE_WHITESPACE)
    total += result.attempted
    if result.failed:
        sys.exit(f"{{result.failed}} examples of jconv.{{name}} failed")
assert total > 60, total
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def public():
    modules = (jconv.lax, jconv.rewrite, jconv.functional, jconv.grad, jconv.tuning, jconv.explaining)
    for module in (*modules, bench, target):
        for name in dir(module):
            value = getattr(module, name)
            if callable(value) and getattr(value, "__module__", "").startswith(module.__name__) and name[0].islower():
                yield pytest.param(value, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("function", list(public()))
def test_public_docstrings_have_an_example(function):
    assert ">>>" in function.__doc__


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


def test_readme_examples(tmp_path):
    """Every Python block of the README, one after the other in one process, as typed."""
    blocks = python_blocks(ROOT / "README.md")
    assert len(blocks) >= 3
    first = [line for line in blocks[0].splitlines() if line.strip()]
    assert len(first) <= 15 and "Conv2d" in blocks[0] and "optax" in blocks[0]
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_readme_opens_with_the_two_commands():
    text = (ROOT / "README.md").read_text()
    assert text.index("make demo") < text.index("make test") < text.index("```python")


def test_ci_calls_the_readmes_commands():
    script = (ROOT / ".ci" / "run").read_text()
    assert "\nmake test\n" in script and "\nmake lint\n" in script


def test_version_is_in_the_changelog():
    assert f"## {jconv.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def shipped(monkeypatch):
    """The figures of the cost model, as the README shows them: on two threads, by the constants that are shipped."""
    monkeypatch.setattr(device, "threads", lambda: 2)
    monkeypatch.setattr(device, "_limit", 32 * device.MiB)
    monkeypatch.setattr(store, "store", lambda: store.Store(None))


def test_the_table_in_the_readme_is_what_is_printed(monkeypatch):
    """By its own example, but for the first line, which names the processor, and the share, which is JAX's version's."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    shipped(monkeypatch)
    (example,) = [block for block in python_blocks(ROOT / "README.md") if "jconv.explain(" in block]
    names = {"jax": jax, "jnp": jnp, "nnx": nnx, "jconv": jconv}
    with jax.enable_x64(False):
        exec(compile(example.partition("report.plot")[0], "model.py", "exec"), names)
    table, text = (
        re.sub(r"[\d.]+ %", "%", text)
        for text in (str(names["report"]).partition("\n")[2], (ROOT / "README.md").read_text())
    )
    assert table in text, table


def test_the_plan_in_the_readme_is_what_is_printed(monkeypatch):
    import jax
    import jax.numpy as jnp

    shipped(monkeypatch)
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 56, 56, 144), (3, 3, 1, 144)))
    p = jconv.plan(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=144, platform="cpu"
    )
    assert str(p) in (ROOT / "README.md").read_text()
