"""Every fusion against its paper's equations in numpy, and what all of them promise: gates, starts, sizes, one seed."""

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from scipy.ndimage import correlate, correlate1d
from scipy.special import expit, softmax
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seresvit.config import FusionSettings, ModelSettings, VitSettings, load_config
from seresvit.model import checkpoint
from seresvit.model.fusion import FUSIONS, altered_gates, record_gates
from seresvit.model.generator import Generator
from seresvit.training.stage import MODEL, draw_from, start_stage, write_stage

KINDS = list(FUSIONS)
GATED = [kind for kind in KINDS if kind != "concat"]
CHANNELS, HALF = 16, 8
TINY = ModelSettings(
    base_channels=4, token_grid=(2, 2), vit=VitSettings(depth=1, width=16, heads=2, mlp_width=16, dropout=0.0)
)
# The K of a fusion's map, where it has one.
MAPS = {"scse": 1, "cbam": 1, "aff": CHANNELS, "attention-gate": 2, "spatial-se": 2}


def fusion_of(kind, channels=CHANNELS):
    """A fusion whose weights are all random, wherever it would start."""
    torch.manual_seed(0)
    fusion = FUSIONS[kind](channels, FusionSettings(kind=kind, reduction=4))
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.4)
    return fusion


def network_of(kind):
    return Generator(TINY.model_copy(update={"fusion": FusionSettings(kind=kind, reduction=4)})).eval()


def features(*shape):
    return torch.randn(*(shape or (2, CHANNELS, 5, 7)), generator=torch.Generator().manual_seed(1))


# The papers' equations. x (B, 2C, H, W) and w, the weights by name, in float64.


def perceptron(y_BC, w):
    return np.maximum(y_BC @ w["gate.reduce.weight"].T, 0) @ w["gate.expand.weight"].T


def pointwise(x, w, name):
    """A 1×1 convolution."""
    bias = w.get(f"{name}.bias", np.zeros(1))
    return np.einsum("oc,bchw->bohw", w[f"{name}.weight"][:, :, 0, 0], x) + bias[:, None, None]


def each(gate_BC):
    return gate_BC[:, :, None, None]


def se(x, w):
    return x * each(expit(perceptron(x.mean((2, 3)), w)))


def se_frozen(x, w):
    return x * each(expit(perceptron(np.ones(x.shape[:2]), w)))


def scse(x, w):
    return se(x, w) + x * expit(np.einsum("c,bchw->bhw", w["map.score.weight"][0, :, 0, 0], x))[:, None]


def cbam(x, w):
    x = x * each(expit(perceptron(x.mean((2, 3)), w) + perceptron(x.max((2, 3)), w)))
    planes, kernels = np.stack([x.mean(1), x.max(1)], axis=1), w["map.conv.weight"][0]
    mixed = [sum(correlate(p, k, mode="constant") for p, k in zip(image, kernels, strict=True)) for image in planes]
    return x * expit(np.stack(mixed))[:, None]


def eca(x, w):
    assert w["gate.conv.weight"].shape == (1, 1, 3)  # |log2(16) / 2 + 1 / 2| = 2.5, odd from 2
    return x * each(expit(correlate1d(x.mean((2, 3)), w["gate.conv.weight"][0, 0], axis=1, mode="constant")))


def gct(x, w):
    s = w["gate.alpha"] * np.sqrt((x**2).sum((2, 3)) + 1e-5)
    competing = np.sqrt(s.shape[1]) * s / np.sqrt((s**2).sum(1, keepdims=True) + 1e-5)
    return x * each(1 + np.tanh(w["gate.gamma"] * competing + w["gate.beta"]))


def sk(x, w):
    transformer, cnn = x[:, :HALF], x[:, HALF:]
    z = np.maximum((transformer + cnn).mean((2, 3)) @ w["gate.reduce.weight"].T + w["gate.reduce.bias"], 0)
    assert z.shape[1] == 32
    a, b = w["gate.expand.weight"][:HALF], w["gate.expand.weight"][HALF:]
    shares = softmax(np.stack([z @ a.T, z @ b.T]), axis=0)
    return np.concatenate([transformer * each(shares[0]), cnn * each(shares[1])], axis=1)


def aff(x, w):
    both = x[:, :HALF] + x[:, HALF:]

    def bottleneck(y, name):
        return pointwise(np.maximum(pointwise(y, w, f"map.{name}.reduce"), 0), w, f"map.{name}.expand")

    m = expit(bottleneck(both, "local") + bottleneck(both.mean((2, 3), keepdims=True), "whole"))
    return np.concatenate([m * x[:, :HALF], (1 - m) * x[:, HALF:]], axis=1)


def attention_gate(x, w):
    transformer, cnn = x[:, :HALF], x[:, HALF:]
    queried = np.maximum(pointwise(cnn, w, "map.key") + pointwise(transformer, w, "map.query"), 0)
    return np.concatenate([transformer, cnn * expit(pointwise(queried, w, "map.score"))], axis=1)


def spatial_se(x, w):
    b = expit(pointwise(x, w, "map.score"))
    x = se(x, w)
    return np.concatenate([2 * b * x[:, :HALF], 2 * (1 - b) * x[:, HALF:]], axis=1)


PAPERS = {
    "concat": lambda x, w: x,
    "se": se,
    "se-frozen": se_frozen,
    "scse": scse,
    "cbam": cbam,
    "eca": eca,
    "gct": gct,
    "sk": sk,
    "aff": aff,
    "attention-gate": attention_gate,
    "spatial-se": spatial_se,
}


@pytest.mark.parametrize("kind", KINDS)
def test_is_what_its_paper_says(kind):
    fusion, x = fusion_of(kind), features()
    weights = {name: value.double().numpy() for name, value in fusion.state_dict().items()}
    expected = PAPERS[kind](x.double().numpy(), weights)
    np.testing.assert_allclose(fusion(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_any_size_one_image_in_training_and_bfloat16(kind):
    fusion = fusion_of(kind).train()
    for height, width in ((1, 1), (3, 10), (8, 8)):
        x = features(1, CHANNELS, height, width)
        whole = fusion(x)
        assert whole.shape == x.shape
        with torch.autocast("cpu", torch.bfloat16):
            half = fusion(x.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), whole, rtol=0.05, atol=0.05)
    torch.testing.assert_close(fusion(x.contiguous(memory_format=torch.channels_last)), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_can_be_exported_with_every_size_left_open(kind):
    size = {0: torch.export.Dim("batch"), 2: torch.export.Dim("rows"), 3: torch.export.Dim("columns")}
    fusion = fusion_of(kind)
    program = torch.export.export(fusion, (features(),), dynamic_shapes=(size,)).module()
    x = features(3, CHANNELS, 4, 9)
    torch.testing.assert_close(program(x), fusion(x))


@pytest.mark.parametrize("kind", KINDS)
def test_can_be_traced_and_differentiated_as_a_function(kind, tmp_path):
    fusion, x = fusion_of(kind), features()
    torch.jit.trace(fusion, x.clone().requires_grad_(), check_trace=False).save(tmp_path / "fusion.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "fusion.pt")(x), fusion(x))
    each = torch.func.vmap(torch.func.grad(lambda image: fusion(image[None]).square().sum()))(x)
    fusion(x.requires_grad_()).square().sum().backward()
    torch.testing.assert_close(each, x.grad)


@pytest.mark.parametrize("kind", GATED)
def test_a_gradient_reaches_every_weight_and_the_features(kind):
    fusion, x = fusion_of(kind), features().requires_grad_()
    (fusion(x) * features()).sum().backward()
    still = [name for name, weight in fusion.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert still == [] and x.grad.abs().min() > 0


@pytest.mark.parametrize("kind", [kind for kind in GATED if kind != "gct"])  # its norm is always in float32
def test_the_gradient_is_that_of_finite_differences(kind):
    assert torch.autograd.gradcheck(fusion_of(kind).double(), features(2, CHANNELS, 3, 2).double().requires_grad_())


@pytest.mark.parametrize("kind", ["se", "se-frozen", "spatial-se"])
def test_no_pass_over_features_with_channels_last_reads_or_writes_another_layout(kind):
    x = features().contiguous(memory_format=torch.channels_last).requires_grad_()
    strays = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            passed = [leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)]
            written = [features for features in passed if features.shape == x.shape and 0 not in features.stride()]
            if not all(features.is_contiguous(memory_format=torch.channels_last) for features in written):
                strays.append(str(operation))
            return result

    with Watch():
        fusion_of(kind)(x).square().sum().backward()
    assert strays == []


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_are_the_scores_of_every_channel_and_position(kind):
    network = network_of(kind)
    with record_gates(network) as gates:
        network(features(3, 1, 32, 48))
    channels = 8 * TINY.base_channels
    shapes = {} if kind in ("concat", "aff", "attention-gate") else {"": (3, channels)}
    if kind in MAPS:
        shapes[".map"] = (3, channels if kind == "aff" else MAPS[kind], 8, 12)
    assert {n: tuple(v.shape) for n, v in gates.items()} == {
        f"art_{block}{suffix}": shape for block in (1, 6) for suffix, shape in shapes.items()
    }
    for value in gates.values():
        assert not value.requires_grad and value.min() > 0
        assert value.max() < 1 or kind in ("gct", "spatial-se", "attention-gate")
    for name, value in gates.items():
        if (name.endswith(".map") and value.shape[1] > 1) or kind == "sk":
            transformer, cnn = value.chunk(2, dim=1)
            if kind == "attention-gate":
                assert (transformer == 1).all() and cnn.max() < 1
            else:
                total = torch.full_like(cnn, 2.0 if kind == "spatial-se" else 1.0)
                torch.testing.assert_close(transformer + cnn, total)


@pytest.mark.parametrize("kind", GATED)
def test_altered_gates_are_what_scales_the_features(kind):
    fusion, x = fusion_of(kind), features()
    block = torch.nn.ModuleDict({"art_1": torch.nn.ModuleDict({"fuse": fusion})})
    kept = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(2))

    def change(name, value):
        assert name in ("art_1", "art_1.map")
        if name == "art_1.map":
            return kept
        return torch.tensor([1.0, 0.0]).repeat_interleave(HALF)  # the transformer's channels alone

    expected, has_gate = x, hasattr(fusion, "gate")
    if has_gate:
        expected = torch.cat([x[:, :HALF], torch.zeros_like(x[:, HALF:])], dim=1)
    if kind in MAPS:
        expected = expected + x * kept if kind == "scse" else expected * kept
    before = fusion(x)
    with record_gates(block) as own, altered_gates(block, change), record_gates(block) as altered:
        torch.testing.assert_close(fusion(x), expected)
    assert torch.equal(fusion(x), before) and not any(module._forward_hooks for module in fusion.modules())
    assert own.keys() == altered.keys() and all(own[n].shape == altered[n].shape for n in own)
    assert not has_gate or ((altered["art_1"][:, HALF:] == 0).all() and (own["art_1"] != 0).all())


def test_record_gates_leaves_no_hook_even_after_an_error():
    network = network_of("se")
    with pytest.raises(RuntimeError, match="stop"), record_gates(network) as gates:
        network(torch.rand(3, 1, 32, 32))
        raise RuntimeError("stop")
    assert {block: tuple(gate.shape) for block, gate in gates.items()} == {"art_1": (3, 32), "art_6": (3, 32)}
    assert not any(module._forward_hooks for module in network.modules())
    with record_gates(network) as second:
        pass
    network(torch.rand(3, 1, 32, 32))
    assert second == {}


def test_the_frozen_control_has_the_parameters_of_se_and_one_gate_for_all_images():
    frozen, adaptive = fusion_of("se-frozen"), fusion_of("se")
    assert {n: w.shape for n, w in frozen.state_dict().items()} == {
        n: w.shape for n, w in adaptive.state_dict().items()
    }
    gates, adaptive_gates = frozen.gate(features(4, CHANNELS, 6, 6)), adaptive.gate(features(4, CHANNELS, 6, 6))
    assert torch.equal(gates, gates[:1].expand_as(gates)) and gates.std() > 0.01
    assert adaptive_gates.std(dim=0).max() > 1e-3


def test_identity_and_se_starts_outlive_the_network_around_them():
    x = features(2, 32, 8, 8)
    transformation = network_of("gct").art_1.fuse
    assert torch.equal(transformation(x), x)
    torch.manual_seed(3)
    balanced = network_of("spatial-se").art_6.fuse
    torch.manual_seed(3)
    plain = network_of("se").art_6.fuse
    assert torch.equal(balanced(x), plain(x)) and not torch.equal(plain(x), x)


def others(network):
    return {name: weight for name, weight in network.state_dict().items() if ".fuse." not in name}


def test_one_seed_gives_the_same_network_around_every_fusion(tmp_path):
    """Fresh, and in stage 2 after stage 1, discriminator and the draws that follow included."""
    tiny = ["model.base_channels=4", "model.vit={depth: 1, width: 16, heads: 2, mlp_width: 16}", "train.size=32"]
    configs = {
        kind: load_config(None, [*tiny, "train.discriminator_channels=4", f"model.fusion.kind={kind}"])
        for kind in KINDS
    }
    fabric, fresh, continued = Fabric(accelerator="cpu"), {}, {}
    write_stage(start_stage(fabric, configs["sk"], 1, None), {}, tmp_path)
    stage_1 = checkpoint.read(tmp_path / MODEL)[0]
    for kind, config in configs.items():
        draw_from(7)
        fresh[kind] = {**others(network_of(kind)), "next draw": torch.rand(3)}
        stage = start_stage(fabric, config, 2, tmp_path)
        continued[kind] = {**others(stage.model), **stage.discriminator.module.state_dict(), "draw": torch.rand(3)}
    for found in (fresh, continued):
        for kind in KINDS:
            assert found[kind].keys() == found["concat"].keys()
            unlike = [n for n, weight in found[kind].items() if not torch.equal(weight, found["concat"][n])]
            assert unlike == [], kind
    assert all(torch.equal(continued["se"][name], weight) for name, weight in stage_1.items())
    draw_from(7)
    drawn = network_of("se")
    assert not torch.equal(drawn.art_1.fuse.gate.reduce.weight, drawn.art_6.fuse.gate.reduce.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_rebuilds_its_fusion(kind, tmp_path):
    network, x = network_of(kind), features(1, 1, 32, 32)
    checkpoint.save(network, tmp_path / "model.safetensors", {})
    loaded = checkpoint.load(tmp_path / "model.safetensors")
    assert type(loaded.art_1.fuse) is FUSIONS[kind] and loaded.settings == network.settings
    assert torch.equal(loaded(x), network(x))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("se", "concat")])
def test_the_published_layout_has_no_place_for_other_fusions(kind, tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match=f"fusion is {kind}"):
        checkpoint.export_published(network_of(kind), tmp_path / "G.pth")
    assert list(tmp_path.iterdir()) == []
