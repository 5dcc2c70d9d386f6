"""Loss terms against other implementations, written formulas, and what a setting promises of them."""

import math

import numpy as np
import pytest
import pytorch_msssim
import safetensors.torch
import skimage.metrics
import torch
from torch import nn
from torch.nn import functional as F

from seresvit.config import ConfigError, StageSettings, load_config
from seresvit.data.intensity import Intensity
from seresvit.model.discriminator import Discriminator
from seresvit.training.losses import (
    discriminator_loss,
    generator_losses,
    gradient_difference,
    ms_ssim,
    pixel_weights,
    tissue_weights,
    total,
)
from seresvit.training.perceptual import perceptual_difference

VGG16 = [64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512]


def images(height, width, seed=0, count=2):
    """(target, blurred and noisy copy), smooth enough that their structure agrees, in [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 1, 6, 6, generator=rng) * 2 - 1
    target = F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(-1, 1)
    return target, (0.8 * target + 0.15 * torch.randn(target.shape, generator=rng)).clamp(-1, 1)


def stage(**settings):
    return StageSettings(**{"adversarial_weight": 0, "l1_weight": 0, **settings})


def test_only_weighted_terms_are_computed_and_their_sum_is_weighted():
    target, synthetic = images(32, 40)
    everything = stage(adversarial_weight=2, l1_weight=3, ms_ssim_weight=5, gradient_weight=7)
    terms = generator_losses(everything, synthetic, target, score_of_synthetic=torch.full((2, 1, 3, 3), 0.25))
    assert terms.keys() == {"adversarial", "l1", "ms_ssim", "gradient"}
    expected = 2 * terms["adversarial"] + 3 * terms["l1"] + 5 * terms["ms_ssim"] + 7 * terms["gradient"]
    torch.testing.assert_close(total(everything, terms), expected)
    assert generator_losses(stage(l1_weight=1), synthetic, target).keys() == {"l1"}
    assert all(term.dtype == torch.float32 for term in generator_losses(
        everything, synthetic.bfloat16(), target, torch.zeros(2, 1, 3, 3, dtype=torch.bfloat16)
    ).values())  # fmt: skip


@pytest.mark.parametrize(
    "kind, of_generator, of_discriminator",
    [
        ("lsgan", (0.25 - 1) ** 2, ((0.5 - 1) ** 2 + 0.25**2) / 2),
        ("hinge", -0.25, (0.5 + 1.25) / 2),
        ("bce", math.log(1 + math.exp(-0.25)), (math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(0.25))) / 2),
    ],
)
def test_adversarial_losses_by_hand(kind, of_generator, of_discriminator):
    settings = stage(adversarial=kind, adversarial_weight=1)
    synthetic, target = torch.full((2, 1, 4, 4), 0.25), torch.full((2, 1, 4, 4), 0.5)
    image = torch.zeros(2, 1, 8, 8)
    terms = generator_losses(settings, image, image, score_of_synthetic=synthetic)
    assert terms["adversarial"].item() == pytest.approx(of_generator)
    assert discriminator_loss(settings, target, synthetic).item() == pytest.approx(of_discriminator)


@pytest.mark.parametrize("kind", ["lsgan", "hinge", "bce"])
def test_both_players_pull_scores_apart(kind):
    settings = stage(adversarial=kind, adversarial_weight=1)
    score = torch.zeros(1, 1, 2, 2, requires_grad=True)
    image = torch.zeros(1, 1, 8, 8)
    generator_losses(settings, image, image, score)["adversarial"].backward()
    assert (score.grad < 0).all()
    on_target, on_synthetic = (torch.full((1, 1, 2, 2), 0.5, requires_grad=True) for _ in range(2))
    discriminator_loss(settings, on_target, on_synthetic).backward()
    assert (on_target.grad < 0).all() and (on_synthetic.grad > 0).all()


@pytest.mark.parametrize("size", [(176, 176), (192, 256), (320, 176)])
def test_ms_ssim_of_five_scales_is_that_of_pytorch_msssim(size):
    target, synthetic = images(*size)
    expected = pytorch_msssim.ms_ssim(synthetic + 1, target + 1, data_range=2.0)
    assert ms_ssim(synthetic + 1, target + 1, 2.0).item() == pytest.approx(expected.item(), abs=1e-5)
    assert 0.2 < expected < 0.95


@pytest.mark.parametrize("size", [(11, 30), (21, 21)])
def test_ms_ssim_of_one_scale_is_the_ssim_of_scikit_image(size):
    target, synthetic = images(*size, count=1)
    of_pixels = skimage.metrics.structural_similarity(
        synthetic[0, 0].numpy() + 1, target[0, 0].numpy() + 1, data_range=2.0, full=True,
        gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    )[1]  # fmt: skip
    inside = of_pixels[5 : size[0] - 5, 5 : size[1] - 5].mean()
    # The published weights add up to 1.0001, which is the exponent here.
    assert ms_ssim(synthetic + 1, target + 1, 2.0).item() == pytest.approx(inside**1.0001, abs=2e-6)


def test_ms_ssim_of_small_and_unrelated_images():
    for side, scales in ((11, 1), (22, 2), (44, 3), (88, 4), (176, 5)):
        target, _ = images(side, side, seed=1)
        assert ms_ssim(target, target, 2.0).item() == pytest.approx(1)
        weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
        # Two flat images differ in luminance alone, which enters at the last scale with its weight.
        flat, brighter = torch.full((1, 1, side, side), 0.5), torch.full((1, 1, side, side), 1.5)
        luminance = (2 * 0.5 * 1.5 + 0.02**2) / (0.5**2 + 1.5**2 + 0.02**2)
        expected = luminance ** (weights[-1] / weights.sum())
        # The variance of a flat region is a difference of equal numbers, in float32 as exact as the processor sums.
        assert ms_ssim(flat, brighter, 2.0).item() == pytest.approx(expected, abs=5e-4)
    with pytest.raises(ValueError, match="smaller than the SSIM window"):
        ms_ssim(target[..., :10, :], target[..., :10, :], 2.0)
    inverted = (1 - target).requires_grad_()
    (1 - ms_ssim(inverted, target + 1, 2.0)).backward()
    assert torch.isfinite(inverted.grad).all()


def test_gradient_difference_by_hand():
    """Mathieu 2016, eq. 6: | |Y_ij - Y_i-1,j| - |Ŷ_ij - Ŷ_i-1,j| | + the same along the other axis."""
    target = torch.tensor([[0.0, 1.0, 1.0], [0.0, 3.0, 1.0]])[None, None]
    synthetic = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])[None, None]
    rows = np.mean([abs(0 - 1), abs(2 - 0), abs(0 - 0)])
    columns = np.mean([abs(1 - 1), abs(0 - 0), abs(3 - 0), abs(2 - 0)])
    assert gradient_difference(synthetic, target).item() == pytest.approx(rows + columns)
    assert gradient_difference(target + 0.5, target).item() == pytest.approx(0)


def test_tissue_weights_follow_the_hu_of_the_target():
    hu = torch.tensor([-1000.0, 40.0, 150.0, 300.0, 2000.0]).reshape(1, 1, 1, 5)
    intensity = Intensity("window", -1024.0, 1024.0, "HU")
    target = torch.from_numpy(intensity.normalise(hu.numpy()))
    settings = stage(l1_weight=1, tissue_weights=[{"hu": [250, 3071], "weight": 4}, {"hu": [100, 260], "weight": 3}])
    weights = tissue_weights(settings, target, intensity)
    assert weights.flatten().tolist() == [1, 1, 3, 4, 4]
    synthetic = target + torch.arange(5.0) / 10
    weighted = generator_losses(settings, synthetic, target, weights_BCHW=weights)["l1"]
    assert weighted.item() == pytest.approx((0 + 0.1 + 3 * 0.2 + 4 * 0.3 + 4 * 0.4) / 5)
    plain = generator_losses(settings, synthetic, target)["l1"]
    even = generator_losses(settings, synthetic, target, weights_BCHW=torch.ones_like(target))["l1"]
    assert plain.item() == even.item() == pytest.approx(0.2)
    assert tissue_weights(stage(l1_weight=1), target, intensity) is None
    mask_weights = torch.tensor([2.0, 1.0, 1.0, 5.0, 1.0]).reshape(1, 1, 1, 5)
    assert pixel_weights(settings, target, intensity, mask_weights).flatten().tolist() == [2, 1, 3, 20, 4]
    assert pixel_weights(stage(l1_weight=1), target, intensity, mask_weights) is mask_weights
    assert pixel_weights(stage(l1_weight=1), target, intensity) is None


@pytest.fixture(scope="module")
def vgg16():
    """VGG-16 up to relu4_3 as torchvision lays it out, with random weights."""
    torch.manual_seed(0)
    layers, channels = [], 3
    for width in VGG16:
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.mark.parametrize("suffix, prefix", [(".pth", "features."), (".safetensors", "")])
def test_perceptual_difference_of_a_users_file(tmp_path, monkeypatch, vgg16, suffix, prefix):
    path = tmp_path / f"vgg16{suffix}"
    state = {prefix + key: tensor for key, tensor in vgg16.state_dict().items()}
    state[prefix + "28.weight"] = torch.zeros(1)
    (torch.save if suffix == ".pth" else safetensors.torch.save_file)(state, path)
    target, synthetic = images(32, 24)
    synthetic.requires_grad_()
    colour = ((t.repeat(1, 3, 1, 1) + 1) / 2 for t in (synthetic, target))
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x, y = ((c - mean[:, None, None]) / deviation[:, None, None] for c in colour)
    expected = []
    for number, layer in enumerate(vgg16):
        x, y = layer(x), layer(y)
        if number in (3, 8, 15, 22):
            expected.append((x - y).square().mean().item())
    settings = stage(perceptual_weight=1, perceptual_file=str(path))
    found = generator_losses(settings, synthetic, target)["perceptual"]
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-4)
    found.backward()
    assert synthetic.grad.abs().sum() > 0
    with monkeypatch.context() as once_loaded:  # what is made on the host cannot be copied into a recorded step
        once_loaded.setattr(torch, "tensor", None)
        assert torch.equal(generator_losses(settings, synthetic, target)["perceptual"], found)


def test_a_file_that_is_no_vgg16_is_one_line(tmp_path, vgg16):
    image = torch.zeros(1, 1, 16, 16)
    torch.save({"0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({**vgg16.state_dict(), "2.weight": torch.zeros(64, 64, 5, 5)}, tmp_path / "five.pth")
    torch.save({**vgg16.state_dict(), "5.weight": torch.zeros(128, 32, 3, 3)}, tmp_path / "thin.pth")
    for name, said in (
        ("other.pth", r"features.0.bias of a VGG-16 has shape \[64\], found none"),
        ("text.pth", "cannot be read"),
        ("none.safetensors", "cannot be read"),
        ("five.pth", r"features.2.weight .* found \[64, 64, 5, 5\]"),
        ("thin.pth", r"features.5.weight .* found \[128, 32, 3, 3\]"),
    ):
        with pytest.raises(ConfigError, match=rf"perceptual_file .*{name}: {said}") as error:
            perceptual_difference(str(tmp_path / name), image, image)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.stage1={l1_weight: 0, adversarial_weight: 0}", "nothing to minimise"),
        ("train.stage2={perceptual_weight: 1}", "perceptual_file"),
        ("train.stage1={adversarial: wgan}", "lsgan"),
        ("train.stage1={tissue_weights: [{hu: [300, 100], weight: 2}]}", "lower bound"),
    ],
)
def test_a_wrong_setting_is_one_helpful_line(override, said):
    with pytest.raises(ConfigError, match=said):
        load_config(None, [override])


def test_settings_that_the_data_do_not_allow():
    weighted = "train.stage1={tissue_weights: [{hu: [100, 300], weight: 2}]}"
    assert load_config(None, [weighted]).train.stage1.tissue_weights[0].weight == 2
    with pytest.raises(ConfigError, match="target in HU"):
        load_config(None, [weighted, "data.intensity={target: percentile}"])
    with pytest.raises(ConfigError, match="at least 11"):
        load_config(None, ["train.size=8", "train.stage1={ms_ssim_weight: 1, adversarial_weight: 0}"])
    with pytest.raises(ConfigError, match="at least 24"):
        load_config(None, ["train.size=[23,64]"])


def test_the_smallest_image_that_a_discriminator_judges_is_the_one_that_settings_allow():
    discriminator = Discriminator(2, 4)
    assert discriminator(torch.zeros(2, 2, 24, 24)).shape[2:] == (1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(2, 2, 23, 24))


def test_the_defaults_are_the_published_losses():
    settings = StageSettings()
    assert (settings.adversarial, settings.adversarial_weight, settings.l1_weight) == ("lsgan", 1, 100)
    assert settings.ms_ssim_weight == settings.gradient_weight == settings.perceptual_weight == 0
