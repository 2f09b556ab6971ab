"""Hand-written PTX: single instructions, divergence, races, deadlocks, bank conflicts."""

import os
import subprocess
import tempfile

import pytest
import torch
import triton.backends.nvidia as nv

import ptxsim

HEAD = """.version 8.4
.target sm_80
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry k(.param .u64 p0)
.reqntid %d
{
.reg .pred %%p<9>; .reg .b16 %%h<9>; .reg .b32 %%r<30>; .reg .b64 %%d<9>;
ld.param.u64 %%d1, [p0];
mov.u32 %%r1, %%tid.x;
mul.wide.u32 %%d2, %%r1, 4;
add.s64 %%d3, %%d1, %%d2;
shl.b32 %%r2, %%r1, 2;
mov.u32 %%r3, smem;
add.s32 %%r2, %%r2, %%r3;
"""
TAIL = "\nst.global.u32 [%d3], %r9;\nret;\n}\n"


def run_body(body, out, threads=64, shared=1024):
    """Runs PTX in which %r1 is the thread, %r2 the address of its word of shared memory; %r9 goes to its element of ``out``."""
    ptxsim.run_ptx(HEAD % threads + body + TAIL, (1,), [out], shared=shared)
    return out


def test_missing_barrier_is_a_race():
    body = "st.shared.u32 [%%r2], %%r1;\n%s\nxor.b32 %%r4, %%r2, 128;\nld.shared.u32 %%r9, [%%r4];"
    o = run_body(body % "bar.sync 0;", torch.zeros(64, dtype=torch.int32))
    assert torch.equal(o.long(), torch.arange(64) ^ 32)
    with ptxsim.set_options(check_init=False), pytest.raises(ptxsim.SimError, match="race"):
        run_body(body % "", torch.zeros(64, dtype=torch.int32))


def test_read_of_uninitialised_shared_memory():
    with pytest.raises(ptxsim.SimError, match="uninitialised shared"):
        run_body("ld.shared.u32 %r9, [%r2];", torch.zeros(64, dtype=torch.int32))


def test_cp_async_needs_wait():
    body = "cp.async.ca.shared.global [%%r2], [%%d3], 4;\ncp.async.commit_group;\n%s\nld.shared.u32 %%r9, [%%r2];"
    o = torch.arange(64, dtype=torch.int32)
    run_body(body % "cp.async.wait_group 0;", o)
    assert torch.equal(o, torch.arange(64, dtype=torch.int32))
    with pytest.raises(ptxsim.SimError, match="in flight"):
        run_body(body % "cp.async.wait_group 1;", o)


def test_16_bit_multiply_add_wraps_around():
    body = "cvt.u16.u32 %h1, %r1;\nmov.b16 %h2, 2731;\nmad.lo.s16 %h3, %h1, %h2, %h1;\ncvt.u32.u16 %r9, %h3;"
    o = run_body(body, torch.zeros(64, dtype=torch.int32))
    assert torch.equal(o.long(), torch.arange(64) * 2732 % 2**16)


def test_lane_dependent_loops_reconverge():
    # nested, lane-dependent loop trip counts and branches, then a full-mask shuffle after reconvergence
    body = """
mov.u32 %r5, 0; mov.u32 %r6, 0; and.b32 %r7, %r1, 7;
L1: setp.ge.u32 %p1, %r6, %r7; @%p1 bra L4;
and.b32 %r8, %r6, 1; setp.eq.u32 %p2, %r8, 0; @%p2 bra L2;
add.u32 %r5, %r5, 10; bra L3;
L2: add.u32 %r5, %r5, 1;
L3: add.u32 %r6, %r6, 1; bra L1;
L4: shfl.sync.bfly.b32 %r10, %r5, 1, 31, -1; shl.b32 %r10, %r10, 8; add.u32 %r9, %r5, %r10;"""
    o = run_body(body, torch.zeros(64, dtype=torch.int32))
    f = [sum(1 if i % 2 == 0 else 10 for i in range(t & 7)) for t in range(64)]
    assert o.tolist() == [f[t] + (f[t ^ 1] << 8) for t in range(64)]


def test_shuffles_of_diverged_lanes_deadlock():
    body = """
and.b32 %r4, %r1, 1; setp.eq.u32 %p1, %r4, 0; @%p1 bra LA;
shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1; bra LB;
LA: shfl.sync.bfly.b32 %r9, %r1, 2, 31, -1;
LB:"""
    with pytest.raises(ptxsim.SimError, match="deadlock"):
        run_body(body, torch.zeros(64, dtype=torch.int32))


def test_barriers_of_diverged_warps_deadlock():
    with pytest.raises(ptxsim.SimError, match="deadlock"):
        run_body(
            "setp.lt.u32 %p1, %r1, 32; @%p1 bra LA; bar.sync 1, 64;\nLA: bar.sync 0, 64; mov.u32 %r9, 1;",
            torch.zeros(64, dtype=torch.int32),
        )


def test_unknown_instruction():
    with pytest.raises(ptxsim.SimError, match=r"unsupported instruction 'frobnicate\.u32'"):
        run_body("frobnicate.u32 %r9, %r1;", torch.zeros(64, dtype=torch.int32))


def test_endless_loop():
    with ptxsim.set_options(max_instr=10000, slice=1000), pytest.raises(ptxsim.SimError, match="endless loop"):
        run_body("L: bra L;", torch.zeros(64, dtype=torch.int32))


def test_bank_conflicts():
    with ptxsim.record() as st:  # stride of 32 words: 32-way conflict
        run_body(
            "shl.b32 %r4, %r1, 7; add.s32 %r4, %r4, %r3; st.shared.u32 [%r4], %r1; ld.shared.u32 %r9, [%r4];",
            torch.zeros(32, dtype=torch.int32),
            threads=32,
            shared=4096,
        )
    assert st["ptx"].shared_wavefronts == 64
    assert st["ptx"].shared_conflicts == 62


@pytest.mark.parametrize(
    ("ins", "f"),
    [
        ("lop3.b32 %r9, %r1, 12, 10, 0x96;", lambda t: t ^ 12 ^ 10),
        ("prmt.b32 %r9, %r1, 0x11223344, 0x4570;", lambda t: t | (0x11 << 8) | (0x33 << 16) | (0x44 << 24)),
        ("bfe.u32 %r9, %r1, 2, 3;", lambda t: (t >> 2) & 7),
        ("bfe.s32 %r9, %r1, 2, 3;", lambda t: ((t >> 2) & 7) - (8 if (t >> 2) & 4 else 0)),
        ("bfi.b32 %r9, %r1, 0xff00, 4, 6;", lambda t: (0xFF00 & ~(63 << 4)) | ((t & 63) << 4)),
        ("shf.l.wrap.b32 %r9, 0x80000001, %r1, 4;", lambda t: (t << 4) | 8),
        ("shf.r.clamp.b32 %r9, %r1, 5, 40;", lambda t: 5),
        ("popc.b32 %r9, %r1;", lambda t: bin(t).count("1")),
        ("clz.b32 %r9, %r1;", lambda t: 32 - t.bit_length()),
        ("brev.b32 %r9, %r1;", lambda t: int(f"{t:032b}"[::-1], 2) - (2**32 if int(f"{t:032b}"[::-1], 2) >= 2**31 else 0)),
        ("mul.hi.u32 %r9, %r1, 0x80000000;", lambda t: t >> 1),
        ("mad.lo.s32 %r9, %r1, -3, 7;", lambda t: -3 * t + 7),
        ("shfl.sync.up.b32 %r9, %r1, 3, 0, -1;", lambda t: t if (t & 31) < 3 else t - 3),
        ("shfl.sync.down.b32 %r9, %r1, 3, 31, -1;", lambda t: t if (t & 31) > 28 else t + 3),
        ("shfl.sync.idx.b32 %r9|%p1, %r1, 5, 0x1c1f, -1;", lambda t: (t & ~3) | 1),
        ("setp.gt.u32 %p1, %r1, 20; vote.sync.ballot.b32 %r9, %p1, -1;", lambda t: (-1 << 21) if t < 32 else -1),
        ("setp.gt.u32 %p1|%p2, %r1, 20; selp.b32 %r9, 3, 4, %p2;", lambda t: 4 if t > 20 else 3),
        ("redux.sync.add.u32 %r9, %r1, -1;", lambda t: sum(range(t // 32 * 32, t // 32 * 32 + 32))),
        (
            "shr.u32 %r4, %r1, 3; match.any.sync.b32 %r9, %r4, -1;",
            lambda t: (0xFF << (8 * ((t & 31) // 8))) - (2**32 if (t & 31) >= 24 else 0),
        ),
        ("cvt.u16.u32 %h1, %r1; mul.wide.u16 %r9, %h1, 300;", lambda t: 300 * t),
        ("cvt.rn.f32.u32 %r4, %r1; cvt.rzi.s32.f32 %r9, %r4;", lambda t: t),
        ("mov.b32 {%h1, %h2}, %r1; mov.b32 %r9, {%h2, %h1};", lambda t: t << 16),
        ("activemask.b32 %r9;", lambda t: -1),
        ("dp4a.u32.u32 %r9, %r1, 0x02020202, 5;", lambda t: 2 * t + 5),
        ("add.cc.u32 %r4, %r1, 0xffffffff; addc.u32 %r9, 0, 0;", lambda t: int(t > 0)),
        ("atom.shared.add.u32 %r4, [%r3+1020], 0; mov.u32 %r9, %laneid;", lambda t: t & 31),
    ],
)
def test_instruction(ins, f):
    with ptxsim.set_options(check_init=False, check_race=False):
        o = run_body(ins, torch.zeros(64, dtype=torch.int32))
    assert o.tolist() == [f(t) for t in range(64)]


def test_ptxas_accepts_the_instructions():
    """The hand-written PTX above must be real PTX: ptxas accepts it."""
    exe = os.path.join(os.path.dirname(nv.__file__), "bin", "ptxas")
    (parametrize,) = test_instruction.pytestmark
    for ins, _ in parametrize.args[1]:
        with tempfile.NamedTemporaryFile("w", suffix=".ptx") as fh:
            fh.write(HEAD % 64 + ins + TAIL)
            fh.flush()
            r = subprocess.run([exe, "-arch=sm_80", "-o", "/dev/null", fh.name], capture_output=True, text=True)
            assert r.returncode == 0, (ins, r.stderr)
