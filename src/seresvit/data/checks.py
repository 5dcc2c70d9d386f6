"""What can be wrong with a pair of images, one small function a rule.

A fault would teach the network something false, a warning merely costs data or is worth a look. A check sees one case
and yields what it finds; the identifiers that it compares are never shown.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.ndimage import binary_fill_holes
from skimage.filters import threshold_otsu

from seresvit.config import DataSettings
from seresvit.data.dicom import text_of
from seresvit.data.geometry import resampled, usual_gap_mm
from seresvit.data.pair import SLICE_TOLERANCE_MM, labels_of, matched_slices, on_one_grid, unmatched_slices
from seresvit.data.pairing import Case, short_path
from seresvit.data.registration import Residual, residual
from seresvit.data.volume import DataError, Volume, energy_kev_in, normal_of, same_grid

# In-plane pixels and slices from which a shift is reported, if it wins at least this share of mutual information.
SHIFT_PIXELS, SHIFT_SLICES, SHIFT_GAIN = 2, 1, 0.03
# What a good registration of two acquisitions may leave (AAPM TG-132, Brock et al., Med Phys 44 (2017) e43); two
# energies of one acquisition leave nothing.
REGISTRATION_MM = 3.0
EVEN_GAPS = 0.01
TILT_DEG = 0.5
MIN_SIZE = 16
CLIPPED_SHARE = 0.01
# A slice with less foreground lies beyond what is imaged, as above a skull-stripped brain.
SHOWN_SHARE = 0.05
# Soft tissue fills most of every CT; an image without intercept, scaled or inverted has its values elsewhere.
SOFT_TISSUE_HU = (-200.0, 500.0)
SMALLEST_RANGE_HU = 20.0
CT_NAME = re.compile(r"(?<![a-z])(cb)?ct(?![a-z])|kev", re.IGNORECASE)
SKIN_HU = -500.0
BODY_SHARE = 0.5

Problem = tuple[Path, str, str, str]  # the image at fault, the rule, what was found, the remedy


@dataclass(frozen=True)
class Loaded:
    """A case with its images as they lie on disk; `pixels` False: their arrays are empty, and only headers count."""

    case: Case
    source: Volume
    target: Volume
    mask: Volume | None
    mask_name: str
    data: DataSettings
    pixels: bool

    @cached_property
    def on_grid(self) -> list[Volume]:
        """Source and target on one grid with the same slices, as training sees them; raises DataError if impossible."""
        return on_one_grid([self.source, self.target], self.data.resample, self.data.interpolation)[0]

    @cached_property
    def residual(self) -> Residual | None:
        """What the pixels say about the alignment, None where they cannot tell."""
        try:
            source, target = (volume.array for volume in self.on_grid)
        except DataError:
            return None
        return residual(source, target) if min(target.shape[1:]) >= MIN_SIZE else None

    @property
    def sides(self) -> list[tuple[Volume, str]]:
        """Source and target, each with the name of its modality."""
        return [(self.source, self.case.source), (self.target, self.case.target)]


Check = Callable[[Loaded], Iterator[Problem]]


# ------------------------------------------------------------------------------------------------ headers


def one_patient(loaded: Loaded) -> Iterator[Problem]:
    """Only DICOM names a patient. Where PatientID is lacking or alike (anonymised), another study of another frame of
    reference is another patient too: it is at best another day."""
    source, target = loaded.source, loaded.target
    if not source.format == target.format == "dicom":
        return
    partner, differs = short_path(target.path), ""
    if source.patient and target.patient and source.patient != target.patient:
        differs = "PatientID"
    elif _study(source) != _study(target) and source.frame_of_reference != target.frame_of_reference:
        differs = "StudyInstanceUID"
    if differs:
        found = f"swapped patient: its {differs} is not the one in {partner}"
        yield source.path, "one patient a case", found, "move it to its own patient's folder"


def one_study(loaded: Loaded) -> Iterator[Problem]:
    """Images of one frame of reference belong together, though a workstation filed one of them as another study."""
    source, target = loaded.source, loaded.target
    if not source.format == target.format == "dicom":
        return
    if _study(source) != _study(target) and source.frame_of_reference == target.frame_of_reference:
        found = f"its StudyInstanceUID is not the one in {short_path(target.path)}, its frame of reference is"
        yield source.path, "one study a case", found, "check that both are of one examination"


def one_grid(loaded: Loaded) -> Iterator[Problem]:
    """With `data.resample` another grid is no fault, as long as both images show a common part of one space."""
    source, target = loaded.source, loaded.target
    different = same_grid(source, target)
    if not different and not len(matched_slices(source, target)[0]):
        different = "no slice at the position of one"
    if not different:
        return
    found = f"{different} of {short_path(target.path)}"
    if different == "frame of reference":
        yield source.path, "same grid", found, "register it to the target, or leave the patient out"
    elif not loaded.data.resample:
        yield source.path, "same grid", found, "set --resample, or leave the patient out"
    elif loaded.pixels:
        try:
            _ = loaded.on_grid
        except DataError as error:
            yield source.path, "same grid", *parted(error, source.path)


def resampled_grid(loaded: Loaded) -> Iterator[Problem]:
    """Where `data.resample` allows another grid, it is said."""
    different = same_grid(loaded.source, loaded.target)
    if loaded.data.resample and different and different != "frame of reference":
        found = f"{different} of {short_path(loaded.target.path)}: training resamples"
        yield loaded.source.path, "same grid", found, "nothing, if data.resample is meant"


def named_energy(loaded: Loaded) -> Iterator[Problem]:
    """The keV in the header is the one that the modality is called by."""
    for volume, modality in loaded.sides:
        if energy_kev_in(modality) and volume.energy_kev not in (None, energy_kev_in(modality)):
            found = f"the header says {volume.energy_kev:g} keV, the name {modality}"
            yield volume.path, "energy as named", found, "move it, or rename the modality"


def fitting_mask(loaded: Loaded) -> Iterator[Problem]:
    """The mask lies on the target's grid, on every slice that training sees, with labels that can be told apart."""
    if loaded.mask:
        try:
            _labels(loaded)
        except DataError as error:
            yield loaded.mask.path, "mask on the target's grid", *parted(error, loaded.mask.path)


def partnered_slices(loaded: Loaded) -> Iterator[Problem]:
    """A slice that only one side has is not used, which is said."""
    if not loaded.data.resample:
        for volume, name in unmatched_slices([loaded.source, loaded.target]):
            yield volume.path, "slice on both sides", f"{name} has no partner", "add it, or go on without"


def even_slices(loaded: Loaded) -> Iterator[Problem]:
    """A slice that only one side lacks has no partner, which is said of it; here its position still counts."""
    source, target = loaded.source, loaded.target
    one_stack = not loaded.data.resample and not same_grid(source, target)
    positions = np.sort(
        np.concatenate([source.positions_mm, target.positions_mm] if one_stack else [target.positions_mm])
    )
    positions = positions[np.diff(positions, prepend=-np.inf) > SLICE_TOLERANCE_MM]
    gaps = np.diff(positions)
    if len(gaps) and np.ptp(gaps) > max(EVEN_GAPS * np.median(gaps), SLICE_TOLERANCE_MM):
        unit, widest = "numbers" if target.format == "png" else "mm", positions[gaps.argmax()]
        found = f"gaps from {gaps.min():.2f} to {gaps.max():.2f} {unit}, the widest after {widest:.2f}"
        found += "" if source is target else ", on both sides"
        yield target.path, "even slices", found, "add what is missing, or go on without"


def upright_gantry(loaded: Loaded) -> Iterator[Problem]:
    """Slices that are tilted against the line on which they lie."""
    for volume, _ in loaded.sides:
        step = volume.affine[:3, 2] / np.linalg.norm(volume.affine[:3, 2])
        tilt = float(np.degrees(np.arccos(min(1.0, abs(float(normal_of(volume) @ step))))))
        if tilt > TILT_DEG:
            found = f"slices tilted by {tilt:.1f}° against the line that they lie on"
            yield volume.path, "no gantry tilt", found, "nothing: it is kept in geometry and predictions"


def only_images(loaded: Loaded) -> Iterator[Problem]:
    """Files in the folder that the reader set aside as no slice of the series."""
    for volume, _ in loaded.sides:
        if volume.set_aside:
            listed = ", ".join(volume.set_aside[:4]) + (", …" if len(volume.set_aside) > 4 else "")
            yield volume.path, "only images", f"set aside: {listed}", "nothing, or move it out of the folder"


def dark_is_low(loaded: Loaded) -> Iterator[Problem]:
    """The reader inverts MONOCHROME1 unless values are HU; HU that were inverted all the same show as wrong units."""
    for volume, _ in loaded.sides:
        headers = volume.headers if volume.format == "dicom" else ()
        inverted = [h for h in headers if text_of(h, "PhotometricInterpretation") == "MONOCHROME1"]
        if inverted:
            done = "left as they are, in HU" if volume.unit == "HU" else "inverted in reading"
            found = f"MONOCHROME1 (high is dark) in {len(inverted)} of {len(headers)} slices: {done}"
            yield (
                volume.path,
                "MONOCHROME2",
                found,
                "look at the picture: tissue must be as bright as in other patients",
            )


# ------------------------------------------------------------------------------------------------ pixels


def not_constant(loaded: Loaded) -> Iterator[Problem]:
    """A volume of one value shows nothing."""
    for volume, _ in loaded.sides:
        if (value := volume.array.min()) == volume.array.max():
            found = f"constant, every voxel is {value:g}"
            yield volume.path, "an image", found, "export it again, or leave the patient out"


def shown_slices(loaded: Loaded) -> Iterator[Problem]:
    """A slice without an image, whose partner has one; where both are blank, nothing was to be seen."""
    try:
        source, target = loaded.on_grid
    except DataError:
        return
    for volume, partner, path in ((source, target, loaded.source.path), (target, source, loaded.target.path)):
        flat = volume.array.min(axis=(1, 2)) == volume.array.max(axis=(1, 2))
        if not flat.any() or flat.all() or partner.array.min() == partner.array.max():
            continue
        shown = (partner.array > threshold_otsu(partner.array[::2, ::2, ::2])).mean(axis=(1, 2)) > SHOWN_SHARE
        for k in np.flatnonzero(flat & shown):
            found = f"slice {k + 1} at {volume.positions_mm[k]:.2f} mm is constant, its partner is not"
            yield path, "an image in every slice", found, "export it again, or remove the slice"


def two_images(loaded: Loaded) -> Iterator[Problem]:
    """Source and target that are one image, so that nothing is to be learnt."""
    if np.array_equal(loaded.source.array, loaded.target.array):
        found = f"the very pixels of {short_path(loaded.target.path)}"
        yield loaded.source.path, "two images a case", found, "put the right image there"


def hounsfield_units(loaded: Loaded) -> Iterator[Problem]:
    """Values that cannot be HU, in what DICOM or the name of the modality calls a CT."""
    for volume, modality in loaded.sides:
        named = volume.format in ("nifti", "itk") and CT_NAME.search(modality)
        if not (volume.unit == "HU" or named) or not _tells(volume):
            continue
        values = volume.array[:: max(1, len(volume.array) // 32), ::2, ::2]
        low, high = np.percentile(values, (0.1, 99.9))
        typical = float(np.median(values[values > threshold_otsu(values)]))
        if high - low < SMALLEST_RANGE_HU or volume.array.min() >= 0:
            found = f"values from {volume.array.min():g} to {volume.array.max():g}"
        elif not SOFT_TISSUE_HU[0] <= typical <= SOFT_TISSUE_HU[1]:
            found = f"tissue at {typical:.0f}, where HU have it near 0 to 100"
        else:
            continue
        yield volume.path, "CT in HU", f"{found}: not HU", "export it with slope and intercept, or rename the modality"


def within_window(loaded: Loaded) -> Iterator[Problem]:
    """HU beyond `data.window_hu`, which are lost."""
    low, high = loaded.data.window_hu
    for volume, _ in loaded.sides:
        share = float(((volume.array < low) | (volume.array > high)).mean()) if volume.unit == "HU" else 0.0
        if share > CLIPPED_SHARE:
            found = f"{share:.1%} of voxels outside {low:g} to {high:g} HU, found {volume.array.min():g} to "
            found += f"{volume.array.max():g}: they are clipped"
            yield volume.path, "values in the window", found, "nothing for padding or metal, else set data.window_hu"


def aligned(loaded: Loaded) -> Iterator[Problem]:
    """A flip, or a shift beyond what registration leaves."""
    found = _misaligned(loaded)
    if found and found[1] > _tolerance_mm(loaded):
        yield loaded.source.path, "aligned", found[0], "export or register it again, or leave the patient out"


def registered(loaded: Loaded) -> Iterator[Problem]:
    """A shift as registration may leave."""
    found = _misaligned(loaded)
    if found and found[1] <= _tolerance_mm(loaded):
        yield loaded.source.path, "aligned", found[0], "register it again where voxels must agree"


def mask_on_body(loaded: Loaded) -> Iterator[Problem]:
    """A mask that marks nothing or mostly air; one named "mask", which means the body, also when it leaves most out."""
    if not loaded.mask or not _tells(loaded.target):
        return
    try:
        inside = _labels(loaded)[:, ::2, ::2] > 0
        source, target = (volume for volume in loaded.on_grid)
    except DataError:
        return
    image = source if source.unit == "HU" != target.unit else target
    array = image.array[:, ::2, ::2]
    shown = array > (SKIN_HU if image.unit == "HU" else threshold_otsu(array))
    body = np.stack([binary_fill_holes(plane) for plane in shown])
    rule, remedy = "mask on the body", "draw it again, or leave the patient out"
    in_body = float(body[inside].mean()) if inside.any() else 0.0
    covered = float(inside[body].mean()) if body.any() else 1.0
    if not inside.any():
        yield loaded.mask.path, rule, "it marks nothing", remedy
    elif in_body < BODY_SHARE:
        yield loaded.mask.path, rule, f"{1 - in_body:.0%} of what it marks is air", remedy
    elif loaded.mask_name == "mask" and covered < BODY_SHARE:
        yield loaded.mask.path, rule, f"it leaves out {1 - covered:.0%} of the body", remedy


FAULTS: list[Check] = [one_patient, one_grid, named_energy, fitting_mask]
WARNINGS: list[Check] = [
    partnered_slices,
    even_slices,
    upright_gantry,
    only_images,
    dark_is_low,
    one_study,
    resampled_grid,
]
PIXEL_FAULTS: list[Check] = [not_constant, shown_slices, two_images, hounsfield_units, aligned, mask_on_body]
PIXEL_WARNINGS: list[Check] = [within_window, registered]
OF_ONE_IMAGE: list[Check] = [
    even_slices,
    upright_gantry,
    only_images,
    dark_is_low,
    not_constant,
    hounsfield_units,
    within_window,
]


def of_one_image(volume: Volume, data: DataSettings) -> list[str]:
    """What is worth a look in an image without a partner, such as a missing slice, one line each; usually nothing."""
    case = Case("", "none", "", "", volume.path, volume.path, None)
    alone = Loaded(case, volume, volume, None, "", data, pixels=True)
    found = [f"{rule}: {words}" for check in OF_ONE_IMAGE for _, rule, words, _ in check(alone)]
    return list(dict.fromkeys(found))  # source and target are one


def parted(error: DataError, path: Path) -> tuple[str, str]:
    """What was found and the remedy, from a message about the image at `path`; the folders above are cut away."""
    found, _, remedy = str(error).removeprefix(f"{path}: ").replace(f"{path.parents[1]}/", "").partition("; ")
    return found, remedy or "mend it, or leave the patient out"


def _labels(loaded: Loaded) -> np.ndarray:
    """The mask on the slices that training sees; raises DataError when it does not lie there."""
    assert loaded.mask
    if not loaded.data.resample:
        return labels_of(loaded.mask, loaded.target, matched_slices(loaded.target, loaded.source)[0])[0]
    grid = loaded.on_grid[-1]
    return labels_of(resampled(loaded.mask, grid, "nearest")[0], grid, np.arange(len(grid.array)))[0]


def _misaligned(loaded: Loaded) -> tuple[str, float] | None:
    """What lays the source onto the target, in words, and how far that is in millimetres; None for nothing."""
    found = loaded.residual
    if not found or found.gain < SHIFT_GAIN:
        return None
    slices, rows, columns = found.shift_zyx
    in_plane = float(np.hypot(rows, columns))
    words = [f"{found.flip} flip"] if found.flip else []
    words += [f"shift of {rows} rows and {columns} columns"] if in_plane >= SHIFT_PIXELS else []
    words += [f"shift of {slices} slice{'s' * (abs(slices) > 1)}"] if abs(slices) >= SHIFT_SLICES else []
    if not words:
        return None
    _, row_mm, column_mm = loaded.target.spacing_mm_zyx
    gap_mm = usual_gap_mm(loaded.target)
    distance_mm = float(np.linalg.norm([slices * gap_mm, rows * row_mm, columns * column_mm]))
    shown = f"{' and '.join(words)} against {short_path(loaded.target.path)}, though headers agree"
    return (shown, np.inf) if found.flip else (f"{shown} ({distance_mm:.1f} mm)", distance_mm)


def _tolerance_mm(loaded: Loaded) -> float:
    return 0.0 if loaded.source.energy_kev and loaded.target.energy_kev else REGISTRATION_MM


def _tells(volume: Volume) -> bool:
    """True for what is large enough and varied enough to judge its values."""
    return min(volume.array.shape[1:]) >= MIN_SIZE and volume.array.min() < volume.array.max()


def _study(volume: Volume) -> str:
    return text_of(volume.headers[0], "StudyInstanceUID")
