"""The page: controls on the left, samples for each number of steps on the right."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from html import escape
from itertools import zip_longest
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.processing_utils import save_pil_to_cache
from PIL import Image

from tvmatch.demo.generation import MAX_STEPS, Demonstration, Request, Result, steps_name, time_name
from tvmatch.errors import InputError

DEFAULT_STEPS = [1, 2, 4]
_HOUR = 3600  # seconds; pictures are deleted after one to two hours
_ALL_CLASSES = -1  # value of the class control, which cannot be None

_STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto; }
.gradio-container, .gradio-container > .main { width: 100%; }
#heading .html-container, #results .html-container, #status .html-container { padding: 0; }
#heading h1 { font-size: 1.5rem; font-weight: 600; margin: 0 0 0.1rem; }
#heading p { margin: 0; color: var(--body-text-color-subdued); }
#heading dl { display: flex; flex-wrap: wrap; gap: 0.6rem 2rem; margin: 1rem 0 0.75rem; }
#heading dt { font-size: 0.75rem; color: var(--body-text-color-subdued); }
#heading dd { margin: 0; font-weight: 600; }
#results { display: grid; gap: 1.5rem 1.25rem; }
#results { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15.5rem), 1fr)); }
#results .result { min-width: 0 !important; gap: 0.5rem; }
#results .caption { display: flex; justify-content: space-between; align-items: baseline; }
#results .caption span { color: var(--body-text-color-subdued); font-size: 0.875rem; }
#results .result:not(:has(.caption)) { display: none; }
#results .image-frame { width: 100%; }
#results img { background: white; }
#results .block:not(.fullscreen) img { width: 100%; height: auto; object-fit: contain; border-radius: 4px; }
#results.small img { image-rendering: pixelated; }
#results.points .image-frame { border: 1px solid var(--border-color-primary); border-radius: 4px; }
#results .result:has(.pending) img { opacity: 0.25; }
#status p { margin: 0; color: var(--body-text-color-subdued); font-size: 0.875rem; }
@media (hover: hover) { #results .result:not(:hover, :focus-within) .icon-button-wrapper { opacity: 0; } }
"""

# Select the text of the class control on focus, so that typing replaces it and searches the list.
_SCRIPT = """
() => document.addEventListener("focusin", event => {
  if (event.target.matches("#class input")) setTimeout(() => event.target.select());
})
"""


def application(demonstration: Demonstration, name: str) -> FastAPI:
    """The page as an ASGI application, without Gradio's analytics, sharing or external resources."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    application = FastAPI()
    gr.mount_gradio_app(
        application,
        build_page(demonstration, name),
        path="/",
        theme=_theme(),
        css=_STYLE,
        js=_SCRIPT,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    return application


def build_page(demonstration: Demonstration, name: str) -> gr.Blocks:
    """Build the page of a model called `name`. It draws samples when it opens, one request at a time."""
    page = gr.Blocks(title=f"{name} – tvmatch", analytics_enabled=False, delete_cache=(_HOUR, _HOUR))
    with page:
        gr.HTML(_heading(demonstration, name), elem_id="heading")
        with gr.Row():
            with gr.Column(scale=1, min_width=270):
                controls = _controls(demonstration)
                with gr.Row():
                    again = gr.Button("Next seed", size="md", min_width=100)
                    generate = gr.Button("Generate", size="md", variant="primary", min_width=100)
            with gr.Column(scale=3, min_width=300):
                with gr.Row(elem_id="results", elem_classes=_kind(demonstration)):
                    slots = [_Slot() for _ in range(MAX_STEPS)]
                status = gr.HTML(elem_id="status")
        seed: Any = controls["seed"]  # Any, because Gradio adds the methods of its events at run time

        def request(values: Mapping[Any, Any]) -> Request:
            choices = {name: values[control] for name, control in controls.items()}
            if choices.get("label") == _ALL_CLASSES:
                choices["label"] = None
            return demonstration.request(**choices)

        def show(values: Mapping[Any, Any]) -> Iterator[dict[Any, Any]]:
            """Fill one slot after another. An invalid request leaves the page unchanged."""
            with _messages():
                yield from _updates(demonstration, request(values), slots, status)

        def next_seed(values: Mapping[Any, Any]) -> int:
            with _messages():
                return request(values).seed + 1

        outputs = {status, *(part for slot in slots for part in slot.parts)}
        options: dict[str, Any] = {
            "fn": show,
            "inputs": set(controls.values()),
            "outputs": outputs,
            "show_progress": "hidden",
            "concurrency_limit": 1,
            "concurrency_id": "generation",
            "trigger_mode": "always_last",
            "api_visibility": "private",
        }
        gr.on([page.load, generate.click, seed.submit], **options)
        again.click(
            next_seed, set(controls.values()), seed, show_progress="hidden", api_visibility="private"
        ).success(**options)
    return page


@contextmanager
def _messages() -> Iterator[None]:
    """Show an `InputError` as a message on the page."""
    try:
        yield
    except InputError as error:
        raise gr.Error(str(error), print_exception=False) from None


class _Slot:
    """The caption and picture of one number of steps; `_STYLE` hides a slot without a caption."""

    def __init__(self) -> None:
        with gr.Column(elem_classes="result"):
            self.caption = gr.HTML()
            self.picture = gr.Image(
                format="png",
                show_label=False,
                container=False,
                interactive=False,
                alt_text="samples",
                buttons=["download", "fullscreen"],
            )
        self.parts = (self.caption, self.picture)

    def file(self, picture: Image.Image, name: str) -> str:
        """Write a picture to Gradio's folder and return its path."""
        return str(save_pil_to_cache(picture, self.picture.GRADIO_CACHE, name, "png"))


def _kind(demonstration: Demonstration) -> str:
    """CSS class of the results: points get a frame, and small images are scaled without smoothing."""
    model = demonstration.model
    return "points" if not model.gives_images else "small" if max(model.output_shape) < 64 else "large"


def _controls(demonstration: Demonstration) -> dict[str, gr.components.Component]:
    """The controls that apply to the model, by argument of `Demonstration.request`."""
    model, unit = demonstration.model, demonstration.unit
    controls: dict[str, gr.components.Component] = {}
    if model.spec.class_names is not None:
        names = [name if name == str(k) else f"{k} {name}" for k, name in enumerate(model.spec.class_names)]
        choices = [("all, in turn", _ALL_CLASSES), *((name, k) for k, name in enumerate(names))]
        controls["label"] = gr.Dropdown(choices, value=_ALL_CLASSES, label="Class", elem_id="class")
    controls["seed"] = gr.Number(0, label="Seed")
    controls["steps"] = gr.CheckboxGroup(
        list(range(1, MAX_STEPS + 1)), value=DEFAULT_STEPS, label="Steps", info="network evaluations a sample"
    )
    controls["count"] = gr.Slider(
        1, demonstration.max_count, value=demonstration.default_count, step=1, label=unit.capitalize()
    )
    if isinstance(model.guidance, tuple):
        low, high = model.guidance
        controls["guidance"] = gr.Slider(low, high, value=high, step=0.01, label="Guidance weight")
    return controls


def _updates(
    demonstration: Demonstration, request: Request, slots: list[_Slot], status: gr.HTML
) -> Iterator[dict[Any, Any]]:
    """Yield updates of the page: first the captions, then one picture with its time after another."""
    # Each update repeats the earlier ones, since Gradio may skip an update if the next follows quickly.
    shown: dict[Any, Any] = {status: _paragraph("Generating …")}
    for slot, steps in zip_longest(slots, request.steps):
        shown[slot.caption] = "" if steps is None else _caption(steps, None)
    yield shown
    try:
        for slot, result in zip(slots, demonstration.results(request), strict=False):
            name = f"seed_{request.seed}_steps_{result.steps}"
            shown[slot.caption] = _caption(result.steps, result)
            shown[slot.picture] = slot.file(demonstration.picture(result.samples), name)
            yield shown
    except Exception:
        yield {status: "", **{slot.caption: "" for slot in slots}}  # clear the captions of unfinished slots
        raise
    yield shown | {status: _paragraph(_about(demonstration, request))}


def _caption(steps: int, result: Result | None) -> str:
    if result is None:
        return f'<div class="caption pending"><strong>{steps_name(steps)}</strong><span>…</span></div>'
    time = time_name(result.milliseconds)
    return f'<div class="caption"><strong>{steps_name(steps)}</strong><span>{time} a sample</span></div>'


def _about(demonstration: Demonstration, request: Request) -> str:
    """The sentence below the pictures."""
    names, unit = demonstration.model.spec.class_names, demonstration.unit
    number = f"{request.count:,} {unit if request.count > 1 else unit.removesuffix('s')}"
    if names is None:
        which = ""
    elif request.label is None:
        which = ", all classes in turn"
    else:
        which = f" of class {names[request.label]}"
    guidance = "" if request.guidance is None else f", guidance weight {request.guidance:g}"
    return (
        f"{number}{which}, seed {request.seed}{guidance}. Each sample has the same noise at every number of "
        "steps. The time is that of drawing all samples, divided by their number."
    )


def _heading(demonstration: Demonstration, name: str) -> str:
    facts = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(fact)}</dd></div>"
        for key, fact in demonstration.facts().items()
    )
    return (
        f"<h1>{escape(name)}</h1>"
        "<p>One- and few-step samples of a model trained by Terminal Velocity Matching.</p>"
        f"<dl>{facts}</dl>"
    )


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _theme() -> gr.themes.Base:
    """A plain theme with system fonts; Gradio's default fonts would be downloaded."""
    return gr.themes.Base(
        primary_hue="blue",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
