"""Arguments of the wrong kind: an error that begins with the argument's name, for every argument of every op and of DiT."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from ditfast import DiT, DiTConfig, ops
from ditfast.benchmarks.kernel_cases import OPS, Sizes, arguments

CONFIG = DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8, num_classes=10)
SIZES = Sizes(CONFIG, 2)
NUMBERS: dict[str, Any] = {
    "eps": 1e-6,
    "grid": CONFIG.grid,
    "patch_size": CONFIG.patch_size,
    "scale": 4.0,  # of classifier_free_guidance; elsewhere it is a tensor
    "channels": 3,
    "guided_channels": 3,
    "clip": True,
    "dim": 256,
    "frequency_divisor": 128,
    "engine": "sdpa",
}
WRONG: dict[str, Any] = {
    "None": None,
    "list": [1.0, 2.0],
    "ndarray": np.zeros((2, 4), np.float32),
    "number": 1.5,
    "name": "DiT-XL/2",
    "module": torch.nn.Identity(),
}


def fits(value: object, parameter: inspect.Parameter) -> bool:
    """Return whether the annotation, a string, allows a value of this kind."""
    kinds = str(parameter.annotation)
    return (value is None and "None" in kinds) or (isinstance(value, float) and "float" in kinds)


def given(op: str) -> dict[str, Any]:
    """Return right arguments; where an op takes several tensors, a list of one."""
    tensors = arguments(op, SIZES, torch.float32, torch.device("cpu"), backward=False)
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(getattr(ops, op)).parameters.items():
        value = tensors.get(name, NUMBERS.get(name))
        found[name] = [value[0]] if isinstance(value, torch.Tensor) and "Sequence" in str(parameter.annotation) else value
    return found


def call_with(op: str, wrong: str, value: object) -> Callable[[], object]:
    right = given(op)
    if isinstance(right[wrong], list) and isinstance(value, torch.Tensor):
        value = [value]
    return lambda: getattr(ops, op)(**{**right, wrong: value})


@pytest.mark.parametrize("op", OPS)
def test_every_argument_of_an_op(op: str) -> None:
    parameters = inspect.signature(getattr(ops, op)).parameters
    getattr(ops, op)(**given(op))  # as given it runs
    for name, parameter in parameters.items():
        for value in WRONG.values():
            if not fits(value, parameter):
                with pytest.raises((TypeError, ValueError), match=f"^{name}: got "):
                    call_with(op, name, value)()


NOT_DENSE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": lambda value: value.to_sparse(),
    "compressed": lambda value: value.flatten(1).to_sparse_csr() if value.dim() > 1 else value.to_sparse(),
    "nested": lambda value: torch.nested.nested_tensor(list(value.unbind())),
    "jagged": lambda value: torch.nested.nested_tensor([value.flatten(), value.flatten()[1:]], layout=torch.jagged),
    "of oneDNN": lambda value: value.to_mkldnn(),
}


@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:The PyTorch API of nested tensors")
def test_a_tensor_that_is_not_dense(kind: str) -> None:
    for op in OPS:
        for name, value in arguments(op, SIZES, torch.float32, torch.device("cpu"), backward=False).items():
            with pytest.raises(TypeError, match=f"^{name}: got a .*tensor.*, expected a dense one: "):
                call_with(op, name, NOT_DENSE[kind](value))()


BEYOND: dict[str, tuple[Any, ...]] = {
    "eps": (-1e-6, -1, float("nan"), float("inf"), 1e39, 10**400, True),
    "scale": (float("nan"), float("inf"), -1e39, 10**400, True),
    "patch_size": (0, -2, True),
    "channels": (-1, 50, 10**400, True),
    "guided_channels": (-1, 50, 10**400, True),
    "dim": (-2, 7, True),
    "frequency_divisor": (0, -1, True),
}


def numbers() -> Iterator[tuple[str, str]]:
    """Yield each op and argument of it that is a number with a range."""
    for op in OPS:
        tensors = arguments(op, SIZES, torch.float32, torch.device("cpu"), backward=False)
        for name in inspect.signature(getattr(ops, op)).parameters:
            if name in BEYOND and name not in tensors:
                yield op, name


@pytest.mark.parametrize(("op", "name"), list(numbers()))
def test_numbers_out_of_their_range(op: str, name: str) -> None:
    for value in (*BEYOND[name], np.array(1)):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: got "):
            call_with(op, name, value)()


@pytest.mark.parametrize("number", [np.float32(2), np.int64(2), 2], ids=["np.float32", "np.int64", "int"])
def test_numbers_of_other_types(number: Any) -> None:
    x = torch.randn(2, 4, 2, 2)
    assert torch.equal(ops.classifier_free_guidance(x, number, np.int64(3)), ops.classifier_free_guidance(x, 2.0, 3))


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("op", OPS)
def test_a_list_beside_tensors(op: str, autocast: bool) -> None:
    for name in arguments(op, SIZES, torch.float32, torch.device("cpu"), backward=False):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(TypeError, match=f"^{name}: got "),
        ):
            call_with(op, name, [1.0])()


@pytest.mark.parametrize("method", ["forward", "forward_with_cfg", "forward_modulated", "modulation_vectors"])
def test_every_argument_of_a_model(method: str) -> None:
    model = DiT(CONFIG).eval()
    x, t, y = torch.randn(2, *CONFIG.input_shape), torch.tensor([10, 20]), torch.tensor([1, CONFIG.null_class])
    given: dict[str, Any] = {
        "forward": {"x": x, "t": t, "y": y},
        "forward_with_cfg": {"x": x, "t": t, "y": y, "cfg_scale": 4.0, "guidance_channels": 3},
        "forward_modulated": {"x": x, "vectors": model.modulation_vectors(t, y)},
        "modulation_vectors": {"t": t, "y": y},
    }[method]
    call = getattr(model, method)
    call(**given)
    for name, parameter in inspect.signature(call).parameters.items():
        for value in WRONG.values():
            if not fits(value, parameter):
                with pytest.raises((TypeError, ValueError), match=f"^{name}: got "):
                    call(**{**given, name: value})


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39, 10**400], ids=["nan", "inf", "1e39", "10^400"])
def test_a_guidance_scale_that_is_not_finite(scale: float) -> None:
    model = DiT(CONFIG).eval()
    x, t, y = torch.randn(2, *CONFIG.input_shape), torch.tensor([10, 20]), torch.tensor([1, CONFIG.null_class])
    with pytest.raises(ValueError, match=r"^cfg_scale: got .*, expected a finite number$"):
        model.forward_with_cfg(x, t, y, scale)


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_a_model_without_a_config(value: object) -> None:
    with pytest.raises(TypeError, match=r"^config: got .*, expected a ditfast\.DiTConfig"):
        DiT(value)  # type: ignore[arg-type]


def test_a_name_where_a_config_belongs() -> None:
    with pytest.raises(TypeError, match=r"DiTConfig\.from_name\('DiT-XL/2'\) makes one"):
        DiT("DiT-XL/2")  # type: ignore[arg-type]


@pytest.mark.parametrize("field", [field for field in DiTConfig.__dataclass_fields__])
def test_every_field_of_a_config(field: str) -> None:
    allowed = {"mlp_ratio": float, "class_dropout_prob": float}
    for value in WRONG.values():
        if not isinstance(value, allowed.get(field, ())):
            with pytest.raises((TypeError, ValueError), match=f"^{field}: got "):
                DiTConfig(**{field: value})
