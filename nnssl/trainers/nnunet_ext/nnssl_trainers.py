"""Re-exports nnssl's trainers for nnU-Net's ``nnUNet_extTrainer`` look-up. Holds nothing else.

nnU-Net imports the files of this folder as flat modules and forgets them again. Re-exporting keeps one identity
for each class, so that look-ups agree and objects pickle.
"""

from nnssl.trainers.ac_mt import ACMTTrainer
from nnssl.trainers.acisis import ACISISTrainer
from nnssl.trainers.adsh import AdshTrainer
from nnssl.trainers.bcp import BCPTrainer
from nnssl.trainers.caml import CAMLTrainer
from nnssl.trainers.cld import CLDTrainer
from nnssl.trainers.cps import CPSTrainer
from nnssl.trainers.crest import CReSTTrainer
from nnssl.trainers.depl import DePLTrainer
from nnssl.trainers.dhc import DHCTrainer
from nnssl.trainers.diffcl import DiffCLTrainer
from nnssl.trainers.diffrect import DiffRectTrainer
from nnssl.trainers.dst import DSTTrainer
from nnssl.trainers.dtc import DTCTrainer
from nnssl.trainers.fixmatch import FixMatchTrainer
from nnssl.trainers.generic_ssl import GenericSSLTrainer
from nnssl.trainers.ict import ICTTrainer
from nnssl.trainers.incl import INCLTrainer
from nnssl.trainers.mc_net import MCNetTrainer
from nnssl.trainers.mean_teacher import MeanTeacherTrainer
from nnssl.trainers.ml_rpl import MLRPLTrainer
from nnssl.trainers.proto_diff import ProtoDiffTrainer
from nnssl.trainers.sassnet import SASSNetTrainer
from nnssl.trainers.simis import SimiSTrainer
from nnssl.trainers.ss_net import SSNetTrainer
from nnssl.trainers.supervised import SupervisedTrainer
from nnssl.trainers.ua_mt import UAMTTrainer
from nnssl.trainers.urpc import URPCTrainer

__all__ = [
    "ACISISTrainer",
    "ACMTTrainer",
    "AdshTrainer",
    "BCPTrainer",
    "CAMLTrainer",
    "CLDTrainer",
    "CPSTrainer",
    "CReSTTrainer",
    "DHCTrainer",
    "DSTTrainer",
    "DTCTrainer",
    "DePLTrainer",
    "DiffCLTrainer",
    "DiffRectTrainer",
    "FixMatchTrainer",
    "GenericSSLTrainer",
    "ICTTrainer",
    "INCLTrainer",
    "MCNetTrainer",
    "MLRPLTrainer",
    "MeanTeacherTrainer",
    "ProtoDiffTrainer",
    "SASSNetTrainer",
    "SSNetTrainer",
    "SimiSTrainer",
    "SupervisedTrainer",
    "UAMTTrainer",
    "URPCTrainer",
]
