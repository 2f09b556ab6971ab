"""Operands and upstream gradients of any layout, for every Triton op: right, or refused by an error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import OPS, Case, Sizes, cases, outputs_of
from support import TARGETS, Runner, assert_as_good_as
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ditfast
import ditfast.kernels as kernels

NAN = float("nan")


# ------------------------------------------------------------------------------------------------ layouts
def contiguous(values: Tensor) -> Tensor:
    return values.clone()


def off_alignment(values: Tensor) -> Tensor:
    """Start one element after what an allocator gives out."""
    return torch.cat([values.new_full((1,), NAN), values.flatten()])[1:].view(values.shape)


def inside_a_wider_tensor(values: Tensor) -> Tensor:
    whole = values.new_full((*values.shape[:-1], values.shape[-1] + 3), NAN)
    whole[..., 1:-2] = values
    return whole[..., 1:-2]


def every_second(values: Tensor) -> Tensor:
    whole = values.new_full((2 * len(values), *values.shape[1:]), NAN)
    whole[1::2] = values
    return whole[1::2]


def transposed(values: Tensor) -> Tensor:
    """Store the dimensions in the reverse order."""
    order = list(range(values.dim()))[::-1]
    return values.permute(order).contiguous().permute(order)


def outer_dimensions_swapped(values: Tensor) -> Tensor:
    return values.transpose(0, 1).contiguous().transpose(0, 1) if values.dim() > 2 else values.clone()


def channels_last(values: Tensor) -> Tensor:
    return values.movedim(1, -1).contiguous().movedim(-1, 1) if values.dim() > 2 else transposed(values)


def expanded(values: Tensor) -> Tensor:
    return values[:1].clone().expand(values.shape)


def one_value(values: Tensor) -> Tensor:
    """Lay out a tensor as the gradient of ``sum()`` is."""
    return values.flatten()[0].clone().expand(values.shape)


def overlapping(values: Tensor) -> Tensor:
    """Start each sample one step of its next dimension after the one before."""
    strides = values.stride()
    return values.clone().as_strided(values.shape, (strides[1], *strides[1:])) if values.dim() > 1 else values.clone()


def odd_strides_of_size_one(values: Tensor) -> Tensor:
    strides = (7 if size == 1 else stride for size, stride in zip(values.shape, values.stride(), strict=True))
    return values.clone().as_strided(values.shape, tuple(strides))


LAYOUTS = (
    contiguous,
    off_alignment,
    inside_a_wider_tensor,
    every_second,
    transposed,
    outer_dimensions_swapped,
    channels_last,
    expanded,
    one_value,
    overlapping,
    odd_strides_of_size_one,
)
IN_PLACE = (outer_dimensions_swapped, inside_a_wider_tensor, expanded, overlapping, off_alignment, odd_strides_of_size_one)
UPSTREAM = (transposed, one_value, *LAYOUTS)  # hypothesis begins with the first


# ------------------------------------------------------------------------------------------------ checks
def check(case: Case, layouts: dict[str, Callable[[Tensor], Tensor]], upstream_layout: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    operands = {name: layouts[name](torch.randn(shape).to(case.dtype)) for name, shape in case.shapes.items()}
    copies = [operand.clone(memory_format=torch.contiguous_format) for operand in operands.values()]
    try:
        with torch.no_grad():
            found = outputs_of(case.op, *operands.values())
        refused = None
    except ValueError as error:
        refused = str(error).partition(": got ")[0]
    if refused is not None:
        operand = operands[refused]  # an operand that the error names
        outer = (0,) * (operand.dim() - case.inner)
        assert not operand[outer].is_contiguous(), f"{refused} is refused, and nothing is wrong with it"
        return
    compare(found, *(outputs_of(case.exact, *copies, dtype=dtype) for dtype in (torch.float64, case.dtype)))
    assert all(output.is_contiguous() for output in found)
    if not case.differentiable:
        return
    inputs = [operand.requires_grad_() for operand in operands.values()]
    outputs = outputs_of(case.op, *inputs)
    upstream = [upstream_layout(torch.randn(output.shape).to(output.dtype)) for output in outputs]
    results = []
    for dtype in (torch.float64, case.dtype):
        leaves = [copy.to(dtype).requires_grad_() for copy in copies]
        wanted = [gradient.to(dtype, memory_format=torch.contiguous_format) for gradient in upstream]
        results.append(list(torch.autograd.grad(outputs_of(case.exact, *leaves, dtype=dtype), leaves, wanted)))
    compare(list(torch.autograd.grad(outputs, inputs, upstream)), *results)


def compare(found: list[Tensor], exact: list[Tensor], eager: list[Tensor]) -> None:
    for value, wanted, usual in zip(found, exact, eager, strict=True):
        assert_as_good_as(value, wanted, usual.to(value.dtype))


def layouts_for(case: Case, choices: tuple[Callable[[Tensor], Tensor], ...]) -> st.SearchStrategy[Any]:
    return st.fixed_dictionaries({name: st.sampled_from(choices) for name in case.shapes})


# ------------------------------------------------------------------------------------------------ tests
@pytest.mark.parametrize("op", OPS)
def test_layouts_on_torch(op: str) -> None:
    case = cases()[op]

    @settings(max_examples=10, deadline=None, derandomize=True, database=None)
    @given(layouts=layouts_for(case, LAYOUTS), upstream=st.sampled_from(UPSTREAM))
    def check_any(layouts: Any, upstream: Any) -> None:
        check(case, layouts, upstream)

    with Runner.open("torch"):
        check_any()


@pytest.mark.parametrize(
    ("op", "examples"),
    [*((op, 2) for op in OPS), *(pytest.param(op, 25, marks=pytest.mark.full) for op in OPS)],
    ids=lambda value: value if isinstance(value, str) else f"{value}-examples",
)
def test_layouts_on_kernels(op: str, examples: int) -> None:
    case = cases()[op]

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(layouts=st.one_of(layouts_for(case, IN_PLACE), layouts_for(case, LAYOUTS)), upstream=st.sampled_from(UPSTREAM))
    def check_any(layouts: Any, upstream: Any) -> None:
        check(case, layouts, upstream)

    with Runner.open(TARGETS[0]):
        check_any()


SIZES_OF_ONE = Sizes(B=1, side=1, heads=1)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])
@pytest.mark.parametrize("op", OPS)
def test_odd_strides_of_dimensions_of_size_one(op: str, backend: str) -> None:
    case = cases(SIZES_OF_ONE)[op]
    with Runner.open("torch" if backend == "torch" else TARGETS[0]):
        check(case, dict.fromkeys(case.shapes, odd_strides_of_size_one), odd_strides_of_size_one)


@pytest.mark.parametrize("sizes", [Sizes(B=0), Sizes(side=0)], ids=["no-samples", "no-tokens"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", OPS)
def test_nothing(op: str, backend: str, sizes: Sizes) -> None:
    """Outputs without elements, and gradients of zeros; a first layer without an image is refused."""
    if op in ("timestep_embedding", "grouped_linear") and sizes.side == 0:
        pytest.skip("has no tokens in any case")
    case = cases(sizes)[op]
    operands = [torch.randn(shape).to(case.dtype) for shape in case.shapes.values()]
    with Runner.open("torch" if backend == "torch" else TARGETS[0]):
        if op == "patch_embed" and sizes.side == 0:
            with pytest.raises(ValueError, match="latents: got"):
                case.op(*operands)
            return
        inputs = [operand.requires_grad_(case.differentiable) for operand in operands]
        outputs = outputs_of(case.op, *inputs)
        wanted = outputs_of(case.exact, *operands, dtype=torch.float64)
        assert [output.shape for output in outputs] == [output.shape for output in wanted]
        if case.differentiable:
            found = torch.autograd.grad(outputs, inputs, [torch.ones_like(output) for output in outputs])
            assert [gradient.shape for gradient in found] == [operand.shape for operand in operands]
            assert not any(gradient.any() for gradient in found if gradient.shape[:1] != (0,))


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "ditfast":
            self.names.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def test_every_triton_op_is_covered() -> None:
    every_name = torch._C._dispatch_get_all_op_names()
    registered = {name.removeprefix("ditfast::") for name in every_name if name.startswith("ditfast::")}
    launched = {name for name in registered if hasattr(kernels, name)}  # the others are products of plain torch
    with FakeTensorMode(), ditfast.backend("triton"), Recorder() as recorder:
        for case in cases().values():
            for differentiable in {False, case.differentiable}:
                inputs = [torch.randn(shape, dtype=case.dtype, requires_grad=differentiable) for shape in case.shapes.values()]
                outputs = outputs_of(case.op, *inputs)
                if differentiable:
                    torch.autograd.grad(outputs, inputs, [torch.randn_like(output) for output in outputs])
    assert len(launched) > len(OPS)
    assert recorder.names >= launched
