"""What a Triton kernel may not do is reported, with the place."""

import pytest
import torch
import triton
import triton.language as tl

import ptxsim
from ptxsim.sample_kernels import run_matmul


@triton.jit
def copy_kernel(x, o, B: tl.constexpr):
    p = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + p, tl.load(x + p))


def test_load_out_of_bounds():
    x, o = torch.randn(1000), torch.zeros(1024)
    with pytest.raises(ptxsim.SimError, match="out-of-bounds global load") as e:
        copy_kernel[(1,)](x, o, B=1024)
    msg = str(e.value)
    assert "copy_kernel" in msg
    assert "PTX line" in msg
    assert "nearest tensor" in msg
    assert "CTA (0,0,0)" in msg
    assert "test_errors.py" in msg


def test_store_out_of_bounds():
    x, o = torch.randn(1024), torch.zeros(1020)
    with pytest.raises(ptxsim.SimError, match="out-of-bounds global store"):
        copy_kernel[(1,)](x, o, B=1024)


def test_load_outside_the_view():
    buf = torch.randn(2048)
    with ptxsim.set_options(strict_views=True), pytest.raises(ptxsim.SimError, match="past its end"):
        copy_kernel[(1,)](buf[:1000], torch.zeros(1024), B=1024)


def test_misaligned_vector_access():
    x = torch.randn(1025)
    o = torch.zeros(1024)
    copy_kernel[(1,)](x[:1024], o, B=1024)
    for_aligned_pointers = copy_kernel.warmup(torch.float32, torch.float32, B=1024, grid=(1,))
    with pytest.raises(ptxsim.SimError, match="misaligned"):
        for_aligned_pointers[(1, 1, 1)](x[1:], o, 1024)


@triton.jit
def assert_kernel(x):
    tl.device_assert(tl.load(x) > 0, "must be positive")


def test_device_assert():
    assert_kernel[(1,)](torch.ones(1), debug=True)
    with pytest.raises(ptxsim.SimError, match="must be positive"):
        assert_kernel[(1,)](-torch.ones(1), debug=True)


@triton.jit
def print_kernel(x):
    tl.device_print("v", tl.load(x))


def test_device_print(capfd):
    print_kernel[(1,)](torch.full((1,), 42, dtype=torch.int32), num_warps=1)
    assert "42" in capfd.readouterr().out


@triton.jit
def overlap_kernel(o, STRIDE: tl.constexpr, B: tl.constexpr):
    tl.store(o + tl.program_id(0) * STRIDE + tl.arange(0, B), tl.program_id(0).to(tl.float32))


@triton.jit
def inplace_kernel(x, B: tl.constexpr):  # reads the neighbour's block, writes its own
    p = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(x + p, tl.load(x + p + B))


def test_race_between_ctas():
    with ptxsim.set_options(check_global=True):
        overlap_kernel[(4,)](torch.zeros(512), 128, 128)
        with pytest.raises(ptxsim.SimError, match="race between CTAs"):
            overlap_kernel[(4,)](torch.zeros(512), 64, 128)
        with pytest.raises(ptxsim.SimError, match="race between CTAs"):
            inplace_kernel[(3,)](torch.zeros(512), 128)
        a, c = torch.randn(128, 128).bfloat16(), torch.zeros(128, 128)
        run_matmul(a, a, c, 64, 64, 32, num_stages=3)
