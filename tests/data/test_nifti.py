"""Image files in and out, against nibabel and SimpleITK."""

import dataclasses
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from seresvit.data import read_volume, write_volume
from seresvit.data.nifti import read_image, write_image
from seresvit.data.volume import DataError

NIFTI = Path(__file__).parents[2] / ".." / "shared" / "data" / "odd" / "nifti"
real_data = pytest.mark.skipif(not NIFTI.is_dir(), reason="the collection of odd NIfTI files is not here")

SHAPE_XYZ = (40, 24, 5)
# A turned grid, with every axis of another length and spacing.
TURN = np.array([[0.96, -0.28, 0], [0.28 * 0.8, 0.96 * 0.8, -0.6], [0.28 * 0.6, 0.96 * 0.6, 0.8]])
AFFINE = np.eye(4)
AFFINE[:3, :3] = TURN * (-0.9, 0.7, 2.5)
AFFINE[:3, 3] = 17, -33, 4


def values(low=-1024.0, high=2000.0):
    return np.random.default_rng(0).uniform(low, high, SHAPE_XYZ).astype(np.float32)


def saved(path, array, affine=AFFINE, **fields):
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm", "sec")
    for name, value in fields.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def refusal(path, reader=read_image):
    with pytest.raises(DataError) as caught:
        reader(path)
    message = str(caught.value)
    assert "\n" not in message and str(path.name) in message
    return message


@pytest.mark.parametrize("codes", ["RAS", "LPS", "AIL", "PSR", "SPR", "IPL"])
def test_any_axis_order_is_read_as_simpleitk_turns_it_and_written_back_bit_for_bit(tmp_path, codes):
    turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(codes))
    turned = nib.Nifti1Image(values(), AFFINE).as_reoriented(turn)
    path = saved(tmp_path / "in.nii.gz", np.asarray(turned.dataobj), turned.affine)
    volume = read_image(path)

    image = sitk.DICOMOrient(sitk.ReadImage(str(path)), "LPS")
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image))
    for index in ((0, 0, 0), (39, 3, 2)):
        point = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((volume.affine @ [*index, 1])[:3], point, atol=1e-3)
    assert volume.array.shape == (5, 24, 40) and volume.unit == "HU" and volume.patient == ""
    assert (np.diff(volume.positions_mm) > 0).all()

    out = write_volume(volume, tmp_path / "out", description="")
    before, after = nib.load(path), nib.load(out)
    np.testing.assert_array_equal(after.affine, before.affine)
    for field in before.header:
        if field not in ("datatype", "bitpix"):
            assert after.header[field].tobytes() == before.header[field].tobytes(), field
    assert after.get_data_dtype() == np.int16
    np.testing.assert_array_equal(np.asarray(after.dataobj), np.rint(np.asarray(before.dataobj)))


def test_sheared_affine_keeps_positions_along_the_normal(tmp_path):
    affine = np.diag([-1.0, -1.0, 2.0, 1.0])
    affine[1, 2] = 0.5
    volume = read_image(saved(tmp_path / "tilted.nii", values(), affine))
    np.testing.assert_allclose(np.diff(volume.positions_mm), 2.0)
    np.testing.assert_allclose(volume.affine[:3, 2], [0, -0.5, 2])


def test_scale_unit_and_singleton_axis(tmp_path):
    stored = np.arange(np.prod(SHAPE_XYZ), dtype=np.int16).reshape(*SHAPE_XYZ, 1)
    image = nib.Nifti1Image(stored, AFFINE)
    image.header.set_slope_inter(0.5, 3)
    image.header["cal_max"] = 99
    nib.save(image, tmp_path / "scaled.nii")
    path = tmp_path / "scaled.nii"
    volume = read_image(path)
    expected = nib.load(path).get_fdata()
    assert volume.unit == "arbitrary" and volume.array.shape == (5, 24, 40)
    assert (volume.array.min(), volume.array.max()) == (expected.min(), expected.max())

    write_image(dataclasses.replace(volume, array=volume.array / 3), tmp_path / "out.nii")
    again = nib.load(tmp_path / "out.nii")
    assert again.shape == (*SHAPE_XYZ, 1) and again.get_data_dtype() == np.float32 and again.header["cal_max"] == 0
    np.testing.assert_allclose(again.get_fdata(), expected / 3, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_itk_images_keep_their_geometry(tmp_path, suffix):
    image = sitk.GetImageFromArray(values(0, 9).T)
    image.SetOrigin((1.5, -2.5, 1 / 3))
    image.SetSpacing((0.9, 0.7, 2.5))
    image.SetDirection((0, 0, 1, 1, 0, 0, 0, -1, 0))
    sitk.WriteImage(image, tmp_path / f"in{suffix}")
    before = sitk.ReadImage(tmp_path / f"in{suffix}")
    volume = read_volume(tmp_path / f"in{suffix}")
    turned = sitk.DICOMOrient(before, "LPS")
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(turned))
    np.testing.assert_allclose(volume.affine[:3, 3], turned.GetOrigin(), atol=1e-9)
    np.testing.assert_allclose(volume.spacing_mm_zyx, turned.GetSpacing()[::-1])

    out = write_volume(volume, tmp_path / "out", description="x")
    assert out.name == f"synthetic{suffix}"
    after = sitk.ReadImage(out)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(after), sitk.GetArrayFromImage(before))
    for get in ("GetOrigin", "GetSpacing", "GetDirection", "GetPixelIDValue"):
        assert getattr(after, get)() == getattr(before, get)()


def test_refused_in_one_line(tmp_path):
    path = tmp_path / "x.nii.gz"
    broken = values()
    broken[0, 0, :2] = np.nan, np.inf
    assert "found 2 that" in refusal(saved(path, broken))
    assert "complex" in refusal(saved(path, values().astype(np.complex64)))
    assert "three axes" in refusal(saved(path, np.stack([values()] * 2, axis=-1)))
    rgb = np.zeros(SHAPE_XYZ, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert "RGB" in refusal(saved(path, rgb))
    saved(path.with_suffix(""), values())
    raw = bytearray(path.with_suffix("").read_bytes())
    raw[280:296] = bytes(16)  # srow_x
    (tmp_path / "flat.nii").write_bytes(raw)
    assert "invertible" in refusal(tmp_path / "flat.nii")
    path.write_bytes(b"not an image")
    assert "readable" in refusal(path)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 24, 40, 3), np.uint8), isVector=True), tmp_path / "c.mha")
    assert "components" in refusal(tmp_path / "c.mha")
    (tmp_path / "d.mha").write_bytes(b"ObjectType = Image\n")
    assert "readable" in refusal(tmp_path / "d.mha")
    (tmp_path / "e.jpg").write_bytes(b"")
    assert ".mha" in refusal(tmp_path / "e.jpg", read_volume)


@pytest.mark.parametrize("name", ["whole.nii", "whole.nii.gz", "whole.mha", "whole.nrrd"])
def test_truncated_files_and_false_claims_are_refused(tmp_path, name):
    whole, cut = tmp_path / name, tmp_path / f"cut{name[5:]}"
    if ".nii" in name:
        saved(whole, values())
    else:
        sitk.WriteImage(sitk.GetImageFromArray(values().T), whole)
    raw = whole.read_bytes()
    cut.write_bytes(raw[: len(raw) * 3 // 4])
    refusal(cut)
    if name == "whole.nii":
        header = nib.load(whole).header
        header["dim"][1:4] = 30000
        cut.write_bytes(header.binaryblock + raw[348:])
        assert "more than the file can hold" in refusal(cut)
    if name == "whole.mha":
        cut.write_bytes(raw.replace(b"DimSize = 40 24 5", b"DimSize = 9999 9999 9999"))
        assert "more than the file can hold" in refusal(cut)


def test_writer_refuses_other_sizes_and_values(tmp_path):
    volume = read_image(saved(tmp_path / "in.nii.gz", values()))
    for array, words in (
        (volume.array[1:], "voxels"),
        (volume.array + np.float32(np.nan), "found 4800"),
        (volume.array * 100, "int16"),
    ):
        with pytest.raises(DataError, match=words):
            write_image(dataclasses.replace(volume, array=array), tmp_path / "out.nii.gz")
        assert not (tmp_path / "out.nii.gz").exists()


@real_data
def test_one_real_volume_in_seven_orders_of_axes(tmp_path):
    paths = sorted(NIFTI.glob("orient_*.nii.gz"))
    assert len(paths) == 7
    first = read_image(paths[0])
    for path in paths:
        volume = read_image(path)
        np.testing.assert_array_equal(volume.array, first.array)
        np.testing.assert_allclose(volume.affine, first.affine, atol=1e-3)
        write_image(volume, tmp_path / path.name)
        before, after = nib.load(path), nib.load(tmp_path / path.name)
        np.testing.assert_array_equal(after.affine, before.affine)
        for field in ("sform_code", "qform_code", "srow_x", "quatern_b", "pixdim", "xyzt_units", "dim"):
            assert after.header[field].tobytes() == before.header[field].tobytes()
        np.testing.assert_allclose(after.get_fdata(), before.get_fdata(), atol=1e-5)


@pytest.mark.parametrize("suffix", [".nii.gz", ".mha", ".nrrd"])
def test_what_was_synthesised_says_so_in_its_own_header(tmp_path, suffix):
    source = saved(tmp_path / "in.nii.gz", values())
    if suffix != ".nii.gz":
        sitk.WriteImage(sitk.ReadImage(str(source)), str(tmp_path / f"in{suffix}"))
        source = tmp_path / f"in{suffix}"
    written = write_volume(read_volume(source), tmp_path / "out", description="Synthetic 합성 70keV (SE-ResViT)")
    if suffix == ".nii.gz":
        assert nib.load(written).header["descrip"].item().decode() == "Synthetic 합성 70keV (SE-ResViT)"
    else:
        assert sitk.ReadImage(str(written)).GetMetaData("description") == "Synthetic 합성 70keV (SE-ResViT)"
    np.testing.assert_array_equal(read_volume(written).array, np.rint(read_volume(source).array))


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.mha", "x.nrrd"])
def test_headers_alone_tell_the_geometry(tmp_path, name):
    path = tmp_path / name
    saved(tmp_path / "in.nii", values(0, 9))
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "in.nii")), str(path))
    whole, header = read_volume(path), read_volume(path, pixels=False)
    assert header.array.shape == whole.array.shape and not any(header.array.strides) and header.unit == "arbitrary"
    np.testing.assert_array_equal(header.affine, whole.affine)
    np.testing.assert_array_equal(header.positions_mm, whole.positions_mm)


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.mha", "x.nrrd"])
def test_damaged_anywhere_a_file_is_read_or_refused(tmp_path, damaged, name):
    saved(tmp_path / "in.nii", values(0, 9)[::4, ::4])
    sitk.WriteImage(sitk.ReadImage(str(tmp_path / "in.nii")), str(tmp_path / name), useCompression=True)
    refused = 0
    for raw in damaged((tmp_path / name).read_bytes(), count=100, header_bytes=400):
        (tmp_path / f"hit-{name}").write_bytes(raw)
        try:
            assert np.isfinite(read_volume(tmp_path / f"hit-{name}").array).all()
        except DataError as error:
            refused += 1
            assert "\n" not in str(error) and f"hit-{name}" in str(error)
    assert refused > 3


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_voxels_in_another_file_are_refused(tmp_path, suffix):
    path, other = tmp_path / f"image{suffix}", tmp_path / "other"
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 16, 16), np.int16)), path)
    whole = path.read_bytes()
    other.write_bytes(bytes(range(256)) * 8)
    if suffix == ".mha":
        changed = whole.replace(b"ElementDataFile = LOCAL", f"ElementDataFile = {other}".encode())
    else:
        head, _, _ = whole.partition(b"\n\n")
        changed = head.replace(b"encoding: gzip", b"encoding: raw") + f"\ndata file: {other}\n".encode()
    assert changed != whole and read_image(path).array.shape == (4, 16, 16)
    path.write_bytes(changed)
    assert sitk.ReadImage(path).GetSize() == (16, 16, 4)  # what it would have been
    with pytest.raises(DataError, match="save header and voxels in one file"):
        read_image(path)


@pytest.mark.parametrize(
    ("suffix", "hide"),
    [
        (".mha", lambda head: b"Comment = ElementDataFile = LOCAL\n" + head),
        (".mha", lambda head: b"Comment =\nElementDataFile = LOCAL\n" + head),
        (".nrrd", lambda head: head.replace(b"\n", b"\r") + b"\r\n\n"),
    ],
)
def test_voxels_in_another_file_are_refused_however_it_is_said(tmp_path, suffix, hide):
    path = tmp_path / f"image{suffix}"
    (tmp_path / "other").write_bytes(b"secret" * 1000)
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 16, 16), np.uint8)), path)
    head = path.read_bytes().partition(b"\n\n" if suffix == ".nrrd" else b"ElementDataFile = LOCAL")[0]
    head = head.replace(b"encoding: gzip", b"encoding: raw").replace(
        b"CompressedData = True", b"CompressedData = False"
    )
    head += b"\ndata file: other\n" if suffix == ".nrrd" else b"ElementDataFile = other\n"
    path.write_bytes(hide(head) + b"0" * 1024)
    with pytest.raises(DataError, match="save header and voxels in one file"):
        read_image(path)
