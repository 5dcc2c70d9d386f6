"""N4: the slow shading that receiver coils leave on an MR image, estimated and divided out.

Tustison et al., "N4ITK: Improved N3 Bias Correction", IEEE TMI 2010. Estimated on a coarse grid, as its authors do, and
applied at full resolution.
"""

from dataclasses import replace
from math import ceil

import numpy as np
import SimpleITK as sitk  # noqa: N813

from seresvit.config import DataSettings
from seresvit.data.intensity import foreground_of
from seresvit.data.volume import DataError, Volume

ITERATIONS = (50, 50, 50, 50)
COARSE_VOXELS = 48


def without_bias(volume: Volume, data: DataSettings) -> Volume:
    """The volume divided by its bias field where `data.n4` asks for it and the unit is arbitrary, else as it is.

    The field's geometric mean over the foreground is 1, so values keep their scale. The same volume gives the same
    values every time. Raises DataError for fewer than four slices, or where there is nothing to estimate from.
    """
    if not data.n4 or volume.unit != "arbitrary":
        return volume
    foreground = foreground_of(volume) & (volume.array > 0)
    if min(volume.array.shape) < 4 or not foreground.any():
        raise DataError(f"{volume.path}: N4 needs 4 voxels along each axis and a foreground above 0; set data.n4=false")
    image = sitk.GetImageFromArray(volume.array)
    mask = sitk.GetImageFromArray(foreground.astype(np.uint8))
    shrink = [ceil(size / COARSE_VOXELS) for size in image.GetSize()]
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations(ITERATIONS)
    n4.SetNumberOfThreads(1)  # sums in one order, whatever the machine
    try:
        n4.Execute(sitk.Shrink(image, shrink), sitk.Shrink(mask, shrink))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][-120:]
        raise DataError(f"{volume.path}: N4 cannot estimate a bias field ({reason}); set data.n4=false") from None
    log_field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(image))
    return replace(volume, array=volume.array * np.exp(log_field[foreground].mean() - log_field))
