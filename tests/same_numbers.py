"""Whether two commits compute the same numbers: runs on the CPU, compared bit for bit.

    python tests/same_numbers.py OLD [NEW]

OLD and NEW are commits of this repository; NEW is by default the working tree. Both run the same commands
with the Python that runs this script: `digits` and `checkerboard` (200 steps each), images encoded as latents
and trained on for 20 steps, and a run that stops and is resumed. NEW also resumes a run that OLD began. Then
all that they wrote is compared: tensors and pictures bit for bit, JSON and logs apart from times. A YAML
configuration that differs is printed and is no failure. The exit code is 1 if anything else differs.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
PHOTOGRAPHS = ROOT / "tests" / "files" / "photographs"
STEPS_200 = ["--training.steps=200", "--training.sample_every=100", "--training.checkpoint_every=100"]
LATENTS = """\
data: {latents: latents, shape: [4, 8, 8], class_count: 4, mean: null, std: null, autoencoder: null}
network: {preset: null, hidden_size: 16, depth: 2, heads: 2, patch_size: 2, time_frequencies: 8}
training: {steps: 20, batch_size: 8, accumulation: 2, data_workers: 1, precision: float32, compile: false,
  log_every: 5, sample_every: 10, checkpoint_every: 10}
"""
ENCODE = ["--autoencoder=autoencoder", "--resolution=16", "--workers=0", "--flips=stored"]
RUNS = {
    "digits": [["train", "digits", *STEPS_200, "--out=digits"]],
    "checkerboard": [["train", "checkerboard", *STEPS_200, "--out=checkerboard"]],
    "latents": [
        ["encode", "--data=photographs", *ENCODE, "--out=latents"],
        ["train", "imagenet256_w2", "--config=latents.yaml", "--out=latents_run"],
    ],
    "resumed": [
        ["train", "digits", "--training.steps=40", "--training.checkpoint_every=20", "--out=resumed"],
        ["train", "--resume=resumed", "--training.steps=60"],
    ],
    "begun by OLD": [["train", "--resume=begun", "--training.steps=60"]],
}
# Times, and what is said of the machine's load.
TIMES = ("seconds", "train_seconds", "images_per_second", "points_per_second")


def main(arguments: list[str]) -> int:
    """Run and compare."""
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        prepare(home)
        sources = {
            side: source(home, commit)
            for side, commit in zip(("old", "new"), (*arguments, "")[:2], strict=True)
        }
        tvmatch(sources["old"], home, ["train", "digits", "--training.steps=40", "--out=begun"])
        runs = home / "runs"  # the same path for both, since some of what they write names it
        for side, code in sources.items():
            shutil.copytree(home / "material", runs)
            shutil.copytree(home / "begun", runs / "begun")
            for run, commands in RUNS.items():
                print(f"{side}: {run}", flush=True)
                for command in commands:
                    tvmatch(code, runs, command)
            runs.rename(home / side)
        return compare(home / "old", home / "new")


def prepare(home: Path) -> None:
    """What both commits read: photographs, an autoencoder of random weights, a configuration."""
    import torch
    from diffusers import AutoencoderKL

    folder = home / "material"
    shutil.copytree(PHOTOGRAPHS, folder / "photographs")
    (folder / "latents.yaml").write_text(LATENTS, encoding="utf-8")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    network = AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4, **blocks
    )
    network.save_pretrained(folder / "autoencoder")


def source(home: Path, commit: str) -> Path:
    """The package's source of a commit, of the working tree for ""."""
    if not commit:
        return ROOT / "src"
    folder = home / f"source-{commit.replace('/', '-')}"
    folder.mkdir()
    archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder / "src"


def tvmatch(code: Path, folder: Path, command: list[str]) -> None:
    """Run one command in a folder; all that it prints is shown if it fails."""
    variables = {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / ".cache")}
    done = subprocess.run(
        [sys.executable, "-m", "tvmatch", *command, "--device=cpu"],
        cwd=folder,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stdout, file=sys.stderr)
        raise SystemExit(f"tvmatch {' '.join(command)}: exit code {done.returncode}")


def compare(old: Path, new: Path) -> int:
    """Print what differs and how much was the same."""
    names = [{str(path.relative_to(folder)) for path in folder.rglob("*")} for folder in (old, new)]
    names = [{name for name in found if ".cache" not in name and "tfevents" not in name} for found in names]
    wrong = [f"{name}: of one commit alone" for name in sorted(names[0] ^ names[1])]
    same = {"tensors": 0, "JSON files and logs": 0, "other files": 0}
    for name in sorted(names[0] & names[1]):
        a, b = old / name, new / name
        if a.is_dir():
            continue
        if name.endswith(".yaml"):
            if a.read_text() != b.read_text():
                subprocess.run(["diff", "-u", str(a), str(b)], check=False)
        elif name.endswith(".safetensors"):
            tensors, others = load_file(a), load_file(b)
            if tensors.keys() != others.keys():
                wrong.append(f"{name}: tensors {sorted(tensors.keys() ^ others.keys())} of one commit alone")
            for key in tensors.keys() & others.keys():
                if tensors[key].dtype == others[key].dtype and bool((tensors[key] == others[key]).all()):
                    same["tensors"] += 1
                else:
                    wrong.append(f"{name}: {key}")
        elif name.endswith((".json", ".jsonl")):
            if without_times(a) == without_times(b):
                same["JSON files and logs"] += 1
            else:
                wrong.append(name)
                subprocess.run(["diff", "-u", str(a), str(b)], check=False)
        elif a.read_bytes() == b.read_bytes():
            same["other files"] += 1
        else:
            wrong.append(name)
    print("the same:", ", ".join(f"{count} {what}" for what, count in same.items()))
    for line in wrong:
        print("DIFFERENT:", line)
    return 1 if wrong or not all(same.values()) else 0


def without_times(path: Path) -> Any:
    """The content of a JSON file, or of the lines of one."""

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(x) for key, x in value.items() if key not in TIMES}
        return [cut(x) for x in value] if isinstance(value, list) else value

    lines = path.read_text(encoding="utf-8")
    return [cut(json.loads(line)) for line in (lines.splitlines() if path.suffix == ".jsonl" else [lines])]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
