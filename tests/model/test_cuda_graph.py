"""A replayed computation gives what it gives when it is launched piece by piece."""

import pytest
import torch

from seresvit.config import load_config, shipped_config
from seresvit.model.cuda_graph import recorded
from seresvit.training.stage import stage_network

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_gradients_of_the_tiny_network_are_those_of_its_launches():
    network = stage_network(load_config(shipped_config("tiny.yaml")), 2).cuda().eval()
    source, other = (torch.rand(2, 1, 64, 64, device="cuda") * 2 - 1 for _ in range(2))

    def gradient(source_BCHW):
        network.zero_grad(set_to_none=True)
        loss = network(source_BCHW).square().mean()
        loss.backward()
        return loss.detach(), [p.grad for p in network.parameters() if p.grad is not None]

    expected, wanted = gradient(other)
    wanted = [grad.clone() for grad in wanted]
    replay = recorded(gradient, source)
    loss, grads = replay(other)
    torch.testing.assert_close(loss, expected)
    for grad, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-2, atol=1e-4 * float(want.abs().max()) + 1e-9)


def test_random_numbers_are_those_of_the_seed_in_every_replay():
    replay = recorded(lambda x: torch.nn.functional.dropout(x, 0.5), torch.ones(1000, device="cuda"))
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        drawn.append(replay(torch.ones(1000, device="cuda")).clone())
    assert torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[1])
