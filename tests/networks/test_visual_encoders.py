"""Visual encoders: one grid for all levels, and weights that come from a local file or not at all."""

from __future__ import annotations

import socket

import pytest
import torch

from nnssl.errors import UserError
from nnssl.networks.visual_encoders import ViTLevels, build_visual_encoder, load_vit_weights, resize

#: A ViT of a quarter million weights.
TINY = {"embed_dim": 64, "depth": 4, "num_heads": 2}


def tiny(channels: int = 1, size=(64, 64), seed: int = 0, **changes) -> ViTLevels:
    torch.manual_seed(seed)
    return ViTLevels(channels, "vit_tiny_patch16_224", size, model=TINY, **changes).eval()


def same_weights(a: ViTLevels, b: ViTLevels) -> bool:
    return all(torch.equal(v, b.vit.state_dict()[k]) for k, v in a.vit.state_dict().items())


def test_planned_levels_lie_on_one_grid(plan):
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans  # noqa: F401  resolves the same names

    base, kwargs, ndim = plan
    conv, norm = getattr(torch.nn, f"Conv{ndim}d"), getattr(torch.nn, f"InstanceNorm{ndim}d")
    kwargs = {**kwargs, "conv_op": conv, "norm_op": norm, "nonlin": torch.nn.LeakyReLU}
    cell = [2] * ndim
    encoder = build_visual_encoder({"kind": "plan", "base": base, "stages": [0, 1, 2], "cell": cell}, 2, kwargs)
    size = [8 * unit for unit in encoder.unit]
    maps = encoder(torch.randn(1, 2, *size))
    assert [m.shape[1] for m in maps] == encoder.channels == [4, 8, 16]
    assert all(list(m.shape[2:]) == [n // 2 for n in size] for m in maps)


def test_a_vit_taps_four_levels_and_norms_the_last():
    encoder = tiny()
    assert encoder.taps == [0, 1, 2, 3]
    x = torch.randn(2, 1, 64, 48)
    maps = encoder(x)
    assert all(m.shape == (2, 64, 4, 3) for m in maps)
    assert maps[-1].mean(1).abs().max() < 1e-4  # a layer norm's output
    assert maps[0].mean(1).abs().max() > 1e-3
    torch.testing.assert_close(maps[-1], encoder.vit(x)[:, 1:].transpose(1, 2).unflatten(2, (4, 3)))


@pytest.mark.parametrize(("depth", "taps"), [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23])])
def test_taps_are_the_published_blocks(depth, taps):
    encoder = ViTLevels(3, "vit_tiny_patch16_224", (32, 32), model={"embed_dim": 16, "num_heads": 1, "depth": depth})
    assert encoder.taps == taps


def test_images_in_0_to_1_are_normalized_as_the_weights_expect():
    plain, natural = tiny(3), tiny(3, unit_range=True)
    x = torch.rand(1, 3, 64, 64)
    for a, b in zip(natural(x), plain((x - 0.5) / 0.5), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_come_back_from_a_file_for_other_sizes_and_channels(tmp_path):
    source = tiny(3, seed=1)
    torch.save({"model": source.vit.state_dict() | {"head.weight": torch.zeros(5, 64)}}, tmp_path / "vit.pth")
    target = tiny(3)
    assert not same_weights(source, target)
    report = load_vit_weights(target, tmp_path / "vit.pth")
    assert same_weights(source, target)
    assert "missing: none" in report
    gray = tiny(1, size=(96, 64))
    load_vit_weights(gray, tmp_path / "vit.pth")
    kernel = source.vit.patch_embed.proj.weight
    torch.testing.assert_close(gray.vit.patch_embed.proj.weight, kernel.sum(1, keepdim=True))
    assert gray.vit.pos_embed.shape[1] == 1 + 6 * 4
    torch.testing.assert_close(gray.vit.blocks[3].mlp.fc1.weight, source.vit.blocks[3].mlp.fc1.weight)


def test_a_file_of_another_model_is_refused_and_changes_nothing(tmp_path):
    encoder, before = tiny(), tiny()
    state = {k: v for k, v in encoder.vit.state_dict().items() if not k.startswith(("blocks.3", "blocks.2"))}
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(UserError, match="90 %"):
        load_vit_weights(encoder, tmp_path / "half.pth")
    (tmp_path / "noise.pth").write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match=r"noise\.pth"):
        load_vit_weights(encoder, tmp_path / "noise.pth")
    with pytest.raises(UserError, match="nothing is downloaded"):
        load_vit_weights(encoder, tmp_path / "absent.pth")
    assert same_weights(encoder, before)


def test_nothing_that_executes_code_is_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("executed",))

    torch.save({"model": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(UserError, match=r"bomb\.pth"):
        load_vit_weights(tiny(), tmp_path / "bomb.pth")


def test_building_and_loading_open_no_connection(monkeypatch, tmp_path):
    def refuse(*_, **__):
        pytest.fail("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    torch.save(tiny(3).vit.state_dict(), tmp_path / "vit.pth")
    load_vit_weights(tiny(3), tmp_path / "vit.pth")


def test_sizes_that_are_no_multiple_of_16_are_refused():
    with pytest.raises(UserError, match="multiple of 16"):
        tiny(size=(60, 64))


def test_resize_averages_what_shrinks_and_interpolates_what_grows():
    x = torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resize(x, [8, 4]), x)
    torch.testing.assert_close(resize(x, [4, 2]), torch.nn.functional.avg_pool2d(x, 2))
    mixed = resize(x, [4, 8])
    assert mixed.shape == (1, 2, 4, 8)
    torch.testing.assert_close(mixed.mean((2, 3)), x.mean((2, 3)), rtol=1e-3, atol=1e-3)
