"""PNG and TIFF in and out, against SimpleITK's readers and writers."""

import dataclasses

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from PIL import Image

from seresvit.data import read_volume, write_volume
from seresvit.data.pictures import read_pictures, write_pictures
from seresvit.data.volume import DataError


def saved(path, plane):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(plane, isVector=plane.ndim == 3), str(path))


def planes(dtype, count=3):
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (count, 24, 40), dtype=dtype)


@pytest.mark.parametrize(("dtype", "unit"), [(np.uint8, "uint8"), (np.uint16, "arbitrary")])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
def test_slices_keep_number_format_and_depth(tmp_path, dtype, unit, suffix):
    stored = planes(dtype)
    names = [f"s_{number}{suffix}" for number in (2, 10, 11)]
    for plane, name in zip(stored, names, strict=True):
        saved(tmp_path / "in" / name.lower(), plane)
        (tmp_path / "in" / name.lower()).rename(tmp_path / "in" / name)
    volume = read_volume(tmp_path / "in")
    np.testing.assert_array_equal(volume.array, stored)
    assert volume.positions_mm.tolist() == [2, 10, 11] and volume.unit == unit
    np.testing.assert_array_equal(np.abs(volume.affine[:2, :2]), np.eye(2))
    header = read_volume(tmp_path / "in", pixels=False)
    assert header.array.shape == volume.array.shape and not any(header.array.strides) and header.unit == unit

    between = dataclasses.replace(volume, array=volume.array + np.float32(0.4))
    out = write_volume(between, tmp_path / "out", description="x")
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    again = sitk.ReadImage(str(out / names[1]))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(again), stored[1])
    assert again.GetPixelID() == (sitk.sitkUInt8 if dtype == np.uint8 else sitk.sitkUInt16)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_of_many_pages_is_a_volume(tmp_path, dtype):
    stored = planes(dtype, 4)
    saved(tmp_path / "stack.tif", stored[0])
    sitk.WriteImage(sitk.GetImageFromArray(stored), str(tmp_path / "stack.tif"))
    volume = read_volume(tmp_path / "stack.tif")
    np.testing.assert_array_equal(volume.array, stored)
    assert volume.positions_mm.tolist() == [1, 2, 3, 4]
    assert read_volume(tmp_path / "stack.tif", pixels=False).array.shape == (4, 24, 40)
    out = write_volume(volume, tmp_path / "out", description="합성 MR")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(out))), stored)
    assert sitk.ReadImage(str(out)).GetPixelID() == (sitk.sitkUInt8 if dtype == np.uint8 else sitk.sitkUInt16)


def test_a_tiff_whose_zero_is_white_is_turned(tmp_path):
    stored = planes(np.uint16, 1)[0]
    (tmp_path / "a").mkdir()
    Image.fromarray(stored).save(tmp_path / "a" / "s_1.tif", tiffinfo={262: 0})
    np.testing.assert_array_equal(read_volume(tmp_path / "a").array[0], 65535 - stored.astype(np.float32))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(
    ("name", "pixels", "words"),
    [
        ("s_1", np.zeros((24, 40, 3), np.uint8), "16-bit grey, found RGB"),
        ("s_1", np.zeros((24, 40), np.uint16), "one size and depth.*16 bits|16 in"),
        ("s_1", np.zeros((40, 24), np.uint8), "one size"),
        ("s_02", np.zeros((24, 40), np.uint8), "twice"),
        ("last", np.zeros((24, 40), np.uint8), "slice number"),
    ],
)
def test_refusals(tmp_path, suffix, name, pixels, words):
    saved(tmp_path / f"s_2{suffix}", np.ones((24, 40), np.uint8))
    saved(tmp_path / f"{name}{suffix}", pixels)
    with pytest.raises(DataError, match=words) as refused:
        read_pictures(tmp_path)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


def test_other_refusals(tmp_path):
    sitk.WriteImage(sitk.GetImageFromArray(planes(np.uint8)), str(tmp_path / "s_1.tif"))
    with pytest.raises(DataError, match="3 pages"):
        read_pictures(tmp_path)
    sitk.WriteImage(sitk.GetImageFromArray(planes(np.uint8)[0].astype(np.float32)), str(tmp_path / "f.tif"))
    with pytest.raises(DataError, match="found F"):
        read_volume(tmp_path / "f.tif")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no PNG or TIFF"):
        read_pictures(tmp_path / "empty")
    saved(tmp_path / "ok" / "s_1.png", planes(np.uint8)[0])
    volume = read_volume(tmp_path / "ok")
    with pytest.raises(DataError, match="holds the source"):
        write_volume(volume, tmp_path / "ok", description="x")
    for change, words in (({"headers": ()}, "a name a slice"), ({"unit": "HU"}, "found HU")):
        with pytest.raises(DataError, match=words):
            write_pictures(dataclasses.replace(volume, **change), tmp_path / "out")
    with pytest.raises(DataError, match="found 960"):
        write_pictures(dataclasses.replace(volume, array=volume.array + np.float32(np.nan)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_synthetic_picture_says_so_in_its_own_text(tmp_path, suffix):
    saved(tmp_path / "in" / f"p_07{suffix}", np.eye(24, 40).astype(np.uint8) * 200)
    write_volume(read_volume(tmp_path / "in"), tmp_path / "out", description="Synthetic CT (SE-ResViT)")
    with Image.open(tmp_path / "out" / f"p_07{suffix}") as image:
        said = image.text["Description"] if suffix == ".png" else image.tag_v2[270]
    assert said == "Synthetic CT (SE-ResViT)"


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_damaged_anywhere_a_picture_is_read_or_refused(tmp_path, suffix):
    path, random = tmp_path / f"s_1{suffix}", np.random.default_rng(0)
    saved(path, planes(np.uint16)[0])
    whole = path.read_bytes()
    for number in range(100):
        raw = bytearray(whole[: random.integers(len(whole))] if number % 5 == 0 else whole)
        for at in random.integers(0, max(1, len(raw)), 4):
            raw[at % 200 if number % 2 else at] = random.integers(256)
        path.write_bytes(raw)
        try:
            assert read_volume(tmp_path).array.shape[0] == 1
        except DataError as error:
            assert "\n" not in str(error) and path.name in str(error)
