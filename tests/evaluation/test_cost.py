"""Parameters and FLOPs of every fusion, against sums made by hand from the papers' layers."""

import functools

import pytest

from seresvit.config import load_config
from seresvit.evaluation import cost
from seresvit.model.fusion import FUSIONS

# Of a network with base_channels 4: 2C channels, C of one branch, bottlenecks of 2C / 16 and of C / 16, and H · W.
BOTH, HALF, NARROW, NARROWER, POSITIONS = 32, 16, 2, 1, 8 * 12
PERCEPTRON = 2 * BOTH * NARROW
# Kind → parameters, and multiply-adds for one image, of one site.
BY_HAND = {
    "concat": (0, 0),
    "se": (PERCEPTRON, PERCEPTRON),
    "se-frozen": (PERCEPTRON, PERCEPTRON),
    "scse": (PERCEPTRON + BOTH, PERCEPTRON + BOTH * POSITIONS),
    "cbam": (PERCEPTRON + 2 * 49, 2 * PERCEPTRON + 2 * 49 * POSITIONS),
    "eca": (3, 3 * BOTH),
    "gct": (3 * BOTH, 0),
    "sk": (HALF * 32 + 32 + 32 * BOTH, HALF * 32 + 32 * BOTH),
    "aff": (2 * (HALF * NARROWER + NARROWER + NARROWER * HALF + HALF), 2 * HALF * NARROWER * (POSITIONS + 1)),
    "attention-gate": (2 * HALF * NARROWER + NARROWER + NARROWER + 1, (2 * HALF + 1) * NARROWER * POSITIONS),
    "spatial-se": (PERCEPTRON + BOTH + 1, PERCEPTRON + BOTH * POSITIONS),
}


@functools.cache
def size(kind):
    small = ["model.base_channels=4", "model.vit={depth: 1, width: 16, heads: 2, mlp_width: 16}", "train.size=[32,48]"]
    return cost.size(load_config(None, [*small, f"model.fusion.kind={kind}"]))


@pytest.mark.parametrize("kind", FUSIONS)
def test_a_fusion_costs_what_its_layers_do(kind):
    """At both sites; one multiply-add is two FLOPs."""
    plain, found, (parameters, multiply_adds) = size("concat"), size(kind), BY_HAND[kind]
    assert found["parameters"] - plain["parameters"] == 2 * parameters
    assert 1e9 * (found["gflops"] - plain["gflops"]) == pytest.approx(2 * 2 * multiply_adds, abs=0.5)
