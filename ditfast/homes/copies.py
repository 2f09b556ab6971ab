"""Copies of modules for the parity check: fp32, random weights, no hooks; the live module is only read."""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..dispatch.override import backend
from .home import NOTE, Foreign, Swap

HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
ROUNDED = ("tf32", "bf16")
BIAS_STD = 0.3  # as strong as a trained model's shifts and gates

T = TypeVar("T")


def random_values(parameters: Iterable[nn.Parameter]) -> dict[int, Tensor]:
    """Return new fp32 parameters by the id of the old: products keep unit variance, so that attention and gates matter.

    The same parameters get the same values each time.
    """
    generators: dict[torch.device, torch.Generator] = {}
    values: dict[int, Tensor] = {}
    for parameter in parameters:
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
            continue
        device = check_device(parameter)
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(0)
        value = torch.empty_like(parameter, dtype=torch.float32, device=device, requires_grad=False)
        value.normal_(0, _std(parameter), generator=generators[device])
        values[id(parameter)] = nn.Parameter(value, requires_grad=False)
    return values


def _std(parameter: Tensor) -> float:
    if parameter.dim() < 2:
        return BIAS_STD
    inputs = parameter[0].numel() if parameter.dim() > 3 else parameter.shape[-1]
    return float(inputs**-0.5)


def check_device(tensor: Tensor) -> torch.device:
    """Return where the check computes: where the tensor is, or on the CPU for what is neither there nor on a GPU."""
    return tensor.device if tensor.device.type in ("cpu", "cuda") else torch.device("cpu")


def copy_of(module: nn.Module, values: Mapping[int, Tensor], convert: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """Return a copy of a module without hooks or swaps.

    Args:
        values: the copy's parameters, by the id of the module's; the others are shared.
        convert: makes the copy's buffers, and tensors among its attributes; in fp32 unless given.
    """
    convert = convert or in_fp32
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    memo.update(values)
    for part in module.modules():
        for buffer in part._buffers.values():
            if buffer is not None:
                memo[id(buffer)] = convert(buffer)
        for name, value in vars(part).items():
            if name.endswith(HOOKS):
                memo[id(value)] = OrderedDict()
            elif isinstance(value, Tensor):  # as the older kind of weight norm leaves them, which deepcopy refuses
                memo[id(value)] = convert(value)
            elif isinstance(getattr(value, "__func__", value), Swap):
                memo[id(value)] = None
    twin = copy.deepcopy(module, memo)
    for part in twin.modules():
        own: Foreign = vars(part)
        own.pop(NOTE, None)
        if own.get("forward", part) is None:
            del own["forward"]
        if isinstance(own["_modules"].get("_orig_mod"), nn.Module):  # compiled; the copy is not
            own["forward"] = own["_modules"]["_orig_mod"].__call__
    return twin


def cast_like(twin: nn.Module, module: nn.Module) -> bool:
    """Put a copy's parameters and buffers into the dtypes of the module's, in place; return whether any changed."""
    dtypes = {name: tensor.dtype for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    changed = False
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):  # a forward may have added some
        if dtypes.get(name, tensor.dtype) != tensor.dtype:
            tensor.data = tensor.data.to(dtypes[name])
            changed = True
    return changed


def release(module: nn.Module) -> None:
    """Free a copy's memory as soon as nobody holds it: the forwards set on its parts hold it in cycles."""
    for part in module.modules():
        vars(part).pop("forward", None)


def in_fp32(value: T) -> T:
    """Return a copy of a tensor, or of the tensors in a tree of arguments, in fp32 if it has fractions."""

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().to(check_device(leaf), torch.float32 if leaf.is_floating_point() else leaf.dtype, copy=True)

    return tree_map(convert, value)


def run_isolated(function: Callable[[], T]) -> T:
    """Call a function on a thread of its own, on the torch backend, and leave the random number generators as they were.

    Grad mode, autocast, hooks on saved tensors, function transforms and default devices are the thread's: new ones. The CUDA
    stream is the caller's. fp32 products are not rounded to TF32 or bf16 meanwhile.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    stream = torch.cuda.current_stream() if torch.cuda.is_available() and torch.cuda.is_initialized() else None

    def work() -> None:
        try:
            with torch.cuda.stream(stream), backend("torch"), _kept_rng(), _unrounded_products():
                results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="ditfast-parity-check")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def _unrounded_products() -> Iterator[None]:
    """Set and reset torch's precision of fp32 products, by the older API too where that has been used: torch checks both."""
    backends: Any = torch.backends  # whose attributes mypy does not know
    settings = backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv
    before = [setting.fp32_precision for setting in settings]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # only the newer API has been used
        older = "highest"
    try:
        if older != "highest":
            torch.set_float32_matmul_precision("highest")
        _set_precisions(settings, ["ieee" if precision in ROUNDED else precision for precision in before])
        yield
    finally:
        if older != "highest":
            torch.set_float32_matmul_precision(older)
        _set_precisions(settings, before)


def _set_precisions(settings: Sequence[Any], precisions: Sequence[str]) -> None:
    for setting, precision in zip(settings, precisions, strict=True):
        if setting.fp32_precision != precision:
            setting.fp32_precision = precision


@contextlib.contextmanager
def _kept_rng() -> Iterator[None]:
    states = [generator.get_state() for generator in _generators()]
    python, numpy = random.getstate(), np.random.get_state(legacy=False)  # noqa: NPY002 (which foreign code draws from)
    try:
        yield
    finally:
        for generator, state in zip(_generators(), states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def rng_states() -> list[bytes]:
    """Return the states of what a forward draws from, to be compared."""
    states = [generator.get_state().numpy().tobytes() for generator in _generators()]
    return [*states, pickle.dumps((random.getstate(), np.random.get_state(legacy=False)))]  # noqa: NPY002


def seed_all() -> None:
    """Seed what a forward draws from."""
    for generator in _generators():
        generator.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002


def _generators() -> Sequence[torch.Generator]:
    return [torch.default_generator, *(torch.cuda.default_generators if torch.cuda.is_initialized() else ())]
