"""What each fusion costs: parameters, forward FLOPs and time, at its site and in the full-size network.

FLOPs are counted on the meta device, where tensors have shapes and no values. One multiply-add is two FLOPs. torch's
counter knows convolutions and matrix products only; what else a fusion computes is counted here, one operation for each
value that an element-wise function puts out or a mean, sum or maximum takes in. Element-wise work outside of the
fusions (norms, ReLU, GELU, softmax) is in no network's number.

Times are measured in rounds in which all fusions take turns in random order, so that a machine that slows down slows
all of them: forward, and forward plus backward pass of one site, and forward plus backward pass of the whole network,
in which only the fusions are exchanged. Ratios are taken within a round. Printed are medians and, in brackets,
quartiles. A percent is lost in the noise of whole passes: what two sites take longer than two concatenations, as a
share of a whole pass, is the finer number.

    python benchmarks/gate_cost.py
    python benchmarks/gate_cost.py --site-rounds 100 --rounds 20
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from seresvit.config import FusionSettings, ModelSettings
from seresvit.model.fusion import FUSIONS
from seresvit.model.generator import Generator

# Image side → (num_downsamples, patch_size): the paper's network, and both published ones for 512×512.
GEOMETRIES = [(256, 2, 1), (512, 2, 2), (512, 3, 1)]
# Operations that only copy, and those that torch's counter knows.
NOT_COUNTED = {
    *("cat", "constant_pad_nd", "clone", "_to_copy", "_unsafe_view"),
    *("mm", "addmm", "bmm", "convolution"),
}


class ElementwiseCounter(TorchDispatchMode):
    """Counts in `flops` what torch's counter leaves out."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in NOT_COUNTED:
            self.flops += max(value.numel() for value in tree_leaves((args, out)) if isinstance(value, torch.Tensor))
        return out


def settings_of(kind: str, num_downsamples: int = 2, patch_size: int = 1) -> ModelSettings:
    """The full-size network with that fusion."""
    return ModelSettings(
        num_downsamples=num_downsamples, patch_size=patch_size, token_grid=(16, 16), fusion=FusionSettings(kind=kind)
    )


def flops(module: nn.Module, *shape: int) -> int:
    """Convolutions and matrix products of one forward pass, as torch counts them."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        module(torch.empty(*shape, device="meta"))
    return counter.get_total_flops()


def site_cost(kind: str, side: int) -> tuple[int, int]:
    """Parameters and FLOPs of one fusion of the full-size network."""
    settings = settings_of(kind)
    channels = 8 * settings.base_channels
    with torch.device("meta"):
        fusion = FUSIONS[kind](channels, settings.fusion)
    shape = (1, channels, side // 4, side // 4)
    x = torch.empty(*shape, device="meta")
    with torch.no_grad(), ElementwiseCounter() as counter:
        fusion(x)
    return sum(p.numel() for p in fusion.parameters()), flops(fusion, *shape) + counter.flops


def print_geometries() -> None:
    """One row a geometry: the whole network without a gate and with `se`."""
    print("| image | `num_downsamples` | `patch_size` | parameters, concat | parameters, se | gate", end="")
    print(" | GFLOP, concat | GFLOP, se | gate |\n" + "|---" * 9 + "|")
    for side, num_downsamples, patch_size in GEOMETRIES:
        with torch.device("meta"):
            network = Generator(settings_of("concat", num_downsamples, patch_size)).eval()
        plain, plain_flops = sum(p.numel() for p in network.parameters()), flops(network, 1, 1, side, side)
        gate, gate_flops = (2 * cost for cost in site_cost("se", side))
        print(
            f"| {side}×{side} | {num_downsamples} | {patch_size} | {plain:,} | {plain + gate:,} | {gate:+,}"
            f" | {plain_flops / 1e9:.3f} | {(plain_flops + gate_flops) / 1e9:.3f}"
            f" | {gate_flops / 1e6:.3f} MFLOP, {100 * gate_flops / plain_flops:.4f} % |"
        )


def taking_turns(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each in every round, (rounds,); one round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(rounds + 1):
        for name in np.random.default_rng(number).permutation(list(work)):
            started_s = time.perf_counter()
            work[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started_s)
    return {name: np.array(taken[1:]) for name, taken in seconds.items()}


def site_seconds(
    kinds: list[str], side: int, batch: int, rounds: int, device: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Forward pass of one site, in inference; and forward plus backward pass, to its weights and its features."""
    channels = 8 * ModelSettings().base_channels
    x = torch.rand(batch, channels, side // 4, side // 4, device=device).to(memory_format=torch.channels_last)
    fusions = {kind: FUSIONS[kind](channels, FusionSettings(kind=kind)).to(device).eval() for kind in kinds}
    with torch.inference_mode():
        forward = taking_turns({kind: lambda fusion=fusion: fusion(x) for kind, fusion in fusions.items()}, rounds)
    towards, x = torch.rand_like(x), x.requires_grad_()

    def both(fusion: nn.Module) -> None:
        torch.autograd.grad(fusion(x), [x, *fusion.parameters()], towards)

    return forward, taking_turns({k: lambda fusion=fusion: both(fusion) for k, fusion in fusions.items()}, rounds)


def network_seconds(kinds: list[str], side: int, batch: int, rounds: int, device: str) -> dict[str, np.ndarray]:
    """Forward and backward pass of the whole network, the same but for its fusions."""
    network = Generator(settings_of("concat")).to(device, memory_format=torch.channels_last).train()
    source = torch.rand(batch, 1, side, side, device=device)
    channels = 8 * network.settings.base_channels
    sites = [getattr(network, f"art_{number}") for number in network.settings.transformer_blocks]
    fusions = {kind: [FUSIONS[kind](channels, FusionSettings(kind=kind)).to(device) for _ in sites] for kind in kinds}

    def passes(kind: str) -> None:
        for site, fusion in zip(sites, fusions[kind], strict=True):
            site.fuse = fusion
        network.zero_grad()
        network(source).abs().mean().backward()

    return taking_turns({kind: lambda kind=kind: passes(kind) for kind in kinds}, rounds)


def with_quartiles(values: np.ndarray, digits: int) -> str:
    """Median (lower to upper quartile)."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * [values[0]]
    return f"{np.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(FUSIONS), help="concat is always among them")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--site-rounds", type=int, default=0, help="in which sites are timed; 0: no times")
    parser.add_argument("--rounds", type=int, default=0, help="in which whole networks are timed too; 0: sites alone")
    asked = parser.parse_args()
    print_geometries()
    kinds = list(dict.fromkeys(["concat", *asked.kinds.split(",")]))
    columns = ["`kind`", "parameters, site", "MFLOP, site", "parameters, network", "GFLOP, network", "more"]
    with torch.device("meta"):
        network = Generator(settings_of("concat")).eval()
    plain = sum(p.numel() for p in network.parameters())
    plain_flops = flops(network, 1, 1, asked.size, asked.size)
    rows = {}
    for kind in kinds:
        parameters, site_flops = site_cost(kind, asked.size)
        rows[kind] = [f"{parameters:,}", f"{site_flops / 1e6:.3f}", f"{plain + 2 * parameters:,}"]
        rows[kind] += [f"{(plain_flops + 2 * site_flops) / 1e9:.3f}", f"{200 * site_flops / plain_flops:.4f} %"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if asked.site_rounds:
        name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print(f"\ntorch {torch.__version__}, {name}, float32, {asked.size}×{asked.size}, batch {asked.batch}", end="")
        print(f", {asked.site_rounds} rounds of the site, {asked.rounds} of the network")
        columns += ["site forward, ms", "site forward + backward, ms"]
        forward, both = site_seconds(kinds, asked.size, asked.batch, asked.site_rounds, device)
        for kind in kinds:
            rows[kind] += [with_quartiles(1000 * forward[kind], 2), with_quartiles(1000 * both[kind], 2)]
    if asked.site_rounds and asked.rounds:
        columns += ["two sites' share of a network's pass", "network forward + backward / concat"]
        whole = network_seconds(kinds, asked.size, asked.batch, asked.rounds, device)
        for kind in kinds:
            extra = 2 * np.median(both[kind] - both["concat"]) / np.median(whole["concat"])
            rows[kind] += [f"{100 * extra:.2f} %", with_quartiles(whole[kind] / whole["concat"], 3)]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for kind, cells in rows.items():
        print("| " + " | ".join([f"`{kind}`", *cells]) + " |")


if __name__ == "__main__":
    main()
