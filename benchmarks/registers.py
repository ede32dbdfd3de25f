"""What the compiler makes of the attention kernels for a Hopper GPU, without one: registers, spills, wgmma.

    python benchmarks/registers.py               # the default tiles at D = 64 and 128 in bfloat16
    python benchmarks/registers.py --kernel key_gradients --head-dim 128 --tiles 32,128,8,2 16,128,8,3

The launchers of `tvmatch.attention.launch` run on small CPU tensors with their kernels replaced by a
recorder, and Triton's own just-in-time path compiles what was recorded: what a GPU would be given. STACK
bytes are spills; "serial" lists ptxas' warnings that matrix products wait for each other (C7512, C7515,
C7519). Triton's interpreter must be off.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tvmatch.attention import launch
from tvmatch.attention.tiles import HOPPER_SHARED_MEMORY, Part, Tile, Tiles, tiles_for

KERNELS = ("attention_forward", "query_gradients", "key_gradients")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Target:
    """Stands where Triton's driver does: enough of a GPU to compile for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Report(NamedTuple):
    """One compiled kernel: which, with what tile, and what it takes."""

    kernel: str
    head_dim: int
    causal: bool
    tangent: bool
    gradients: list[str]
    tile: Tile
    registers: int
    spilled_bytes: int
    shared_memory: int
    wgmma: int
    serialized: list[str]


class Recorder:
    """Stands where a kernel does and keeps the arguments of each start."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.starts: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.starts.append(arguments)


def compile_report(kernel: Any, arguments: dict[str, Any], **labels: Any) -> Report:
    """Compile for sm_90 and read the resource usage of the machine code."""
    compiled = kernel.warmup(grid=(1,), **arguments)
    capability = compiled.metadata.target.arch
    assembler = "ptxas-blackwell" if capability >= 100 else "ptxas"
    target = f"sm_{capability}{'a' * (capability >= 90)}"
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        assembled = subprocess.run(
            [TOOLS / assembler, "-v", "--gpu-name", target, "-o", cubin, ptx],
            capture_output=True,
            text=True,
            check=True,
        )
    read = {name: int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}  # type: ignore[index]
    return Report(
        kernel=kernel.__name__,
        tile=Tile(*(arguments[name] for name in ("BLOCK_QUERIES", "BLOCK_KEYS", "num_warps", "num_stages"))),
        registers=read["REG"],
        spilled_bytes=read["STACK"] + read["LOCAL"],
        shared_memory=compiled.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async", compiled.asm["ptx"])),
        serialized=sorted(set(re.findall(r"C75\d\d", assembled.stderr + assembled.stdout))),
        **labels,
    )


def record(
    operands: launch.Operands, tiles: Tiles, *, causal: bool, descriptors: bool
) -> dict[str, Recorder]:
    """Run both launchers on recorders."""
    recorders = {name: Recorder(getattr(launch, name)) for name in KERNELS}
    originals = {name: getattr(launch, name) for name in KERNELS}
    try:
        for name, recorder in recorders.items():
            setattr(launch, name, recorder)
        scale = operands.q.shape[3] ** -0.5
        result = launch.forward(operands, None, scale, causal, tile=tiles.forward, descriptors=descriptors)
        launch.backward(
            operands,
            result,
            result.output,
            result.output_tangent,
            None,
            scale,
            causal,
            tiles=tiles,
            descriptors=descriptors,
        )
    finally:
        for name, original in originals.items():
            setattr(launch, name, original)
    return recorders


def reports(
    head_dim: int,
    dtype: torch.dtype,
    *,
    tangent: bool,
    causal: bool,
    descriptors: bool = True,
    kernels: tuple[str, ...] = KERNELS,
    tiles: Tiles | None = None,
    shared_memory: int = HOPPER_SHARED_MEMORY,
) -> Iterator[Report]:
    """Compile the kernels of one case: views of a packed qkv, lengths that tiles divide."""
    packed = torch.zeros(2 if tangent else 1, 2, 256, 3, 2, head_dim, dtype=dtype)
    operands = launch.Operands(*(x.transpose(1, 2) for part in packed for x in part.unbind(2)))
    block_d = max(16, triton.next_power_of_2(head_dim))
    tiles = tiles or tiles_for(block_d, packed.itemsize, tangent=tangent, shared_memory=shared_memory)
    recorders = record(operands, tiles, causal=causal, descriptors=descriptors)
    for name in kernels:
        for arguments in recorders[name].starts:
            written = [
                key.removesuffix("_gradient")
                for key, x in arguments.items()
                if x is not None and key.endswith("_gradient")
            ]
            labels = {"head_dim": head_dim, "causal": causal, "tangent": tangent, "gradients": written}
            yield compile_report(recorders[name].kernel, arguments, **labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", default=KERNELS)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU: 80, 89, 90, 120, …")
    parser.add_argument("--causal", type=int, nargs="+", default=[0, 1], help="0, 1 or both")
    parser.add_argument("--tangent", type=int, nargs="+", default=[0, 1], help="0, 1 or both")
    parser.add_argument(
        "--pointers", action="store_true", help="load through pointers, not tensor descriptors"
    )
    parser.add_argument(
        "--tiles", nargs="+", default=[None], help="queries,keys,warps,stages for every kernel"
    )
    parser.add_argument(
        "--query-parts", nargs="+", default=["q,q_tangent"], help="with --tiles: gradients a launch"
    )
    parser.add_argument("--key-parts", nargs="+", default=["k,k_tangent,v,v_tangent"], help="likewise")
    parser.add_argument("--json", type=Path, help="also write the reports here")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: nothing is compiled in the interpreter")

    shared_memory = {80: 163, 90: 227, 100: 227}.get(options.capability, 99) * 1024
    driver.set_active(Target(options.capability))
    found = []
    print("kernel             D   causal tangent  tile              REG STACK shared KB wgmma serial")
    for head_dim in options.head_dim:
        for tangent in options.tangent:
            for causal in options.causal:
                for text in options.tiles:
                    tiles = None
                    if text:
                        tile = Tile(*map(int, text.split(",")))
                        tiles = Tiles(
                            tile,
                            *(
                                tuple(Part(tuple(names.split(",")), tile) for names in parts)
                                for parts in (options.query_parts, options.key_parts)
                            ),
                        )
                    for report in reports(
                        head_dim,
                        getattr(torch, options.dtype),
                        tangent=bool(tangent),
                        causal=bool(causal),
                        descriptors=not options.pointers,
                        kernels=tuple(options.kernel),
                        tiles=tiles,
                        shared_memory=shared_memory,
                    ):
                        found.append(report)
                        print(
                            f"{report.kernel:18s} {report.head_dim:<4d}"
                            f"{report.causal:^6d} {report.tangent:^7d}"
                            f"  {','.join(map(str, report.tile)):<17s} {report.registers:<3d}"
                            f" {report.spilled_bytes:<5d} {report.shared_memory / 1024:<9.0f}"
                            f" {report.wgmma:<5d} {' '.join(report.serialized)} {','.join(report.gradients)}"
                            f"{'' if report.shared_memory <= shared_memory else ' TOO MUCH SHARED MEMORY'}",
                            flush=True,
                        )
    if options.json:
        options.json.write_text(json.dumps([report._asdict() for report in found], indent=1))


if __name__ == "__main__":
    main()
