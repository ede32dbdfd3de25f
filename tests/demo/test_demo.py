"""The page of `tvmatch demo`: what it computes, what it offers, and the real command in a real browser."""

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers import randomize_, small_dit
from PIL import Image
from runs import environment
from torch import Tensor

import tvmatch.demo
from tvmatch.cli import main
from tvmatch.data.spec import AutoencoderInfo, DataSpec
from tvmatch.demo.generation import Demonstration, Request, steps_name, time_name
from tvmatch.errors import InputError
from tvmatch.models import MLP, MLPConfig
from tvmatch.pictures import image_grid
from tvmatch.sampling import sample_noise
from tvmatch.trained_model import TrainedModel
from tvmatch.trained_model.files import Guidance

NAMES = ("ant", "bee", "cow")


def image_model(
    names: tuple[str, ...] | None = NAMES, guidance: Guidance = (1.5, 3.0), side: int = 8
) -> TrainedModel:
    network = randomize_(small_dit((3, side, side), len(names or ()), patch_size=side // 4))
    spec = DataSpec("image", (3, side, side), names, (0.5,) * 3, (0.25,) * 3)
    return TrainedModel(network, spec, scaled=True, guidance=guidance, step=1200)


def points_model(coordinates: int = 2) -> TrainedModel:
    network = randomize_(MLP(MLPConfig(hidden_size=8, depth=1, time_frequencies=4), (coordinates,)))
    spec = DataSpec("points", (coordinates,), None, (1.0,) * coordinates, (2.0,) * coordinates)
    return TrainedModel(network, spec, scaled=True, guidance=1.0)


def latents_model() -> TrainedModel:
    info = AutoencoderInfo("somewhere", "", (3, 128, 128))
    spec = DataSpec("latents", (4, 8, 8), None, (0.0,) * 4, (1.0,) * 4, info)
    return TrainedModel(small_dit((4, 8, 8), 0), spec, scaled=True, guidance=2.0)


def test_one_result_for_each_number_of_steps() -> None:
    model = image_model()
    shown = Demonstration(model)
    results = list(shown.results(shown.request(seed=7, steps=[4, 1, 2, 1], count=5, label=1, guidance=2.0)))
    assert [result.steps for result in results] == [1, 2, 4]
    for result in results:
        expected = model.sample("bee", count=5, steps=result.steps, guidance=2.0, seed=7)
        assert torch.equal(result.samples, expected)  # one batch either way
        assert result.seconds > 0
        assert result.milliseconds == pytest.approx(1000 * result.seconds / 5)
    assert not torch.equal(results[0].samples, results[1].samples)


def test_a_sample_has_the_same_noise_at_every_number_of_steps() -> None:
    """A new network is zero: the samples are the noise itself."""
    model = image_model()
    model.network = small_dit((3, 8, 8), 3, patch_size=2)
    shown = Demonstration(model)
    noise = model.spec.denormalize(sample_noise(3, range(20), (3, 8, 8))).clamp(0, 1)
    for result in shown.results(shown.request(seed=3.0, steps=range(1, 9), count=20)):
        assert torch.equal(result.samples, noise), result.steps


def test_the_clock_starts_after_one_evaluation_for_a_new_number_of_samples() -> None:
    shown = Demonstration(image_model())
    sizes: list[int] = []
    shown.model.network.register_forward_hook(lambda _, inputs, output: sizes.append(len(inputs[0])))
    evaluations = []
    for count in (2, 2, 3, 2):
        list(shown.results(shown.request(seed=0, steps=[1, 3], count=count)))
        evaluations.append(sizes.copy())
        sizes.clear()
    assert evaluations == [[2] * 5, [2] * 4, [3] * 5, [2] * 4]


def test_drawing_tells_whether_samples_are_being_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Demonstration(image_model())
    during = []
    shown.model.network.register_forward_hook(lambda *_: during.append(shown.drawing))
    request = shown.request(seed=0, steps=[1], count=2)
    assert not shown.drawing
    list(shown.results(request))
    assert during == [True, True]
    assert not shown.drawing

    def too_large(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(shown.model, "sample", too_large)
    with pytest.raises(InputError, match=r"images: 2 do not fit into the memory of cpu"):
        list(shown.results(request))
    assert not shown.drawing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed: must be a whole number from 0 to 9007199254740991, got -1"),
        ({"seed": 1.5}, r"seed: .* got 1\.5"),
        ({"seed": None}, "seed: .* got nothing"),
        ({"seed": 1e30}, r"seed: .* got 1e\+30"),
        ({"seed": float("nan")}, "seed: .* got nan"),
        ({"seed": "x"}, "seed: .* got 'x'"),
        ({"seed": True}, "seed: .* got True"),
        ({"steps": []}, "steps: choose at least one"),
        ({"steps": None}, "steps: choose at least one"),
        ({"steps": [1, 9]}, "steps: .* from 1 to 8, got 9"),
        ({"steps": [0]}, "steps: .* got 0"),
        ({"count": 0}, "images: .* from 1 to 64, got 0"),
        ({"count": 65}, "images: .* got 65"),
        ({"count": 2.5}, r"images: .* got 2\.5"),
        ({"label": 3}, r"labels: 3 is outside 0 … 2"),
        ({"label": -1}, r"labels: -1 is outside"),
        ({"label": "dog"}, "labels: no class is named 'dog'"),
        ({"guidance": 5}, "guidance: trained for 1.5 to 3, got 5"),
        ({"guidance": float("nan")}, "guidance: trained for 1.5 to 3, got nan"),
        ({"guidance": "2"}, "guidance: must be a number, got '2'"),
    ],
)
def test_bad_values(change: dict[str, Any], message: str) -> None:
    shown = Demonstration(image_model())
    good: dict[str, Any] = {"seed": 0, "steps": [1, 2], "count": 4, "label": None, "guidance": None}
    assert len(list(shown.results(shown.request(**good)))) == 2
    with pytest.raises(InputError, match=message):
        list(shown.results(shown.request(**(good | change))))


def test_pictures_of_images_are_grids() -> None:
    shown = Demonstration(image_model())
    samples = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(np.asarray(shown.picture(samples)), np.asarray(image_grid(samples, 3)))
    with pytest.raises(InputError, match="images: must lie in"):
        shown.picture(samples / 0 * 0)


def test_points_lie_where_they_belong_whatever_the_others() -> None:
    """The window is the mean ± 2.5 standard deviations of the data: (1, 1) ± 5."""
    shown = Demonstration(points_model())
    for others in ([], [[-3.5, -3.5]], [[40.0, 0.0]]):
        picture = np.asarray(shown.picture(torch.tensor([[3.0, 2.0], *others]))).astype(float)
        height, width, _ = picture.shape
        ink = 255 - picture.mean(2)
        ink[: height // 5 * 4, : width // 5] = 0  # nothing but `others` is at the left and below
        ink[height // 5 * 4 :] = 0
        rows, columns = np.indices(ink.shape) + 0.5
        x, y = (columns * ink).sum() / ink.sum() / width, 1 - (rows * ink).sum() / ink.sum() / height
        assert (x, y) == (pytest.approx(0.7, abs=1 / width), pytest.approx(0.6, abs=1 / height))  # a pixel
    with pytest.raises(InputError, match="points: has a non-finite coordinate"):
        shown.picture(torch.tensor([[0.0, torch.inf]]))


def test_models_that_cannot_be_shown() -> None:
    with pytest.raises(InputError, match="autoencoder: this model generates latents"):
        Demonstration(latents_model())
    with pytest.raises(InputError, match=r"only points in the plane .* 3 numbers"):
        Demonstration(points_model(3))


def test_facts_and_defaults() -> None:
    assert Demonstration(image_model()).facts() == {
        "network": "DiT",
        "parameters": f"{sum(p.numel() for p in image_model().network.parameters()):,}",
        "images": "8 × 8 RGB",
        "classes": "3",
        "guidance weight": "1.5 to 3",
        "trained": "1,200 steps",
        "runs on": "CPU",
    }
    latents = latents_model()
    latents.decoder = lambda x: x.new_zeros(len(x), 3, 128, 128)
    shown = Demonstration(latents)
    facts = shown.facts()
    assert (facts["images"], facts["latents"]) == ("128 × 128 RGB", "8 × 8 of 4 channels")
    assert (facts["classes"], facts["guidance weight"]) == ("none", "2")
    assert Demonstration(image_model()).default_count > shown.default_count  # large images, few of them
    request = shown.request(seed=0, steps=[2], count=shown.default_count)
    assert request == Request(label=None, seed=0, steps=(2,), count=4, guidance=None)
    (result,) = shown.results(request)
    assert result.samples.shape == (4, 3, 128, 128)
    assert Demonstration(points_model()).facts()["points"] == "in the plane"


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (0.01234, "0.0123 ms"),
        (1.0, "1 ms"),
        (45.67, "45.7 ms"),
        (999.4, "999 ms"),
        (999.6, "1 s"),
        (7891, "7.89 s"),
    ],
)
def test_names_of_times(milliseconds: float, text: str) -> None:
    assert time_name(milliseconds) == text


def test_names_of_steps() -> None:
    assert [steps_name(n) for n in (1, 2, 300_000)] == ["1 step", "2 steps", "300,000 steps"]


# From here on with Gradio.


def labels_of_controls(model: TrainedModel) -> list[str]:
    pytest.importorskip("gradio", reason='the page needs pip install "tvmatch[demo]"')
    from tvmatch.demo.page import build_page

    components = build_page(Demonstration(model), "model").config["components"]
    kinds = {"dropdown", "number", "checkboxgroup", "slider"}
    return [component["props"]["label"] for component in components if component["type"] in kinds]


def test_only_what_the_model_takes_is_asked() -> None:
    assert labels_of_controls(image_model()) == ["Class", "Seed", "Steps", "Images", "Guidance weight"]
    assert labels_of_controls(image_model(None, 2.0)) == ["Seed", "Steps", "Images"]
    assert labels_of_controls(points_model()) == ["Seed", "Steps", "Points"]


def test_without_gradio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # the command sets it
    for name in ("gradio", "fastapi", "uvicorn"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("page", "server"):
        monkeypatch.delitem(sys.modules, f"tvmatch.demo.{name}", raising=False)
        monkeypatch.delattr(tvmatch.demo, name, raising=False)
    assert main(["demo", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        'tvmatch: error: demo: the package gradio is missing; run: pip install "tvmatch[demo]"\n'
    )


def test_bad_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # the command sets it
    pytest.importorskip("gradio", reason='the page needs pip install "tvmatch[demo]"')
    image_model().save(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for options, message in (
            (
                [f"--port={port}"],
                f"port: {port} is in use on 127.0.0.1; choose another, or 0 for any free port",
            ),
            (["--port=65536"], "port: must be from 0 to 65535, got 65536"),
            (["--host=127.0.0.1.5", "--port=0"], "host: cannot listen on '127.0.0.1.5'"),
        ):
            assert main(["demo", str(tmp_path), *options]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"tvmatch: error: {message}"), error
            assert error.count("\n") == 1
    (tmp_path / "points").mkdir()
    points_model(3).save(tmp_path / "points")
    assert main(["demo", str(tmp_path / "points"), "--port=0"]) == 2
    assert "only points in the plane" in capsys.readouterr().err


def test_an_address_for_a_browser_on_this_machine() -> None:
    pytest.importorskip("gradio", reason='the page needs pip install "tvmatch[demo]"')
    from tvmatch.demo.server import listen, url

    for host, shown in (("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("0.0.0.0", "localhost")):
        with listen(host, 0) as listening:
            if listening.family == socket.AF_INET:  # of localhost, the machine decides
                assert url(listening) == f"http://{shown}:{listening.getsockname()[1]}/"
            else:
                assert url(listening) == f"http://[::1]:{listening.getsockname()[1]}/"


class Served(NamedTuple):
    """`tvmatch demo` in a process of its own."""

    url: str
    model: TrainedModel


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """It must end by Ctrl-C, in silence, leaving no file, and have asked nothing of the internet."""
    pytest.importorskip("gradio", reason='the page needs pip install "tvmatch[demo]"')
    model = image_model()
    checkpoint, temporary = tmp_path / "bugs", tmp_path / "temporary"
    checkpoint.mkdir()
    temporary.mkdir()
    model.save(checkpoint)
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        surroundings = environment() | {"TMPDIR": str(temporary), "NO_PROXY": "", "no_proxy": ""}
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
            surroundings |= {name: address, name.lower(): address}
        surroundings.pop("GRADIO_ANALYTICS_ENABLED", None)
        # A shell starts background jobs with SIGINT ignored, and tests inherit that.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            [sys.executable, "-m", "tvmatch", "demo", str(checkpoint), "--port=0", "--device=cpu"],
            cwd=tmp_path,
            env=surroundings,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        signal.signal(signal.SIGINT, before)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("tvmatch demo: http://127.0.0.1:"), (line, process.poll())
            yield Served(line.split()[2], model)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
            assert (process.returncode, output, errors) == (0, "", "")
            left = [path.name for path in temporary.iterdir() if not path.name.startswith("torch")]
            assert left == []
            assert sorted(path.name for path in tmp_path.iterdir()) == ["bugs", "temporary"]
            proxy.setblocking(False)
            with pytest.raises(BlockingIOError):  # nobody is at the door
                proxy.accept()
        finally:
            process.kill()
            process.communicate()


CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]


@pytest.fixture
def browser_page() -> Iterator[Any]:
    """A page of headless Chromium, the system's own."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="driving a browser needs pip install playwright"
    )
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        yield browser.new_page(viewport={"width": 1280, "height": 900})
        browser.close()


def wait_for(page: Any, text: str) -> None:
    """Until the line under the pictures has `text`, and the pictures that came with it are there."""
    program = """text => {
        const line = document.querySelector('#status')?.innerText ?? '';
        const images = [...document.querySelectorAll('#results .result:has(.caption) img')];
        const name = `seed_${line.match(/seed ([0-9]+)/)?.[1]}_steps_`;
        return line.includes(text) && images.length > 0
            && images.every(image => image.src.includes(name) && image.complete && image.naturalWidth > 0);
    }"""
    page.wait_for_function(program, arg=text)


def shown_pictures(page: Any) -> dict[str, np.ndarray[Any, Any]]:
    """What is on the page: the pixels under each caption."""
    pictures = {}
    for result in page.locator("#results .result:visible").all():
        image = result.locator("img")
        content = page.request.get(image.get_attribute("src")).body()
        pictures[result.locator(".caption strong").inner_text()] = np.asarray(Image.open(BytesIO(content)))
        assert result.locator(".caption span").inner_text().endswith("s a sample")
    return pictures


def assert_shown(page: Any, model: TrainedModel, steps: tuple[int, ...], **arguments: Any) -> None:
    """The page has the grids of the model's own samples, and no others."""
    actual = shown_pictures(page)
    assert list(actual) == [steps_name(n) for n in steps]
    for n in steps:
        samples = model.sample(steps=n, **arguments)
        expected = np.asarray(image_grid(samples, int(np.ceil(len(samples) ** 0.5))))
        assert np.array_equal(actual[steps_name(n)], expected), n


def test_the_page_in_a_browser(served: Served, browser_page: Any) -> None:
    """Open, choose, generate; a bad value shows a message and changes nothing; all comes from the server."""
    page, model = browser_page, served.model
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.url)
    status = page.locator("#status")
    message = page.locator(".toast-body")

    wait_for(page, "16 images, all classes in turn, seed 0, guidance weight 3.")  # as soon as it is open
    assert page.title() == "bugs – tvmatch"
    assert_shown(page, model, (1, 2, 4), count=16, seed=0)

    page.get_by_label("Class").click()
    page.get_by_label("Class").press_sequentially("be")
    page.get_by_role("option").filter(has_text="bee").click()
    page.get_by_label("Seed").fill("7")
    page.get_by_label("2", exact=True).uncheck()
    page.get_by_label("8", exact=True).check()
    page.get_by_label("number input for Images").fill("5")
    page.get_by_label("number input for Guidance weight").fill("1.75")
    page.get_by_role("button", name="Generate").click()
    wait_for(page, "5 images of class bee, seed 7, guidance weight 1.75.")
    assert_shown(page, model, (1, 4, 8), labels="bee", count=5, seed=7, guidance=1.75)
    before = shown_pictures(page)

    for label, value, words in (
        ("Seed", "-1", "seed: must be a whole number from 0"),
        ("Seed", "1.5", "got 1.5"),
        ("number input for Images", "1.5", "images: must be a whole number from 1 to 64, got 1.5"),
    ):
        good = page.get_by_label(label).input_value()
        page.get_by_label(label).fill(value)
        page.get_by_role("button", name="Generate").click()
        message.filter(has_text=words).wait_for()
        page.locator(".toast-close").click()
        message.wait_for(state="detached")
        page.get_by_label(label).fill(good)
    for n in ("1", "4", "8"):
        page.get_by_label(n, exact=True).uncheck()
    page.get_by_role("button", name="Generate").click()
    message.filter(has_text="steps: choose at least one number of steps").wait_for()
    assert "seed 7" in status.inner_text()
    after = shown_pictures(page)
    assert all(np.array_equal(after[name], picture) for name, picture in before.items())

    page.get_by_label("3", exact=True).check()
    page.get_by_role("button", name="Next seed").click()
    wait_for(page, "seed 8")
    assert_shown(page, model, (3,), labels="bee", count=5, seed=8, guidance=1.75)

    foreign = [url for url in asked if not url.startswith((served.url, "data:", "blob:"))]
    assert asked
    assert not foreign
