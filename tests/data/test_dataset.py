"""Prepared slices: what is stored, and in which order and how augmented training sees it."""

import json

import nibabel
import numpy as np
import pytest
import torch

from seresvit.config import DataSettings
from seresvit.data.dataset import TrainingSlices, augmented, prepare, read_slice, slices_of
from seresvit.data.volume import DataError

CT = DataSettings(window_hu=(-1000, 1000), flip=False)


def write_case(root, patient, modality, array):
    path = root / patient / f"{modality}.nii.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array.transpose(2, 1, 0), np.diag([1.0, 1.0, 2.0, 1.0])), path)


@pytest.fixture
def manifest(tmp_path):
    """Two training patients, one validation patient: CT-like volumes (4, 10, 12); the target is half the source."""
    rng = np.random.default_rng(0)
    rows = ["patient,split,source,target,source_path,target_path,mask_path"]
    for patient, split in (("p1", "train"), ("p2", "train"), ("p3", "val")):
        source = rng.integers(-1000, 1000, (4, 10, 12)).astype(np.int16)
        source[0, 0, 0] = -1000
        write_case(tmp_path, patient, "high", source)
        write_case(tmp_path, patient, "low", (source / 2 - 500).astype(np.float32))
        rows.append(f"{patient},{split},high,low,{patient}/high.nii.gz,{patient}/low.nii.gz,")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "manifest.csv"


def test_store_holds_the_values_in_their_own_unit_memory_mapped(manifest):
    store = prepare(manifest, CT)
    case = store.cases[0]
    stored = np.load(store.folder / case.source_files[0], mmap_mode="r")
    assert stored.dtype == np.int16 and isinstance(stored, np.memmap)
    assert np.load(store.folder / case.target_file).dtype == np.float32
    source, target = read_slice(store, case, 2)
    assert source.shape == target.shape == (1, 10, 12)
    np.testing.assert_allclose(source[0], stored[2] / 1000, atol=1e-6)
    np.testing.assert_allclose(target, source / 2 - 0.5, atol=1e-6)
    assert case.spacing_mm_zyx == [2.0, 1.0, 1.0]


def test_store_is_reused_until_a_file_or_setting_changes(manifest):
    first = prepare(manifest, CT)
    stamp = (first.folder / "index.json").stat().st_mtime_ns
    assert (prepare(manifest, CT).folder / "index.json").stat().st_mtime_ns == stamp
    assert prepare(manifest, CT.model_copy(update={"window_hu": (-500.0, 500.0)})).folder != first.folder
    write_case(manifest.parent, "p1", "high", np.arange(-500, -20, dtype=np.int16).reshape(4, 10, 12))
    again = prepare(manifest, CT)
    assert again.folder != first.folder and again.data_hash != first.data_hash


def test_every_pass_shows_every_slice_once_in_another_order(manifest):
    dataset = TrainingSlices(prepare(manifest, CT), CT, (10, 12), seed=3)
    passes = [[dataset[n][0].numpy().tobytes() for n in range(8 * e, 8 * e + 8)] for e in range(2)]
    assert len(set(passes[0])) == 8 and set(passes[0]) == set(passes[1]) and passes[0] != passes[1]


def test_the_nth_image_depends_on_seed_and_n_alone(manifest):
    data = CT.model_copy(update={"flip": True, "max_rotation_deg": 10.0, "max_shift": 0.1})
    store = prepare(manifest, data)
    one, other = (TrainingSlices(store, data, (8, 8), seed=5) for _ in range(2))
    order = [13, 2, 40, 7]
    images = [one[n] for n in range(41)]
    for n in order:
        assert all(torch.equal(a, b) for a, b in zip(other[n], images[n], strict=True))
    assert not torch.equal(TrainingSlices(store, data, (8, 8), seed=6)[2][0], images[2][0])


def test_augmentation_moves_source_and_target_alike():
    rng = np.random.default_rng(1)
    image = torch.from_numpy(rng.random((1, 20, 31), dtype=np.float32))
    settings = DataSettings(max_rotation_deg=20, max_shift=0.1)
    results = [
        augmented(torch.cat([image, image / 2]), settings, (16, 40), np.random.default_rng(n)) for n in range(20)
    ]
    for result in results:
        assert result.shape == (2, 16, 40)
        torch.testing.assert_close(result[0] / 2, result[1])
    assert len({result.numpy().tobytes() for result in results}) == 20


def test_rotation_keeps_a_disc_round_in_a_non_square_image():
    y, x = np.mgrid[:60, :90]
    disc = torch.from_numpy(((y - 29.5) ** 2 + (x - 44.5) ** 2 < 20**2).astype(np.float32))[None]
    turned = augmented(disc, DataSettings(flip=False, max_rotation_deg=45), (60, 90), np.random.default_rng(4))
    assert (turned - disc).abs().gt(0.5).float().mean() < 0.005


def test_slices_without_foreground_are_left_out_of_training(manifest):
    empty = np.full((4, 10, 12), -1000, np.int16)
    empty[1] = 0
    write_case(manifest.parent, "p1", "low", empty)
    data = CT.model_copy(update={"min_foreground": 0.5})
    store = prepare(manifest, data)
    kept = slices_of(store, "train", 0.5)
    assert [(case.name, index) for case, index in kept if case.patient == "p1"] == [("p1_high", 1)]
    empty[1, 1:] = -1000
    for patient in ("p1", "p2"):
        write_case(manifest.parent, patient, "low", empty)
    with pytest.raises(DataError, match=r"no training slice .* lower data.min_foreground"):
        TrainingSlices(prepare(manifest, data), data, (10, 12), seed=0)


def test_channels_are_stacked_in_the_order_of_the_settings(manifest):
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


def test_an_interrupted_preparation_leaves_no_store(manifest, monkeypatch):
    from seresvit.data import dataset

    monkeypatch.setattr(dataset, "content_hash", lambda cases: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepare(manifest, CT)
    assert list((manifest.parent / "prepared").iterdir()) == []


def test_index_is_json_with_the_rule_of_every_volume(manifest):
    store = prepare(manifest, CT)
    index = json.loads((store.folder / "index.json").read_text())
    assert {case["target_intensity"]["kind"] for case in index["cases"]} == {"window"}
    assert all(len(case["foreground"]) == case["shape"][0] for case in index["cases"])
