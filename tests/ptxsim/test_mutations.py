"""Real Triton PTX with one synchronisation removed or weakened: the checks see it."""

import re

import pytest
import torch

import ptxsim
from ptxsim.sample_kernels import attention_kernel, run_matmul, softmax_kernel, transpose_kernel


def count_caught(launch, pattern, replace):
    """Runs ``launch`` once per match of ``pattern`` in its PTX, with that match replaced. Returns (caught, matches)."""
    originals = []

    def remember(name, ptx):
        originals.append(ptx)
        return ptx

    def mutated_launch(match):
        def mutate(name, ptx):
            return ptx[: match.start()] + replace(match) + ptx[match.end() :]

        with ptxsim.set_options(ptx_filter=mutate):
            launch()

    with ptxsim.set_options(ptx_filter=remember):
        launch()
    matches = list(re.finditer(pattern, originals[0]))
    caught = 0
    for match in matches:
        try:
            mutated_launch(match)
        except ptxsim.SimError as error:
            if not re.search("race|in flight|uninitialised", str(error)):
                raise
            caught += 1
    return caught, len(matches)


def softmax():
    softmax_kernel[(1,)](torch.randn(1, 1000), torch.zeros(1, 1000), 1000, B=1024, num_warps=4)


def matmul():
    run_matmul(torch.randn(64, 256).bfloat16(), torch.randn(256, 64).bfloat16(), torch.zeros(64, 64), 64, 64, 32, num_stages=3)


def attention():
    q = torch.randn(1, 256, 64).bfloat16()
    out, lse = torch.zeros_like(q), torch.zeros(1, 256)
    sizes = {"D": 64, "BM": 64, "BN": 32, "CAUSAL": False, "num_warps": 4, "num_stages": 3}
    attention_kernel[(1, 1)](q, q, q, out, lse, 256, 0.1, **sizes)


def transpose():
    transpose_kernel[(1,)](torch.randn(64, 128), torch.zeros(128, 64), 64, 128)


@pytest.mark.parametrize("launch", [softmax, matmul, attention, transpose])
def test_removed_barrier_is_caught(launch):
    caught, barriers = count_caught(launch, r"bar\.sync\s+0;", lambda match: "")
    assert barriers > 0
    assert caught >= 0.6 * barriers  # some of Triton's are redundant: before the last exit, after a wait


@pytest.mark.parametrize("launch", [matmul, attention])
def test_weakened_wait_group_is_caught(launch):
    def one_more_in_flight(match):
        return f"cp.async.wait_group {int(match[1]) + 1};"

    caught, _ = count_caught(launch, r"cp\.async\.wait_group\s+(\d+);", one_more_in_flight)
    assert caught >= 1
