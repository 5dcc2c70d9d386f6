"""Training on simulated patients: what a run leaves behind, and that whatever stops it, it ends the same."""

import json
import os
import random
import shutil
import signal
import socket
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from seresvit.config import ConfigError, load_config, shipped_config
from seresvit.data import read_volume
from seresvit.data.dataset import TrainingSlices
from seresvit.data.prepared import prepare, read_slice
from seresvit.data.volume import DataError
from seresvit.model import checkpoint
from seresvit.synthesis.predict import Predictor
from seresvit.training import run as run_folder
from seresvit.training import train as training
from seresvit.training.processes import Stopped, start_processes
from seresvit.training.stage import stage_network, take_weights

GOLDEN = Path(__file__).with_name("golden_losses.json")


@pytest.fixture(scope="module")
def finished(manifest, tmp_path_factory, micro):
    """(settings, run folder) of an uninterrupted run."""
    config = load_config(None, micro)
    folder = tmp_path_factory.mktemp("runs") / "whole"
    training.train(config, manifest, folder)
    return config, folder


def started(work):
    """The process id of a child that does `work` and exits with 0, or with 1 when it raises."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def ended(child):
    """The exit code of a child, minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_equal(one, other):
    """Every tensor and number of both is the same, bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for pair in zip(one, other, strict=True):
            assert_equal(*pair)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def assert_same_end(folder, other):
    for name in ("model", "discriminator"):
        files = (run / "checkpoints" / "last" / f"{name}.safetensors" for run in (folder, other))
        assert_equal(*(checkpoint.read(file)[0] for file in files))
    assert_equal(*(torch.load(run / "checkpoints" / "last" / "state.pt", weights_only=True) for run in (folder, other)))
    rates = {"images_per_s"}
    lines, others = ([{k: v for k, v in one.items() if k not in rates} for one in log_of(f)] for f in (folder, other))
    assert [one for one in lines if "val_mae" in one] == [one for one in others if "val_mae" in one]


def test_run_folder_says_what_was_done(finished, manifest):
    config, folder = finished
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config.model_dump(mode="json")
    record = json.loads((folder / "manifest.json").read_text())
    assert record["torch"] == torch.__version__ and record["seed"] == 0 and record["processes"] == 1
    assert record["num_patients"] == {"train": 1, "val": 1, "test": 1}
    assert record["data_hash"] == prepare(manifest, config.data).data_hash
    assert record["peak_memory_mib"] > 100 and record["images_per_s"] > 0
    assert socket.gethostname() not in json.dumps([v for k, v in record.items() if k != "command"])
    assert str(Path.home()) not in json.dumps([v for k, v in record.items() if k != "command"])


def test_logs_agree_and_begin_before_the_first_step(finished):
    _, folder = finished
    lines = log_of(folder)
    validated = [(line["stage"], line["images"]) for line in lines if "val_mae" in line]
    assert validated == [(1, 0), (1, 4), (1, 8), (2, 0), (2, 4), (2, 8), (2, 12)]
    assert all({"l1", "adversarial", "discriminator", "skipped_steps"} <= one.keys() for one in lines if "l1" in one)
    table = pd.read_csv(folder / "log.csv")
    assert table["val_mae"].dropna().tolist() == pytest.approx([one["val_mae"] for one in lines if "val_mae" in one])
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert [e.value for e in events.Scalars("val_mae")] == pytest.approx(
        [v["val_mae"] for v in lines if "val_mae" in v]
    )
    assert [event.step for event in events.Images(run_folder.PANEL)] == [0, 4, 8, 8, 12, 16, 20]
    panels = sorted((folder / "panels").iterdir())
    assert len(panels) == 7 and Image.open(panels[0]).size == (4 * 32, 3 * 32)
    first, last = (np.asarray(Image.open(panels[i])) for i in (0, -1))
    assert np.array_equal(first[:, :32], last[:, :32]) and np.array_equal(first[:, 64:96], last[:, 64:96])


def test_stage_one_has_no_transformer_and_stage_two_starts_from_its_weights(finished, manifest, tmp_path, micro):
    config, _ = finished
    stage1_only = load_config(None, [*micro, "train.stage2.num_images=0"])
    best = training.train(stage1_only, manifest, tmp_path / "one")
    assert checkpoint.load(best).settings.transformer_blocks == ()
    last = tmp_path / "one" / "checkpoints" / "last" / "model.safetensors"
    generator = stage_network(config, 2)
    take_weights(generator, last)
    ours, theirs = generator.state_dict(), checkpoint.load(last).state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert ours.keys() - theirs.keys() and all("art_" in k or "transformer" in k for k in ours.keys() - theirs.keys())


def test_best_checkpoint_is_enough_to_predict(finished):
    _, folder = finished
    network = checkpoint.load(folder / "checkpoints" / "best" / "model.safetensors")
    assert network.settings.transformer_blocks == (1, 6)
    assert network.header["sources"] == ["110keV"] and network.header["target"] == "70keV"
    assert network.header["target_intensity"]["high"] == 3071
    best = min(line["val_mae"] for line in log_of(folder) if line["stage"] == 2 and "val_mae" in line)
    assert network.header["val_mae"] == best


def killed_while(when):
    """What ends the process at once, as nothing in it can prevent, at the first (stage, images) for which `when`."""

    def progress(stage, images, *_):
        if when(stage, images):
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


PLACES = [(1, 2), (1, 4), (1, 6), (1, 8), (2, 4), (2, 6), (2, 8), (2, 10)]


# Another two every time, and the one at which the second stage has nothing of its own on disk yet.
@pytest.mark.parametrize("place", [(2, 2), *random.sample(PLACES, 2)], ids=["early", "random", "random again"])
def test_a_killed_run_ends_with_the_same_weights(finished, manifest, tmp_path, place):
    config, folder = finished
    kill = killed_while(lambda *seen: seen == place)
    assert ended(started(lambda: training.train(config, manifest, tmp_path / "run", kill))) == -signal.SIGKILL
    training.train(config, manifest, tmp_path / "run")
    assert_same_end(folder, tmp_path / "run")


def test_a_run_killed_while_it_writes_a_checkpoint_ends_with_the_same_weights(
    finished, manifest, tmp_path, monkeypatch
):
    config, folder = finished
    writes = random.randint(2, 5)

    def die_halfway(state, file, save=torch.save, seen=[]):  # noqa: B006
        seen.append(file.name)
        save(state, file)
        if len(seen) == writes:
            os.truncate(file.name, file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        monkeypatch.setattr(torch, "save", die_halfway)
        training.train(config, manifest, tmp_path / "run")

    assert ended(started(work)) == -signal.SIGKILL
    assert list((tmp_path / "run" / "checkpoints").glob(".writing-*"))
    training.train(config, manifest, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".writing-*"))
    assert_same_end(folder, tmp_path / "run")


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_ends_with_the_same_weights(finished, manifest, tmp_path, number, code, monkeypatch):
    from seresvit import cli

    config, folder = finished
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    sent = []

    def send(stage, images, *_):
        if (stage, images) == (2, 6):
            sent.append(time.monotonic())
            os.kill(os.getpid(), number)

    def work():
        whole = training.train
        monkeypatch.setattr(training, "train", lambda *args: whole(*args[:3], send))
        monkeypatch.setattr("sys.argv", ["seresvit", "train", str(tmp_path / "micro.yaml"), "--manifest", str(manifest),
                                         "--run-dir", str(tmp_path / "run")])  # fmt: skip
        try:
            cli.main()
        except SystemExit as left:
            os._exit(left.code if time.monotonic() - sent[0] < 10 else 99)

    assert ended(started(work)) == code
    state = torch.load(tmp_path / "run" / "checkpoints" / "last" / "state.pt", weights_only=True)
    assert (state["stage"], state["images"]) == (2, 6)
    training.train(config, manifest, tmp_path / "run")
    assert_same_end(folder, tmp_path / "run")


def test_a_truncated_checkpoint_is_detected_and_the_one_before_it_used(finished, manifest, tmp_path, capsys):
    config, folder = finished

    def stop(*seen):
        if seen[:2] == (2, 10):
            raise Stopped("here", signal.SIGTERM)

    with pytest.raises(Stopped):
        training.train(config, manifest, tmp_path / "run", stop)
    last = tmp_path / "run" / "checkpoints" / "last"
    assert torch.load(last / "state.pt", weights_only=True)["images"] == 8
    os.truncate(last / "model.safetensors", 1000)
    training.train(config, manifest, tmp_path / "run")
    said = capsys.readouterr().out
    assert "model.safetensors has 1,000 of" in said and "the checkpoint before it" in said
    assert_same_end(folder, tmp_path / "run")


def test_no_whole_checkpoint_is_an_error_every_time_and_nothing_is_touched(finished, manifest, tmp_path):
    config, folder = finished
    shutil.copytree(folder, tmp_path / "run")
    seals = [tmp_path / "run" / "checkpoints" / name / "files.json" for name in ("last", "previous")]
    for seal in seals:
        seal.unlink()
    for _ in range(2):
        with pytest.raises(DataError, match="no whole one before it"):
            training.train(config, manifest, tmp_path / "run")
    assert all((seal.parent / "model.safetensors").is_file() for seal in seals)


def test_a_signal_at_the_very_end_leaves_the_last_validation_to_the_next_call(finished, manifest, tmp_path):
    config, folder = finished

    def stop(*seen):
        if seen[:2] == (2, 12):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped):
        training.train(config, manifest, tmp_path / "run", stop)
    training.train(config, manifest, tmp_path / "run")
    assert_same_end(folder, tmp_path / "run")


def test_a_finished_run_is_left_as_it_is(finished, manifest, capsys):
    config, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert training.train(config, manifest, folder).is_file()
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert "finished; nothing was changed" in capsys.readouterr().out


def test_nothing_to_train_and_no_validation_are_refused(manifest, tmp_path, micro):
    nothing = load_config(None, [*micro, "train.stage1.num_images=0", "train.stage2.num_images=0"])
    with pytest.raises(ConfigError, match="nothing to train"):
        training.train(nothing, manifest, tmp_path / "run")
    without = manifest.with_name("without.csv")
    without.write_text("\n".join(line for line in manifest.read_text().splitlines() if ",val," not in line) + "\n")
    with pytest.raises(DataError, match="no case in the val split"):
        training.train(load_config(None, micro), without, tmp_path / "run")


def poisoned(monkeypatch, steps):
    """Let the source of these steps (counted from 0) hold a value that is not a number."""
    load, count = training.load, iter(range(10**6))

    def bad(run, stage):
        for source, target in load(run, stage):
            yield (torch.where(source > 0, source, torch.nan) if next(count) in steps else source), target

    monkeypatch.setattr(training, "load", bad)


def test_a_step_that_is_not_finite_is_skipped_and_counted(manifest, tmp_path, monkeypatch, micro):
    poisoned(monkeypatch, {1})
    config = load_config(None, [*micro, "train.max_bad_steps=2", "train.stage2.num_images=0"])
    best = training.train(config, manifest, tmp_path / "run")
    lines = log_of(tmp_path / "run")
    assert [line["skipped_steps"] for line in lines if "l1" in line] == [1]
    assert all(np.isfinite(line["val_mae"]) for line in lines if "val_mae" in line)
    assert all(tensor.isfinite().all() for tensor in checkpoint.load(best).state_dict().values())


def test_steps_that_are_never_finite_end_the_run_and_name_the_slices(manifest, tmp_path, monkeypatch, micro):
    poisoned(monkeypatch, {1, 2, 3})
    config = load_config(None, [*micro, "train.max_bad_steps=3"])
    with pytest.raises(
        DataError, match=r"not finite .* 3 steps .*P001_110keV slice \d.* train.stage1.learning_rate"
    ) as e:
        training.train(config, manifest, tmp_path / "run")
    assert "\n" not in str(e.value)
    assert torch.load(tmp_path / "run" / "checkpoints" / "last" / "state.pt", weights_only=True)["bad_steps"] == 1


def test_an_output_that_is_not_finite_names_its_validation_slice(manifest, tmp_path, monkeypatch, micro):
    synthesised, calls = training.synthesised, iter(range(10**6))

    def bad(run, network, source):
        return synthesised(run, network, source) * (np.nan if next(calls) == 1 else 1)

    monkeypatch.setattr(training, "synthesised", bad)
    with pytest.raises(DataError, match=r"the output is not finite after 0 .* in validation on P002_110keV slice 1;"):
        training.train(load_config(None, micro), manifest, tmp_path / "run")


def test_a_finished_run_that_was_stopped_before_its_last_words_says_what_it_adds(
    manifest, tmp_path, monkeypatch, capsys, micro
):
    config = load_config(None, [*micro, "train.stage2.num_images=0"])
    of_training = training.familiarity.of_training

    def stopped(*asked):
        os.kill(os.getpid(), signal.SIGTERM)
        return of_training(*asked)

    with monkeypatch.context() as first:
        first.setattr(training.familiarity, "of_training", stopped)
        with pytest.raises(Stopped):
            training.train(config, manifest, tmp_path / "run")
    training.train(config, manifest, tmp_path / "run")
    training.train(config, manifest, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count("its best checkpoint was completed") == said.count("nothing was changed") == 1


def test_training_lowers_the_error(manifest, tmp_path, micro):
    config = load_config(
        None,
        [
            *micro,
            "train.accumulate=1",
            "train.batch_size=4",
            "train.stage1={num_images: 240, learning_rate: 0.005, constant_share: 0.5}",
            "train.stage2.num_images=0",
            "train.validate_every_images=40",
        ],
    )
    training.train(config, manifest, tmp_path / "run")
    maes = [line["val_mae"] for line in log_of(tmp_path / "run") if "val_mae" in line]
    assert maes[-1] < maes[0] / 2


def test_a_compiled_training_compiles_its_steps_once_and_loses_the_same(manifest, tmp_path, monkeypatch, micro):
    """torch's tracer alone, which hands the graphs to us: its C++ takes minutes."""
    # Patches, so that validation is of another size; no average, which is never compiled, in the network's place.
    settings = [*micro, "train.size=24", "train.accumulate=1", "train.ema_images=0"]
    training.train(load_config(None, settings), manifest, tmp_path / "plain")
    graphs = []

    def kept(graph, inputs):
        graphs.append([size for tensor in inputs if isinstance(tensor, torch.Tensor) for size in tensor.shape])
        return graph

    compiled = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **how: compiled(net, backend=kept, **how))
    training.train(load_config(None, [*settings, "train.compile=true"]), manifest, tmp_path / "compiled")
    assert len(graphs) == 2  # one a stage, none for validation
    assert all(isinstance(size, int) for sizes in graphs for size in sizes)
    for line, other in zip(log_of(tmp_path / "compiled"), log_of(tmp_path / "plain"), strict=True):
        assert line == pytest.approx(other | {k: line[k] for k in line if k == "images_per_s"}, rel=1e-3)


def test_losses_of_the_tiny_config_are_the_recorded_ones(tmp_path, monkeypatch):
    """Ten steps of either stage. After a change that means to alter them: UPDATE_GOLDEN=1 pytest FILE."""
    from seresvit.data import phantom

    phantom.simulate(tmp_path / "dicom", patients=2, slices=4, size=64, kev=(70, 110))
    rows = [f"P00{n},{s},110keV,70keV,dicom/110keV/P00{n},dicom/70keV/P00{n}," for n, s in ((1, "train"), (2, "val"))]
    header = "patient,split,source,target,source_path,target_path,mask_path"
    (tmp_path / "manifest.csv").write_text("\n".join([header, *rows]) + "\n")
    size = ["train.size=64", "train.stage1.num_images=40", "train.stage2.num_images=40", "train.precision=32-true"]
    monkeypatch.setattr(training, "LOG_EVERY_STEPS", 1)
    training.train(
        load_config(shipped_config("tiny.yaml"), [*size, "train.stage2.adversarial_weight=1"]),
        tmp_path / "manifest.csv",
        tmp_path / "run",
    )
    names = ("l1", "adversarial", "discriminator")
    found = [[line[name] for name in names if name in line] for line in log_of(tmp_path / "run") if "l1" in line]
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=0))
    recorded = json.loads(GOLDEN.read_text())
    assert len(found) == len(recorded) == 20
    for one, other in zip(found, recorded, strict=True):
        # Processors add in orders of their own, and what two networks learn of each other makes more of it.
        assert one[0] == pytest.approx(other[0], rel=2e-3)
        assert one[1:] == pytest.approx(other[1:], rel=2e-2)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
def test_two_processes_lose_what_one_does_on_the_same_batches(manifest, tmp_path, monkeypatch, micro):
    """20 steps. torch has batch norm over processes for GPUs only, so that here the network has instance norm."""
    monkeypatch.setattr(training, "LOG_EVERY_STEPS", 1)
    same = ["model.norm=instance", "model.vit.dropout=0", "train.batch_size=4"]
    stages = [
        f"train.stage{n}={{num_images: {count}, learning_rate: 0.0001, adversarial_weight: 0}}"
        for n, count in ((1, 60), (2, 20))
    ]
    config = load_config(None, [*micro, *same, *stages, "train.validate_every_images=60"])
    training.train(config, manifest, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def work(rank):
        # As torchrun sets them.
        os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
        training.train(config, manifest, tmp_path / "two")

    children = [started(lambda rank=rank: work(rank)) for rank in (0, 1)]
    assert [ended(child) for child in children] == [0, 0]
    one, two = (
        [(line["stage"], line["images"], line.get("l1"), line.get("val_mae")) for line in log_of(tmp_path / name)]
        for name in ("one", "two")
    )
    assert len([line for line in one if line[2] is not None]) == 20
    # Adam's first steps are the signs of gradients, also of those that are rounding alone: the difference grows.
    one, two = (np.array(lines, dtype=float) for lines in (one, two))
    assert two[:4] == pytest.approx(one[:4], rel=1e-5, nan_ok=True)
    assert two[:15] == pytest.approx(one[:15], rel=1e-3, nan_ok=True)
    assert two == pytest.approx(one, rel=2e-2, nan_ok=True)
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["processes"] == 2


def test_a_batch_that_processes_cannot_share_is_refused(manifest, tmp_path, micro):
    with pytest.raises(ConfigError, match=r"batch_size is 3.*multiple of 2"):
        training.train(load_config(None, [*micro, "train.batch_size=3"]), manifest, tmp_path / "run")


def test_stage_two_starts_from_a_published_file(manifest, tmp_path, monkeypatch, micro):
    vit = "model.vit={depth: 1, width: 64, heads: 1, mlp_width: 16}"
    config = load_config(None, [*micro, vit, "train.stage1.num_images=0", f"train.init_from={tmp_path / 'G.pth'}"])
    torch.manual_seed(5)
    start = stage_network(config, 2)
    checkpoint.export_published(start, tmp_path / "G.pth")
    seen = {}
    monkeypatch.setattr(training, "fit", lambda run, stage, progress: seen.update(stage.generator.module.state_dict()))
    training.train(config, manifest, tmp_path / "run")
    assert all(torch.equal(seen[key], value) for key, value in start.state_dict().items())


def test_a_run_that_stopped_before_its_first_checkpoint_can_be_corrected(finished, manifest, tmp_path, micro):
    config, _ = finished
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {seed: 9}\n")
    short = load_config(None, [*micro, "train.stage2.num_images=0"])
    assert training.train(short, manifest, tmp_path / "run").is_file()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == short.model_dump(mode="json")
    with pytest.raises(ConfigError, match="another --run-dir"):
        training.train(config, manifest, tmp_path / "run")


def test_neighbouring_slices_are_channels_in_training_and_prediction(manifest, tmp_path, micro):
    short = ["data.context_slices=1", "train.stage1.num_images=0", "train.stage2.num_images=2"]
    config = load_config(None, [*micro, *short])
    assert config.model.in_channels == 3
    predictor = Predictor(training.train(config, manifest, tmp_path / "run"), "cpu")
    store = prepare(manifest, config.data)
    case = next(case for case in store.cases if case.split == "test")
    volume = read_volume(manifest.parent / "dicom" / "110keV" / case.patient)
    batch_BCHW = next(iter(predictor.batches(volume))).numpy()
    for index in range(3):
        around = np.array([read_slice(store, case, k)[0][0] for k in (max(index - 1, 0), index, min(index + 1, 2))])
        assert np.array_equal(read_slice(store, case, index, 1)[0], around)
        assert np.array_equal(batch_BCHW[index], around)
    assert predictor(volume).array.shape == volume.array.shape


def test_balance_shows_sources_and_patients_equally_often_and_bias_the_foreground():
    def case(source, patient, count, foreground):
        shares = [foreground] * count
        return SimpleNamespace(sources=[source], patient=patient, shape=[count, 8, 8], split="train", foreground=shares)

    def shown(**how):
        dataset = TrainingSlices(SimpleNamespace(cases=cases, folder=""), load_config(None).data, (8, 8), 0, **how)
        seen = [dataset.drawn(n)[0] for n in range(100 * 52)]
        return [sum(one is case for one in seen) / len(seen) for case in cases]

    cases = [case("90keV", "P1", 2, 0.1), case("110keV", "P1", 10, 0.1), case("110keV", "P2", 40, 0.3)]
    assert shown(balance=True) == pytest.approx([0.5, 0.25, 0.25], abs=0.01)
    assert shown(foreground_bias=1.0) == pytest.approx([0.2 / 13.2, 1 / 13.2, 12 / 13.2], abs=0.01)


def test_a_mask_weighs_in_l1_as_the_same_tissue_does(manifest, tmp_path, micro):
    """The target is its own mask: what is marked, above 0, is a range of HU."""
    rows = [f"{row}{row.split(',')[5]}" for row in manifest.read_text().splitlines()[1:]]
    masked = manifest.with_name("masked.csv")
    masked.write_text("\n".join([manifest.read_text().splitlines()[0], *rows]) + "\n")

    def l1(weights):
        short = ["data.max_rotation_deg=0", f"train.stage1={{num_images: 2, l1_weight: 1, {weights}}}"]
        config = load_config(None, [*micro, *short])
        fabric = start_processes(config)
        run = training.open_run(config, masked, tmp_path / "none", fabric)
        stage = training.start_stage(fabric, config, 1, None)
        training.train_mode(stage)
        return training.step(run, stage, *next(training.load(run, stage)))["l1"].item()

    by_mask, by_number = l1("mask_weights: {mask: 3}"), l1("mask_weights: {1: 3}")
    assert by_mask == by_number == pytest.approx(l1("tissue_weights: [{hu: [0.5, 4000], weight: 3}]"))
    assert by_mask > 1.01 * l1("")
    with pytest.raises(ConfigError, match="has a label tumour, found mask"):
        l1("mask_weights: {tumour: 3}")
