"""HU window, MR percentile or z-score, or 8-bit range ↔ [-1, 1]: always invertible, always recorded.

The network sees [-1, 1]. CT is cut at a fixed window, since HU mean the same everywhere; MR has no unit, so each volume
is scaled by a high percentile, or by mean and deviation, of its own foreground; 8-bit images are scaled by their range.
"""

from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Literal

import numpy as np
from skimage.filters import threshold_otsu

from seresvit.config import DataSettings
from seresvit.data.volume import DataError, Unit, Volume

Kind = Literal["window", "percentile", "zscore", "uint8"]

# What each rule can scale, and the rule that a volume of each unit asks for.
FITTING_UNITS: dict[str, tuple[Unit, ...]] = {
    "window": ("HU",),
    "percentile": ("arbitrary", "uint8"),
    "zscore": ("arbitrary", "uint8"),
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

    def normalise(self, array: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Values in [-1, 1], float32, in `out` if given; what lies outside `low`..`high` is clipped."""
        scaled = np.empty(np.shape(array), np.float32) if out is None else out
        np.copyto(scaled, array, casting="same_kind")
        scaled -= (self.low + self.high) / 2
        scaled /= (self.high - self.low) / 2
        return np.clip(scaled, -1, 1, out=scaled)

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
    """The rule of that kind for this volume: bounds from the settings, or for MR rules from its own foreground.

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
    values = volume.array[foreground_of(volume)]
    if values.size == 0 or values.min() == values.max() or np.percentile(values, data.percentile) <= 0:
        raise DataError(
            f"{volume.path}: the foreground that the rule '{kind}' is taken from is empty, constant or not above zero; "
            f"is this an image and not a mask? Leave it out or export it again"
        )
    if kind == "zscore":
        mean, reach = values.mean(dtype=np.float64), data.zscore_limit * values.std(dtype=np.float64)
        return Intensity("zscore", float(mean - reach), float(mean + reach), volume.unit)
    return Intensity("percentile", 0.0, float(np.percentile(values, data.percentile)), volume.unit)


def foreground_of(volume: Volume) -> np.ndarray:
    """(Z, Y, X) bool: above zero where the background is exactly zero, else above Otsu's threshold."""
    masked = np.count_nonzero(volume.array == 0) >= MASKED_SHARE * volume.array.size
    return volume.array > (0 if masked else threshold_otsu(volume.array))


def shown_in(volume: Volume, rule: Intensity) -> np.ndarray:
    """(Z, Y, X) bool: what `data.min_foreground` counts, above the rule's lower bound (z-scores: the foreground)."""
    return foreground_of(volume) if rule.kind == "zscore" else volume.array > rule.restore(np.array(-0.99))


def reference_intensity(intensities: list[Intensity]) -> Intensity:
    """The rule with the median bounds of these, normally of all training targets.

    It restores predictions where no target exists to take a scale from. Raises DataError when there are none, or when
    they are of different kinds, units or fixed lower bounds and so have no common scale.
    """
    scales = {(rule.kind, rule.low if rule.kind != "zscore" else "the mean", rule.unit) for rule in intensities}
    if len(scales) != 1:
        found = ", ".join(sorted(f"{kind} from {low} ({unit})" for kind, low, unit in scales)) or "no target"
        raise DataError(f"training targets: they need one common intensity rule, found {found}; audit them again")
    low, high = (float(median(bounds)) for bounds in zip(*((r.low, r.high) for r in intensities), strict=True))
    return Intensity(intensities[0].kind, low, high, intensities[0].unit)
