"""What an epoch's record holds beside the losses."""

from __future__ import annotations

from nnssl.trainers.recording import differences


def test_differences_are_first_minus_second_and_none_where_a_branch_has_no_dice():
    wanted = {"gain": ("rectified", "network")}
    assert differences(wanted, {"rectified": 0.75, "network": 0.5, "other": 0.1}) == {"gain": 0.25}
    assert differences(wanted, {"rectified": 0.0, "network": 0.5}) == {"gain": -0.5}  # 0 is a Dice
    assert differences(wanted, {"rectified": None, "network": 0.5}) == {"gain": None}
    assert differences(wanted, {"network": 0.5}) == {"gain": None}
    assert differences({}, {"network": 0.5}) == {}
