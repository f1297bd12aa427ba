import pytest
import torch

from nnssl.losses.precision import fp32


@fp32
def product(a, b, more=None):
    return a @ b, more


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_are_raised_wherever_they_are(half):
    a = torch.ones(2, 2, dtype=half)
    result, more = product(a, b=a, more={"list": [a], "tuple": (a, "x")})
    assert result.dtype == torch.float32
    assert more["list"][0].dtype == more["tuple"][0].dtype == torch.float32
    assert more["tuple"][1] == "x"


def test_double_precision_and_integers_stay():
    a = torch.ones(2, 2, dtype=torch.float64)
    result, more = product(a, a, more=torch.ones(1, dtype=torch.int64))
    assert result.dtype == torch.float64
    assert more.dtype == torch.int64


def test_autocast_is_off_inside_and_on_again_outside():
    a = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (a @ a).dtype == torch.bfloat16
        assert product(a, a)[0].dtype == torch.float32
        assert (a @ a).dtype == torch.bfloat16


def test_gradient_passes_through_the_cast():
    a = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    product(a, torch.eye(2))[0].sum().backward()
    assert a.grad is not None
    assert a.grad.dtype == torch.bfloat16
