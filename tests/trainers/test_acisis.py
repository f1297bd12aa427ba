"""ACISIS: its confidence array in plain numbers, and the loss of the voxels it keeps."""

import math

import pytest
import torch
from torch.nn import functional

from nnssl.trainers.acisis import UPDATES, ACISISSettings, ConfidenceArray, fused_rank
from nnssl.training.class_statistics import sampling_rate


def ranked(columns: list[list[float]]) -> list[float]:
    """Fuse three indicators of each class in plain floats."""
    sums = [sum(math.exp(row[i]) for row in columns) for i in range(3)]
    shares = [[math.exp(row[i]) / sums[i] for i in range(3)] for row in columns]
    fused = [sum(1 - math.exp(-math.exp(-2 * f)) for f in row) * (1 - sum(row) / 3) for row in shares]
    return [value / max(fused) for value in fused]


def labeled(absent: int | None = None):
    """Return probabilities, entropies and one-hot labels of a batch whose class 0 is known best and class 2 least."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, 3, (2, 40), generator=generator)
    onehot = functional.one_hot(label, 3).movedim(-1, 1).float()
    strength = torch.tensor([4.0, 2.0, 0.0]).view(1, 3, 1)
    probs = (strength * onehot + 0.2 * torch.randn(2, 3, 40, generator=generator)).softmax(1)
    if absent is not None:
        onehot *= (label != absent)[:, None]
    return probs, -(probs * probs.log()).sum(1, keepdim=True), onehot


def indicators(probs, entropy, onehot, k):
    inside = onehot[:, k].bool()
    own = probs[:, k][inside].double()
    margin = probs.amax(1)[inside].double() - own
    return [entropy[:, 0][inside].double().mean().item(), (1 - own).mean().item(), margin.mean().item()]


def test_the_array_follows_the_formula_and_knows_the_best_class():
    array, batch = ConfidenceArray(3, ACISISSettings(array_decay=0.5), 2), labeled()
    array.update(*batch)
    assert array.value.tolist() == [0, 0, 0]  # the window is not over
    array.update(*batch)
    expected = ranked([indicators(*batch, k) for k in range(3)])
    assert array.value.tolist() == pytest.approx([0.5 * value for value in expected], rel=1e-4)
    assert array.value[0] > array.value[1] > array.value[2]


def test_an_absent_class_keeps_its_value_and_takes_no_part():
    array = ConfidenceArray(3, ACISISSettings(array_decay=0.5), 1)
    array.update(*labeled())
    before, batch = array.value.clone(), labeled(absent=1)
    array.update(*batch)
    two = ranked([indicators(*batch, k) for k in (0, 2)])
    assert array.value[1] == before[1]
    expected = 0.5 * before[[0, 2]] + 0.5 * torch.tensor(two)
    assert torch.allclose(array.value[[0, 2]], expected, rtol=1e-4)
    array.update(batch[0], batch[1], torch.zeros_like(batch[2]))
    assert torch.isfinite(array.value).all()


def test_only_the_top_classes_of_an_indicator_escape_the_penalty():
    rows = torch.tensor([[0.0, 1.0, 2.0]]).expand(3, 3)
    fused = fused_rank(rows, torch.ones(3, dtype=torch.bool), top=1)
    share = rows[0].softmax(0)[2].item()
    best = 3 * (1 - math.exp(-math.exp(-2 * share))) * (1 - share)
    assert fused.tolist() == pytest.approx([1, 1, best / (3 * 0.632)], rel=1e-5)


def test_the_published_sign_is_a_setting():
    ours, theirs = (ConfidenceArray(3, ACISISSettings(confidence_sign=s), 1) for s in ("ignorance", "published"))
    for array in (ours, theirs):
        array.update(*labeled())
    assert ours.value[0] / ours.value[2] > theirs.value[0] / theirs.value[2]


def test_the_array_resumes_exactly_within_a_window():
    array, other = (ConfidenceArray(3, ACISISSettings(), 2) for _ in range(2))
    array.update(*labeled())
    other.load_state_dict({name: value.clone() for name, value in array.state_dict().items()})
    for each in (array, other):
        each.update(*labeled(absent=0))
    assert torch.equal(array.value, other.value)
    assert array.value.max() > 0


@pytest.mark.parametrize(
    ("settings", "epochs", "expected"),
    [({}, 300, 4), ({}, 2, 1), ({"window": 7}, 300, 7)],
    ids=["long", "short", "set"],
)
def test_the_window_is_a_300th_of_the_run_unless_it_is_set(build, settings, epochs, expected):
    trainer = build("ACISISTrainer", settings={"window": None, **settings}, options={"epochs": epochs}, start=False)
    trainer.initialize()
    assert trainer.array.window == expected  # epochs of 4 iterations


def test_voxels_of_the_best_known_class_are_still_drawn_at_the_end_of_a_run():
    settings = ACISISSettings()
    array, batch = ConfidenceArray(3, settings, 1), labeled()
    for _ in range(UPDATES):
        array.update(*batch)
    best = sampling_rate(array.value, settings.exponent)[0].item()
    assert 1e-3 < best < 0.5
    for _ in range(2000):
        array.update(*batch)
    assert sampling_rate(array.value, settings.exponent)[0] < 1e-6  # why a run must not have more of them


def test_a_top_that_leaves_no_class_out_is_warned_of(build, capsys):
    for settings, warned in (({"top": 3}, True), ({"top": 2}, False), ({"top": 3, "unsupervised_weight": 0}, False)):
        build("ACISISTrainer", settings=settings, start=False).initialize()
        assert ("top=3" in capsys.readouterr().out) == warned


def test_the_loss_is_that_of_kept_voxels_by_the_students_confidence(build):
    trainer = build("ACISISTrainer", settings={"beta": 2.0})
    trainer.train_step(next(trainer.dataloader_train))
    trainer.array.value = torch.tensor([1.0, 0.0, 0.0])  # class 0 is never kept, the others always
    unlabeled = next(trainer.dataloader_train)["unlabeled"]
    unlabeled["valid"][..., :4] = False
    with torch.no_grad():
        z = trainer.predict_logits(unlabeled["strong"])
        label = trainer.teacher(unlabeled["weak"]).argmax(1)
    p = z.softmax(1)
    kept = (p.argmax(1) > 0) & unlabeled["valid"][:, 0]
    assert 0 < kept.sum() < unlabeled["valid"].sum()
    loss = functional.cross_entropy(z, label, reduction="none") * p.amax(1) ** 2
    group = trainer.unsupervised_losses(unlabeled)
    expected = (loss * kept).sum() / unlabeled["valid"].sum()
    assert group.terms["loss_pseudo_label"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert group.log["kept"].item() == pytest.approx((kept.sum() / unlabeled["valid"].sum()).item())


def test_the_array_learns_from_labels_and_the_loss_is_the_supervised_one(build):
    trainer = build("ACISISTrainer", settings={"window": 1})
    batch = next(trainer.dataloader_train)
    output = trainer.network(batch["data"])
    plain = trainer.supervised_loss(output, batch["target"]).item()
    assert trainer.labeled_loss(output, batch["target"]).item() == plain
    assert trainer.array.value.max() > 0
