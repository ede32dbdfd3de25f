"""Pictures: every pixel of a grid, files that are whole or absent, drawings that survive odd input."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from tvmatch.errors import InputError
from tvmatch.pictures import image_grid, points_picture, save_png, training_curves
from tvmatch.pictures.plots import _natural, _running_mean
from tvmatch.seeds import generator

GAP = 4


def uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator(0, "picture tests"))


class TestGrid:
    @settings(max_examples=40, deadline=None)
    @given(
        count=st.integers(1, 7),
        channels=st.sampled_from([1, 3]),
        height=st.integers(1, 5),
        width=st.integers(1, 5),
        columns=st.integers(1, 9),
    )
    def test_every_pixel(self, count: int, channels: int, height: int, width: int, columns: int) -> None:
        images = uniform(count, channels, height, width)
        grid = image_grid(images, columns)
        scale = round(56 / max(height, width))
        assert grid.mode == ("L" if channels == 1 else "RGB")
        pixels = np.asarray(grid).reshape(grid.height, grid.width, channels)
        expected = np.full_like(pixels, 255)  # the gaps and the empty places of the last row are white
        for k in range(count):
            for row, column in np.ndindex(height, width):
                y = GAP + (k // columns) * (height * scale + GAP) + row * scale
                x = GAP + (k % columns) * (width * scale + GAP) + column * scale
                expected[y : y + scale, x : x + scale] = np.round(images[k, :, row, column].numpy() * 255)
        np.testing.assert_array_equal(pixels, expected)
        assert grid.width == GAP + min(columns, count) * (width * scale + GAP)
        assert grid.height == GAP + math.ceil(count / columns) * (height * scale + GAP)

    def test_other_numbers_of_channels_are_shown_side_by_side(self) -> None:
        images = uniform(3, 4, 5, 2)
        split = torch.cat(list(images.split(1, dim=1)), dim=3)
        np.testing.assert_array_equal(image_grid(images, 2), image_grid(split, 2))

    @pytest.mark.parametrize(
        ("size", "scale"),
        [((8, 8), 7), ((28, 28), 2), ((32, 32), 2), ((4, 16), 4), ((64, 64), 1), ((256, 100), 1)],
    )
    def test_small_images_are_enlarged_and_large_ones_are_not(
        self, size: tuple[int, int], scale: int
    ) -> None:
        grid = image_grid(uniform(1, 1, *size), 1)
        assert (grid.height - 2 * GAP, grid.width - 2 * GAP) == (size[0] * scale, size[1] * scale)

    def test_bad_input(self) -> None:
        good = uniform(2, 1, 3, 3)
        for images in (uniform(2, 3, 3), uniform(2, 0, 3, 3), torch.zeros(0, 1, 3, 3)):
            with pytest.raises(InputError, match="images: must have shape"):
                image_grid(images, 2)
        for value in (-0.1, 1.1, math.nan, math.inf):
            images = good.clone()
            images[1, 0, 2, 2] = value
            with pytest.raises(InputError, match=r"images: must lie in \[0, 1\]"):
                image_grid(images, 2)
        with pytest.raises(InputError, match="columns: must be at least 1, got 0"):
            image_grid(good, 0)


class TestSaving:
    def test_a_png_reads_back_and_nothing_else_is_left(self, tmp_path: Path) -> None:
        image = image_grid(uniform(4, 3, 5, 5), 2)
        path = tmp_path / "new" / "samples.png"
        save_png(image, path)
        with Image.open(path) as read:
            assert read.format == "PNG"
            np.testing.assert_array_equal(np.asarray(read), np.asarray(image))
        assert [file.name for file in path.parent.iterdir()] == ["samples.png"]

    def test_a_failed_save_keeps_the_former_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "samples.png"
        image = image_grid(uniform(1, 1, 5, 5), 1)
        save_png(image, path)
        before = path.read_bytes()

        def full_disk(self: Image.Image, file: Path, **_: object) -> None:
            file.write_bytes(b"half a picture")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Image.Image, "save", full_disk)
        with pytest.raises(OSError, match="No space left"):
            save_png(image, path)
        assert path.read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == ["samples.png"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


class TestPoints:
    data = torch.tensor([[-1.0, -1.0], [1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])

    def draw(self, path: Path, samples: dict[int, Tensor], trajectories: Tensor) -> np.ndarray:
        points_picture(self.data, samples, trajectories, path)
        return pixels(path)

    def test_one_panel_for_data_every_number_of_steps_and_trajectories(self, tmp_path: Path) -> None:
        paths = torch.stack([torch.zeros(3, 2), torch.ones(3, 2)])
        one = self.draw(tmp_path / "one.png", {1: self.data}, paths)
        three = self.draw(tmp_path / "three.png", {1: self.data, 2: self.data, 4: self.data}, paths)
        assert one.shape[0] == three.shape[0]
        assert one.shape[1] * 5 == three.shape[1] * 3  # panels of one width: three and five of them

    def test_paths_start_in_orange_and_grow_bluer(self, tmp_path: Path) -> None:
        # Eight steps from noise at the left to samples at the right.
        heights = torch.linspace(-1, 1, 9)
        paths = torch.stack(
            [torch.stack([torch.full((9,), x), heights], 1) for x in torch.linspace(-3, 3, 9)]
        )
        picture = self.draw(tmp_path / "paths.png", {}, paths)
        panel = picture[: int(0.9 * picture.shape[0]), picture.shape[1] // 2 :]  # without the legend
        blueness, width = panel[..., 2] - panel[..., 0], panel.shape[1]
        orange = np.argwhere(blueness < -80)[:, 1]
        assert len(orange) > 50
        assert (orange < width / 3).all()
        early, late = blueness[:, width // 4 : width // 2], blueness[:, width // 2 : 3 * width // 4]
        assert late.max() > 1.5 * early.max() > 0

    def test_samples_outside_the_window_are_told(self, tmp_path: Path) -> None:
        paths = torch.zeros(2, 1, 2)
        inside = self.draw(tmp_path / "inside.png", {1: self.data}, paths)
        # The far point itself is not drawn: what differs is one point less, and the note at the bottom left.
        far = self.data.clone()
        far[1] = 100.0
        outside = self.draw(tmp_path / "outside.png", {1: far}, paths)
        changed = np.argwhere((inside != outside).any(-1))
        height, width = inside.shape[:2]
        note = (changed[:, 0] > 0.75 * height) & (changed[:, 1] > width / 3) & (changed[:, 1] < width / 2)
        assert note.sum() > 50

    def test_threads_do_not_disturb_each_other(self, tmp_path: Path) -> None:
        paths = uniform(5, 10, 2)
        clouds = [uniform(50, 2) + k for k in range(4)]

        def draw(name: str, k: int) -> bytes:
            points_picture(clouds[k], {1: clouds[k]}, paths, tmp_path / f"{name}{k}.png")
            return (tmp_path / f"{name}{k}.png").read_bytes()

        alone = [draw("alone", k) for k in range(4)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(draw, ["together"] * 4, range(4)))
        assert together == alone
        assert len(set(alone)) == 4

    def test_bad_input(self, tmp_path: Path) -> None:
        path, paths = tmp_path / "points.png", torch.zeros(2, 3, 2)
        with pytest.raises(InputError, match="data: must have shape"):
            points_picture(torch.zeros(4, 3), {}, paths, path)
        with pytest.raises(InputError, match=r"samples\[2\]: has a non-finite coordinate"):
            points_picture(self.data, {2: torch.full((4, 2), math.nan)}, paths, path)
        for wrong in (torch.zeros(1, 3, 2), torch.zeros(2, 3), torch.zeros(2, 3, 1)):
            with pytest.raises(InputError, match="trajectories: must be"):
                points_picture(self.data, {}, wrong, path)
        with pytest.raises(InputError, match="trajectories: must have shape"):
            points_picture(self.data, {}, torch.zeros(2, 0, 2), path)
        assert not path.exists()


def history(count: int = 40) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for step in range(count):
        row = {"step": step, "loss": 2 / (step + 1), "terminal": 1.2 / (step + 1), "flow": 0.8 / (step + 1)}
        row |= {"gradient_norm": 1 + math.sin(step) / 2, "learning_rate": 1e-3}
        if step % 10 == 0:  # written less often
            row |= {f"modulation_norm/block {block}": 1.0 + block + step for block in range(12)}
            row |= {f"tangent_norm/{low:.1f}-{low + 0.5:.1f}": 1 + low for low in (0.0, 0.5)}
        rows.append(row)
    return rows


class TestCurves:
    def draw(self, path: Path, rows: list[dict[str, float]]) -> np.ndarray:
        training_curves(rows, path)
        return pixels(path)

    def test_a_panel_for_every_kind_of_key_there_is(self, tmp_path: Path) -> None:
        full = history()
        losses = [{key: row[key] for key in ("step", "loss")} for row in full]
        two = [{key: row[key] for key in ("step", "loss", "gradient_norm")} for row in full]
        panel = self.draw(tmp_path / "1.png", losses).shape
        assert self.draw(tmp_path / "2.png", two).shape == (panel[0], 2 * panel[1], 3)
        assert self.draw(tmp_path / "5.png", full).shape == (2 * panel[0], 3 * panel[1], 3)

    def test_zeros_and_non_finite_numbers_are_left_out(self, tmp_path: Path) -> None:
        clean = history()
        clean = [row for row in clean if row["step"] not in (7, 8, 9)]
        spoilt = history()
        for step, value in ((7, math.nan), (8, 0.0), (9, math.inf)):
            spoilt[step] = {key: value if key != "step" else step for key in spoilt[step]}
        np.testing.assert_array_equal(
            self.draw(tmp_path / "a.png", clean), self.draw(tmp_path / "b.png", spoilt)
        )

    def test_order_of_keys_does_not_matter(self, tmp_path: Path) -> None:
        """But for the loss and its terms, which are drawn in the log's order."""
        first = ("loss", "terminal", "flow")
        turned = [{name: row[name] for name in first} | dict(reversed(row.items())) for row in history()]
        a, b = self.draw(tmp_path / "a.png", history()), self.draw(tmp_path / "b.png", turned)
        np.testing.assert_array_equal(a, b)

    def test_a_single_step_is_visible(self, tmp_path: Path) -> None:
        picture = self.draw(tmp_path / "one.png", [{"step": 3, "gradient_norm": 0.5}])
        middle = picture[picture.shape[0] // 4 : picture.shape[0] // 2 + 60, picture.shape[1] // 4 :]
        assert (middle.sum(-1) < 200).sum() > 20  # the dark marker; grid lines are pale

    def test_nothing_to_draw(self, tmp_path: Path) -> None:
        for rows in ([], [{"step": 1.0}], [{"step": 1.0, "loss": math.nan}], [{"loss": 1.0}]):
            with pytest.raises(InputError, match="history"):
                training_curves(rows, tmp_path / "none.png")
        assert not list(tmp_path.iterdir())


def test_blocks_are_in_order_of_their_numbers() -> None:
    keys = [
        "modulation_norm/block 10",
        "modulation_norm/block 9",
        "modulation_norm/block 1",
        "modulation_norm/head",
    ]
    ordered = [
        "modulation_norm/block 1",
        "modulation_norm/block 9",
        "modulation_norm/block 10",
        "modulation_norm/head",
    ]
    assert sorted(keys, key=_natural) == ordered


def test_running_mean() -> None:
    line = np.arange(300.0)
    smooth = _running_mean(line)
    np.testing.assert_allclose(smooth[5:-5], line[5:-5])  # centred: a straight line is not delayed
    assert smooth[0] == np.mean(line[:6])
    assert smooth[-1] == np.mean(line[-6:])
    alternating = _running_mean((-1.0) ** line)
    assert np.abs(alternating[5:-5]).max() == pytest.approx(1 / 11)  # eleven values of alternating sign
    np.testing.assert_array_equal(_running_mean(line[:20]), line[:20])  # too few to smooth


@pytest.mark.parametrize("variables", [{"MPLBACKEND": "tkagg"}, {}])
def test_drawing_needs_neither_pyplot_nor_a_display(variables: dict[str, str], tmp_path: Path) -> None:
    code = (
        "import sys; from tvmatch.pictures import training_curves;"
        f"training_curves([dict(step=0, loss=1.0), dict(step=1, loss=0.5)], {str(tmp_path / 'a.png')!r});"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    # An unusable backend: anything that went through the global state would fail on it.
    finished = subprocess.run([sys.executable, "-c", code], env=variables, check=False)
    assert finished.returncode == 0
    assert (tmp_path / "a.png").exists()
