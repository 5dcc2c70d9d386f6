"""From patients that the network never saw to intervals beside its checkpoint, and how often these hold on others."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from seresvit.config import ConfigError
from seresvit.data.pair import Pair, load_pair
from seresvit.data.pairing import Case, load_channels, read_manifest
from seresvit.data.volume import DataError, written_whole
from seresvit.synthesis.intervals import Intervals, fit, half_width, sample_of
from seresvit.synthesis.predictor import Predictor, intervals_path

Group = tuple[Case, ...]
# Below this the quantile of a handful of patients says little of the next one.
FEWEST_PATIENTS = 5


def calibrate(
    predictor: Predictor,
    manifest: Path,
    split: str = "val",
    held_out: str = "test",
    coverage: float = 0.9,
    regions_hu: dict[str, tuple[float, float]] | None = None,
    progress: Callable[[list[Group]], Iterable[Group]] = iter,
) -> tuple[Intervals, pd.DataFrame]:
    """Intervals from the patients of `split`, written beside the checkpoint, and how often they hold in `held_out`.

    The table has a row a region: the mean over the held-out patients of the share of voxels inside, the lowest and
    the highest patient, the mean half-width in the target's unit, and the number of patients. Regions are the
    manifest's labels where they have names, else `regions_hu`, ranges of the target's HU. The intervals hold for the
    predictor's own flips, planes, tiles and further checkpoints only, and so its file is used for these only.
    Raises ConfigError for a split with fewer than FEWEST_PATIENTS patients, or tried on itself, DataError for targets
    whose values mean something else in every patient (MR).
    """
    if split == held_out:
        raise ConfigError(f"--held-out {held_out}: intervals are tried on other patients than --split; name another")
    if predictor.data.intensity.target not in ("window", "uint8"):
        raise DataError(f"{predictor.path}: MR targets have no common unit, so that errors of patients do not compare")
    groups = load_channels(read_manifest(manifest), predictor.data.channels)
    of_split = {name: [group for group in groups if group[0].split == name] for name in (split, held_out)}
    if (count := len({group[0].patient for group in of_split[split]})) < FEWEST_PATIENTS:
        raise ConfigError(f"{manifest}: {count} patients in the split '{split}', intervals need {FEWEST_PATIENTS}")
    samples: dict[str, list[np.ndarray]] = {}
    for number, group in enumerate(progress(of_split[split])):
        pair, synthetic, spread = _predicted(predictor, group)
        rng = np.random.default_rng(number)
        samples.setdefault(group[0].patient, []).append(sample_of(synthetic, spread, pair.target.array, rng))
    # A patient with several sources counts as one.
    by_patient = [np.concatenate(parts, axis=1)[:, :: len(parts)] for parts in samples.values()]
    intervals = fit(by_patient, coverage, predictor.members_record)
    rows = []
    for group in progress(of_split[held_out]):
        pair, synthetic, spread = _predicted(predictor, group)
        width = half_width(intervals, synthetic, spread)
        inside = np.abs(synthetic - pair.target.array) <= width
        for region, where in regions(pair, regions_hu or {}).items():
            if where.any():
                shares = {"inside": inside[where].mean(), "half_width": width[where].mean()}
                rows.append({"region": region, "patient": group[0].patient, **shares})
    table = summarised(pd.DataFrame(rows))
    record: dict[str, Any] = {**intervals.as_dict(), "split": split, "held_out": held_out}
    with written_whole(intervals_path(predictor.path)) as temporary:
        record["measured"] = table.reset_index().to_dict("records")
        temporary.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return intervals, table


def _predicted(predictor: Predictor, group: Group) -> tuple[Pair, np.ndarray, np.ndarray | None]:
    """A case's images on the target's slices, and what the predictor's members make of them, on the same grid."""
    as_acquired = predictor.data.model_copy(update={"n4": False})  # the predictor corrects for the bias field itself
    pair = load_pair(*group, data=as_acquired, to_score=True)
    synthetic, spread, _ = predictor.with_spread(*pair.sources)
    return pair, synthetic.array, None if spread is None else spread.array


def regions(pair: Pair, regions_hu: dict[str, tuple[float, float]]) -> dict[str, np.ndarray]:
    """(Z, Y, X) bool by name: all voxels, then the named labels, or the body and these ranges of the target's HU."""
    found = {"all": np.ones(pair.target.array.shape, bool)}
    if pair.labels is not None:
        found["inside the mask"] = pair.labels > 0
    if pair.labels is not None and set(pair.label_names) != {"mask"}:
        return found | {name: pair.labels == label for name, label in pair.label_names.items()}
    if pair.target.unit != "HU":
        return found
    return found | {
        name: (pair.target.array > low) & (pair.target.array <= high) for name, (low, high) in regions_hu.items()
    }


def summarised(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a region: `inside` as the mean over patients, `lowest` and `highest` patient, `half_width`, `patients`."""
    if rows.empty:
        return rows
    of_patient = rows.groupby(["region", "patient"], sort=False).mean()
    of_region = of_patient.groupby("region", sort=False)
    return pd.DataFrame(
        {
            "inside": of_region["inside"].mean(),
            "lowest": of_region["inside"].min(),
            "highest": of_region["inside"].max(),
            "half_width": of_region["half_width"].mean(),
            "patients": of_region["inside"].count(),
        }
    )
