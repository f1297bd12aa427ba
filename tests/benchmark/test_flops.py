"""Counted cost: the control costs itself, and each sampling step costs one decoder more."""

from __future__ import annotations

import argparse

import pytest

from nnssl.benchmark import flops


def counted(toy, trainer: str, *settings: str) -> dict:
    parser = argparse.ArgumentParser()
    flops.add_arguments(parser)
    words = ["901", "2d", "-p", toy.plans["2d"], "-tr", trainer, *(["--set", *settings] if settings else [])]
    return flops.run(parser.parse_args(words))


def test_the_controls_network_costs_what_the_plans_does(toy):
    found = counted(toy, "SupervisedTrainer")
    assert found["ratio"] == {"prediction": 1, "training": 1}
    assert found["gflop"]["training"] == pytest.approx(3 * found["gflop"]["prediction"], rel=0.1)  # two passes back


def test_training_of_several_decoders_runs_them_all(toy):
    two, three = (counted(toy, "MCNetTrainer", f"decoders={n}")["ratio"] for n in (2, 3))
    assert two["prediction"] == three["prediction"] == 1
    assert 1 < two["training"] < three["training"]
    # one more decoder costs the same again, but for how it up-samples
    assert three["training"] - two["training"] == pytest.approx(two["training"] - 1, rel=0.1)


def test_cost_grows_by_one_decoder_a_sampling_step(toy):
    one, two, five = (counted(toy, "ProtoDiffTrainer", f"steps={n}")["gflop"] for n in (1, 2, 5))
    decoder = two["prediction"] - one["prediction"]
    assert decoder > 0
    assert five["prediction"] == pytest.approx(one["prediction"] + 4 * decoder, rel=1e-6)
    assert one["training"] == five["training"]
    assert counted(toy, "ProtoDiffTrainer", "steps=1", "aux=none")["gflop"]["training"] < one["training"]
