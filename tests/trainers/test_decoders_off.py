"""What methods with several decoders on one encoder promise alike."""

import pytest
from nnssl_test_tools import same, weights


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize(
    ("name", "settings"), [("MCNetTrainer", {"decoders": 3}), ("MLRPLTrainer", {}), ("DSTTrainer", {})]
)
def test_weight_zero_trains_the_first_decoder_as_the_control(build, configuration, name, settings):
    method = build(name, configuration, {"unsupervised_weight": 0, **settings})
    control = build("SupervisedTrainer", configuration)
    before = weights(method.network.auxiliary)
    for trainer in (method, control):
        for _ in range(3):
            trainer.train_step(next(trainer.dataloader_train))
    for part in ("encoder", "decoder"):
        assert same(weights(getattr(method.network, part)), weights(getattr(control.network, part)))
    assert same(before, weights(method.network.auxiliary))
