"""The other project named nnssl is recognized, and nothing else is."""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

import nnssl
from nnssl import environment
from nnssl.cli._common import run_command
from nnssl.environment import check_environment, find_foreign_nnssl, mend_torchvision
from nnssl.errors import UserError


def add_distribution(folder: Path, name: str, version: str = "0.1") -> None:
    """Write the metadata pip leaves of an installed distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    """An extra folder of installed packages."""
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_clean_environment_passes():
    assert find_foreign_nnssl() is None
    check_environment()


def test_foreign_distribution_is_refused_in_one_sentence(site):
    add_distribution(site, "nnssl", "0.1")
    with pytest.raises(UserError) as error:
        check_environment()
    message = str(error.value)
    assert "nnssl-semi (semi-supervised" in message
    assert "MIC-DKFZ's nnssl (self-supervised" in message
    assert f"nnssl 0.1 in {site}" in message
    assert "virtual environment of its own" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["nnssl-semi", "nnssl-extras", "nnsslx"])
def test_names_that_only_begin_alike_pass(site, name):
    add_distribution(site, name)
    assert find_foreign_nnssl() is None


def test_files_merged_into_our_package_are_refused(tmp_path, monkeypatch):
    (tmp_path / "ssl_data").mkdir()
    (tmp_path / "ssl_data" / "__init__.py").touch()
    monkeypatch.setattr(nnssl, "__path__", [*nnssl.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    assert find_foreign_nnssl() == f"nnssl.ssl_data in {tmp_path / 'ssl_data'}"


def test_commands_refuse_before_they_do_anything(site, capsys):
    add_distribution(site, "nnssl")
    ran = []
    code = run_command("nnssl_x", argparse.ArgumentParser, lambda args: ran.append(args), [])
    assert code == 2
    assert not ran
    printed = capsys.readouterr().err
    assert printed.startswith("nnssl_x: error: ")
    assert printed.count("\n") == 1


def test_torchvision_operators_are_declared_only_where_its_own_do_not_load(monkeypatch):
    """Declaring an operator that a compiled library registers later ends the process."""
    torch = pytest.importorskip("torch")
    spec = importlib.machinery.ModuleSpec("torchvision", None)
    spec.submodule_search_locations = []
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(environment, "find_spec", lambda name: spec)
    monkeypatch.setattr(environment, "_compiled_operators", lambda package: [Path("_C.so")])
    declared = []
    monkeypatch.setattr(torch.library, "Library", lambda *names: declared.append(names) or Mock())
    for loads in (True, False):
        monkeypatch.setattr(environment, "_loads", lambda path, loads=loads: loads)
        mend_torchvision()
        assert bool(declared) is not loads
