"""Images for the tests of several rooms: a DICOM series, and a manifest of NIfTI pairs."""

import nibabel
import numpy as np
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

DEPTH, HEIGHT, WIDTH = 5, 24, 40
# An oblique plane, so that a swap of rows and columns or of signs cannot pass unnoticed.
ROW = np.array([0.96, 0.28, 0.0])
COLUMN = np.array([-0.28 * 0.8, 0.96 * 0.8, -0.6])
NORMAL = np.cross(ROW, COLUMN)


def slice_header(number: int, position: np.ndarray, uids: dict[str, str]) -> FileDataset:
    """A plain CT slice that the standard has nothing to say against."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = CTImageStorage, generate_uid(), "CT"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = uids["study"], uids["series"], uids["frame"]
    ds.SpecificCharacterSet = ["", "ISO 2022 IR 149"]
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Hong^Gildong=洪^吉洞=홍^길동", "P7", "", "O"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20240102", "101112", "1", ""
    ds.ReferringPhysicianName, ds.Manufacturer, ds.PositionReferenceIndicator = "", "Scanner", ""
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL", "VOLUME"]
    ds.SeriesNumber, ds.InstanceNumber, ds.AcquisitionNumber = 3, 100 - number, 1
    ds.SeriesDescription, ds.BodyPartExamined, ds.PatientPosition = "VMI 110 keV", "ABDOMEN", "HFS"
    ds.KVP, ds.SliceThickness = 120, 3
    ds.ImagePositionPatient = [f"{v:.9g}" for v in position]
    ds.ImageOrientationPatient = [*ROW, *(f"{v:.9g}" for v in COLUMN)]
    ds.PixelSpacing = [0.7, 0.9]
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = HEIGHT, WIDTH, 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -1024, "HU"
    ds.WindowCenter, ds.WindowWidth = 60, 360
    return ds


@pytest.fixture
def series(tmp_path):
    """A folder of slices whose names and instance numbers run against their positions, and the stored pixels."""
    stored = np.random.default_rng(0).integers(0, 4096, (DEPTH, HEIGHT, WIDTH), dtype=np.uint16)
    uids = {name: generate_uid() for name in ("study", "series", "frame")}
    folder = tmp_path / "source"
    folder.mkdir()
    for z in range(DEPTH):
        ds = slice_header(z, np.array([10.0, -20.0, 30.0]) + 2.5 * z * NORMAL, uids)
        ds.PixelData = stored[z].tobytes()
        ds.add_new((0x0009, 0x0010), "LO", "SECRET VENDOR")
        ds.add_new((0x0009, 0x1001), "LO", "private")
        ds.add_new((0x6000, 0x0010), "US", 8)
        ds.add_new((0x0028, 0x0120), "US", 5)
        ds.save_as(folder / f"{'ebdac'[z]}.dcm", enforce_file_format=True)
    return folder, stored


@pytest.fixture
def damaged():
    """Copies of a file's bytes with three random ones hit, every other time in the header, where each counts."""

    def copies(whole, count, header_bytes):
        random = np.random.default_rng(0)
        for number in range(count):
            raw = bytearray(whole)
            end = min(len(raw), header_bytes) if number % 2 else len(raw)
            for at in random.integers(0, end, 3):
                raw[at] = random.integers(256)
            yield raw

    return copies


@pytest.fixture
def write_case():
    """Writes an array (Z, Y, X) as the NIfTI image of a patient and modality below a root, voxels 1 × 1 × 2 mm."""

    def write(root, patient, modality, array):
        path = root / patient / f"{modality}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([1.0, 1.0, 2.0, 1.0])), path)

    return write


@pytest.fixture
def manifest(tmp_path, write_case):
    """Two training patients, one validation patient: CT-like volumes (4, 10, 12); the target is half the source."""
    rng = np.random.default_rng(0)
    rows = ["patient,split,source,target,source_path,target_path,mask_path"]
    for patient, split in (("p1", "train"), ("p2", "train"), ("p3", "val")):
        source = rng.integers(-1000, 1000, (4, 10, 12)).astype(np.int16)
        source[0, 0, 0] = -1000
        write_case(tmp_path, patient, "high", source)
        write_case(tmp_path, patient, "low", (source / 2 - 500).astype(np.float32))
        rows.append(f"{patient},{split},high,low,{patient}/high.nii.gz,{patient}/low.nii.gz,")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "manifest.csv"
