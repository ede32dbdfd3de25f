"""What the fuzz works on: small files of every kind that a command reads, and valid calls of each command."""

import io
import json
import zipfile
from pathlib import Path

import datasets
import numpy as np
import yaml
from authors_files import authors_bytes, authors_network
from helpers import randomize_, small_dit
from PIL import Image
from pipelines import tiny_vae, trained
from runs import TINY_NETWORK, TINY_POINTS
from small_extractor import POOLED

from tvmatch.cli import main
from tvmatch.data.spec import DataSpec
from tvmatch.interop import network_to_authors

# A run that takes a moment. It stands after what is fuzzed, whose types are checked all the same.
SHORT = [
    "--training.steps=1",
    "--training.batch_size=4",
    "--training.accumulation=1",
    "--training.sample_every=0",
    "--training.compile=false",
    "--training.data_workers=0",
    "--objective.teacher=null",
]
SMALL_DIT = [*SHORT, *TINY_NETWORK]
SMALL_IMAGES = [*SMALL_DIT, "--data.resolution=4", "--data.workers=1"]
IMPORT_OPTIONS = ["--mean=0.5,-0.5,0,1", "--std=2", "--guidance=2", "--scaled=true", "--autoencoder=none"]
EXTRACTOR = "--extractor=small_extractor:SmallExtractor"

# A valid call of each command, by a name, and what must stand behind the fuzzed options.
CALLS: dict[str, tuple[list[str], list[str]]] = {
    "train digits": (["train", "digits", "--out=new", "--objective.guidance_weight=1"], SMALL_DIT),
    "train points": (["train", "moons", "--out=new"], [*SHORT, *TINY_POINTS]),
    "train images": (
        ["train", "image_folder", "--out=new", "--data.path=photos", "--objective.guidance_weight=1"],
        SMALL_IMAGES,
    ),
    "train latents": (
        ["train", "imagenet256_w2", "--out=new", "--data.latents=z", "--data.shape=null", "--data.std=null"],
        ["--data.mean=null", "--data.class_count=null", "--objective.guidance_weight=1", *SMALL_DIT],
    ),
    "train again": (["train", "--resume=run"], ["--training.steps=2"]),
    "dry run": (["train", "digits", "--dry-run"], SMALL_DIT),
    "sample": (["sample", "run", "--count=3", "--out=new.png"], []),
    "sample points": (["sample", "points", "--out=new.npz", "--steps=1,2"], []),
    "sample latents": (["sample", "latent", "--autoencoder=vae", "--out=new", "--count=2"], []),
    "evaluate": (["evaluate", "points", "--steps=1"], ["--samples=9"]),
    "evaluate features": (
        ["evaluate", "run", EXTRACTOR, "--reference=reference.npz", "--metrics=fid", "--out=new.json"],
        ["--samples=8", "--steps=1"],
    ),
    "encode": (
        ["encode", "--data=photos", "--autoencoder=vae", "--resolution=16", "--out=new", "--batch_size=4"],
        ["--workers=0"],
    ),
    "import": (["import", "snapshot.pkl", "--out=new", *IMPORT_OPTIONS], []),
    "import safetensors": (["import", "weights.safetensors", "--out=new", *IMPORT_OPTIONS, "--mean=0"], []),
    "export hub": (["export", "run", "--layout=hub", "--out=new"], []),
    "export pipeline": (["export", "run", "--layout=diffusers", "--out=new"], []),
    "export weights": (["export", "run", "--layout=authors", "--out=new.safetensors"], []),
    "info": (["info", "run"], []),
    "recipes": (["recipes", "digits"], []),
    "demo": (["demo", "run", "--port=0"], []),
    "check": (["check", "--model=nowhere", "--device=cpu"], []),  # a whole check takes seconds
}


def photo(number: int, size: int = 9) -> bytes:
    """A noisy PNG."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size + 2, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def make_material(folder: Path) -> None:
    """All that CALLS names, in `folder`, which is the working directory."""
    for number in range(8):
        path = folder / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(photo(number))
    labels = [[f"{number}.png", number % 2] for number in range(4)]
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
        for number, (name, _) in enumerate(labels):
            archive.writestr(str(name), photo(number))
    rows = {"image": [{"bytes": photo(k), "path": None} for k in range(4)], "label": [0, 1, 0, 1]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / "photos.parquet")

    for name, out in (("train digits", "run"), ("train points", "points")):
        arguments, caps = CALLS[name]
        assert main([*arguments, *caps, f"--out={out}"]) == 0
    figures = {"dataset": "digits", "steps": 1, "nfe": {"1": {"label_accuracy": 0.5, "frechet_ratio": 2.0}}}
    (folder / "run" / "metrics.json").write_text(json.dumps(figures))
    tiny_vae().save_pretrained(folder / "vae")
    arguments, caps = CALLS["encode"]
    assert main([*arguments, *caps, "--out=z"]) == 0
    spec = DataSpec.from_description(json.loads((folder / "z" / "latents.json").read_text())["data"])
    (folder / "latent").mkdir()
    trained(spec).save(folder / "latent")

    network = randomize_(small_dit((4, 4, 4), 3)).requires_grad_(False)
    content = {"ema": authors_network(network_to_authors(network)), "optimizer": None}
    (folder / "snapshot.pkl").write_bytes(authors_bytes(content))
    assert main(["export", "run", "--layout=authors", "--out=weights.safetensors"]) == 0
    assert main(["export", "run", "--layout=hub", "--out=hub"]) == 0
    np.savez(folder / "reference.npz", mu=np.zeros(POOLED), sigma=np.eye(POOLED))
    (folder / "mine.yaml").write_text(yaml.safe_dump({"recipe": "digits", "training": {"log_every": 3}}))
