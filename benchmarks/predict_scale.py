"""Time and memory of `seresvit predict` from disk to disk, against the number of slices of the series.

The series is one simulated slice again and again at new positions, so that only its length changes. Every length is
predicted by a process of its own. "Network" is what `prediction.json` has as `elapsed_s`: from the voxels in memory to
the synthetic voxels; the rest is starting Python, reading and writing. Anonymous memory is what a system without swap
must hold; the rest of the whole lies in files and is given back when others need it.

With `--started` Python, torch and the network have started before, as in a server, and the network is a small one of
a few milliseconds a slice on one thread, as fast as the paper's on a GPU: reading and writing then have the other
cores, and show. "Network" there is its time alone, nothing else at work; both times are the shortest of three.

    python benchmarks/predict_scale.py --slices 10,100,1000,3000 --size 512
    python benchmarks/predict_scale.py --slices 10,40 --size 512 --full --backend openvino
    python benchmarks/predict_scale.py --slices 100,300,1000 --size 512 --started
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
from torch import nn

from seresvit.config import ModelSettings, VitSettings
from seresvit.data import phantom, read_volume
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.synthesis.predict import Predictor, predict_path

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


def small() -> nn.Module:
    """A network of a few milliseconds for a slice of 512² on one thread."""
    torch.manual_seed(0)
    enter, within, leave = nn.Conv2d(1, 4, 4, stride=4), nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
    return nn.Sequential(enter, nn.ReLU(), within, nn.ReLU(), leave, nn.Tanh(), nn.PixelShuffle(4)).eval()


def study(model: Path, source: Path, out: Path) -> None:
    """Print, as JSON, the seconds that a whole prediction takes, and its network alone."""
    torch.set_num_threads(1)
    predictor, network = Predictor(model, "cpu"), small()
    predictor.net.forward = network.forward  # type: ignore[method-assign]
    volume, whole_s, network_s = read_volume(source), [], []
    for _ in range(3):
        started_s = time.perf_counter()
        predict_path(predictor, source, out)
        whole_s.append(time.perf_counter() - started_s)
        started_s = time.perf_counter()
        predictor(volume)
        network_s.append(time.perf_counter() - started_s)
    print(json.dumps([min(whole_s), min(network_s)]))


def watched(command: list[str]) -> tuple[float, int, int, str]:
    """Seconds that the command takes, the most MiB that it holds, anonymous and in all, and what it prints."""
    started_s, most = time.perf_counter(), [0, 0]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
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
    return time.perf_counter() - started_s, most[0], most[1], process.communicate()[0]


def main() -> None:
    """Print one row a length."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slices", default="10,100,1000")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--full", action="store_true", help="the paper's network instead of a tiny one")
    parser.add_argument("--started", action="store_true", help="in a process that has started, with a small network")
    parser.add_argument("--study", nargs=3, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.study:
        return study(*asked.study)
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
            paths = [model, series(folder, asked.size, count), out]
            if asked.started:
                *_, anonymous, in_all, printed = watched([sys.executable, __file__, "--study", *map(str, paths)])
                whole_s, network_s = json.loads(printed)
            else:
                words = ["-m", "seresvit", "predict", *map(str, paths), "--backend", asked.backend]
                whole_s, anonymous, in_all, _ = watched([sys.executable, *words])
                network_s = json.loads((out / "prediction.json").read_text(encoding="utf-8"))["elapsed_s"]
            other_ms = 1000 * (whole_s - network_s) / count
            row = [str(count), f"{whole_s:.2f}", f"{network_s:.2f}", f"{whole_s / network_s:.2f}", f"{other_ms:.1f}"]
            print("| " + " | ".join([*row, str(anonymous), str(in_all)]) + " |", flush=True)


if __name__ == "__main__":
    main()
