"""What a person takes home of a finished job: its result as one file."""

import json
import zipfile
from pathlib import Path
from typing import Literal

import nibabel
import numpy as np

from seresvit.data import read_volume
from seresvit.data.nifti import FLIP_XY, NIFTI
from seresvit.data.volume import DataError, Volume, written_whole
from seresvit.serving.jobs import Job
from seresvit.synthesis.predict import RECORD

Format = Literal["dicom", "nifti", "native"]
# A gap between slices that differs by more than this from the others cannot be said in NIfTI.
SAME_GAP_MM = 0.05


def result_file(job: Job, asked: Format) -> Path:
    """The result of a job that is done, as one file below its folder, which is written when it is first asked for.

    DICOM is a zip of the series, `native` the format of the source. Raises DataError where a format cannot hold it.
    """
    record = json.loads((job.result / RECORD).read_text(encoding="utf-8"))
    written = job.result / record["path"]
    is_dicom = written.is_dir()
    if asked == "dicom" and not is_dicom:
        raise DataError("the source was no DICOM series, so that the result cannot be one; take it as NIfTI")
    if not is_dicom and (asked == "native" or written.name.endswith(NIFTI)):
        return written
    as_zip = is_dicom and asked != "nifti"
    file = job.folder / ("synthetic.zip" if as_zip else "synthetic.nii.gz")
    if not file.exists():
        with written_whole(file) as temporary:
            if as_zip:
                _write_zip(written, temporary)
            else:
                _write_nifti(read_volume(written), temporary)
    return file


def _write_zip(folder: Path, file: Path) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for path in sorted(folder.glob("*.dcm")):
            archive.write(path, f"synthetic/{path.name}")


def _write_nifti(volume: Volume, file: Path) -> None:
    gaps = np.diff(volume.positions_mm)
    if len(gaps) and np.ptp(gaps) > SAME_GAP_MM:
        found = f"gaps from {gaps.min():.2f} to {gaps.max():.2f} mm between slices"
        raise DataError(f"{found}, which NIfTI cannot say; take the result as DICOM")
    array = np.rint(volume.array).astype(np.int16) if volume.unit == "HU" else volume.array
    image = nibabel.Nifti1Image(array.transpose(2, 1, 0), FLIP_XY @ volume.affine)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"Synthetic image (SE-ResViT)"
    image.to_filename(file)
