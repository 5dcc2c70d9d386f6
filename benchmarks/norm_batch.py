"""What `model.norm` does at small batches: validation error with the statistics of training and of prediction.

Batch norm trains on the statistics of its batch and predicts by their running mean. Instance and group norm use those
of the image at hand always. For each norm and batch size, the network of configs/tiny.yaml learns simulated 110 keV →
70 keV slices with L1 from the same order of images; all networks take turns, so that whatever else the machine does
meets them alike. Error in HU on patients that were not trained on: "batch" in train mode with validation batches of the
training's size, "predict" in eval mode, "image" in train mode one image at a time, which is `seresvit predict
--norm-statistics image`.

    python benchmarks/norm_batch.py --images 960
"""

import argparse
import copy
import tempfile
from pathlib import Path

import numpy as np
import torch

from seresvit.config import load_config, shipped_config
from seresvit.data import phantom, read_volume
from seresvit.data.intensity import Intensity
from seresvit.model.generator import Generator, start_as_identity

NORMS, BATCH_SIZES = ("batch", "instance", "group"), (1, 4, 8)
SIZE, SLICES, TRAINING, VALIDATION = 64, 4, 24, 6
WINDOW = Intensity("window", -1024.0, 2048.0, "HU")
LEARNING_RATE, TURNS = 5e-4, 4


def patients(folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Source and target slices (B, 1, H, W) in [-1, 1] of every simulated patient."""
    phantom.simulate(folder, patients=TRAINING + VALIDATION, slices=SLICES, size=SIZE, kev=(110.0, 70.0), seed=0)
    series = [sorted((folder / energy).iterdir()) for energy in ("110keV", "70keV")]
    return [
        tuple(torch.from_numpy(WINDOW.normalise(read_volume(path).array))[:, None] for path in paths)
        for paths in zip(*series, strict=True)
    ]


def new_network(norm: str) -> Generator:
    """The tiny network at the start of its training, with the same weights for every norm."""
    settings = load_config(shipped_config("tiny.yaml"), [f"model.norm={norm}", f"train.size={SIZE}"])
    torch.manual_seed(0)
    network = Generator(settings.model.model_copy(update={"token_grid": settings.token_grid}))
    start_as_identity(network)
    return network


def train(network, optimizer, source, target, order: np.ndarray, batch_size: int, seen: int, images: int) -> None:
    """Steps over the images `order`; the rate falls in a straight line to zero over the second half of `images`."""
    network.train()
    for start in range(0, len(order), batch_size):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, 2 * (1 - (seen + start) / images))
        batch = order[start : start + batch_size]
        loss = (network(source[batch]) - target[batch]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.inference_mode()
def error_hu(network, source, target, training: bool, batch_size: int) -> float:
    """The mean absolute error over all slices, `batch_size` at a time; the network is left as it was."""
    network = copy.deepcopy(network).train(training)
    parts = zip(source.split(batch_size), target.split(batch_size), strict=True)
    errors = torch.cat([(network(s) - t).abs().mean((1, 2, 3)) for s, t in parts])
    return errors.mean().item() * (WINDOW.high - WINDOW.low) / 2


def main() -> None:
    """Print one row a norm and batch size, as Markdown."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=960, help="images that each network sees, a multiple of 32")
    images = parser.parse_args().images
    with tempfile.TemporaryDirectory() as folder:
        pairs = patients(Path(folder))
    training, validation = pairs[:TRAINING], pairs[TRAINING:]
    source, target = (torch.cat(part) for part in zip(*training, strict=True))
    val_source, val_target = (torch.cat(part) for part in zip(*validation, strict=True))
    order = np.concatenate(
        [np.random.default_rng(n).permutation(len(source)) for n in range(images // len(source) + 1)]
    )
    networks = {(norm, size): new_network(norm) for norm in NORMS for size in BATCH_SIZES}
    optimizers = {key: torch.optim.Adam(net.parameters(), LEARNING_RATE, (0.5, 0.999)) for key, net in networks.items()}
    for turn in np.array_split(np.arange(images), TURNS):
        for (norm, size), network in networks.items():
            train(network, optimizers[norm, size], source, target, order[turn], size, turn[0], images)
    unchanged = (val_source - val_target).abs().mean().item() * (WINDOW.high - WINDOW.low) / 2
    print(f"{images} images; source unchanged: {unchanged:.1f} HU\n")
    print("| norm | batch size | batch | predict | image |\n|---|---|---|---|---|")
    for (norm, size), network in networks.items():
        modes = ((True, size), (False, 1), (True, 1))
        errors = [error_hu(network, val_source, val_target, training, batch) for training, batch in modes]
        print(f"| {norm} | {size} | " + " | ".join(f"{error:.1f}" for error in errors) + " |")


if __name__ == "__main__":
    main()
