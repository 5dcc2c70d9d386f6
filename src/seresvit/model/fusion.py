"""The fusions: how a transformer block joins its transformer and CNN features.

One interface: a fusion takes the concatenated features x (B, 2C, H, W), channels 0..C-1 from the transformer and
C..2C-1 from the CNN, and returns features of the same shape. What scales the features stands in submodules of two
names, and is exactly what they return; that is where `record_gates` listens and `altered_gates` intervenes:

- `gate`, a score for each channel: (B, 2C).
- `map`, a score for each position: (B, K, H, W), K = 1 for all channels alike, K = 2 for either branch (transformer,
  CNN), K = 2C for each channel.

Papers whose fusion adds the two branches up and returns C channels are followed up to that sum: the compression behind
every fusion takes 2C channels and learns the sum itself. `settings.reduction` (16) divides the width of every
bottleneck. A fusion sets its own first weights: those of torch, where it says nothing else.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from seresvit.config import FusionSettings


class Concatenation(nn.Identity):
    """The features as they are: plain ResViT (Dalmaz et al., IEEE TMI 2022)."""

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()


class _ScaledChannels(nn.Module):
    """x · gate(x): every channel scaled by a score of its own, the same at all positions."""

    gate: nn.Module

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """The features scaled channel by channel, (B, 2C, H, W)."""
        return x_BCHW * self.gate(x_BCHW)[:, :, None, None]


class SqueezeExcitation(_ScaledChannels):
    """x · σ(W2 · relu(W1 · mean_HW(x))): every channel scaled by a score that the whole image decides.

    Hu, Shen, Sun, CVPR 2018, equations 2 to 4, without biases. It sees which channel, never where in the image.
    """

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()
        self.gate = _squeeze_excitation(channels, settings)


class FrozenSqueezeExcitation(_ScaledChannels):
    """x · σ(W2 · relu(W1 · 1)): scores that are learned and then the same for every image; the control for `se`.

    Parameters and operations are those of `se`, the mean included, which counts for nothing: 0 · mean + 1. Where `se`
    is better than this, the reason is that it adapts to the image, not what it costs nor that channels are weighted.
    """

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()
        self.gate = _squeeze_excitation(channels, settings, _Ones)


class SpatialChannelSqueezeExcitation(nn.Module):
    """x · (gate + map): the scores of `se` for channels, and σ(w · x) of each position for positions.

    Roy, Navab, Wachinger, MICCAI 2018: cSE and sSE computed side by side and added, without biases. Their reduction is
    2. A feature is scaled by up to 2.
    """

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()
        self.gate = _squeeze_excitation(channels, settings)
        self.map = nn.Sequential(OrderedDict(score=nn.Conv2d(channels, 1, 1, bias=False), sigmoid=nn.Sigmoid()))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """The features scaled by channel plus position, (B, 2C, H, W)."""
        return x_BCHW * (self.gate(x_BCHW)[:, :, None, None] + self.map(x_BCHW))


class Cbam(nn.Module):
    """x' = x · σ(MLP(mean_HW(x)) + MLP(max_HW(x))), then x' · σ(f7×7([mean_C(x'), max_C(x')])): which, then where.

    Woo, Park, Lee, Kweon, ECCV 2018, equations 1 to 3, the MLP being that of `se`; as written there, without the batch
    norm that their code puts behind the 7×7 convolution.
    """

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()
        self.gate = _MeanAndMaxGate(channels, settings)
        self.map = _MeanAndMaxMap()

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """The features scaled by channel, then by position, (B, 2C, H, W)."""
        x_BCHW = x_BCHW * self.gate(x_BCHW)[:, :, None, None]
        return x_BCHW * self.map(x_BCHW)


class EfficientChannelAttention(_ScaledChannels):
    """x · σ(conv1d_k(mean_HW(x))): a channel's score from the means of the k channels around it, k = 5 of 512.

    Wang et al., CVPR 2020, section 3.2 with γ = 2, b = 1: k is |log2(2C) / 2 + 1 / 2|, made odd. Neighbours are those
    in the order of channels; at the seam between the branches they belong to the other one.
    """

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()
        size = int(math.log2(channels) / 2 + 1 / 2) // 2 * 2 + 1
        self.gate = nn.Sequential(
            OrderedDict(
                squeeze=_Mean(),
                row=nn.Unflatten(1, (1, channels)),
                conv=nn.Conv1d(1, 1, size, padding=size // 2, bias=False),
                column=nn.Flatten(),
                sigmoid=nn.Sigmoid(),
            )
        )


class GatedChannelTransformation(_ScaledChannels):
    """x · (1 + tanh(γ · ŝ + β)), s = α · |x|₂ of each channel, ŝ = √2C · s / |s|₂: channels compete or help another.

    Yang, Zhu, Wu, Yang, CVPR 2020, section 3, with the 2-norm and ε = 10⁻⁵ below both roots. It starts as the identity
    (α = 1, γ = β = 0). Its gate is in (0, 2), not (0, 1).
    """

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()
        self.gate = _CompetingGate(channels)


class SelectiveKernel(_ScaledChannels):
    """[a · transformer, (1 − a) · CNN], a the softmax over the branches of A·z and B·z, z = relu(W · mean(T + X)).

    Li, Wang, Hu, Yang, CVPR 2019, equations 1 to 6, with the two branches in the place of two kernels; z has
    max(C / reduction, 32) numbers. Without the batch norm inside relu(·), which one image cannot train; W has a bias
    for its shift.
    """

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()
        self.gate = _BranchSoftmaxGate(channels // 2, max(channels // 2 // settings.reduction, 32))


class AttentionalFeatureFusion(nn.Module):
    """[M · transformer, (1 − M) · CNN], M = σ(L(T + X) + G(mean_HW(T + X))), a number for each channel and position.

    Dai et al., WACV 2021, sections 3 and 4 (MS-CAM, AFF): L and G are bottlenecks of 1×1 convolutions; their
    reduction is 4. Without batch norm, which the mean of one image cannot train; the convolutions have biases instead.
    """

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()
        self.map = _MultiScaleMap(channels // 2, max(channels // 2 // settings.reduction, 1))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """The features scaled one by one, (B, 2C, H, W)."""
        return x_BCHW * self.map(x_BCHW)


class AttentionGate(nn.Module):
    """[transformer, α · CNN], α = σ(ψ · relu(W_x · CNN + W_g · transformer + b_g) + b_ψ) at each position.

    Oktay et al., MIDL 2018, equations 1 and 2: the transformer's features are the gating signal that queries the CNN's.
    Both are on one grid here, so that nothing is resampled. The hidden width is C / reduction, theirs C / 2.
    """

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()
        self.map = _QueriedMap(channels // 2, max(channels // 2 // settings.reduction, 1))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """The transformer's features as they are, the CNN's scaled by position, (B, 2C, H, W)."""
        return _scaled_branches(x_BCHW, self.map(x_BCHW))


class SpatialSqueezeExcitation(nn.Module):
    """se(x) · [2b, 2(1 − b)], b = σ(w · x + v) at each position: `se`, and where which branch counts more.

    Ours. The balance b takes from one branch what it gives to the other; w and v start at 0, so that the fusion starts
    as exactly `se`. It adds 2C + 1 parameters and one pass over the features.
    """

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()
        self.gate = _squeeze_excitation(channels, settings)
        self.map = _BalanceMap(channels)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """The features scaled by channel, and each branch by position, (B, 2C, H, W)."""
        return _scaled_branches(x_BCHW, self.map(x_BCHW)) * self.gate(x_BCHW)[:, :, None, None]


FUSIONS: dict[str, type[nn.Module]] = {
    "concat": Concatenation,
    "se": SqueezeExcitation,
    "se-frozen": FrozenSqueezeExcitation,
    "scse": SpatialChannelSqueezeExcitation,
    "cbam": Cbam,
    "eca": EfficientChannelAttention,
    "gct": GatedChannelTransformation,
    "sk": SelectiveKernel,
    "aff": AttentionalFeatureFusion,
    "attention-gate": AttentionGate,
    "spatial-se": SpatialSqueezeExcitation,
}


@contextmanager
def record_gates(network: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """A dictionary that each forward pass fills with the gates of its images: `gates["art_1"]`, (B, 2C), in (0, 1).

    Maps stand under `gates["art_1.map"]`, (B, K, H, W) on the grid of the features. Those of `gct` and `spatial-se`
    reach up to 2. Only the last forward pass is kept. A fusion without a gate or a map has no entry. The hooks are gone
    after the block, also after an error in it.
    """
    gates: dict[str, torch.Tensor] = {}

    def note(name: str, value: torch.Tensor) -> None:
        gates[name] = value.detach()

    with _hooked(network, note):
        yield gates


@contextmanager
def altered_gates(network: nn.Module, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the block, every gate and map is what `change(name, value)` makes of it, in each forward pass.

    Names and shapes are those of `record_gates`. What `change` returns need only broadcast to the shape of `value`.
    `record_gates` sees altered values when it is entered inside the block, the network's own when outside of it.
    """

    def altered(name: str, value: torch.Tensor) -> torch.Tensor:
        return change(name, value).to(value).expand_as(value)

    with _hooked(network, altered):
        yield


@contextmanager
def _hooked(network: nn.Module, act: Callable[[str, torch.Tensor], torch.Tensor | None]) -> Iterator[None]:
    """Calls `act` with the name and the value of every gate and map; what it returns, unless None, replaces it."""
    names = {
        name.replace(".fuse.gate", "").replace(".fuse.map", ".map"): module
        for name, module in network.named_modules()
        if name.endswith((".fuse.gate", ".fuse.map"))
    }
    handles = [
        module.register_forward_hook(lambda _, inputs, value, name=name: act(name, value))
        for name, module in names.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _mean(x_BCHW: torch.Tensor) -> torch.Tensor:
    """mean_HW(x), (B, C)."""
    if torch.jit.is_tracing() or not x_BCHW.requires_grad:
        return x_BCHW.mean((2, 3))
    return _MeanInTraining.apply(x_BCHW)


class _MeanInTraining(torch.autograd.Function):
    """The mean, whose gradient is one number a channel that is only viewed as an image.

    That of torch is written out, and in another memory layout than that of channels-last features, to which adding it
    took more time than all the rest of the gate.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x_BCHW: torch.Tensor) -> torch.Tensor:
        return x_BCHW.mean((2, 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, gradient_BC: torch.Tensor) -> torch.Tensor:
        return (gradient_BC / ctx.shape[2:].numel())[:, :, None, None].expand(ctx.shape)


class _Mean(nn.Module):
    """`_mean` as a layer."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return _mean(x_BCHW)


def _squeeze_excitation(channels: int, settings: FusionSettings, squeeze: type[_Mean] = _Mean) -> nn.Sequential:
    """σ(W2 · relu(W1 · squeeze(x))), (B, channels); Xavier at the start."""
    hidden = max(channels // settings.reduction, 1)
    reduce, expand = nn.Linear(channels, hidden, bias=False), nn.Linear(hidden, channels, bias=False)
    for linear in (reduce, expand):
        nn.init.xavier_uniform_(linear.weight)
    return nn.Sequential(
        OrderedDict(
            squeeze=squeeze(),
            reduce=reduce,
            relu=nn.ReLU(),
            expand=expand,
            sigmoid=nn.Sigmoid(),
        )
    )


def _scaled_branches(x_BCHW: torch.Tensor, map_B2HW: torch.Tensor) -> torch.Tensor:
    """The first half of the channels scaled by the first map, the second half by the second."""
    return (x_BCHW.unflatten(1, (2, -1)) * map_B2HW[:, :, None]).flatten(1, 2)


class _Ones(_Mean):
    """Ones in the place of the means, at the cost of the means, backwards too."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return 0.0 * super().forward(x_BCHW) + 1.0


class _MeanAndMaxGate(nn.Module):
    """σ(MLP(mean_HW(x)) + MLP(max_HW(x))), (B, 2C)."""

    def __init__(self, channels: int, settings: FusionSettings):
        super().__init__()
        hidden = max(channels // settings.reduction, 1)
        self.reduce = nn.Linear(channels, hidden, bias=False)
        self.expand = nn.Linear(hidden, channels, bias=False)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        mean_BC, max_BC = _mean(x_BCHW), x_BCHW.amax((2, 3))
        return torch.sigmoid(sum(self.expand(torch.relu(self.reduce(y_BC))) for y_BC in (mean_BC, max_BC)))


class _MeanAndMaxMap(nn.Module):
    """σ(f7×7([mean_C(x), max_C(x)])), (B, 1, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        mean_and_max_B2HW = torch.cat([x_BCHW.mean(1, keepdim=True), x_BCHW.amax(1, keepdim=True)], dim=1)
        return torch.sigmoid(self.conv(mean_and_max_B2HW))


class _CompetingGate(nn.Module):
    """1 + tanh(γ · ŝ + β), (B, 2C) in (0, 2), of `GatedChannelTransformation`."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels))
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        # In float32 whatever the precision around it: thousands of squares are added.
        norm_BC = torch.linalg.vector_norm(x_BCHW, dim=(2, 3), dtype=torch.float32)
        s_BC = self.alpha * torch.sqrt(norm_BC.square() + 1e-5)
        s_BC = s_BC / torch.sqrt(s_BC.square().mean(1, keepdim=True) + 1e-5 / s_BC.shape[1])
        return (1 + torch.tanh(self.gamma * s_BC + self.beta)).to(x_BCHW.dtype)


class _BranchSoftmaxGate(nn.Module):
    """[a, 1 − a], (B, 2C), of `SelectiveKernel`."""

    def __init__(self, branch_channels: int, hidden: int):
        super().__init__()
        self.reduce = nn.Linear(branch_channels, hidden)
        self.expand = nn.Linear(hidden, 2 * branch_channels, bias=False)  # A and B, one below the other

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        s_BC = _mean(x_BCHW).unflatten(1, (2, -1)).sum(1)  # the mean of a sum is the sum of means
        logits_BC = self.expand(torch.relu(self.reduce(s_BC)))
        return torch.softmax(logits_BC.unflatten(1, (2, -1)), dim=1).flatten(1).to(x_BCHW.dtype)


class _MultiScaleMap(nn.Module):
    """[M, 1 − M], (B, 2C, H, W), of `AttentionalFeatureFusion`."""

    def __init__(self, branch_channels: int, hidden: int):
        super().__init__()
        self.local, self.whole = (
            nn.Sequential(
                OrderedDict(
                    reduce=nn.Conv2d(branch_channels, hidden, 1),
                    relu=nn.ReLU(),
                    expand=nn.Conv2d(hidden, branch_channels, 1),
                )
            )
            for _ in range(2)
        )

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        sum_BCHW = x_BCHW.unflatten(1, (2, -1)).sum(1)
        m_BCHW = torch.sigmoid(self.local(sum_BCHW) + self.whole(_mean(sum_BCHW)[:, :, None, None]))
        return torch.cat([m_BCHW, 1 - m_BCHW], dim=1)


class _QueriedMap(nn.Module):
    """[1, α], (B, 2, H, W), of `AttentionGate`."""

    def __init__(self, branch_channels: int, hidden: int):
        super().__init__()
        self.query = nn.Conv2d(branch_channels, hidden, 1)
        self.key = nn.Conv2d(branch_channels, hidden, 1, bias=False)
        self.score = nn.Conv2d(hidden, 1, 1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        transformer_BCHW, cnn_BCHW = x_BCHW.chunk(2, dim=1)
        alpha_B1HW = torch.sigmoid(self.score(torch.relu(self.key(cnn_BCHW) + self.query(transformer_BCHW))))
        return F.pad(alpha_B1HW, (0, 0, 0, 0, 1, 0), value=1.0)  # a map of ones in front of it


class _BalanceMap(nn.Module):
    """[2b, 2(1 − b)], (B, 2, H, W) in (0, 2), of `SpatialSqueezeExcitation`."""

    def __init__(self, channels: int):
        super().__init__()
        self.score = nn.Conv2d(channels, 1, 1)
        for parameter in self.score.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        balance_B1HW = torch.sigmoid(self.score(x_BCHW))
        return torch.cat([2 * balance_B1HW, 2 * (1 - balance_B1HW)], dim=1)
