"""The run folder: what survives, what is refused, where the log ends."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest
import yaml

from seresvit.config import ConfigError, load_config, to_yaml
from seresvit.data.volume import DataError
from seresvit.training import run


@pytest.fixture
def begun(tmp_path, micro):
    """(settings, folder) of a run that has begun and has a checkpoint."""
    config = load_config(None, micro)
    run.begin(tmp_path / "run", config, {"data_hash": "1234"})
    write(tmp_path / "run", "first")
    return config, tmp_path / "run"


def write(folder, text):
    run.save_last(folder, lambda temporary: (temporary / "state.pt").write_text(text))


def test_other_settings_or_images_are_refused_by_name(begun, micro):
    config, folder = begun
    assert run.is_begun(folder, config, "1234")
    with pytest.raises(ConfigError, match=r"other train.seed, train.stage2.learning_rate; choose another --run-dir"):
        run.is_begun(folder, load_config(None, [*micro, "train.seed=3", "train.stage2.learning_rate=0.1"]), "1234")
    with pytest.raises(ConfigError, match="other images"):
        run.is_begun(folder, config, "5678")


def test_a_setting_that_is_newer_than_the_run_had_its_default(begun):
    config, folder = begun
    tree = yaml.safe_load(to_yaml(config))
    del tree["train"]["wandb_project"]
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    assert run.is_begun(folder, config, "1234")


def test_the_last_two_checkpoints_are_kept_and_the_newest_whole_one_is_found(begun):
    _, folder = begun
    write(folder, "second")
    write(folder, "third")
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last", "previous"}
    assert run.newest_whole(folder) == (folder / "checkpoints" / "last", "")
    (folder / "checkpoints" / "last" / "state.pt").write_text("thirD")  # as long, but not what was written
    found, said = run.newest_whole(folder)
    assert (found / "state.pt").read_text() == "second" and "not what was written" in said
    write(folder, "fourth")
    assert {(folder / "checkpoints" / name / "state.pt").read_text() for name in ("last", "previous")} == {
        "fourth",
        "second",
    }


@pytest.mark.parametrize(
    "damage", [lambda p: os.truncate(p, 1), lambda p: p.unlink(), lambda p: p.with_name(run.SEAL).unlink()]
)
def test_without_a_whole_checkpoint_the_run_is_not_begun_anew(begun, damage):
    _, folder = begun
    damage(folder / "checkpoints" / "last" / "state.pt")
    with pytest.raises(DataError, match="no whole one before it"):
        run.newest_whole(folder)


@pytest.mark.parametrize("room", [2**12, 2**21])  # for no network; for both, but not for what is saved beside them
def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint_whole(begun, room):
    """The system itself refuses to let the file grow, as it does on a full disk."""
    _, folder = begun
    script = (
        "import resource, signal, sys; from pathlib import Path; from lightning_fabric import Fabric\n"
        "from seresvit.config import load_config; from seresvit.training import run, stage\n"
        "config = load_config(Path(sys.argv[1]) / 'config.yaml')\n"
        "begun = stage.start_stage(Fabric(accelerator='cpu', devices=1), config, 2, None)\n"
        "begun.optimizer.state['filling'] = [0.1] * 2**19\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\n"
        "run.save_last(Path(sys.argv[1]), lambda folder: stage.write_stage(begun, {}, folder))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    name = "last/model.safetensors" if room == 2**12 else "last"
    assert f"DataError: {folder}/checkpoints/{name}: cannot be written (File too large)" in last, done.stderr
    assert "make room and give the same command again" in last
    assert run.newest_whole(folder) == (folder / "checkpoints" / "last", "")
    assert (folder / "checkpoints" / "last" / "state.pt").read_text() == "first"


def test_a_full_disk_under_the_logs_is_one_line_whichever_thread_meets_it(tmp_path, capsys):
    full, before = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), threading.excepthook

    def write():
        raise full

    with pytest.raises(DataError, match=r"No space left.*same command again"), run.disk_full_said(tmp_path):
        writer = threading.Thread(target=write)
        writer.start()
        writer.join()
        raise full
    assert capsys.readouterr().err == "" and threading.excepthook is before


def test_a_run_without_a_checkpoint_can_be_given_other_settings(begun, micro):
    config, folder = begun
    (folder / "checkpoints" / "last").rename(folder / "checkpoints" / "best")
    assert not run.is_begun(folder, load_config(None, [*micro, "train.cuda_graph=false"]), "1234")
    (folder / "checkpoints" / "best").rename(folder / "checkpoints" / "previous")
    assert run.is_begun(folder, config, "1234")


def test_a_folder_in_which_another_process_trains_is_refused(begun, monkeypatch):
    _, folder = begun
    monkeypatch.setattr(run, "WAIT_S", 0.1)
    script = "import sys, time; from pathlib import Path; from seresvit.training import run\n"
    script += "with run.held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)\n"
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another process trains in it"), run.held(folder):
            pass
        other.kill()
    with run.held(folder):
        pass


def test_what_another_process_is_writing_is_left_alone(begun):
    _, folder = begun

    def slowly(temporary):
        assert run.newest_whole(folder) == (folder / "checkpoints" / "last", "")  # as a second process would
        (temporary / "state.pt").write_text("second")

    run.save_last(folder, slowly)
    assert (folder / "checkpoints" / "last" / "state.pt").read_text() == "second"


def test_what_was_logged_beyond_the_checkpoint_is_dropped(begun):
    config, folder = begun
    lines = [{"stage": 1, "images": 4}, {"stage": 1, "images": 8}, {"stage": 2, "images": 2}]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": 2, "ima')
    run.Log(folder, config, 1, 8).close()
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == lines[:2]


def test_a_validation_that_comes_again_is_logged_once(begun):
    config, folder = begun
    lines = [{"stage": 1, "images": 4, "val_mae": 9.0}, *({"stage": 1, "images": 8, n: 7.0} for n in ("l1", "val_mae"))]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run.Log(folder, config, 1, 8, validated=False).close()
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == lines[:2]


def test_weights_and_biases_that_are_not_installed_are_missed_before_anything_else(micro, monkeypatch):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    run.check_wandb(load_config(None, micro))
    with pytest.raises(ConfigError, match="wandb is not installed"):
        run.check_wandb(load_config(None, [*micro, "train.wandb_project=test"]))


def test_weights_and_biases_are_logged_offline(begun, micro, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is an extra: pip install 'seresvit[wandb]'")
    _, folder = begun
    monkeypatch.setenv("WANDB_MODE", "offline")
    log = run.Log(folder, load_config(None, [*micro, "train.wandb_project=test"]), 0, 0)
    log.numbers(1, 4, {"val_mae": 12.5})
    log.close()
    wandb.teardown()  # waits for its process
    written = b"".join(path.read_bytes() for path in (folder / "wandb").rglob("*.wandb"))
    assert b"val_mae" in written and b"12.5" in written
    assert b"j\x02" + os.uname().nodename.encode() not in written and os.getcwd().encode() not in written
