"""The network that judges in training: PatchGAN (Isola et al., CVPR 2017), 70-pixel patches at its default depth."""

from itertools import pairwise

import torch
from torch import nn


class Discriminator(nn.Module):
    """Scores, without a sigmoid, of overlapping patches of source‖target: (B, C, H, W) to (B, 1, H/8 - 2, W/8 - 2).

    It keeps batch norm whatever `model.norm` says: it judges in training only, and so never by running statistics.
    """

    def __init__(self, in_channels: int, base_channels: int = 64, num_layers: int = 3):
        super().__init__()
        widths = [base_channels * min(2**i, 8) for i in range(num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
        for number, (before, after) in enumerate(pairwise(widths), 1):
            stride = 2 if number < num_layers else 1
            layers += [
                nn.Conv2d(before, after, 4, stride, 1, bias=False),
                nn.BatchNorm2d(after),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, 1, 1))
        self.model = nn.Sequential(*layers)
        self.apply(_initialise)

    def forward(self, pair_BCHW: torch.Tensor) -> torch.Tensor:
        """One score a patch, high for a target that was acquired."""
        return self.model(pair_BCHW)


def _initialise(module: nn.Module) -> None:
    """N(0, 0.02) for convolutions, N(1, 0.02) for norm scales."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
