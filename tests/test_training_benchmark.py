"""The benchmark of the training step: what it compares is the same step, and what it counts is right."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tvmatch.config import recipe
from tvmatch.models import DiTConfig

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import common
import training_activations
import training_contenders
import training_step
from training_contenders import CPU_WAYS, DIGITS, IMAGENET, OURS, OURS_COMPILED, Case, Step, Way

CPU = torch.device("cpu")
SMALL = DiTConfig(hidden_size=16, depth=2, heads=2, patch_size=2, time_frequencies=8)
GUIDED = Case(SMALL, (1, 4, 4), 3, batch=4, guidance_weight=2.0)


def test_the_digits_case_is_the_recipe() -> None:
    config = recipe("digits")
    assert config.network == DIGITS.config
    assert config.training.batch_size == DIGITS.batch
    assert config.training.evaluation_ema == DIGITS.evaluation_ema
    assert config.optimizer.learning_rate == DIGITS.learning_rate
    assert config.objective.guidance_weight == 1.0
    assert IMAGENET.config.size().depth == 28


@pytest.mark.parametrize("case", [GUIDED, replace(GUIDED, guidance_weight=None)])
def test_every_eager_way_takes_the_same_step(case: Case) -> None:
    """float32 against float64: a few roundings of 6e-8."""
    reference = training_contenders.float64_gradients(case, CPU)
    for way in CPU_WAYS:
        if way.compiled:
            continue
        step = Step(way, case, CPU, None)
        of_loss, of_gradient = training_contenders.errors(step, reference)
        assert of_loss < 1e-5
        assert of_gradient < 1e-4
        before = [parameter.clone() for parameter in step.evaluation.network.parameters()]
        step()
        moved = zip(step.evaluation.network.parameters(), before, strict=True)
        assert any(not torch.equal(x, y) for x, y in moved)


def test_forward_flops_are_those_of_a_real_pass() -> None:
    network = training_contenders.make_network(GUIDED, CPU)
    x, t = torch.randn(GUIDED.batch, *GUIDED.shape), torch.rand(GUIDED.batch)
    with FlopCounterMode(display=False) as counter, training_contenders.attention_is("reference"):
        network(x, t, t)
    assert training_contenders.forward_flops(GUIDED) == counter.get_total_flops()
    # DiT-XL/2 at 256²: 118.6 G multiply-adds in DiT's paper (arXiv 2212.09748), here with a third embedding.
    assert training_contenders.forward_flops(replace(IMAGENET, batch=1)) == pytest.approx(
        2 * 118.6e9, rel=0.01
    )


def test_held_bytes() -> None:
    """A float32 of 1,000 that lives on, and a temporary that does not."""

    def work() -> torch.Tensor:
        return torch.ones(1000) + torch.ones(1000)

    assert training_activations.held_bytes(work, CPU) == 4000


@pytest.mark.exhaustive
def test_activation_table_counts_what_is_kept() -> None:
    table = training_activations.activation_table(replace(GUIDED, shape=(1, 8, 8)), CPU)
    counts = {row[0]: [float(x) for x in row[1:3]] for row in _cells(table)[2:]}
    # Blocks keep the residual stream alone: 16 channels in float32, value and tangent.
    assert counts["eager, recompute blocks"] == [2 * 16 * 4, 16 * 4]
    for way in ("eager", "compiled"):
        none, pointwise = counts[way][0], counts[f"{way}, recompute pointwise"][0]
        assert 2 * 16 * 4 < pointwise < none


def _cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("aten::addmm", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT", "matrix products"),
        ("query_gradients", "attention backward"),
        ("key_gradients", "attention backward"),
        ("attention_forward", "attention forward"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention backward"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention backward"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention forward"),
        ("aten::_fused_adamw_", "optimiser and averages"),
        ("triton_per_fused__to_copy_add_mean_mul_rsqrt_0", "pointwise, norms and the rest"),
    ],
)
def test_groups(name: str, group: str) -> None:
    assert training_step.group_of(name) == group


def test_verdicts_compare_with_the_fastest_right_jvp() -> None:
    def row(name: str, seconds: float, note: str = "", **options: Any) -> training_step.Row:
        timing = common.Timing(seconds, seconds, seconds, 9)
        return training_step.Row(Way(name, **options), timing, note=note)

    rows = [
        row(OURS, 1.0),
        row(OURS_COMPILED, 0.5, compiled=True),
        row("wrong", 0.1, "WRONG", jvp=True),
        row("slow", 3.0, jvp=True),
        row("fast", 2.0, jvp=True),
        row("compiled", 1.25, jvp=True, compiled=True),
    ]
    first, second, third = training_step.verdicts(rows, CPU)
    assert first.startswith(f"{OURS}: 2.00 times")
    assert second.startswith(f"{OURS_COMPILED}: 4.00 times")
    assert third.startswith(f"{OURS_COMPILED}: 2.50 times")


@pytest.mark.exhaustive
def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what is compiled, on a small network."""
    monkeypatch.setattr(training_step, "CPU_WAYS", tuple(way for way in CPU_WAYS if not way.compiled))
    monkeypatch.setattr(training_step, "DIGITS", replace(DIGITS, config=SMALL, batch=4))
    monkeypatch.setattr(training_step, "IMAGENET", replace(IMAGENET, config=SMALL))
    monkeypatch.setattr(training_step, "make_zeros_dense", lambda: None)
    assert training_step.main(["--device=cpu", "--quick", f"--out={tmp_path}"]) == 0
    content = json.loads((tmp_path / "training_step.json").read_text())
    assert [row["way"]["name"] for row in content["rows"]] == [w.name for w in CPU_WAYS if not w.compiled]
    assert all(row["timing"]["median"] > 0 for row in content["rows"])
    text = (tmp_path / "training_step.md").read_text()
    assert "times as fast as the faster eager jvp" in text.split("## In short")[1]
