"""TVMPipeline: the pixels of `TrainedModel.sample`, diffusers' layout and habits, bad and hostile input."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import in_direction_s, random_inputs
from pipelines import GREY, PIXELS, POINTS, FakeHub, files, latents_model, tiny_vae, trained
from safetensors.torch import load_file, save_file
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.trained_model import TrainedModel, load

pytest.importorskip("diffusers")

MODELS: dict[str, Callable[..., TrainedModel]] = {
    "latents": latents_model,
    "pixels": lambda **changes: trained(PIXELS, **changes),
    "grey, without classes": lambda **changes: trained(GREY, **changes),
}
FOLDER = [
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    from diffusers.utils import logging

    logging.disable_progress_bar()


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> TrainedModel:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def latents() -> TrainedModel:
    return latents_model()


def pipeline(model: TrainedModel, **options: Any) -> Any:
    from tvmatch.diffusers import TVMPipeline

    return silent(TVMPipeline.from_trained_model(model, **options))


def reloaded(folder: Path, **options: Any) -> Any:
    from tvmatch.diffusers import TVMPipeline

    return silent(TVMPipeline.from_pretrained(folder, **options))


def silent(made: Any) -> Any:
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, latents: TrainedModel) -> Path:
    """A pipeline's folder that no test changes."""
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipeline(latents).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to be changed."""
    for name in files(saved):
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes((saved / name).read_bytes())
    return tmp_path / "copy"


def labels_of(model: TrainedModel) -> list[int | str] | None:
    return None if model.spec.class_names is None else [1, "two", 0, 0]


@pytest.mark.parametrize(
    ("sample", "call"),
    [
        ({}, {}),
        ({"seed": 7, "steps": 3, "guidance": 1.25}, {"num_inference_steps": 3, "guidance_scale": 1.25}),
        ({"times": [1, 0.7, 0]}, {"times": [1, 0.7, 0]}),
    ],
)
def test_pixels_are_those_of_the_trained_model(
    model: TrainedModel, sample: dict[str, Any], call: dict[str, Any], tmp_path: Path
) -> None:
    """Bit for bit, whether the pipeline was made or loaded, and back again."""
    labels = labels_of(model)
    expected = model.sample(labels, count=4, **sample)
    assert expected.std() > 0
    made = pipeline(model)
    made.save_pretrained(tmp_path / "pipeline")
    loaded = reloaded(tmp_path / "pipeline")
    for pipe in (made, loaded):
        arguments = {"seed": sample.get("seed", 0), "output_type": "pt"} | call
        assert torch.equal(pipe(labels, batch_size=4, **arguments).images, expected)
        assert torch.equal(pipe.trained_model().sample(labels, count=4, **sample), expected)


def test_the_network_is_no_copy(latents: TrainedModel) -> None:
    pipe = pipeline(latents)
    assert pipe.transformer.dit is latents.network
    again = pipe.trained_model()
    assert again.network is latents.network
    for name in ("spec", "scaled", "guidance", "step", "provenance"):
        assert getattr(again, name) == getattr(latents, name), name


def test_a_loaded_pipeline_is_saved_as_a_model(saved: Path, latents: TrainedModel, tmp_path: Path) -> None:
    reloaded(saved).trained_model().save(tmp_path)
    again = load(tmp_path)
    again.decoder = latents.decoder
    assert torch.equal(again.sample(seed=3), latents.sample(seed=3))


def test_the_folder_has_the_layout_of_diffusers(saved: Path) -> None:
    assert files(saved) == FOLDER
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "TVMPipeline"
    assert index["transformer"] == ["tvmatch.diffusers", "TVMTransformer"]
    assert index["vae"] == ["diffusers", "AutoencoderKL"]


def test_saved_again_it_is_the_same(saved: Path, tmp_path: Path) -> None:
    reloaded(saved).save_pretrained(tmp_path)
    assert files(tmp_path) == FOLDER
    for name in FOLDER:
        if name.endswith(".json"):
            before, after = (json.loads((place / name).read_text()) for place in (saved, tmp_path))
            assert after | {"_name_or_path": ""} == before | {"_name_or_path": ""}, name
        else:
            assert (tmp_path / name).read_bytes() == (saved / name).read_bytes(), name


def test_without_an_autoencoder_there_are_latents(latents: TrainedModel, tmp_path: Path) -> None:
    bare = replace(latents, decoder=None)
    expected = bare.sample(count=3, seed=4)
    pipe = pipeline(bare)
    pipe.save_pretrained(tmp_path)
    assert files(tmp_path) == [name for name in FOLDER if not name.startswith("vae")]
    for one in (pipe, reloaded(tmp_path), pipeline(latents)):
        raw = one(batch_size=3, seed=4, output_type="latent").images
        assert torch.equal(raw, expected)
    with pytest.raises(InputError, match=r"output_type.*autoencoder.*'pil'"):
        pipe(0)
    with_vae = reloaded(tmp_path, vae=latents.decoder.network)  # type: ignore[union-attr]
    assert torch.equal(with_vae(0, seed=1, output_type="pt").images, latents.sample(0, seed=1))


def test_output_types_agree(model: TrainedModel) -> None:
    pipe, labels = pipeline(model), labels_of(model)
    pt, array, pictures = (
        pipe(labels, batch_size=4, seed=2, output_type=kind).images for kind in ("pt", "np", "pil")
    )
    assert pt.shape == (4, *model.output_shape)
    assert pt.dtype == torch.float32
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    channels, height, width = model.output_shape
    assert len(pictures) == 4
    for picture, values in zip(pictures, array, strict=True):
        assert (picture.size, picture.mode) == ((width, height), "L" if channels == 1 else "RGB")
        expected = (values * 255).round().astype(np.uint8)
        assert np.array_equal(np.asarray(picture).reshape(expected.shape), expected)
    (as_tuple,) = pipe(labels, batch_size=4, seed=2, output_type="pt", return_dict=False)
    assert torch.equal(as_tuple, pt)


def test_generators(latents: TrainedModel) -> None:
    pipe = pipeline(latents)

    def draw(labels: list[int], **arguments: Any) -> Tensor:
        images: Tensor = pipe(labels, output_type="pt", **arguments).images
        return images

    def seeded(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    both = draw([1, 2], generator=[seeded(5), seeded(6)])
    alone = draw([2], generator=seeded(6))
    # The noise is the same; matrix products round differently for other batch sizes.
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)
    assert torch.equal(draw([1, 2], generator=seeded(5)), draw([1, 2], generator=seeded(5)))
    assert not torch.allclose(draw([2], generator=seeded(5)), alone, atol=1e-3)
    noise = torch.randn(1, 4, 8, 8, generator=seeded(6))
    assert torch.equal(draw([2], latents=noise), alone)
    torch.manual_seed(3)
    first, second = draw([0]), draw([0])
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(draw([0]), first)


def test_labels_by_number_name_and_tensor() -> None:
    pipe = pipeline(trained(PIXELS))
    expected = pipe([2, 2], seed=0, output_type="pt").images
    several: list[Any] = ["two", 2, "2", torch.tensor(2)]
    for label in several:
        assert torch.equal(pipe(label, batch_size=2, seed=0, output_type="pt").images, expected)
    assert torch.equal(pipe(torch.tensor([2, 2]), seed=0, output_type="pt").images, expected)
    assert len(pipe(seed=0, batch_size=5).images) == 5
    assert len(pipeline(trained(GREY))(seed=0).images) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "class_labels: .*batch_size"),
        ({"class_labels": 3}, "class_labels: 3 is outside"),
        ({"class_labels": -1}, "class_labels: -1"),
        ({"class_labels": ["four"]}, "class_labels: no class is named 'four'"),
        ({"class_labels": [1.5]}, "class_labels: .*1.5"),
        ({"class_labels": []}, "class_labels: .*empty"),
        ({"class_labels": [0, 1], "batch_size": 3}, "batch_size: 3 samples for 2"),
        ({"class_labels": 0, "batch_size": 0}, "batch_size: .*0"),
        ({"batch_size": 1.5}, "batch_size: .*1.5"),
        ({"class_labels": 0, "num_inference_steps": 0}, "num_inference_steps: .*0"),
        ({"class_labels": 0, "num_inference_steps": 1.5}, "num_inference_steps: .*1.5"),
        ({"class_labels": 0, "num_inference_steps": 4, "times": [1, 0.5, 0]}, "times: .*4"),
        ({"class_labels": 0, "times": [0, 1]}, "times: .*decrease"),
        ({"class_labels": 0, "guidance_scale": 2.5}, "guidance_scale: trained for 1 to 2, got 2.5"),
        ({"class_labels": 0, "guidance_scale": float("nan")}, "guidance_scale: .*nan"),
        ({"class_labels": 0, "seed": -1}, "seed: .*-1"),
        ({"class_labels": 0, "seed": "zero"}, "seed: .*'zero'"),
        ({"class_labels": 0, "seed": 0, "generator": torch.Generator()}, "seed: .*generator"),
        (
            {"class_labels": 0, "latents": torch.zeros(2, 3, 6, 6)},
            r"latents: .*\(1, 3, 6, 6\).*\(2, 3, 6, 6\)",
        ),
        ({"class_labels": 0, "generator": [torch.Generator()] * 2}, "generator: 2 generators for 1"),
        ({"class_labels": 0, "generator": 5}, "generator: .*5"),
        ({"class_labels": 0, "output_type": "jpeg"}, "output_type: .*'jpeg'"),
        ({"class_labels": 0, "output_type": "latent"}, "output_type: .*no latents"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match="^" + message) as caught:
        pipeline(trained(PIXELS))(**arguments)
    assert "\n" not in str(caught.value)


def test_other_guidance_than_the_one_weight() -> None:
    pipe = pipeline(trained(PIXELS, guidance=1.75))
    assert torch.equal(
        pipe(0, guidance_scale=1.75, seed=0, output_type="pt").images,
        pipe(0, seed=0, output_type="pt").images,
    )
    with pytest.raises(InputError, match=r"guidance_scale: .*one weight 1.75, got 2"):
        pipe(0, guidance_scale=2.0)


def test_what_makes_no_pipeline(latents: TrainedModel) -> None:
    from tvmatch.diffusers import TVMPipeline, TVMTransformer

    with pytest.raises(InputError, match=r"model: .*points.*MLP"):
        pipeline(trained(POINTS))
    with pytest.raises(InputError, match=r"vae: .*image data, without"):
        pipeline(trained(PIXELS), vae=tiny_vae())
    with pytest.raises(InputError, match=r"autoencoder: .*other weights"):
        pipeline(latents, vae=tiny_vae(seed=1))
    with pytest.raises(InputError, match="description"):
        TVMPipeline(pipeline(latents).transformer)
    other = TVMTransformer.from_network(trained(PIXELS).network)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"transformer: .*\(3, 6, 6\)"):
        TVMPipeline(other, description=pipeline(latents).config.description)
    with pytest.raises(InputError, match=r"transformer: .*colour"):
        TVMTransformer({"hidden_size": 8, "colour": "red"}, (3, 6, 6), 3)
    with pytest.raises(InputError, match="safe_serialization"):
        pipeline(latents).save_pretrained("nowhere", safe_serialization=False)


def test_the_transformer_is_a_model_of_its_own(latents: TrainedModel, tmp_path: Path) -> None:
    from tvmatch.diffusers import TVMTransformer

    TVMTransformer.from_network(latents.network).save_pretrained(tmp_path)  # type: ignore[arg-type]
    network = TVMTransformer.from_pretrained(tmp_path)
    inputs = random_inputs(latents.spec.shape, 3, dtype=torch.float32)
    assert torch.equal(network(*inputs), latents.network(*inputs))
    expected = in_direction_s(latents.network, inputs)
    for ours, theirs in zip(in_direction_s(network, inputs), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_a_pipeline_from_a_pipeline_keeps_its_parts(saved: Path) -> None:
    from tvmatch.diffusers import TVMPipeline

    pipe = reloaded(saved)
    again = silent(TVMPipeline.from_pipe(pipe))
    assert (again.transformer, again.vae) == (pipe.transformer, pipe.vae)
    expected = pipe([1], seed=0, output_type="pt").images
    assert torch.equal(again([1], seed=0, output_type="pt").images, expected)
    assert silent(TVMPipeline.from_pipe(pipe, vae=None)).vae is None
    assert silent(TVMPipeline.from_pipe(pipeline(trained(GREY)))).vae is None


def test_saved_in_half_precision(saved: Path, tmp_path: Path) -> None:
    """Rounded weights are not those of the latents: it takes a word to load them."""
    pipe = reloaded(saved, dtype=torch.bfloat16)
    pipe.save_pretrained(tmp_path / "half")
    with pytest.raises(InputError, match=r"other weights .*half precision, which dtype=torch.bfloat16 loads"):
        reloaded(tmp_path / "half")
    again = reloaded(tmp_path / "half", dtype=torch.bfloat16)
    expected = pipe([1], seed=0, output_type="pt").images
    assert torch.equal(again([1], seed=0, output_type="pt").images, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(saved: Path, latents: TrainedModel, dtype: torch.dtype) -> None:
    expected = replace(latents, decoder=None).sample([0, 1, 2], steps=2, seed=1)
    for pipe in (reloaded(saved, dtype=dtype), reloaded(saved).to(dtype)):
        assert {tensor.dtype for tensor in pipe.transformer.parameters()} == {dtype}
        raw = pipe([0, 1, 2], 2, seed=1, output_type="latent").images
        assert raw.dtype == torch.float32  # the state of the sampler
        # Two steps of two blocks: some ten roundings in a row of 2^-9 each (2^-12 in float16).
        assert (raw - expected).norm() < 2e-2 * expected.norm()
        assert len(pipe([0, 1], seed=1).images) == 2
        with pytest.raises(InputError, match=f"transformer: .*{dtype}"):
            pipe.trained_model()


def test_offloading_that_cannot_work_is_refused(saved: Path) -> None:
    with pytest.raises(InputError, match="enable_group_offload"):
        reloaded(saved).enable_sequential_cpu_offload()


def test_from_the_hub(
    saved: Path, latents: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(tmp_path, monkeypatch)
    hub.create_repo("me/pipeline", private=False, exist_ok=True)
    hub.upload_folder(repo_id="me/pipeline", folder_path=saved, commit_message="first")
    for name in ("vae/diffusers.py", "pipeline.py", "transformer/diffusion_pytorch_model.bin", "README.md"):
        (hub.repositories["me/pipeline"] / name).write_bytes(b"raise SystemExit")
    pipe = reloaded(Path("me/pipeline"), revision="main", token="secret")
    assert hub.downloaded == FOLDER
    assert (hub.arguments["revision"], hub.arguments["token"]) == ("main", "secret")
    assert torch.equal(pipe([1], seed=8, output_type="pt").images, latents.sample(1, seed=8))


def test_a_missing_package_is_named() -> None:
    program = "import sys; sys.modules['diffusers'] = None; import tvmatch.diffusers"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    last = result.stderr.strip().splitlines()[-1]
    assert last.endswith('tvmatch.diffusers: needs the package diffusers, pip install "tvmatch[latents]"')


# What a hostile or damaged folder may hold


class Payload:
    """What a hostile pickle does when it is loaded: here it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Copies: `load_file` gives views of the file, which these tests write again."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def change_index(folder: Path, **changes: Any) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        reloaded(folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformer": ["hostile_module", "TVMTransformer"]}, "transformer is"),
        ({"transformer": ["tvmatch.diffusers", "Payload"]}, "transformer is"),
        ({"transformer": ["diffusers", "UNet2DModel"]}, "transformer is"),
        ({"transformer": None}, "transformer is"),
        ({"vae": ["hostile_module", "AutoencoderKL"]}, "vae is"),
        ({"vae": ["diffusers", "DiffusionPipeline"]}, "vae is"),
        ({"vae": ["diffusers", "UNet2DModel"]}, "vae is"),
        ({"vae": ["diffusers", 7]}, "vae is"),
        ({"vae": "diffusers"}, "vae is"),
        ({"scheduler": ["hostile_module", "Scheduler"]}, "unknown entries.*scheduler"),
        ({"_class_name": "StableDiffusionPipeline"}, "not of a TVMPipeline"),
        ({"_class_name": ["pipeline", "TVMPipeline"]}, "not of a TVMPipeline"),
        ({"description": None}, "description"),
        ({"description": {}}, "not the description"),
        ({"description": {"format": "tvmatch-pipeline-9"}}, "not the description"),
    ],
)
def test_an_index_that_is_not_ours(
    folder: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = folder / "imported"
    (folder / "hostile_module.py").write_text(f"open({str(marker)!r}, 'w')")
    monkeypatch.syspath_prepend(str(folder))
    change_index(folder, **changes)
    refused(folder, message)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("guidance",), "high"),
        (("guidance",), [1.0, 2.0, 3.0]),
        (("step",), None),
        (("data", "kind"), "image"),
        (("data", "std"), [0, 1, 1, 1]),
        (("data", "autoencoder", "fingerprint"), "00"),
        (("data", "shape"), [4, 4, 4]),
        (("data", "class_names"), ["one"]),
    ],
)
def test_a_description_that_does_not_fit(folder: Path, path: tuple[str, ...], value: Any) -> None:
    part = description = json.loads((folder / "model_index.json").read_text())["description"]
    for name in path[:-1]:
        part = part[name]
    part[path[-1]] = value
    change_index(folder, description=description)
    refused(folder, "description of a model|transformer|autoencoder")


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "\udcff"])
def test_an_index_that_is_no_json(folder: Path, content: str) -> None:
    (folder / "model_index.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(folder, "model_index.json")


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_code_in_a_folder_is_refused(folder: Path, component: str) -> None:
    marker = folder / "executed"
    for name in ("diffusers", "tvmatch.diffusers"):
        (folder / component / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')")
    refused(folder, "holds no code")
    refused(folder, "trust_remote_code", trust_remote_code=True)
    refused(folder, "custom_pipeline", custom_pipeline="pipeline")
    assert not marker.exists()


@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_pickles_are_not_read(folder: Path, component: str) -> None:
    """Neither hostile ones nor good ones in PyTorch's format, in whatever file and whatever is asked for."""
    marker = folder / "executed"
    weights = folder / component / "diffusion_pytorch_model.safetensors"
    tensors, hostile = tensors_of(weights), pickle.dumps(Payload(marker))
    weights.write_bytes(hostile)
    refused(folder, "not a pipeline that can be loaded")
    weights.unlink()
    (folder / component / "diffusion_pytorch_model.bin").write_bytes(hostile)
    refused(folder, "not a pipeline that can be loaded")
    torch.save(tensors, folder / component / "diffusion_pytorch_model.bin")
    for options in ({}, {"use_safetensors": False}):
        refused(folder, "not a pipeline that can be loaded", **options)
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0, 8, 1000, -1])
@pytest.mark.parametrize("component", ["transformer", "vae"])
def test_truncated_weights(folder: Path, component: str, kept: int) -> None:
    weights = folder / component / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    refused(folder, "not a pipeline that can be loaded")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("dit.head.bias"), "missing tensors.*'head.bias'"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "unexpected tensors.*extra"),
        (
            lambda tensors: tensors.update({"dit.head.bias": torch.zeros(5)}),
            "mismatched tensors.*'head.bias'",
        ),
        (lambda tensors: tensors.clear(), "missing tensors"),
    ],
)
def test_weights_of_another_network(
    folder: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = tensors_of(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    refused(folder, message)


def test_weights_of_another_autoencoder(folder: Path) -> None:
    """In any precision: one that does not fit its configuration; in float32, also one that fits."""
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = tensors_of(path)
    save_file({name: 1.01 * tensor for name, tensor in tensors.items()}, path, {"format": "pt"})
    refused(folder, "autoencoder: .*other weights")
    save_file(tensors | {"encoder.conv_in.bias": torch.zeros(3)}, path, {"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16):
        refused(folder, "not a pipeline that can be loaded", dtype=dtype)


@pytest.mark.parametrize("name", [name for name in FOLDER if name.endswith(".json")])
def test_missing_files(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, "missing|not a pipeline that can be loaded")


def test_a_transformer_of_another_configuration(folder: Path) -> None:
    path = folder / "transformer" / "config.json"
    content = json.loads(path.read_text())
    for change in ({"network": {"preset": "huge"}}, {"network": None}, {"shape": 3}, {"class_count": "many"}):
        path.write_text(json.dumps(content | change))
        refused(folder, "preset|not a pipeline|transformer|DiT")
