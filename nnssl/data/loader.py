"""One loader for labeled, unlabeled and pseudo-labeled batches whose every batch is a function of (seed, rank, index).

A training loader is put together like nnU-Net's, with the plan's own sizes and augmentation::

    stock = self.get_training_transforms(patch_size, rotation, ds_scales, mirror_axes, dummy_2d, ...)
    labeled = LabeledLoader(dataset_tr, batch_size, initial_patch_size, patch_size, label_manager,
                            oversample_foreground_percent=0.33, transforms=labeled_transforms(stock))
    unlabeled = UnlabeledLoader(UnlabeledDataset(folder, cases, use_mask=any(use_mask_for_norm)), unlabeled_batch,
                                initial_patch_size, patch_size, label_manager, transforms=unlabeled_transforms(stock))
    loader = PairedLoader(labeled, unlabeled, seed=seed, rank=rank, start_index=iteration)
    batches = wrap_loader(loader, num_workers, pin_memory=device.type == "cuda")
    batch = next(batches)
    batches.close()

A validation loader is ``IndexedLoader(nnUNetDataLoader(...), seed=seed, stream=Stream.VAL_BATCH)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from queue import Empty
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from batchgenerators.dataloading.data_loader import SlimDataLoaderBase
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from threadpoolctl import threadpool_limits

from nnssl.data.seeding import Stream, derive_seed, isolated_cpu_randomness, seed_cpu
from nnssl.data.unlabeled import NonzeroMask
from nnssl.data.views import ViewTransforms
from nnssl.errors import UserError

Batch = dict[str, Any]


class LabeledLoader(nnUNetDataLoader):
    """Draw labeled batches as nnU-Net does, with a weak view when the transforms make one.

    The constructor is nnU-Net's. Batch: ``data`` float32 (b, c, ...), ``target`` int16 (b, 1, ...) or a list of them
    under deep supervision, ``keys``; with ``labeled_transforms(stock, weak_view=True)`` also ``weak`` (b, c, ...).
    """

    def generate_train_batch(self) -> Batch:
        if not isinstance(self.transforms, ViewTransforms):
            return super().generate_train_batch()
        views, self.transforms = self.transforms, _StackedViews(self.transforms)
        try:
            batch = super().generate_train_batch()
        finally:
            self.transforms = views
        strong, weak = batch["data"].chunk(2, dim=1)
        return {**batch, "data": strong.contiguous(), "weak": weak.contiguous()}


class PseudoLoader(nnUNetDataLoader):
    """Draw crops of cases with masks of unknown quality, each case in proportion to its weight.

    The constructor is nnU-Net's; ``sampling_probabilities`` are the weights, made to sum to 1, and the label manager
    has an ignore label, the value of unsure voxels. Batch: ``data`` float32 (p, c, ...), ``target`` as in
    `LabeledLoader` with unsure voxels ignored, ``weight`` float32 (p,), ``keys``. ``weight`` is what an item's loss is
    still to be multiplied with: 1, because the draw has followed the weights.
    """

    def generate_train_batch(self) -> Batch:
        return {**super().generate_train_batch(), "weight": torch.ones(self.batch_size)}


class _StackedViews:
    """Hand both views through nnU-Net's loader, which knows one image, as twice the channels."""

    def __init__(self, views: ViewTransforms) -> None:
        self.views = views

    def __call__(self, **data_dict: Any) -> dict:
        result = self.views(**data_dict)
        result["image"] = torch.cat((result["image"], result.pop("weak")))
        return result


class UnlabeledLoader(nnUNetDataLoader):
    """Draw unlabeled crops uniformly: no label is read, no foreground is oversampled.

    The constructor is nnU-Net's; ``data`` is an `UnlabeledDataset` and ``transforms`` are `unlabeled_transforms`.
    Cases are drawn with replacement and crops uniformly over the case.
    Batch: ``weak`` and ``strong`` float32 (u, c, ...), ``valid`` bool (u, 1, ...), ``keys``. ``valid`` is False in
    padding, and outside the nonzero mask if the data set loads it.

    Raises:
        ValueError: the transforms make no two views, or mask the image while the data set loads no mask.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.has_ignore = False  # the ignore label makes nnU-Net crop around annotated voxels
        self.oversample_foreground_percent = 0.0
        if not isinstance(self.transforms, ViewTransforms):
            raise ValueError("UnlabeledLoader needs transforms from nnssl.data.views.unlabeled_transforms")
        if self.transforms.masks_image and not self._data.use_mask:
            raise ValueError("transforms mask the image, so UnlabeledDataset needs use_mask=True")

    def generate_train_batch(self) -> Batch:
        keys = [str(key) for key in self.get_indices()]
        with torch.no_grad(), threadpool_limits(limits=1, user_api=None):
            samples = [self._sample(key) for key in keys]
        stacked = {name: torch.stack([sample[name] for sample in samples]) for name in ("weak", "strong", "valid")}
        return {**stacked, "keys": keys}

    def _sample(self, key: str) -> dict[str, torch.Tensor]:
        data, mask, _, _ = self._data.load_case(key)
        lower, upper = self.get_bbox(data.shape[1:], False, None)
        bbox = [[int(start), int(stop)] for start, stop in zip(lower, upper, strict=True)]
        image = torch.from_numpy(crop_and_pad_nd(data, bbox, 0)).float()
        inside = torch.from_numpy(_crop_inside(mask, data.shape[1:], bbox))
        if self.patch_size_was_2d:
            image, inside = image[:, 0], inside[:, 0]
        views = self.transforms(image=image, segmentation=inside)
        return {"weak": views["weak"], "strong": views["image"], "valid": views["segmentation"] >= 0}


def _crop_inside(mask: NonzeroMask | None, shape: tuple[int, ...], bbox: list[list[int]]) -> np.ndarray:
    """Crop the mask, int16 (1, ...): 0 where the image counts, -1 in padding and outside the nonzero mask."""
    crop = np.full((1, *(stop - start for start, stop in bbox)), -1, np.int16)
    stored = [slice(max(start, 0), min(stop, size)) for (start, stop), size in zip(bbox, shape, strict=True)]
    target = [slice(s.start - start, s.stop - start) for s, (start, _) in zip(stored, bbox, strict=True)]
    crop[(slice(None), *target)] = 0 if mask is None else mask[(slice(None), *stored)]
    return crop


@contextmanager
def _private_draw(threads: int = 1) -> Iterator[None]:
    """Draw with one torch thread, as the workers do, and leave generators and thread count as they were."""
    before = torch.get_num_threads()
    with isolated_cpu_randomness():
        if before != threads:
            torch.set_num_threads(threads)
        try:
            yield
        finally:
            if before != threads:
                torch.set_num_threads(before)


class IndexedLoader(SlimDataLoaderBase):
    """Yield labeled batches that depend on (seed, rank, stream, index) only.

    The k-th batch of worker w among n has index ``start_index + w + k * n``, so that n workers read in turn give
    batches start_index, start_index + 1, ... for every n. The process's own generators are left untouched.

    Args:
        labeled: an nnU-Net loader.
        seed: the run's seed.
        rank: rank under distributed training; every rank draws its own batches.
        stream: names the source of randomness, `Stream.VAL_BATCH` for validation.
        start_index: index of the first batch.
    """

    def __init__(
        self,
        labeled: nnUNetDataLoader,
        *,
        seed: int,
        rank: int = 0,
        stream: int = Stream.TRAIN_BATCH,
        start_index: int = 0,
    ) -> None:
        super().__init__(labeled._data, labeled.batch_size, number_of_threads_in_multithreaded=1)
        derive_seed(seed, rank, stream, start_index)  # refuse unusable numbers here, not in a worker
        self.labeled, self.seed, self.rank = labeled, seed, rank
        self.stream, self.start_index = stream, start_index
        self._drawn = 0

    def set_thread_id(self, thread_id: int) -> None:
        """Take over the work of one worker, counted from 0 (called by batchgenerators)."""
        super().set_thread_id(thread_id)
        self._drawn = 0

    @property
    def next_index(self) -> int:
        """Return the index of this worker's next batch."""
        return self.start_index + self.thread_id + self._drawn * self.number_of_threads_in_multithreaded

    def generate_train_batch(self) -> Batch:
        batch = self.batch_at(self.next_index)
        self._drawn += 1
        return batch

    def batch_at(self, index: int) -> Batch:
        """Draw the batch with the given index."""
        return self._draw(self.labeled, self.stream, index)

    def _draw(self, loader: nnUNetDataLoader, stream: int, index: int) -> Batch:
        with _private_draw():
            seed_cpu(derive_seed(self.seed, self.rank, stream, index))
            batch = loader.generate_train_batch()
        batch["keys"] = [str(key) for key in batch["keys"]]
        return batch


class PairedLoader(IndexedLoader):
    """Yield labeled, unlabeled and pseudo-labeled batches as one.

    Each has a random stream of its own: labeled batches are the same whether or not others are drawn. Batch: the
    labeled one (see `LabeledLoader`) plus ``unlabeled`` and ``pseudo``, dictionaries (see `UnlabeledLoader` and
    `PseudoLoader`).

    Args:
        labeled: loader of labeled batches.
        unlabeled: loader of unlabeled batches, None to draw none (the batch then has no ``unlabeled``).
        pseudo: loader of batches with masks of unknown quality, None to draw none (no ``pseudo``).
        seed, rank, start_index: see `IndexedLoader`.
    """

    def __init__(
        self,
        labeled: nnUNetDataLoader,
        unlabeled: UnlabeledLoader | None = None,
        pseudo: PseudoLoader | None = None,
        *,
        seed: int,
        rank: int = 0,
        start_index: int = 0,
    ) -> None:
        super().__init__(labeled, seed=seed, rank=rank, stream=Stream.TRAIN_BATCH, start_index=start_index)
        self.unlabeled, self.pseudo = unlabeled, pseudo

    def batch_at(self, index: int) -> Batch:
        batch = super().batch_at(index)
        if self.unlabeled is not None:
            batch["unlabeled"] = self._draw(self.unlabeled, Stream.UNLABELED_BATCH, index)
        if self.pseudo is not None:
            batch["pseudo"] = self._draw(self.pseudo, Stream.PSEUDO_BATCH, index)
        return batch


class InProcessBatches(SingleThreadedAugmenter):
    """Draw batches in this process."""

    def close(self) -> None:
        """Do nothing: there are no workers."""


class _WorkerQueue:
    """Receive from a worker, and take a batch that its sender could not hand over during shutdown for no batch.

    Tensors travel as file descriptors, which only a living sender can pass on. Without this, closing prints a
    traceback whenever a worker leaves while its last batch is being received.
    """

    def __init__(self, queue: Any, closing: Any) -> None:
        self._queue, self._closing = queue, closing

    def get(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._queue.get(*args, **kwargs)
        except (OSError, EOFError) as error:
            if self._closing.is_set():
                raise Empty from error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)


class WorkerBatches(MultiThreadedAugmenter):
    """Draw batches in worker processes and hand them out in order of their index."""

    def _start(self) -> None:
        super()._start()
        # the collecting thread looks its queues up in this list every time
        self._queues[:] = [_WorkerQueue(queue, self.abort_event) for queue in self._queues]

    def __next__(self) -> Batch:
        if not self.was_initialized:
            self._start()
        try:
            while True:
                try:
                    return self.pin_memory_queue.get(timeout=self.wait_time)
                except Empty:
                    self._refuse_dead_workers()
        except KeyboardInterrupt:
            self.close()
            raise

    def _refuse_dead_workers(self) -> None:
        # batchgenerators waits for ever if the thread that collects batches died (shared memory, pinning)
        alive = all(worker.is_alive() for worker in self._processes) and self.pin_memory_thread.is_alive()
        if alive and not self.abort_event.is_set():
            return
        self.close()
        raise UserError(
            "data loading workers stay alive during training",
            f"a dead one among {self.num_processes}",
            None,
            "read the message above; set nnUNet_n_proc_DA=0 to load in the main process and see the error itself, or "
            "to a smaller number if memory ran out; give containers shared memory (docker --shm-size=8g or --ipc=host)",
        )

    def close(self) -> None:
        """Stop the workers; batches drawn after that start at ``start_index`` again."""
        self._finish()


def wrap_loader(
    loader: IndexedLoader, num_workers: int, pin_memory: bool = False, num_cached: int = 2
) -> InProcessBatches | WorkerBatches:
    """Iterate over a loader's batches from its ``start_index`` on, the same for any number of workers.

    nnU-Net's shutdown in ``on_train_end`` works on the result; elsewhere call ``close()``.

    Args:
        loader: the loader; it pickles, so any multiprocessing start method will do.
        num_workers: worker processes, 0 to draw in this process.
        pin_memory: whether to copy batches into pinned memory, if CUDA is there.
        num_cached: batches each worker keeps ready.

    Raises:
        UserError: ``num_workers`` is negative; later, while iterating, when a worker died.
    """
    if num_workers < 0:
        raise UserError("the number of data loading workers is not negative", num_workers, ">= 0", "set it to 0")
    loader.number_of_threads_in_multithreaded = max(1, num_workers)
    loader.set_thread_id(0)
    if num_workers == 0:
        return InProcessBatches(loader, None)
    return WorkerBatches(loader, None, num_workers, num_cached_per_queue=num_cached, pin_memory=pin_memory)
