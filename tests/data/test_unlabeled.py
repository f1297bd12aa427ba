import numpy as np
import pytest

from nnssl.data.unlabeled import UnlabeledDataset
from nnssl.errors import UserError


def test_a_case_is_its_image_and_the_sign_of_its_mask(toy, folders):
    dataset = UnlabeledDataset(folders.unlabeled, use_mask=True)
    data, mask, previous, properties = dataset.load_case("un_1")
    expected, seg = toy.random_case(11)
    assert np.array_equal(data[:], expected.astype(np.float32))
    assert np.array_equal(mask[:], seg)
    assert mask.shape == seg.shape
    assert mask[:].dtype == np.int16
    assert previous is None
    assert properties == {}


def test_labels_in_the_mask_file_never_come_out(toy, tmp_path):
    data, seg = toy.random_case(0)
    seg[:, 5:9] = 3
    toy.write_case(tmp_path, "case", data, seg)
    dataset = UnlabeledDataset(tmp_path, use_mask=True)
    assert set(np.unique(dataset.load_case("case")[1][:])) == {-1, 0}
    assert np.array_equal(dataset.load_case("case")[1][:, 5:9] < 0, seg[:, 5:9] < 0)


def test_only_the_image_file_is_needed_without_mask(toy, tmp_path):
    toy.write_case(tmp_path, "case", *toy.random_case(0))
    (tmp_path / "case_seg.b2nd").unlink()
    (tmp_path / "case.pkl").unlink()
    data, mask, _, _ = UnlabeledDataset(tmp_path).load_case("case")
    assert mask is None
    assert data.shape == (2, 18, 20, 22)


def test_identifiers_are_sorted_and_unique_whatever_the_order_given(folders):
    assert UnlabeledDataset(folders.unlabeled).identifiers == ["un_0", "un_1", "un_2", "un_3"]
    assert UnlabeledDataset(folders.unlabeled, ["un_3", "un_0", "un_3"]).identifiers == ["un_0", "un_3"]


def test_missing_cases_folders_and_empty_lists_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match=r"un_7\.b2nd.*nearest: un_.*nnssl_plan_and_preprocess"):
        UnlabeledDataset(folders.unlabeled, ["un_0", "un_7"])
    with pytest.raises(UserError, match="nnssl_plan_and_preprocess"):
        UnlabeledDataset(tmp_path / "absent")
    with pytest.raises(UserError, match="holds cases"):
        UnlabeledDataset(folders.unlabeled, [])
