"""The Hugging Face Hub without a network: folders, model cards, uploads, downloads, and `tvmatch export`."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from pipelines import GREY, PIXELS, POINTS, FakeHub, files, latents_model, tiny_vae, trained
from safetensors import safe_open
from safetensors.torch import load_file

from tvmatch import pictures
from tvmatch.cli import main
from tvmatch.errors import InputError
from tvmatch.interop import network_from_authors
from tvmatch.interop.hub import from_pretrained, push_to_hub, save_pretrained
from tvmatch.trained_model import TrainedModel, load

METRICS = {
    "dataset": "photographs",
    "steps": 12,
    "fid_reference": "train",
    "nfe": {"1": {"fid": 3.29, "images_per_second": 1234.5}, "4": {"fid": 1.99, "inception_score": 300}},
}
FEATURES = {
    "checkpoint": "/home/me/runs/x",
    "steps": 12,
    "parameters": 123456,
    "provenance": {"extractor": "inception"},
    "warnings": ["too few samples\nfor a covariance"],
    "rows": [
        {"guidance": 1.5, "steps": 1, "fid": 7.25, "provenance": "extractor inception; guidance 1.5"},
        {"guidance": 2.0, "steps": 1, "fid": 3.125, "provenance": "extractor inception; guidance 2"},
    ],
}
MODEL = ["README.md", "model.json", "model.safetensors"]
VAE = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.chdir(tmp_path)
    return FakeHub(tmp_path / "hub", monkeypatch)


@pytest.fixture(scope="module")
def latents() -> TrainedModel:
    pytest.importorskip("diffusers")
    return latents_model()


def written(folder: Path, **contents: Any) -> list[Path]:
    """Files of figures, by the name without .json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return [folder / f"{name}.json" for name in contents]


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    """The YAML header and the Markdown below it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, header, body = text.split("---\n", 2)
    return yaml.safe_load(header), body


@pytest.mark.parametrize("spec", [PIXELS, GREY, POINTS], ids=lambda spec: f"{spec.kind} {spec.shape}")
def test_saved_and_loaded_it_is_the_same(spec: Any, tmp_path: Path) -> None:
    model = trained(spec)
    save_pretrained(model, tmp_path / "model")
    assert files(tmp_path / "model") == MODEL
    for loaded in (from_pretrained(tmp_path / "model"), load(tmp_path / "model")):
        assert torch.equal(loaded.sample(seed=3, steps=2), model.sample(seed=3, steps=2))
        assert loaded.provenance == model.provenance


def test_latents_come_with_their_autoencoder(latents: TrainedModel, tmp_path: Path) -> None:
    expected = latents.sample(seed=3)
    save_pretrained(latents, tmp_path / "both", autoencoder=latents.decoder)  # type: ignore[arg-type]
    assert files(tmp_path / "both") == MODEL + VAE
    assert torch.equal(from_pretrained(tmp_path / "both").sample(seed=3), expected)

    save_pretrained(latents, tmp_path / "alone")
    assert files(tmp_path / "alone") == MODEL
    tiny_vae().save_pretrained(tmp_path / "elsewhere")
    loaded = from_pretrained(tmp_path / "alone", autoencoder=str(tmp_path / "elsewhere"))
    assert torch.equal(loaded.sample(seed=3), expected)


def test_another_autoencoder_is_refused(latents: TrainedModel, tmp_path: Path) -> None:
    save_pretrained(latents, tmp_path / "model", autoencoder=latents.decoder)  # type: ignore[arg-type]
    tiny_vae(seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match=r"autoencoder: .*other weights"):
        from_pretrained(tmp_path / "model", autoencoder=str(tmp_path / "other"))
    tiny_vae(seed=1).save_pretrained(tmp_path / "model" / "vae")
    with pytest.raises(InputError, match=r"autoencoder: .*other weights"):
        from_pretrained(tmp_path / "model")
    save_pretrained(trained(PIXELS), tmp_path / "pixels")
    with pytest.raises(InputError, match=r"autoencoder: .*image data, w"):
        from_pretrained(tmp_path / "pixels", autoencoder=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"autoencoder: .*image data, w"):
        save_pretrained(trained(PIXELS), tmp_path / "new", autoencoder=latents.decoder)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    model = trained(PIXELS)
    picture = pictures.image_grid(model.sample(count=6), 3)
    metrics = written(tmp_path, metrics=METRICS, metrics_inception=FEATURES)
    config = tmp_path / "of_the_run.yaml"
    config.write_text("optimizer:\n  beta2: 0.95\n", encoding="utf-8")
    save_pretrained(
        model, tmp_path / "model", metrics=metrics, samples=picture, config=config, license="cc-by-4.0"
    )
    assert files(tmp_path / "model") == sorted(
        [*MODEL, "config.yaml", "metrics.json", "metrics_inception.json", "samples.png"]
    )
    assert (tmp_path / "model" / "config.yaml").read_bytes() == config.read_bytes()
    assert json.loads((tmp_path / "model" / "metrics.json").read_text()) == METRICS
    with Image.open(tmp_path / "model" / "samples.png") as saved:
        assert saved.tobytes() == picture.tobytes()
    header, body = card_of(tmp_path / "model")
    assert header["library_name"] == "tvmatch"
    assert header["license"] == "cc-by-4.0"
    assert header["pipeline_tag"] == "unconditional-image-generation"
    assert "terminal-velocity-matching" in header["tags"]
    for text in (
        "](samples.png)",
        "recipe `größer`",
        "tvmatch.from_pretrained",
        "| steps | fid | images per second | inception score |",
        "| 1 | 3.29 | 1,234 |  |",
        "| 4 | 1.99 |  | 300 |",
        "- fid reference: train",
        "| guidance | steps | fid |",
        "| 1.5 | 1 | 7.25 |",
        "- extractor inception; guidance 2",
        "- too few samples for a covariance",
        "- training steps: 12",
        "```yaml\noptimizer:\n  beta2: 0.95\n```",
        "| guidance weight | 1 to 2 |",
        "| classes | 3: zero, one, two |",
    ):
        assert text in body, text
    for text in ("- steps", "/home/me", "123,456"):
        assert text not in body, text


def test_the_card_of_what_others_trained(tmp_path: Path) -> None:
    """It claims neither the method nor one step, until the network is trained here."""
    provenance = {"imported_from": "SiT.pt"}
    for step, claimed in ((0, False), (12, True)):
        save_pretrained(trained(PIXELS, step=step, provenance=provenance), tmp_path / str(step))
        _, body = card_of(tmp_path / str(step))
        assert ("One-step generator" in body) is claimed
        assert ("made by Terminal Velocity Matching" in body) is claimed
        assert ("imported from `SiT.pt`" in body) is not claimed


def test_a_card_of_little(tmp_path: Path) -> None:
    save_pretrained(trained(POINTS, provenance={}, guidance=1.0), tmp_path / "model")
    header, body = card_of(tmp_path / "model")
    assert "license" not in header
    assert "pipeline_tag" not in header
    for heading in ("samples.png", "## Figures", "## Recipe", "## Provenance"):
        assert heading not in body


def test_names_do_not_break_the_card(tmp_path: Path) -> None:
    spec = PIXELS.__class__(**(vars(PIXELS) | {"class_names": ("a | b", "c\n# d", "---\nlicense: x")}))
    save_pretrained(trained(spec), tmp_path / "model")
    header, body = card_of(tmp_path / "model")
    assert "license" not in header
    assert "| classes | 3: a \\| b, c # d, --- license: x |" in body


def test_a_picture_may_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"picture")
    save_pretrained(trained(GREY), tmp_path / "model", samples=tmp_path / "grid.png")
    assert (tmp_path / "model" / "samples.png").read_bytes() == b"picture"


def test_nothing_is_overwritten_or_left_half(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match=r"folder: .*exists already"):
        save_pretrained(trained(GREY), tmp_path / "model")
    assert files(tmp_path / "model") == []
    bad = [*written(tmp_path, figures=METRICS, metrics=[1], metrics_2=None), tmp_path / "metrics_3.json"]
    bad[2].write_text("{")
    before = files(tmp_path)
    for path in bad:
        with pytest.raises(InputError, match=f"metrics: .*{path.name}"):
            save_pretrained(trained(GREY), tmp_path / "new", metrics=[path])
    assert files(tmp_path) == before
    assert not list(tmp_path.glob(".*"))


def test_pushed_and_pulled_it_is_the_same(hub: FakeHub, latents: TrainedModel) -> None:
    address = push_to_hub(
        latents,
        "me/model",
        private=True,
        token="secret",
        metrics=written(Path("figures"), metrics=METRICS),
        autoencoder=latents.decoder,  # type: ignore[arg-type]
    )
    assert address == "https://huggingface.co/me/model"
    assert hub.private == {"me/model"}
    assert hub.arguments["token"] == "secret"
    pulled = from_pretrained("me/model", revision="v1", token="other")
    assert (hub.arguments["revision"], hub.arguments["token"]) == ("v1", "other")
    assert torch.equal(pulled.sample(seed=5), latents.sample(seed=5))
    assert 'from_pretrained("me/model")' in card_of(hub.repositories["me/model"])[1]


def test_only_known_files_are_downloaded(hub: FakeHub, latents: TrainedModel) -> None:
    push_to_hub(latents, "me/model", autoencoder=latents.decoder)  # type: ignore[arg-type]
    for name in (
        "model.py",
        "vae/diffusers.py",
        "vae/diffusion_pytorch_model.bin",
        "model.pkl",
        "vae/a/b.py",
    ):
        path = hub.repositories["me/model"] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"raise SystemExit")
    from_pretrained("me/model")
    assert hub.downloaded == [*MODEL[1:], *VAE]


def test_a_damaged_repository(hub: FakeHub) -> None:
    push_to_hub(trained(GREY), "me/model")
    weights = hub.repositories["me/model"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"model.safetensors.*truncated"):
        from_pretrained("me/model")
    (hub.repositories["me/model"] / "model.json").write_text("{}")
    with pytest.raises(InputError, match=r"model.json"):
        from_pretrained("me/model")


def hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    class Response:
        headers: dict[str, str] = {}  # noqa: RUF012
        request = None

    cls = getattr(errors, name)
    if issubclass(cls, errors.HfHubHTTPError):
        return cls("401 Client Error\n\nRequest ID", response=Response())  # type: ignore[no-any-return]
    return cls("several\nlines")  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: hub_error("GatedRepoError"), "gated"),
        (lambda: hub_error("RepositoryNotFoundError"), "neither a folder here nor a repository"),
        (lambda: hub_error("RevisionNotFoundError"), "no such revision"),
        (lambda: hub_error("LocalEntryNotFoundError"), "cannot be reached"),
        (lambda: hub_error("OfflineModeIsEnabled"), "cannot be reached"),
        (lambda: hub_error("LocalTokenNotFoundError"), "token"),
        (lambda: hub_error("HfHubHTTPError"), "401 Client Error"),
        (lambda: ConnectionError("no route\nto host"), "no route to host"),
        (lambda: OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_errors_of_the_hub_are_one_line(
    error: Callable[[], Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def fail(*_: Any, **__: Any) -> None:
        raise error()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    for speak in (lambda: from_pretrained("me/model"), lambda: push_to_hub(trained(GREY), "me/model")):
        with pytest.raises(InputError, match=message) as caught:
            speak()
        assert "\n" not in str(caught.value)


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub itself, with an empty cache and told to stay offline."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"me/model: .*folder here.*cannot be reached") as caught:
        from_pretrained("me/model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["runs/digits/step_7", "", "a b", "../model", "/nowhere/at/all", "-x/y"])
def test_names_that_are_none(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    speakers: list[Callable[[], object]] = [lambda: push_to_hub(trained(GREY), name)]
    if name:  # the empty path is the folder one is in
        speakers.append(lambda: from_pretrained(name))
    for speak in speakers:
        with pytest.raises(InputError, match="neither a folder here nor a name"):
            speak()


def test_a_folder_has_no_revisions(tmp_path: Path) -> None:
    save_pretrained(trained(GREY), tmp_path / "model")
    with pytest.raises(InputError, match=r"revision: .*'v1'"):
        from_pretrained(tmp_path / "model", revision="v1")


# tvmatch export


def checkpoint(folder: Path, model: TrainedModel, **metrics: Any) -> Path:
    """A run folder with one checkpoint and these files of figures."""
    (folder / "checkpoints" / "step_12").mkdir(parents=True)
    model.save(folder / "checkpoints" / "step_12")
    written(folder, **metrics)
    return folder


def test_export_for_the_hub(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    model = trained(PIXELS)
    run = checkpoint(Path("run"), model, metrics=METRICS, metrics_inception=FEATURES)
    (run / "config.yaml").write_text("recipe: some\n")
    assert main(["export", str(run), "--layout=hub", "--out=model", "--push=me/model", "--private"]) == 0
    assert capsys.readouterr().out.split() == ["model", "https://huggingface.co/me/model"]
    figures = ["metrics.json", "metrics_inception.json"]
    assert files(Path("model")) == sorted([*MODEL, *figures, "config.yaml", "samples.png"])
    assert files(hub.repositories["me/model"]) == files(Path("model"))
    assert hub.private == {"me/model"}
    assert torch.equal(from_pretrained("me/model").sample(seed=1), model.sample(seed=1))


def test_export_without_a_folder(hub: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    run = checkpoint(Path("run"), trained(POINTS))
    assert main(["export", str(run), "--layout=hub", "--push=me/points"]) == 0
    assert capsys.readouterr().out.split() == ["https://huggingface.co/me/points"]
    assert files(hub.repositories["me/points"]) == MODEL


def test_export_of_latents(hub: FakeHub, latents: TrainedModel) -> None:
    from tvmatch.diffusers import TVMPipeline

    expected = latents.sample([0, 2], steps=2, seed=1)
    run = checkpoint(Path("run"), latents, metrics=METRICS)
    tiny_vae().save_pretrained("tiny_vae")
    for layout in ("hub", "diffusers"):
        options = [f"--layout={layout}", f"--out={layout}", "--autoencoder=tiny_vae"]
        assert main(["export", str(run), *options]) == 0
    assert torch.equal(from_pretrained("hub").sample([0, 2], steps=2, seed=1), expected)
    pipeline = TVMPipeline.from_pretrained("diffusers")
    assert torch.equal(pipeline([0, 2], 2, seed=1, output_type="pt").images, expected)
    assert {"README.md", "samples.png", "metrics.json", *VAE} < set(files(Path("diffusers")))
    header, body = card_of(Path("diffusers"))
    assert "diffusers" in header["tags"]
    assert "TVMPipeline.from_pretrained" in body
    again = pipeline.trained_model().sample([0, 2], steps=2, seed=1)
    assert torch.equal(again, expected)


def test_export_under_the_authors_names(hub: FakeHub) -> None:
    model = trained(PIXELS)
    run = checkpoint(Path("run"), model)
    assert main(["export", str(run), "--layout=authors", "--out=deep/authors.safetensors"]) == 0
    tensors = load_file("deep/authors.safetensors")
    assert "model.x_embedder.proj.weight" in tensors
    network = network_from_authors(tensors, heads=2)
    again = TrainedModel(network, model.spec, model.scaled, model.guidance)
    assert torch.equal(again.sample(seed=2), model.sample(seed=2))
    with safe_open("deep/authors.safetensors", "pt") as file:
        description = json.loads(file.metadata()["tvmatch"])
    assert description["network"]["heads"] == 2
    assert description["data"]["class_names"] == ["zero", "one", "two"]


@pytest.mark.parametrize(
    "damage", [{"nfe": None}, {"nfe": [1]}, {"rows": {"a": 1}}, {"rows": [None, 3]}, {"warnings": None}]
)
def test_a_card_of_damaged_figures_shows_what_is_left(tmp_path: Path, damage: dict[str, Any]) -> None:
    metrics = written(tmp_path, metrics=METRICS | damage)
    save_pretrained(trained(GREY), tmp_path / "model", metrics=metrics)
    assert "## Figures" in (tmp_path / "model" / "README.md").read_text()


def test_figures_of_another_checkpoint_are_left_out(hub: FakeHub) -> None:
    other, broken = METRICS | {"steps": 11}, "text"
    run = checkpoint(Path("run"), trained(GREY), metrics=other, metrics_2=broken, metrics_inception=FEATURES)
    (run / "metrics_3.json").write_text("{")
    assert main(["export", str(run), "--layout=hub", "--out=model"]) == 0
    assert files(Path("model")) == sorted([*MODEL, "metrics_inception.json", "samples.png"])
    assert "7.25" in card_of(Path("model"))[1]
    assert "3.29" not in card_of(Path("model"))[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layout=hub"], "out"),
        (["--layout=onnx", "--out=new"], "layout: .*'onnx'"),
        (["--out=new"], "layout"),
        (["--layout=hub", "--out=run"], "out: run exists already"),
        (["--layout=hub", "--out=new", "--private"], "private"),
        (["--layout=hub", "--out=new", "--push=a b"], "a b: neither"),
        (["--layout=hub", "--out=new", "--autoencoder=vae"], "autoencoder: .*image data, w"),
        (["--layout=authors", "--out=new"], "out: .*safetensors"),
        (["--layout=authors", "--out=new.safetensors"], "layout: authors is for square images.*4×6"),
        (["--layout=authors", "--out=new.safetensors", "--push=me/x"], "push: .*'me/x'"),
    ],
)
def test_bad_exports(
    options: list[str], message: str, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    run = checkpoint(Path("run"), trained(GREY))
    before = files(Path())
    assert main(["export", str(run), *options]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tvmatch: error: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err), captured.err
    assert files(Path()) == before
    assert not hub.repositories


@pytest.mark.parametrize("layout", ["authors", "diffusers"])
def test_points_have_no_place_in_layouts_of_images(
    layout: str, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    run = checkpoint(Path("run"), trained(POINTS))
    assert main(["export", str(run), f"--layout={layout}", "--out=new.safetensors"]) == 2
    assert f"layout: {layout} is for images" in capsys.readouterr().err
    assert not Path("new.safetensors").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            "GatedRepoError",
            r"is gated; ask for access at https://huggingface\.co/{page}, then `hf auth login`$",
        ),
        ("RepositoryNotFoundError", r"is neither a .* on the Hugging Face Hub$"),
        ("HFValidationError", r"is neither a .* on the Hugging Face Hub$"),
        ("LocalEntryNotFoundError", r"is neither a .* that can be reached \(it is not in the cache"),
        ("OfflineModeIsEnabled", r"is neither a .* that can be reached \(.* HF_HUB_OFFLINE is set\)"),
        ("HfHubHTTPError", r"is neither a .* that can be reached \(401 Client Error Request ID\)"),
    ],
)
def test_one_client_for_data_autoencoders_and_extractors(
    error: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same failure reads the same, under the option that gave the name."""
    import huggingface_hub

    from tvmatch.data.images.reader import open_images
    from tvmatch.data.latents.autoencoder import load_autoencoder

    def fail(*_: Any, **__: Any) -> None:
        raise hub_error(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    about = reason.replace("{page}", "me/model")
    with pytest.raises(InputError, match=rf"^autoencoder: 'me/model' {about}"):
        load_autoencoder("me/model")
    about = reason.replace("{page}", "datasets/me/data")
    with pytest.raises(InputError, match=rf"^data\.path: 'me/data' {about}"):
        open_images("me/data", "train", label_column=None)
