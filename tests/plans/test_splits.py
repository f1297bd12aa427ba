"""Laws of the splits: patients never on both sides, nnU-Net's own folds where they exist."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import KFold

from nnssl.errors import UserError
from nnssl.plans.splits import fold_cases, make_splits


def patient(case: str) -> str:
    return case.split("_")[0]


def cases_of(frames: list[int]) -> list[str]:
    return [f"p{i:03d}_{k}" for i, n in enumerate(frames) for k in range(n)]


@given(st.lists(st.integers(1, 3), min_size=2, max_size=23), st.randoms())
def test_folds_partition_the_patients(frames, random):
    cases = cases_of(frames)
    random.shuffle(cases)
    splits = make_splits(cases, patient)
    assert len(splits) == (5 if len(frames) >= 5 else len(frames))
    assert sorted(c for s in splits for c in s["val"]) == sorted(cases)
    for split in splits:
        assert split["train"]
        assert split["val"]
        assert sorted(split["train"] + split["val"]) == sorted(cases)
        assert not {patient(c) for c in split["train"]} & {patient(c) for c in split["val"]}


@pytest.mark.parametrize("n", [5, 7, 12, 70])
def test_one_case_a_patient_equals_nnunets_folds(n):
    cases = [f"case{i:03d}" for i in range(n)]
    folds = KFold(n_splits=5, shuffle=True, random_state=12345).split(cases)
    expected = [{"train": list(np.array(cases)[a]), "val": list(np.array(cases)[b])} for a, b in folds]
    assert make_splits(cases[::-1], patient) == expected


def test_two_to_four_patients_are_left_out_one_by_one():
    for n in (2, 3, 4):
        splits = make_splits(cases_of([2] * n), patient)
        assert [{patient(c) for c in s["val"]} for s in splits] == [{f"p{i:03d}"} for i in range(n)]


def test_one_patient_has_no_fold_but_all():
    cases = cases_of([2])
    assert make_splits(cases, patient) == []
    fold = fold_cases([], "all", cases, ["p000_9"], patient)
    assert fold.train == fold.val == cases
    assert fold.unlabeled == ["p000_9"]
    with pytest.raises(UserError, match=r"got 0; allowed all;"):
        fold_cases([], 0, cases, [], patient)


def test_other_frames_of_validation_patients_are_not_unlabeled_data():
    labeled = cases_of([1] * 6)
    unlabeled = [f"p{i:03d}_{k}" for i in range(9) for k in (5, 6)]
    splits = make_splits(labeled, patient)
    for index, fold in itertools.product(range(5), (int, str)):
        cases = fold_cases(splits, fold(index), labeled, unlabeled, patient)
        held_out = {patient(c) for c in cases.val}
        assert cases.unlabeled == sorted(c for c in unlabeled if patient(c) not in held_out)
        assert len(cases.unlabeled) < len(unlabeled)


def test_a_fold_may_restrict_its_unlabeled_cases():
    split = {"train": ["a_0"], "val": ["b_0"], "unlabeled": ["c_0", "b_1"]}
    assert fold_cases([split], 0, ["a_0", "b_0"], ["c_0", "d_0", "b_1"], patient).unlabeled == ["c_0"]


@pytest.mark.parametrize("fold", [5, -1, "5", "most"])
def test_unknown_folds_are_refused_with_the_known_ones(fold):
    cases = cases_of([1] * 5)
    with pytest.raises(UserError, match="allowed all, 0, 1, 2, 3, 4"):
        fold_cases(make_splits(cases, patient), fold, cases, [], patient)


@pytest.mark.parametrize("key", ["train", "val", "unlabeled"])
def test_splits_that_name_unknown_cases_are_refused(key):
    split = {"train": ["a_0"], "val": ["b_0"], "unlabeled": ["c_0"]}
    split[key] = [*split[key], "stranger_0"]
    with pytest.raises(UserError, match="stranger_0"):
        fold_cases([split], 0, ["a_0", "b_0"], ["c_0"], patient)


def test_a_users_split_of_one_patient_is_honored_with_a_warning():
    split = {"train": ["a_0"], "val": ["a_1"]}
    with pytest.warns(UserWarning, match="patients in train and val"):
        assert fold_cases([split], 0, ["a_0", "a_1"], [], patient).val == ["a_1"]


@given(st.lists(st.sampled_from("AB"), min_size=5, max_size=30), st.integers(0, 5))
def test_folds_share_every_domain_as_evenly_as_numbers_allow(letters, extra):
    domain_of = {f"p{i:03d}": letter for i, letter in enumerate([*letters, *"C" * extra])}
    cases = [f"{p}_{frame}" for p in domain_of for frame in (1, 2)]
    splits = make_splits(cases, patient, domain=lambda case: domain_of[patient(case)])
    assert len(splits) == 5
    assert sorted(c for s in splits for c in s["val"]) == sorted(cases)
    for name in set(domain_of.values()):
        counts = [sum(domain_of[patient(c)] == name for c in s["val"]) / 2 for s in splits]
        assert max(counts) - min(counts) <= 1
    for split in splits:
        assert not {patient(c) for c in split["train"]} & {patient(c) for c in split["val"]}


@pytest.mark.parametrize("n", [2, 3, 5, 13])
def test_one_labeled_domain_leaves_the_folds_as_they_are(n):
    cases = cases_of([1] * n)
    assert make_splits(cases, patient, domain=lambda case: "A") == make_splits(cases, patient)
