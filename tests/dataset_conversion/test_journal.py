"""A conversion that was interrupted goes on; one that met a fault in the data leaves nothing."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nnssl.dataset_conversion import writer
from nnssl.dataset_conversion.convert import ConvertOptions, convert
from nnssl.dataset_conversion.journal import NAME, Journal
from nnssl.errors import UserError
from nnssl.imageio import read_array
from nnssl.plans import verify

IDS = [f"img{i:04d}" for i in range(1, 6)]
PARTIAL = ".Dataset060_Synapse.unfinished"
pytestmark = pytest.mark.filterwarnings("ignore")  # that the release is not whole


@pytest.fixture
def synapse(raw: Path, download: Path, toy) -> Path:
    """Five cases of which each label has to be written, since its header is not its image's."""
    for i, name in enumerate(IDS):
        toy.write(toy.scan(i), download / f"Training/img/{name}.nii.gz")
        label = toy.mask(i)
        label.SetOrigin((0, 0, 0))
        toy.write(label, download / f"Training/label/{name.replace('img', 'label')}.nii.gz")
    return download


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None, BaseException], list[str]]:
    """Let the Nth case raise; return a list that collects the cases that are written."""
    original = writer.write_case

    def install(after: int | None = None, error: BaseException | None = None) -> list[str]:
        written: list[str] = []

        def write_case(case, task):
            if after is not None and len(written) == after:
                raise error
            written.append(case.name)
            return original(case, task)

        monkeypatch.setattr(writer, "write_case", write_case)
        return written

    return install


def files(folder: Path) -> dict[str, tuple]:
    """Name -> inode, time and bytes of every file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = (path.stat().st_ino, path.stat().st_mtime_ns, path.read_bytes())
    return found


def run(source: Path, **options: object) -> Path:
    return convert("Synapse", source, 60, options=ConvertOptions(**options))[0]


def interrupted(source: Path, stop: Callable, after: int = 3) -> Path:
    stop(after, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(source)
    return source


def test_goes_on_and_leaves_finished_files_alone(synapse: Path, raw: Path, stop):
    interrupted(synapse, stop)
    assert [path.name for path in raw.iterdir()] == [PARTIAL]
    before = files(raw / PARTIAL)
    del before[NAME]
    written = stop()
    folder = run(synapse)
    assert written == IDS[3:]
    after = files(folder)
    assert {name: after[name] for name in before} == before
    assert [path.name for path in raw.iterdir()] == [folder.name]
    assert NAME not in after


def test_result_is_that_of_an_unbroken_run(synapse: Path, raw: Path, stop, monkeypatch):
    interrupted(synapse, stop)
    stop()
    broken = {name: content for name, (_, _, content) in files(run(synapse)).items()}
    other = raw.parent / "other"
    other.mkdir()
    monkeypatch.setenv("nnUNet_raw", str(other))
    assert {name: content for name, (_, _, content) in files(run(synapse)).items()} == broken


def test_case_whose_source_has_changed_is_written_again(synapse: Path, stop, toy):
    interrupted(synapse, stop)
    toy.write(toy.scan(99), synapse / "Training/img/img0002.nii.gz")
    written = stop()
    folder = run(synapse)
    assert written == ["img0002", *IDS[3:]]
    array = read_array(folder / "imagesTr/img0002_0000.nii.gz")[0]
    assert (array == read_array(synapse / "Training/img/img0002.nii.gz")[0]).all()


def test_file_that_was_cut_short_is_written_again(synapse: Path, raw: Path, stop):
    interrupted(synapse, stop)
    path = raw / PARTIAL / "labelsTr/img0001.nii.gz"
    path.write_bytes(path.read_bytes()[:-5])
    written = stop()
    run(synapse)
    assert written == ["img0001", *IDS[3:]]


def test_case_that_has_left_the_download_leaves_the_result(synapse: Path, stop):
    interrupted(synapse, stop)
    (synapse / "Training/img/img0001.nii.gz").unlink()
    stop()
    assert not list(run(synapse).glob("*/img0001*"))


def test_other_options_start_afresh(synapse: Path, stop):
    interrupted(synapse, stop)
    written = stop()
    run(synapse, literature_crop=False, link=True)
    assert written == IDS


def test_full_disk_keeps_what_is_finished(synapse: Path, raw: Path, stop):
    stop(3, OSError(28, "No space left on device"))
    with pytest.raises(UserError, match="run the same command: it goes on"):
        run(synapse)
    written = stop()
    run(synapse)
    assert written == IDS[3:]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", ["write_text", "rename", "unlink"])
def test_a_kill_at_any_point_of_the_end_loses_no_case(synapse: Path, raw: Path, stop, call: str, after: bool):
    number, folder = 0, raw / "Dataset060_Synapse"
    while True:  # kill at the first such call, then at the second, until there is none more
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            calls = killed_at(patch, call, number, after)
            run(synapse)
        if len(calls) <= number:
            break
        written = stop()
        if folder.exists():  # the data set is whole
            with pytest.raises(UserError, match="a data set id is used once"):
                run(synapse)
        else:
            run(synapse)
        assert written == []
        assert [path.name for path in raw.iterdir()] == [folder.name]
        assert NAME not in files(folder)
        assert len(files(folder)) == 2 * len(IDS) + 2
        shutil.rmtree(folder)
        number += 1
    assert number > 0


def killed_at(patch: pytest.MonkeyPatch, name: str, number: int, after: bool) -> list[Path]:
    """Let a method of Path interrupt its Nth call on the data set, before or after it; return the list of calls."""
    original, calls = getattr(Path, name), []

    def call(path: Path, *args: object, **options: object) -> object:
        if "Dataset060" not in str(path):
            return original(path, *args, **options)
        calls.append(path)
        if len(calls) == number + 1 and not after:
            raise KeyboardInterrupt
        result = original(path, *args, **options)
        if len(calls) == number + 1:
            raise KeyboardInterrupt
        return result

    patch.setattr(Path, name, call)
    return calls


def test_fault_in_one_case_keeps_the_finished_ones(synapse: Path, raw: Path, stop, capsys):
    label = synapse / "Training/label/label0004.nii.gz"
    good = label.read_bytes()
    label.write_bytes(b"no image")
    with pytest.raises(UserError, match="every label must be readable"):
        run(synapse)
    assert [path.name for path in raw.iterdir()] == [PARTIAL]
    text = f"3 finished cases are kept in {raw / PARTIAL}: mend the fault and run the same command"
    assert text in capsys.readouterr().err
    label.write_bytes(good)
    written = stop()
    folder = run(synapse)
    assert written == IDS[3:]
    assert [path.name for path in raw.iterdir()] == [folder.name]


def test_fault_that_the_last_check_finds_keeps_the_other_cases(synapse: Path, raw: Path, stop, toy):
    label = synapse / "Training/label/label0002.nii.gz"
    good = label.read_bytes()
    wrong = toy.mask(1)
    wrong.SetSpacing((1.0, 1.0, 1.0))
    toy.write(wrong, label)
    with pytest.raises(UserError, match="one grid"):
        run(synapse)
    label.write_bytes(good)
    written = stop()
    run(synapse)
    assert written == ["img0002"]


def test_fault_before_any_case_is_finished_leaves_nothing(synapse: Path, raw: Path):
    (synapse / "Training/label/label0001.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match="every label must be readable"):
        run(synapse)
    assert list(raw.iterdir()) == []


def test_every_case_is_read_once_for_its_check(synapse: Path, monkeypatch, stop):
    interrupted(synapse, stop)
    stop()
    monkeypatch.setattr(verify, "scan_case", None)  # a second check of all cases would call it
    run(synapse)


def test_line_that_a_kill_cut_short_counts_as_not_written(tmp_path: Path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with Journal(tmp_path, {"x": 1}) as journal:
        journal.add("one", [tmp_path / "a"], [tmp_path / "a"], {"n": 1})
        journal.add("two", [tmp_path / "b"], [tmp_path / "b"], {"n": 2})
    path = tmp_path / NAME
    path.write_text(path.read_text()[:-9])
    for _ in range(2):  # a third run reads what the second has mended
        with Journal(tmp_path, {"x": 1}) as journal:
            assert journal.finished("one", [tmp_path / "a"])["record"] == {"n": 1}
            assert journal.finished("two", [tmp_path / "b"]) is None
            assert journal.finished("three", []) is None


def test_files_reach_the_disk_before_the_line_that_names_them(tmp_path: Path, monkeypatch):
    synced: list[tuple[str, int]] = []
    original = os.fsync

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.append((path.name, path.stat().st_size))
        original(descriptor)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no names of open files on this system")
    monkeypatch.setattr(os, "fsync", fsync)
    with Journal(tmp_path, {"x": 1}) as journal:
        (tmp_path / "a").write_text("abc")
        (tmp_path / "link").symlink_to(tmp_path / "a")
        synced.clear()
        before = (tmp_path / NAME).stat().st_size
        journal.add("one", [], [tmp_path / "a", tmp_path / "link"], {})
    assert [name for name, _ in synced] == ["a", NAME]
    assert synced[0][1] == 3
    assert synced[1][1] == (tmp_path / NAME).stat().st_size > before


def test_other_request_finds_an_empty_folder(tmp_path: Path):
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "a").write_text("a")
    with Journal(tmp_path, {"x": 1}):
        assert [path.name for path in tmp_path.iterdir()] == [NAME]
        assert json.loads((tmp_path / NAME).read_text()) == {"x": 1}


def _open(folder: str) -> str:
    try:
        with Journal(Path(folder), {"x": 1}):
            return "open"
    except UserError as error:
        return str(error)


@pytest.mark.skipif(os.name == "nt", reason="no lock there")
def test_second_process_is_kept_out(tmp_path: Path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        with Journal(tmp_path, {"x": 1}) as journal:
            journal.add("one", [], [], {})
            assert "one process at a time writes a data set" in pool.apply(_open, (str(tmp_path),))
            assert len((tmp_path / NAME).read_text().splitlines()) == 2
        assert pool.apply(_open, (str(tmp_path),)) == "open"
