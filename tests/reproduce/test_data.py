"""The converted data set is found or asked for, splits and references are there, a subset is never mistaken."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nnssl.cli.make_subset import main as make_subset
from nnssl.errors import UserError
from nnssl.reproduce.data import broken_masks, find_source, plan_subset, require_references
from nnssl.reproduce.recipe import Request, make_recipe
from nnssl.reproduce.run import Job, compare
from nnssl.reproduce.table import find_table


def words_of(plan, root):
    return plan.words(root / "ids", 1)[1:]


@pytest.mark.usefixtures("toy_paper")
def test_the_source_is_the_one_that_was_converted_from_the_tables_data_set(workspace, make_source):
    table = find_table("toy", "Toy-1")
    assert find_source(table, None).name == "Dataset950_Toy"
    make_source(workspace / "raw", "Dataset951_Again")
    with pytest.raises(UserError, match=r"Dataset950_Toy, Dataset951_Again.*name it with -d"):
        find_source(table, None)
    assert find_source(table, "951").name == "Dataset951_Again"
    for name in ("Dataset950_Toy", "Dataset951_Again"):
        shutil.rmtree(workspace / "raw" / name)
    with pytest.raises(UserError, match="nnssl_convert Toy SRC -d ID"):
        find_source(table, None)


def test_a_data_set_imported_by_hand_is_found_by_its_cases(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    from nnssl.dataset_conversion.published import load_published

    train = load_published("la.json")["train"]
    for number, cases in ((1, train[:3]), (2, train[:5])):  # LA-4 labels the first four
        folder = tmp_path / f"Dataset{number:03d}_X"
        for part in ("imagesTr", "labelsTr"):
            (folder / part).mkdir(parents=True)
        for case in cases:
            (folder / "imagesTr" / f"{case}_0000.nii.gz").touch()
            (folder / "labelsTr" / f"{case}.nii.gz").touch()
        (folder / "dataset.json").write_text(json.dumps({"file_ending": ".nii.gz"}))
    assert find_source(find_table("diffcl", "LA-4"), None).name == "Dataset002_X"
    with pytest.raises(UserError, match="nnssl_convert LA SRC"):
        find_source(find_table("diffcl", "LA-8"), None)


@pytest.mark.usefixtures("toy_paper")
def test_a_given_data_set_of_another_kind_is_refused(workspace, make_source):
    table = find_table("toy", "Toy-1")
    make_source(workspace / "raw", "Dataset951_Other", "ACDC")
    error = r"toy Toy-1 runs on the data set Toy; got Dataset951_Other, converted from ACDC; allowed one converted .*-d"
    with pytest.raises(UserError, match=error):
        find_source(table, "951")
    shutil.rmtree(workspace / "raw" / "Dataset950_Toy")
    with pytest.raises(UserError, match="none that fits"):  # as little as by its cases, which two kinds may share
        find_source(table, None)
    make_source(workspace / "raw")
    by_hand = make_source(workspace / "raw", "Dataset952_Hand", None)
    shutil.copy(workspace / "raw" / "Dataset950_Toy" / "nnssl_published_splits.json", by_hand)
    assert find_source(table, "952").name == "Dataset952_Hand"
    (by_hand / "labelsTr" / "case0.nii.gz").unlink()
    with pytest.raises(UserError, match=r"Dataset952_Hand, with 0 of 1 labeled cases; .*Toy-1 labels.*nnssl_convert"):
        find_source(table, "952")
    with pytest.raises(
        UserError, match=r"Dataset952_Hand, converted from nothing known; allowed one converted from Toy"
    ):
        find_source(replace(table, published=None), "952")


@pytest.mark.usefixtures("toy_paper")
def test_all_labels_are_those_of_the_training_list_without_the_test_cases(workspace):
    table = find_table("toy", "Toy-1")
    for test_ids, labeled in ((None, 4), (("case3", "case4"), 3)):
        plan = plan_subset(table, "all", None, test_ids)
        assert plan.existing() is None
        assert make_subset(words_of(plan, workspace)) == 0
        made = plan.existing()
        assert made is not None
        assert len(made.cases("imagesTr")) == labeled
        assert sorted(made.cases("imagesTs")) == sorted(test_ids or ["case5"])
        assert not set(made.cases("imagesTr")) & set(made.cases("imagesTs"))


def test_tables_share_the_subset_with_all_labels_where_it_is_the_same(workspace, make_source):
    names = {}
    for paper, table in (("diffcl", "LA-4"), ("diffcl", "LA-8"), ("generic_ssl", "LA-4"), ("diffrect", "ACDC-1")):
        found = find_table(paper, table)
        make_source(workspace / "raw", "Dataset951_X", found.dataset)
        names[paper, table] = [plan_subset(found, share, "951", None).name for share in ("few", "all")]
        other = replace(found, label_map="1:1")
        assert plan_subset(other, "all", "951", None).name != names[paper, table][1]
        assert plan_subset(found, "all", "951", ("a",)).name != names[paper, table][1]
    (la4, all4), (la8, all8), (other4, other_all), (_, acdc) = names.values()
    assert la4 == other4 != la8
    assert all4 == all8 == other_all != acdc


@pytest.mark.usefixtures("workspace", "toy_paper")
def test_a_tables_label_map_reaches_the_subset():
    table = replace(find_table("toy", "Toy-1"), label_map="1:1,2:0")
    plan = plan_subset(table, "few", None, None)
    assert make_subset(plan.words(Path(), 1)[1:]) == 0
    assert plan.existing().json["labels"] == {"background": 0, "box": 1}


@pytest.mark.usefixtures("toy_paper")
def test_substitute_test_cases_leave_training_and_name_another_subset(workspace):
    table = find_table("toy", "Toy-1")
    plain, own = (plan_subset(table, "few", None, ids) for ids in (None, ("case2", "case4")))
    assert plain.name != own.name != plan_subset(table, "few", None, ("case2",)).name
    assert own.name == plan_subset(table, "few", None, ("case4", "case2")).name
    assert make_subset(words_of(own, workspace)) == 0
    made = own.existing()
    assert sorted(made.cases("imagesTs")) == ["case2", "case4"]
    assert sorted(made.cases("imagesUn")) == ["case1", "case3"]
    assert plain.existing() is None


@pytest.mark.usefixtures("toy_paper")
@pytest.mark.parametrize("share", ["few", "all"])
def test_a_source_without_a_published_test_case_is_refused_unless_others_are_named(workspace, share):
    table = find_table("toy", "Toy-1")
    source = find_source(table, None)
    source.label_file("imagesTr", "case5").unlink()
    with pytest.raises(UserError, match=r"1 of \d are missing: case5; .*--test_ids"):
        plan_subset(table, share, None, None).words(workspace, 1)
    assert plan_subset(table, share, None, ("case3", "case4")).words(workspace, 1)[0] == "nnssl_make_subset"


@pytest.mark.usefixtures("toy_paper")
def test_unlabeled_cases_that_the_source_lacks_are_told_in_the_table(workspace):
    table = find_table("toy", "Toy-1")
    job = Job(table, table.rows, Request(), None, None, workspace / "o")
    plan = plan_subset(table, "few", None, None)
    assert plan.missing() == ""
    source = workspace / "raw" / "Dataset950_Toy"
    (source / "labelsTr" / "case1.nii.gz").unlink()  # an unlabeled case needs none
    assert plan.missing() == ""
    (source / "imagesTr" / "case1_0000.nii.gz").unlink()
    plan = plan_subset(table, "few", None, None)
    assert plan.missing() == "1 of 3 unlabeled ids missing"
    assert plan_subset(table, "all", None, None).missing() == ""  # which needs them with labels, and is refused
    assert make_subset(words_of(plan, workspace)) == 0
    name = plan.existing().name
    recipe = make_recipe(table, table.row("Control"), Request())
    scores = workspace / "o" / name / recipe.plans / recipe.name(0) / "test_mm.json"
    scores.parent.mkdir(parents=True)
    values = {"dice": 0.5, "jaccard": 0.4, "hd95": 1.0, "assd": 1.0}
    scores.write_text(json.dumps({"foreground_mean": values}))
    (line,) = [line for line in compare(job).splitlines() if "50.00" in line and "here, mm" in line]
    assert line.endswith("1 of 3 unlabeled ids missing")


@pytest.mark.usefixtures("toy_paper")
def test_a_folder_of_the_subsets_name_from_elsewhere_is_refused(workspace):
    plan = plan_subset(find_table("toy", "Toy-1"), "few", None, None)
    (workspace / "raw" / f"Dataset900_{plan.name}").mkdir()
    with pytest.raises(UserError, match=r"one subset of Dataset950_Toy; got Dataset900_Repro_Toy_1, from no record"):
        plan.existing()


@pytest.mark.usefixtures("toy_paper")
@pytest.mark.parametrize("share", ["few", "all"])
def test_a_subset_of_the_same_name_with_other_content_is_refused(workspace, share):
    table = find_table("toy", "Toy-1")
    plan = plan_subset(table, share, None, None)
    assert make_subset(words_of(plan, workspace)) == 0
    assert plan_subset(table, share, None, None).existing().name == f"Dataset800_{plan.name}"
    source = workspace / "raw" / "Dataset950_Toy"
    splits, content = source / "nnssl_published_splits.json", source / "dataset.json"
    changed = {
        splits: ('"case0", "case1", "case2"', '"case1", "case2"', "list of (un)?labeled cases"),
        content: ('"source": "Toy"', '"source": "Toy", "provenance": "label-cut"', "another provenance of the scans"),
    }
    for path, (old, new, error) in changed.items():
        before = path.read_text()
        path.write_text(before.replace(old, new))
        asked = plan_subset(table, share, None, None)
        if asked.name != plan.name:  # the lists are in the name of a subset with all labels
            assert (share, path, asked.existing()) == ("all", splits, None)
        else:
            with pytest.raises(UserError, match=f"the cases that Toy-1 asks of Dataset950_Toy now; .*{error}"):
                asked.existing()
        path.write_text(before)
    with pytest.raises(UserError, match="another label map"):
        replace(plan, label_map="1:1,2:0").existing()
    assert plan_subset(table, share, None, None).existing() is not None
    for path in source.glob("*Tr/case2*"):
        path.unlink()
    with pytest.raises(UserError, match=r"another list of (un)?labeled cases"):
        plan_subset(table, share, None, None).existing()


def test_a_split_that_is_not_there_says_what_to_do(workspace, toy_paper):
    path = toy_paper / "tables" / "toy.json"
    path.write_text(path.read_text().replace('"published": "Toy-1"', '"published": "Toy-2"'))
    from nnssl.reproduce import table

    table.tables_of.cache_clear()
    with pytest.raises(
        UserError, match=r"published split Toy-2 of Toy; .*nearest: .*Toy-1.*nnssl_published_splits.json"
    ):
        plan_subset(find_table("toy", "Toy-1"), "few", None, None)


@pytest.mark.usefixtures("toy_paper")
def test_cases_without_a_reference_are_refused(workspace):
    table = find_table("toy", "Toy-1")
    dataset = find_source(table, None)
    with pytest.raises(UserError, match=r"no case in imagesTs.*--test_ids"):
        require_references(table, dataset)
    shutil.copytree(dataset.folder / "imagesTr", dataset.folder / "imagesTs")
    with pytest.raises(UserError, match="none for case0"):
        require_references(table, dataset)


def test_torn_masks_are_found(workspace):
    folder = workspace / "raw" / "Dataset950_Toy" / "labelsTr"
    (folder / "notes.json").write_text("{")
    assert broken_masks(folder) == []
    torn = folder / "case3.nii.gz"
    torn.write_bytes(torn.read_bytes()[:40])
    assert broken_masks(folder) == [torn]
    assert broken_masks(workspace / "nowhere") == []
