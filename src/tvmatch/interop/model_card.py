"""The README of a model on the Hugging Face Hub: description, usage, metrics and provenance."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tvmatch.condition import Guidance
from tvmatch.models import kind_of, network_class_of
from tvmatch.trained_model import TrainedModel

TAGS = ("tvmatch", "terminal-velocity-matching", "flow-map", "one-step-generation")


def model_card(
    model: TrainedModel,
    *,
    metrics: Sequence[Mapping[str, Any]] = (),
    samples: bool = False,
    config: str | None = None,
    license: str | None = None,
    repo_id: str | None = None,
    pipeline: bool = False,
) -> str:
    """Markdown with the Hub's YAML header.

    Args:
        model: to describe.
        metrics: content of the files that `tvmatch evaluate` writes.
        samples: whether to show samples.png.
        config: the text of the run's config.yaml, which is in the same folder.
        license: of the weights, as an identifier of the Hub.
        repo_id: "user/name" on the Hub, for the example.
        pipeline: whether the folder is a pipeline of `tvmatch.diffusers`, not a model for `tvmatch.load`.
    """
    from huggingface_hub import ModelCardData

    images = model.spec.kind in ("image", "latents")
    header = ModelCardData(
        library_name="tvmatch",
        tags=[*TAGS, *(["diffusers"] if pipeline else [])],
        pipeline_tag="unconditional-image-generation" if images else None,
        license=license,
    )
    parts = [f"---\n{header.to_yaml()}\n---", f"# {_title(model)}", _origin(model)]
    if samples:
        parts.append("![Samples](samples.png)")
    parts += [
        "## Use",
        _usage(model, repo_id or "USER/NAME", pipeline),
        "## Model",
        _table(("", ""), _facts(model).items()),
    ]
    if metrics:
        parts += ["## Figures", *(part for content in metrics for part in _figures(content))]
    if config is not None:
        parts += [
            "## Recipe",
            "The configuration of the run, `config.yaml`:",
            f"```yaml\n{config.strip()}\n```",
        ]
    if model.provenance:
        facts = {name: fact for name, fact in model.provenance.items() if name != "class_counts"}  # long
        text = json.dumps(facts, indent=1, ensure_ascii=False, default=str)
        parts += ["## Provenance", f"```json\n{text}\n```"]
    return "\n\n".join(parts) + "\n"


def _title(model: TrainedModel) -> str:
    shape = model.spec.shape if model.spec.autoencoder is None else model.spec.autoencoder.image_shape
    what = "points" if model.spec.kind == "points" else "images"
    generator = "Generator" if _is_imported(model) else "One-step generator"
    return f"{generator} of {what}, {'×'.join(map(str, shape))}"


def _is_imported(model: TrainedModel) -> bool:
    """Whether it was imported, so that the training method is unknown."""
    return "imported_from" in model.provenance and model.step == 0


def _origin(model: TrainedModel) -> str:
    if _is_imported(model):
        source = model.provenance["imported_from"]
        return f"A network that others trained, imported from `{source}` by `tvmatch`."
    recipe = model.provenance.get("recipe")
    return (
        "A generator for one or a few network evaluations, made by Terminal Velocity Matching "
        "([arXiv 2511.19797](https://arxiv.org/abs/2511.19797)) with `tvmatch`"
        + (f", recipe `{recipe}`." if recipe else ".")
    )


def _usage(model: TrainedModel, name: str, pipeline: bool) -> str:
    label = None if model.spec.class_names is None else min(207, model.spec.class_count - 1)
    if pipeline:
        argument = "batch_size=4" if label is None else f"class_labels=[{label}]"
        lines = [
            "from tvmatch.diffusers import TVMPipeline",
            "",
            f'pipe = TVMPipeline.from_pretrained("{name}")',
            f"image = pipe({argument}, num_inference_steps=1, seed=0).images[0]",
        ]
    else:
        argument = "count=4" if label is None else f"[{label}]"
        result = "points" if model.spec.kind == "points" else "images"
        lines = [
            "import tvmatch",
            *_imports_of(model),
            "",
            f'model = tvmatch.from_pretrained("{name}")',
            f"{result} = model.sample({argument}, steps=1, seed=0)",
        ]
    extra = '"tvmatch[latents]"' if pipeline or model.spec.kind == "latents" else "tvmatch"
    return f"`pip install {extra}`, then\n\n```python\n" + "\n".join(lines) + "\n```"


def _imports_of(model: TrainedModel) -> list[str]:
    """The import that loading a network from outside the package needs."""
    module = network_class_of(model.network.config).__module__
    if module == "__main__":  # the program that trained it
        module = Path(sys.argv[0]).stem or "its_module"
    if module.startswith("tvmatch."):
        return []
    return [f"import {module}  # registers the network {kind_of(model.network.config)}"]


def _facts(model: TrainedModel) -> dict[str, str]:
    spec = model.spec
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    facts = {
        "network": f"{type(model.network).__name__}, {parameters:,} parameters",
        "data": f"{spec.kind}, shape {'×'.join(map(str, spec.shape))}",
        "classes": "none" if spec.class_names is None else _shortened(spec.class_names),
        "normalisation": f"(data − {_numbers(spec.mean)}) / {_numbers(spec.std)}",
    }
    if spec.autoencoder is not None:
        fingerprint = spec.autoencoder.fingerprint
        facts["autoencoder"] = spec.autoencoder.source + (f", SHA-256 {fingerprint}" if fingerprint else "")
    return facts | {
        "guidance weight": _guidance(model.guidance),
        "parameterisation": "scaled" if model.scaled else "plain",
        "training steps": f"{model.step:,}",
    }


def _figures(metrics: Mapping[str, Any]) -> list[str]:
    """A table of the rows, and a list of their provenance, warnings and all other single values."""
    listed, by_steps, warnings = (metrics.get(name) for name in ("rows", "nfe", "warnings"))
    rows: list[Mapping[str, Any]] = []
    if isinstance(listed, list):  # of evaluate_features: a row for each guidance weight and number of steps
        rows = [row for row in listed if isinstance(row, Mapping)]
    elif isinstance(by_steps, Mapping):
        rows = [{"steps": steps, **row} for steps, row in by_steps.items() if isinstance(row, Mapping)]
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "provenance"))
    cells = [tuple(_shown(row.get(name, "")) for name in columns) for row in rows]
    table = [_table(tuple(_words(name) for name in columns), cells)] if columns else []
    facts = [  # without what the card says elsewhere, and the path where it was measured
        f"{'training steps' if name == 'steps' else _words(name)}: {_shown(value)}"
        for name, value in metrics.items()
        if isinstance(value, str | int | float) and name not in ("checkpoint", "parameters", "train_seconds")
    ]
    lines = [
        *(str(row["provenance"]) for row in rows if "provenance" in row),
        *(map(str, warnings) if isinstance(warnings, list) else ()),
        *facts,
    ]
    return [*table, *(["\n".join(f"- {' '.join(line.split())}" for line in lines)] if lines else [])]


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(_cell(str(cell)) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Text of a table cell: on one line, with escaped bars."""
    return " ".join(text.split()).replace("|", "\\|")


def _words(name: str) -> str:
    return name.replace("_", " ")


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _numbers(values: tuple[float, ...]) -> str:
    return "[" + ", ".join(f"{value:.6g}" for value in values) + "]"


def _guidance(guidance: Guidance) -> str:
    return f"{guidance[0]:g} to {guidance[1]:g}" if isinstance(guidance, tuple) else f"{guidance:g}"


def _shortened(names: tuple[str, ...]) -> str:
    return f"{len(names)}: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}"
