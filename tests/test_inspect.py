"""The static proof of the kernels: the bars that their machine code is held to, and the tool that reads it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from support import WHERE, Runner

if WHERE == "interpreter":
    pytest.skip("kernels were jitted for the interpreter, which compiles nothing", allow_module_level=True)

import triton
import triton.language as tl

import ditfast.kernels as kernels
from ditfast.kernels import inspect as tool
from ditfast.kernels.ahead import TARGETS, Build, compiling_for
from ditfast.kernels.hardware import occupancy
from ditfast.kernels.inspect_cases import EXCEPTIONS, Case, Known, cases, tensor
from ditfast.kernels.launch import check_launchable, interpreted, launch, target
from ditfast.kernels.machine_code import NVIDIA_BRANCH_TARGET, NVIDIA_INSTRUCTION, NVIDIA_LABEL, _read, machine_code

JOBS = 2
OTHER_TARGETS = [arch for arch in TARGETS if arch != "sm_90"]
SAMPLE = {"layer_norm_modulate": "D=1152", "linear": "M=2048"}  # on the other targets


def layer_norm_modulate(x: torch.Tensor) -> torch.Tensor:
    shift, scale = x.new_empty(len(x), 2 * x.shape[-1]).chunk(2, dim=1)
    return kernels.layer_norm_modulate(x, shift, scale, 1e-6, False)[0]


def build_of(arch: str, call: Any, *args: object) -> Build:
    with compiling_for(arch) as builds:
        call(*args)
    (build,) = builds
    return build


# ------------------------------------------------------------------------------------------------ the bars
def assert_no_row_fails(found: tool.Found) -> list[tool.Row]:
    rows = list(tool.inspect_all(found, JOBS))
    failing = [f"{row.kernel} | {row.case} | {row.tile} | {row.arch}: {'; '.join(row.misses)}" for row in rows if row.fails]
    assert not failing, "\n".join(failing)
    return rows


def test_sm_90() -> None:
    """Of every kernel the first and the last build, and every build for rows of width 1152 in bf16."""
    found = tool.collect(["sm_90"])
    ends = {build.name: build for _, build in reversed(found)} | {f"{build.name} last": build for _, build in found}
    chosen = [(c, b) for c, b in found if b in ends.values() or ("D=1152" in c.label and "fp32" not in c.label)]
    rows = assert_no_row_fails(chosen)
    assert {row.issue_share is not None for row in rows if row.per == "row"} == {True}


@pytest.mark.parametrize("arch", OTHER_TARGETS)
def test_sample_on(arch: str) -> None:
    found = tool.collect([arch], list(SAMPLE))
    rows = assert_no_row_fails([(case, build) for case, build in found if case.label == SAMPLE[build.name]])
    assert {row.kernel for row in rows} == set(SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
def test_every_kernel_and_tile_on(arch: str) -> None:
    rows = assert_no_row_fails(tool.collect([arch]))
    missed = {row.kernel for row in rows if row.exception}
    stale = {known.kernel for known in EXCEPTIONS if arch in known.archs} - missed
    assert not stale, f"listed exceptions that no row needs on {arch}: {stale}"


def test_every_kernel_has_a_case() -> None:
    modules = {name: module for name, module in sys.modules.items() if name.startswith("ditfast.kernels.")}
    written = {
        value.__name__.removesuffix("_kernel")
        for name, module in modules.items()
        for value in vars(module).values()
        if isinstance(value, triton.JITFunction) and value.__module__ == name and value.__name__.endswith("_kernel")
    }
    assert written == {build.name for _, build in tool.collect(["sm_90"])}


@pytest.mark.parametrize("arch", TARGETS)
def test_every_gemm_tile_is_inspected(arch: str) -> None:
    from ditfast.kernels.tiles import BY_ROWS, FULL_PRECISION, HALF, GemmTile, first_that_fits

    shipped = [(choices, torch.bfloat16) for _, choices in BY_ROWS.get(arch, BY_ROWS["default"])]
    shipped += [(HALF, torch.bfloat16), (FULL_PRECISION, torch.float32)]
    expected = {first_that_fits(choices, dtype, arch) for choices, dtype in shipped}
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
    builds = [build for _, build in tool.collect([arch]) if isinstance(build, Build)]
    inspected = {
        GemmTile(*(build.constants[name] for name in names), build.options["num_warps"], build.options["num_stages"])
        for build in builds
        if set(names) <= set(build.constants)
    }
    assert expected <= inspected


# ------------------------------------------------------------------------------------------------ what is caught
@triton.jit
def greedy_kernel(x_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(x_ptr + i, x / tl.sum(x, 0) + tl.max(x, 0))


@triton.jit
def frugal_kernel(x_ptr, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(x_ptr + i, tl.load(x_ptr + i) * 2)


def launched(kernel: Any, size: int, **options: int) -> Case:
    x = tensor(size, dtype=torch.float32)
    return Case("test", partial(launch, kernel, 1, x_ptr=x, SIZE=size, num_warps=1, **options))


@pytest.fixture
def _greedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two kernels, of which the first needs more registers than there are, on AMD for eight waves at a time."""

    def greedy_cases() -> list[Case]:
        options = {"size": 16384, "waves_per_eu": 8} if target() == "gfx942" else {"size": 8192}
        return [launched(greedy_kernel, **options), launched(frugal_kernel, 1024)]

    monkeypatch.setattr(tool, "cases", greedy_cases)


@pytest.mark.usefixtures("_greedy")
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_spills_are_caught(arch: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--arch", arch, "--json"]) == 1
    greedy, frugal = json.loads(capsys.readouterr().out)
    assert greedy["kernel"] == "greedy"
    assert greedy["spills"] > 10
    assert any("spills" in miss for miss in greedy["misses"])
    assert (frugal["spills"], frugal["misses"]) == (0, [])
    assert tool.main(["--arch", arch, "--kernel", "frugal"]) == 0
    assert "1 rows: 0 miss a bar" in capsys.readouterr().out


def test_refused_launches_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise RuntimeError("no tile fits")

    monkeypatch.setattr(tool, "cases", lambda: iter([Case("D=1", partial(refuse))]))
    assert tool.main(["--arch", "sm_86", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["kernel"], row["case"], row["misses"]) == ("refuse", "D=1", ["no tile fits"])


@pytest.mark.usefixtures("_greedy")
def test_an_exception_holds_to_its_worst_and_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for worst, status in ((1e6, 0), (10, 1)):
        monkeypatch.setattr(tool, "EXCEPTIONS", (Known("greedy", ("sm_90",), "", "spills", worst, "a test"),))
        assert tool.main(["--arch", "sm_90", "--kernel", "greedy"]) == status
        shown = capsys.readouterr().out
        assert ("known: a test" in shown) == (status == 0)
        assert ("MISS" in shown) == (status == 1)


@pytest.mark.parametrize(
    ("change", "miss"),
    [
        ({"loads": {128: 26, 64: 1}}, "loads of 64 bits"),
        ({"issue_share": 0.51}, "51% of the issue budget, over 50%"),
        ({"shared": 300_000}, "300000 bytes of shared memory of 232448"),
        ({"spills": 1}, "1 spills"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_bar_can_be_missed(change: dict[str, Any], miss: str) -> None:
    build = build_of("sm_90", layer_norm_modulate, tensor(8, 256, 1152))
    row = tool.inspect(Case("", partial(int)), build)
    assert not row.misses
    bars = tool.BARS["layer_norm_modulate"]
    assert [words for *_, words in tool._misses(tool.replace(row, **change), build, bars)] == [miss]


def test_padded_heads_miss_the_bar_of_useful_work() -> None:
    build = build_of("sm_90", kernels.attention, tensor(8, 256, 3, 16, 72), False)
    row = tool.inspect(Case("", partial(int)), build)
    assert row.work is not None
    assert row.work <= 1.12
    padded = tool.replace(row, work=128 / 72)
    assert [bar for bar, *_ in tool._misses(padded, build, tool.BARS["attention"])] == ["work"]


# ------------------------------------------------------------------------------------------------ reading machine code
def test_reads_a_row_kernel() -> None:
    code = machine_code(build_of("sm_90", layer_norm_modulate, tensor(8, 256, 1152)).compiled)
    assert (code.loads, code.stores) == (Counter({128: 27}), Counter({128: 9}))
    assert (code.spills, code.loops, code.main_loop) == (0, [], None)
    assert 64 <= code.registers <= 128
    assert 900 <= len(code) <= 1100
    assert not code.mma


@pytest.mark.parametrize(
    ("arch", "opcode", "warps"),
    [("sm_80", "HMMA", 8), ("sm_90", "HGMMA", 8), ("sm_100", "UTCHMMA", 8), ("gfx942", "v_mfma", 8)],
    ids=["sm_80", "sm_90", "sm_100", "gfx942"],
)
def test_reads_a_matrix_kernel(arch: str, opcode: str, warps: int) -> None:
    build = build_of(arch, kernels.linear, tensor(8, 256, 1024), tensor(4096, 1024), tensor(4096))
    code = machine_code(build.compiled)
    loop = code.main_loop
    assert loop is not None
    assert all(found.startswith(opcode) for found in loop.mma)
    assert len(loop) < len(code)
    done = None if arch == "sm_100" else 128 * 128 * 64 / warps
    assert loop.multiply_adds == done


def test_reads_innermost_loops() -> None:
    listing = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
    .L_x_0:
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
    .L_x_1:
        /*0020*/              @!P0 LDS.128 R8, [R1] ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   STL.64 [R1], R2 ;
        /*0060*/                   EXIT ;
    .L_x_2:
        /*0070*/                   BRA `(.L_x_2);
        /*0080*/                   NOP;
    """
    opcodes, loops = _read(listing.splitlines(), NVIDIA_INSTRUCTION, NVIDIA_LABEL, NVIDIA_BRANCH_TARGET)
    assert opcodes == ["MOV", "LDG.E.128.CONSTANT", "LDS.128", "BRA", "BRA", "STL.64", "EXIT", "BRA", "NOP"]
    assert loops == [["LDS.128", "BRA"]]


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "share"),
    [
        ("sm_90", 127, 0, 4, 16 / 64),  # by registers
        ("sm_90", 142, 71680, 4, 12 / 64),  # by both: the 64 + 16 attention of three programs
        ("sm_90", 32, 0, 4, 1.0),
        ("sm_86", 32, 65536, 4, 4 / 48),  # by shared memory
        ("gfx942", 128, 0, 4, 16 / 32),
        ("gfx942", 64, 40000, 4, 4 / 32),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, warps: int, share: float) -> None:
    assert occupancy(arch, registers, shared, warps) == share


# ------------------------------------------------------------------------------------------------ compiling ahead of time
def test_launches_nothing_and_ends() -> None:
    x = torch.full((1, 16, 384), 3.0, dtype=torch.bfloat16)
    with compiling_for("gfx942") as builds:
        assert (target(), interpreted()) == ("gfx942", False)
        check_launchable(x.device)
        for _ in range(2):
            layer_norm_modulate(x)
        assert len(builds) == 1
        layer_norm_modulate(x.float())
        assert [build.name for build in builds] == ["layer_norm_modulate"] * 2
        layer_norm_modulate(x[:0])
        assert len(builds) == 2
    with pytest.raises(KeyError), compiling_for("sm_80"):
        raise KeyError
    with compiling_for("sm_80") as outer, compiling_for("sm_86") as inner:
        layer_norm_modulate(x)
    assert ([build.arch for build in inner], list(outer)) == (["sm_86"], [])


@pytest.mark.skipif(WHERE != "simulator", reason="needs the simulator")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_builds_what_a_launch_would(arch: str) -> None:
    """By Triton's hash of source, specialisation, target and options."""
    x = torch.zeros(2, 16, 384, dtype=torch.bfloat16)
    weight, bias = torch.zeros(48, 384, dtype=torch.bfloat16), torch.zeros(48, dtype=torch.bfloat16)

    def call(device: str) -> None:
        layer_norm_modulate(x.to(device))
        kernels.linear(x.to(device), weight.to(device), bias.to(device))

    with compiling_for(arch) as builds:
        call("meta")
    with Runner.open(arch):
        call("cpu")
    for build in builds:
        launched = {kernel.hash for cache in build.kernel.device_caches.values() for kernel in cache[0].values()}
        assert build.compiled.hash in launched


def test_no_such_target() -> None:
    with pytest.raises(ValueError, match=r"^arch: got 'sm_70', expected one of sm_80, .*gfx942"), compiling_for("sm_70"):
        pass


# ------------------------------------------------------------------------------------------------ the command
@pytest.fixture(scope="module")
def command() -> subprocess.CompletedProcess[str]:
    """Without a C++ compiler, without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PATH": "", "CUDA_VISIBLE_DEVICES": ""}
    arguments = ["--arch", "sm_90", "gfx942", "--kernel", "classifier_free_guidance", "timestep_embedding", "--json"]
    return subprocess.run(
        [sys.executable, "-m", "ditfast.kernels.inspect", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_json_is_all_of_stdout(command: subprocess.CompletedProcess[str]) -> None:
    assert command.returncode == 0, command.stderr
    rows = json.loads(command.stdout)
    assert {(row["kernel"], row["arch"]) for row in rows} == {
        (kernel, arch) for kernel in ("classifier_free_guidance", "timestep_embedding") for arch in ("sm_90", "gfx942")
    }
    for row in rows:
        assert {"kernel", "tile", "arch", "registers", "spills", "shared", "exception"} <= set(row)
        assert row["registers"] > 0
        assert (row["spills"], row["exception"]) == (0, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_70"], "arch: got 'sm_70', expected one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942"),
        (["--arch", "sm_90", "--kernel", "sofmax"], "kernel: got 'sofmax', expected one of attention, "),
        (["--jobs", "0"], "jobs: got 0, expected at least 1"),
    ],
    ids=["arch", "kernel", "jobs"],
)
def test_unknown_names_are_told_with_the_known(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        tool.main(arguments)
    assert caught.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    assert "python -m ditfast.kernels.inspect --arch sm_90" in capsys.readouterr().out


def test_labels_tell_rows_apart() -> None:
    found = tool.collect(["sm_90"])
    builds = [(case, build) for case, build in found if case.label and isinstance(build, Build)]
    labels = Counter((build.name, case.label, tool._tile(build)) for case, build in builds)
    assert [name for name, number in labels.items() if number > 1] == []
    assert len(list(cases())) > 100
