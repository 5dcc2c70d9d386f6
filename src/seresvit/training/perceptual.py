"""The perceptual term: how far two images differ in the features of a VGG-16, whose weights the user brings.

No weights are shipped or downloaded; docs/architecture.md says where to get them.
"""

import functools
import pickle

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

from seresvit.config import ConfigError

# VGG-16 up to conv4_3: place in torchvision's `features` → output channels, a group between two poolings.
_CONVOLUTIONS = ({0: 64, 2: 64}, {5: 128, 7: 128}, {10: 256, 12: 256, 14: 256}, {17: 512, 19: 512, 21: 512})
# Colour means and deviations of ImageNet, on which those weights were trained.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def perceptual_difference(path: str, synthetic_BCHW: torch.Tensor, target_BCHW: torch.Tensor) -> torch.Tensor:
    """The mean squared difference of VGG-16 features, averaged over relu1_2, relu2_2, relu3_3 and relu4_3, a scalar.

    Johnson, Alahi, Fei-Fei, ECCV 2016, equation 2. Images in [-1, 1]; each channel is seen alone, as a grey image.
    `path`: a state dict of torchvision's VGG-16 in .safetensors or .pth. Raises ConfigError when it is none.
    """
    vgg = load(path, synthetic_BCHW.device)
    with torch.no_grad():
        wanted = _features(vgg, target_BCHW)
    differences = [F.mse_loss(f, w) for f, w in zip(_features(vgg, synthetic_BCHW), wanted, strict=True)]
    return torch.stack([difference.float() for difference in differences]).mean()


def _features(vgg: nn.Module, images_BCHW: torch.Tensor) -> list[torch.Tensor]:
    x = ((images_BCHW.flatten(0, 1)[:, None] + 1) / 2 - vgg.get_buffer("mean")) / vgg.get_buffer("deviation")
    features: list[torch.Tensor] = []
    for group in _CONVOLUTIONS:
        x = F.max_pool2d(x, 2) if features else x
        for number in group:
            x = torch.relu(vgg.get_submodule(str(number))(x))
        features.append(x)
    return features


@functools.lru_cache(maxsize=2)
def load(path: str, device: torch.device) -> nn.Module:
    """The convolutions of the file, frozen, by their number in `features`, and what its images were scaled by.

    Raises ConfigError when it is no VGG-16.
    """
    try:
        if path.endswith(".safetensors"):
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        fault = str(error).split("\n")[0][:120]
        raise ConfigError(f"perceptual_file {path}: cannot be read ({fault}); see docs/architecture.md") from None
    vgg, channels = nn.Module(), 3
    # On the device once: a step that is recorded must not wait for a copy.
    for name, values in (("mean", _MEAN), ("deviation", _DEVIATION)):
        vgg.register_buffer(name, torch.tensor(values).reshape(3, 1, 1))
    for number, wider in (layer for group in _CONVOLUTIONS for layer in group.items()):
        convolution = nn.Conv2d(channels, wider, 3, padding=1)
        for part, parameter in convolution.named_parameters():
            given = state.get(f"features.{number}.{part}", state.get(f"{number}.{part}"))
            if given is None or given.shape != parameter.shape:
                found = "none" if given is None else list(given.shape)
                raise ConfigError(
                    f"perceptual_file {path}: features.{number}.{part} of a VGG-16 has shape {list(parameter.shape)}, "
                    f"found {found}; see docs/architecture.md"
                )
            parameter.data.copy_(given)
        vgg.add_module(str(number), convolution)
        channels = wider
    return vgg.requires_grad_(False).to(device)
