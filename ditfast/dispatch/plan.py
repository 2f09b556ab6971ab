"""Launch plans: what a launcher did for one signature of its arguments, done again without the launcher.

The first call with a signature runs the launcher under a ``Recorder``, which notes each tensor that it allocates, each view or
copy that it makes and each kernel that it launches. Later calls allocate the outputs and launch the compiled kernels: grids,
strides, sizes and kernel configs follow from the signature. A plan holds no tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from kernels.launch import Launch

ALIGNMENT = 16  # bytes; Triton specializes kernels for pointers that are multiples of it
CONSTANTS = frozenset((type(None), bool, int, float, str, torch.dtype))
STREAM = object()  # stands for the current stream among a launch's arguments, until the call
SEQUENCES = (list, tuple, torch.Size)
EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.new_empty.default)


MOST_SIGNATURES = 1024  # that an op remembers, the latest used
_caches: list[Any] = []


def remember() -> Callable[[Any], list[Any]]:
    """Return a function from a key to a list that stays with it, empty at first. Threads may share it."""

    @functools.lru_cache(MOST_SIGNATURES)
    def list_of(key: Any) -> list[Any]:
        return []

    _caches.append(list_of)
    return list_of


def forget_plans() -> None:
    """Select, and plan, anew at the next calls."""
    for lists in _caches:
        lists.cache_clear()


def signature(args: Sequence[Any]) -> tuple[tuple[Any, ...] | None, bool]:
    """Return all that the work on arguments depends on, their data aside, and whether a backward may follow.

    The first is None if an argument is neither a strided tensor whose numbers are in memory nor a constant, nor a list of such.
    Every call of an op pays for this: few and small parts are quick to compare, and a contiguous tensor needs no strides.
    """
    needs_grad = torch.is_grad_enabled()
    training = False
    parts: list[Any] = [needs_grad, args[0].device if args and isinstance(args[0], Tensor) else None]
    try:
        for arg in args:
            kind = type(arg)
            if kind is Tensor or kind is Parameter:
                pointer = arg.data_ptr()
                if arg.is_neg() or (not pointer and (arg.numel() or arg.is_meta)):  # the numbers are not what lies there
                    return None, False
                parts += (arg.shape, arg.dtype, arg.get_device(), pointer % ALIGNMENT)
                if not arg.is_contiguous():
                    parts.append(arg.stride())
                if needs_grad and arg.requires_grad:
                    training = True
                    parts.append(True)
            elif kind in CONSTANTS:
                parts += (kind, arg)
            elif kind in SEQUENCES and CONSTANTS.issuperset(kinds := tuple(map(type, arg))):
                parts += (kind, kinds, tuple(arg))
            elif kind in SEQUENCES:
                inner, inner_training = signature(arg)
                if inner is None:
                    return None, False
                parts += (kind, inner)
                training = training or inner_training
            else:
                return None, False
    except (RuntimeError, NotImplementedError):  # sparse and nested tensors have no strides, opaque ones no pointer
        return None, False
    return tuple(parts), training


class Slot(NamedTuple):
    """The place of a tensor among a plan's values: the arguments, then what its steps make."""

    place: int


class Call(NamedTuple):
    """An aten operator, applied to values: a view or a copy."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]

    def __call__(self, values: list[Any]) -> None:
        made = self.function(*_filled(self.args, values), **_filled(self.kwargs, values))
        for index, tensor in zip(self.outputs, _tensors(made), strict=True):
            values[index] = tensor

    def is_needed(self, used: set[int]) -> bool:
        return not used.isdisjoint(self.outputs) or self.function._schema.is_mutable

    def inputs(self) -> Iterator[int]:
        yield from _slots((self.args, tuple(self.kwargs.values())))


class Pointer:
    """The address of a view: a tensor's, and the bytes in front of the view. Triton asks an argument for ``data_ptr`` only."""

    __slots__ = ("base", "offset")

    def __init__(self, base: Tensor, offset: int):
        self.base = base
        self.offset = offset

    def data_ptr(self) -> int:
        return self.base.data_ptr() + self.offset


class Offset(NamedTuple):
    """Makes the pointer of a view."""

    base: int
    offset: int
    output: int

    def __call__(self, values: list[Any]) -> None:
        values[self.output] = Pointer(values[self.base], self.offset)

    def is_needed(self, used: set[int]) -> bool:
        return self.output in used

    def inputs(self) -> Iterator[int]:
        yield self.base


class KernelLaunch(NamedTuple):
    """A launch of a compiled kernel, as Triton's ``JITFunction.run`` ends in it."""

    run: Callable[..., None]
    indices: tuple[int, ...]  # of its arguments among the values: grid, stream, function, metadata, hooks, the kernel's own
    pick: Callable[[list[Any]], tuple[Any, ...]]  # which returns them

    def __call__(self, values: list[Any]) -> None:
        self.run(*self.pick(values))

    def is_needed(self, used: set[int]) -> bool:
        return True

    def inputs(self) -> Iterator[int]:
        yield from self.indices


Step: TypeAlias = Call | Offset | KernelLaunch


def can_record() -> bool:
    """Return whether launches go to compiled kernels: not ahead of time, to the interpreter, or past a profiler's hook."""
    from ditfast.kernels.launch import interpreted, needs_jit

    return not (needs_jit() or interpreted())


class Recorder(TorchDispatchMode):
    """Notes what a launcher does inside the ``with`` block with ``self.args``, aliases of its arguments."""

    def __init__(self, args: Sequence[Any]):
        super().__init__()
        with torch.no_grad():
            self.args = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
        self.values: list[Any] = list(self.args)
        self.aliases: list[tuple[Tensor, int]] = []  # other tensor objects for a value, by its index
        self.view_of: dict[int, int] = {}  # from a view's index to that of the value behind it
        self.empty: dict[int, tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]] = {}
        self.steps: list[Step] = []
        self.is_complete = True
        self._launching = False

    def __enter__(self) -> Recorder:
        from ditfast.kernels.launch import recorder

        self._token = recorder.set(self.launch)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._token.var.reset(self._token)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if self._launching:
            return made
        if func in EMPTY:
            self.empty[len(self.values)] = made.shape, made.stride(), made.dtype, made.device
            self.values.append(made)
        elif func is torch.ops.aten.detach.default:  # torch.empty ends in one
            source = self.as_slots(args[0])
            if type(source) is Slot:
                self.aliases.append((made, source.place))
        else:
            self._note_call(func, args, kwargs, made)
        return made

    def _note_call(self, func: Any, args: Any, kwargs: dict[str, Any], made: Any) -> None:
        inputs = self.as_slots(args), self.as_slots(kwargs)
        if not isinstance(made, Tensor | list | tuple):  # a number: read from a tensor, it may differ in the next call
            self.is_complete = self.is_complete and not list(_slots(inputs))
            return
        tensors = _tensors(made)
        places = range(len(self.values), len(self.values) + len(tensors))
        self.steps.append(Call(func, *inputs, tuple(places)))
        self.values.extend(tensors)
        if func.is_view and type(inputs[0][0]) is Slot:
            source = inputs[0][0].place
            self.view_of.update(dict.fromkeys(places, self.view_of.get(source, source)))

    def launch(self, launch: Callable[[], Launch | None]) -> None:
        """Launch a kernel and note it."""
        self._launching = True
        try:
            launched = launch()
        finally:
            self._launching = False
        if launched is None:
            self.is_complete = False
            return
        compiled = launched.compiled
        head = launched.grid, 1, 1, STREAM, compiled.function, compiled.packed_metadata, None, None, None
        indices = tuple(self._index(argument) for argument in (*head, *launched.arguments))
        self.steps.append(KernelLaunch(compiled.run, indices, itemgetter(*indices)))

    def _index(self, argument: Any) -> int:
        """Return the index, among the values, of a kernel's argument: a tensor, its pointer if that is a view's, a constant."""
        if argument is STREAM:
            return -1
        if not isinstance(argument, Tensor):
            self.values.append(argument)
            return len(self.values) - 1
        slot = self.as_slots(argument)
        if type(slot) is not Slot:
            return 0
        base = self.view_of.get(slot.place, slot.place)
        offset = argument.data_ptr() - self.values[base].data_ptr()
        if not offset:
            return base
        self.values.append(None)
        self.steps.append(Offset(base, offset, len(self.values) - 1))
        return len(self.values) - 1

    def as_slots(self, value: Any) -> Any:
        """Return the value with each tensor in it replaced by its slot; a tensor from elsewhere makes the record useless."""
        if isinstance(value, Tensor):
            for index, known in (*enumerate(self.values), *((index, alias) for alias, index in self.aliases)):
                if known is value:
                    return Slot(index)
            self.is_complete = False
            return value
        if isinstance(value, list | tuple):
            return type(value)(self.as_slots(item) for item in value)
        if isinstance(value, dict):
            return {key: self.as_slots(item) for key, item in value.items()}
        return value


class Plan:
    """Steps that a recorder noted, for other arguments of the same signature.

    Args:
        recorder: with all that the launcher did.
        made: what the launcher returned, or as much of it as callers get.
        launch: does the same through the launcher, where launches must go through Triton.
    """

    def __init__(self, recorder: Recorder, made: Any, launch: Callable[..., Any]):
        from ditfast.kernels.launch import current_stream, needs_jit

        self.launch = launch
        self.needs_jit = needs_jit
        self.current_stream = current_stream()
        device = next(value.device for value in recorder.args if isinstance(value, Tensor))
        self.index = device.index if device.type == "cuda" else None
        result = recorder.as_slots(made)
        used = set(_slots(result))
        self.steps: list[Step] = []
        for step in reversed(recorder.steps):
            if step.is_needed(used):
                self.steps.insert(0, step)
                used.update(step.inputs())
        self.empty = [(index, *what) for index, what in recorder.empty.items() if index in used]
        outputs = [slot.place for slot in ([result] if type(result) is Slot else result)]
        self.pick = itemgetter(*outputs) if outputs else lambda values: ()
        self.in_list = type(made) is list
        self.is_one = len(outputs) == 1
        made_values = recorder.values[len(recorder.args) :]
        self.places = [None if isinstance(value, Tensor) else value for value in made_values]  # constants are there already

    def __call__(self, *args: Any) -> Any:
        if self.needs_jit() or (self.index is not None and torch.cuda.current_device() != self.index):
            return self.launch(*args)
        values = [*args, *self.places, self.current_stream(self.index or 0)]
        for place, shape, strides, dtype, device in self.empty:  # half as expensive as torch.empty
            values[place] = torch.empty_strided(shape, strides, dtype=dtype, device=device)
        for step in self.steps:
            step(values)
        made = self.pick(values)
        if self.in_list:
            return [made] if self.is_one else list(made)
        return made


def _filled(value: Any, values: list[Any]) -> Any:
    """Return the value with each slot in it replaced by what is there."""
    if type(value) is Slot:
        return values[value.place]
    if isinstance(value, list | tuple):
        return type(value)([_filled(item, values) for item in value])
    if isinstance(value, dict):
        return {key: _filled(item, values) for key, item in value.items()}
    return value


def _slots(value: Any) -> Iterator[int]:
    if type(value) is Slot:
        yield value.place
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _slots(item)


def _tensors(made: Any) -> tuple[Tensor, ...]:
    return (made,) if isinstance(made, Tensor) else tuple(made)
