"""Cases from the best to the worst, and those of them that a page shows, with the slices to show of each."""

from typing import Any

import numpy as np
import pandas as pd

from seresvit.evaluation.tables import METHODS

MAX_CASES = 4


def ranked_cases(cases: pd.DataFrame) -> pd.Series:
    """MAE of the network by patient and source, ascending: of the test split where there is one."""
    return _of_network(cases).set_index(["patient", "source"])["mae"].sort_values(kind="stable")


def chosen_cases(cases: pd.DataFrame, slices: pd.DataFrame) -> list[dict[str, Any]]:
    """Up to MAX_CASES cases, evenly spread over their ranks by MAE, of each the slice with median error and the one
    with the largest."""
    of_network, ranked = _of_network(slices), ranked_cases(cases)
    chosen: list[dict[str, Any]] = []
    for place in sorted(set(np.linspace(0, len(ranked) - 1, MAX_CASES).round().astype(int).tolist())):
        patient, source = ranked.index[place]
        of_case = of_network[(of_network["patient"] == patient) & (of_network["source"] == source)].sort_values("mae")
        picks = {"median error": of_case.iloc[(len(of_case) - 1) // 2], "largest error": of_case.iloc[-1]}
        if len(of_case) == 1:
            picks.pop("median error")
        rows = [
            {"why": why, "slice": int(r["slice"]), "position_mm": r["position_mm"], "mae": r["mae"]}
            for why, r in picks.items()
        ]
        case = {"patient": patient, "source": source, "slices": rows}
        chosen.append(case | {"rank": place + 1, "of": len(ranked), "mae": float(ranked.iloc[place])})
    return chosen


def _of_network(table: pd.DataFrame) -> pd.DataFrame:
    of_network = table[table["method"] == METHODS[0]].dropna(subset=["mae"])  # an empty mask has no error
    tested = of_network[of_network["split"] == "test"]
    return of_network if tested.empty else tested
