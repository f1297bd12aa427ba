"""MS-CMRSeg 2019: late gadolinium-enhanced MRI of the heart after an infarction, 45 patients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from nnssl.dataset_conversion.base import Case, Converter, Source, find_files
from nnssl.dataset_conversion.volumes import read_values

_IMAGE, _LABEL = (rf"(patient\d+)_LGE{ending}\.nii(?:\.gz)?" for ending in ("", "_manual"))
_CLASSES = {0: 0, 600: 1, 200: 2, 500: 3}


class MSCMR(Converter):
    """The LGE sequence alone; cine and T2 of the same patients have other grids."""

    NAME = "MSCMR"
    TITLE = "Multi-sequence Cardiac MR Segmentation Challenge 2019: right ventricle, myocardium, left ventricle in LGE"
    LICENCE = "challenge data, for research after registration; terms at the source"
    SOURCE_URL = "https://zmiclab.github.io/mscmrseg19/"
    LAYOUTS = {
        "challenge": "C0LET2_nii45_for_challenge19/{c0t2lge,lgegt} and C0LET2_gt_for_challenge19/LGE_manual_*, "
        "with patientN_LGE.nii.gz and patientN_LGE_manual.nii.gz"
    }
    EXPECTED = {"challenge": {"imagesTr": 45}}
    CHANNELS = {"0": "LGE"}
    LABELS = {"background": 0, "RV": 1, "MYO": 2, "LV": 3}
    PUBLISHED = "mscmr.json"
    PAGE = "mscmr"
    SHARED_VOXELS = True

    def detect(self, source: Path) -> str | None:
        return "challenge" if find_files(source, _IMAGE) else None

    def cases(self, source: Path, layout: str) -> Iterator[Case]:
        labels = find_files(source, _LABEL)
        read = partial(read_values, classes=_CLASSES)
        for key, image in find_files(source, _IMAGE).items():
            label = Source(labels[key], read) if key in labels else None
            yield Case(key[0], (Source(image),), label, "imagesTr" if label else "imagesUn")
