"""Raw data sets from plain folders, public downloads and other raw data sets. Loads no torch.

A new converter is one file with a :class:`~nnssl.dataset_conversion.base.Converter` and one entry here.
"""

from nnssl.dataset_conversion.acdc import ACDC
from nnssl.dataset_conversion.base import Converter
from nnssl.dataset_conversion.brats2019 import BraTS2019, BraTS2019Flair
from nnssl.dataset_conversion.endoscapes2023 import Endoscapes2023
from nnssl.dataset_conversion.la import LA
from nnssl.dataset_conversion.mmwhs import MMWHS
from nnssl.dataset_conversion.mnms import MnMs
from nnssl.dataset_conversion.mosxav import MOSXAV
from nnssl.dataset_conversion.mscmr import MSCMR
from nnssl.dataset_conversion.msd import MSD, Prostate
from nnssl.dataset_conversion.pancreas import PancreasCT
from nnssl.dataset_conversion.synapse import Synapse

#: Name -> converter, as ``nnssl_convert`` and ``nnssl_info datasets`` know them.
CONVERTERS: dict[str, Converter] = {
    converter.NAME: converter
    for converter in (
        ACDC(),
        BraTS2019(),
        BraTS2019Flair(),
        Endoscapes2023(),
        LA(),
        MMWHS(),
        MOSXAV(),
        MSCMR(),
        MSD(),
        MnMs(),
        PancreasCT(),
        Prostate(),
        Synapse(),
    )
}
