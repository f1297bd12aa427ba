"""Toy plans' architectures: 2D and 3D, plain and residual."""

import pytest

PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
RESIDUAL = "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet"
IMPORTS = ("conv_op", "norm_op", "dropout_op", "nonlin")


def toy_architecture(ndim: int, residual: bool) -> dict:
    """Return arch_kwargs as a plan stores them (dotted strings), three stages."""
    blocks = "n_blocks_per_stage" if residual else "n_conv_per_stage"
    return {
        "n_stages": 3,
        "features_per_stage": [4, 8, 16],
        "conv_op": f"torch.nn.modules.conv.Conv{ndim}d",
        "kernel_sizes": [[3] * ndim] * 3,
        "strides": [[1] * ndim, [2] * ndim, [1] + [2] * (ndim - 1)],
        blocks: [1, 2, 2],
        "n_conv_per_stage_decoder": [1, 2],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{ndim}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }


@pytest.fixture(params=[(2, False), (2, True), (3, False), (3, True)], ids=["2d", "2d-res", "3d", "3d-res"])
def plan(request):
    """Return (base class path, arch_kwargs, ndim)."""
    ndim, residual = request.param
    return (RESIDUAL if residual else PLAIN), toy_architecture(ndim, residual), ndim


@pytest.fixture
def build():
    """Build a network the way nnU-Net does: from dotted strings, seeded."""

    def _build(name: str, kwargs: dict, channels: int = 1, classes: int = 3, deep_supervision=None, seed: int = 0):
        import torch
        from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

        torch.manual_seed(seed)
        return get_network_from_plans(name, kwargs, IMPORTS, channels, classes, deep_supervision=deep_supervision)

    return _build
