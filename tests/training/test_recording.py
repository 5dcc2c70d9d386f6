"""One step: replayed from a recording it is what it is launched piece by piece, and a bad one changes nothing."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from seresvit.config import load_config
from seresvit.data.intensity import Intensity
from seresvit.training.processes import start_processes
from seresvit.training.stage import start_stage, train_mode
from seresvit.training.train import Run, buffers_of, step


def trained(settings, batches):
    """Losses and weights after a step on each batch, with dropout, in float32."""
    config = load_config(None, settings)
    fabric = start_processes(config)
    run = Run(config, None, None, fabric, {}, Intensity("window", -1024.0, 3071.0, "HU"))
    stage = start_stage(fabric, config, 2, None)
    train_mode(stage)
    losses = []
    for source, target in batches:
        losses.append(step(run, stage, source.to(fabric.device), target.to(fabric.device)))
        stage.images += config.train.batch_size
    return run, stage, losses


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_replayed_steps_are_those_that_are_launched(micro):
    torch.manual_seed(0)
    batches = [[torch.rand(2, 1, 32, 32) * 2 - 1 for _ in range(2)] for _ in range(4)]
    _, launched, wanted = trained([*micro, "train.cuda_graph=false"], batches)
    _, replayed, losses = trained(micro, batches)
    assert launched.replay is None and replayed.replay
    for found, want in zip(losses, wanted, strict=True):
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=2e-3, atol=1e-4)
    for found, want in zip(buffers_of(replayed), buffers_of(launched), strict=True):
        torch.testing.assert_close(found, want, rtol=2e-2, atol=1e-3)


def test_a_step_that_is_not_finite_changes_nothing(micro):
    good = [torch.rand(2, 1, 32, 32) * 2 - 1 for _ in range(2)]
    run, stage, _ = trained(micro, [good])
    source, target = (image.to(run.fabric.device) for image in good)
    optimizers = [stage.optimizer, stage.discriminator_optimizer]

    def state():
        networks = [stage.generator, stage.discriminator, stage.average]
        everything = [network.state_dict() for network in networks], [one.state_dict()["state"] for one in optimizers]
        return [leaf.clone() for leaf in tree_leaves(everything)]

    before = state()
    assert step(run, stage, torch.full_like(source, torch.nan), target) is None and stage.bad_steps == 1
    assert len(before) > 300 and all(map(torch.equal, before, state()))
    assert step(run, stage, source, target) and not all(map(torch.equal, before, state()))
