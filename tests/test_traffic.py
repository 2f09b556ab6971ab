"""What the executed code reads and writes: every element of a [B, T, D] tensor once, in whole sectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import oracles
import pytest
import torch
from support import ON_SIMULATOR, TARGETS, WHERE, Runner, gradients, leaves
from torch import Tensor

from ditfast import DiTConfig, blocks, ops
from ditfast.kernels.joint_backward import row_loop

pytestmark = pytest.mark.skipif(WHERE != "simulator", reason="the simulator counts")

SECTOR = 32
B, T = 2, 64


class Traffic(NamedTuple):
    loaded: int  # bytes that lanes asked for
    stored: int
    read: int  # bytes of distinct sectors
    written: int
    sectors: int
    ideal_sectors: int
    bank_conflicts: int
    wavefronts: int


def traffic(kernel: str, call: Callable[[], object]) -> Traffic:
    import ptxsim

    with ptxsim.record() as recorded:
        call()
    stats = recorded[kernel]
    return Traffic(
        stats.global_load_bytes,
        stats.global_store_bytes,
        SECTOR * stats.unique_sectors_read,
        SECTOR * stats.unique_sectors_written,
        stats.sectors,
        stats.ideal_sectors,
        stats.shared_conflicts,
        stats.shared_wavefronts,
    )


def arguments(D: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    x, h = torch.randn(2, B, T, D).bfloat16()
    return x, h, [vector for vector in oracles.modulation("chunk6", x) if vector is not None]


def check(
    found: Traffic,
    *,
    reads: list[Tensor],
    writes: list[Tensor],
    vectors: list[Tensor],
    vector_rows: int,
    stats: Tensor | None = None,
    stats_readers: int = 0,
) -> None:
    """Each of ``reads`` loaded once and each of ``writes`` stored once, the vectors by ``vector_rows`` rows.

    The statistics of a row are one broadcast load of all threads that share the row.
    """
    once_in, once_out = (sum(tensor.nbytes for tensor in tensors) for tensors in (reads, writes))
    asked_for = once_in + vector_rows * sum(vector.nbytes // len(vector) for vector in vectors)
    if stats is not None:
        asked_for, once_in = asked_for + stats_readers * stats.nbytes, once_in + stats.nbytes
    assert found.loaded == asked_for
    assert found.stored == once_out
    assert found.read == once_in + sum(vector.nbytes for vector in vectors)
    assert found.written == once_out
    assert found.sectors == found.ideal_sectors
    assert found.bank_conflicts <= 0.02 * found.wavefronts


WIDTHS = pytest.mark.parametrize("D", [384, 768, 1024, 1152], ids=lambda D: f"D{D}")


@WIDTHS
@ON_SIMULATOR
def test_layer_norm_modulate(compiled: Runner, D: int) -> None:
    x, _, (_, shift, scale) = arguments(D)
    found = traffic("layer_norm_modulate_kernel", lambda: ops.layer_norm_modulate(x, shift, scale))
    check(found, reads=[x], writes=[x], vectors=[shift, scale], vector_rows=B * T)


@WIDTHS
@ON_SIMULATOR
def test_gated_residual(compiled: Runner, D: int) -> None:
    x, h, (gate, *_) = arguments(D)
    found = traffic("gated_residual_kernel", lambda: ops.gated_residual(x, h, gate))
    check(found, reads=[x, h], writes=[x], vectors=[gate], vector_rows=B * T)


@WIDTHS
@ON_SIMULATOR
def test_joint(compiled: Runner, D: int) -> None:
    x, h, vectors = arguments(D)
    call = ops.gated_residual_layer_norm_modulate
    found = traffic("gated_residual_layer_norm_modulate_kernel", lambda: call(x, h, *vectors))
    check(found, reads=[x, h], writes=[x, x], vectors=vectors, vector_rows=B * T)


@WIDTHS
@ON_SIMULATOR
def test_joint_backward(compiled: Runner, D: int) -> None:
    x, h, vectors = arguments(D)
    inputs = leaves(x, h, *vectors)
    outputs = ops.gated_residual_layer_norm_modulate(*inputs)
    upstream = [torch.randn_like(x), torch.randn_like(x)]
    found = traffic("joint_backward_kernel", lambda: gradients(outputs, inputs, upstream))
    programs = B * T // 4
    stats, partials = torch.empty(B, T, 3), [torch.empty(programs, D) for _ in vectors]
    gate, _, scale = vectors
    check(
        found,
        reads=[x, x, x, h],
        writes=[x, h, *partials],
        vectors=[gate, scale],
        vector_rows=programs,
        stats=stats,
        stats_readers=row_loop(D).num_warps * 32,
    )


@pytest.mark.parametrize("target", TARGETS[-1:])
def test_a_whole_block_against_the_plan(target: str) -> None:
    """DiT-XL/2's block at T = 256: what each kernel must at least move, and what it moved, in passes over [B, T, D]."""
    import ptxsim

    config = DiTConfig(depth=1)
    D, H = config.hidden_size, config.mlp_hidden_size
    x = torch.randn(1, config.num_tokens, D).bfloat16()
    weight = {size: blocks.Linear(torch.zeros(size, D).bfloat16(), torch.zeros(size).bfloat16()) for size in (D, 3 * D, H)}
    fc2 = blocks.Linear(torch.zeros(D, H).bfloat16(), torch.zeros(D).bfloat16())
    attn = blocks.SelfAttention(config.num_heads, weight[3 * D], weight[D])
    modulation = blocks.Modulation(*torch.randn(1, 6 * D).bfloat16().chunk(6, dim=1))
    chain = blocks.sublayers(modulation, attn, blocks.Mlp(weight[H], fc2))
    norm = blocks.Norm(modulation.attn_shift, modulation.attn_scale)
    with (
        Runner.open(target, checks=False),
        ptxsim.set_options(stats=True, threads=1, strict_views=False),
        ptxsim.record() as recorded,
    ):
        blocks.run(x, ops.layer_norm_modulate(x, *norm), chain, norm)
    stream, vector = x.nbytes, D * x.itemsize
    plan = {  # the activations in, out; weights, biases and vectors
        "layer_norm_modulate_kernel": (1, 1, 2 * vector),  # before the first block only
        "linear_kernel": (1 + 1 + 4, 3 + 1 + 1, (3 + 1 + 4) * D * vector + (3 + 1 + 1) * vector),  # qkv, proj, fc2
        "attention_kernel": (3, 1, 0),
        "gated_residual_layer_norm_modulate_kernel": (2 * 2, 2 * 2, 2 * 3 * vector),
        "linear_gelu_kernel": (1, 4, 4 * D * vector + 4 * vector),
    }
    assert set(recorded) == set(plan)
    print(f"\n{'kernel':44} {'passes in':>9} {'out':>4} {'planned bytes':>14} {'moved':>11}  ratio")
    for name, (reads, writes, weights) in plan.items():
        planned = (reads + writes) * stream + weights
        moved = recorded[name].dram_bytes
        print(f"{name:44} {reads:9} {writes:4} {planned:14,} {moved:11,}  {moved / planned:.3f}")
        assert moved == pytest.approx(planned, rel=0.01)
    joint = recorded["gated_residual_layer_norm_modulate_kernel"]
    assert joint.dram_bytes == 8 * stream + 6 * vector
