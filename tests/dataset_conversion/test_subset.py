"""nnssl_make_subset: nested draws of whole patients; hidden labels are not in the new data set."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil
from pathlib import Path

import numpy as np
import pytest

from nnssl.cli.make_subset import main, read_share
from nnssl.dataset_conversion.subset import draw_order, stratified_order
from nnssl.imageio import read_array
from nnssl.layout import IMAGE_FOLDERS, RawDataset


@pytest.fixture
def subset(run, source: Path, tmp_path: Path) -> Callable[..., tuple[RawDataset | None, str, str]]:
    """Make a subset of the toy source as data set 50 (or ``to``); lists become id files."""

    def call(*options: object, to: int = 50) -> tuple[RawDataset | None, str, str]:
        arguments = []
        for i, option in enumerate(options):
            if isinstance(option, list):
                path = tmp_path / f"ids{i}.txt"
                path.write_text("# ids\n" + "\n".join(option) + "\n\n")
                option = path
            arguments.append(option)
        code, out, err = run(main, "-d", 40, "-o", to, *arguments)
        made = sorted(source.parent.glob(f"Dataset{to:03d}_*"))
        assert code == (0 if made else 2)
        assert not [path for path in source.parent.iterdir() if path.name.startswith(".")]
        return (RawDataset.load(made[0]) if made else None), out, err

    return call


def roles(dataset: RawDataset) -> dict[str, set[str]]:
    return {folder: set(dataset.cases(folder)) for folder in IMAGE_FOLDERS}


def labels_of(dataset: RawDataset) -> set[str]:
    return {path.name for path in dataset.folder.rglob("*.nii.gz") if path.parent.name.startswith("labels")}


def test_n_whole_patients_keep_their_labels(subset, source: Path):
    dataset, out, _ = subset("--labeled", 3)
    found = roles(dataset)
    patients = {dataset.patient(case) for case in found["imagesTr"]}
    assert len(patients) == 3
    assert found["imagesTr"] == {f"{p}_f{f}" for p in patients for f in (1, 2)}
    everything = roles(RawDataset.load(source))
    assert found["imagesUn"] == (everything["imagesTr"] | everything["imagesUn"]) - found["imagesTr"]
    assert dataset.name == "Dataset050_Source_labeled3"
    assert dataset.json["numTraining"] == 6
    assert "6 labeled, 16 unlabeled" in out
    assert out.strip().endswith("next: nnssl_plan_and_preprocess -d 50 --verify_dataset_integrity")


@pytest.mark.parametrize("link", [[], ["--link"]])
def test_hidden_labels_are_physically_absent(subset, source: Path, link: list[str]):
    dataset, _, _ = subset("--labeled", 2, *link)
    labeled = set(dataset.cases("imagesTr"))
    assert labels_of(dataset) == {f"{case}.nii.gz" for case in labeled}
    hidden = {path.read_bytes() for path in (source / "labelsTr").iterdir() if path.name[:-7] not in labeled}
    for path in dataset.folder.rglob("*"):
        if path.is_dir():
            assert not path.is_symlink()
            continue
        assert path.read_bytes() not in hidden
        if path.is_symlink():
            case = path.name.removesuffix(".nii.gz")
            assert path.resolve().parent.name != "labelsTr" or case in labeled
    assert any(path.is_symlink() for path in dataset.folder.rglob("*")) == bool(link)


def test_draws_are_nested_and_seeded(subset):
    draws = {}
    for to, n in ((51, 1), (52, 2), (53, 4), (54, 8)):
        dataset, _, _ = subset("--labeled", n, to=to)
        draws[n] = {dataset.patient(case) for case in dataset.cases("imagesTr")}
    assert draws[1] < draws[2] < draws[4] < draws[8]
    again, _, _ = subset("--labeled", 4, to=55)
    assert {again.patient(case) for case in again.cases("imagesTr")} == draws[4]
    other, _, _ = subset("--labeled", 4, "--seed", 1, to=56)
    assert {other.patient(case) for case in other.cases("imagesTr")} != draws[4]


def test_draw_order_is_fixed_and_independent_of_the_others():
    patients = [f"p{i}" for i in range(20)]
    order = draw_order(patients, 7)
    assert order == draw_order(reversed(patients), 7)
    assert sorted(order) == sorted(patients)
    assert draw_order([p for p in patients if p != order[0]], 7) == order[1:]
    assert draw_order(["a", "b", "c", "d"], 0) == ["d", "a", "c", "b"]  # as sha256sum sorts them; fixed for good


def test_val_and_test_leave_the_unlabeled_pool_as_patients(subset):
    dataset, _, _ = subset("--labeled", 2, "--val_ids", ["p03_f1"], "--test_ids", ["p04", "p05"])
    found = roles(dataset)
    assert found["imagesVal"] == {"p03_f1", "p03_f2"}
    assert found["imagesTs"] == {"p04_f1", "p04_f2", "p05_f1", "p05_f2"}
    assert not {dataset.patient(c) for c in found["imagesTr"] | found["imagesUn"]} & {"p03", "p04", "p05"}
    assert len(found["imagesTr"]) == 4
    assert {p.name for p in (dataset.folder / "labelsVal").iterdir()} == {"p03_f1.nii.gz", "p03_f2.nii.gz"}
    assert len(list((dataset.folder / "labelsTs").iterdir())) == 4
    record = json.loads((dataset.folder / "nnssl_subset.json").read_text())
    assert record["left_out"] == ["p03_f3", "p03_f4"]


def test_holding_patients_out_does_not_reshuffle_the_draw(subset):
    plain, _, _ = subset("--labeled", 9, to=51)
    first = json.loads((plain.folder / "nnssl_subset.json").read_text())["labeled_patients"]
    held, _, _ = subset("--labeled", 4, "--test_ids", [first[1]], to=52)
    assert json.loads((held.folder / "nnssl_subset.json").read_text())["labeled_patients"] == [first[0], *first[2:5]]


def test_id_files_name_cases_or_patients_in_any_order(subset):
    one, _, err = subset("--labeled_ids", ["p07", "p02_f1", "p02_f2"], to=51)
    other, _, _ = subset("--labeled_ids", ["p02_f2", "p07_f1", "p07_f2", "p02_f1"], to=52)
    assert roles(one) == roles(other)
    assert set(one.cases("imagesTr")) == {"p02_f1", "p02_f2", "p07_f1", "p07_f2"}
    assert "whole patients" not in err
    part, _, err = subset("--labeled_ids", ["p02_f2"], to=53)
    assert set(part.cases("imagesTr")) == {"p02_f1", "p02_f2"}
    assert "whole patients are labeled, so these cases are too: p02_f1" in err


def test_unlabeled_frames_of_a_labeled_patient_stay_unlabeled(subset):
    dataset, _, _ = subset("--labeled_ids", ["p03"])
    assert {"p03_f3", "p03_f4"} <= set(dataset.cases("imagesUn"))
    assert set(dataset.cases("imagesTr")) == {"p03_f1", "p03_f2"}


def test_label_map_merges_names_and_values_everywhere(subset, source: Path):
    dataset, _, _ = subset("--labeled", 1, "--label_map", "1:1,2:1", "--val_ids", ["p08"], "--link")
    assert dataset.json["labels"] == {"background": 0, "front+back": 1}
    for folder in ("imagesTr", "imagesVal"):
        for case in dataset.cases(folder):
            new = dataset.label_file(folder, case)
            assert not new.is_symlink()
            np.testing.assert_array_equal(read_array(new)[0], read_array(source / "labelsTr" / new.name)[0] > 0)
    named, _, _ = subset("--labeled", 1, "--label_map", "1:0,2:1", "--label_names", "rear", to=51)
    assert named.json["labels"] == {"background": 0, "rear": 1}


def test_dataset_json_follows_the_selection(subset):
    dataset, _, _ = subset("--labeled_ids", ["p01"], "--test_ids", ["p03"])
    domains = {f"p{i:02d}_f{frame}": "AAAABBBBBC"[i] for i in range(10) for frame in (1, 2)}
    assert dataset.nnssl == {
        "patient_pattern": r"(p\d+)_",
        "domains": {**domains, "p03_f3": "A", "p03_f4": "A"},
    }
    without, _, _ = subset("--labeled_ids", ["p01"], "--val_ids", ["p03"], to=51)
    assert without.nnssl["domains"] == domains  # p03_f3 and p03_f4 are in no role


def test_record_repeats_the_selection(subset):
    first, _, _ = subset("--labeled", 3, "--seed", 5, "--test_ids", ["p00"])
    record = json.loads((first.folder / "nnssl_subset.json").read_text())
    assert record["source"] == "Dataset040_Source"
    assert record["seed"] == 5
    assert record["command"].startswith("nnssl_make_subset -d 40 -o 50 --labeled 3")
    again, _, _ = subset("--labeled_ids", record["labeled"], "--test_ids", record["test"], to=51)
    assert roles(again) == roles(first)


def test_val_and_test_of_the_source_are_kept_or_replaced(subset, source: Path, toy):
    content = json.loads((source / "dataset.json").read_text())
    content["nnssl"]["domains"] |= {"p91_f1": "A", "p02_f9": "A"}
    (source / "dataset.json").write_text(json.dumps(content))
    for kind, name in (("Val", "q1_f1"), ("Ts", "p02_f9")):
        toy.write(toy.scan(ord(kind[0])), source / f"images{kind}" / f"{name.replace('q', 'p9')}_0000.nii.gz")
        toy.write(toy.mask(ord(kind[0])), source / f"labels{kind}" / f"{name.replace('q', 'p9')}.nii.gz")
    kept, _, _ = subset("--labeled", 2)
    assert roles(kept)["imagesVal"] == {"p91_f1"}
    assert roles(kept)["imagesTs"] == {"p02_f9"}
    training = roles(kept)["imagesTr"] | roles(kept)["imagesUn"]
    assert not {"p02_f1", "p02_f2"} & training  # frames of a test patient
    replaced, out, _ = subset("--labeled", 2, "--test_ids", ["p00"], to=51)
    assert roles(replaced)["imagesTs"] == {"p00_f1", "p00_f2"}
    assert "p02_f9" not in roles(replaced)["imagesUn"]
    assert "left out" in out


def test_training_image_without_label_counts_as_unlabeled(subset, source: Path):
    (source / "labelsTr/p06_f1.nii.gz").unlink()
    dataset, _, _ = subset("--labeled_ids", ["p06"])
    assert set(dataset.cases("imagesTr")) == {"p06_f2"}
    assert "p06_f1" in dataset.cases("imagesUn")


def write_published(source: Path, **lists: object) -> None:
    content = {"source": "a paper", "protocols": {"Toy-2": 2}, "val": [], "test": [], **lists}
    (source / "nnssl_published_splits.json").write_text(json.dumps(content))


def test_published_protocol(subset, source: Path):
    write_published(source, train=["p05", "p01", "p99", "p02", "p03"], val=["p07"], test=["p08", "p98"])
    dataset, out, err = subset("--published", "Toy-2")
    found = {folder: {dataset.patient(case) for case in cases} for folder, cases in roles(dataset).items()}
    assert found == {
        "imagesTr": {"p05", "p01"},
        "imagesUn": {"p02", "p03"},
        "imagesVal": {"p07"},
        "imagesTs": {"p08"},
    }
    assert "p99" in err
    assert "p98" in err
    assert "labeled patients: p05, p01" in out
    record = json.loads((dataset.folder / "nnssl_subset.json").read_text())
    assert record["published"] == "Toy-2"
    assert record["published_source"] == "a paper"


def test_published_lists_can_be_overridden_by_a_development_list(subset, source: Path):
    write_published(source, train=["p05", "p01", "p02", "p03"], val=["p07"], test=["p08"])
    dataset, _, _ = subset("--published", "Toy-2", "--val_ids", ["p03"])
    assert set(dataset.cases("imagesVal")) == {"p03_f1", "p03_f2"}
    assert {dataset.patient(case) for case in dataset.cases("imagesUn")} == {"p02"}


def test_published_labeled_patients_are_all_there_or_refused(subset, source: Path):
    write_published(source, train=["p05", "p01", "p02", "p03"], val=["p07"], test=["p08"])
    assert "p01 in labeled and val" in subset("--published", "Toy-2", "--val_ids", ["p01"])[2]
    for path in (source / "labelsTr").glob("p01_*"):
        path.unlink()
    assert "need a label" in subset("--published", "Toy-2")[2]


def test_file_lists_of_dataset_json_do_not_lead_to_hidden_labels(subset, source: Path):
    content = json.loads((source / "dataset.json").read_text())
    files = {"images": ["imagesTr/p00_f1_0000.nii.gz"], "label": str(source / "labelsTr" / "p00_f1.nii.gz")}
    content |= {"dataset": {"p00_f1": files}, "training": [{"label": "./labelsTr/p00_f1.nii.gz"}]}
    (source / "dataset.json").write_text(json.dumps(content))
    dataset, _, _ = subset("--labeled_ids", ["p05"])
    assert "labelsTr" not in (dataset.folder / "dataset.json").read_text()


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--labeled", 11), ("1 to 10",)),
        (("--labeled", 0), ("1 to 10",)),
        (("--labeled", 10, "--test_ids", ["p00"]), ("1 to 9",)),
        (("--labeled_ids", ["p77"]), ("p77", "nearest")),
        (("--labeled_ids", ["p03"], "--val_ids", ["p03_f2"]), ("p03", "labeled and val")),
        (("--labeled_ids", ["p03"], "--test_ids", ["p03"]), ("p03", "labeled and test")),
        (("--labeled", 1, "--val_ids", ["p03"], "--test_ids", ["p03"]), ("p03", "val and test")),
        (("--labeled", 1, "--label_map", "1:1"), ("back (2)",)),
        (("--labeled", 1, "--label_map", "1:1,2:1,3:1"), ("3", "classes of the data set")),
        (("--labeled", 1, "--label_names", "one"), ("names every class",)),
        (("--published", "LB-4"), ("LA-4",)),
        (("--labeled_ids", []), ("at least one id",)),
        (("--labeled_ids", "nowhere.txt"), ("readable",)),
        (("--published", "LA-4"), ("at least one labeled patient",)),
    ],
)
def test_refusals_leave_nothing(subset, options: tuple, texts: tuple[str, ...]):
    dataset, _, err = subset(*options)
    assert dataset is None
    last = err.strip().splitlines()[-1]
    assert last.startswith("nnssl_make_subset: error: ")
    for text in texts:
        assert text in last


def test_id_in_use_is_refused(subset, run, source: Path):
    assert run(main, "-d", 40, "-o", 40, "--labeled", 1)[0] == 2


def test_val_without_label_is_refused(subset, source: Path, toy):
    content = json.loads((source / "dataset.json").read_text())
    content["nnssl"]["domains"]["p90_f1"] = "A"
    (source / "dataset.json").write_text(json.dumps(content))
    toy.write(toy.scan(900), source / "imagesUn/p90_f1_0000.nii.gz")
    assert "need a label" in subset("--labeled", 1, "--val_ids", ["p90"])[2]


def domains_of(dataset: RawDataset, folder: str) -> set[str]:
    return {dataset.nnssl["domains"][case] for case in dataset.cases(folder)}


def test_labels_come_from_labeled_domains_only(subset, source: Path):
    """Unsupervised domain adaptation: no label of the target is in the new data set."""
    dataset, out, _ = subset("--labeled", "all", "--labeled_domains", "A", "C")
    assert domains_of(dataset, "imagesTr") == {"A", "C"}
    assert len(dataset.cases("imagesTr")) == 10
    assert {case for case, domain in dataset.nnssl["domains"].items() if domain == "B"} <= set(
        dataset.cases("imagesUn")
    )
    assert labels_of(dataset) == {f"{case}.nii.gz" for case in dataset.cases("imagesTr")}
    assert "domains: A: 8 labeled, 2 unlabeled; B: 10 unlabeled; C: 2 labeled\n" in out
    record = json.loads((dataset.folder / "nnssl_subset.json").read_text())
    assert record["labeled_domains"] == ["A", "C"]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_a_number_is_spread_over_the_labeled_domains_and_nested(subset, n: int):
    dataset, _, _ = subset("--labeled", n, "--labeled_domains", "A", "B", to=51)
    more, _, _ = subset("--labeled", n + 1, "--labeled_domains", "A", "B", to=52)
    patients = {dataset.patient(case) for case in dataset.cases("imagesTr")}
    assert patients < {more.patient(case) for case in more.cases("imagesTr")}
    homes = ["AAAABBBBBC"[int(patient[1:])] for patient in patients]
    assert abs(homes.count("A") - homes.count("B")) <= 1
    assert homes.count("C") == 0


def test_one_domain_is_drawn_like_no_domain():
    patients = [f"p{i}" for i in range(12)]
    assert stratified_order(dict.fromkeys(patients, "A"), 3) == draw_order(patients, 3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("1",), {"A": 1, "B": 1, "C": 1}),
        (("2", "--labeled_domains", "A", "B"), {"A": 2, "B": 2}),
        (("2", "--unseen_domains", "C"), {"A": 2, "B": 2}),
        (("25%",), {"A": 1, "B": 2, "C": 1}),  # 1, 1.25 and 0.25 patients, rounded up
        (("25.5%", "--labeled_domains", "A"), {"A": 2}),
        (("60%", "--labeled_domains", "B"), {"B": 3}),
    ],
)
def test_patients_per_domain(subset, options: tuple, expected: dict[str, int]):
    dataset, _, _ = subset("--labeled_per_domain", *options)
    patients = {dataset.patient(case) for case in dataset.cases("imagesTr")}
    homes = ["AAAABBBBBC"[int(patient[1:])] for patient in patients]
    assert {name: homes.count(name) for name in set(homes)} == expected
    for name in expected:
        members = [f"p{i:02d}" for i in range(10) if "AAAABBBBBC"[i] == name]
        drawn = {patient for patient in patients if patient in members}
        assert drawn == set(draw_order(members, 0)[: len(drawn)])  # nested within the domain


def test_a_share_is_exact():
    """Shares and subjects of M&Ms as published: 2 % and 5 % of 95, 125 and 50; 7 % of 100 is 8 in floating point."""
    shares = [(2, 95, 2), (2, 125, 3), (2, 50, 1), (5, 95, 5), (5, 125, 7), (5, 50, 3), (7, 100, 7)]
    for percent, subjects, expected in shares:
        assert ceil(read_share("--labeled_per_domain", f"{percent}%") * subjects) == expected


def test_an_unseen_domain_is_the_test_set_and_nothing_else(subset, source: Path, toy):
    """Semi-supervised domain generalization: with labels where the source has them, wherever its cases lay."""
    content = json.loads((source / "dataset.json").read_text())
    content["nnssl"]["domains"] |= {"p91_f1": "B", "p92_f1": "B", "p93_f1": "A", "p94_f1": "A"}
    (source / "dataset.json").write_text(json.dumps(content))
    for case, kind in (("p91_f1", "Val"), ("p92_f1", "Un"), ("p93_f1", "Val"), ("p94_f1", "Ts")):
        toy.write(toy.scan(sum(map(ord, case))), source / f"images{kind}" / f"{case}_0000.nii.gz")
        if kind != "Un":
            toy.write(toy.mask(1), source / f"labels{kind}" / f"{case}.nii.gz")
    dataset, _, _ = subset("--labeled_per_domain", 1, "--unseen_domains", "B")
    found = roles(dataset)
    assert found["imagesTs"] == {f"p0{i}_f{f}" for i in range(4, 9) for f in (1, 2)} | {"p91_f1", "p92_f1", "p94_f1"}
    assert "B" not in {dataset.nnssl["domains"][case] for role in set(found) - {"imagesTs"} for case in found[role]}
    assert found["imagesVal"] == {"p93_f1"}
    labels = {path.name[:-7] for path in (dataset.folder / "labelsTs").iterdir()}
    assert labels == found["imagesTs"] - {"p92_f1"}
    assert json.loads((dataset.folder / "nnssl_subset.json").read_text())["unseen_domains"] == ["B"]
    assert "in val and test" in subset("--labeled", 1, "--unseen_domains", "B", "--val_ids", ["p05"], to=51)[2]


def test_watching_labels_of_an_unlabeled_domain_is_said(subset):
    options = ("--labeled", 2, "--labeled_domains", "A")
    assert "imagesVal holds labeled cases of B" in subset(*options, "--val_ids", ["p00", "p05"], to=51)[2]
    assert "imagesVal holds" not in subset(*options, "--val_ids", ["p00"], to=52)[2]


def test_a_patient_in_two_domains_is_refused_only_where_domains_matter(subset, source: Path):
    content = json.loads((source / "dataset.json").read_text())
    content["nnssl"]["domains"]["p00_f2"] = "B"
    (source / "dataset.json").write_text(json.dumps(content))
    assert "p00 (A, B)" in subset("--labeled", 1, "--labeled_domains", "A")[2]
    assert subset("--labeled", 1)[0] is not None


def test_a_subset_of_one_modality_gets_no_mixed_channel(subset, source: Path):
    content = json.loads((source / "dataset.json").read_text())
    content["channel_names"] = {"0": "CT"}
    content["nnssl"]["domain_modalities"] = {"A": "CT", "B": "CT", "C": "MR"}
    (source / "dataset.json").write_text(json.dumps(content))
    mixed, _, err = subset("--labeled", 1, to=51)
    assert mixed.channel_names == {"0": "zscore"}
    assert "z-scored by itself" in err
    content["nnssl"]["domain_modalities"]["C"] = "CT"
    (source / "dataset.json").write_text(json.dumps(content))
    plain, _, err = subset("--labeled", 1, to=52)
    assert plain.channel_names == {"0": "CT"}
    assert "z-scored" not in err


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (("--labeled", 1, "--labeled_domains", "a"), ("--labeled_domains", "'a'", "nearest: A")),
        (("--labeled", 1, "--unseen_domains", "siteX"), ("--unseen_domains", "'siteX'", "A, B, C")),
        (("--labeled", 5, "--labeled_domains", "A"), ("1 to 4", "in A")),
        (("--labeled", 1, "--labeled_domains", "A", "--unseen_domains", "A"), ("labeled or unseen",)),
        (("--labeled_per_domain", 2), ("1 to 1 in C",)),
        (("--labeled_per_domain", "0%"), ("at most 100%",)),
        (("--labeled_per_domain", "few"), ("P%",)),
        (("--labeled", "al"), ("N|all",)),
        (("--labeled_ids", ["p05"], "--labeled_domains", "A"), ("labels come from", "p05")),
        (("--labeled_ids", ["p05"], "--unseen_domains", "B"), ("p05", "labeled and test")),
    ],
)
def test_refusals_about_domains(subset, options: tuple, texts: tuple[str, ...]):
    dataset, _, err = subset(*options)
    assert dataset is None
    for text in texts:
        assert text in err.strip().splitlines()[-1]


@pytest.mark.parametrize("options", [("--labeled_domains", "A"), ("--unseen_domains", "A")])
def test_a_source_without_domains_or_with_gaps_is_refused(subset, source: Path, options: tuple):
    content = json.loads((source / "dataset.json").read_text())
    del content["nnssl"]["domains"]["p05_f1"]
    (source / "dataset.json").write_text(json.dumps(content))
    assert "none for p05_f1" in subset("--labeled", 1, *options)[2]
    del content["nnssl"]["domains"]
    (source / "dataset.json").write_text(json.dumps(content))
    assert "import with --domains" in subset("--labeled", 1, *options)[2]
