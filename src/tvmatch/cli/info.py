"""`tvmatch info`: what a checkpoint holds."""

from pathlib import Path
from typing import Any

from tvmatch.cli.options import add_import_option
from tvmatch.condition import Guidance
from tvmatch.config.parser import OneLineParser
from tvmatch.data.spec import AutoencoderInfo
from tvmatch.trained_model import load
from tvmatch.trained_model.files import of_newest


def run(arguments: list[str]) -> int:
    """Print the facts of a checkpoint."""
    parser = OneLineParser(prog="tvmatch info", description="What a checkpoint holds.")
    parser.add_argument("checkpoint", type=str, help="a run folder (its newest checkpoint) or one checkpoint")
    add_import_option(parser)
    facts = of_newest(Path(parser.parse_args(arguments).checkpoint), _facts)
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"{name:<{width}}  {fact}")
    return 0


def _facts(folder: Path) -> dict[str, object]:
    model = load(folder)
    spec = model.spec
    return {
        "checkpoint": folder,
        "network": type(model.network).__name__,
        "parameters": f"{sum(parameter.numel() for parameter in model.network.parameters()):,}",
        "generates": f"{spec.kind}, shape {'×'.join(map(str, spec.shape))}",
        "classes": "none" if spec.class_names is None else _shortened(spec.class_names),
        "normalisation": f"(data − {list(spec.mean)}) / {list(spec.std)}",
        **({} if spec.autoencoder is None else {"autoencoder": _autoencoder(spec.autoencoder)}),
        "guidance weight": _guidance(model.guidance),
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


def _autoencoder(info: AutoencoderInfo) -> str:
    known = f"SHA-256 {info.fingerprint[:12]}…" if info.fingerprint else "unverified"
    return f"{info.source} ({known}), images {'×'.join(map(str, info.image_shape))}"


def _guidance(guidance: Guidance) -> str:
    return f"{guidance[0]:g} to {guidance[1]:g}" if isinstance(guidance, tuple) else f"{guidance:g}"


def _shortened(names: tuple[str, ...]) -> str:
    shown = ", ".join(names[:12])
    return f"{len(names)}: {shown}{', …' if len(names) > 12 else ''}"
