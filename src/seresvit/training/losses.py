"""What training minimises: the weighted sum of an adversarial term, L1, MS-SSIM, gradient difference and perceptual.

A term is named as its weight in the settings of a stage: "ms_ssim" is weighted by `ms_ssim_weight`. Images are
(B, C, H, W) in [-1, 1]; terms are scalars, computed in float32 whatever the precision of the networks.
"""

import torch
import torch.nn.functional as F

from seresvit.config import StageSettings
from seresvit.data.intensity import Intensity
from seresvit.training.perceptual import perceptual_difference

# Wang, Simoncelli, Bovik 2003: the weight of each scale, finest first; the window's side and its Gaussian's width.
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW, SIGMA = 11, 1.5


def generator_losses(
    stage: StageSettings,
    synthetic_BCHW: torch.Tensor,
    target_BCHW: torch.Tensor,
    score_of_synthetic: torch.Tensor | None = None,
    weights_BCHW: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The unweighted terms of the generator's loss, those alone whose weight in `stage` is above zero.

    `score_of_synthetic` is what the discriminator says of source‖synthetic; only the adversarial term needs it.
    `weights_BCHW` (see `pixel_weights`) enters L1 alone. Raises ConfigError for an unusable `perceptual_file`.
    """
    synthetic_BCHW, target_BCHW = synthetic_BCHW.float(), target_BCHW.float()
    losses = {}
    if stage.adversarial_weight:
        if score_of_synthetic is None:
            raise ValueError("the adversarial term needs the discriminator's score of the synthetic image")
        losses["adversarial"] = adversarial(stage.adversarial, score_of_synthetic)
    if stage.l1_weight:
        losses["l1"] = weighted_l1(synthetic_BCHW, target_BCHW, weights_BCHW)
    if stage.ms_ssim_weight:
        losses["ms_ssim"] = 1 - ms_ssim(synthetic_BCHW + 1, target_BCHW + 1, data_range=2.0)
    if stage.gradient_weight:
        losses["gradient"] = gradient_difference(synthetic_BCHW, target_BCHW)
    if stage.perceptual_weight:
        losses["perceptual"] = perceptual_difference(stage.perceptual_file, synthetic_BCHW, target_BCHW)
    return losses


def total(stage: StageSettings, terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of the terms of `generator_losses`, each times its weight: what the generator minimises."""
    return torch.stack([getattr(stage, f"{name}_weight") * term for name, term in terms.items()]).sum()


def discriminator_loss(
    stage: StageSettings, score_of_target: torch.Tensor, score_of_synthetic: torch.Tensor
) -> torch.Tensor:
    """Half the sum of the losses on acquired and on synthetic targets, as in pix2pix (Isola et al., CVPR 2017)."""
    on_target = judged(stage.adversarial, score_of_target, is_target=True)
    on_synthetic = judged(stage.adversarial, score_of_synthetic, is_target=False)
    return (on_target + on_synthetic) / 2


def judged(kind: str, scores: torch.Tensor, is_target: bool) -> torch.Tensor:
    """What a discriminator loses by these patch scores, of an acquired target (`is_target`) or of a synthetic one.

    "lsgan": squared distance from 1 or 0 (Mao et al., ICCV 2017). "hinge": Lim and Ye 2017. "bce": Goodfellow et al.,
    NeurIPS 2014; softplus(-x) is -log σ(x).
    """
    scores = scores.float()
    if kind == "lsgan":
        return (scores - float(is_target)).square().mean()
    signed = scores if is_target else -scores
    return F.relu(1 - signed).mean() if kind == "hinge" else F.softplus(-signed).mean()


def adversarial(kind: str, scores: torch.Tensor) -> torch.Tensor:
    """What the generator loses by the scores of its images: it wants them taken for acquired.

    With hinge it is the negative mean score; with BCE it is -log σ, the form that does not saturate.
    """
    return -scores.float().mean() if kind == "hinge" else judged(kind, scores, is_target=True)


def weighted_l1(
    synthetic_BCHW: torch.Tensor, target_BCHW: torch.Tensor, weights_BCHW: torch.Tensor | None = None
) -> torch.Tensor:
    """The mean over all pixels of weight times absolute difference; weights of 1, or None, give plain L1.

    It is not divided by the sum of the weights, so that an image counts the same whatever else is in its batch.
    """
    difference_BCHW = (synthetic_BCHW - target_BCHW).abs()
    return (difference_BCHW if weights_BCHW is None else weights_BCHW * difference_BCHW).mean()


def tissue_weights(stage: StageSettings, target_BCHW: torch.Tensor, intensity: Intensity) -> torch.Tensor | None:
    """The weight of every pixel by the HU of its target, 1 outside all `stage.tissue_weights`; None when there is none.

    `intensity` is the rule that scaled the target to [-1, 1]. What it clipped counts as its bound.
    """
    if not stage.tissue_weights:
        return None
    target_hu_BCHW = (target_BCHW.float() + 1) * ((intensity.high - intensity.low) / 2) + intensity.low
    weights_BCHW = torch.ones_like(target_hu_BCHW)
    for tissue in reversed(stage.tissue_weights):
        low, high = tissue.hu
        weights_BCHW[(target_hu_BCHW >= low) & (target_hu_BCHW <= high)] = tissue.weight
    return weights_BCHW


def pixel_weights(
    stage: StageSettings, target_BCHW: torch.Tensor, intensity: Intensity, mask_weights_BCHW: torch.Tensor | None = None
) -> torch.Tensor | None:
    """The weight of every pixel in L1, by its tissue times by its label in the mask; None when neither is asked for."""
    tissue_BCHW = tissue_weights(stage, target_BCHW, intensity)
    if tissue_BCHW is None or mask_weights_BCHW is None:
        return mask_weights_BCHW if tissue_BCHW is None else tissue_BCHW
    return tissue_BCHW * mask_weights_BCHW


def gradient_difference(synthetic_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> torch.Tensor:
    """How far the steps between neighbouring pixels differ in size, rows and columns added.

    Mathieu, Couprie, LeCun, ICLR 2016, equation 6 with α = 1, as a mean instead of a sum.
    """
    differences = [
        (synthetic_BCHW.diff(dim=axis).abs() - target_BCHW.diff(dim=axis).abs()).abs().mean() for axis in (-2, -1)
    ]
    return differences[0] + differences[1]


def ms_ssim(image_BCHW: torch.Tensor, reference_BCHW: torch.Tensor, data_range: float) -> torch.Tensor:
    """The multi-scale structural similarity, 1 for equal images, mean over images and channels; values not negative.

    Wang, Simoncelli, Bovik, Asilomar 2003: contrast and structure at every scale, luminance at the last, Gaussian
    window. Five scales need 176 pixels a side. A smaller image has fewer, their weights scaled to the same sum: four
    from 88, three from 44, two from 22, one from 11, which is plain SSIM. Raises ValueError for a side below that.
    """
    side = min(image_BCHW.shape[-2:])
    scales = sum(side >= WINDOW * 2**scale for scale in range(len(MS_SSIM_WEIGHTS)))
    if not scales:
        raise ValueError(f"an image of {side} pixels is smaller than the SSIM window of {WINDOW}")
    share = sum(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS)
    # Channels are images of their own. Half precision would lose the variance of flat regions.
    x, y = (images.float().flatten(0, 1)[:, None] for images in (image_BCHW, reference_BCHW))
    product = torch.ones(len(x), device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for scale, weight in enumerate(MS_SSIM_WEIGHTS[:scales], 1):
            luminance, contrast = _similarity(x, y, data_range)
            similarity = (luminance * contrast if scale == scales else contrast).mean((1, 2, 3))
            # Below zero a power is not defined; at zero its slope is not finite.
            product = product * similarity.clamp(min=1e-6) ** (weight / share)
            if scale < scales:
                x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return product.mean()


def _similarity(x: torch.Tensor, y: torch.Tensor, data_range: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Luminance and contrast-structure of every whole window (Wang et al., IEEE TIP 2004, equations 6 and 13)."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y, square_x, square_y, product = _blurred(torch.cat([x, y, x * x, y * y, x * y])).chunk(5)
    variances = square_x - mean_x * mean_x + square_y - mean_y * mean_y
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    contrast = (2 * (product - mean_x * mean_y) + c2) / (variances + c2)
    return luminance, contrast


def _blurred(x_B1HW: torch.Tensor) -> torch.Tensor:
    """The images under the Gaussian window, where it lies inside them."""
    offsets = torch.arange(WINDOW, device=x_B1HW.device, dtype=torch.float32) - WINDOW // 2
    kernel = torch.softmax(-(offsets**2) / (2 * SIGMA**2), dim=0)
    return F.conv2d(F.conv2d(x_B1HW, kernel.reshape(1, 1, -1, 1)), kernel.reshape(1, 1, 1, -1))
