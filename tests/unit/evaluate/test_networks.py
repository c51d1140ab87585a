"""Networks whose weights are given by file. The published files are not here, so shapes, names and arithmetic."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from stepquant.errors import EvaluationError, SpecError
from stepquant.evaluate import inception
from stepquant.evaluate.features import DigitFeatures, Extracting, Features, ModuleFeatures, extract
from stepquant.evaluate.inception import InceptionFeatures, InceptionV3
from stepquant.evaluate.lpips import Lpips
from stepquant.evaluate.mobilenet import MobileNetFeatures, MobileNetV2
from stepquant.evaluate.named_features import features_named
from stepquant.evaluate.weights import MissingWeights, fill_, read_weights

SHARED = Path(__file__).parents[4] / "shared" / "models" / "mobilenetv2.safetensors"


def test_inception_has_the_published_names_and_sizes() -> None:
    with torch.device("meta"):
        network = InceptionV3().eval()
        found = network(torch.zeros(2, 3, 299, 299))
    # torchvision's inception_v3 without its auxiliary classifier has 23 834 568 parameters for 1000 classes.
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * 2049
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert state["Conv2d_1a_3x3.conv.weight"] == (32, 3, 3, 3)
    assert state["Mixed_5b.branch5x5_2.conv.weight"] == (64, 48, 5, 5)
    assert state["Mixed_6a.branch3x3.conv.weight"] == (384, 288, 3, 3)
    assert state["Mixed_6c.branch7x7dbl_4.conv.weight"] == (160, 160, 7, 1)
    assert state["Mixed_7a.branch7x7x3_4.bn.running_var"] == (192,)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"] == (384, 384, 3, 1)
    assert state["Mixed_7c.branch_pool.conv.weight"] == (192, 2048, 1, 1)
    assert state["fc.weight"] == (1008, 2048)
    assert (found.features.shape, found.logits.shape) == ((2, 2048), (2, 1008))
    assert found.spatial.shape == (2, 2023)


def test_pools_of_inception() -> None:
    """Ones stay ones at the border if the padding does not count; the last block takes the largest."""
    # One channel in, and the branch after the pool set to hand it through.
    block = inception._Mixed(1, (inception._pooled(1),)).eval()
    last = inception._Mixed(1, (inception._pooled(1, "maximum"),)).eval()
    for network in (block, last):
        nn.init.ones_(network.branch_pool.conv.weight)
        network.branch_pool.bn.eps = 0.0
    assert torch.allclose(block(torch.ones(1, 1, 4, 4)), torch.ones(1, 1, 4, 4))
    spike = torch.zeros(1, 1, 5, 5)
    spike[0, 0, 2, 2] = 9.0
    assert float(block(spike).detach()[0, 0, 1, 1]) == pytest.approx(1.0)
    assert float(last(spike).detach()[0, 0, 1, 1]) == pytest.approx(9.0)
    pools = {name: branches[-1].pool for name, branches in inception._BLOCKS.items()}
    assert [name for name, pool in pools.items() if pool == "maximum"] == ["Mixed_7c"]
    assert [name for name, pool in pools.items() if pool == "halve"] == ["Mixed_6a", "Mixed_7a"]


def test_inception_takes_only_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = r"nowhere.pth is not there\. Download weights-inception-2015-12-05-6726825d\.pth, which torch-fidelity "
    with pytest.raises(MissingWeights, match=words + r"publishes \(https://.*\), and .* give it as inception=FILE"):
        InceptionFeatures.from_file(tmp_path / "nowhere.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(EvaluationError, match=r"its SHA-256 begins with [0-9a-f]{8}, expected 6726825d"):
        InceptionFeatures.from_file(tmp_path / "other.pth")
    digest = hashlib.sha256((tmp_path / "other.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(inception, "SHA256", digest[:8])
    with pytest.raises(EvaluationError, match="does not hold the weights of Inception-v3"):
        InceptionFeatures.from_file(tmp_path / "other.pth")


def test_inception_without_a_file_is_the_one_in_torchs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "checkpoints"
    with pytest.raises(MissingWeights, match="is not there") as missing:
        features_named("inception")
    assert str(missing.value).startswith(str(folder / "weights-inception-2015-12-05-6726825d.pth"))
    assert f"put it into {folder} or give it as inception=FILE" in str(missing.value)

    network = InceptionV3()
    folder.mkdir(parents=True)
    file = folder / "weights-inception-2015-12-05-6726825d.pth"
    torch.save(network.state_dict(), file)
    with pytest.raises(EvaluationError, match="expected 6726825d"):  # whatever lies in the cache is checked, too
        features_named("inception")
    monkeypatch.setattr(inception, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest()[:8])
    found = features_named("inception")
    assert found.identity == InceptionFeatures(network).identity
    assert features_named(f"inception={file}").identity == found.identity


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"fn": hashlib.sha256}, tmp_path / "code.pth")
    for name, message in (
        ("text.pth", "cannot be read as weights of it"),
        ("text.safetensors", "cannot be read as weights of it"),
        ("list.pth", "holds no state dict"),
        ("code.pth", "cannot be read as weights of it"),
    ):
        with pytest.raises(EvaluationError, match=f"{name} {message}"):
            read_weights(tmp_path / name, what="it", download="it")


def test_weights_of_another_network(tmp_path: Path) -> None:
    layer = nn.Linear(2, 3)
    for tensors in ({"weight": torch.zeros(3, 2)}, {**layer.state_dict(), "more": torch.zeros(1)}):
        with pytest.raises(EvaluationError, match=r"file does not hold .* for example (bias|more): expected"):
            fill_(layer, tensors, path=Path("file"), what="it")
    fill_(layer, {"weight": torch.ones(3, 2), "bias": torch.ones(3)}, path=Path("file"), what="it")
    assert float(layer.weight.detach().sum()) == 6


def test_mobilenet_has_the_names_and_sizes_of_its_file() -> None:
    with torch.device("meta"):
        network = MobileNetV2()
        found = network(torch.zeros(2, 3, 224, 224))
    state = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert len(state) == 106
    assert state["blocks.0.seq.0.conv.weight"] == (32, 1, 3, 3)
    assert state["blocks.1.seq.2.conv.weight"] == (24, 96, 1, 1)
    assert state["blocks.16.seq.2.conv.weight"] == (320, 960, 1, 1)
    assert (found.features.shape, found.logits.shape, found.spatial) == ((2, 1280), (2, 1001), None)


def test_padding_of_mobilenet_at_stride_2() -> None:
    """On an even side the extra pixel is at the right and the bottom, so the first output sees no padding."""
    from stepquant.evaluate.mobilenet import _Convolution

    layer = _Convolution(1, 1, 3, stride=2, linear=True)
    nn.init.ones_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    assert layer(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9.0, 6.0], [6.0, 4.0]]
    assert layer(torch.ones(1, 1, 5, 5))[0, 0].tolist() == [[4.0, 6.0, 4.0], [6.0, 9.0, 6.0], [4.0, 6.0, 4.0]]


def test_residual_and_rectifier_of_mobilenet() -> None:
    from stepquant.evaluate.mobilenet import _Block

    block = _Block(2, 2, expansion=1, stride=1)
    for parameter in block.parameters():
        nn.init.zeros_(parameter)
    x = torch.randn(1, 2, 4, 4)
    assert torch.equal(block(x), x)
    nn.init.constant_(block.seq[0].conv.bias, 50.0)
    nn.init.ones_(block.seq[1].conv.weight)
    assert torch.allclose(block(x), x + 12)  # two channels, each stopped at 6


def test_the_documentations_lines_make_a_file_of_mobilenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights, and the features and logits of transformers beside those of the file."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.MobileNetV2ForImageClassification(transformers.MobileNetV2Config(num_labels=1001)).eval()
    for norm in (layer for layer in theirs.modules() if isinstance(layer, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 2.0, 4.0)  # else hardly anything is left after fifty layers
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)

    def published(name: str) -> nn.Module:
        assert name == "google/mobilenet_v2_1.0_224"
        return theirs

    monkeypatch.setattr(transformers.MobileNetV2ForImageClassification, "from_pretrained", published)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = [block for block in page.split("```") if "google/mobilenet_v2_1.0_224" in block and "import" in block]
    exec(code.removeprefix("python"), {})

    images = torch.rand(2, 3, 224, 224)
    found = features_named("mobilenetv2=mobilenetv2.safetensors").extract(images)
    with torch.no_grad():
        features = theirs.mobilenet_v2(images * 2 - 1).pooler_output
        logits = theirs(images * 2 - 1).logits
    assert float(features.std()) > 0.1
    assert torch.allclose(found.features, features, atol=1e-4)
    assert found.logits is not None
    assert torch.allclose(found.logits, logits, atol=1e-4)


def test_messages_say_which_mobilenet_is_meant(tmp_path: Path) -> None:
    words = r"Download google/mobilenet_v2_1\.0_224 of the hub, make a file of it with the lines in docs/evaluation\.md"
    with pytest.raises(SpecError, match=r"give mobilenetv2=FILE\. " + words):
        features_named("mobilenetv2")
    with pytest.raises(MissingWeights, match=r"no\.safetensors is not there\. " + words):
        MobileNetFeatures.from_file(tmp_path / "no.safetensors")
    # Of torchvision, whose names everybody tries first.
    save_file({"features.0.0.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "theirs.safetensors")
    with pytest.raises(EvaluationError, match=r"TensorFlow's MobileNetV2, as docs/evaluation\.md .*torchvision's does"):
        MobileNetFeatures.from_file(tmp_path / "theirs.safetensors")


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.exists(), reason="the file of weights is not here")
def test_mobilenet_from_its_file() -> None:
    features = MobileNetFeatures.from_file(SHARED)
    grey = torch.rand(1, 1, 224, 224)
    found = features.extract(grey)
    assert torch.equal(found.features, features(grey.expand(1, 3, 224, 224)))
    assert found.features.isfinite().all()
    assert float(found.features.std()) > 0.1
    with pytest.raises(EvaluationError, match="resize them to 224"):
        features(torch.rand(1, 3, 32, 32))


def test_lpips_is_that_of_torchmetrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.functional.image import lpips as theirs

    from stepquant.evaluate.lpips import _alexnet

    backbone = nn.Sequential(*_alexnet(), nn.MaxPool2d(3, stride=2))
    file = tmp_path / "alexnet.pth"
    state = {f"features.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({**state, "classifier.1.weight": torch.zeros(3)}, file)
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda _net, _pretrained=False: backbone)
    network = theirs._LPIPS(pretrained=True, net="alex", pnet_rand=True)
    reference = torch.rand(3, 3, 40, 48)
    candidate = (reference + 0.2 * torch.randn_like(reference)).clamp(0, 1)
    expected = network(candidate, reference, normalize=True).flatten()
    ours = Lpips(file)
    found = ours(candidate, reference)
    assert torch.allclose(found, expected, rtol=1e-5)
    assert float(found.min()) > 1e-4
    assert ours(reference, reference).tolist() == [0.0] * 3
    assert (ours.name, ours.smallest) == ("lpips-alex", 31)
    assert torch.allclose(ours(candidate[:, :1], reference[:, :1]), ours(
        candidate[:, :1].expand(3, 3, 40, 48), reference[:, :1].expand(3, 3, 40, 48)
    ))  # fmt: skip
    small = torch.rand(1, 3, 31, 31)
    assert ours(small, small).shape == (1,)
    with pytest.raises(EvaluationError, match="at least 31 x 31 pixels, got 30 x 31"):
        ours(small[:, :, :30], small[:, :, :30])


def test_vgg_of_lpips_taps_rectifiers(monkeypatch: pytest.MonkeyPatch) -> None:
    from stepquant.evaluate.lpips import _TAPS, _vgg16

    with torch.device("meta"):
        layers = _vgg16()
    state = {name: tuple(value.shape) for name, value in layers.state_dict().items()}
    assert state["0.weight"] == (64, 3, 3, 3)
    assert state["28.weight"] == (512, 512, 3, 3)  # the last convolution of torchvision's vgg16
    assert len(state) == 26
    x = torch.zeros(1, 3, 16, 16, device="meta")
    widths = []
    for place, layer in enumerate(layers):
        x = layer(x)
        if place in _TAPS["vgg"]:
            assert isinstance(layer, nn.ReLU)
            widths.append(x.shape[1])
    assert widths == [64, 128, 256, 512, 512]
    assert x.shape[2:] == (1, 1)


def test_lpips_without_its_file_or_with_another(tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=r"Download .*alexnet-owt-7be5be79\.pth .*vgg16-397923af\.pth"):
        Lpips(tmp_path / "alexnet.pth")
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, tmp_path / "part.safetensors")
    with pytest.raises(EvaluationError, match="does not hold the weights of LPIPS's backbone"):
        Lpips(tmp_path / "part.safetensors")


def test_features_by_name(tmp_path: Path) -> None:
    assert features_named("digits").identity == DigitFeatures().identity
    with pytest.raises(SpecError, match="Did you mean 'inception'"):
        features_named("incepton=x")
    with pytest.raises(MissingWeights, match=r"x\.pth is not there"):
        features_named(f"inception={tmp_path / 'x.pth'}")
    with pytest.raises(SpecError, match="take no file"):
        features_named("digits=x")


def test_what_extractors_give() -> None:
    digits = DigitFeatures()
    images = torch.rand(3, 1, 32, 32)
    found = extract(digits, images)
    assert torch.equal(found.features, digits(images))
    assert found.logits is not None
    assert torch.equal(found.logits, digits.logits(images))
    maps = digits._module.trunk(images)
    assert found.spatial is not None
    assert torch.equal(found.spatial, maps[:, :7].reshape(3, 112))
    assert isinstance(digits, Extracting)
    plain: Features = ModuleFeatures(nn.Flatten().eval(), "pixels", dim=4)
    only = extract(plain, images[:, :, :2, :2])
    assert (only.logits, only.spatial) == (None, None)
    assert torch.equal(only.features, images[:, :, :2, :2].flatten(1))


def test_rectifier_and_norm_of_inceptions_convolution() -> None:
    layer = inception._Convolution(1, inception._Conv("one", 1), (0, 0)).eval()
    nn.init.ones_(layer.conv.weight)
    layer.bn.running_mean.fill_(1.0)
    layer.bn.running_var.fill_(4.0)
    x = torch.tensor([0.0, 3.0]).view(1, 1, 1, 2)
    expected: Tensor = F.relu((x - 1) / (4 + 1e-3) ** 0.5)
    assert torch.allclose(layer(x), expected)
