"""Cross pseudo supervision: two networks of different initialization teach each other with hard pseudo-labels.

Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021 (arXiv 2106.01226).

Deviations from the paper: the term runs over the unlabeled batch alone (as the field's common 2D and 3D code does;
the paper adds the labeled one), and its weight is ramped over the run.
"""

from __future__ import annotations

from dataclasses import dataclass

from nnssl.trainers.settings import UnsupervisedSettings, option
from nnssl.trainers.two_networks import TwoNetworkMethod


@dataclass(frozen=True)
class CPSSettings(UnsupervisedSettings):
    """Settings of cross pseudo supervision."""

    unsupervised_weight: float = option(1.0, "weight of both cross terms (the paper's lambda) at the end", low=0)


class CPSTrainer(TwoNetworkMethod):
    """Two peers of the planned network; the first predicts.

    ``L = sum_i L_s(f_i) + lambda sum_(i != j) CE(f_i(x_u), argmax f_j(x_u))``, targets detached.
    """

    settings_class = CPSSettings
    settings: CPSSettings
