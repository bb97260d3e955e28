"""torch's own sample inputs and error inputs for these operators (its OpInfo database)."""

import pytest
import torch
from tolerances import assert_close

import jconv
from jconv import functional as F

opinfo = pytest.importorskip("torch.testing._internal.common_methods_invocations")

NAMES = {
    **{f"nn.functional.{f}{n}d": f"{f}{n}d" for f in ("conv", "conv_transpose") for n in (1, 2, 3)},
    "nn.functional.unfold": "unfold",
    **{f"nn.functional.pad.{mode}": "pad" for mode in ("constant", "reflect", "replicate", "circular")},
}


def infos():
    for info in opinfo.op_db:
        full = f"{info.name}.{info.variant_test_name}" if info.variant_test_name else info.name
        if full in NAMES:
            yield pytest.param(info, NAMES[full], id=full)


INFOS = list(infos())


def numpy_of(value):
    return value.detach().resolve_conj().numpy() if isinstance(value, torch.Tensor) else value


def call(info, function, sample):
    args = [numpy_of(a) for a in (sample.input, *sample.args)]
    kwargs = {k: numpy_of(v) for k, v in sample.kwargs.items()}
    return getattr(F, function)(*args, **kwargs)


@pytest.mark.parametrize("info,function", INFOS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.complex128, torch.float32))
def test_samples(info, function, dtype):
    if dtype not in info.supported_dtypes("cpu"):
        pytest.skip(f"torch itself has no {dtype} here")
    count = 0
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=False))
    # Each sample is compiled: all in one dtype, and as many as tell dtypes apart in the others.
    for sample in samples if dtype is torch.float64 else samples[:: max(1, len(samples) // 8)]:
        expected = info.op(sample.input, *sample.args, **sample.kwargs)
        actual = call(info, function, sample)
        assert_close(actual, expected.resolve_conj().numpy(), "auto", str(dtype).removeprefix("torch."), factor=2)
        count += 1
    assert count >= 3


@pytest.mark.parametrize("info,function", INFOS)
def test_error_inputs(info, function):
    """Where torch's database expects an error, jconv raises one sentence."""
    if info.error_inputs_func is None:
        pytest.skip("torch lists none")
    for error in info.error_inputs("cpu"):
        with pytest.raises(jconv.ConvError) as caught:
            call(info, function, error.sample_input)
        assert len(str(caught.value)) > 20, error.error_regex


def test_the_database_is_not_empty():
    assert {p.values[1] for p in INFOS} == set(NAMES.values())
