import math

import pytest

from nnssl.errors import UserError
from nnssl.training.ramps import constant, linear_ramp, schedule, sigmoid_ramp, warmup_step


@pytest.mark.parametrize(
    ("fraction", "lambda_t"), [(0.0, 0.0135), (0.25, 0.120), (0.5, 0.573), (0.75, 1.463), (1.0, 2.0)]
)
def test_lambda_of_diff_cl(fraction, lambda_t):
    assert 2 * sigmoid_ramp(fraction) == pytest.approx(lambda_t, abs=5e-4)


def test_ramp_at_each_epoch_of_the_paper():
    for epoch in range(301):
        assert sigmoid_ramp(epoch / 300) == pytest.approx(math.exp(-5 * (1 - epoch / 300) ** 2), rel=1e-12)


@pytest.mark.parametrize("name", ["constant", "ramp", "linear", "warmup10"])
def test_schedules_rise_from_their_start_to_one(name):
    values = [schedule(name)(i / 100) for i in range(101)]
    assert values == sorted(values)
    assert values[-1] == 1
    assert min(values) >= 0


def test_names_reach_their_functions():
    assert schedule("constant")(0.0) == constant(0.0) == 1
    assert schedule("linear")(0.3) == linear_ramp(0.3) == 0.3
    assert schedule("ramp")(0.3) == sigmoid_ramp(0.3)


@pytest.mark.parametrize("percent", [1, 10, 99])
def test_warmup_is_zero_for_the_named_percentage(percent):
    step, start = schedule(f"warmup{percent}"), percent / 100
    assert step(start - 1e-9) == 0
    assert step(start) == 1 == warmup_step(start, start)


@pytest.mark.parametrize("fraction", [-0.01, 1.01, math.nan])
@pytest.mark.parametrize("name", ["constant", "ramp", "linear", "warmup10"])
def test_fractions_outside_the_run_are_refused(name, fraction):
    with pytest.raises(ValueError, match="fraction"):
        schedule(name)(fraction)


@pytest.mark.parametrize("name", ["", "rampp", "warmup", "warmup0", "warmup100", "warmup-5"])
def test_unknown_names_list_the_known_ones(name):
    with pytest.raises(UserError, match=r"constant, ramp, linear, warmup1 to warmup99"):
        schedule(name)
