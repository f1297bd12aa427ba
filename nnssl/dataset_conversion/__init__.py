"""Raw data sets from plain folders, public downloads and other raw data sets. Loads no torch.

A new converter is one file with a :class:`~nnssl.dataset_conversion.base.Converter` and one entry here.
"""

from nnssl.dataset_conversion.acdc import ACDC
from nnssl.dataset_conversion.base import Converter
from nnssl.dataset_conversion.endoscapes2023 import Endoscapes2023
from nnssl.dataset_conversion.la import LA
from nnssl.dataset_conversion.mosxav import MOSXAV

#: Name -> converter, as ``nnssl_convert`` and ``nnssl_info datasets`` know them.
CONVERTERS: dict[str, Converter] = {c.NAME: c for c in (ACDC(), Endoscapes2023(), LA(), MOSXAV())}
