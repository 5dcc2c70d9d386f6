"""The prepared store: what is stored, what is made again and when, and that nothing that befalls it goes unnoticed."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import pytest

from seresvit.config import DataSettings
from seresvit.data import prepared
from seresvit.data.prepared import prepare, read_labels, read_slice
from seresvit.data.volume import ABANDONED_AFTER_S, DataError

CT = DataSettings(window_hu=(-1000, 1000), flip=False)
PREPARE = """
import sys
from pathlib import Path
from seresvit.config import DataSettings
from seresvit.data.prepared import prepare
if __name__ == "__main__":
    prepare(Path(sys.argv[1]), DataSettings(window_hu=(-1000, 1000)), workers=int(sys.argv[2]))
"""


def contents(store):
    """The bytes of all that a store holds, by name."""
    return {path.name: path.read_bytes() for path in store.folder.iterdir() if path.is_file()}


def stamps(store):
    """When each file of a store was written, by name."""
    return {path.name: path.stat().st_mtime_ns for path in store.folder.iterdir() if path.is_file()}


def changed(before, after):
    return {name for name in after if after[name] != before.get(name)}


def preparing(manifest, workers):
    return subprocess.Popen([sys.executable, "-c", PREPARE, str(manifest), str(workers)], start_new_session=True)


@pytest.fixture
def many(tmp_path, manifest, write_case):
    """A manifest of twelve patients whose preparation takes long enough to be interrupted."""
    rng = np.random.default_rng(1)
    rows = [manifest.read_text().splitlines()[0]]
    for number in range(12):
        for modality in ("high", "low"):
            write_case(tmp_path, f"q{number}", modality, rng.integers(-1000, 1000, (24, 96, 96)).astype(np.int16))
        rows.append(f"q{number},train,high,low,q{number}/high.nii.gz,q{number}/low.nii.gz,")
    manifest.write_text("\n".join(rows) + "\n")
    return manifest


def test_store_holds_the_values_as_the_network_sees_them(manifest):
    store = prepare(manifest, CT)
    case = store.cases[0]
    stored = np.load(store.folder / case.source_files[0], mmap_mode="r")
    assert stored.dtype == np.float32 and isinstance(stored, np.memmap)
    assert np.load(store.folder / case.target_file).dtype == np.float32
    image = nibabel.load(manifest.parent / "p1" / "high.nii.gz").get_fdata().transpose(2, 1, 0)
    image = image[:, ::-1, ::-1]  # NIfTI counts to the right and front
    for index in range(4):
        source, target = read_slice(store, case, index)
        assert source.shape == target.shape == (1, 10, 12)
        np.testing.assert_array_equal(source[0], stored[index])
        np.testing.assert_allclose(source[0], image[index] / 1000, atol=1e-6)
        np.testing.assert_allclose(target, source / 2 - 0.5, atol=1e-6)
    assert case.spacing_mm_zyx == [2.0, 1.0, 1.0]


def test_masks_are_stored_where_they_are_asked_for(manifest, write_case):
    labels = np.random.default_rng(4).integers(0, 3, (4, 10, 12)).astype(np.uint8)
    write_case(manifest.parent, "p1", "mask", labels)
    (manifest.parent / "p1" / "labels.json").write_text('{"bone": 1, "tumour": 2}')
    without = prepare(manifest, CT)
    manifest.write_text(manifest.read_text().replace("p1/low.nii.gz,", "p1/low.nii.gz,p1/mask.nii.gz"))
    again, store = prepare(manifest, CT), prepare(manifest, CT, masks=True)
    assert again.folder == without.folder != store.folder and not list(again.folder.glob("*mask*"))
    case, other = store.cases[:2]
    assert case.label_names == {"bone": 1, "tumour": 2} and (other.label_names, other.mask_file) == ({}, "")
    np.testing.assert_array_equal([read_labels(store, case, z) for z in range(4)], labels[:, ::-1, ::-1])
    assert not read_labels(store, other, 0).any() and read_labels(store, other, 0).shape == (10, 12)
    os.truncate(store.folder / case.mask_file, case.num_bytes[-1] - 1)
    with pytest.raises(DataError, match=r"-mask\.npy: shorter than it was written"):
        read_labels(store, case, 3)
    np.testing.assert_array_equal(read_labels(prepare(manifest, CT, masks=True), case, 3), labels[3, ::-1, ::-1])


def test_other_names_of_labels_are_taken_up(manifest, write_case):
    write_case(manifest.parent, "p1", "mask", np.full((4, 10, 12), 2, np.uint8))
    manifest.write_text(manifest.read_text().replace("p1/low.nii.gz,", "p1/low.nii.gz,p1/mask.nii.gz"))
    names = manifest.parent / "p1" / "labels.json"
    found = []
    for text in (None, '{"bone": 1, "tumour": 2}', '{"bone": 2, "tumour": 1}'):
        if text:
            names.write_text(text)
        store = prepare(manifest, CT, masks=True)
        found.append((store.cases[0].label_names, int(read_labels(store, store.cases[0], 0)[0, 0])))
    assert found == [({"mask": 1}, 1), ({"bone": 1, "tumour": 2}, 2), ({"bone": 2, "tumour": 1}, 2)]


def test_channels_are_stacked_in_the_order_of_the_settings(manifest, write_case):
    for patient in ("p1", "p2", "p3"):
        write_case(
            manifest.parent, patient, "mid", np.full((4, 10, 12), -700, np.int16) + np.eye(10, 12, dtype=np.int16)
        )
    rows = manifest.read_text().splitlines()
    manifest.write_text("\n".join(rows + [row.replace("high", "mid") for row in rows[1:]]) + "\n")
    store = prepare(manifest, CT.model_copy(update={"channels": ("mid", "high")}))
    assert [case.sources for case in store.cases] == [["mid", "high"]] * 3
    source, _ = read_slice(store, store.cases[0], 0)
    assert source.shape == (2, 10, 12) and source[0, 3, 5] == pytest.approx(-0.699)


def test_index_is_json_with_the_rule_of_every_volume(manifest):
    store = prepare(manifest, CT)
    index = json.loads((store.folder / "index.json").read_text())
    assert index["data_hash"] == store.data_hash
    assert {case["target_intensity"]["kind"] for case in index["cases"]} == {"window"}
    assert all(len(case["foreground"]) == case["shape"][0] for case in index["cases"])
    for case in index["cases"]:
        files = [store.folder / name for name in (*case["source_files"], case["target_file"])]
        assert [file.stat().st_size for file in files] == case["num_bytes"]


def test_a_second_call_reads_no_image_and_writes_nothing(manifest, monkeypatch):
    for path in manifest.parent.glob("p?/*"):
        os.utime(path, (1e9, 1e9))
    monkeypatch.setattr(prepared, "SETTLED_AFTER_NS", -(10**9))  # else files must have been left alone for seconds
    first = prepare(manifest, CT)
    before = stamps(first)
    for name in ("load_pair", "image_hash"):
        monkeypatch.setattr(prepared, name, lambda *_: pytest.fail("an image was read"))
    again = prepare(manifest, CT)
    assert again == first and stamps(again) == before


def test_a_changed_file_remakes_its_own_case_only(manifest, write_case):
    first = prepare(manifest, CT)
    before = stamps(first)
    write_case(manifest.parent, "p1", "high", np.arange(-500, -20, dtype=np.int16).reshape(4, 10, 12))
    again = prepare(manifest, CT)
    assert again.data_hash != first.data_hash and again.cases[1:] == first.cases[1:]
    rewritten = changed(before, stamps(again))
    assert {name.partition("-")[0] for name in rewritten - {"index.json"}} == {"p1_high"}
    assert min(read_slice(again, again.cases[0], z)[0].min() for z in range(4)) == pytest.approx(-0.5)


def test_a_touched_moved_or_newly_split_image_is_not_made_again(manifest, tmp_path_factory):
    first = prepare(manifest, CT)
    before = stamps(first)
    for path in manifest.parent.glob("p?/*"):
        path.touch()
    assert stamps(prepare(manifest, CT)) == before
    manifest.write_text(manifest.read_text().replace("p2,train", "p2,test"))
    again = prepare(manifest, CT)
    assert changed(before, stamps(again)) == {"index.json"} and again.cases[1].split == "test"
    moved = tmp_path_factory.mktemp("moved") / "images"
    shutil.move(manifest.parent, moved)
    there = prepare(moved / "manifest.csv", CT)
    assert changed(before, stamps(there)) == {"index.json"}
    assert there.data_hash == again.data_hash != first.data_hash


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_every_setting_but_those_of_augmentation_has_a_folder_of_its_own(manifest):
    first = prepare(manifest, CT)
    acting_later = {"min_foreground": 0.2, "flip": True, "max_rotation_deg": 5.0, "max_shift": 0.1, "max_scale": 0.1}
    assert prepare(manifest, CT.model_copy(update=acting_later)).folder == first.folder
    assert prepare(manifest, CT.model_copy(update={"window_hu": (-500.0, 500.0)})).folder != first.folder
    # A setting that is not known to be of augmentation counts.
    assert {*acting_later, "augment", "context_slices"} == prepared.NOT_STORED <= set(DataSettings.model_fields)
    for name in set(DataSettings.model_fields) - prepared.NOT_STORED:
        assert prepared._fingerprint(CT.model_copy(update={name: "another"}), False) != first.folder.name


@pytest.mark.parametrize("damage", ["cut", "gone", "no record", "empty record", "half a record"])
def test_a_damaged_case_is_made_again(manifest, damage):
    first = prepare(manifest, CT)
    whole, before = contents(first), stamps(first)
    target = first.folder / first.cases[1].target_file
    record = target.with_name(target.name.replace(".low.npy", ".json"))
    if damage == "cut":
        os.truncate(target, target.stat().st_size - 1)
    elif damage == "gone":
        target.unlink()
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text("" if damage == "empty record" else record.read_text()[:40])
    again = prepare(manifest, CT)
    assert contents(again) == whole
    assert {name.partition("-")[0] for name in changed(before, stamps(again))} == {"p2_high"}


def test_a_file_cut_short_in_use_is_an_error_not_a_wrong_slice(manifest):
    store = prepare(manifest, CT)
    target = store.folder / store.cases[0].target_file
    os.truncate(target, target.stat().st_size - 1)
    read_slice(store, store.cases[0], 2)
    with pytest.raises(DataError, match=r"low\.npy: shorter than it was written"):
        read_slice(store, store.cases[0], 3)
    target.unlink()
    with pytest.raises(DataError, match=r"low\.npy: cannot be read"):
        read_slice(store, store.cases[0], 2)


def test_an_image_that_changes_while_it_is_read_is_refused(manifest, monkeypatch):
    load_pair = prepared.load_pair

    def load_and_touch(*args, **kwargs):
        pair = load_pair(*args, **kwargs)
        pair.target.path.touch()
        return pair

    monkeypatch.setattr(prepared, "load_pair", load_and_touch)
    with pytest.raises(DataError, match=r"low\.nii\.gz: changed while it was read"):
        prepare(manifest, CT)


def test_a_full_disk_is_one_line_and_leaves_nothing_that_passes_for_a_case(manifest, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "open", lambda path, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115
        with pytest.raises(DataError, match=r"\.npy: cannot be written \(No space left on device\)"):
            prepare(manifest, CT)
    assert not list((manifest.parent / "prepared").rglob("p*"))
    assert len(prepare(manifest, CT).cases) == 3


def test_leftovers_of_killed_processes_are_removed_in_time(manifest):
    folder = prepare(manifest, CT).folder
    old, recent = folder / ".writing-old", folder / ".writing-recent"
    for path in (old, recent):
        path.mkdir()
        (path / "half.npy").write_bytes(b"half")
    os.utime(old, (time.time() - 2 * ABANDONED_AFTER_S,) * 2)
    prepare(manifest, CT)
    assert recent.is_dir() and not old.exists()


def test_workers_make_the_same_store_and_an_error_in_one_is_told(many, write_case):
    alone = prepare(many, CT, workers=1)
    expected = contents(alone)
    shutil.rmtree(many.parent / "prepared")
    shown = []
    store = prepare(many, CT, workers=2, progress=lambda groups: map(lambda g: shown.append(g) or g, groups))
    assert contents(store) == expected and store == alone and len(shown) == 12
    write_case(many.parent, "q7", "low", np.zeros((24, 96, 96), np.int16))
    with pytest.raises(DataError, match=r"q7.low\.nii\.gz"):
        prepare(many, CT, workers=2)


def test_a_killed_preparation_is_completed_bit_for_bit(many):
    expected = contents(prepare(many, CT, workers=1))
    folder, moments = many.parent / "prepared", random.Random(2)
    for _ in range(6):
        shutil.rmtree(folder)
        process = multiprocessing.get_context("fork").Process(target=prepare, args=(many, CT), kwargs={"workers": 1})
        process.start()
        wait_for_files(folder, moments.randint(0, 30))
        time.sleep(moments.uniform(0, 0.02))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL and not list(folder.glob("*/index.json"))
        assert contents(prepare(many, CT, workers=1)) == expected


def test_workers_end_with_the_process_that_they_work_for(many):
    process = preparing(many, 2)
    wait_for_files(many.parent / "prepared", 3)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while _in_session(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _in_session(process.pid)
    made = contents(prepare(many, CT, workers=1))
    shutil.rmtree(many.parent / "prepared")
    assert made == contents(prepare(many, CT, workers=1))


def wait_for_files(folder, count):
    """Returns when a preparation has written so many files."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*/q*"))) < count and time.monotonic() < deadline:
        time.sleep(0.001)


def _in_session(session):
    """The living processes of a session, as Linux tells them."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            members.append(stat.parent.name)
    return members


def test_two_processes_at_one_store_do_not_harm_it(many):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=prepare, args=(many, CT), kwargs={"workers": 1}) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    made = contents(prepare(many, CT))
    shutil.rmtree(many.parent / "prepared")
    assert made == contents(prepare(many, CT, workers=1))
