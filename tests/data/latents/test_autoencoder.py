"""Autoencoders of diffusers: raw latents of images, loading without execution, and which one it is."""

import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL
from helpers import randomize_, relative_error
from safetensors.torch import load_file, save_file

from tvmatch.cli.options import load_decoder
from tvmatch.config.schema import Config, TrainingConfig
from tvmatch.data import LatentsData
from tvmatch.data.latents.autoencoder import Autoencoder, load_autoencoder
from tvmatch.data.spec import AutoencoderInfo, DataSpec
from tvmatch.errors import InputError
from tvmatch.seeds import generator


def tiny(**options: Any) -> AutoencoderKL:
    """Of 4 channels, down-sampling 2, unless `options` say otherwise; always the same weights."""
    torch.manual_seed(0)
    widths = options.pop("block_out_channels", (8, 16))
    blocks = len(widths)
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=widths,
        norm_num_groups=4,
        **{"latent_channels": 4, "scaling_factor": 0.18215} | options,
    )
    return randomize_(network).eval()


def images(count: int, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=generator(0, "images"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("autoencoder") / "vae"
    tiny().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def autoencoder(folder: Path) -> Autoencoder:
    return load_autoencoder(str(folder))


@pytest.mark.parametrize("downsampling", [8, 16, 32])
@pytest.mark.parametrize("channels", [4, 16, 64])
def test_channels_and_downsampling_are_those_of_the_network(channels: int, downsampling: int) -> None:
    blocks = downsampling.bit_length()
    network = tiny(latent_channels=channels, block_out_channels=(4,) * blocks, layers_per_block=1)
    autoencoder = Autoencoder(network, "own")
    assert (autoencoder.channels, autoencoder.downsampling) == (channels, downsampling)
    shape = autoencoder.latent_shape((3, 2 * downsampling, downsampling))
    assert shape == (channels, 2, 1)
    encoded = autoencoder.encode(torch.rand(1, 3, 2 * downsampling, downsampling))
    assert encoded.mean.shape == encoded.std.shape == (1, *shape)
    assert autoencoder.decode(encoded.mean).shape == (1, 3, 2 * downsampling, downsampling)


def test_latents_are_raw_and_images_lie_in_the_unit_interval(autoencoder: Autoencoder) -> None:
    """The numbers of the network itself: pixels in [−1, 1], no scaling factor, the posterior's own std."""
    x = images(3)
    posterior = autoencoder.network.encode(2 * x - 1).latent_dist
    moments = autoencoder.encode(x)
    assert torch.equal(moments.mean, posterior.mean)
    assert torch.equal(moments.std, posterior.std)
    assert bool((moments.std > 0).all())
    decoded = autoencoder.decode(moments.mean)
    plain = autoencoder.network.decode(moments.mean).sample
    assert bool((plain.abs() > 1).any()), "or clamping would do nothing"
    assert torch.equal(decoded, (plain.clamp(-1, 1) + 1) / 2)
    assert torch.equal(autoencoder(moments.mean), decoded)
    assert not decoded.requires_grad


def test_an_image_does_not_depend_on_the_others_of_its_batch(
    autoencoder: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = images(5)
    together = autoencoder.encode(x)
    alone = [autoencoder.encode(x[k : k + 1]) for k in range(5)]
    # Sums of a few hundred float32 terms in another order: a few units of 6e-8.
    assert relative_error(torch.cat([m.mean for m in alone]), together.mean) < 1e-5
    assert relative_error(torch.cat([m.std for m in alone]), together.std) < 1e-5
    whole = autoencoder.decode(together.mean)
    monkeypatch.setattr("tvmatch.data.latents.autoencoder._DECODED_TOGETHER", 2 * 16 * 16)
    sizes: list[int] = []
    decode = autoencoder.network.decode
    monkeypatch.setattr(autoencoder.network, "decode", lambda z: sizes.append(len(z)) or decode(z))
    assert relative_error(autoencoder.decode(together.mean), whole) < 1e-5
    assert sizes == [2, 2, 1], "memory is bounded"


def test_the_fingerprint_is_of_the_weights_and_not_of_their_file(
    folder: Path, autoencoder: Autoencoder, tmp_path: Path
) -> None:
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    other = {"bin": weights, "half": {name: x.half() for name, x in weights.items()}}
    for name in other:
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, tmp_path / "bin" / "diffusion_pytorch_model.bin")
    save_file(other["half"], tmp_path / "half" / "diffusion_pytorch_model.safetensors")
    assert load_autoencoder(str(tmp_path / "bin")).fingerprint == autoencoder.fingerprint
    half = load_autoencoder(str(tmp_path / "half"))
    assert half.fingerprint != autoencoder.fingerprint, "these are other numbers"
    assert next(half.network.parameters()).dtype == torch.float32
    rounded = Autoencoder(tiny().half(), "rounded")
    assert rounded.fingerprint == half.fingerprint

    network = tiny()
    with torch.no_grad():
        parameter = network.decoder.conv_out.bias
        parameter[0] = torch.nextafter(parameter[0], torch.tensor(9.0))
    assert Autoencoder(network, "own").fingerprint != autoencoder.fingerprint
    assert len(autoencoder.fingerprint) == 64


def test_another_autoencoder_is_refused(folder: Path, autoencoder: Autoencoder) -> None:
    info = autoencoder.info((3, 16, 16))
    assert info == AutoencoderInfo(str(folder), autoencoder.fingerprint, (3, 16, 16))
    assert load_autoencoder(str(folder), expected=info).fingerprint == autoencoder.fingerprint
    load_autoencoder(str(folder), expected=AutoencoderInfo("not at hand", "", (3, 16, 16)))
    with pytest.raises(InputError, match=r"other weights \(SHA-256 \w{16}…\) than ema \(ffff"):
        load_autoencoder(str(folder), expected=AutoencoderInfo("ema", "f" * 64, (3, 16, 16)))
    with pytest.raises(InputError, match="multiple of 2 pixels"):
        load_autoencoder(str(folder), expected=AutoencoderInfo("ema", "", (3, 15, 16)))


def test_a_run_does_not_start_with_another_autoencoder_than_its_latents(
    folder: Path, autoencoder: Autoencoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = autoencoder.info((3, 16, 16))
    spec = DataSpec("latents", (4, 8, 8), None, (0.0,) * 4, (1.0,) * 4, info)
    tiny(latent_channels=4).half().save_pretrained(tmp_path / "other")

    def decoder(source: Path | None, sample_every: int) -> Any:
        data = LatentsData("latents", autoencoder=None if source is None else str(source))
        config = Config(data=data, training=TrainingConfig(sample_every=sample_every))
        return load_decoder(config, spec, "cpu")

    for sample_every in (0, 10):
        assert decoder(None, sample_every).fingerprint == autoencoder.fingerprint
        with pytest.raises(InputError, match=r"other has other weights .* than "):
            decoder(tmp_path / "other", sample_every)
    # One that is not at hand is needed for pictures only.
    with pytest.raises(InputError, match=r"training\.sample_every=0 to draw no samples"):
        decoder(tmp_path, 10)
    assert decoder(tmp_path, 0) is None
    assert "no samples will be drawn: autoencoder: there is neither" in capsys.readouterr().err


def test_pipelines_have_it_in_a_subfolder(folder: Path, autoencoder: Autoencoder, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pipeline" / "vae")
    (tmp_path / "pipeline" / "config.json").write_text('{"_class_name": "OurPipeline"}')
    assert load_autoencoder(str(tmp_path / "pipeline")).fingerprint == autoencoder.fingerprint


def test_weights_in_several_files(autoencoder: Autoencoder, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert (tmp_path / "parts" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    assert load_autoencoder(str(tmp_path / "parts")).fingerprint == autoencoder.fingerprint


def test_relatives_of_autoencoder_kl() -> None:
    """Any class with a Gaussian posterior over RGB images."""
    network = diffusers.AsymmetricAutoencoderKL(
        down_block_out_channels=(8,), up_block_out_channels=(8,), latent_channels=4, norm_num_groups=4
    )
    assert Autoencoder(network, "own").latent_shape((3, 8, 8)) == (4, 8, 8)
    hunyuan = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=64,
        block_out_channels=(32, 32, 32, 32, 64, 128),
        layers_per_block=1,
        spatial_compression_ratio=32,
        sample_size=64,
    )
    assert Autoencoder(randomize_(hunyuan), "own").latent_shape((3, 64, 64)) == (64, 2, 2)


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_a_pickle_of_weights_runs_nothing(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Hostile(marker)))
    assert marker.exists(), "or there would be nothing to prevent"
    marker.unlink()
    plain = partial(torch.save, _use_new_zipfile_serialization=False)
    for name, save in {"zip": torch.save, "plain": plain}.items():
        hostile = tmp_path / name
        hostile.mkdir()
        shutil.copy(folder / "config.json", hostile)
        save({"weight": Hostile(marker)}, hostile / "diffusion_pytorch_model.bin")
        with pytest.raises(InputError, match="cannot be loaded"):
            load_autoencoder(str(hostile))
        assert not marker.exists()


def changed(folder: Path, target: Path, **config: Any) -> str:
    """A copy with another configuration; its path."""
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return str(target)


def test_bad_folders(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="give a folder"):
        load_autoencoder("")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=r"neither config\.json nor vae/config\.json in .*empty"):
        load_autoencoder(str(empty))
    with pytest.raises(InputError, match="got a file"):
        load_autoencoder(str(folder / "config.json"))
    (empty / "config.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        load_autoencoder(str(empty))
    (empty / "config.json").write_text("[]")
    with pytest.raises(InputError, match="describes no autoencoder"):
        load_autoencoder(str(empty))
    shutil.copy(folder / "config.json", empty)
    with pytest.raises(InputError, match=r"cannot be loaded \(Error no file named diffusion_pytorch_model"):
        load_autoencoder(str(empty))
    with pytest.raises(InputError, match="quantised"):
        load_autoencoder(changed(folder, tmp_path / "quantised", quantization_config={"quant_method": "x"}))

    weights = "diffusion_pytorch_model.safetensors"
    tensors = load_file(folder / weights)
    truncated = Path(changed(folder, tmp_path / "truncated"))
    (truncated / weights).write_bytes((folder / weights).read_bytes()[:-100])
    with pytest.raises(InputError, match=r"truncated.*cannot be loaded"):
        load_autoencoder(str(truncated))
    missing = Path(changed(folder, tmp_path / "missing"))
    name = "encoder.conv_in.bias"
    save_file({key: x for key, x in tensors.items() if key != name}, missing / weights)
    with pytest.raises(InputError, match=r"missing tensors \['encoder\.conv_in\.bias'\]"):
        load_autoencoder(str(missing))
    extra = Path(changed(folder, tmp_path / "extra"))
    save_file(tensors | {"discriminator.weight": torch.zeros(1)}, extra / weights)
    with pytest.raises(InputError, match=r"unexpected tensors \['discriminator\.weight'\]"):
        load_autoencoder(str(extra))
    with pytest.raises(InputError, match="cannot be loaded"):
        load_autoencoder(changed(folder, tmp_path / "wider", block_out_channels=[8, 32]))
    assert capfd.readouterr().err == "", "what is wrong is in the error alone"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("UNet2DModel", "no autoencoder of diffusers"),
        ("os.system", "no autoencoder of diffusers"),
        ("torch", "no autoencoder of diffusers"),
        (None, "no autoencoder of diffusers"),
        ("VQModel", "does not encode RGB images into a Gaussian like AutoencoderKL"),
        ("AutoencoderTiny", "does not encode RGB images into a Gaussian like AutoencoderKL"),
        ("AutoencoderKLCogVideoX", "does not encode RGB images into a Gaussian like AutoencoderKL"),
    ],
)
def test_other_classes_are_refused(folder: Path, tmp_path: Path, name: str | None, message: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(InputError, match=message):
        load_autoencoder(str(other))


def test_images_and_latents_of_other_shapes(folder: Path, tmp_path: Path, autoencoder: Autoencoder) -> None:
    with pytest.raises(InputError, match="multiple of 2 pixels"):
        autoencoder.encode(images(1, 15))
    with pytest.raises(InputError, match="encodes RGB images, got 1"):
        autoencoder.encode(images(1)[:, :1])
    with pytest.raises(InputError, match=r"latents of 4 channels, got the shape \(1, 16, 8, 8\)"):
        autoencoder.decode(torch.zeros(1, 16, 8, 8))
    with pytest.raises(InputError, match="does not encode RGB images"):
        load_autoencoder(changed(folder, tmp_path / "grey", in_channels=1))
    with pytest.raises(InputError, match=r"images \(1, 1, 256, 256\)"):
        load_autoencoder(changed(folder, tmp_path / "to_grey", out_channels=1))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the Hub, and no way to reach the Hub."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("source", ["no/such-autoencoder", "not/a/hub/name", "/no/such/folder", "a b"])
def test_names_that_are_nowhere(no_network: Path, source: str) -> None:
    with pytest.raises(InputError, match=f"{source}' is neither a folder nor the name of a model"):
        load_autoencoder(source)


def test_a_name_that_was_downloaded_before(no_network: Path, folder: Path, autoencoder: Autoencoder) -> None:
    """In the layout of the Hub's cache, as a pipeline with a `vae` folder."""
    repository = no_network / "models--someone--pipeline"
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40) / "vae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    loaded = load_autoencoder("someone/pipeline")
    assert loaded.fingerprint == autoencoder.fingerprint
    assert loaded.info((3, 8, 8)).source == "someone/pipeline"


def test_without_diffusers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(InputError, match=r'needs the package diffusers, pip install "tvmatch\[latents\]"'):
        load_autoencoder(str(folder))
