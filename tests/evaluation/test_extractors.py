"""Extractors that need no torchvision, DINOv2 and the user's own; and what is refused ahead of Inception.

The real Inception is tested in tests_evaluation/, in an environment of its own.
"""

import hashlib
import importlib
import json
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import randomize_, relative_error
from image_files import PHOTOGRAPHS
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tvmatch.errors import InputError
from tvmatch.evaluation.extractors import Features, load_extractor
from tvmatch.seeds import generator

CPU = torch.device("cpu")


def random_images(count: int, height: int = 8, width: int = 8) -> Tensor:
    draws = generator(0, "images")
    return torch.randint(256, (count, 3, height, width), generator=draws, dtype=torch.uint8)


def photographs(count: int) -> Tensor:
    files = sorted(PHOTOGRAPHS.rglob("*.jpg"))[:: 64 // count]
    return torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files])


# The user's own


class Channels(nn.Module):
    """Mean of each channel times a weight; `dropout` shows whether it is in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.dropout = nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.dropout(images.to(self.weight.dtype).mean((2, 3)) * self.weight)


def channels(images: Tensor) -> Tensor:
    return images.to(torch.float64).mean((2, 3)) * torch.tensor([1, 2, 3])


def all_three(images: Tensor) -> Features:
    means = channels(images)
    return Features(means, images.flatten(1), -means)


module, number = Channels(), 3


@pytest.mark.parametrize("attribute", ["module", "Channels", "channels"])
def test_a_module_a_class_or_a_function_will_do(attribute: str) -> None:
    extractor = load_extractor(f"test_extractors:{attribute}", CPU)
    images = random_images(4)
    features = extractor(images)
    assert features.spatial is None
    assert features.logits is None
    assert features.pooled.dtype == torch.float32
    assert not features.pooled.requires_grad
    # A mean of 64 numbers in float32.
    torch.testing.assert_close(features.pooled, channels(images).float(), rtol=1e-6, atol=0)


def test_features_of_the_users_own_may_have_all_three_parts() -> None:
    images = random_images(2)
    features = load_extractor("test_extractors:all_three", CPU)(images)
    assert torch.equal(features.pooled, channels(images).float())
    assert features.spatial is not None
    assert torch.equal(features.spatial, images.flatten(1).float())
    assert features.logits is not None
    assert torch.equal(features.logits, -features.pooled)


def test_a_file_of_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "extractor_in_this_folder.py").write_text(
        "def f(images):\n    return images.float().mean((2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_extractor("extractor_in_this_folder:f", CPU)(random_images(5)).pooled.shape == (5, 3)


def precise(images: Tensor) -> Tensor:
    """Sensitive to bfloat16, in which 1 + 2⁻⁹ is 1."""
    assert not torch.is_grad_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    pixels = images.flatten(1).float() / 512 + 1
    return pixels @ torch.eye(pixels.shape[1])


def test_nothing_around_it_changes_the_precision() -> None:
    """Neither autocast nor a lower precision of matrix products; both are back afterwards."""
    images = random_images(2, 4, 4) % 2
    extractor = load_extractor("test_extractors:precise", CPU)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            features = extractor(images).pooled
            assert torch.is_autocast_enabled("cpu")
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.is_grad_enabled()
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(features, images.flatten(1).float() / 512 + 1)


def test_a_fingerprint_changes_with_a_weight_and_with_the_code(tmp_path: Path, monkeypatch: Any) -> None:
    name = "test_extractors:module"
    fingerprint = load_extractor(name, CPU).fingerprint
    assert fingerprint == load_extractor(name, CPU).fingerprint
    weight = importlib.import_module("test_extractors").module.weight
    monkeypatch.setattr(weight, "data", weight.data + torch.tensor([0, 0, 1e-6]))
    assert load_extractor(name, CPU).fingerprint != fingerprint
    prints = set()
    for number, text in enumerate(["images.float()", "images.double()"]):
        monkeypatch.delitem(sys.modules, "fingerprinted", raising=False)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "fingerprinted.py").write_text(f"def f(images):\n    return {text}.mean((2, 3))\n")
        monkeypatch.syspath_prepend(folder)
        prints.add(load_extractor("fingerprinted:f", CPU).fingerprint)
    assert len(prints) == 2


def flat(images: Tensor) -> Tensor:
    return images[0]


def nothing(images: Tensor) -> None:
    return None


class Broken:
    def __init__(self) -> None:
        raise FileNotFoundError("weights.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inceptoin", "extractor: must be inception, dinov2 or package.module:attribute, got 'inceptoin'"),
        (
            "nowhere:f",
            "extractor: nowhere:f cannot be imported: ModuleNotFoundError: No module named 'nowhere'",
        ),
        (":f", "extractor: must be package.module:attribute, got ':f'"),
        ("torch:", "extractor: must be package.module:attribute, got 'torch:'"),
        ("test_extractors:absent", "cannot be imported: AttributeError"),
        ("test_extractors:number", "must be a module or a function, got int"),
        ("test_extractors:Broken", "cannot be created: FileNotFoundError: weights.pt"),
    ],
)
def test_what_is_no_extractor_is_told_in_one_line(name: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_extractor(name, CPU)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_that_fails_to_import_is_told_in_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "fails_to_import.py").write_text("1 +")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="fails_to_import:f cannot be imported: SyntaxError") as caught:
        load_extractor("fails_to_import:f", CPU)
    assert "\n" not in str(caught.value)


def test_results_that_are_no_features_are_refused() -> None:
    with pytest.raises(InputError, match=r"must return pooled features of shape \(2, d\), got \(3, 8, 8\)"):
        load_extractor("test_extractors:flat", CPU)(random_images(2))
    with pytest.raises(InputError, match="must return tensors, got NoneType"):
        load_extractor("test_extractors:nothing", CPU)(random_images(2))


def test_images_that_are_no_images_are_refused() -> None:
    extractor = load_extractor("test_extractors:channels", CPU)
    images = random_images(2)
    for wrong in (images / 255, images[0], images[:, :1], images[:0]):
        with pytest.raises(InputError, match=r"images: must be uint8 \(B, 3, H, W\), got"):
            extractor(wrong)


def test_weights_are_not_taken_where_they_would_be_ignored() -> None:
    with pytest.raises(InputError, match="cannot be set for a custom extractor"):
        load_extractor("test_extractors:module", CPU, Path("weights.pt"))


# DINOv2


def save_dinov2(folder: Path, image_size: int = 112, **sizes: Any) -> Path:
    """A tiny random DINOv2, at first with 2 × 2 patches of 56 pixels."""
    from transformers import Dinov2Config, Dinov2Model

    options = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 56} | sizes
    network = randomize_(Dinov2Model(Dinov2Config(image_size=image_size, **options)))
    network.save_pretrained(folder)
    return folder


def class_token(folder: Path, pixels: Tensor) -> Tensor:
    """What transformers itself makes of pixels that are resized and normalised."""
    from transformers import Dinov2Model

    network = Dinov2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        return network(pixels).pooler_output


def normalised(images: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def test_dinov2_is_the_class_token_after_the_last_norm(tmp_path: Path) -> None:
    folder = save_dinov2(tmp_path / "dinov2", image_size=224)
    extractor = load_extractor("dinov2", CPU, folder)
    images = random_images(3, 224, 224)
    features = extractor(images)
    assert features.spatial is None
    assert features.logits is None
    # Another kind of attention and another order of two multiplications, in float32.
    assert relative_error(features.pooled, class_token(folder, normalised(images))) < 1e-5
    assert extractor.name == "dinov2"
    # The same weights with another number of heads give other features.
    content = b"".join((folder / name).read_bytes() for name in ("config.json", "model.safetensors"))
    assert extractor.fingerprint == hashlib.sha256(content).hexdigest()


def test_dinov2_resizes_as_pillow_does(tmp_path: Path) -> None:
    """Bicubic with antialiasing, up and down, whatever the aspect; but not rounded to 8 bits as Pillow's."""
    extractor = load_extractor("dinov2", CPU, save_dinov2(tmp_path / "dinov2", image_size=224))
    seen: list[Tensor] = []
    network = extractor._network  # type: ignore[attr-defined]
    network.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    pictures = photographs(2) // 2 + 64  # what overshoots 0 or 255 between the two passes, Pillow cuts off
    wide = pictures.repeat(1, 1, 5, 6)  # 320 × 384
    for images in (pictures, wide):
        extractor(images)
        for image, pixels in zip(images, seen.pop(), strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            expected = np.asarray(picture.resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
            mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
            shown = (pixels * std.view(3, 1, 1) + mean.view(3, 1, 1)).clamp(0, 1) * 255
            # Pillow rounds twice: after the horizontal pass, which the vertical one then amplifies by the
            # sum of the absolute weights of a bicubic kernel (up to 1.25), and at the end.
            assert (shown.permute(1, 2, 0) - torch.from_numpy(expected)).abs().max() < 1.2


def keys_kernel(x: Tensor) -> Tensor:
    """Of bicubic interpolation (Keys 1981) with a = −3/4, as PyTorch has it without antialiasing."""
    x = x.abs()
    near = 1.25 * x**3 - 2.25 * x**2 + 1
    far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def test_dinov2_reads_positions_between_the_trained_ones_where_its_own_code_does(tmp_path: Path) -> None:
    """Patch i of 16 sees the trained coordinate (i + ½) · 37 / (16 + 0.1) − ½."""
    folder = save_dinov2(tmp_path / "dinov2", image_size=37 * 14, patch_size=14)
    trained = load_file(folder / "model.safetensors")["embeddings.position_embeddings"]
    extractor = load_extractor("dinov2", CPU, folder)
    fitted = extractor._network.embeddings.position_embeddings  # type: ignore[attr-defined]
    assert fitted.shape == (1, 1 + 16 * 16, 16)
    assert torch.equal(fitted[:, 0], trained[:, 0])

    at = (torch.arange(16.0) + 0.5) * 37 / 16.1 - 0.5
    places = torch.arange(-2.0, 39)  # beyond the edge the last value goes on
    matrix = torch.zeros(16, 37)
    matrix.index_add_(1, places.clamp(0, 36).long(), keys_kernel(at[:, None] - places))
    grid = trained[0, 1:].unflatten(0, (37, 37))
    expected = torch.einsum("ip,jq,pqd->ijd", matrix, matrix, grid)
    assert relative_error(fitted[0, 1:].unflatten(0, (16, 16)), expected) < 1e-5  # float32
    assert extractor(random_images(2)).pooled.shape == (2, 16)


def test_batches_of_dinov2_do_not_mix(tmp_path: Path) -> None:
    extractor = load_extractor("dinov2", CPU, save_dinov2(tmp_path / "dinov2"))
    images = random_images(4, 20, 30)
    together = extractor(images).pooled
    alone = torch.cat([extractor(image[None]).pooled for image in images])
    assert relative_error(alone, together) < 1e-5  # matrix products of another size round otherwise
    assert relative_error(together[1:], together[:-1]) > 1e-2


def test_dinov2_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(InputError) as caught:
            load_extractor("dinov2", CPU, folder)
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"extractor weights: {folder}")
        return message

    good = save_dinov2(tmp_path / "good")
    weights, config = load_file(good / "model.safetensors"), json.loads((good / "config.json").read_text())

    def variant(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    folder = variant("pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "holds no model.safetensors" in refusal(folder)

    folder = variant("without a tensor")
    fewer = {name: tensor for name, tensor in weights.items() if name != "layernorm.weight"}
    save_file(fewer, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 tensors are missing or of another shape, like layernorm.weight" in refusal(folder)

    folder = variant("of another width")
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))
    assert "has no DINOv2 network" in refusal(folder)

    folder = variant("cut off")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "has no DINOv2 network" in refusal(folder)

    folder = variant("without a configuration")
    (folder / "config.json").unlink()
    assert "has no DINOv2 network" in refusal(folder)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"^extractor weights: '.*nowhere' is neither a folder nor the name"):
        load_extractor("dinov2", CPU, tmp_path / "nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"'facebook/dinov2-large' is neither"):
        load_extractor("dinov2", CPU)


# Inception, as far as it goes without torchvision


@pytest.fixture
def fake_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Puts a torch_fidelity in place that begins as told, knows where weights are and makes no network."""

    def install(start: str = "") -> None:
        package = tmp_path / "torch_fidelity"
        package.mkdir()
        (package / "__init__.py").write_text(start)
        text = 'URL_INCEPTION_V3 = "https://host.invalid/weights-inception.pth"\n'
        (package / "feature_extractor_inceptionv3.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
            del sys.modules[name]

    forget()
    yield install
    forget()


@pytest.mark.parametrize(
    "failure", ['RuntimeError("operator torchvision::nms does not exist")', 'ImportError("no torchvision")']
)
def test_missing_packages_are_named(failure: str, fake_library: Callable[[str], None]) -> None:
    """Beside a PyTorch that torchvision does not belong to, its import fails, and not with an ImportError."""
    fake_library(f"raise {failure}")
    with pytest.raises(InputError, match=r'pip install "tvmatch\[evaluation\]"') as caught:
        load_extractor("inception", CPU)
    assert "torchvision" in str(caught.value)
    assert "\n" not in str(caught.value)


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_weights_that_are_more_than_weights_are_refused_and_not_executed(
    tmp_path: Path, fake_library: Callable[[], None]
) -> None:
    fake_library()
    executed = tmp_path / "executed"
    bad: dict[str, Any] = {"zip": {"w": Malicious(executed)}, "legacy": {"w": Malicious(executed)}}
    torch.save(bad["zip"], tmp_path / "zip.pth")
    torch.save(bad["legacy"], tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Malicious(executed), protocol=2))
    torch.save({"fc.weight": [1.0]}, tmp_path / "list.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    content = (tmp_path / "list.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "folder.pth").mkdir()
    for name in ("zip", "legacy", "pickle", "list", "module", "cut", "empty", "folder", "absent"):
        path = tmp_path / f"{name}.pth"
        with pytest.raises(InputError) as caught:
            load_extractor("inception", CPU, path)
        message = str(caught.value)
        assert message.startswith(f"extractor weights: {path} "), message
        assert "\n" not in message
        assert not executed.exists(), name


def test_weights_that_cannot_be_downloaded_say_where_to_put_them(
    tmp_path: Path, fake_library: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_library()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))

    def no_network(*arguments: Any, **options: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(InputError) as caught:
        load_extractor("inception", CPU)
    message = str(caught.value)
    assert f"weights-inception.pth is not in {tmp_path / 'home' / 'hub' / 'checkpoints'}" in message
    assert "https://host.invalid/weights-inception.pth" in message
    assert "no route to host" in message
