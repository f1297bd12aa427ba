"""Checks of the Python environment. Loads no torch."""

from __future__ import annotations

from importlib import metadata
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

from nnssl.errors import UserError

#: The distribution MIC-DKFZ's self-supervised package installs as; ours is ``nnssl-semi``.
FOREIGN_DISTRIBUTION = "nnssl"
#: A sub-package that only MIC-DKFZ's ``nnssl`` has. Inside our package folder it means the two were merged there.
FOREIGN_MODULE = "nnssl.ssl_data"


def find_foreign_nnssl() -> str | None:
    """Say which other project's ``nnssl`` this environment holds, or return None.

    Looks up one distribution by name and one sub-package by path; it does not scan the environment.
    """
    try:
        foreign = metadata.distribution(FOREIGN_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        pass
    else:
        return f"the distribution {FOREIGN_DISTRIBUTION} {foreign.version} in {foreign.locate_file('')}"
    spec = find_spec(FOREIGN_MODULE)
    if spec is not None:
        return f"{FOREIGN_MODULE} in {next(iter(spec.submodule_search_locations or []), spec.origin)}"
    return None


def check_environment() -> None:
    """Refuse to run beside the self-supervised ``nnssl`` of MIC-DKFZ.

    Both projects install a package ``nnssl`` and commands such as ``nnssl_train``; in one environment each
    silently overwrites files of the other.

    Raises:
        UserError: if the other project's ``nnssl`` is found.
    """
    foreign = find_foreign_nnssl()
    if foreign is not None:
        raise UserError(
            "this is nnssl-semi (semi-supervised training for nnU-Net), and it cannot share an environment with "
            "MIC-DKFZ's nnssl (self-supervised pre-training), which installs a package and commands of the same name",
            foreign,
            None,
            "install each of the two in a virtual environment of its own",
        )


def mend_torchvision() -> None:
    """Let ``import torchvision`` work beside a CPU build of torch, for stock nnU-Net's trainer look-up.

    nnU-Net's look-up imports every trainer of its own, and one of them reaches timm and torchvision. PyPI's
    torchvision is built for CUDA; beside a CPU torch its compiled operators are missing, and the import fails at those
    that it describes without a check. nnU-Net uses none of them, so declaring them first is enough. Where the compiled
    operators load (to declare those too would end the process), beside a CUDA torch, without torchvision, or once it is
    imported, nothing changes.
    """
    import sys

    found = find_spec("torchvision")
    if found is None or "torchvision" in sys.modules:
        return
    import torch

    if torch.version.cuda is not None or any(_loads(path) for path in _compiled_operators(found)):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)  # the declaration lives as long as the object


_DECLARED: list = []


def _compiled_operators(package: ModuleSpec) -> list[Path]:
    return [path for folder in package.submodule_search_locations or [] for path in Path(folder).glob("_C*.[sp][oy]*")]


def _loads(library: Path) -> bool:
    import torch

    try:
        torch.ops.load_library(str(library))
    except OSError:
        return False
    return True
