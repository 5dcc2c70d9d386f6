"""The network that synthesises: ResViT (Dalmaz, Yurt, Çukur, IEEE TMI 2022) with a gate at its fusion sites.

Shapes: B image, C channel, H row, W column, N token, D embedding width.
With no transformer block it is the stage-1 network.
Names in the state dict are addresses: `art_6.upsample.0.conv.weight` is where it says.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from seresvit.config import ModelSettings
from seresvit.model.fusion import FUSIONS
from seresvit.model.transformer import Encoder, PatchEmbedding

NUM_BLOCKS = 9


class Generator(nn.Module):
    """SE-ResViT: source (B, C_in, H, W) in [-1, 1] to synthetic target (B, C_out, H, W) in (-1, 1), any H and W."""

    header: dict[str, Any]  # of the checkpoint that it was loaded from, see model/checkpoint.py

    def __init__(self, settings: ModelSettings):
        """Raises ValueError when the settings name transformer blocks but no `token_grid`."""
        super().__init__()
        self.settings = settings
        c, norm = settings.base_channels, settings.norm
        self.stem = conv_norm_relu(norm, settings.in_channels, c, 7, reflect=True)
        self.encode = nn.Sequential(
            conv_norm_relu(norm, c, 2 * c, stride=2), conv_norm_relu(norm, 2 * c, 4 * c, stride=2)
        )
        if settings.transformer_blocks:
            self.transformer = Encoder(settings.vit)
        for number in range(1, NUM_BLOCKS + 1):
            has_transformer = number in settings.transformer_blocks
            block = TransformerArtBlock(settings) if has_transformer else ConvolutionalArtBlock(norm, 4 * c)
            setattr(self, f"art_{number}", block)
        self.decode = nn.Sequential(upsample_norm_relu(norm, 4 * c, 2 * c), upsample_norm_relu(norm, 2 * c, c))
        self.head = nn.Sequential(
            OrderedDict(conv=ReflectedConv2d(c, settings.out_channels, 7, padding=3), tanh=nn.Tanh())
        )
        _initialise(self)

    def forward(self, source_BCHW: torch.Tensor) -> torch.Tensor:
        """The synthetic target (B, C_out, H, W), values in (-1, 1)."""
        height, width = source_BCHW.shape[-2:]
        x_BCHW = pad_to_multiple(source_BCHW, self.settings.stride)
        x_BCHW = self.encode(self.stem(x_BCHW))
        for number in range(1, NUM_BLOCKS + 1):
            block = getattr(self, f"art_{number}")
            x_BCHW = block(x_BCHW, self.transformer) if isinstance(block, TransformerArtBlock) else block(x_BCHW)
        synthetic_BCHW = self.head(self.decode(x_BCHW))
        return synthetic_BCHW[..., :height, :width]


class ConvolutionalArtBlock(nn.Module):
    """An ART block without a transformer: one residual block."""

    def __init__(self, norm: str, channels: int):
        super().__init__()
        self.residual = residual_body(norm, channels)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Features of the same shape."""
        return x_BCHW + self.residual(x_BCHW)


class TransformerArtBlock(nn.Module):
    """An ART block with a transformer branch: x → [transformer(x), x] → fuse → compress → residual block.

    The encoder belongs to the generator, which hands the one shared instance to every block.
    """

    def __init__(self, settings: ModelSettings):
        super().__init__()
        if settings.token_grid is None:
            raise ValueError("token_grid is not set: it is train.size divided by the stride between tokens")
        c, deepest, norm = settings.base_channels, 16 * settings.base_channels, settings.norm
        down = [min(4 * c * 2**i, deepest) for i in range(settings.num_downsamples + 1)]
        self.downsample = nn.Sequential(*(conv_norm_relu(norm, i, o, stride=2) for i, o in pairwise(down)))
        self.embed = PatchEmbedding(down[-1], settings.patch_size, settings.token_grid, settings.vit)
        up = upsample_widths(settings)
        self.upsample = nn.Sequential(*(upsample_norm_relu(norm, i, o) for i, o in pairwise(up)))
        with _draws_of_its_own():
            self.fuse = FUSIONS[settings.fusion.kind](8 * c, settings.fusion)
        self.compress = ChannelCompression(norm, 8 * c, 4 * c)
        self.residual = residual_body(norm, 4 * c)

    def forward(self, x_BCHW: torch.Tensor, transformer: Encoder) -> torch.Tensor:
        """Features of the same shape."""
        x_BCHW = self.compress(self.fuse(self.concatenate(x_BCHW, transformer)))
        return x_BCHW + self.residual(x_BCHW)

    def concatenate(self, x_BCHW: torch.Tensor, transformer: Encoder) -> torch.Tensor:
        """Transformer features, then CNN features, (B, 2C, H, W)."""
        deep_BCHW = self.downsample(x_BCHW)
        patch = self.embed.patch.kernel_size[0]
        grid = (deep_BCHW.shape[-2] // patch, deep_BCHW.shape[-1] // patch)
        tokens_BND = transformer(self.embed(deep_BCHW))
        tokens_BDHW = tokens_BND.transpose(1, 2).unflatten(2, grid)
        return torch.cat([self.upsample(tokens_BDHW), x_BCHW], dim=1)


class ChannelCompression(nn.Module):
    """Residual compression of the fused features to the block's own width, ReLU at the end."""

    def __init__(self, norm: str, in_channels: int, out_channels: int):
        super().__init__()
        self.body = nn.Sequential(
            conv_norm_relu(norm, in_channels, out_channels), conv_norm(norm, out_channels, out_channels)
        )
        self.skip = conv_norm(norm, in_channels, out_channels, 1)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Features (B, out_channels, H, W), not negative."""
        return torch.relu(self.body(x_BCHW) + self.skip(x_BCHW))


def upsample_widths(settings: ModelSettings) -> list[int]:
    """Channels around the upsampling stages of the transformer branch: 768, 512, 256 for the paper's network."""
    c = settings.base_channels
    stages = settings.num_downsamples + settings.patch_size.bit_length() - 1
    return [settings.vit.width, *[8 * c] * (stages > 1), *[4 * c] * max(stages - 1, 1)]


def normalisation(norm: str, channels: int) -> nn.Module:
    """What follows a convolution: "batch" as published, "instance" or "group", each with a learned scale and shift.

    Batch normalisation uses the statistics of the batch in training and their running mean afterwards. The other two
    use those of the image at hand always: of each channel alone (Ulyanov et al. 2016), or of groups of 8 channels (Wu,
    He, ECCV 2018). Instance normalisation is groups of one, so that a map of a single pixel passes too.
    """
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(channels if norm == "instance" else channels // math.gcd(8, channels), channels)


def conv_norm(
    norm: str, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, reflect: bool = False
) -> nn.Sequential:
    """Convolution without bias (the norm has one) that keeps the size at stride 1, and normalisation."""
    convolution = ReflectedConv2d if reflect else nn.Conv2d
    conv = convolution(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=normalisation(norm, out_channels)))


def conv_norm_relu(
    norm: str, in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, reflect: bool = False
) -> nn.Sequential:
    """`conv_norm` followed by a ReLU."""
    layers = conv_norm(norm, in_channels, out_channels, kernel, stride, reflect)
    layers.add_module("relu", nn.ReLU(inplace=True))
    return layers


def upsample_norm_relu(norm: str, in_channels: int, out_channels: int) -> nn.Sequential:
    """Transposed convolution that doubles the size, normalisation, ReLU."""
    conv = nn.ConvTranspose2d(in_channels, out_channels, 3, stride=2, padding=1, output_padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, norm=normalisation(norm, out_channels), relu=nn.ReLU(inplace=True)))


def residual_body(norm: str, channels: int) -> nn.Sequential:
    """What a residual block adds to its input."""
    return nn.Sequential(
        conv_norm_relu(norm, channels, channels, reflect=True), conv_norm(norm, channels, channels, reflect=True)
    )


class ReflectedConv2d(nn.Conv2d):
    """A convolution of an image that goes on as its mirror image beyond its edges, the edge itself not repeated."""

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """What nn.Conv2d with padding_mode="reflect" gives."""
        edge = int(self.padding[0])
        if x_BCHW.is_cuda and x_BCHW.is_contiguous(memory_format=torch.channels_last):
            padded_BCHW = _Reflected.apply(x_BCHW, edge)
        else:
            padded_BCHW = F.pad(x_BCHW, (edge,) * 4, mode="reflect")
        return F.conv2d(padded_BCHW, self.weight, self.bias, self.stride)


class _Reflected(torch.autograd.Function):
    """Reflection padding that keeps channels last.

    On a GPU that of torch changes the memory layout and back around every convolution, in both directions: a quarter of
    the time of a training step.
    """

    @staticmethod
    def forward(ctx: Any, x_BCHW: torch.Tensor, edge: int) -> torch.Tensor:
        """The images with `edge` more pixels on every side."""
        ctx.edge = edge
        batch, channels, height, width = x_BCHW.shape
        size = (batch, channels, height + 2 * edge, width + 2 * edge)
        padded_BCHW = torch.empty(size, dtype=x_BCHW.dtype, device=x_BCHW.device, memory_format=torch.channels_last)
        inner = slice(edge, -edge)
        padded_BCHW[:, :, inner, inner] = x_BCHW
        padded_BCHW[:, :, :edge, inner] = _flipped(x_BCHW[:, :, 1 : edge + 1], 2)
        padded_BCHW[:, :, -edge:, inner] = _flipped(x_BCHW[:, :, -edge - 1 : -1], 2)
        padded_BCHW[..., :edge] = _flipped(padded_BCHW[..., edge + 1 : 2 * edge + 1], 3)
        padded_BCHW[..., -edge:] = _flipped(padded_BCHW[..., -2 * edge - 1 : -edge - 1], 3)
        return padded_BCHW

    @staticmethod
    def backward(ctx: Any, gradient_BCHW: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient of every pixel: its own, and those of its mirror images."""
        edge = ctx.edge

        def folded(part_BCHW: torch.Tensor) -> torch.Tensor:
            columns_BCHW = part_BCHW[..., edge:-edge].clone(memory_format=torch.channels_last)
            columns_BCHW[..., 1 : edge + 1] += _flipped(part_BCHW[..., :edge], 3)
            columns_BCHW[..., -edge - 1 : -1] += _flipped(part_BCHW[..., -edge:], 3)
            return columns_BCHW

        sum_BCHW = folded(gradient_BCHW[:, :, edge:-edge])
        sum_BCHW[:, :, 1 : edge + 1] += _flipped(folded(gradient_BCHW[:, :, :edge]), 2)
        sum_BCHW[:, :, -edge - 1 : -1] += _flipped(folded(gradient_BCHW[:, :, -edge:]), 2)
        return sum_BCHW, None


def _flipped(x_BCHW: torch.Tensor, axis: int) -> torch.Tensor:
    """The images in reverse along the axis; no kernel for the one row or column that most paddings mirror."""
    return x_BCHW.flip(axis) if x_BCHW.shape[axis] > 1 else x_BCHW


def pad_to_multiple(x_BCHW: torch.Tensor, multiple: int) -> torch.Tensor:
    """The images reflected at their lower and right edge up to a multiple of `multiple`, as often as that takes.

    A traced graph, where a size is no number yet, always holds the padding, and takes images of 2 pixels and more.
    """
    tracing = torch.jit.is_tracing()
    for axis in (-2, -1):
        size = x_BCHW.shape[axis]
        padded = (size + multiple - 1) // multiple * multiple
        if tracing or padded != size:
            period = 2 * (size - 1) if tracing else max(2 * (size - 1), 1)
            index = torch.arange(padded, device=x_BCHW.device) % period
            x_BCHW = x_BCHW.index_select(axis, torch.where(index < size, index, period - index))
    return x_BCHW


@torch.no_grad()
def start_as_identity(network: Generator, context_slices: int = 0) -> None:
    """Set the first weights so that the untrained network roughly returns its source (the mean of several sources).

    With `context_slices` (see `DataSettings`) it is the middle slice of each source, without its neighbours.
    Stem and head pass the image on as a pair of channels of opposite sign, which ReLUs cannot cut; each encoding stage
    deals its pixels out to four times as many pairs and each decoding stage gathers them again (a pixel shuffle);
    residual bodies add nothing yet (Goyal et al., 2017) and compressions pass the CNN's features on. The channels that
    are not needed for this keep their random weights. Source and target of one body share most of their detail, so that
    a small budget goes into what differs. With instance normalisation each image comes back up to its brightness and
    contrast, which that norm takes out. Not in the published code. Raises ValueError below 8 base channels.
    """
    if network.settings.base_channels < 8:
        raise ValueError("start_as_identity needs at least 8 base channels to hold the pixels")
    weight = network.state_dict()  # shares its memory with the parameters
    weight["stem.conv.weight"][:2] = 0
    slices = 2 * context_slices + 1
    weight["stem.conv.weight"][0, context_slices::slices, 3, 3] = slices / network.settings.in_channels
    weight["stem.conv.weight"][1] = -weight["stem.conv.weight"][0]
    for stage, pairs in ((0, 1), (1, 4)):
        encode, decode = weight[f"encode.{stage}.conv.weight"], weight[f"decode.{1 - stage}.conv.weight"]
        encode[: 8 * pairs] = 0
        decode[:, : 2 * pairs] = 0
        for pair, dealt, row, column in _pixel_shuffle(pairs):
            for plus, sign in ((0, 1), (1, -1)):
                encode[2 * dealt + plus, 2 * pair, 1 + row, 1 + column] = sign
                encode[2 * dealt + plus, 2 * pair + 1, 1 + row, 1 + column] = -sign
                decode[2 * dealt + plus, 2 * pair, 1 + row, 1 + column] = sign
                decode[2 * dealt + plus, 2 * pair + 1, 1 + row, 1 + column] = -sign
    weight["head.conv.weight"] *= 0.1
    weight["head.conv.weight"][:, :2] = 0
    weight["head.conv.weight"][:, 0, 3, 3], weight["head.conv.weight"][:, 1, 3, 3] = 0.5, -0.5
    for number in range(1, NUM_BLOCKS + 1):
        weight[f"art_{number}.residual.1.norm.weight"].zero_()
    for number in network.settings.transformer_blocks:
        width = 4 * network.settings.base_channels
        weight[f"art_{number}.compress.body.1.norm.weight"].zero_()
        weight[f"art_{number}.compress.skip.conv.weight"].zero_()
        weight[f"art_{number}.compress.skip.conv.weight"][:, width:, 0, 0] = torch.eye(width)
        weight[f"art_{number}.compress.skip.norm.bias"].fill_(1.0)  # else the ReLU behind it cuts one half off


def _pixel_shuffle(pairs: int) -> Iterator[tuple[int, int, int, int]]:
    """(pair before, pair after, row, column) for each of the 2×2 pixels that a stage of stride 2 deals out."""
    for pair in range(pairs):
        for row in (0, 1):
            for column in (0, 1):
                yield pair, 4 * pair + 2 * row + column, row, column


@contextmanager
def _draws_of_its_own() -> Iterator[None]:
    """What is drawn inside comes from a stream of its own, so that all that is drawn later does not depend on it.

    Networks of one seed thus differ in their fusion alone, whatever it draws.
    """
    seed = int(torch.randint(2**62, (), device="cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _initialise(network: Generator) -> None:
    """N(0, 0.02) for convolutions and N(1, 0.02) for norm scales, as published; Xavier for linear layers.

    Fusions have set their own weights.
    """
    for name, module in network.named_modules():
        if ".fuse." in name:
            continue
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, 0.0, 0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.normal_(module.weight, 1.0, 0.02)
        elif isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
