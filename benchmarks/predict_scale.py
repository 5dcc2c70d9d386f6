"""Time and memory of `seresvit predict` from disk to disk, against the number of slices of the series.

The series is one simulated slice again and again at new positions, so that only its length changes. Every length is
predicted by a process of its own. "Network" is what `prediction.json` has as `elapsed_s`: from the voxels in memory to
the synthetic voxels; the rest is starting Python, reading and writing. Anonymous memory is what a system without swap
must hold; the rest of the whole lies in files and is given back when others need it.

    python benchmarks/predict_scale.py --slices 10,100,1000,3000 --size 512
    python benchmarks/predict_scale.py --slices 10,40 --size 512 --full --backend openvino
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pydicom
import torch
from pydicom.uid import generate_uid

from seresvit.config import ModelSettings, VitSettings
from seresvit.data import phantom
from seresvit.model import checkpoint
from seresvit.model.generator import Generator

TINY = {"base_channels": 8, "vit": VitSettings(depth=2, width=32, heads=4, mlp_width=64)}


def saved(folder: Path, full: bool) -> Path:
    """A checkpoint of random weights: of the paper's network, or of a tiny one that costs little beside the disk."""
    torch.manual_seed(0)
    header = {"data": {"window_hu": [-1024, 2048]}, "target": "70keV", "sources": ["110keV"]}
    network = Generator(ModelSettings(token_grid=(32, 32), **({} if full else TINY))).eval()
    checkpoint.save(network, folder / "model.safetensors", header)
    return folder / "model.safetensors"


def series(folder: Path, size: int, count: int) -> Path:
    """A series of so many slices, one millimetre apart."""
    simulated = folder / f"one-{size}"
    if not simulated.is_dir():
        phantom.simulate(simulated, patients=1, slices=1, size=size, kev=(110,))
    dataset = pydicom.dcmread(next((simulated / "110keV" / "P001").iterdir()))
    out = folder / f"{count}"
    out.mkdir()
    for number in range(count):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        dataset.InstanceNumber = number + 1
        dataset.ImagePositionPatient = [*dataset.ImagePositionPatient[:2], float(number)]
        dataset.save_as(out / f"{number:05d}.dcm", enforce_file_format=True)
    return out


def watched(command: list[str]) -> tuple[float, int, int]:
    """Seconds that the command takes, and the most MiB that it holds: anonymous, and in all."""
    started_s, most = time.perf_counter(), [0, 0]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            break
        for place, name in enumerate(("RssAnon", "VmRSS")):
            if held := re.search(rf"{name}:\s+(\d+) kB", status):
                most[place] = max(most[place], int(held[1]) // 2**10)
        time.sleep(0.05)
    if process.wait():
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - started_s, most[0], most[1]


def main() -> None:
    """Print one row a length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", default="10,100,1000")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--full", action="store_true", help="the paper's network instead of a tiny one")
    asked = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {asked.size}², {asked.backend}\n")
    heads = [
        "slices",
        "whole, s",
        "network, s",
        "whole / network",
        "ms a slice but for the network",
        "MiB",
        "MiB in all",
    ]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = saved(folder, asked.full)
        for count in map(int, asked.slices.split(",")):
            out = folder / f"out-{count}"
            words = ["predict", model, series(folder, asked.size, count), out, "--backend", asked.backend]
            whole_s, anonymous, in_all = watched([sys.executable, "-m", "seresvit", *map(str, words)])
            network_s = json.loads((out / "prediction.json").read_text(encoding="utf-8"))["elapsed_s"]
            other_ms = 1000 * (whole_s - network_s) / count
            row = [str(count), f"{whole_s:.1f}", f"{network_s:.1f}", f"{whole_s / network_s:.2f}", f"{other_ms:.1f}"]
            print("| " + " | ".join([*row, str(anonymous), str(in_all)]) + " |", flush=True)


if __name__ == "__main__":
    main()
