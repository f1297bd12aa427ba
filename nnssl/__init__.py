"""nnssl: semi-supervised training for nnU-Net v2.

Importing this package prints nothing, reads no variable and loads no torch.
"""

__version__ = "0.1.0"
