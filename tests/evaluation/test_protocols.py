"""The literature protocols against medpy, and each family's rule for empty masks."""

from __future__ import annotations

import numpy as np
import pytest

from nnssl.cli import evaluate as cli
from nnssl.errors import UserError
from nnssl.evaluation.protocols import LITERATURE_METRICS, PROTOCOLS, get_protocol

FAMILIES = ["literature-la", "literature-acdc", "literature-diffrect", "literature-ad"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(25, 30), (9, 17, 21), (1, 20, 20)])
def test_equals_medpy(blobs, name, shape):
    binary = pytest.importorskip("medpy.metric.binary")
    prediction, reference = blobs(11, shape)
    values = PROTOCOLS[name].compute(prediction, reference, (9.0,) * len(shape), 1.0)
    assert values["dice"] == pytest.approx(binary.dc(prediction, reference))
    assert values["jaccard"] == pytest.approx(binary.jc(prediction, reference))
    assert values["hd95"] == pytest.approx(binary.hd95(prediction, reference))
    assert values["asd"] == pytest.approx(binary.asd(prediction, reference))


def test_asd_runs_from_prediction_to_reference():
    reference = np.zeros((30, 30), bool)
    reference[5:10, 5:10] = True
    prediction = reference.copy()
    prediction[25:28, 25:28] = True  # an island far off: far from the reference, which lies within the prediction
    compute = PROTOCOLS["literature-la"].compute
    assert compute(prediction, reference, (1, 1), 1.0)["asd"] > 5
    assert compute(reference, prediction, (1, 1), 1.0)["asd"] == 0


@pytest.mark.parametrize(
    ("name", "prediction_empty", "reference_empty", "both_empty"),
    [
        ("literature-la", (0, 0, 0, 0), (0, 0, None, None), (0, 0, 0, 0)),
        ("literature-acdc", (0, 0, 0, 0), (0, 0, None, None), (0, 0, 0, 0)),
        ("literature-diffrect", (0, 0, 50, 10), (0, 0, 50, 10), (0, 0, 50, 10)),
        ("literature-ad", (0, 0, 128, 128), (0, 0, 128, 128), (0.01, 0.01, 0, 0)),
    ],
)
def test_empty_masks(name, prediction_empty, reference_empty, both_empty):
    empty, full = np.zeros((2, 5, 5), bool)
    full[1:3, 1:3] = True
    for pair, expected in (
        ((empty, full), prediction_empty),
        ((full, empty), reference_empty),
        ((empty, empty), both_empty),
    ):
        values = PROTOCOLS[name].compute(*pair, (1.0, 1.0), 1.0)
        assert values == dict(zip(LITERATURE_METRICS, expected, strict=True))


def test_protocols_are_named_with_unit_and_notes():
    assert tuple(PROTOCOLS) == cli._PROTOCOLS
    assert PROTOCOLS["mm"].unit == "mm"
    for name in FAMILIES:
        assert PROTOCOLS[name].unit == "voxel"
        assert any("voxels" in note for note in PROTOCOLS[name].notes)


def test_unknown_protocol_names_the_nearest():
    with pytest.raises(UserError, match="literature-acdc"):
        get_protocol("literature-acd")
