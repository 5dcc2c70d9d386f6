"""The gates: how a transformer block joins its transformer and CNN features.

One interface: a fusion takes the concatenated features x (B, 2C, H, W), channels 0..C-1 from the transformer and
C..2C-1 from the CNN, and returns features of the same shape. A fusion that scores channels does so in a submodule named
`gate` whose output is the gate itself, (B, 2C) in (0, 1): that is the one place that `record_gates` listens to.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from seresvit.config import FusionSettings


class Concatenation(nn.Identity):
    """The features as they are: plain ResViT (Dalmaz et al., IEEE TMI 2022)."""

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()


class SqueezeExcitation(nn.Module):
    """x · σ(W2 · relu(W1 · mean_HW(x))): every channel scaled by a score that the whole image decides.

    Hu, Shen, Sun, CVPR 2018, equations 2 to 4, without biases. It sees which channel, never where in the image.
    """

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()
        hidden = max(channels // settings.reduction, 1)
        self.gate = nn.Sequential(
            OrderedDict(
                squeeze=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                reduce=nn.Linear(channels, hidden, bias=False),
                relu=nn.ReLU(),
                expand=nn.Linear(hidden, channels, bias=False),
                sigmoid=nn.Sigmoid(),
            )
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """The features scaled channel by channel, (B, C, H, W)."""
        return x_BCHW * self.gate(x_BCHW)[:, :, None, None]


FUSIONS: dict[str, type[nn.Module]] = {"se": SqueezeExcitation, "concat": Concatenation}


@contextmanager
def record_gates(network: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """A dictionary that each forward pass fills with the gates of its images: `gates["art_1"]`, (B, 2C), in (0, 1).

    Only the last forward pass is kept. A fusion without a gate has no entry. The hooks are gone after the block, also
    after an error in it.
    """
    gates: dict[str, torch.Tensor] = {}

    def listen(block: str, gate: nn.Module) -> torch.utils.hooks.RemovableHandle:
        return gate.register_forward_hook(lambda module, inputs, gate_BC: gates.update({block: gate_BC.detach()}))

    handles = [
        listen(name.removesuffix(".fuse.gate"), module)
        for name, module in network.named_modules()
        if name.endswith(".fuse.gate")
    ]
    try:
        yield gates
    finally:
        for handle in handles:
            handle.remove()
