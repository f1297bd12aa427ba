"""DiffRect's rectifier: published size, what each switch changes, and who sees what."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nnssl.networks.conditioning import FiLM
from nnssl.networks.rectifier import (
    Denoiser,
    Rectifier,
    RectifierShape,
    Sampling,
    Style,
    latent_loss,
    latent_size,
    pooling,
    rectifier_levels,
)

#: (patch, strides, kernels): isotropic, a size that no stride divides, anisotropic.
SQUARE = ((32, 32), ((2, 2),) * 4, ((3, 3),) * 5)
UNEVEN = ((31, 22), ((2, 2),) * 3, ((3, 3),) * 4)
FLAT = ((5, 24, 17), ((1, 2, 2), (1, 2, 2), (2, 2, 2)), ((1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)))
CODE = {"norm": "batch", "conditioning": "additive", "inject": "skip"}  # what the authors' code has


def make(levels=SQUARE, **changes) -> Rectifier:
    torch.manual_seed(0)
    return Rectifier(RectifierShape(1, 3, 4, *levels, **{"width": 4, "dropout": False, **changes}))


def inputs(rectifier, count=2, seed=0) -> dict[str, torch.Tensor]:
    """Return image, colored map, better map, guidance, time steps and noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = rectifier.shape
    noise = (count, shape.width * 2 ** len(shape.strides), *latent_size(shape))
    return {
        "image": torch.randn(count, 1, *shape.patch_size, generator=generator),
        "label": torch.rand(count, 3, *shape.patch_size, generator=generator).round(),
        "good": torch.rand(count, 3, *shape.patch_size, generator=generator).round(),
        "guidance": torch.linspace(50.0, 800.0, count),
        "t": torch.arange(count) + 3,
        "noise": torch.randn(noise, generator=generator),
    }


def sample(rectifier, data, sampling=Sampling(), **changes):  # noqa: B008  a named tuple
    kept = {key: value for key, value in (data | changes).items() if key not in ("good", "t")}
    return rectifier(**kept, sampling=sampling)


def watch(module, log: list, what: int | None = None) -> None:
    """Record a module's outputs, or one of its arguments, at each call."""
    if what is None:
        module.register_forward_hook(lambda _, __, out: log.append(out))
    else:
        module.register_forward_pre_hook(lambda _, arguments: log.append(arguments[what]))


def change(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().norm() / a.detach().norm())


def step(module, loss) -> None:
    loss.backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    module.zero_grad()


def test_published_parameter_counts():
    rectifier = Rectifier(RectifierShape(1, 3, 4, (256, 256), ((2, 2),) * 4, ((3, 3),) * 5, **CODE))
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in rectifier.named_children()}
    assert counts == {
        "guidance_embedding": 328_704,
        "image_encoder": 1_434_912,
        "context_encoder": 1_435_344,
        "decoder": 756_420,
        "denoiser": 13_512_832,
        "noise": 0,
    }
    assert sum(counts.values()) == 17_468_212


@pytest.mark.parametrize("changes", [{}, CODE, {"fusion": "concat", "skips": False, "context": "label"}])
@pytest.mark.parametrize("levels", [SQUARE, UNEVEN, FLAT], ids=["square", "uneven", "flat"])
def test_logits_have_the_images_size_and_latents_their_own(levels, changes):
    rectifier = make(levels, **changes)
    data = inputs(rectifier)
    for out in (rectifier(**data), sample(rectifier, data)):
        assert out.logits.shape == (2, 4, *levels[0])
        assert out.latent.shape == data["noise"].shape


@pytest.mark.parametrize("levels", [SQUARE, UNEVEN, FLAT], ids=["square", "uneven", "flat"])
def test_latent_size_is_that_of_the_encoders_last_level(levels):
    rectifier = make(levels)
    data = inputs(rectifier)
    assert rectifier.image_encoder(data["image"])[-1].shape[2:] == latent_size(rectifier.shape)


@pytest.mark.parametrize(
    ("size", "maps"),
    [
        ((16, 16), [(8, 8), (4, 4)]),  # the published ones
        ((4, 8), [(2, 4), (2, 2)]),
        ((3, 5), [(3, 2), (3, 2)]),
        ((2, 2), [(2, 2), (2, 2)]),
        ((1, 7, 9), [(1, 3, 4), (1, 3, 2)]),
    ],
)
def test_an_axis_is_pooled_while_it_has_four_voxels(size, maps):
    reached, deep = list(size), []
    for pool in pooling(size):
        reached = [n // p for n, p in zip(reached, pool, strict=True)]
        deep.append(tuple(reached))
    assert deep == maps
    torch.manual_seed(0)
    seen, denoiser = [], Denoiser(Style(len(size), "group", "film"), 8, size)
    for block in (denoiser.down1, denoiser.down2):
        watch(block, seen)
    noised = torch.randn(2, 8, *size)
    assert denoiser(noised, torch.tensor([0, 9]), noised).shape == noised.shape
    assert [tuple(x.shape[2:]) for x in seen] == maps


def test_the_denoiser_keeps_what_a_single_voxel_says():
    """Instance norm would make zero of it."""
    torch.manual_seed(0)
    denoiser = Denoiser(Style(2, "instance", "film"), 8, (1, 1))
    estimate = denoiser(torch.randn(2, 8, 1, 1), torch.tensor([3, 3]), torch.randn(2, 8, 1, 1))
    assert change(estimate[0], estimate[1]) > 0.01


def test_levels_of_a_plan_are_its_first_four_poolings_with_their_kernels():
    strides = [[1, 1, 1], [1, 2, 2], [1, 1, 1], [2, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
    kernels = [[1, 3, 3], [1, 3, 4], [5, 5, 5], [3, 3, 3], [3, 3, 4], [3, 3, 5], [7, 7, 7]]
    chosen = (1, 3, 4, 5)
    expected = tuple(tuple(strides[i]) for i in chosen), tuple(tuple(kernels[i]) for i in (0, *chosen))
    assert rectifier_levels(strides, kernels) == expected
    assert rectifier_levels([[1, 1], [2, 2]], [[3, 3]] * 2) == (((2, 2),), ((3, 3), (3, 3)))


# ----------------------------------------------------------------------------------------- guidance and time


def test_guidance_and_time_reach_the_output_after_one_step_under_film():
    rectifier = make().eval()
    data = inputs(rectifier)

    def logits(*guidance):
        return sample(rectifier, data, guidance=torch.tensor(guidance)).logits

    def estimate(t):
        return rectifier.denoiser(data["noise"], torch.full((2,), t), data["noise"])

    assert torch.equal(logits(0.0, 0.0), logits(999.0, 999.0))
    assert torch.equal(estimate(0), estimate(9))
    out = rectifier(**data)
    step(rectifier, out.logits[:, 1].square().mean() + latent_loss(out.latent, out.target))
    strict, lax = logits(0.0, 0.0), logits(999.0, 999.0)
    assert change(strict, lax) > 1e-3
    torch.testing.assert_close(logits(0.0, 999.0), torch.stack((strict[0], lax[1])))
    assert change(estimate(0), estimate(9)) > 1e-4


def test_guidance_and_time_reach_the_output_at_once_when_added():
    rectifier = make(**CODE).eval()
    data = inputs(rectifier)
    logits = [sample(rectifier, data, guidance=torch.full((2,), g)).logits for g in (0.0, 999.0)]
    assert change(*logits) > 1e-3
    early, late = (rectifier.denoiser(data["noise"], torch.full((2,), t), data["noise"]) for t in (0, 9))
    assert change(early, late) > 1e-3


def test_an_added_embedding_without_batch_norm_is_refused():
    with pytest.raises(ValueError, match="batch normalization only"):
        make(conditioning="additive", norm="instance")


# ------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("changes", [{}, CODE, {"fusion": "concat"}, {"skips": False}, {"context": "label"}])
def test_every_parameter_learns_from_latent_and_segmentation_loss(changes):
    rectifier = make(**changes)
    for module in rectifier.modules():  # zero films hide the embedding behind them
        if isinstance(module, FiLM):
            torch.nn.init.normal_(module.linear.weight, std=0.05)
    data = inputs(rectifier)
    out = rectifier(**data)
    (F.cross_entropy(out.logits, data["good"].argmax(1)) + latent_loss(out.latent, out.target)).backward()
    for name, parameter in rectifier.named_parameters():
        assert parameter.grad is not None, name
        erased = ".conv" in name and name.endswith("bias")  # a constant before a norm
        assert erased or parameter.grad.abs().max() > 0, name


def test_the_target_is_the_better_maps_latent_and_carries_no_gradient():
    rectifier = make().eval()
    data, conditions = inputs(rectifier), []
    watch(rectifier.denoiser, conditions, 2)
    out = rectifier(**data)
    assert not out.target.requires_grad
    assert out.latent.requires_grad
    rectifier(**data | {"label": data["good"]})  # now the better map is the condition
    assert not torch.equal(conditions[0], out.target)
    torch.testing.assert_close(conditions[1], out.target)


def test_the_better_map_may_lie_beside_another_image():
    rectifier = make().eval()
    data, conditions = inputs(rectifier), []
    other = torch.randn_like(data["image"])
    watch(rectifier.denoiser, conditions, 2)
    out = rectifier(**data, good_image=other)
    rectifier(**data | {"label": data["good"], "image": other})
    torch.testing.assert_close(conditions[1], out.target)
    assert not torch.allclose(rectifier(**data).target, out.target)


def test_the_denoiser_gets_the_noised_target():
    rectifier = make().eval()
    data, noised = inputs(rectifier), []
    watch(rectifier.denoiser, noised, 0)
    out = rectifier(**data)
    for i, t in enumerate(data["t"].tolist()):
        kept = float(rectifier.noise.alpha_bar[t])
        expected = kept**0.5 * out.target[i] + (1 - kept) ** 0.5 * data["noise"][i]
        torch.testing.assert_close(noised[0][i], expected)


def test_latent_loss_is_the_mean_square_in_single_precision():
    a, b = torch.randn(2, 8, 3, 3), torch.randn(2, 8, 3, 3)
    expected = sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)) / a.numel()
    assert float(latent_loss(a, b)) == pytest.approx(expected, rel=1e-5)
    far = torch.full((4,), 300.0, dtype=torch.float16)  # its square overflows half precision
    assert float(latent_loss(far, -far)) == 600**2


def test_dropout_acts_in_training_alone():
    for rate in (False, True):
        rectifier = make(dropout=rate)
        data = inputs(rectifier)
        assert torch.equal(rectifier(**data).logits, rectifier(**data).logits) != rate
        assert torch.equal(rectifier.eval()(**data).logits, rectifier(**data).logits)


# ------------------------------------------------------------------------------------------------- switches


@pytest.mark.parametrize("inject", ["input", "skip"])
def test_the_condition_reaches_the_coarse_levels_only_from_the_input(inject):
    rectifier, coarse = make(inject=inject), []
    for block in (rectifier.denoiser.down1, rectifier.denoiser.down2):
        watch(block, coarse)
    noised, t = inputs(rectifier)["noise"], torch.tensor([2, 7])
    outputs = [rectifier.denoiser(noised, t, condition) for condition in (noised.flip(0), torch.zeros_like(noised))]
    assert change(*outputs) > 1e-3
    unchanged = [torch.equal(coarse[i], coarse[i + 2]) for i in range(2)]
    assert unchanged == [inject == "skip"] * 2


def test_without_diffusion_the_decoder_reads_the_contexts_latent():
    rectifier = make(diffusion=False).eval()
    data = inputs(rectifier)
    out = rectifier(**data)
    assert out.latent is None
    assert out.target is None
    embedding = rectifier.guidance_embedding(data["guidance"])
    seen, fuse = torch.cat([data["image"], data["label"]], 1), rectifier.image_encoder(data["image"], embedding)
    features = rectifier.context_encoder(seen, embedding, fuse)
    torch.testing.assert_close(out.logits, rectifier.decoder(features, embedding))
    assert torch.equal(sample(rectifier, data).logits, out.logits)


def test_the_estimate_replaces_the_latent_and_nothing_else():
    rectifier, features = make().eval(), []
    watch(rectifier.decoder, features, 0)
    data = inputs(rectifier)
    out = rectifier(**data)
    plain = make(diffusion=False).eval()
    plain.load_state_dict({k: v for k, v in rectifier.state_dict().items() if "denoiser" not in k})
    watch(plain.decoder, features, 0)
    plain(**data)
    assert all(torch.equal(a, b) for a, b in zip(features[0][:-1], features[1][:-1], strict=True))
    assert torch.equal(features[0][-1], out.latent)
    assert not torch.allclose(features[1][-1], out.latent)


def test_concatenation_with_two_identities_is_addition():
    added, joined = make().eval(), make(fusion="concat").eval()
    joined.load_state_dict(added.state_dict(), strict=False)
    for fuser in joined.fusers:
        one = torch.eye(fuser.out_channels)
        fuser.weight.data = torch.cat([one, one], 1)[..., None, None]
        fuser.bias.data.zero_()
    data = inputs(added)
    torch.testing.assert_close(joined(**data).logits, added(**data).logits)
    joined.fusers[0].weight.data[:, 4:] = 0
    assert not torch.allclose(joined(**data).logits, added(**data).logits)


@pytest.mark.parametrize("context", ["both", "label"])
def test_the_labels_encoder_sees_what_the_context_says(context):
    rectifier, seen = make(context=context), []
    watch(rectifier.context_encoder, seen, 0)
    data = inputs(rectifier)
    sample(rectifier, data)
    both = torch.cat([data["image"], data["label"]], 1)
    assert torch.equal(seen[0], both if context == "both" else data["label"])


@pytest.mark.parametrize("skips", [True, False])
def test_without_skips_the_latent_alone_decides(skips):
    rectifier = make(skips=skips).eval()
    features, embedding = rectifier.image_encoder(inputs(rectifier)["image"]), torch.randn(2, 512)
    others = [torch.randn_like(f) for f in features[:-1]]
    same = torch.equal(rectifier.decoder(features, embedding), rectifier.decoder([*others, features[-1]], embedding))
    assert same != skips


# ------------------------------------------------------------------------------------------------- sampling


def test_clamped_sampling_bounds_the_latent():
    rectifier = make().eval()
    data = inputs(rectifier)
    assert sample(rectifier, data, Sampling(2, "ddim", False)).latent.max() > 1
    bounded = sample(rectifier, data, Sampling(2, "ddim", True))
    assert bounded.latent.abs().max() <= 1
    assert bounded.target is None


def test_ddim_is_a_function_of_its_noise_and_ddpm_draws_more():
    rectifier = make().eval()
    data = inputs(rectifier)

    def latent(sampler, seed, **changes):
        torch.manual_seed(seed)
        return sample(rectifier, data, Sampling(3, sampler), **changes).latent

    assert torch.equal(latent("ddim", 0), latent("ddim", 1))
    assert not torch.equal(latent("ddim", 0), latent("ddim", 0, noise=data["noise"].flip(0)))
    assert torch.equal(latent("ddpm", 0), latent("ddpm", 0))
    assert not torch.equal(latent("ddpm", 0), latent("ddpm", 1))


def test_sampling_visits_the_published_steps_and_keeps_no_graph():
    rectifier, visited = make(), []
    watch(rectifier.denoiser, visited, 1)
    out = sample(rectifier, inputs(rectifier), Sampling(2))
    assert [t.tolist() for t in visited] == [[9, 9], [0, 0]]
    assert not out.latent.requires_grad


def test_the_linear_schedule_takes_its_own_number_of_steps():
    rectifier = make(schedule="linear", timesteps=50)
    betas = [(0.1 + (20 - 0.1) * i / 49) / 50 for i in range(50)]
    left = 1.0
    for t, beta in enumerate(betas):
        left *= 1 - beta
        assert float(rectifier.noise.alpha_bar[t]) == pytest.approx(left, rel=1e-5)


@pytest.mark.parametrize("part", ["norm", "conditioning", "context", "fusion", "inject"])
def test_an_unknown_part_is_refused_by_name(part):
    with pytest.raises(ValueError, match=f"{part} is one of .* got 'other'"):
        make(**{part: "other"})


@pytest.mark.parametrize("style", [{"norm": "layer"}, {"conditioning": "hyper"}])
def test_a_style_knows_its_norms_and_conditionings(style):
    with pytest.raises(ValueError, match="unknown"):
        Style(2, **style)


def test_a_denoiser_may_predict_the_noise():
    """With the true noise as its output the estimate is the true latent, at every time step."""
    rectifier = make(prediction="noise")
    data = inputs(rectifier)
    rectifier.denoiser.forward = lambda noised, t, condition: data["noise"]
    out = rectifier(**data)
    assert torch.allclose(out.latent, out.target, atol=2e-3)
    rectifier.denoiser.forward = lambda noised, t, condition: data["noise"] + 1
    assert not torch.allclose(rectifier(**data).latent, out.target, atol=2e-2)


def test_a_detached_condition_keeps_the_latent_loss_from_the_encoders_but_not_the_decoder():
    for detached in (False, True):
        rectifier = make(detach_condition=detached)
        out = rectifier(**inputs(rectifier))
        encoder = rectifier.context_encoder.blocks[-1].conv2.weight
        error = latent_loss(out.latent, out.target)
        (reached,) = torch.autograd.grad(error, encoder, retain_graph=True, allow_unused=True)
        assert (reached is None) == detached
        assert torch.autograd.grad(out.logits.sum(), encoder, retain_graph=True)[0].abs().sum() > 0
        denoiser = rectifier.denoiser.up2.block.conv2.weight
        assert torch.autograd.grad(error, denoiser)[0].abs().sum() > 0


def test_a_normalized_latent_keeps_its_size_however_its_encoder_grows():
    """Otherwise the noise, whose variance is 1, would hide ever less of the clean latent."""
    for normalize in (False, True):
        rectifier = make(normalize=normalize)
        data = inputs(rectifier)
        before = rectifier(**data).target
        with torch.no_grad():
            rectifier.context_encoder.blocks[-1].norm2.weight *= 50
        after = rectifier(**data).target
        assert (after.square().mean() > 100 * before.square().mean()).item() is not normalize
        if normalize:
            assert torch.allclose(after.mean(1), torch.tensor(0.0), atol=1e-5)
            assert torch.allclose(after.var(1, correction=0), torch.tensor(1.0), atol=1e-3)


def test_the_norm_of_an_items_error_is_the_root_of_its_sum_of_squares():
    estimate, target = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    estimate[0, 0, 0], estimate[0, 1, 2], estimate[1, 2, 3] = 3.0, 4.0, 7.0
    assert latent_loss(estimate, target, "norm").item() == pytest.approx((5 + 7) / 2)
    assert latent_loss(estimate, target, "mean").item() == pytest.approx((9 + 16 + 49) / 24)


def test_a_rectifier_learns_to_mend_labels_and_samples_the_mended_ones():
    """Squares of random size; the labels it is given are shifted by 5 pixels, the image shows where they belong."""
    rectifier = make(((32, 32), ((2, 2),) * 3, ((3, 3),) * 4), width=8)
    optimizer = torch.optim.Adam(rectifier.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)

    def scene(count: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        truth = torch.zeros(count, 1, 32, 32, dtype=torch.long)
        for item in truth:
            x, y, size = torch.randint(6, 16, (3,), generator=generator).tolist()
            item[0, x : x + size // 2 + 3, y : y + size // 2 + 3] = 1
        image = truth + 0.3 * torch.randn(truth.shape, generator=generator)
        return image, truth.roll(5, 2), truth

    def colored(labels: torch.Tensor) -> torch.Tensor:
        return labels.expand(-1, 3, -1, -1).float()

    tau = torch.full((8,), 500.0)
    for _ in range(60):
        image, shifted, truth = scene()
        t, noise = torch.randint(0, 2, (8,), generator=generator) * 9, torch.randn(8, 64, 4, 4, generator=generator)
        out = rectifier(image, colored(shifted), tau, good=colored(truth), t=t, noise=noise)
        loss = F.cross_entropy(out.logits, truth[:, 0]) + latent_loss(out.latent, out.target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    image, shifted, truth = scene()
    with torch.no_grad():
        noise = torch.randn(8, 64, 4, 4, generator=generator)
        mended = rectifier(image, colored(shifted), tau, noise=noise, sampling=Sampling()).logits.argmax(
            1, keepdim=True
        )
    dice = [2 * (labels * truth).sum() / (labels + truth).sum() for labels in (shifted, (mended == 1).long())]
    assert dice[1] > dice[0] + 0.2
