"""Synapse: the abdominal CT of the challenge "Multi-Atlas Labeling Beyond the Cranial Vault" (BTCV), 13 organs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nnssl.dataset_conversion.base import Case, Converter, Source, below_test_folder, find_files, require_label

_IMAGE, _LABEL = (rf"{kind}(\d{{4}})\.nii\.gz" for kind in ("img", "label"))
_ORGANS = (
    "spleen",
    "right_kidney",
    "left_kidney",
    "gallbladder",
    "esophagus",
    "liver",
    "stomach",
    "aorta",
    "inferior_vena_cava",
    "portal_and_splenic_vein",
    "pancreas",
    "right_adrenal_gland",
    "left_adrenal_gland",
)


class Synapse(Converter):
    """RawData of the abdomen, as on Synapse; the 30 training scans have labels."""

    NAME = "Synapse"
    TITLE = "Multi-Atlas Labeling Beyond the Cranial Vault, abdomen (Synapse, BTCV): 13 organs in portal-venous CT"
    LICENCE = "CC BY 4.0 after registration; terms at the source"
    SOURCE_URL = "https://www.synapse.org/Synapse:syn3193805/wiki/217789"
    LAYOUTS = {
        "RawData": "[RawData/]Training/img/imgNNNN.nii.gz with Training/label/labelNNNN.nii.gz [and Testing/img/]",
    }
    EXPECTED = {"RawData": {"imagesTr": 30, "imagesTs": 20}}
    CHANNELS = {"0": "CT"}
    LABELS = {"background": 0, **{name: value for value, name in enumerate(_ORGANS, start=1)}}
    PUBLISHED = "synapse.json"
    PAGE = "synapse"
    SHARED_VOXELS = True

    def detect(self, source: Path) -> str | None:
        return "RawData" if find_files(source, _IMAGE) and find_files(source, _LABEL) else None

    def cases(self, source: Path, layout: str) -> Iterator[Case]:
        labels = find_files(source, _LABEL)
        for key, image in find_files(source, _IMAGE).items():
            test = image.parent.name == "imagesTs" or below_test_folder(source, image.parent)
            label = None if test and key not in labels else require_label(labels.get(key), image)
            yield Case(f"img{key[0]}", (Source(image),), label, "imagesTs" if test else "imagesTr")
