"""A comparison of micro networks on simulated patients: its runs, its tables and what it claims."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from typer.testing import CliRunner

from seresvit.cli import app
from seresvit.config import ConfigError, load_config, to_yaml
from seresvit.data import phantom
from seresvit.data.volume import DataError
from seresvit.evaluation import compare as comparing
from seresvit.evaluation import cost, trials
from seresvit.evaluation.compare import compare, render_table
from seresvit.evaluation.statistics import holm, seeds_and_patients_difference
from seresvit.evaluation.trials import SHARED, Comparison, settings_of
from seresvit.model import checkpoint
from seresvit.training.processes import Stopped, start_processes
from seresvit.training.stage import start_stage

MICRO = [
    "model.base_channels=4",
    "model.vit={depth: 1, width: 16, heads: 2, mlp_width: 16}",
    "train.size=32",
    "train.batch_size=2",
    "train.discriminator_channels=4",
    "train.precision=32-true",
    "train.save_every_images=4",
    "train.validate_every_images=4",
    "train.validation_slices=2",
    "train.stage1={num_images: 4, learning_rate: 0.002}",
    "train.stage2={num_images: 8, learning_rate: 0.002}",
]
TEST_PATIENTS = [f"P00{number}" for number in range(3, 10)]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, for sums that do not depend on how many share them, and few rounds of timing."""
    threads, rounds = torch.get_num_threads(), (cost.ROUNDS, cost.MIN_ROUNDS)
    torch.set_num_threads(1)
    cost.ROUNDS, cost.MIN_ROUNDS = 5, 5
    yield
    torch.set_num_threads(threads)
    cost.ROUNDS, cost.MIN_ROUNDS = rounds


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("patients")
    phantom.simulate(root / "dicom", patients=9, slices=2, size=32, kev=(70, 110))
    rows = ["patient,split,source,target,source_path,target_path,mask_path"]
    for patient in ("P001", "P002", *TEST_PATIENTS):
        split = {"P001": "train", "P002": "val"}.get(patient, "test")
        labels = f"dicom/labels/{patient}.nii.gz"
        rows.append(f"{patient},{split},110keV,70keV,dicom/110keV/{patient},dicom/70keV/{patient},{labels}")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    return root / "manifest.csv"


def asked(manifest, out, fusions=("concat", "se"), num_seeds=2, overrides=()):
    return Comparison(load_config(None, [*MICRO, *overrides]), manifest, fusions, num_seeds, "dect", out)


@pytest.fixture(scope="module")
def whole(manifest, tmp_path_factory):
    comparison = asked(manifest, tmp_path_factory.mktemp("whole") / "out")
    return comparison, compare(comparison)


def tables(out):
    """All that a comparison found."""
    return {name: pd.read_csv(out / f"{name}.csv") for name in ("compare", "patients", "comparisons", "curves")}


def test_all_fusions_of_a_seed_start_from_the_same_weights(whole, manifest):
    comparison, _ = whole
    fabric = start_processes(comparison.config)
    starts = {}
    for seed in (0, 1):
        for fusion in ("concat", "se", "cbam"):
            network = start_stage(fabric, settings_of(comparison, fusion, seed), 2, None).generator.module
            starts[fusion, seed] = {n: w.clone() for n, w in network.state_dict().items() if ".fuse." not in n}
        shared = checkpoint.load(comparison.folder(SHARED, seed) / "model.safetensors").state_dict()
        for fusion in ("se", "cbam"):
            assert starts[fusion, seed].keys() == starts["concat", seed].keys()
            assert all(torch.equal(w, starts["concat", seed][name]) for name, w in starts[fusion, seed].items())
        trained = [name for name in shared if name.endswith("conv.weight")]
        assert len(trained) > 20 and all(torch.equal(shared[n], starts["se", seed][n]) for n in trained)
    assert not torch.equal(starts["se", 0]["art_1.embed.patch.weight"], starts["se", 1]["art_1.embed.patch.weight"])


def test_runs_differ_in_fusion_and_seed_alone(whole):
    comparison, _ = whole
    base = settings_of(comparison, "concat", 0).model_dump(mode="json")
    for fusion, seed in (("se", 0), ("se", 1)):
        tree = settings_of(comparison, fusion, seed).model_dump(mode="json")
        assert tree["model"]["fusion"].pop("kind") == fusion and tree["train"].pop("seed") == seed
        assert f"{SHARED}{os.sep}seed{seed}" in tree["train"].pop("init_from")
        for key, branch in (("kind", base["model"]["fusion"]), ("seed", base["train"]), ("init_from", base["train"])):
            branch.pop(key, None)
        assert tree == base
    logged = [
        [json.loads(line) for line in (comparison.folder(*run) / "run" / "log.jsonl").read_text().splitlines()]
        for run in comparison.runs
    ]
    assert [lines[-1]["images"] for lines in logged] == [4, 4, 8, 8, 8, 8]
    assert [lines[-1]["stage"] for lines in logged] == [1, 1, 2, 2, 2, 2]


def test_patients_are_those_of_each_evaluation(whole):
    comparison, compared = whole
    patients = pd.read_csv(comparison.out / "patients.csv")
    assert len(patients) == 2 * 2 * 7
    cases = pd.read_csv(comparison.folder("se", 1) / "evaluation" / "cases.csv")
    expected = cases[cases["method"] == "synthetic"].set_index("patient")
    of_run = patients[(patients["fusion"] == "se") & (patients["seed"] == 1)].set_index("patient")
    assert list(of_run.index) == TEST_PATIENTS
    for metric in ("mae", "psnr", "ssim", "mae_bone"):
        np.testing.assert_allclose(of_run[metric], expected.loc[TEST_PATIENTS, metric])
    row = compared.fusions.set_index("fusion").loc["se"]
    values = patients[patients["fusion"] == "se"].pivot(index="seed", columns="patient", values="mae").to_numpy()
    assert row["mae_mean"] == pytest.approx(values.mean())
    assert row["mae_std_patients"] == pytest.approx(values.mean(axis=0).std(ddof=1))
    assert row["mae_std_seeds"] == pytest.approx(values.mean(axis=1).std(ddof=1))


def test_intervals_are_those_of_the_statistics(whole):
    comparison, compared = whole
    patients = pd.read_csv(comparison.out / "patients.csv")
    for metric in ("mae", "mae_bone"):
        ours, theirs = (
            patients[patients["fusion"] == fusion].pivot(index="seed", columns="patient", values=metric)
            for fusion in ("se", "concat")
        )
        expected = seeds_and_patients_difference(ours, theirs)
        rows = compared.comparisons
        row = rows[(rows["metric"] == metric) & (rows["first"] == "se") & (rows["second"] == "concat")].iloc[0]
        for name in ("mean", "low", "high", "n", "p", "effect_size"):
            value = getattr(expected, name)  # None where too few patients have that tissue
            assert row[name] == pytest.approx(math.nan if value is None else value, nan_ok=True)
        assert row["seeds"] == 2
        if metric == "mae":
            assert row["n"] == 7 and 0 < row["p"] <= 1 and row["p_adjusted"] == row["p"]
    assert compared.record["verdict"][1:] == list(rows[rows["metric"] == "mae"]["sentence"])
    assert "7 patients × 2 seeds" in compared.record["verdict"][1]


def test_killed_in_the_middle_it_goes_on_to_the_same_tables(whole, manifest, tmp_path):
    """Killed for good while it trains one run, in a process of its own; then the same call again."""
    comparison = asked(manifest, tmp_path / "out")
    shutil.copytree(whole[0].out, comparison.out)
    shutil.rmtree(comparison.folder("se", 0))
    (comparison.out / "compare.json").unlink()
    pid = os.fork()
    if pid == 0:

        @contextmanager
        def bars():
            yield lambda stage, images, *_: images < 6 or os.kill(os.getpid(), signal.SIGKILL)

        try:
            compare(comparison, bars=bars)
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    last = comparison.folder("se", 0) / "run" / "checkpoints" / "last" / "model.safetensors"
    assert checkpoint.read(last)[1]["images"] == 4 and not (comparison.out / "compare.json").exists()
    told = []
    compare(comparison, told.append)
    assert [line for line in told if " of 6: " in line] == ["4 of 6: se, seed 0"]
    for name, table in tables(comparison.out).items():
        pd.testing.assert_frame_equal(table, tables(whole[0].out)[name], obj=name)
    assert (comparison.out / "compare.json").read_text() == (whole[0].out / "compare.json").read_text()


def test_a_failed_run_is_named_and_the_others_go_on(manifest, tmp_path, monkeypatch):
    def unlucky(config, *rest):
        if (config.model.fusion.kind, config.train.seed) == ("se", 1):
            raise RuntimeError("the device fell off")
        return trained(config, *rest)

    trained = trials.train
    monkeypatch.setattr(trials, "train", unlucky)
    written = tmp_path / "micro.yaml"
    settings = load_config(None, [*MICRO, "train.stage1.num_images=0", "train.stage2.num_images=2"])
    written.write_text(to_yaml(settings))
    words = ["compare", str(written), "--manifest", str(manifest), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, "--fusions", "se", "--seeds", "2"])
    assert isinstance(result.exception, DataError) and "1 runs failed" in str(result.exception)
    assert "failed: se, seed 1: RuntimeError: the device fell off" in result.output
    assert "se alone has runs" in result.output
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [run["seed"] for run in record["failed"]] == [1] and not record["budget"]["shared_stage1"]
    assert list(pd.read_csv(tmp_path / "out" / "compare.csv")["seeds"]) == [1]


def test_tables_curves_and_costs(whole):
    comparison, compared = whole
    curves = pd.read_csv(comparison.out / "curves.csv")
    assert set(curves["fusion"]) == {"all", "concat", "se"}
    last = json.loads((comparison.folder("se", 0) / "run" / "manifest.json").read_text())
    assert last["seed"] == 0
    of_run = curves[(curves["fusion"] == "se") & (curves["seed"] == 0)]
    assert list(of_run["images"]) == [0, 4, 8] and (of_run["stage"] == 2).all()
    best = checkpoint.read(comparison.folder("se", 0) / "run" / "checkpoints" / "best" / "model.safetensors")[1]
    assert of_run["val_mae"].min() == best["val_mae"]
    assert (comparison.out / "curves.png").read_bytes()[:4] == b"\x89PNG"
    costs = {row["fusion"]: row for row in compared.record["costs"]}
    # The gates of both blocks: 2C = 32 channels, 32 / 16 = 2 hidden.
    assert costs["se"]["parameters"] - costs["concat"]["parameters"] == 2 * 2 * 32 * 2
    for row in costs.values():
        assert 0.2 < row["step_ratio"] < 5 and row["step_ratio_low"] <= row["step_ratio"] <= row["step_ratio_high"]
        assert row["step_ms"] > row["predict_ms"] > 0
    assert costs["se"]["gflops"] > costs["concat"]["gflops"]
    assert render_table(compared).row_count == 2


def test_the_curves_figure_has_a_unit_and_does_not_flatten_the_end(whole, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(comparing, "Figure", lambda **more: drawn.append(Figure(**more)) or drawn[-1])
    comparing._plot(pd.read_csv(whole[0].out / "curves.csv"), whole[0], tmp_path / "curves.png")
    (axis,) = drawn[0].axes
    assert axis.get_ylabel() == "MAE in validation [HU]" and axis.get_yscale() == "log"
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_ratio_of_times_that_are_known():
    rng = np.random.default_rng(1)
    slow_down = rng.uniform(1, 3, 400)  # of the machine, which both feel
    found = cost.ratio("step", 1.25 * slow_down * rng.normal(1, 0.01, 400), slow_down)
    assert found["step_ratio"] == pytest.approx(1.25, abs=0.005)
    assert 1.24 < found["step_ratio_low"] < 1.25 < found["step_ratio_high"] < 1.26


def made_up(means, num_patients=8, num_seeds=3, noise=0.1):
    """patients.csv of fusions with these mean MAEs, patients that differ far more than fusions do."""
    rng = np.random.default_rng(0)
    of_patient = rng.normal(0, 10, num_patients)
    return pd.DataFrame(
        [
            {"fusion": fusion, "seed": s, "patient": f"P{p}", "mae": mean + of_patient[p] + rng.normal(0, noise)}
            for fusion, mean in means.items()
            for s in range(num_seeds)
            for p in range(num_patients)
        ]
    )


def test_a_difference_that_is_there_is_said_and_adjusted(manifest, tmp_path):
    comparison = asked(manifest, tmp_path)
    patients = made_up({"concat": 50, "se-frozen": 49.99, "se": 48})
    found = comparing._comparisons(patients, ["mae"], comparison)
    pairs = list(zip(found["first"], found["second"], strict=True))
    assert pairs == [("se-frozen", "concat"), ("se", "concat"), ("se", "se-frozen")]
    differences = {
        pair: seeds_and_patients_difference(*(patients[patients["fusion"] == f].pivot(index="seed", columns="patient",
                                                                                    values="mae") for f in pair))
        for pair in pairs
    }  # fmt: skip
    assert list(found["p_adjusted"]) == pytest.approx([d.p_adjusted for d in holm(differences).values()])
    of_frozen, of_se, _ = found["sentence"]
    assert of_frozen.startswith("no difference in MAE was shown between se-frozen and concat")
    assert of_se.startswith("se lowers MAE by 2") and "HU against concat (95 % CI" in of_se
    assert "n = 8 patients × 3 seeds" in of_se and "Holm over 3 comparisons" in of_se
    best, is_shown, words = comparing._best(patients, comparison)
    assert (best, is_shown) == ("se", True) and words.endswith("as was shown (p over all 3 pairs)")
    one = replace(comparison, num_seeds=1)
    assert comparing._best(patients[patients["seed"] == 0], one)[2].endswith("for these trainings of one seed")


def test_seeds_that_one_of_the_two_lacks_are_left_out(manifest, tmp_path):
    patients = made_up({"concat": 50, "se": 48})
    patients = patients[(patients["fusion"] == "se") | (patients["seed"] != 1)]
    row = comparing._comparisons(patients, ["mae"], asked(manifest, tmp_path)).iloc[0]
    both = patients[patients["seed"] != 1].groupby(["fusion", "patient"])["mae"].mean()
    assert row["seeds"] == 2 and row["mean"] == pytest.approx((both["se"] - both["concat"]).mean())


def test_no_winner_is_named_that_is_not_shown(manifest, tmp_path):
    comparison = asked(manifest, tmp_path)
    best, is_shown, words = comparing._best(made_up({"concat": 50, "se": 47.99, "eca": 48}), comparison)
    assert (best, is_shown) == ("se", False) or best == "eca"
    assert not is_shown and f"that it is lower than that of {({'se', 'eca'} - {best}).pop()} was not shown" in words
    # Five patients: however large the difference, no test can show it.
    few = made_up({"concat": 50, "se": 40}, num_patients=5)
    row = comparing._comparisons(few, ["mae"], comparison).iloc[0]
    assert row["p"] is None and "fewer than 6 patients" in row["sentence"] and "lowers" not in row["sentence"]
    assert "in 5 patients × 3 seeds" in row["sentence"]
    assert comparing._best(few, comparison)[1] is False


def test_other_settings_on_an_old_folder_are_refused(whole, manifest):
    comparison, _ = whole
    for overrides, word in ((["train.stage2.num_images=10"], "train.stage2.num_images"), (["train.seed=1"], "seed")):
        with pytest.raises(ConfigError, match=f"other .*{word}; choose another --out"):
            compare(asked(manifest, comparison.out, overrides=overrides))
    fused = asked(manifest, comparison.out, overrides=["model.fusion.kind=concat"])
    assert trials.begin(fused) == 7  # each run has its own


def test_wrong_use_is_said_before_anything_is_trained(manifest, tmp_path):
    for change, word in (
        ({"fusions": ("concat", "sea")}, "no sea; choose among concat, se"),
        ({"fusions": ("se", "se")}, "each fusion once"),
        ({"overrides": ["train.stage2.num_images=0"]}, "no fusion to train"),
    ):
        with pytest.raises(ConfigError, match=word):
            compare(asked(manifest, tmp_path / "out", **change))
    wrong = Comparison(load_config(None, MICRO), manifest, ("se",), 1, "mr", tmp_path / "out")
    with pytest.raises(ConfigError, match="target holds HU"):
        compare(wrong)
    assert not (tmp_path / "out").exists()


def test_every_gpu_gets_a_worker_and_signals_reach_them(tmp_path, monkeypatch):
    """Stand-ins for workers: they write which GPU they see, and end when they are told to."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    gpus = trials.visible_gpus()
    script = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        f"open(os.path.join({str(tmp_path)!r}, os.environ['CUDA_VISIBLE_DEVICES']), 'w').close()\n"
        "time.sleep(60 * float(sys.argv[1]))\n"
    )
    trials.spread([sys.executable, "-c", script, "0"], gpus)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "7"]
    for path in tmp_path.iterdir():
        path.unlink()
    waiting = (
        "import os, time, sys\n"
        f"while len(os.listdir({str(tmp_path)!r})) < 2: time.sleep(0.05)\n"
        f"os.kill({os.getpid()}, 15)\n"
    )
    alarm = subprocess.Popen([sys.executable, "-c", waiting])
    started_s = time.monotonic()
    with pytest.raises(Stopped):
        trials.spread([sys.executable, "-c", script, "1"], gpus)
    assert alarm.wait() == 0 and time.monotonic() - started_s < 30


def test_a_worker_leaves_to_others_what_they_work_on(whole, manifest, tmp_path, monkeypatch):
    comparison = asked(manifest, tmp_path / "out")
    done = []
    monkeypatch.setattr(trials, "_run", lambda _, fusion, seed, bars: done.append((fusion, seed)))
    comparison.folder("se", 0).mkdir(parents=True)
    with trials.FileLock(comparison.folder("se", 0) / ".lock"):
        trials.work(comparison)
    assert done == [run for run in comparison.runs if run != ("se", 0)]
    command = trials.worker_command(comparison)
    assert command[1:4] == ["-m", "seresvit", "compare"] and command[-1] == "--runs-only"


def test_a_slice_without_a_partner_is_left_out_of_every_run_and_told(manifest, tmp_path):
    shutil.copytree(manifest.parent, tmp_path / "images")
    min((tmp_path / "images" / "dicom" / "110keV" / "P009").glob("*.dcm")).unlink()
    found = compare(asked(tmp_path / "images" / "manifest.csv", tmp_path / "out", ("concat",), 1))
    assert "1 slice that not all images of its case have is left out of every run." in found.record["notes"]
    assert found.record["failed"] == [] and found.record["patients"] == 7
