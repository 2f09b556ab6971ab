"""Helpers of the tests: where kernels run, what counts as exact enough, which cases of a product to run."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ditfast
from ditfast.dispatch.plan import forget_plans

HAS_GPU = torch.cuda.is_available()


def _where() -> str:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    if shutil.which(os.environ.get("CXX", "g++")):
        return "simulator"
    return "gpu" if HAS_GPU else "interpreter"


WHERE = _where()  # where the kernels of tests run that are not marked gpu
TARGETS = ("sm_80", "sm_90") if WHERE == "simulator" else (WHERE,)
ON_SIMULATOR = pytest.mark.parametrize("compiled", TARGETS, indirect=True)  # without the fixture's case on a GPU
ON_CPU = pytest.mark.parametrize("either", ["torch", "triton"], indirect=True)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it in deterministic mode
torch.backends.cudnn.allow_tf32 = False  # the reference's fp32 convolution is a bar, and tf32 would lower it
if WHERE == "interpreter":  # triton reads it when it jits the first kernel
    os.environ["TRITON_INTERPRET"] = "1"

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


# ------------------------------------------------------------------------------------------------ where kernels run
@dataclass(frozen=True)
class Runner:
    """Tensors go to ``device``; ops inside the ``with`` block that opened it take ``backend``."""

    target: str
    backend: str
    device: torch.device

    @staticmethod
    @contextlib.contextmanager
    def open(target: str, *, checks: bool = True) -> Iterator[Runner]:
        """Open ``torch``, ``gpu``, ``gpu-torch``, ``interpreter``, or ``sm_80`` and the like for the simulator; poison outputs.

        Without ``checks`` the simulator looks for no races and no reads of unwritten memory, and is several times as fast.
        """
        device = torch.device("cuda", 0) if target.startswith("gpu") else torch.device("cpu")
        backend = "torch" if target.endswith("torch") else "triton"
        engine = _simulator(int(target.removeprefix("sm_")), checks) if target.startswith("sm_") else contextlib.nullcontext()
        if target == "interpreter":
            import interpreter_fixes

            interpreter_fixes.install()
        with engine, poisoned_outputs(), ditfast.backend(backend):
            yield Runner(target, backend, device)


@contextlib.contextmanager
def _simulator(arch: int, checks: bool) -> Iterator[None]:
    import ptxsim

    ptxsim.install(arch)
    forget_plans()  # which launch the binaries of another architecture
    looking = {"check_race": True, "check_init": True, "check_global": True} if checks else {"stats": False, "threads": 2}
    try:
        with ptxsim.set_options(strict_views=True, **looking):
            yield
    finally:
        ptxsim.uninstall()
        forget_plans()


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fills every ``torch.empty`` with NaN, so that an element a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def in_any_order() -> Iterator[None]:
    """Twice as it comes; then, on the simulator, with the programs and the warps in other orders."""
    yield
    yield
    if WHERE == "simulator":
        import ptxsim

        for order in ("reverse", "random"):
            with ptxsim.set_options(cta_order=order, warp_order=order, seed=1):
                yield


# ------------------------------------------------------------------------------------------------ gradients
def leaves(*tensors: Tensor | None, dtype: torch.dtype | None = None) -> list[Tensor | None]:
    """The tensors as leaves of a graph of their own, where they lie; copies if a dtype is given."""
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor | None], upstream: Sequence[Tensor]) -> list[Tensor]:
    """Of the inputs that are there; the upstream gradients are cast to the dtypes of the outputs."""
    upstream = [gradient.to(output.dtype) for gradient, output in zip(upstream, outputs, strict=True)]
    return list(torch.autograd.grad(outputs, [tensor for tensor in inputs if tensor is not None], upstream))


# ------------------------------------------------------------------------------------------------ what is exact enough
def error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact||"""
    assert out.shape == exact.shape, f"shape {tuple(out.shape)}, expected {tuple(exact.shape)}"
    out, exact = out.double().cpu(), exact.double().cpu()
    assert not out.isnan().any(), f"{int(out.isnan().sum())} of {out.numel()} elements are NaN: never written?"
    return ((out - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def assert_rounded_once(out: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The budget of row ops: 1.1 times the error of rounding the exact result once.

    In fp32 storage the fp32 arithmetic itself rounds several times; there the bar is eager PyTorch, as for products.
    """
    if out.dtype == torch.float32:
        return assert_as_good_as(out, exact, eager)
    once = error(exact.to(out.dtype), exact)
    assert error(out, exact) <= 1.1 * once, f"error {error(out, exact):.3e}, one rounding is {once:.3e}"


def assert_same_however_it_lies(runner: Runner, found: Tensor, expected: Tensor) -> None:
    """The strides of arguments change no bit; CUDA's libraries, though, choose their kernels by them."""
    if runner.target == "gpu-torch":
        torch.testing.assert_close(found, expected)
    else:
        assert torch.equal(found, expected)


def assert_as_good_as(out: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The budget of products and models: 1.1 times the error of eager PyTorch in the same dtype, plus one unit roundoff."""
    assert out.dtype == eager.dtype
    bar = 1.1 * error(eager, exact) + UNIT_ROUNDOFF[out.dtype]
    assert error(out, exact) <= bar, f"error {error(out, exact):.3e}, eager's {error(eager, exact):.3e}, allowed {bar:.3e}"


# ------------------------------------------------------------------------------------------------ which cases to run
def pairwise(**factors: Sequence[Any]) -> list[Any]:
    """pytest params that between them have every pair of values; and, marked slow, more that have every three."""
    cases = list(itertools.product(*factors.values()))
    fast = covering(cases, 2)
    return [
        pytest.param(*cases[i], id=case_id(factors, cases[i]), marks=() if i in fast else pytest.mark.slow)
        for i in sorted(fast | covering(cases, min(3, len(factors))))
    ]


def on_kernels(cases: Sequence[Any], **gpu: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize ``compiled`` and the arguments of a case.

    The simulator takes all cases as Hopper. As Ampere it takes those that between them have every value, and leaves the others
    to the tier slow, since compiling is what they spend their time on. A GPU takes cases of its own.

    Args:
        cases: pytest params for the arguments that ``gpu`` names, in its order.
        gpu: values of each argument on a GPU, where every pair of them is in a case.
    """
    params = []
    fast = [case for case in cases if not case.marks]
    sample = {fast[i].id for i in covering([case.values for case in fast], 1)}
    for target in TARGETS if WHERE != "gpu" else ():
        for case in cases:
            marks = pytest.mark.slow if target == "sm_80" and case.id not in sample else case.marks
            params.append(pytest.param(target, *case.values, id=f"{target}-{case.id}", marks=marks))
    on_gpu = list(itertools.product(*gpu.values()))
    for i in sorted(covering(on_gpu, min(2, len(gpu)))):
        params.append(pytest.param("gpu", *on_gpu[i], id=f"gpu-{case_id(gpu, on_gpu[i])}", marks=pytest.mark.gpu))
    return pytest.mark.parametrize(("compiled", *gpu), params, indirect=["compiled"])


def covering(cases: Sequence[tuple[Any, ...]], strength: int) -> set[int]:
    """Indices of cases, chosen greedily, that between them have every combination of ``strength`` values."""
    combinations = [set(itertools.combinations(enumerate(case), strength)) for case in cases]
    missing = set().union(*combinations)
    chosen = set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(combinations[i] & missing))
        chosen.add(best)
        missing -= combinations[best]
    return chosen


def case_id(names: Iterable[str], case: Sequence[Any]) -> str:
    """``T17-D384-bf16``: numbers after their name, words as they are."""
    return "-".join(f"{name}{value}" if isinstance(value, int) else str(value) for name, value in zip(names, case, strict=True))


def outside_pytest() -> dict[str, str]:
    """Return the environment for a pytest that a test starts: without what its own run, or that run's workers, were told."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_ADDOPTS", "PYTEST_XDIST"))}


# ------------------------------------------------------------------------------------------------ models
def randomize(model: nn.Module) -> nn.Module:
    """Gives every trained parameter values that matter: the paper's zeros would hide whole branches."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            fan_in = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
            nn.init.normal_(parameter, std=0.02 if name.endswith("bias") else 0.5 * fan_in**-0.5)
    return model


def raises_naming(argument: str, call: Callable[[], object]) -> str:
    """The message of the ValueError that a call raises; it has to begin with the argument's name."""
    with pytest.raises(ValueError, match=f"^{argument}: got ") as caught:
        call()
    return str(caught.value)
