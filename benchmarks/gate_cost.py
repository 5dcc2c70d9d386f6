"""What the SE gate costs: parameters and forward FLOPs of the full-size network, with it and without.

Nothing is computed: the network stands on the meta device, where tensors have shapes and no values. One multiply-add is
two FLOPs. torch's counter knows convolutions and matrix products only, so the gate's pooling (one addition a value) and
its scaling (one multiplication a value) are counted here. Other element-wise work (norms, ReLU, GELU, softmax, the
gate's 1,088 activations an image) is in neither network's number.

    python benchmarks/gate_cost.py
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from seresvit.config import FusionSettings, ModelSettings
from seresvit.model.generator import Generator

# Image side → (num_downsamples, patch_size): the paper's network, and both published ones for 512×512.
GEOMETRIES = [(256, 2, 1), (512, 2, 2), (512, 3, 1)]


def cost(kind: str, side: int, num_downsamples: int, patch_size: int) -> tuple[int, int, int]:
    """Parameters, counted FLOPs, and FLOPs of pooling and scaling, of one forward pass of one image."""
    settings = ModelSettings(
        num_downsamples=num_downsamples, patch_size=patch_size, token_grid=(16, 16), fusion=FusionSettings(kind=kind)
    )
    with torch.device("meta"), torch.inference_mode():
        network = Generator(settings).eval()
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 1, side, side))
    fused_values = 8 * settings.base_channels * (side // 4) ** 2
    gates = sum(name.endswith(".fuse.gate") for name, _ in network.named_modules())
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops(), 2 * gates * fused_values


def main() -> None:
    """Print one row a geometry, as Markdown."""
    print("| image | `num_downsamples` | `patch_size` | parameters, concat | parameters, se | gate", end="")
    print(" | GFLOP, concat | GFLOP, se | gate |\n" + "|---" * 9 + "|")
    for side, num_downsamples, patch_size in GEOMETRIES:
        plain, plain_flops, _ = cost("concat", side, num_downsamples, patch_size)
        gated, gated_flops, pointwise = cost("se", side, num_downsamples, patch_size)
        extra = gated_flops + pointwise - plain_flops
        print(
            f"| {side}×{side} | {num_downsamples} | {patch_size} | {plain:,} | {gated:,} | {gated - plain:+,}"
            f" | {plain_flops / 1e9:.3f} | {(plain_flops + extra) / 1e9:.3f}"
            f" | {extra / 1e6:.3f} MFLOP, {100 * extra / plain_flops:.4f} % |"
        )


if __name__ == "__main__":
    main()
