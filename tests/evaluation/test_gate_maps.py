"""The pictures of gates: balances by hand from what the fusion is given, their place on the target, and the page's."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from seresvit.config import DataSettings, FusionSettings, ModelSettings, VitSettings
from seresvit.data import read_volume
from seresvit.data.pairing import Case, write_manifest
from seresvit.data.phantom import simulate
from seresvit.evaluation.evaluate import evaluate
from seresvit.evaluation.explain import explain
from seresvit.evaluation.gate_maps import GateMap, read_balances, read_gate_maps, read_positions, write_gate_maps
from seresvit.evaluation.page import read_table
from seresvit.evaluation.panels import MAP_SPAN, map_ranges
from seresvit.evaluation.ranking import chosen_cases
from seresvit.evaluation.report import write_report
from seresvit.model import checkpoint
from seresvit.model.generator import Generator
from seresvit.synthesis.predict import Predictor, predict_manifest

HALF = 16
BLOCKS = ("art_1", "art_6")


def write_checkpoint(path, kind, seed=0, **data):
    torch.manual_seed(seed)
    vit = VitSettings(depth=1, width=16, heads=2, mlp_width=16)
    settings = ModelSettings(base_channels=4, token_grid=(3, 3), vit=vit, fusion=FusionSettings(kind=kind))
    network = Generator(settings)
    for name, parameter in network.named_parameters():
        if ".fuse." in name or name.endswith("conv.weight"):
            torch.nn.init.normal_(parameter, std=2.0 if ".fuse." in name else 0.1)
    header = {"data": DataSettings(**data).model_dump(mode="json"), "sources": ["110keV"], "target": "70keV"}
    checkpoint.save(network, path, header)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """P001 for training, P002 and P003 tested, three slices of 46 × 46 pixels each."""
    root = tmp_path_factory.mktemp("gate_maps")
    simulate(root, patients=3, slices=3, size=46, kev=(70, 110))
    cases = [
        Case(p, "train" if p == "P001" else "test", "110keV", "70keV", root / "110keV" / p, root / "70keV" / p, mask)
        for p in ("P001", "P002", "P003")
        for mask in [root / "labels" / f"{p}.nii.gz"]
    ]
    write_manifest(cases, root / "manifest.csv")
    return root


def inputs_of(predictor, folder, patient="P002"):
    return torch.cat(list(predictor.batches(read_volume(folder / "110keV" / patient))))


def fused_by_hand(predictor, inputs_ZCHW):
    """Block → what the fusion is given, (Z, 2C, h, w), scaled by its gate where it has one, in float64."""
    given, gates = {}, {}
    for block in BLOCKS:
        fuse = getattr(predictor.net, block).fuse
        fuse.register_forward_pre_hook(lambda _, x, block=block: given.update({block: x[0].double()}))
        if hasattr(fuse, "gate"):
            fuse.gate.register_forward_hook(lambda _, x, y, block=block: gates.update({block: y.double()}))
    with torch.inference_mode():
        predictor.net(inputs_ZCHW)
    return {b: (x * gates[b][:, :, None, None] if b in gates else x).numpy() for b, x in given.items()}


@pytest.mark.parametrize("kind", ["se", "gct", "concat"])
def test_the_balance_is_the_transformers_part_of_the_energy_behind_the_gate(folder, tmp_path, kind):
    predictor = Predictor(write_checkpoint(tmp_path / "net.safetensors", kind), "cpu")
    inputs_ZCHW = inputs_of(predictor, folder)
    found = read_positions(predictor, inputs_ZCHW)
    for block, x in fused_by_hand(predictor, inputs_ZCHW).items():
        energy = (x**2).reshape(len(x), 2, HALF, *x.shape[2:]).sum(axis=2)
        shows, balance_ZHW = found[block]
        assert shows == "balance" and balance_ZHW.shape == (3, 12, 12) and np.ptp(balance_ZHW) > 0.05
        np.testing.assert_allclose(balance_ZHW, energy[:, 0] / energy.sum(axis=1), rtol=1e-4)


def test_a_shut_half_has_no_part_and_nothing_has_none(folder, tmp_path):
    predictor = Predictor(write_checkpoint(tmp_path / "net.safetensors", "se"), "cpu")
    inputs_ZCHW = inputs_of(predictor, folder)
    for shut, expected in ((slice(HALF, None), 1.0), (slice(HALF), 0.0), (slice(None), np.nan)):
        handle = predictor.net.art_1.fuse.register_forward_hook(
            lambda _, inputs, x, shut=shut: x.index_fill(1, torch.arange(2 * HALF)[shut], 0.0)
        )
        np.testing.assert_array_equal(read_balances(predictor, inputs_ZCHW)["art_1"], np.full((3, 12, 12), expected))
        handle.remove()


@pytest.mark.parametrize(
    ("kind", "shows", "branch"),
    [
        ("scse", "map", 0),
        ("cbam", "map", 0),
        ("aff", "transformer's map", 0),
        ("spatial-se", "transformer's map", 0),
        ("attention-gate", "CNN's map", 1),
    ],
)
def test_a_fusion_with_a_map_is_shown_by_it(folder, tmp_path, kind, shows, branch):
    predictor = Predictor(write_checkpoint(tmp_path / "net.safetensors", kind), "cpu")
    inputs_ZCHW, seen = inputs_of(predictor, folder), {}
    predictor.net.art_6.fuse.map.register_forward_hook(lambda _, x, map_ZKHW: seen.update(map=map_ZKHW.numpy()))
    found = read_positions(predictor, inputs_ZCHW)["art_6"]
    map_ZKHW = seen["map"]
    halves = map_ZKHW if map_ZKHW.shape[1] == 1 else np.stack(np.split(map_ZKHW, 2, axis=1)).mean(axis=2).swapaxes(0, 1)
    assert found[0] == shows and np.ptp(found[1]) > 1e-3
    np.testing.assert_allclose(found[1], halves[:, branch], rtol=1e-5)


@pytest.fixture(scope="module")
def evaluated(folder):
    """The folder of an evaluation of the SE network, explained after it."""
    predictor = Predictor(write_checkpoint(folder / "se.safetensors", "se"), "cpu")
    assert not predict_manifest(predictor, folder / "manifest.csv", folder / "predictions")
    evaluate(folder / "predictions", folder / "manifest.csv", "dect", folder / "out")
    explain(predictor, folder / "manifest.csv", folder / "out", knock_out=False)
    return folder / "out"


def shown_on(out):
    """(patient, slice) of every panel of the cases."""
    chosen = chosen_cases(*(read_table(out / f"{name}.csv") for name in ("cases", "slices")))
    return [(case["patient"], line["slice"]) for case in chosen for line in case["slices"]]


def pictures(path, word):
    """The images of a page whose words begin so, as (slice, RGB)."""
    html = path.read_text(encoding="utf-8")
    found = re.findall(rf'<img src="data:image/png;base64,([^"]+)"[^>]*alt="{word}[^"]*, slice (\d+)"', html)
    return [(int(z), np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))) for png, z in found]


def test_every_panel_shows_the_balance_of_its_slice(folder, evaluated):
    """Each picture against the colours of the balance computed from the checkpoint, repeated over its pixels."""
    page = write_report(evaluated, folder / "predictions", folder / "manifest.csv")
    predictor = Predictor(folder / "se.safetensors", "cpu")
    balances = {p: read_balances(predictor, inputs_of(predictor, folder, p)) for p in ("P002", "P003")}
    for block in BLOCKS:
        shown = pictures(page, f"Balance, {block.replace('art_', 'ART ')}")
        of_cases = shown[: len(shown_on(evaluated))]
        assert [z for z, _ in of_cases] == [z for _, z in shown_on(evaluated)]
        of_page = [balances[patient][block][z] for patient, z in shown_on(evaluated)]
        low, high = min(map(np.min, of_page)), max(map(np.max, of_page))
        assert high - low > MAP_SPAN
        for (_, picture), balance in zip(of_cases, of_page, strict=True):
            expected = colormaps["cividis"]((balance - low) / (high - low))[..., :3].repeat(4, 0).repeat(4, 1)[:46, :46]
            assert np.abs(picture / 255 - expected).max() < 0.02
        assert f"{low:.2f}" in page.read_text() and f"{high:.2f}, balance, ART" in page.read_text()
        assert len(shown) == len(of_cases) + 2  # and of the two examples
    assert "this shows no attention" in page.read_text()


def test_maps_of_another_checkpoint_are_not_shown_and_lacking_ones_are_told(folder, evaluated, tmp_path):
    predictor = Predictor(write_checkpoint(tmp_path / "other.safetensors", "se", seed=1), "cpu")
    predict_manifest(predictor, folder / "manifest.csv", tmp_path / "predictions")
    evaluate(tmp_path / "predictions", folder / "manifest.csv", "dect", tmp_path / "out")
    for name in ("gates.json", "gate_maps.npz"):
        (tmp_path / "out" / name).write_bytes((evaluated / name).read_bytes())
    page = write_report(tmp_path / "out", tmp_path / "predictions", folder / "manifest.csv")
    assert pictures(page, "Target") and not pictures(page, "Balance")
    assert "another checkpoint" in page.read_text()
    kept = [one for one in read_gate_maps(evaluated) if (one.patient, one.slice) != shown_on(evaluated)[0]]
    write_gate_maps(kept, evaluated)
    page = write_report(evaluated)
    assert "Some slices lack their map" in page.read_text()
    assert 0 < len(pictures(page, "Balance")) < 2 * len(pictures(page, "Target"))
    (evaluated / "gate_maps.npz").write_bytes(b"PK")
    assert not pictures(write_report(evaluated), "Balance")


def test_on_another_grid_the_map_lies_where_the_target_shows_the_same(folder, tmp_path):
    """Trained at twice the pixel size: each pixel of the target takes the balance of the position that it lies in."""
    mm = read_volume(folder / "110keV" / "P002").spacing_mm_zyx[1:]
    path = write_checkpoint(tmp_path / "net.safetensors", "se", resample=tuple(2 * one for one in mm))
    predictor = Predictor(path, "cpu")
    predict_manifest(predictor, folder / "manifest.csv", tmp_path / "predictions")
    evaluate(tmp_path / "predictions", folder / "manifest.csv", "dect", tmp_path / "out")
    explain(predictor, folder / "manifest.csv", tmp_path / "out", knock_out=False)
    source = predictor.as_trained(read_volume(folder / "110keV" / "P002"))[0]
    assert source.array.shape[1:] == (23, 23)
    balance_ZHW = read_balances(predictor, torch.cat(list(predictor.batches(source))))["art_1"]
    found = [one for one in read_gate_maps(tmp_path / "out") if (one.patient, one.block) == ("P002", "art_1")]
    assert {one.slice for one in found} == {z for patient, z in shown_on(tmp_path / "out") if patient == "P002"}
    for one in found:
        expected = balance_ZHW[one.slice].repeat(8, 0).repeat(8, 1)[:46, :46]
        np.testing.assert_allclose(one.array, expected, atol=1e-3)


def test_what_is_written_is_read_again_and_a_flat_map_looks_flat(tmp_path):
    array = np.array([[0.25, np.nan], [0.5, 0.53125]], np.float32)
    write_gate_maps([GateMap("P1", "110keV", 3, "art_6", "balance", array)], tmp_path)
    (found,) = read_gate_maps(tmp_path)
    assert (found.patient, found.source, found.slice, found.block, found.shows) == (
        "P1",
        "110keV",
        3,
        "art_6",
        "balance",
    )
    np.testing.assert_array_equal(found.array, array)
    write_gate_maps([], tmp_path)
    assert read_gate_maps(tmp_path) == [] and not list(tmp_path.iterdir())

    class Shown:
        def __init__(self, low, high):
            self.maps = {"balance, ART 1": np.array([[low, high], [np.nan, low]])}

    assert map_ranges([Shown(0.5, 0.5)])["balance, ART 1"] == pytest.approx((0.45, 0.55))
    assert map_ranges([Shown(0.2, 0.5), Shown(0.4, 0.9)])["balance, ART 1"] == pytest.approx((0.2, 0.9))
    assert map_ranges([Shown(0.99, 1.0)])["balance, ART 1"] == pytest.approx((0.9, 1.0))
