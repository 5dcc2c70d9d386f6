"""On a GPU, steps that are replayed from a recording are those that are launched piece by piece."""

import pytest
import torch

from seresvit.config import load_config
from seresvit.data.intensity import Intensity
from seresvit.training.processes import start_processes
from seresvit.training.stage import start_stage, train_mode
from seresvit.training.train import Run, buffers_of, step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def trained(settings, batches):
    """Losses and weights after a step on each batch, with dropout, in float32."""
    config = load_config(None, settings)
    fabric = start_processes(config)
    run = Run(config, None, None, fabric, {}, Intensity("window", -1024.0, 3071.0, "HU"))
    stage = start_stage(fabric, config, 2, None)
    train_mode(stage)
    losses = []
    for source, target in batches:
        losses.append(step(run, stage, source.cuda(), target.cuda()))
        stage.images += config.train.batch_size
    return run, stage, losses


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


def test_a_replayed_step_that_is_not_finite_changes_nothing(micro):
    good = [torch.rand(2, 1, 32, 32) * 2 - 1 for _ in range(2)]
    run, stage, _ = trained(micro, [good])
    weights = [p.detach().clone() for p in stage.generator.parameters()]
    buffers = [b.clone() for b in buffers_of(stage)]
    assert step(run, stage, torch.full((2, 1, 32, 32), torch.nan).cuda(), good[1].cuda()) is None
    assert stage.bad_steps == 1
    assert all(map(torch.equal, buffers, buffers_of(stage)))
    assert all(map(torch.equal, weights, stage.generator.parameters()))
    assert step(run, stage, good[0].cuda(), good[1].cuda())
