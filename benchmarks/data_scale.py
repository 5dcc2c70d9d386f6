"""How time and memory of `audit`, of `prepare` and of opening a store grow with the number of slices.

Simulated patients are copied under new identifiers, with noise of their own in every pixel, until there are enough
slices, so that what grows is the number of patients. Every step runs in a process of its own; peak memory is VmHWM of
/proc (Linux) of the process itself and of the largest of its workers.

    python benchmarks/data_scale.py FOLDER --slices 1000,10000 [--size 64] [--skip-audit]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from pydicom import dcmread, uid

from seresvit.config import DataSettings
from seresvit.data import phantom
from seresvit.data.dataset import TrainingSlices
from seresvit.data.pairing import Case, write_manifest
from seresvit.data.prepared import Prepared, PreparedCase, slices_of

SLICES_A_PATIENT = 50
KEV = ("110keV", "70keV")
PREPARE = """
import sys
from pathlib import Path
from seresvit.config import DataSettings
from seresvit.data.prepared import prepare
if __name__ == "__main__":
    prepare(Path(sys.argv[1]), DataSettings(), workers=int(sys.argv[2]))
"""


def copies(folder: Path, template: Path, patients: int, seed: int = 0) -> None:
    """Writes so many patients in the layout modality/patient, each a copy of the template with new UIDs and noise."""
    rng = np.random.default_rng(seed)
    for modality in KEV:
        headers = [dcmread(path) for path in sorted((template / modality / "P001").iterdir())]
        pixels = [header.pixel_array for header in headers]
        for number in range(patients):
            patient = folder / modality / f"P{number:05d}"
            patient.mkdir(parents=True)
            same = [f"{name}{number}" for name in ("study", "frame", f"series{modality}")]
            study, frame, series = (uid.generate_uid(entropy_srcs=[name]) for name in same)
            for z, (header, plane) in enumerate(zip(headers, pixels, strict=True)):
                header.PatientID = header.PatientName = patient.name
                header.StudyInstanceUID, header.FrameOfReferenceUID, header.SeriesInstanceUID = study, frame, series
                header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = uid.generate_uid(None)
                header.PixelData = np.clip(plane + rng.integers(0, 8, plane.shape), 0, 4095).astype("<u2").tobytes()
                header.save_as(patient / f"{z:04d}.dcm", enforce_file_format=True)


def measured(command: list[str]) -> tuple[float, float, float]:
    """Seconds, and peak memory in MiB of the process and of the largest of those that it started."""
    started_s = time.perf_counter()
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    peaks_kib: dict[int, int] = {}
    while process.poll() is None:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                session = int(stat.read_text().rpartition(")")[2].split()[3])
                if session == process.pid:
                    peak = next(line for line in stat.with_name("status").open() if line.startswith("VmHWM"))
                    peaks_kib[int(stat.parent.name)] = int(peak.split()[1])
            except (OSError, StopIteration):  # it ended meanwhile
                continue
        time.sleep(0.05)
    elapsed_s = time.perf_counter() - started_s
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    own = peaks_kib.pop(process.pid, 0)
    return elapsed_s, own / 1024, max(peaks_kib.values(), default=0) / 1024


def row(slices: int, step: str, found: tuple[float, float, float]) -> None:
    """Print one row of the table."""
    elapsed_s, own, worker = found
    workers = f"{worker:.0f}" if worker else "–"
    print(
        f"| {slices:,} | {step} | {elapsed_s:.1f} | {1000 * elapsed_s / slices:.2f} | {own:.0f} | {workers} |",
        flush=True,
    )


def measure(folder: Path, template: Path, slices: int, workers: int, audit: bool) -> Path:
    """Audits and prepares so many pairs of slices; the store's folder."""
    shutil.rmtree(folder, ignore_errors=True)
    patients = slices // SLICES_A_PATIENT
    copies(folder, template, patients)
    manifest = folder / "manifest.csv"
    paths = [[folder / modality / f"P{n:05d}" for modality in KEV] for n in range(patients)]
    write_manifest([Case(source.name, "train", *KEV, source, target) for source, target in paths], manifest)
    if audit:
        names = ["--source", KEV[0], "--target", KEV[1], "--out", str(folder / "audit" / "manifest.csv")]
        row(slices, "audit", measured([sys.executable, "-m", "seresvit", "audit", str(folder), *names]))
    preparing = [sys.executable, "-c", PREPARE, str(manifest), str(workers)]
    row(slices, "prepare", measured(preparing))
    row(slices, "prepare again, nothing changed", measured(preparing))
    for path in (folder / KEV[0] / "P00000").iterdir():
        path.touch()
    row(slices, "prepare again, one series touched", measured(preparing))
    return next((folder / "prepared").glob("*/index.json")).parent


def many_slices(store: Path, slices: int) -> None:
    """Print what it costs to hold, list and shuffle so many slices, from an index repeated until there are enough."""
    records = json.loads((store / "index.json").read_text())["cases"]
    repeated = -(-slices // (len(records) * SLICES_A_PATIENT))
    text = json.dumps([{**record, "name": f"{record['name']}-{n}"} for n in range(repeated) for record in records])
    before_kib, started_s = resident_kib(), time.perf_counter()
    cases = [PreparedCase(**record) for record in json.loads(text)]
    opened_s = time.perf_counter()
    dataset = TrainingSlices(Prepared(store, "", cases), DataSettings(flip=False), (64, 64), seed=0)
    listed_s = time.perf_counter()
    _ = dataset[0]
    first_s = time.perf_counter()
    print(
        f"\n{len(slices_of(dataset.store, 'train')):,} slices: index parsed in {opened_s - started_s:.2f} s, listed in"
        f" {listed_s - opened_s:.3f} s, shuffled and first image read in {first_s - listed_s:.3f} s,"
        f" {(resident_kib() - before_kib) / 1024:.0f} MiB"
    )


def resident_kib() -> int:
    """The memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def main() -> None:
    """Print one row a number of slices and step, as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--slices", default="1000,10000")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--skip-audit", action="store_true")
    asked = parser.parse_args()
    template = asked.folder / "template"
    if not template.exists():
        phantom.simulate(template, patients=1, slices=SLICES_A_PATIENT, size=asked.size, kev=(70.0, 110.0), seed=0)
    print("| pairs of slices | step | s | ms a pair | peak MiB | peak MiB, largest worker |\n|---|---|---|---|---|---|")
    for slices in map(int, asked.slices.split(",")):
        store = measure(asked.folder / str(slices), template, slices, asked.workers, not asked.skip_audit)
    many_slices(store, 100_000)


if __name__ == "__main__":
    main()
