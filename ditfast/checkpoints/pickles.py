"""Pickles of strangers: tensors and plain values are read, other known types stay inert records, and nothing in them runs.

torch's own reader with ``weights_only=True`` knows one protocol of pickle and no types of other packages, which training
scripts save beside their weights. The reader here knows every protocol; what it may call is the short list below.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any, ClassVar

import torch
from torch import Tensor


class Refused(pickle.UnpicklingError):
    """Content of a pickle that is not allowed."""


class Inert:
    """A value of a type that is neither a tensor nor plain, of which only the state is kept.

    Attributes:
        type_name: of the type, or of the function that would have made the value.
        state: what the file says about it; None where it says nothing.
    """

    type_name = ""

    def __new__(cls, *arguments: object, **named: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: object, **named: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def append(self, item: object) -> None:
        """Pass over an item, as those of the next three."""

    def extend(self, items: object) -> None: ...

    def add(self, item: object) -> None: ...

    def __setitem__(self, key: object, value: object) -> None: ...


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object) -> Tensor:
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


_CALLED: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": lambda *_: {},
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda values, *_: values,
    "torch._utils._rebuild_parameter_with_state": lambda values, *_: values,
}
_INERT_PACKAGES = {"collections", "datetime", "numpy", "omegaconf", "pathlib", "typing"}
_INERT_MODULES = {"torch", "torch._utils"}  # dtypes, devices, sizes, kinds of tensors that are no weights
_INERT_NAMES = {
    "_codecs.encode",  # bytes in protocol 2
    "argparse.Namespace",
    "copyreg._reconstructor",
    "copy_reg._reconstructor",
    "decimal.Decimal",
    "types.SimpleNamespace",
    "uuid.UUID",
}
_INERT_BUILTINS = {
    *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "long", "object", "range"),
    *("set", "slice", "str", "tuple", "type", "unicode", "xrange"),
}


class Unpickler(pickle._Unpickler):
    """A reader for torch.load, in pure Python: what the standard one in C allocates for a few damaged bytes has no limit."""

    stack: list[Any]

    def find_class(self, module: str, name: str) -> Any:
        """Return what may be called, or a new inert type; raise Refused for a name that is on no list."""
        qualified = f"{module}.{name}"
        if qualified in _CALLED:
            return _CALLED[qualified]
        is_builtin = module in ("builtins", "__builtin__") and name in _INERT_BUILTINS
        known = module.partition(".")[0] in _INERT_PACKAGES or module in _INERT_MODULES or qualified in _INERT_NAMES
        if not (known or is_builtin):
            raise Refused(qualified)
        return type("Inert", (Inert,), {"type_name": qualified})

    def get_extension(self, code: int) -> None:
        """Refuse types by number, which this process may have registered."""
        raise Refused(f"the extension {code}")

    def _build(self) -> None:
        """Take a value's state; raise Refused if the value keeps none, as a function."""
        state = self.stack.pop()
        value = self.stack[-1]
        if isinstance(value, Inert):
            value.state = state
        elif type(value) is not OrderedDict:  # a state dict's tells the versions of modules
            raise Refused(f"a {type(value).__name__} with a state")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}


def load(file: IO[bytes], **options: Any) -> object:
    """Return the next pickle of a file."""
    return Unpickler(file, **options).load()
