import io

import pytest
import torch

from nnssl.training.foreground import ForegroundWatch


def labels_with(fraction, voxels=1000):
    flat = torch.zeros(voxels, dtype=torch.int64)
    flat[: round(fraction * voxels)] = 2
    return flat.view(1, 1, -1, 10)


def test_fractions_are_pooled_over_batches():
    watch = ForegroundWatch()
    watch.update("cs", labels_with(0.5, 100))
    watch.update("cs", labels_with(0.1, 300))
    watch.update("ds", labels_with(0.3))
    assert watch.report() == {"cs": pytest.approx(80 / 400), "ds": pytest.approx(0.3)}


def test_regions_count_where_any_region_is_and_ignored_voxels_do_not_count():
    watch = ForegroundWatch()
    regions = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0]], dtype=torch.bool).view(1, 2, 2, 2)
    valid = torch.tensor([0, 1, 1, 1], dtype=torch.bool).view(1, 1, 2, 2)
    watch.update("regions", regions)
    watch.update("masked", regions, valid)
    watch.update("nothing", regions, torch.zeros_like(valid))
    assert watch.report() == {"regions": 0.75, "masked": pytest.approx(2 / 3)}


@pytest.mark.parametrize(
    ("fraction", "runs_away"), [(0.0, True), (0.019, True), (0.021, False), (0.1, False), (0.499, False), (0.501, True)]
)
def test_runaway_is_five_times_off_the_labeled_fraction(fraction, runs_away):
    watch = ForegroundWatch()
    watch.update("labeled", labels_with(0.1))
    watch.update("cs", labels_with(fraction))
    watch.update("ds", labels_with(0.1))
    assert watch.runaway() == (["cs"] if runs_away else [])


@pytest.mark.parametrize("reference", [None, 0.0])
def test_without_labeled_foreground_nothing_is_judged(reference):
    watch = ForegroundWatch()
    watch.update("cs", labels_with(1.0))
    if reference is not None:
        watch.update("labeled", labels_with(reference))
    assert watch.runaway() == []


def test_a_reset_forgets_everything():
    watch = ForegroundWatch()
    watch.update("cs", labels_with(0.4))
    watch.reset()
    assert watch.report() == {}
    watch.update("cs", labels_with(0.2))
    assert watch.report() == {"cs": pytest.approx(0.2)}


def test_a_resumed_watch_continues_and_a_saved_state_is_a_snapshot():
    watch = ForegroundWatch()
    watch.update("cs", labels_with(0.4))
    file = io.BytesIO()
    state = watch.state_dict()
    watch.update("cs", labels_with(0.0))
    torch.save(state, file)
    file.seek(0)
    resumed = ForegroundWatch()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.report() == {"cs": pytest.approx(0.4)}
    resumed.update("cs", labels_with(0.0))
    assert resumed.report() == watch.report()


def test_large_counts_stay_exact():
    watch = ForegroundWatch()
    watch.load_state_dict({"cs": torch.tensor([2**40, 2**41])})
    watch.update("cs", torch.ones(1, 1, 1, 1, dtype=torch.int64))
    assert watch.state_dict()["cs"].tolist() == [2**40 + 1, 2**41 + 1]


def test_the_factor_must_exceed_one():
    with pytest.raises(ValueError, match="factor"):
        ForegroundWatch(factor=1.0)
