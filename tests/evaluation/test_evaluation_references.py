"""Reference statistics: files of several makers, hostile ones, images, and the cache."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from small_extractor import POOLED, SPATIAL, SmallExtractor
from torch import Tensor

from tvmatch.distributed import Processes
from tvmatch.errors import InputError
from tvmatch.evaluation import Features, Reference, fit_gaussian, frechet_distance, load_reference
from tvmatch.evaluation.references import cache
from tvmatch.evaluation.references import loading as reference
from tvmatch.evaluation.references.npz import NpzReader
from tvmatch.seeds import generator

SHAPE = (3, 4, 6)
EXTRACTOR = SmallExtractor()
PIXELS = torch.randint(0, 256, (20, 3, 4, 6), dtype=torch.uint8, generator=generator(0, "references"))
FEATURES = EXTRACTOR(PIXELS)
assert FEATURES.spatial is not None
POOLED_STATISTICS, SPATIAL_STATISTICS = fit_gaussian(FEATURES.pooled), fit_gaussian(FEATURES.spatial)

# The extractor's float32 features differ by 1e-7 between batches of one size and another.
CLOSE: Any = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and caches of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(cache, "HF_HOME", str(tmp_path / "home"))
    return tmp_path


class Counting(SmallExtractor):
    """Counts the images it has seen."""

    def __init__(self, name: str = "small", fingerprint: str = "5" * 64) -> None:
        super().__init__()
        self.name, self.fingerprint = name, fingerprint
        self.seen = 0

    def forward(self, images: Tensor) -> Features:
        self.seen += len(images)
        return super().forward(images)


def load(path: str, extractor: Any = EXTRACTOR, **options: Any) -> Reference:
    found = load_reference(path, extractor, SHAPE, **options)
    assert found is not None
    return found


def assert_statistics(found: Reference) -> None:
    torch.testing.assert_close(found.pooled.mean, POOLED_STATISTICS.mean, **CLOSE)
    torch.testing.assert_close(found.pooled.covariance, POOLED_STATISTICS.covariance, **CLOSE)
    assert found.spatial is not None
    torch.testing.assert_close(found.spatial.mean, SPATIAL_STATISTICS.mean, **CLOSE)
    torch.testing.assert_close(found.spatial.covariance, SPATIAL_STATISTICS.covariance, **CLOSE)


def statistics(**changes: Any) -> dict[str, Any]:
    arrays: dict[str, Any] = {
        "mu": POOLED_STATISTICS.mean.numpy(),
        "sigma": POOLED_STATISTICS.covariance.numpy(),
        "mu_s": SPATIAL_STATISTICS.mean.numpy(),
        "sigma_s": SPATIAL_STATISTICS.covariance.numpy(),
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


BATCH = PIXELS.permute(0, 2, 3, 1).numpy()  # as ADM stores images


def photographs(folder: Path) -> Path:
    """The images as PNG files."""
    folder.mkdir()
    for number, image in enumerate(BATCH):
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


class TestNpz:
    @pytest.mark.parametrize("dtype", [np.float64, np.float32])
    def test_statistics(self, dtype: type) -> None:
        np.savez("reference.npz", **{name: array.astype(dtype) for name, array in statistics().items()})
        found = load("reference.npz")
        assert_statistics(found)
        assert found.pooled.mean.dtype == torch.float64
        assert (found.vectors, found.count) == (None, None)
        assert found.provenance["fingerprint"].startswith("sha256 ")

    def test_statistics_of_pooled_features_alone(self) -> None:
        np.savez("reference.npz", **statistics(mu_s=None, sigma_s=None))
        assert load("reference.npz").spatial is None

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_a_batch_of_images(self, save: Callable[..., None]) -> None:
        save("reference.npz", BATCH)  # as arr_0
        found = load("reference.npz", with_vectors=True, batch_size=8)
        assert_statistics(found)
        assert found.count == 20
        assert found.vectors is not None
        torch.testing.assert_close(found.vectors, FEATURES.pooled, **CLOSE)

    def test_a_batch_with_statistics_of_more_images(self) -> None:
        """Distances use the statistics; the images are worth their work for precision and recall alone."""
        extractor = Counting()
        np.savez("reference.npz", BATCH, **statistics(mu=POOLED_STATISTICS.mean.numpy() + 1))
        found = load("reference.npz", extractor)
        assert extractor.seen == 1  # to see how many features there are
        torch.testing.assert_close(found.pooled.mean, POOLED_STATISTICS.mean + 1)
        assert found.vectors is None
        found = load("reference.npz", extractor, with_vectors=True)
        torch.testing.assert_close(found.pooled.mean, POOLED_STATISTICS.mean + 1)
        assert found.vectors is not None
        torch.testing.assert_close(found.vectors, FEATURES.pooled, **CLOSE)
        assert found.provenance["features_of"] == "the file's 20 images"
        assert extractor.seen == 22
        load("reference.npz", extractor, with_vectors=True)
        assert extractor.seen == 23  # from the cache

    @pytest.mark.parametrize("with_vectors", [False, True])
    def test_the_images_tell_the_resolution_of_the_statistics_beside_them(self, with_vectors: bool) -> None:
        np.savez("reference.npz", BATCH, **statistics())
        with pytest.raises(InputError, match="holds images of 4×6 pixels, the samples have 4×4"):
            load_reference("reference.npz", EXTRACTOR, (3, 4, 4), with_vectors=with_vectors)

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_rows_from_the_middle(self, save: Callable[..., None]) -> None:
        """As a process reads them whose share does not begin with the first."""
        save("reference.npz", BATCH)
        with NpzReader(Path("reference.npz"), "file") as file, file.rows("arr_0") as read:
            np.testing.assert_array_equal(read(range(5, 7)), BATCH[5:7])
            np.testing.assert_array_equal(read(range(12, 20)), BATCH[12:])


def bomb() -> None:
    """A header that claims 8 TB, and nothing behind it."""
    np.savez("bad.npz", **statistics())
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f8", "fortran_order": False, "shape": (10**6, 10**6)}
    )
    with zipfile.ZipFile("bad.npz", "w") as archive:
        archive.writestr("mu.npy", header.getvalue())


def damaged() -> None:
    np.savez("bad.npz", **statistics())
    content = bytearray(Path("bad.npz").read_bytes())
    place = content.index(POOLED_STATISTICS.covariance.numpy().tobytes())
    content[place + 20] ^= 255
    Path("bad.npz").write_bytes(content)


def altered(**changes: Any) -> Callable[[], None]:
    return lambda: np.savez("bad.npz", **statistics(**changes))


def nan_in(array: Any) -> Any:
    broken = array.copy()
    broken.flat[1] = np.nan
    return broken


SIGMA = POOLED_STATISTICS.covariance.numpy()
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "nothing": (lambda: None, "reference: bad.npz: no such file"),
    "text": (lambda: Path("bad.npz").write_text("mu"), "reference: bad.npz: not a readable .npz file"),
    "empty": (lambda: Path("bad.npz").write_bytes(b""), "reference: bad.npz: not a readable .npz file"),
    "one array": (
        lambda: np.save("bad.npy", SIGMA) or Path("bad.npy").rename("bad.npz"),
        "reference: bad.npz: not a readable .npz file",
    ),
    "claims": (bomb, "reference: bad.npz: not a readable .npz file (mu.npy has 0 bytes"),
    "a flipped bit": (damaged, "reference: bad.npz: not a readable .npz file (Bad CRC-32"),
    "objects": (
        lambda: np.savez("bad.npz", mu=np.array([{}, None], dtype=object)),
        "reference: bad.npz: mu.npy contains Python objects, which are not read",
    ),
    "other arrays": (
        lambda: np.savez("bad.npz", samples=BATCH),
        "reference: bad.npz contains neither statistics (mu, sigma) nor images (arr_0), but samples",
    ),
    "no covariance": (altered(sigma=None), "reference: bad.npz has mu but no sigma"),
    "other features": (
        altered(mu=np.zeros(2048), sigma=np.eye(2048)),
        f"reference: bad.npz: mu must have shape ({POOLED},) for this extractor, got (2048,)",
    ),
    "a covariance of other features": (
        altered(sigma=np.eye(3)),
        f"reference: bad.npz: sigma must have shape ({POOLED}, {POOLED}) for this extractor, got (3, 3)",
    ),
    "whole numbers": (
        altered(sigma=np.eye(POOLED, dtype=np.int64)),
        "reference: bad.npz: sigma holds int64, not floating-point numbers",
    ),
    "no number": (
        altered(mu=nan_in(POOLED_STATISTICS.mean.numpy())),
        "reference: bad.npz: its statistics hold a number that is not finite",
    ),
    "an infinite covariance": (
        altered(sigma_s=np.full((SPATIAL, SPATIAL), np.inf)),
        "reference: bad.npz: its statistics hold a number that is not finite",
    ),
    "an asymmetric covariance": (
        altered(sigma=SIGMA + np.triu(np.ones_like(SIGMA), 1)),
        "reference: bad.npz: its covariance is not symmetric, entries differ by 1",
    ),
    "a negative variance": (
        altered(sigma=-SIGMA),
        "reference: bad.npz: its covariance has a negative variance",
    ),
    "images of another resolution": (
        lambda: np.savez("bad.npz", np.zeros((9, 8, 8, 3), np.uint8)),
        "reference: bad.npz holds images of 8×8 pixels, the samples have 4×6",
    ),
    "images in floating point": (
        lambda: np.savez("bad.npz", np.zeros((9, 4, 6, 3))),
        "reference: bad.npz: arr_0 must be uint8 images (N, H, W, 3), got float64 of shape (9, 4, 6, 3)",
    ),
    "images with channels first": (
        lambda: np.savez("bad.npz", PIXELS.numpy()),
        "reference: bad.npz: arr_0 must be uint8 images (N, H, W, 3), got uint8 of shape (20, 3, 4, 6)",
    ),
    "one image": (
        lambda: np.savez("bad.npz", BATCH[:1]),
        "reference: bad.npz has 1 images, at least 2 are needed",
    ),
    "images in the order of columns": (
        lambda: np.savez("bad.npz", np.asfortranarray(BATCH)),
        "reference: bad.npz: arr_0 is stored in Fortran order",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_npz(name: str) -> None:
    make, message = BAD[name]
    make()
    with pytest.raises(InputError) as caught:
        load("bad.npz")
    assert str(caught.value).startswith(message), str(caught.value)
    assert "\n" not in str(caught.value)


def test_npz_truncated_anywhere() -> None:
    np.savez("whole.npz", BATCH, **statistics())
    whole = Path("whole.npz").read_bytes()
    for percent in range(100):
        Path("bad.npz").write_bytes(whole[: len(whole) * percent // 100])
        with pytest.raises(InputError, match=r"^reference: bad.npz: not a readable .npz file"):
            load("bad.npz", with_vectors=True)


class Hostile:
    """Its pickle calls a function when it is loaded."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


class TestPickle:
    def statistics(self) -> dict[str, Any]:
        own = {"mu": POOLED_STATISTICS.mean.numpy(), "sigma": POOLED_STATISTICS.covariance.numpy()}
        other = {"mu": own["mu"] + 1, "sigma": 2 * own["sigma"]}
        return {"fid": own, "fd_dinov2": other}

    @pytest.mark.parametrize("protocol", [2, 4, 5])
    def test_the_extractor_decides_the_entry(self, protocol: int) -> None:
        Path("reference.pkl").write_bytes(pickle.dumps(self.statistics(), protocol))
        inception, dinov2 = (load("reference.pkl", Counting(name)) for name in ("inception", "dinov2"))
        assert torch.equal(inception.pooled.mean, POOLED_STATISTICS.mean)
        assert torch.equal(dinov2.pooled.mean, POOLED_STATISTICS.mean + 1)
        torch.testing.assert_close(dinov2.pooled.covariance, 2 * POOLED_STATISTICS.covariance)
        assert inception.spatial is None
        assert inception.vectors is None

    @pytest.mark.parametrize(
        "content",
        [
            Hostile(os.system, "touch harmed"),
            {"fid": Hostile(eval, "open('harmed', 'w')")},
            {"fid": {"mu": Hostile(Path.touch, Path("harmed")), "sigma": np.eye(POOLED)}},
            {"fid": {"mu": Hostile(bytearray, 10**12), "sigma": np.eye(POOLED)}},
        ],
    )
    def test_hostile_ones_do_nothing(self, content: Any) -> None:
        Path("reference.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(InputError, match=r"^reference: reference.pkl: ") as caught:
            load("reference.pkl", Counting("inception"))
        assert "\n" not in str(caught.value)
        assert not Path("harmed").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([1, 2], "it has no entry 'fid' for the extractor inception, but list"),
            ({"fd_dinov2": {}}, "it has no entry 'fid' for the extractor inception, but ['fd_dinov2']"),
            ({"fid": {"mu": np.zeros(POOLED)}}, "its entry 'fid' has no array 'sigma'"),
            ({"fid": {"mu": [0.0] * POOLED, "sigma": SIGMA}}, "its entry 'fid' has no array 'mu'"),
            (
                {"fid": {"mu": np.zeros(8), "sigma": np.eye(8)}},
                f"mu must have shape ({POOLED},) for this extractor, got (8,)",
            ),
            ({"fid": {"mu": np.zeros(POOLED), "sigma": np.triu(SIGMA)}}, "its covariance is not symmetric"),
        ],
    )
    def test_other_contents(self, content: Any, message: str) -> None:
        Path("reference.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(InputError) as caught:
            load("reference.pkl", Counting("inception"))
        assert str(caught.value).startswith(f"reference: reference.pkl: {message}")

    def test_an_extractor_that_such_files_do_not_know(self) -> None:
        Path("reference.pkl").write_bytes(pickle.dumps(self.statistics()))
        with pytest.raises(InputError, match="statistics of inception and dinov2 only, not of small"):
            load("reference.pkl")


class TestImages:
    def test_statistics_of_a_folder(self, place: Path) -> None:
        found = load(str(photographs(place / "real")), with_vectors=True, batch_size=7)
        assert_statistics(found)
        assert found.count == 20
        assert found.vectors is not None
        # Every image once, in whatever order.
        torch.testing.assert_close(
            found.vectors.sort(dim=0).values, FEATURES.pooled.sort(dim=0).values, **CLOSE
        )
        assert found.provenance["crop"] == "centre"  # dhariwal makes squares

    def test_features_and_distance_known_by_hand(self, place: Path) -> None:
        """Images of one colour: black, red, green and yellow, at full and at a fifth of the brightness."""

        class MeanColour(SmallExtractor):
            def forward(self, images: Tensor) -> Features:
                return Features(images.float().mean(dim=(2, 3)) / 255, None, None)

        found = []
        for name, full in (("bright", 255), ("dark", 51)):
            (place / name).mkdir()
            for number in range(4):
                colour = (full * (number % 2), full * (number // 2), 0)
                Image.new("RGB", (40, 30), colour).save(place / name / f"{number}.png")
            found.append(load(name, MeanColour()).pooled)
            level = full / 255
            # Float32 features, 1e-7; n − 1 = 3.
            expected = torch.tensor([level / 2, level / 2, 0.0], dtype=torch.float64)
            torch.testing.assert_close(found[-1].mean, expected, rtol=1e-6, atol=1e-7)
            variance = torch.tensor([level**2 / 3, level**2 / 3, 0.0], dtype=torch.float64)
            torch.testing.assert_close(found[-1].covariance, variance.diag(), rtol=1e-6, atol=1e-7)
        # 2 (1/2 − 1/10)² of the means, 2 (1 − 1/5)² / 3 of the deviations.
        assert frechet_distance(*found) == pytest.approx(0.32 + 1.28 / 3, rel=1e-6)

    def test_grey_samples_have_a_grey_reference(self, place: Path) -> None:
        folder = photographs(place / "real")
        found = load_reference(str(folder), EXTRACTOR, (1, 4, 4))
        assert found is not None
        assert found.provenance["crop"] == "dhariwal"
        assert not torch.allclose(found.pooled.mean, POOLED_STATISTICS.mean, atol=1e-3)

    def test_grey_is_that_of_pillow(self, place: Path) -> None:
        """The same bytes as data sets of grey images hold, which convert before they crop."""
        grey = [np.asarray(Image.fromarray(image).convert("L")) for image in BATCH]
        expected = torch.from_numpy(np.stack(grey))[:, None].expand(-1, 3, -1, -1)
        found = load_reference(str(photographs(place / "real")), EXTRACTOR, (1, 4, 6))
        assert found is not None
        torch.testing.assert_close(found.pooled.mean, fit_gaussian(EXTRACTOR(expected).pooled).mean, **CLOSE)

    def test_processes_decode_their_own_share_and_keep_no_pixels(self, place: Path) -> None:
        folder = str(photographs(place / "real"))

        class Beside(Processes):
            """One of several that never hears of the others."""

            def gather(self, tensor: Tensor) -> list[Tensor]:
                return [tensor]

            def as_first(self, answer: bool) -> bool:
                return answer

            def wait(self) -> None:
                pass

        extractors = [Counting() for _ in range(3)]
        for rank, extractor in enumerate(extractors):
            processes = Beside(rank, 3)
            load_reference(folder, extractor, (3, 64, 64), batch_size=10, processes=processes)
        # Two batches, and the one black image that tells the sizes.
        assert [extractor.seen for extractor in extractors] == [11, 11, 1]
        kept = sum(file.stat().st_size for file in (place / "datasets").rglob("*") if file.is_file())
        assert kept < 20 * 64 * 64, "lists of files, no images of 64 × 64"

    def test_fewer_vectors_than_images(self, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reference, "MOST_VECTORS", 9)
        found = load(str(photographs(place / "real")), with_vectors=True, batch_size=4)
        assert found.vectors is not None
        assert found.vectors.shape == (9, POOLED)
        assert_statistics(found)

    def test_bad_sources(self, place: Path) -> None:
        with pytest.raises(InputError, match=r"^reference: ./nowhere does not exist"):
            load("./nowhere")
        (place / "empty").mkdir()
        with pytest.raises(InputError, match=r"^reference: empty holds no images"):
            load("empty")
        photographs(place / "real")
        with pytest.raises(InputError, match=r"^reference_split: "):
            load("real", split="test")
        with pytest.raises(InputError, match="batch_size: must be at least 1, got 0"):
            load("real", batch_size=0)
        (place / "real/7.png").write_bytes(b"no image")
        with pytest.raises(InputError, match=r"^reference: .*real/7.png: not an image"):
            load("real")
        (place / "latents").mkdir()
        for number in range(2):
            np.save(place / f"latents/{number}.npy", np.ones((8, 4, 4), np.float32))
        labels = [[f"{number}.npy", number] for number in range(2)]
        (place / "latents/dataset.json").write_text(json.dumps({"labels": labels}))
        with pytest.raises(InputError, match=r"^reference: latents contains latents, must contain images"):
            load("latents")


class TestCache:
    def files(self) -> list[Path]:
        return sorted(Path("home/tvmatch/references").iterdir())

    def test_a_second_use_computes_nothing(self, place: Path) -> None:
        folder, extractor = str(photographs(place / "real")), Counting()
        first = load(folder, extractor)
        assert extractor.seen == 21
        again = load(folder, extractor)
        assert extractor.seen == 22  # the one black image that tells the sizes
        assert torch.equal(again.pooled.mean, first.pooled.mean)
        assert torch.equal(again.pooled.covariance, first.pooled.covariance)
        assert again.count == first.count == 20
        assert again.provenance == first.provenance
        # Asked for features as well, it computes them once.
        load(folder, extractor, with_vectors=True)
        assert extractor.seen == 43
        with_vectors = load(folder, extractor, with_vectors=True)
        assert extractor.seen == 44
        assert with_vectors.vectors is not None
        assert len(self.files()) == 1
        load(folder, Counting(), cache=place / "other")
        assert len(list((place / "other").iterdir())) == 1

    def test_what_changes_the_statistics_changes_the_name(self, place: Path) -> None:
        folder = photographs(place / "real")
        load(str(folder))
        load(str(folder), Counting(fingerprint="6" * 64))
        load(str(folder), Counting(name="other"))
        load_reference(str(folder), EXTRACTOR, (3, 4, 4))
        load(str(folder), split="train[:9]")
        assert len(self.files()) == 5
        (folder / "0.png").unlink()
        assert load(str(folder)).count == 19
        assert len(self.files()) == 6
        Image.fromarray(BATCH[0] // 2).save(folder / "1.png")
        load(str(folder))
        assert len(self.files()) == 7
        load(str(folder))
        assert len(self.files()) == 7

    def test_the_same_images_elsewhere(self, place: Path) -> None:
        folder, extractor = photographs(place / "real"), Counting()
        load(str(folder), extractor)
        folder.rename(place / "moved")
        assert load("moved", extractor).provenance["source"] == "moved"
        assert extractor.seen == 22

    def test_data_sets_on_the_hub_are_known_by_their_commit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        commits: list[str] = ["abc", "def"]

        class Information:
            @property
            def sha(self) -> str:
                return commits.pop(0)

        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Information())
        names = [reference.source_fingerprint("someone/photographs") for _ in range(3)]
        assert names == ["commit abc", "commit def", None]  # nobody knows: nothing is kept

    @pytest.mark.parametrize("percent", [0, 1, 30, 60, 99])
    def test_a_damaged_file_is_computed_again(
        self, percent: int, place: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder, extractor = str(photographs(place / "real")), Counting()
        load(folder, extractor)
        (file,) = self.files()
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) * percent // 100])
        assert_statistics(load(folder, extractor))
        assert extractor.seen == 42
        assert "reference statistics are computed again" in caplog.text
        assert_statistics(load(folder, extractor))
        assert extractor.seen == 43

    def test_a_cache_that_cannot_be_written(self, place: Path, caplog: pytest.LogCaptureFixture) -> None:
        (place / "file").write_text("")
        assert_statistics(load(str(photographs(place / "real")), cache=place / "file"))
        assert "reference statistics are not cached" in caplog.text

    def test_the_file_itself_as_a_reference(self, place: Path) -> None:
        load(str(photographs(place / "real")), with_vectors=True)
        file = str(self.files()[0])
        found = load(file)
        assert_statistics(found)
        assert found.vectors is not None
        assert found.count == 20
        with np.load(file) as arrays:  # other programs read it too
            assert {"mu", "sigma"} <= set(arrays)
            assert json.loads(str(arrays["provenance"]))["extractor"] == "small"
        with pytest.raises(InputError) as caught:
            load(file, Counting(fingerprint="6" * 64))
        assert str(caught.value) == (
            f"reference: {file} was computed with extractor fingerprint 555555555555…, this evaluation has "
            "666666666666…"
        )
        with pytest.raises(InputError, match=r"was computed with extractor small, this evaluation has other"):
            load(file, Counting(name="other"))
        with pytest.raises(InputError, match=r"with resolution \[4, 6\], this evaluation has \[4, 4\]"):
            load_reference(file, EXTRACTOR, (3, 4, 4))
