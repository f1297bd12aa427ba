"""ML-RPL's trainer and its loss."""

import numpy as np
import pytest
import torch
from nnssl_test_tools import same, weights
from torch.nn.functional import cosine_similarity

from nnssl.trainers.ml_rpl import Decoded, mutual_loss, reliability
from nnssl.training.label_space import LabelSpace

SPACE = LabelSpace(3)


def decoded(seed, space=SPACE):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, space.num_heads, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    probs = logits.sigmoid() if space.regions else logits.softmax(1)
    features = torch.rand(2, 6, 4, 5, generator=generator, dtype=torch.float64).requires_grad_()
    return Decoded(logits, probs, space.harden(probs.detach()), features)


def expected_weight(peer, valid, b, i, j):
    """Return w of one voxel, from its formula."""
    terms = []
    for c in range(3):
        own = [peer.features[b, :, k, m] for k, m in (valid & (peer.hard == c))[b, 0].nonzero().tolist()]
        cosine = cosine_similarity(peer.features[b, :, i, j], torch.stack(own).mean(0), 0).item() if own else 0
        terms.append(1 - (cosine - peer.probs[b, c, i, j].item()) ** 2)
    return np.mean(terms)


def test_loss_voxel_by_voxel():
    learner, peer = decoded(0), decoded(1)
    valid = torch.rand(2, 1, 4, 5, generator=torch.Generator().manual_seed(2)) < 0.8
    entropy = [-(d.probs * d.probs.log()).sum(1) for d in (learner, peer)]
    values = [
        expected_weight(peer, valid, b, i, j) * -learner.probs[b, peer.hard[b, 0, i, j], i, j].log().item()
        for b, _, i, j in valid.nonzero().tolist()
        if entropy[0][b, i, j] > entropy[1][b, i, j]
    ]
    assert 0 < len(values) < valid.sum()
    assert mutual_loss(SPACE, learner, peer, valid, False).item() == pytest.approx(np.mean(values), rel=1e-5)


@pytest.mark.parametrize("space", [SPACE, LabelSpace(2, regions=True)])
def test_only_the_less_certain_voxels_of_the_learner_have_a_gradient(space):
    learner, peer = decoded(0, space), decoded(1, space)
    valid = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    valid[:, :, 0] = False
    mutual_loss(space, learner, peer, valid, False).backward()
    learns = (space.entropy(learner.probs) > space.entropy(peer.probs)) & valid
    assert torch.equal(learner.logits.grad.abs().sum(1, keepdim=True) > 0, learns)
    assert peer.logits.grad is None
    assert peer.features.grad is None
    assert learner.features.grad is None


def test_equal_decoders_teach_each_other_nothing_and_the_loss_is_finite():
    one = decoded(0)
    loss = mutual_loss(SPACE, one, one, torch.ones(2, 1, 4, 5, dtype=torch.bool), False)
    loss.backward()
    assert loss.item() == 0
    assert not one.logits.grad.any()


def test_reliability_is_one_where_likeness_and_probability_agree_and_never_negative():
    members = torch.zeros(1, 2, 1, 4)
    members[:, 0, :, :2], members[:, 1, :, 2:] = 1, 1
    features = members * 3
    assert torch.allclose(reliability(features, members, members), torch.ones(1, 1, 1, 4))
    assert not reliability(features, 1 - members, members).any()
    everything, against = torch.ones_like(members), torch.ones_like(members)
    against[..., 3] = -1  # a cosine of -1 where the probability is 1: 1 - 2^2 is below 0
    assert torch.allclose(reliability(against, everything, everything), torch.tensor([[[[1.0, 1, 1, 0]]]]))
    assert reliability(features, members, torch.zeros_like(members)).isfinite().all()


def test_published_cross_entropy_takes_probabilities_for_logits():
    learner, peer = decoded(0), decoded(1)
    valid = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    again = Decoded(learner.probs, learner.probs, learner.hard, learner.features)
    published = mutual_loss(SPACE, learner, peer, valid, True)
    assert published.item() == mutual_loss(SPACE, again, peer, valid, False).item()
    assert published.item() != mutual_loss(SPACE, learner, peer, valid, False).item()


def test_both_directions_and_both_batches_count(build):
    """With all voxels valid the step's terms are the two losses of both decoders on either batch."""
    trainer = build("MLRPLTrainer", settings={"unsupervised_schedule": "constant", "unlabeled_batch": 3})
    batch = next(trainer.dataloader_train)
    batch["unlabeled"]["valid"][:] = True
    expected = []
    with torch.no_grad():
        for x in (batch["data"], batch["unlabeled"]["strong"]):
            pairs = trainer.network(x, every=True, features=True)
            one, two = trainer._decode(pairs)
            valid = torch.ones_like(x[:, :1], dtype=torch.bool)
            losses = [mutual_loss(trainer.label_space, a, b, valid, False).item() for a, b in ((one, two), (two, one))]
            expected.append(sum(losses) * len(x) / 5)
    scalars = trainer.train_step(batch)
    assert scalars["loss_mutual_labeled"] == pytest.approx(expected[0], rel=1e-4)
    assert scalars["loss_mutual_unlabeled"] == pytest.approx(expected[1], rel=1e-4)


def test_the_second_decoder_learns_in_a_warm_up(build):
    trainer = build("MLRPLTrainer", settings={"unsupervised_schedule": "warmup99"})
    before = weights(trainer.network.auxiliary)
    scalars = trainer.train_step(next(trainer.dataloader_train))
    assert scalars["loss_mutual_labeled"] == scalars["loss_mutual_unlabeled"] == 0
    assert not same(before, weights(trainer.network.auxiliary))
