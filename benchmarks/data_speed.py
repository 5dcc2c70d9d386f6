"""How fast random training batches come from the prepared store, and from DICOM decoded anew for each image.

All loaders run in one process on the same images, in turns, in random order, with all files in the page cache. Each
fills one array of 8 images again and again, so that no allocation or collation is measured. The DICOM loaders do what
published code does: pydicom reads source and target of every image, rescales to HU, clips at the window, scales to
[-1, 1]. One has the usual expression `pixel_array * slope + intercept`, which computes in float64, the other is tuned
to float32; a third stops at `pixel_array`, so that no arithmetic is left in it. The values of the first two are
compared with the store's before anything is timed. DICOM may hold other folders of pairs, SOURCE/PATIENT and
TARGET/PATIENT with the same slices in both.

    seresvit simulate DICOM --patients 3 --slices 8 --size 512 --kev 70,110
    python benchmarks/data_speed.py DICOM [--rounds 15] [--syntax native|rle|jpeg2000] [--pair 110keV,70keV]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from pydicom import dcmread, uid

from seresvit.config import DataSettings
from seresvit.data.pairing import Case, write_manifest
from seresvit.data.prepared import prepare, read_pair, slices_of

BATCH = 8
SYNTAXES = {"native": uid.ExplicitVRLittleEndian, "rle": uid.RLELossless, "jpeg2000": uid.JPEG2000Lossless}
SETTINGS = DataSettings(window_hu=(-1024, 3071))

Fill = Callable[[np.ndarray, int], Any]  # writes source and target of an image into (2, H, W)


def decoded(path: Path, dtype: type) -> np.ndarray:
    """(H, W) float32 in [-1, 1] of a DICOM file, computed in `dtype`."""
    low, high = SETTINGS.window_hu
    image = dcmread(path)
    hu = image.pixel_array.astype(dtype, copy=False) * dtype(image.RescaleSlope) + dtype(image.RescaleIntercept)
    return ((np.clip(hu, low, high) - low) / (high - low) * 2 - 1).astype(np.float32, copy=False)


def transcoded(cases: list[Case], syntax: str, folder: Path) -> list[tuple[Path, Path]]:
    """Source and target file of every slice, copied in that transfer syntax."""
    files = []
    for case in cases:
        sides = []
        for image in (case.source_path, case.target_path):
            headers = [dcmread(path) for path in image.iterdir()]
            headers.sort(key=lambda header: float(header.ImagePositionPatient[2]))
            side = []
            for number, header in enumerate(headers):
                if syntax != "native":
                    header.compress(SYNTAXES[syntax])
                side.append(folder / f"{case.patient}-{image.parent.name}-{number}.dcm")
                header.save_as(side[-1])
            sides.append(side)
        files += list(zip(*sides, strict=True))
    return files


def rate(fill: Fill, batch: np.ndarray, images: np.ndarray) -> float:
    """Images (source and target) a second."""
    started_s = time.perf_counter()
    for number, image in enumerate(images):
        fill(batch[number % BATCH], image)
    return len(images) / (time.perf_counter() - started_s)


def main() -> None:
    """Print one row a loader, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dicom", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--syntax", choices=SYNTAXES, default="native")
    parser.add_argument("--pair", default="110keV,70keV", help="the folders of source and target")
    asked = parser.parse_args()
    modalities = asked.pair.split(",")
    source, target = (asked.dicom / modality for modality in modalities)
    names = sorted(path.name for path in source.iterdir())
    cases = [Case(name, "train", *modalities, source / name, target / name) for name in names]
    write_manifest(cases, asked.dicom / "speed.csv")
    store = prepare(asked.dicom / "speed.csv", SETTINGS)
    slices = slices_of(store, "train")
    with tempfile.TemporaryDirectory(dir=asked.dicom) as folder:
        files = transcoded(cases, asked.syntax, Path(folder))

        def from_dicom(pair: np.ndarray, image: int, dtype: type) -> None:
            for out, file in zip(pair, files[image], strict=True):
                out[...] = decoded(file, dtype)

        loaders: dict[str, tuple[Fill, int]] = {
            "prepared store": (lambda pair, image: read_pair(store, *slices[image], pair), 256),
            "DICOM each time, float64": (lambda pair, image: from_dicom(pair, image, np.float64), 32),
            "DICOM each time, float32": (lambda pair, image: from_dicom(pair, image, np.float32), 32),
            "DICOM each time, `pixel_array` alone": (
                lambda _, image: [dcmread(file).pixel_array for file in files[image]],
                32,
            ),
        }
        size, rng = store.cases[0].shape[1:], np.random.default_rng(0)
        batch = np.zeros((3, BATCH, 2, *size), np.float32)
        for image in range(len(files)):
            for pairs, (fill, _) in zip(batch, loaders.values(), strict=False):
                fill(pairs[0], image)
            np.testing.assert_allclose(batch[1:, 0], batch[:-1, 0], atol=1e-6)
        rates = [
            [rate(fill, batch[0], rng.integers(0, len(files), count)) for fill, count in loaders.values()]
            for _ in range(asked.rounds)
        ]
    print(
        f"{len(files)} pairs of slices of {size[0]}×{size[1]}, {asked.syntax} DICOM, {asked.rounds} rounds in turns\n"
    )
    print("| loader | images/s, median | range | store is faster, median | range |\n|---|---|---|---|---|")
    for name, found in zip(loaders, zip(*rates, strict=True), strict=True):
        times = [turn[0] / own for turn, own in zip(rates, found, strict=True)]
        print(f"| {name} | {median(found):,.0f} | {min(found):,.0f} to {max(found):,.0f} ", end="")
        print(f"| {median(times):.1f}× | {min(times):.1f}× to {max(times):.1f}× |")


if __name__ == "__main__":
    main()
