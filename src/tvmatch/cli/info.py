"""`tvmatch info`: properties of a checkpoint."""

from pathlib import Path
from typing import Any

from tvmatch.cli.options import add_import_option
from tvmatch.config.parser import OneLineParser
from tvmatch.trained_model import load
from tvmatch.trained_model.files import of_newest


def run(arguments: list[str]) -> int:
    """Print the properties of a checkpoint."""
    parser = OneLineParser(prog="tvmatch info", description="Print the properties of a checkpoint.")
    parser.add_argument("checkpoint", type=str, help="run folder (its newest checkpoint) or checkpoint")
    add_import_option(parser)
    facts = of_newest(Path(parser.parse_args(arguments).checkpoint), _facts)
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    return 0


def _facts(folder: Path) -> dict[str, object]:
    model = load(folder)
    spec, guidance, names = model.spec, model.guidance, model.spec.class_names or ()
    facts: dict[str, object] = {
        "checkpoint": folder,
        "network": type(model.network).__name__,
        "parameters": f"{sum(parameter.numel() for parameter in model.network.parameters()):,}",
        "generates": f"{spec.kind}, shape {'×'.join(map(str, spec.shape))}",
        "classes": f"{len(names)}: {', '.join([*names[:12], *['…'] * (len(names) > 12)])}"
        if names
        else "none",
        "normalisation": f"(data − {list(spec.mean)}) / {list(spec.std)}",
    }
    if spec.autoencoder is not None:
        info = spec.autoencoder
        known = f"SHA-256 {info.fingerprint[:12]}…" if info.fingerprint else "unverified"
        facts["autoencoder"] = f"{info.source} ({known}), images {'×'.join(map(str, info.image_shape))}"
    ends = guidance if isinstance(guidance, tuple) else (guidance,)
    return {
        **facts,
        "guidance weight": " to ".join(f"{weight:g}" for weight in ends),
        "parameterisation": "scaled" if model.scaled else "plain",
        "steps trained": f"{model.step:,}",
        **_provenance(model.provenance),
        "size on disk": f"{sum(path.stat().st_size for path in folder.iterdir()) / 2**20:.1f} MiB",
    }


def _provenance(provenance: dict[str, Any]) -> dict[str, Any]:
    facts = {key.replace("_", " "): value for key, value in provenance.items() if key != "parameters"}
    counts = facts.pop("class counts", None)
    if counts:
        facts["elements a class"] = f"{min(counts):,} to {max(counts):,}"
    return facts
