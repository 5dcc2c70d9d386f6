"""What training minimises: least-squares adversarial loss and L1."""

import torch
import torch.nn.functional as F
from torch import nn


def lsgan(scores: torch.Tensor, is_target: bool) -> torch.Tensor:
    """Mean squared distance of patch scores from 1 (`is_target`) or 0, a scalar (Mao et al., ICCV 2017)."""
    return F.mse_loss(scores.float(), torch.full_like(scores, float(is_target), dtype=torch.float32))


def generator_losses(
    source: torch.Tensor, synthetic: torch.Tensor, target: torch.Tensor, discriminator: nn.Module | None
) -> dict[str, torch.Tensor]:
    """The unweighted parts of the generator's loss: "l1", and "adversarial" when there is a discriminator to judge."""
    losses = {"l1": F.l1_loss(synthetic.float(), target)}
    if discriminator is not None:
        losses["adversarial"] = lsgan(discriminator(torch.cat([source, synthetic], dim=1)), True)
    return losses


def discriminator_loss(
    source: torch.Tensor, synthetic: torch.Tensor, target: torch.Tensor, discriminator: nn.Module
) -> torch.Tensor:
    """Half the sum of the losses on acquired and on synthetic targets, as in pix2pix (Isola et al., CVPR 2017)."""
    on_target = lsgan(discriminator(torch.cat([source, target], dim=1)), True)
    on_synthetic = lsgan(discriminator(torch.cat([source, synthetic.detach()], dim=1)), False)
    return (on_target + on_synthetic) / 2
