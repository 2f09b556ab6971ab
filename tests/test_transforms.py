"""torch's transforms: plain torch's results, or an error that says how to get them; never a derivative that is zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import foreign
import pytest
import torch
from support import error, randomize
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import ditfast
from ditfast import DiT, DiTConfig, ops, reference
from ditfast.benchmarks.kernel_cases import OPS, Sizes, arguments

DESIGNS = ("adaln_zero", "adaln", "cross_attention", "in_context")
TOLERANCE = 1e-5
SIZES = Sizes(DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8, num_classes=10), 2)


@pytest.fixture(autouse=True)
def _differentiable_attention() -> Iterator[None]:
    """torch's other attention kernels have no forward-mode and no second derivatives."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def pair(design: str = "adaln_zero") -> tuple[DiT, reference.DiT]:
    """Return a model and the reference with its weights."""
    config = DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, num_classes=10, conditioning=design)
    model = randomize(DiT(config)).eval()
    plain = reference.DiT(config).eval()
    plain.load_state_dict(model.state_dict())
    return model, plain


def inputs(B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, 4, 8, 8), torch.linspace(20, 900, B), torch.arange(B) % 10


def op_cases(dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, Callable[..., Any], dict[str, Tensor]]]:
    for name in OPS:
        tensors = arguments(name, SIZES, dtype, torch.device("cpu"), backward=False)
        yield name, lambda op=name, **tensors: OPS[op].call(SIZES, **tensors), tensors


EVERY_OP = pytest.mark.parametrize(("op", "call", "tensors"), list(op_cases()), ids=list(OPS))


def first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]


# ------------------------------------------------------------------------------------------------ ops
def test_every_public_op_has_a_case() -> None:
    public = {name for name in ops.__all__ if callable(getattr(ops, name)) and not name.startswith("attention_")}
    assert public <= set(OPS)


@EVERY_OP
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap", "forward-mode"])
def test_kernels_refuse_transforms(op: str, call: Any, tensors: dict[str, Tensor], transform: str) -> None:
    if (op, transform) == ("grouped_linear", "grad"):
        pytest.skip("its gradients are torch's on any backend")
    name, value = next(iter(tensors.items()))

    def of_one(value: Tensor) -> Tensor:
        return first(call(**{**tensors, name: value}))

    def run() -> object:
        match transform:
            case "jvp":
                return jvp(of_one, (value,), (torch.ones_like(value),))
            case "grad":
                return grad(lambda value: of_one(value).sum())(value)
            case "vmap":
                return vmap(of_one)(value[None])
            case _:
                with forward_ad.dual_level():
                    return of_one(forward_ad.make_dual(value, torch.ones_like(value)))

    with ditfast.backend("triton"), pytest.raises(RuntimeError, match=r"ditfast\.backend\('torch'\)"):
        run()


@EVERY_OP
def test_plain_torch_follows_each_argument(op: str, call: Any, tensors: dict[str, Tensor]) -> None:
    """vmap over any one argument, without gradients: what is computed in place is not of the others' shapes."""
    for name, value in tensors.items():

        def of_one(value: Tensor, name: str = name) -> Tensor:
            return first(call(**{**tensors, name: value}))

        copies = torch.stack([value, -value, 2 * value])
        with torch.no_grad():
            assert error(vmap(of_one)(copies), torch.stack([of_one(copy) for copy in copies])) < TOLERANCE, name


@EVERY_OP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_plain_torch_has_forward_mode_derivatives(op: str, call: Any, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Of each argument, against a difference of two calls in fp32."""
    if op == "denoise_update" and dtype != torch.float32:
        pytest.skip("its state is fp32")
    for name, value in tensors.items():
        direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))

        def of_one(value: Tensor, name: str = name) -> Tensor:
            typed = {other: t.to(dtype) if other not in OPS[op].fp32 else t for other, t in tensors.items()}
            return first(call(**{**typed, name: value}))

        typed = value if name in OPS[op].fp32 else value.to(dtype)
        found = jvp(of_one, (typed,), (direction.to(typed.dtype),))[1]
        exact = jvp(lambda v, name=name: first(call(**{**tensors, name: v})), (value,), (direction,))[1]
        step = 1e-2
        ahead, behind = (first(call(**{**tensors, name: value + sign * step * direction})) for sign in (1, -1))
        assert error(exact, (ahead.double() - behind.double()) / (2 * step)) < 2e-2, name
        assert error(found, exact) < (TOLERANCE if dtype == torch.float32 else 5e-2), name


def test_a_single_token_is_no_view_of_its_image() -> None:
    """Where the layouts agree, a view would let a write into the image reach the tokens."""
    x = torch.randn(2, 1, 4)
    kept = x.clone()
    for image in (ops.unpatchify(x, (1, 1), 2), ops.unpatchify(x.view(2, 4, 1), (2, 2), 1)):
        image.zero_()
        assert torch.equal(x, kept)


# ------------------------------------------------------------------------------------------------ models
def tangent(model: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction))).tangent.clone()


@pytest.mark.parametrize("design", DESIGNS)
def test_forward_mode_without_gradients(design: str) -> None:
    """The CPU engine reads memory, in which a dual tensor has no tangent."""
    (model, plain), (x, t, y) = pair(design), inputs()
    direction = torch.randn_like(x)
    exact = tangent(lambda x: plain(x, t, y), x, direction)
    assert error(tangent(lambda x: model(x, t, y), x, direction), exact) < TOLERANCE


@pytest.mark.parametrize("design", DESIGNS)
def test_gradients_of_each_sample(design: str) -> None:
    (model, plain), arguments = pair(design), inputs()
    weights = {name: weight.detach() for name, weight in plain.named_parameters() if weight.requires_grad}

    def gradients(model: nn.Module) -> Tensor:
        def loss(weights: dict[str, Tensor], *sample: Tensor) -> Tensor:
            return functional_call(model, weights, tuple(value[None] for value in sample)).square().mean()

        found = vmap(grad(loss), in_dims=(None, 0, 0, 0))(weights, *arguments)
        return torch.cat([found[name].flatten() for name in weights])

    assert error(gradients(model), gradients(plain)) < TOLERANCE


def test_second_derivatives() -> None:
    (model, plain), (x, t, y) = pair(), inputs()

    def second(model: nn.Module) -> Tensor:
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(leaf, t, y).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), leaf)[0]

    assert error(second(model), second(plain)) < TOLERANCE


QUIET_TRACING = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
GRADIENTS = pytest.mark.parametrize("gradients", [False, True], ids=["no-grad", "grad"])


@GRADIENTS
@pytest.mark.parametrize("tracer", ["make_fx", "jit.trace"])
@pytest.mark.parametrize("design", DESIGNS)
@QUIET_TRACING
def test_tracing(design: str, tracer: str, gradients: bool) -> None:
    """jit.trace traces a second time, without gradients, and compares the graphs."""
    (model, plain), arguments = pair(design), inputs()

    def call(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return model(x, t, y)

    with torch.set_grad_enabled(gradients):
        traced = make_fx(call)(*arguments) if tracer == "make_fx" else torch.jit.trace(model, arguments)
        other = torch.randn(2, 4, 8, 8), arguments[1] / 2, arguments[2] + 3
        assert error(traced(*other), plain(*other)) < TOLERANCE


@pytest.mark.parametrize("design", DESIGNS)
def test_export_with_any_batch(design: str) -> None:
    (model, plain), batch = pair(design), Dim("batch", min=2, max=64)
    program = export(model, inputs(2), dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    other = inputs(5)
    assert error(program.module()(*other), plain(*other)) < TOLERANCE


@pytest.mark.parametrize("in_mode", [True, False], ids=["in-the-mode", "out-of-it"])
def test_fake_tensors(in_mode: bool) -> None:
    model, _ = pair()
    with torch.no_grad():
        exact = model(*inputs())
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = [mode.from_tensor(value) for value in inputs()]
            out = model(*fakes) if in_mode else None
        assert (model(*fakes) if out is None else out).shape == exact.shape


def test_labels_that_do_not_exist_are_still_refused() -> None:
    model, _ = pair()
    x, t, _ = inputs()
    with pytest.raises(ValueError, match=r"^y: got labels 0\.\.11, expected 0\.\.10$"):
        model(x, t, torch.tensor([0, 11]))


# ------------------------------------------------------------------------------------------------ accelerated models
def accelerated(name: str) -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """Return a model, accelerated; the same untouched; and its inputs."""
    make, make_inputs = {
        "official": (foreign.official, foreign.official_inputs),
        "diffusers": (foreign.diffusers_dit, foreign.diffusers_inputs),
    }[name]
    torch.manual_seed(0)
    model, plain = make().eval(), make().eval()
    plain.load_state_dict(model.state_dict())
    return ditfast.accelerate(model), plain, make_inputs()


BOTH = pytest.mark.parametrize("name", ["official", "diffusers"])


@BOTH
def test_accelerated_forward_mode(name: str) -> None:
    model, plain, given = accelerated(name)
    image = next(key for key, value in given.items() if isinstance(value, Tensor) and value.dim() == 4)
    direction = torch.randn_like(given[image])

    def found(model: nn.Module) -> Tensor:
        return tangent(lambda x: foreign.tensors(model(**{**given, image: x}))[0], given[image], direction)

    exact = found(plain)
    with torch.no_grad():
        model(**given)  # what it keeps between calls has no tangent
    assert error(found(model), exact) < TOLERANCE


@BOTH
def test_accelerated_models_keep_no_fake_tensors(name: str) -> None:
    model, plain, given = accelerated(name)
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes = {key: mode.from_tensor(v) if isinstance(v, Tensor) else v for key, v in given.items()}
            shape = foreign.tensors(model(**fakes))[0].shape
        out, exact = (foreign.tensors(m(**given))[0] for m in (model, plain))
        assert shape == exact.shape
        assert error(out, exact) < TOLERANCE


@BOTH
@GRADIENTS
@QUIET_TRACING
def test_accelerated_models_are_traced(name: str, gradients: bool) -> None:
    """jit.trace makes tensors of the sizes of tensors."""
    model, plain, given = accelerated(name)
    names = [key for key, value in given.items() if isinstance(value, Tensor)]
    rest = {key: value for key, value in given.items() if key not in names}

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: Tensor) -> Tensor:
            return foreign.tensors(self.model(**dict(zip(names, values, strict=True)), **rest))[0]

    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(Positional(), tuple(given[key] for key in names))
        image = next(key for key in names if given[key].dim() == 4)
        other = {**given, image: given[image] + 1}
        assert error(traced(*(other[key] for key in names)), foreign.tensors(plain(**other))[0]) < TOLERANCE


def test_a_backward_kernel_launched_on_its_own_refuses_dual_tensors() -> None:
    gradient = torch.randn(2, 4, 4, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(gradient, torch.ones_like(gradient))
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative; run it under ditfast\.backend\('torch'\)"):
            torch.ops.ditfast.unpatchify_backward(dual, 2)
