import multiprocessing
import os
import pickle
import signal
from queue import Empty

import numpy as np
import pytest
import torch
from batchgenerators.dataloading import multi_threaded_augmenter
from nnssl_test_tools import equal, take
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnssl.data.loader import IndexedLoader, UnlabeledLoader, _WorkerQueue, wrap_loader
from nnssl.data.seeding import Stream, seed_everything
from nnssl.data.unlabeled import UnlabeledDataset
from nnssl.data.views import unlabeled_transforms
from nnssl.errors import UserError


@pytest.mark.parametrize("dim", [2, 3])
def test_a_batch_holds_what_methods_rely_on(make_loader, toy, dim):
    batch = take(make_loader(dim), 1)[0]
    assert batch.keys() == {"data", "target", "keys", "unlabeled"}
    assert batch["data"].shape == (2, 2, *toy.patch[dim])
    assert batch["target"].shape == (2, 1, *toy.patch[dim])
    assert (batch["data"].dtype, batch["target"].dtype) == (torch.float32, torch.int16)
    unlabeled = batch["unlabeled"]
    assert unlabeled.keys() == {"weak", "strong", "valid", "keys"}  # nothing that could hold a label
    assert unlabeled["weak"].shape == unlabeled["strong"].shape == (3, 2, *toy.patch[dim])
    assert unlabeled["weak"].dtype == unlabeled["strong"].dtype == torch.float32
    assert unlabeled["valid"].shape == (3, 1, *toy.patch[dim])
    assert unlabeled["valid"].dtype == torch.bool
    assert all(type(key) is str and key.startswith("lab_") for key in batch["keys"])
    assert all(type(key) is str and key.startswith("un_") for key in unlabeled["keys"])


@pytest.mark.parametrize("dim", [2, 3])
def test_batches_do_not_depend_on_the_number_of_workers(make_loader, dim):
    reference = take(make_loader(dim), 5)
    assert not equal(reference[0]["unlabeled"]["weak"], reference[1]["unlabeled"]["weak"])
    assert not equal(reference[0]["data"], reference[1]["data"])
    for workers in (1, 2):
        assert all(map(equal, reference, take(make_loader(dim), 5, workers)))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_continues_exactly_at_any_index(make_loader, workers):
    reference = take(make_loader(), 6)
    assert all(map(equal, reference[3:], take(make_loader(start_index=3), 3, workers)))


def test_seed_and_rank_choose_other_batches(make_loader):
    first = take(make_loader(), 1)[0]
    for other in (make_loader(seed=8), make_loader(rank=1)):
        batch = take(other, 1)[0]
        assert not torch.equal(batch["data"], first["data"])
        assert not torch.equal(batch["unlabeled"]["weak"], first["unlabeled"]["weak"])


@pytest.mark.parametrize("weak_view", [False, True])
def test_labeled_batches_are_the_same_without_unlabeled_ones_and_with_a_weak_view(make_loader, weak_view):
    control = take(make_loader(unlabeled=False), 6)
    batches = take(make_loader(weak_view=weak_view), 6)
    for expected, batch in zip(control, batches, strict=True):
        assert "unlabeled" not in expected
        assert equal(expected, {key: batch[key] for key in ("data", "target", "keys")})
        assert ("weak" in batch) == weak_view
        if weak_view:
            assert batch["weak"].shape == batch["data"].shape
    if weak_view:
        same = [torch.equal(b["weak"][i], b["data"][i]) for b in batches for i in range(2)]
        assert any(same)  # no intensity transform was drawn
        assert not all(same)


def test_unlabeled_batches_do_not_follow_the_labeled_ones(make_loader):
    """Make both draw two of three cases: from equal random streams they would draw equal positions."""
    loader = make_loader()
    loader.unlabeled.indices, loader.unlabeled.batch_size = ["un_0", "un_1", "un_2"], 2
    batches = take(loader, 12)
    labeled = [key[-1] for batch in batches for key in batch["keys"]]
    unlabeled = [key[-1] for batch in batches for key in batch["unlabeled"]["keys"]]
    assert labeled != unlabeled
    assert set(labeled) == set(unlabeled) == {"0", "1", "2"}


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_process_its_randomness(make_loader, workers):
    seed_everything(1, 0, Stream.STEP, 0)
    before, threads = (np.random.get_state()[1].copy(), torch.get_rng_state()), torch.get_num_threads()
    take(make_loader(), 2, workers)
    assert np.array_equal(np.random.get_state()[1], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.get_num_threads() == threads


def test_batches_do_not_depend_on_the_processs_randomness(make_loader):
    seed_everything(1, 0, Stream.STEP, 0)
    first = take(make_loader(), 1)
    seed_everything(2, 0, Stream.STEP, 0)
    assert equal(first[0], take(make_loader(), 1)[0])


def test_labels_in_the_mask_files_of_unlabeled_cases_change_nothing(make_loader, toy, tmp_path):
    for number in range(4):
        data, seg = toy.random_case(10 + number)
        seg[(seg == 0) & (data[:1] > 0)] = 1
        toy.write_case(tmp_path, f"un_{number}", data, seg, {"class_locations": {1: np.argwhere(seg == 1)}})
    for use_mask in (False, True):
        clean, poisoned = (
            take(make_loader(use_mask=use_mask), 3),
            take(make_loader(use_mask=use_mask, folder=tmp_path), 3),
        )
        assert all(map(equal, clean, poisoned))


@pytest.mark.parametrize("dim", [2, 3])
def test_valid_is_false_exactly_in_padding(toy, make_loader, tmp_path, dim):
    shape = (7, 8, 9)  # smaller than the patch along every axis
    toy.write_case(tmp_path, "small", np.ones((2, *shape)), np.zeros((1, *shape)))
    loader = make_loader(dim, folder=tmp_path).unlabeled
    loader.transforms = unlabeled_transforms(toy.stock_transforms(dim, rotation_for_DA=(0, 0)), strong=[])
    loader.transforms.steps[0][1].p_scaling = loader.transforms.steps[0][1].p_rotation = 0
    batch = loader.generate_train_batch()
    assert torch.equal(batch["valid"].expand_as(batch["weak"]), batch["weak"] == 1)
    assert torch.equal(~batch["valid"].expand_as(batch["weak"]), batch["weak"] == 0)
    expected = np.prod([min(p, s) for p, s in zip(toy.patch[dim], shape[-dim:], strict=True)])
    assert (batch["valid"].flatten(1).sum(1) == int(expected)).all()


@pytest.mark.parametrize("use_mask", [False, True])
def test_valid_follows_the_nonzero_mask_only_where_it_is_used(make_loader, use_mask):
    batches = [batch["unlabeled"] for batch in take(make_loader(2, use_mask=use_mask), 8)]
    invalid = torch.cat([~batch["valid"] for batch in batches]).float().mean()
    masked = [(batch["weak"] == 0).all(1, keepdim=True) for batch in batches]
    assert invalid > 0.15 if use_mask else invalid < 0.15
    assert all(torch.equal(mask, ~batch["valid"]) for mask, batch in zip(masked, batches, strict=True)) == use_mask


def test_the_ignore_label_and_foreground_oversampling_do_not_reach_unlabeled_cases(folders, toy):
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    manager = LabelManager({"background": 0, "organ": 1, "ignore": 2}, None)
    loader = UnlabeledLoader(
        UnlabeledDataset(folders.unlabeled),
        2,
        toy.initial[3],
        toy.patch[3],
        manager,
        oversample_foreground_percent=1.0,
        transforms=unlabeled_transforms(toy.stock_transforms(3)),
    )
    assert loader.generate_train_batch()["weak"].shape == (2, 2, *toy.patch[3])
    assert not any(loader.get_do_oversample(i) for i in range(2))


def test_wrong_transforms_and_a_missing_mask_are_refused(folders, toy):
    arguments = (UnlabeledDataset(folders.unlabeled), 2, toy.initial[3], toy.patch[3])
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    manager = LabelManager({"background": 0, "organ": 1}, None)
    with pytest.raises(ValueError, match="unlabeled_transforms"):
        UnlabeledLoader(*arguments, manager, transforms=toy.stock_transforms(3))
    with pytest.raises(ValueError, match="use_mask"):
        UnlabeledLoader(*arguments, manager, transforms=unlabeled_transforms(toy.stock_transforms(3, True)))


def test_validation_batches_have_a_stream_of_their_own(make_loader):
    labeled = make_loader(unlabeled=False).labeled
    train = take(IndexedLoader(labeled, seed=7), 1)[0]
    validation = take(IndexedLoader(labeled, seed=7, stream=Stream.VAL_BATCH), 1)[0]
    assert validation.keys() == {"data", "target", "keys"}
    assert not torch.equal(train["data"], validation["data"])
    assert equal(train, take(make_loader(unlabeled=False), 1)[0])
    assert isinstance(labeled, nnUNetDataLoader)


def test_loaders_pickle_and_the_copy_draws_the_same(make_loader):
    loader = make_loader(weak_view=True)
    first = take(loader, 1)[0]
    data = pickle.dumps(loader)
    assert len(data) < 1_000_000
    assert equal(first, pickle.loads(data).batch_at(0))


def test_workers_started_by_spawn_draw_the_same(make_loader, monkeypatch):
    context = multiprocessing.get_context("spawn")
    for name in ("Process", "Queue", "Event"):
        monkeypatch.setattr(multi_threaded_augmenter, name, getattr(context, name))
    reference = take(make_loader(), 2)
    assert all(map(equal, reference, take(make_loader(), 2, workers=1)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # batchgenerators' own raise
def test_a_dead_worker_is_reported_with_a_remedy(make_loader):
    batches = wrap_loader(make_loader(), 2)
    next(batches)
    os.kill(batches._processes[1].pid, signal.SIGKILL)
    with pytest.raises(UserError, match="nnUNet_n_proc_DA=0"):
        [next(batches) for _ in range(200)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_a_worker_is_reported(make_loader, capfd):
    loader = make_loader()
    loader.unlabeled.indices = ["absent"]
    with pytest.raises(UserError, match="alive"):
        take(loader, 1, workers=1)
    assert "absent" in capfd.readouterr().out


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_nnunet_shuts_the_workers_down_without_noise(make_loader, capfd):
    for _ in range(3):
        batches = wrap_loader(make_loader(), 2)
        next(batches)
        workers = list(batches._processes)
        assert isinstance(batches, multi_threaded_augmenter.MultiThreadedAugmenter)  # what on_train_end looks for
        batches._finish()
        assert not any(worker.is_alive() for worker in workers)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_batch_lost_at_shutdown_is_no_error_but_one_lost_in_training_is():
    class LosesItsSender:
        def get(self, timeout):
            raise ConnectionRefusedError

        def empty(self):
            return False

    closing = multiprocessing.Event()
    queue = _WorkerQueue(LosesItsSender(), closing)
    with pytest.raises(ConnectionRefusedError):
        queue.get(timeout=0.1)
    closing.set()
    with pytest.raises(Empty):
        queue.get(timeout=0.1)
    assert queue.empty() is False


def test_a_closed_iterator_starts_over_at_its_start_index(make_loader):
    batches = wrap_loader(make_loader(start_index=2), 2)
    first = next(batches)
    batches.close()
    again = next(batches)
    batches.close()
    assert equal(first, again)


def test_unusable_numbers_are_refused_before_any_worker_starts(make_loader):
    with pytest.raises(UserError, match="32-bit"):
        make_loader(seed=-1)
    with pytest.raises(UserError, match="workers"):
        wrap_loader(make_loader(), -1)
