"""HU window, MR percentile or 8-bit range ↔ [-1, 1]: always invertible, always recorded beside what it scaled.

The network sees [-1, 1]. CT is cut at a fixed window, since HU mean the same everywhere; MR has no unit, so each volume
is scaled by a high percentile of its own foreground; 8-bit images are scaled by their range.
"""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import numpy as np
from skimage.filters import threshold_otsu

from seresvit.config import DataSettings
from seresvit.data.volume import DataError, Unit, Volume

Kind = Literal["window", "percentile", "uint8"]

# What each rule can scale, and the rule that a volume of each unit asks for.
FITTING_UNITS: dict[str, tuple[Unit, ...]] = {
    "window": ("HU",),
    "percentile": ("arbitrary", "uint8"),
    "uint8": ("uint8",),
}
FITTING_KIND: dict[Unit, Kind] = {"HU": "window", "arbitrary": "percentile", "uint8": "uint8"}

# Skull-stripped and masked images have at least this share of voxels at exactly zero; noisy air hardly ever does.
MASKED_SHARE = 0.01


@dataclass(frozen=True)
class Intensity:
    """A linear map of `low`..`high` (in `unit`) to -1..1, and the rule `kind` that chose the bounds."""

    kind: Kind
    low: float
    high: float
    unit: Unit

    def __post_init__(self) -> None:
        if not self.low < self.high < float("inf"):
            raise DataError(
                f"intensity rule {self.kind}: low {self.low} must be below a finite high, found {self.high}"
            )

    def normalise(self, array: np.ndarray) -> np.ndarray:
        """Values in [-1, 1], float32; what lies outside `low`..`high` is clipped."""
        clipped = np.clip(np.asarray(array, dtype=np.float32), self.low, self.high)
        return np.clip((clipped - self.low) * (2 / (self.high - self.low)) - 1, -1, 1).astype(np.float32, copy=False)

    def restore(self, array: np.ndarray) -> np.ndarray:
        """Values in `unit`, float32: the inverse of `normalise` for all that was not clipped."""
        return ((np.asarray(array, dtype=np.float32) + 1) * ((self.high - self.low) / 2) + self.low).astype(
            np.float32, copy=False
        )

    def as_dict(self) -> dict[str, Any]:
        """`kind`, `low`, `high` and `unit`, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Intensity":
        """The rule that `as_dict` recorded. Raises DataError when a part is missing or means nothing."""
        try:
            rule = cls(record["kind"], float(record["low"]), float(record["high"]), record["unit"])
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"recorded intensity rule {record!r} cannot be used ({error!r}); record it again") from None
        if rule.kind not in FITTING_UNITS or rule.unit not in FITTING_KIND:
            raise DataError(f"recorded intensity rule {record!r}: unknown kind or unit; record it again")
        return rule


def intensity_of(volume: Volume, kind: str, data: DataSettings) -> Intensity:
    """The rule of that kind for this volume: bounds from the settings, or for "percentile" from its own foreground.

    Raises DataError when the rule does not fit the volume's unit, or the volume holds nothing to scale by.
    """
    if volume.unit not in FITTING_UNITS[kind]:
        raise DataError(
            f"{volume.path}: the intensity rule '{kind}' is for {' or '.join(FITTING_UNITS[kind])} values, "
            f"found {volume.unit} values; set data.intensity.source or data.intensity.target, "
            f"whichever this image is, to '{FITTING_KIND[volume.unit]}'"
        )
    lowest, highest = float(volume.array.min()), float(volume.array.max())
    if not np.isfinite([lowest, highest]).all():
        raise DataError(f"{volume.path}: values that are not finite (NaN or infinity); export the image again")
    if lowest == highest:
        raise DataError(
            f"{volume.path}: every voxel is {lowest:g}, so there is no image; leave it out or export it again"
        )
    if kind == "window":
        return Intensity("window", *data.window_hu, volume.unit)
    if kind == "uint8":
        return Intensity("uint8", 0.0, 255.0, volume.unit)
    return Intensity("percentile", 0.0, _foreground_percentile(volume, data.percentile), volume.unit)


def reference_intensity(intensities: list[Intensity]) -> Intensity:
    """The rule with the median upper bound of these, normally of all training targets.

    It restores predictions where no target exists to take a percentile from. Raises DataError when there are none, or
    when they are of different kinds, units or lower bounds and so have no common scale.
    """
    scales = {(rule.kind, rule.low, rule.unit) for rule in intensities}
    if len(scales) != 1:
        found = ", ".join(sorted(f"{kind} from {low:g} ({unit})" for kind, low, unit in scales)) or "no target"
        raise DataError(f"training targets: they need one common intensity rule, found {found}; audit them again")
    first = intensities[0]
    return Intensity(first.kind, first.low, float(median(rule.high for rule in intensities)), first.unit)


def _foreground_percentile(volume: Volume, percentile: float) -> float:
    """That percentile of the voxels above zero where the background is exactly zero, else above Otsu's threshold."""
    array = volume.array
    masked = np.count_nonzero(array == 0) >= MASKED_SHARE * array.size
    foreground = array[array > (0 if masked else threshold_otsu(array))]
    if foreground.size == 0 or foreground.min() == foreground.max() or np.percentile(foreground, percentile) <= 0:
        raise DataError(
            f"{volume.path}: the foreground that data.percentile is taken from is empty, constant or not above zero; "
            f"is this an image and not a mask? Leave it out or export it again"
        )
    return float(np.percentile(foreground, percentile))
