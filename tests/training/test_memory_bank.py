import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nnssl.training.memory_bank import MemoryBank, choose_per_class


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def marked(case, label, count):
    """Features that tell their case, class and voxel."""
    return torch.stack([torch.full((count,), float(case)), torch.full((count,), float(label)), torch.arange(count)], 1)


def visit(bank, case, counts, generator=None):
    features = torch.cat([marked(case, c, n) for c, n in counts.items()])
    labels = torch.cat([torch.full((n,), c) for c, n in counts.items()])
    bank.push([f"case{case}"], [features], [labels], generator)


def test_draws_come_from_their_class_without_repetition():
    bank = MemoryBank(capacity=50, min_available=4)
    visit(bank, 1, {0: 30, 2: 6})
    visit(bank, 2, {0: 30})
    drawn = bank.draw([0, 1, 2], 20)
    assert list(drawn) == [0, 2]
    assert [len(a) for a in drawn.values()] == [20, 6]
    for c, a in drawn.items():
        assert (a[:, 1] == c).all()
        assert len(a.unique(dim=0)) == len(a)
    assert set(drawn[0][:, 0].tolist()) == {1.0, 2.0}


def test_a_visit_replaces_the_whole_slot():
    bank = MemoryBank(min_available=1)
    visit(bank, 1, {0: 5, 1: 5})
    visit(bank, 1, {0: 3})
    assert bank.available() == {0: 3}
    bank.push(["case1"], [torch.zeros(0, 3)], [torch.zeros(0, dtype=torch.long)])
    assert bank.available() == {}
    assert bank.draw([0], 4) == {}


def test_memory_is_bounded_by_the_capacity():
    bank = MemoryBank(capacity=10)
    for _ in range(3):
        for case in range(4):
            visit(bank, case, {0: 100, 1: 7})
    assert bank.available() == {0: 40, 1: 28}
    for slot in bank.state_dict().values():
        for feature in slot.values():
            assert feature.untyped_storage().nbytes() == feature.numel() * 4  # no view keeps the whole visit alive


def test_kept_voxels_are_a_uniform_sample():
    bank, seen = MemoryBank(capacity=10, min_available=1), torch.zeros(40)
    generator = seeded()
    for _ in range(400):
        visit(bank, 1, {0: 40}, generator)
        seen[bank.draw([0], 10, generator)[0][:, 2].long()] += 1
    assert seen.sum() == 4000
    assert (seen - 100).abs().max() < 45  # 5 standard deviations of a binomial count


@pytest.mark.parametrize(("count", "drawn"), [(15, []), (16, [0])])
def test_a_class_needs_enough_features(count, drawn):
    bank = MemoryBank()
    visit(bank, 1, {0: count})
    assert list(bank.draw([0], 256)) == drawn


def test_features_are_detached_single_precision():
    bank = MemoryBank(min_available=1)
    features = torch.randn(5, 3, requires_grad=True).half()
    bank.push(["a"], [features], [torch.zeros(5, dtype=torch.int16)])
    a = bank.draw([0], 5)[0]
    assert a.dtype == torch.float32
    assert not a.requires_grad


def test_the_draw_depends_on_the_generator_alone_and_not_on_the_history_of_visits():
    first, second = MemoryBank(capacity=20), MemoryBank(capacity=20)
    for bank, order in ((first, (1, 2, 3)), (second, (3, 1, 2))):
        for case in order:
            visit(bank, case, {0: 30, 1: 30}, seeded(case))
    a, b, c = first.draw([1, 0], 9, seeded(7)), second.draw([0, 1], 9, seeded(7)), first.draw([0, 1], 9, seeded(8))
    assert all(torch.equal(a[k], b[k]) for k in (0, 1))
    assert not torch.equal(a[0], c[0])
    torch.manual_seed(5)
    d = first.draw([0], 9)
    torch.manual_seed(5)
    assert torch.equal(d[0], first.draw([0], 9)[0])


def test_a_resumed_bank_continues_exactly():
    bank = MemoryBank(capacity=20)
    for case in (10, 9, 2):
        visit(bank, case, {1: 25, 0: 25}, seeded(case))
    file = io.BytesIO()
    torch.save(bank.state_dict(), file)
    file.seek(0)
    resumed = MemoryBank(capacity=20)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for each in (bank, resumed):
        visit(each, 3, {0: 25}, seeded(3))
        visit(each, 9, {0: 25}, seeded(4))
    a, b = bank.draw([0, 1], 12, seeded(1)), resumed.draw([0, 1], 12, seeded(1))
    assert list(a) == list(b) == [0, 1]
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_saved_state_is_a_snapshot():
    bank = MemoryBank(min_available=1)
    visit(bank, 1, {0: 5})
    state = bank.state_dict()
    visit(bank, 1, {0: 2})
    assert len(state["case1"][0]) == 5


def test_choosing_before_projecting_takes_eligible_voxels_only():
    labels = torch.tensor([0] * 50 + [1] * 4 + [2] * 3)
    eligible = torch.ones(57, dtype=torch.bool)
    eligible[::2] = False
    eligible[54:] = False
    chosen = choose_per_class(labels, eligible, 10, seeded())
    assert {c: len(index) for c, index in chosen.items()} == {0: 10, 1: 2}
    for c, index in chosen.items():
        assert eligible[index].all()
        assert (labels[index] == c).all()
        assert len(index.unique()) == len(index)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="capacity"):
        MemoryBank(capacity=0)
    bank = MemoryBank(capacity=2)
    with pytest.raises(ValueError, match="differ"):
        bank.push(["a"], [], [])
    with pytest.raises(ValueError, match="fit"):
        bank.push(["a"], [torch.zeros(3, 2)], [torch.zeros(2)])
    with pytest.raises(ValueError, match="p must"):
        bank.draw([0], 0)
    with pytest.raises(ValueError, match="capacity"):
        bank.load_state_dict({"a": {0: torch.zeros(3, 2)}})


def test_ranks_that_share_what_they_push_have_one_bank(tmp_path):
    script = Path(__file__).parent.parent / "tools" / "gloo_memory.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = subprocess.run(
        [*command, str(script), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    a, b = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert a.keys() == b.keys() == {"both", "late", "own0", "own1"}
    counts = {case: {c: len(feature) for c, feature in slot.items()} for case, slot in a.items()}
    assert counts == {"both": {0: 4, 1: 4}, "late": {7: 4}, "own0": {0: 2, 1: 1}, "own1": {0: 2, 1: 2}}
    for case in a:
        assert all(torch.equal(a[case][c], b[case][c]) for c in a[case])
    assert not a["own0"][0].any()
    assert a["own1"][0].all()
    assert a["both"][0].all()  # the last rank's visit stays
