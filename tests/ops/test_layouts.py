"""Operands and upstream gradients of any layout, for every Triton op: right, or refused by an error that names the argument."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TARGETS, Runner, assert_as_good_as
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import ditfast
import ditfast.kernels as kernels
from ditfast import ops

BF16, FP32 = torch.bfloat16, torch.float32
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


# ------------------------------------------------------------------------------------------------ ops
class Sizes(NamedTuple):
    B: int = 2
    side: int = 2  # of the grid of tokens
    heads: int = 2
    D: int = 32


class Case(NamedTuple):
    """An op as a function of tensors, the same in eager PyTorch in a dtype, and the shapes of the tensors."""

    op: Callable[..., Any]
    exact: Callable[..., Any]
    shapes: dict[str, tuple[int, ...]]
    inner: int = 1  # last dimensions that have to be contiguous
    dtype: torch.dtype = BF16
    differentiable: bool = True


P, C = 2, 4


def cases(sizes: Sizes = Sizes()) -> dict[str, Case]:  # noqa: B008
    B, side, H, D = sizes
    T, grid, features, head = side * side, (side, side), P * P * C, 16
    x, vector, image = (B, T, D), (B, D), (B, C, P * side, P * side)
    linear = {"x": x, "weight": (D, D), "bias": (D,)}
    last = {"weight": (features, D), "bias": (features,)}
    ends: dict[str, Any] = {"grid": grid, "patch_size": P}

    def joint(x: Tensor, h: Tensor, *vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        stored = oracles.gated_residual(x, h, vectors[0], dtype)
        return stored, oracles.layer_norm_modulate(stored, *vectors[1:], dtype)

    def update(x: Tensor, output: Tensor, noise: Tensor, update: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        x, output, noise, update, scale = (tensor.to(dtype) for tensor in (x, output, noise, update, scale))
        conditional, other = output.chunk(2)
        guided = other + scale.view(-1, 1, 1, 1) * (conditional - other)
        predicted = torch.cat([guided[:, :3], conditional[:, 3:]], dim=1)
        x0 = (update[0] * x + update[1] * predicted).clamp(-1, 1)
        return update[2] * x0 + update[3] * x + (0.5 * update[4]).exp() * noise

    def features_of(t: Tensor, dtype: torch.dtype) -> Tensor:
        angles = t.to(dtype)[:, None] * torch.exp(-torch.arange(8) * (torch.tensor(1e4).log() / 8)).to(dtype)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    return {
        "attention": Case(ops.attention, oracles.attention, {"qkv": (B, T, 3, H, head)}, inner=3),
        "cross_attention": Case(
            ops.cross_attention, oracles.cross_attention, {"q": (B, T, H, head), "kv": (B, 3, 2, H, head)}, inner=2
        ),
        "layer_norm_modulate": Case(
            ops.layer_norm_modulate, oracles.layer_norm_modulate, {"x": x, "shift": vector, "scale": x}
        ),
        "gated_residual": Case(ops.gated_residual, oracles.gated_residual, {"x": x, "h": x, "gate": vector}),
        "gated_residual_layer_norm_modulate": Case(
            ops.gated_residual_layer_norm_modulate, joint, {"x": x, "h": x, "gate": x, "shift": vector, "scale": vector}
        ),
        "linear": Case(ops.linear, oracles.linear, linear),
        "linear_gelu": Case(ops.linear_gelu, oracles.linear_gelu, linear),
        "linear_gated_residual": Case(
            ops.linear_gated_residual, oracles.linear_gated_residual, {**linear, "residual": x, "gate": vector}
        ),
        "mlp": Case(
            ops.mlp,
            oracles.mlp,
            {"x": x, "fc1_weight": (48, D), "fc1_bias": (48,), "fc2_weight": (D, 48), "fc2_bias": (D,)},
        ),
        "patch_embed": Case(
            partial(ops.patch_embed, patch_size=P),
            oracles.patch_embed,
            {"latents": image, "weight": (D, C, P, P), "bias": (D,), "pos_embed": (1, T, D)},
        ),
        "unpatchify": Case(
            partial(ops.unpatchify, **ends),
            lambda x, dtype: oracles.unpatchify(x.to(dtype), grid, P),
            {"x": (B, T, features)},
        ),
        "linear_unpatchify": Case(
            partial(ops.linear_unpatchify, **ends), partial(oracles.linear_unpatchify, **ends), {"u": x, **last}
        ),
        "final_layer": Case(
            partial(ops.final_layer, **ends),
            partial(oracles.final_layer, **ends),
            {"x": x, "shift": vector, "scale": vector, **last},
        ),
        "classifier_free_guidance": Case(
            partial(ops.classifier_free_guidance, scale=4.0, channels=3),
            partial(oracles.classifier_free_guidance, scale=4.0, channels=3),
            {"out": (2 * B, *image[1:])},
        ),
        "denoise_update": Case(
            partial(ops.denoise_update, guided_channels=3, clip=True),
            update,
            {"x": image, "output": (2 * B, *image[1:]), "noise": image, "update": (6,), "scale": (B,)},
            dtype=FP32,
            differentiable=False,
        ),
        "timestep_embedding": Case(partial(ops.timestep_embedding, dim=16), features_of, {"t": (B,)}, dtype=FP32),
    }


OPS = tuple(cases())


def outputs_of(call: Callable[..., Any], *operands: Tensor, **options: Any) -> list[Tensor]:
    found = call(*operands, **options)
    return list(found) if isinstance(found, tuple) else [found]


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
    if op == "timestep_embedding" and sizes.side == 0:
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
    assert recorder.names == launched
