"""The transformer branch: patches to tokens with a learned position grid, and a pre-norm ViT encoder.

Shapes: B image, C channel, H row, W column, N token, D embedding width, h head.
Source: Dosovitskiy et al., ICLR 2021 (ViT-B), as ResViT uses it: no class token, no dropout inside attention.
"""

import torch
import torch.nn.functional as F
from torch import nn

from seresvit.config import VitSettings


class PatchEmbedding(nn.Module):
    """Tokens (B, N, D) of a feature map: patch convolution + learned position + dropout.

    The position grid has one vector for each token of the training size. Another token grid takes it resized
    (bicubic); the learned one takes it untouched.
    """

    def __init__(self, in_channels: int, patch_size: int, grid: tuple[int, int], vit: VitSettings):
        super().__init__()
        self.grid = grid
        self.patch = nn.Conv2d(in_channels, vit.width, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.zeros(1, grid[0] * grid[1], vit.width))
        self.dropout = nn.Dropout(vit.dropout)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, D), row by row."""
        tokens_BDHW = self.patch(x_BCHW)
        position_ND = self._position_for(tokens_BDHW.shape[-2:])
        return self.dropout(tokens_BDHW.flatten(2).transpose(1, 2) + position_ND)

    def _position_for(self, grid: torch.Size) -> torch.Tensor:
        # A traced graph, where a size is no number yet, always resizes: the learned grid to itself, exactly.
        if not torch.jit.is_tracing() and tuple(grid) == self.grid:
            return self.position
        position_DHW = self.position.transpose(1, 2).unflatten(2, self.grid)
        resized_DHW = F.interpolate(position_DHW, size=tuple(grid), mode="bicubic", align_corners=False)
        return resized_DHW.flatten(2).transpose(1, 2)


class SelfAttention(nn.Module):
    """Multi-head softmax attention among all tokens of an image."""

    def __init__(self, vit: VitSettings):
        super().__init__()
        self.heads = vit.heads
        self.query = nn.Linear(vit.width, vit.width)
        self.key = nn.Linear(vit.width, vit.width)
        self.value = nn.Linear(vit.width, vit.width)
        self.out = nn.Linear(vit.width, vit.width)

    def forward(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, D), each a mixture of all."""
        query, key, value = (
            project(tokens_BND).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed_BhND = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed_BhND.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Token-wise two-layer perceptron with dropout after each layer."""

    def __init__(self, vit: VitSettings):
        super().__init__()
        self.fc1 = nn.Linear(vit.width, vit.mlp_width)
        self.fc2 = nn.Linear(vit.mlp_width, vit.width)
        self.dropout = nn.Dropout(vit.dropout)

    def forward(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, D)."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1(tokens_BND)))))


class Layer(nn.Module):
    """One pre-norm encoder layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, vit: VitSettings):
        super().__init__()
        self.attention_norm = nn.LayerNorm(vit.width, eps=1e-6)
        self.attention = SelfAttention(vit)
        self.mlp_norm = nn.LayerNorm(vit.width, eps=1e-6)
        self.mlp = Mlp(vit)

    def forward(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, D)."""
        tokens_BND = tokens_BND + self.attention(self.attention_norm(tokens_BND))
        return tokens_BND + self.mlp(self.mlp_norm(tokens_BND))


class Encoder(nn.Module):
    """`vit.depth` layers and a final LayerNorm; one encoder serves all transformer blocks of a generator."""

    def __init__(self, vit: VitSettings):
        super().__init__()
        self.layers = nn.ModuleList(Layer(vit) for _ in range(vit.depth))
        self.norm = nn.LayerNorm(vit.width, eps=1e-6)

    def forward(self, tokens_BND: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, D)."""
        for layer in self.layers:
            tokens_BND = layer(tokens_BND)
        return self.norm(tokens_BND)
