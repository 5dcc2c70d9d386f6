"""The page of a comparison from tables of known numbers, and the charts whose lines can be computed again."""

import base64
import html
import io
import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from seresvit.data.volume import DataError
from seresvit.evaluation import charts
from seresvit.evaluation.report import write_comparison


def write_comparison_tables(out):
    """Two fusions, two seeds and four patients as seresvit compare writes them; se is 2 HU better in three of four."""
    change = {"P1": -2.0, "P2": -2.0, "P3": -2.0, "P4": 1.0}
    rows = [
        {"fusion": fusion, "seed": seed, "patient": patient, "mae": 30.0 + seed + (fusion == "se") * change[patient]}
        for fusion in ("concat", "se")
        for seed in (0, 1)
        for patient in change
    ]
    pd.DataFrame(rows).to_csv(out / "patients.csv", index=False)
    costs = {"step_ratio": 1.25, "step_ratio_low": 1.2, "step_ratio_high": 1.3}
    table = [
        {
            "fusion": "concat",
            "seeds": 2,
            "patients": 4,
            "mae_mean": 30.5,
            "mae_std_patients": 0.0,
            "mae_std_seeds": 0.71,
        },
        {"fusion": "se", "seeds": 2, "patients": 4, "mae_mean": 29.25, "mae_std_patients": 1.5, "mae_std_seeds": 0.71},
    ]
    pd.DataFrame([table[0], table[1] | costs]).assign(parameters=[123_441_537, 123_507_073]).to_csv(
        out / "compare.csv", index=False
    )
    difference = {"first": "se", "second": "concat", "metric": "mae", "mean": -1.25, "low": -2.0, "high": 0.25, "n": 4}
    difference |= {"seeds": 2, "p": np.nan, "p_adjusted": np.nan, "effect_size": -0.83, "sentence": "no difference"}
    pd.DataFrame([difference]).to_csv(out / "comparisons.csv", index=False)
    curves = [("all", 1, 100, 60.0), ("all", 1, 200, 50.0), ("concat", 2, 100, 40.0), ("se", 2, 100, 39.0)]
    pd.DataFrame([{"fusion": f, "seed": 0, "stage": s, "images": n, "val_mae": mae} for f, s, n, mae in curves]).to_csv(
        out / "curves.csv", index=False
    )
    record = {"protocol": "dect", "metric": "mae", "unit": "HU", "fusions": ["concat", "se"], "seeds": [0, 1]}
    record |= {"patients": 4, "budget": {"words": "Both saw the same 300 images."}, "notes": ["Two seeds are few."]}
    record |= {"verdict": ["No difference was shown."], "failed": [{"fusion": "se", "seed": 2, "reason": "stopped"}]}
    (out / "compare.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    write_comparison_tables(out)
    return write_comparison(out)


def test_a_comparison_is_told_with_its_costs_and_failures(comparison):
    text = html.unescape(re.sub(r"<[^>]+>", "", comparison.read_text(encoding="utf-8")))
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)"', comparison.read_text(encoding="utf-8"))
    for words in (
        "No difference was shown.",
        "Both saw the same 300 images.",
        "Two seeds are few.",
        "se, seed 2: stopped",
    ):
        assert words in text
    for words in ("29.25 ± 1.50 (0.71)", "30.50 ± 0.00 (0.71)", "123,507,073", "1.250 (1.200 to 1.300)"):
        assert words in text
    assert "123,507,073 (+0.0531 %)" in text and "123,441,537 (" not in text and "236.7 (+0.00359 %)" not in text
    for words in ("−1.25", "−2.00 to +0.25", "−0.83"):
        assert words in text
    assert len(images) == 3 and "<script" not in comparison.read_text(encoding="utf-8")
    for image in images:
        assert np.asarray(Image.open(io.BytesIO(base64.b64decode(image))).convert("L")).std() > 3
    with pytest.raises(DataError, match=r"no compare\.json"):
        write_comparison(comparison.parents[1])


def test_slopes_count_the_patients_that_got_better(comparison, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "_png", lambda figure: drawn.append(figure) or "")
    patients = pd.read_csv(comparison.parent / "patients.csv")
    means = patients.groupby(["fusion", "patient"])["mae"].mean().unstack("fusion")
    charts.slopes(means, [("concat", "se")], "MAE", "HU", False)
    (axis,) = drawn[0].axes
    assert axis.get_title(loc="left") == "better in 3 of 4 patients" and axis.get_ylabel() == "MAE [HU]"
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["concat", "se"]
    charts.slopes(
        means.rename(columns={"se": "runs/se-of-may/evaluation"}),
        [("concat", "runs/se-of-may/evaluation")],
        "MAE",
        "HU",
        False,
    )
    assert drawn[1].axes[0].get_xticklabels()[1].get_text() == "runs/\nse-of-may/\nevaluation"
    ends = [line.get_ydata().tolist() for line in axis.lines]
    assert ends == [[30.5, 28.5]] * 3 + [[30.5, 31.5]]
    assert charts.slopes(means, [("concat", "cbam")], "MAE", "HU", False) == ""


def test_bland_altman_lines_are_bias_and_limits(monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "_png", lambda figure: drawn.append(figure) or "")
    rng = np.random.default_rng(0)
    target = rng.uniform(-100, 300, 5000)
    synthetic = target + rng.normal(7, 20, 5000)
    charts.bland_altman(target, synthetic, "HU")
    difference = synthetic - target
    half = 1.96 * difference.std(ddof=1)
    expected = [difference.mean(), difference.mean() - half, difference.mean() + half]
    assert np.allclose([line.get_ydata()[0] for line in drawn[0].axes[0].lines], expected)
    assert drawn[0].axes[0].get_ylabel() == "synthetic − target [HU]"


def test_chromium_opens_it_without_a_fault(comparison, opened):
    for width in (1280, 400):
        view = opened(comparison, width)
        assert view.evaluate("document.documentElement.scrollWidth") <= width
        assert view.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
