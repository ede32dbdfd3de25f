"""`tvmatch import`: convert a file of the TVM authors, or a Flow Matching SiT, to a checkpoint."""

import sys
from functools import partial
from pathlib import Path
from typing import Any

from tvmatch import __version__
from tvmatch.cli.results import show_paths
from tvmatch.config.parser import OneLineParser
from tvmatch.data.spec import AutoencoderInfo, DataSpec
from tvmatch.errors import InputError
from tvmatch.interop.checkpoints.authors import LABEL_TABLE
from tvmatch.interop.checkpoints.snapshot import ImportedNetwork, Snapshot, import_network, read_snapshot
from tvmatch.interop.checkpoints.training_facts import TrainingFacts
from tvmatch.interop.checkpoints.training_options import ImportedTraining, imported_training
from tvmatch.models import DiT
from tvmatch.storage.files import new_folder, sha256_of
from tvmatch.trained_model import TrainedModel

DESCRIPTION = """\
Convert a network with the TVM authors' tensor names, or with SiT's, to a checkpoint. The file is a pickled
snapshot (.pkl), a file of torch.save (.pt), or safetensors. Nothing in it is executed. Weights become
float32. The authors' snapshots say how their networks were trained. What a file does not say is taken from
the options, then from --recipe; a recipe or an option that contradicts the file is an error. A SiT has
guidance weight 1, no scaled parameterisation, and needs --mean and --std, whatever the recipe. Nothing is
overwritten."""

DOWNSAMPLING = 8  # assumed for an autoencoder that cannot be loaded; right for those of the recipes


def run(arguments: list[str]) -> int:
    """Read, check, and write a checkpoint."""
    parsed = _parser().parse_args(arguments)
    path, out = Path(parsed.file), Path(parsed.out)
    if out.exists():
        raise InputError("out", f"{out} exists already")
    names = None if parsed.class_names is None else _class_names(Path(parsed.class_names))
    snapshot = read_snapshot(path, parsed.network)
    training = imported_training(parsed, snapshot.facts)
    table_of_classes = _table_of_classes(snapshot, training)
    try:
        imported = import_network(
            snapshot.tensors,
            heads=parsed.heads,
            modulation_norm=training.modulation_norm is not False,
            label_dropout=not table_of_classes,
        )
    except InputError as error:
        raise error.within(path) from None
    if training.label_dropout == 0 and imported.network.class_count:
        # The table may still have a row for the dropped label, which was never trained.
        imported.network.conditioning.without_label_dropout()
    facts = snapshot.facts
    if imported.is_flow:
        if parsed.guidance is None and facts.guidance is None:
            training.guidance = 1.0
        if parsed.scaled is None and facts.scaled is None:
            training.scaled = False
        for option in ("mean", "std"):
            if getattr(parsed, option) is None and getattr(facts, option) is None:
                raise InputError(
                    option,
                    "needed for a SiT, whatever the recipe; published ones take Stable Diffusion's latents "
                    "times 0.18215, which is --mean=0 --std=5.48998",
                )
    _check_fits(parsed, imported, training, facts)
    model = _model(imported, training, names)
    model.provenance = _provenance(path, snapshot, imported, parsed.recipe)
    with new_folder(out) as unfinished:
        model.save(unfinished)
    _report(snapshot, imported, model)
    show_paths([out])
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="tvmatch import", description=DESCRIPTION)
    parser.add_argument("file", type=str, help="snapshot, file of torch.save, or safetensors")
    parser.add_argument("--out", type=str, required=True, help="folder of the new checkpoint")
    option = partial(parser.add_argument, default=None)
    option("--recipe", type=str, help="that it was trained with, imagenet256_w2, …: the defaults below")
    option("--network", type=str, help="network of the file, by its name there (default: ema, else net)")
    option(
        "--heads",
        type=int,
        help="attention heads (default: from its q/k norm, else the usual number for its width)",
    )
    option(
        "--modulation_norm",
        type=bool,
        help="modulation vectors are normalised (default: as in the recipe, else true)",
    )
    option("--mean", type=str, help="of the latents, per channel: --mean=0.8,-0.2,0.2,0.3")
    option("--std", type=str, help="of the latents, per channel; one number is for all channels")
    option("--guidance", type=str, help="weight w, or a range of them, 1,4")
    option("--scaled", type=bool, help="scaled parameterisation")
    option(
        "--label_dropout",
        type=float,
        help="probability of dropping a label; 0: never, so its label table has no row for that",
    )
    option(
        "--autoencoder",
        type=str,
        help="folder or Hub name of the latents' autoencoder; none for a network of pixels in [0, 1]",
    )
    option("--class_names", type=str, help="text file with one name per line (default: 0, 1, …)")
    return parser


def _table_of_classes(snapshot: Snapshot, training: ImportedTraining) -> bool:
    """Whether the label table has one row per class and none for the dropped label."""
    table = snapshot.tensors.get(LABEL_TABLE)
    rows = 0 if table is None or table.ndim == 0 else len(table)
    if rows == 0 or training.label_dropout:
        return False
    if training.label_dropout is None:
        return snapshot.facts.class_count == rows
    return snapshot.facts.class_count in (None, rows)


def _check_fits(
    parsed: Any, imported: ImportedNetwork, training: ImportedTraining, facts: TrainingFacts
) -> None:
    """Refuse options and recipes for another kind of network or another number of classes."""
    if parsed.modulation_norm is not None and imported.is_flow:
        raise InputError("modulation_norm", f"{parsed.file} is the network of a SiT")
    network = imported.network
    if parsed.label_dropout is not None and not network.class_count:
        raise InputError("label_dropout", f"the network in {parsed.file} has no classes")
    if facts.class_count not in (None, network.class_count):
        raise InputError(
            parsed.file,
            f"it says that its network has {facts.class_count} classes, but its label table has "
            f"{network.class_count}",
        )
    found, wanted = (network.shape, network.class_count), (training.shape, training.recipe_classes)
    if any(y is not None and x != y for x, y in zip(found, wanted, strict=True)):
        raise InputError(
            "recipe",
            f"{parsed.recipe} is of shape {wanted[0]} with {wanted[1]} classes, the network in {parsed.file} "
            f"is of shape {found[0]} with {found[1]}{_label_dropout_hint(wanted[1], network)}",
        )


def _label_dropout_hint(wanted: int | None, network: DiT) -> str:
    """A hint if the row of the label table that was taken for the dropped label may be a class."""
    may_be = network.class_count > 0 and network.conditioning.label_dropout
    may_be &= wanted == network.class_count + 1
    return "; --label_dropout=0 if no label was ever dropped" if may_be else ""


def _class_names(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("class_names", f"{path} cannot be read as text ({error})") from None
    lines: dict[str, int] = {}
    for number, line in enumerate(text.split("\n"), 1):
        name = line.strip()
        if name in lines:
            raise InputError("class_names", f"{path} has {name!r} twice, in lines {lines[name]} and {number}")
        if name:
            lines[name] = number
    return tuple(lines)


def _model(
    imported: ImportedNetwork, training: ImportedTraining, names: tuple[str, ...] | None
) -> TrainedModel:
    """The network with its data specification, parameterisation and guidance weight."""
    network = imported.network
    for option in ("mean", "std", "guidance", "scaled", "autoencoder"):
        if getattr(training, option) is None:
            raise InputError(option, f"the file does not say it; give --recipe NAME or --{option}")
    assert training.mean is not None
    assert training.std is not None
    assert training.guidance is not None
    channels, height, width = network.shape
    mean, std = (x * channels if len(x) == 1 else x for x in (training.mean, training.std))
    count = network.class_count
    if names is not None and len(names) != count:
        hint = _label_dropout_hint(len(names), network)
        raise InputError("class_names", f"{len(names)} names for a network of {count} classes{hint}")
    if isinstance(training.guidance, tuple) and not network.config.guidance_embedding:
        raise InputError("guidance", "this network does not take a guidance weight; give one number")
    pixels = training.autoencoder == "none"
    spec = DataSpec(
        kind="image" if pixels else "latents",
        shape=(channels, height, width),
        class_names=(names or tuple(map(str, range(count)))) if count else None,
        mean=mean,
        std=std,
        autoencoder=None if pixels else _autoencoder(str(training.autoencoder), (channels, height, width)),
    )
    return TrainedModel(network, spec, bool(training.scaled), training.guidance)


def _autoencoder(source: str, shape: tuple[int, int, int]) -> AutoencoderInfo:
    """The autoencoder as checkpoints record it, without a fingerprint if it cannot be loaded now."""
    # Here, because it imports diffusers
    from tvmatch.data.latents.autoencoder import load_autoencoder

    channels, height, width = shape
    try:
        autoencoder = load_autoencoder(source)
    except InputError as error:
        if Path(source).exists():
            raise
        note = f"the autoencoder could not be loaded and is recorded unchecked ({error})"
        print(f"tvmatch: note: {note}", file=sys.stderr)
        return AutoencoderInfo(source, "", (3, height * DOWNSAMPLING, width * DOWNSAMPLING))
    if autoencoder.channels != channels:
        raise InputError(
            "autoencoder", f"{source} has latents of {autoencoder.channels} channels, the network {channels}"
        )
    return autoencoder.info((3, height * autoencoder.downsampling, width * autoencoder.downsampling))


def _provenance(
    path: Path, snapshot: Snapshot, imported: ImportedNetwork, recipe_name: str | None
) -> dict[str, Any]:
    provenance = {
        "imported_from": path.name,
        "imported_sha256": sha256_of(path),
        "imported_network": snapshot.entry or "the whole file",
        "imported_precision": ", ".join(imported.dtypes),
        "parameters": sum(parameter.numel() for parameter in imported.network.parameters()),
        "tvmatch": __version__,
    }
    if known := snapshot.facts.known():
        provenance["file_says"] = known
    return provenance | ({} if recipe_name is None else {"recipe": recipe_name})


def _report(snapshot: Snapshot, imported: ImportedNetwork, model: TrainedModel) -> None:
    """Print what was imported."""
    size = imported.network.config.size()
    layout = "SiT (one time)" if imported.is_flow else "TVM"
    print(f"network      {snapshot.entry or 'the whole file'}, in the names of {layout}")
    print(
        f"size         {model.provenance['parameters']:,} parameters: width {size.hidden_size}, "
        f"depth {size.depth}, {size.heads} heads, patches of {size.patch_size}"
    )
    precision = "" if imported.dtypes == ("float32",) else ", converted to float32"
    print(f"precision    {', '.join(imported.dtypes)}{precision}")
    shape = "×".join(map(str, model.spec.shape))
    print(f"generates    {model.spec.kind} {shape}, {model.spec.class_count} classes")
    if not model.knows_dropped_labels:
        print("labels       required for each sample: the network was trained without dropped labels")
    if known := snapshot.facts.known():
        print(f"file says    {', '.join(f'{name}={value}' for name, value in known.items())}")
    if snapshot.unused:
        print(f"left out     {', '.join(snapshot.unused[:12])}{', …' if len(snapshot.unused) > 12 else ''}")
