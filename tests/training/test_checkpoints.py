"""A checkpoint survives a kill and a full disk, and nothing in it is executed."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nnssl.errors import UserError
from nnssl.training.checkpoints import load_safely, plain, require_safe, require_space, save_atomically


def checkpoint(value: float) -> dict:
    return {"network_weights": {"w": torch.full((1000,), value)}, "logging": {"dice": [0.5, None]}}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    save_atomically(checkpoint(3.0), tmp_path / "c.pth")
    loaded = load_safely(tmp_path / "c.pth")
    assert torch.equal(loaded["network_weights"]["w"], torch.full((1000,), 3.0))
    assert loaded["logging"] == {"dice": [0.5, None]}
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_plain_turns_numpy_into_pythons_own_values():
    result = plain(
        {"a": np.float64(0.5), "b": [np.int64(2), (np.bool_(True), "x")], "c": np.arange(2), "d": np.str_("k")}
    )
    assert result == {"a": 0.5, "b": [2, (True, "x")], "c": [0, 1], "d": "k"}
    assert [type(result["a"]), type(result["b"][0]), type(result["b"][1][0]), type(result["d"])] == [
        float,
        int,
        bool,
        str,
    ]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_kill_9_during_a_write_leaves_the_old_checkpoint_whole(tmp_path, share):
    path = tmp_path / "checkpoint_latest.pth"
    save_atomically(checkpoint(1.0), path)
    code = f"""
import io, os, signal, torch
from pathlib import Path
from nnssl.training import checkpoints
save = torch.save
def dying(content, file):
    buffer = io.BytesIO()
    save(content, buffer)
    file.write(buffer.getvalue()[: int({share} * buffer.tell())])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = dying
checkpoints.save_atomically({{"network_weights": {{"w": torch.full((1000,), 2.0)}}}}, Path({str(path)!r}))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert run.returncode == -signal.SIGKILL
    assert torch.equal(load_safely(path)["network_weights"]["w"], torch.full((1000,), 1.0))
    save_atomically(checkpoint(4.0), path)  # the torn temporary file is in nobody's way
    assert torch.equal(load_safely(path)["network_weights"]["w"], torch.full((1000,), 4.0))


def test_a_full_disk_at_save_keeps_the_old_checkpoint_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "c.pth"
    save_atomically(checkpoint(1.0), path)

    def full(content, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"No space left.*old checkpoint stays.*--c"):
        save_atomically(checkpoint(2.0), path)
    assert torch.equal(load_safely(path)["network_weights"]["w"], torch.full((1000,), 1.0))
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


def test_too_little_room_is_refused_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    require_space(tmp_path, 1000)
    with pytest.raises(UserError, match="room for two checkpoints"):
        require_space(tmp_path, 1001)


def test_a_results_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="must be writable"):
        require_space(tmp_path / "file" / "results", 1)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_checkpoint_that_would_execute_code_is_refused_unexecuted(tmp_path):
    torch.save({"network_weights": {}, "x": Bomb(tmp_path / "executed")}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="weights only"):
        require_safe(tmp_path / "c.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(UserError, match="weights only"):
        require_safe(tmp_path / "raw.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "headless"])
def test_damaged_files_are_refused(tmp_path, damage):
    path = tmp_path / "c.pth"
    save_atomically(checkpoint(1.0), path)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "truncated": content[:middle],
            "empty": b"",
            "text": b"not a checkpoint",
            "headless": b"PK" + content[middle:],
        }[damage]
    )
    with pytest.raises(UserError):
        load_safely(path)


def test_a_missing_file_and_a_file_without_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="must exist"):
        load_safely(tmp_path / "none.pth")
    torch.save({"something": 1}, tmp_path / "c.pth")
    with pytest.raises(UserError, match="network_weights"):
        load_safely(tmp_path / "c.pth")


def test_numpy_numbers_load_only_where_they_are_admitted(tmp_path):
    """nnU-Net's own checkpoints hold them in the log; they may start a run (-pretrained_weights)."""
    content = {"network_weights": {}, "logging": [np.float64(0.5), np.float32(1), np.int64(2)]}
    torch.save(content, tmp_path / "stock.pth")
    with pytest.raises(UserError, match="weights only"):
        load_safely(tmp_path / "stock.pth")
    assert load_safely(tmp_path / "stock.pth", numpy_scalars=True)["logging"] == [0.5, 1, 2]
    torch.save({"network_weights": {}, "x": Bomb(tmp_path / "executed")}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match="weights only"):
        load_safely(tmp_path / "bomb.pth", numpy_scalars=True)
    assert not (tmp_path / "executed").exists()
