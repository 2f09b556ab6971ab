"""How a fast forward stands in for somebody else's, and steps aside when the module is no longer what it was."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import CodeType, MethodType
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import blocks, ops
from ..conditioning import project
from ..dispatch.selection import choose
from ..dispatch.shapes import OpShape
from ..ops import cpu_chain
from ..ops.attention import choose_engine
from ..plain import Snapshot, descendants, is_plain, is_unhooked
from ..torch_modes import computes_now
from .caches import Caches, Modulations
from .calls import NO_LENGTHS, UNLIMITED, Lengths, recomputed_later, tokens_of

Foreign: TypeAlias = Any  # an nn.Module of somebody else's, whose parts the type checker cannot know
VECTORS = len(blocks.Modulation._fields)  # of an adaLN-Zero block
REPORTED_TOKENS = 256  # of the one image that the report speaks of
NOTE = "_ditfast"  # the attribute that holds a module's swap, or the reason why it was left
SEVERAL_CONDITIONS = "one image has several timesteps or labels"
UNCHECKED = "checked at the first call"
OF_OTHER_DTYPES = "its inputs and weights have several dtypes"
WITH_GRADIENTS = "with gradients its own forward runs, over swapped blocks"


class Options(NamedTuple):
    dtype: torch.dtype | None = None  # of forwards without gradients; None: the parameters'
    engine: str | None = None  # of attention; None: the one expected to win
    cache_modulation: bool = False
    int8: bool = False  # on the CPU engine, without gradients


class Declined(NamedTuple):
    """The answer of a fast forward to a call that it leaves to the module's own forward."""

    reason: str


class Mismatch(Exception):
    """A module is not built as its family is; says where."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise Mismatch(reason)


class ModelInputs(ABC):
    """A family of modules whose arguments are known."""

    @abstractmethod
    def looks_like(self, module: Foreign) -> bool:
        """Return True if a module is of this family by its looks."""

    @abstractmethod
    def example(self, module: Foreign, generator: torch.Generator) -> tuple[Any, ...]:
        """Return arguments for the parity check, on the CPU, in fp32 or integer."""

    def other_example(self, example: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Return arguments of another kind than an example's, which forks may treat otherwise; None if there is none."""
        return None


class Home(ModelInputs):
    """A family of modules that a fast forward can stand in for. One object a family, without state."""

    name: str

    @abstractmethod
    def check(self, module: Foreign) -> None:
        """Raises ``Mismatch`` if the module is not built as the fast forward takes for granted."""

    @abstractmethod
    def called(self, module: Foreign) -> Sequence[nn.Module]:
        """Descendants that the fast forward calls, or reads if they are plain; all others it replaces."""

    @abstractmethod
    def forward(self, swap: Swap, *args: Any, **kwargs: Any) -> Any:
        """Return what the module's own forward returns, or ``Declined`` to leave this call to it."""

    def stand_in(self, module: Foreign, streams: list[Tensor]) -> Any:
        """Return what the module's own forward returns, of streams [B, T, D] in place of those that it computes."""
        return streams[0]

    def as_found(self, module: Foreign) -> bool:
        """What else, apart from modules, has to be as it was."""
        return True

    def heads(self, module: Foreign) -> tuple[int, int] | None:
        """(heads, head dim) of the attention that is replaced; None if it is not."""
        return None


class BlockHome(Home):
    """A family of adaLN-Zero blocks that a model's forward can fuse with each other."""

    @abstractmethod
    def modulation_linear(self, block: Foreign) -> nn.Module:
        """Return the linear [6 * D, D] that makes the block's vectors of SiLU of the conditioning vector."""

    @abstractmethod
    def chain(self, swap: Swap, modulation: blocks.Modulation) -> list[blocks.Sublayer]:
        """The block's sublayers."""


@dataclass(eq=False, repr=False)
class Swap:
    """Lies in a module's ``forward``. Copies and pickles with it; nothing else of the module has changed.

    Args:
        options: how the module's ops compute.
        lengths: of the sequences that its parity check covers; with ``NO_LENGTHS`` it is checked at its first call.
        check: parity check of a call of another length, returns why it must not be fast.
    """

    module: Foreign
    home: Home
    options: Options
    lengths: Lengths = UNLIMITED
    check: Callable[[Swap, Sequence[Any], Mapping[str, Any]], str | None] | None = None

    def __post_init__(self) -> None:
        module, home = self.module, self.home
        self.refuted = ""  # why calls of other lengths are left to the original, once that was checked
        self.fast_calls = 0
        self.original_calls: Counter[str] = Counter()  # by reason
        self.on = True  # off, it is the module's own forward: somebody may have wrapped it and keep it
        self.caches = Caches()
        self.kind = type(module)
        self.replaced = [(*where, type(where[-1])) for where in descendants(module, home.called(module))]
        parameters = inspect.signature(type(module).forward).parameters.values()
        self.optional = frozenset(parameter.name for parameter in parameters if parameter.default is None)
        self.dropouts = [part for _, _, part, _ in self.replaced if isinstance(part, nn.Dropout)]
        self._keep(None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], type(self.module)):
            return _run_bound(*args, **kwargs)
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            self.caches.clear()  # for whoever trains, and then writes through .data, as some EMAs do
        reason = self._unsupported(args, kwargs)
        if not reason:
            result = self.home.forward(self, *args, **kwargs)
            if not isinstance(result, Declined):
                if not compiling:  # a compiled graph would be compiled again for each count
                    self.fast_calls += 1
                return result
            reason = result.reason
        if not compiling:
            self.original_calls[reason] += 1
        return type(self.module).forward(self.module, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles count from zero, and ask their own module."""
        return {**vars(self), "fast_calls": 0, "original_calls": Counter(), "_snapshot": None, "_kept": None}

    def _unsupported(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Return why a call is left to the module's own forward before the fast one sees it, or nothing."""
        if torch.jit.is_tracing():
            return "traced by torch.jit"
        if not self.is_as_found():
            return "changed since, or hooked inside"
        is_rounded = self.dtype is not None or (self.options.int8 and not torch.is_grad_enabled())
        if is_rounded and recomputed_later(args, kwargs):
            return "recomputed in the backward, where it is not rounded"
        if self.lengths == UNLIMITED or self.lengths.cover(tokens_of(args, kwargs)):
            return ""
        if self.refuted or self.check is None:
            return self.refuted
        # Longer or shorter than any call before: checked ahead of it, so that its recomputation takes the same forward.
        reason = None if torch.compiler.is_compiling() else self.check(self, args, kwargs)
        if reason is None:
            return UNCHECKED
        if not reason:
            self.lengths = self.lengths.including(tokens_of(args, kwargs))
        self.refuted = reason
        return reason

    @property
    def __signature__(self) -> inspect.Signature:
        """For whoever inspects ``module.forward``."""
        return inspect.signature(MethodType(type(self.module).forward, self.module))

    @property
    def __code__(self) -> CodeType:
        """torch.export asks for it."""
        return type(self.module).forward.__code__

    def is_as_found(self) -> bool:
        """Return True if what the fast forward replaces is what it was, and nobody expects it to be called."""
        if not (self.on and self.home.as_found(self.module)):
            return False
        keeps = computes_now()
        if keeps and self._snapshot is not None and self._snapshot.holds():
            return True
        found = (
            type(self.module).forward is self.kind.forward  # patches that merge tokens replace classes
            and not _has_any_global_hook()
            and not any(dropout.p for dropout in self.dropouts)
            and all(
                parent._modules.get(name) is part
                and is_unhooked(part)
                and "forward" not in vars(part)
                and type(part).forward is kind.forward
                for parent, name, part, kind in self.replaced
            )
        )
        self._keep(self._parts() if found and keeps else None)
        return found

    def _parts(self) -> list[nn.Module]:
        """Return the modules that the fast forward stands in for; of a block, those that it reads or calls as well."""
        if isinstance(self.home, BlockHome):
            return list(self.module.modules())
        return [self.module, *(part for _, _, part, _ in self.replaced)]

    def _keep(self, parts: list[nn.Module] | None) -> None:
        """Begin to keep what is read of modules, until something about them changes."""
        self._snapshot = None if parts is None else Snapshot(parts)
        self._kept: tuple[Options, tuple[list[blocks.Sublayer], blocks.Projection]] | None = None

    def replaced_parameters(self) -> list[nn.Parameter]:
        return [p for _, _, part, _ in self.replaced for p in part._parameters.values() if p is not None]

    @property
    def dtype(self) -> torch.dtype | None:
        return None if torch.is_grad_enabled() else self.options.dtype

    def takes(self, linear: nn.Module, *activations: Tensor) -> bool:
        """Return True if activations have the dtype of a linear's weight, or are cast: by autocast, or to ``dtype``."""
        weight = linear._parameters.get("weight")
        if weight is None:  # of a wrapper; the attribute may be a parametrization, which computes, and writes buffers
            weight = next(linear.parameters(), None)
        if weight is None or not weight.is_floating_point():  # no linear, or a quantized one
            return True
        if all(activation.dtype == weight.dtype for activation in activations):
            return True
        return self.dtype is not None or torch.is_autocast_enabled(activations[0].device.type)

    def cast(self, activation: Tensor) -> Tensor:
        return activation if self.dtype is None else activation.to(self.dtype)

    def stored(self, weight: Tensor) -> Tensor:
        return weight if self.dtype is None else self.caches.cast(weight, self.dtype)

    def view(self, linear: nn.Module) -> blocks.Projection:
        projection = blocks.view(linear)
        if self.dtype is None:
            return projection
        if isinstance(projection, blocks.Linear):
            return blocks.Linear(*(self.stored(part) for part in projection))
        return partial(self.call, linear)

    def image(self, linear: nn.Module, u: Tensor, grid: tuple[int, int], patch_size: int, like: Tensor) -> Tensor:
        """Return the image [B, C', H, W], in the dtype of the model's input, of tokens [B, T, D] behind the last norm."""
        projection = self.view(linear)
        if isinstance(projection, blocks.Linear):
            out = ops.linear_unpatchify(u, *projection, grid, patch_size)  # [B, C', H, W]
        else:
            out = ops.unpatchify(projection(u), grid, patch_size)  # [B, C', H, W]
        return out if self.dtype is None else out.to(like.dtype)

    def call(self, module: Foreign, x: Tensor, *others: Tensor, **kwargs: Any) -> Any:
        """Calls a module on activations as its parameters want them, if those are not what is computed in."""
        if self.dtype is None:
            return module(x, *others, **kwargs)
        dtype = next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), x.dtype)
        return module(x.to(dtype), *(other.to(dtype) for other in others), **kwargs).to(x.dtype)

    def modulations(
        self, linear: nn.Module, fused: Sequence[Swap | None], activated: Tensor
    ) -> tuple[Tensor, list[blocks.Modulation | None]]:
        """Put ``activated`` [B, D] through the model's own linear and those of its fused blocks, in one call if none is called.

        Returns the linear's output [B, N], and the vectors of each block; None of a block that is called.
        """
        projections = [self.view(linear), *(inner.modulation_projection() for inner in fused if inner is not None)]
        own, *others = project(activated, projections, self.options.int8)
        of_blocks = iter(others)
        return own, [None if inner is None else blocks.Modulation(*next(of_blocks).chunk(VECTORS, dim=1)) for inner in fused]

    def cached_modulations(
        self, conditions: Sequence[Tensor], linears: Sequence[nn.Module], compute: Callable[[], Modulations]
    ) -> Modulations:
        """What linears make of conditioning vectors [B, D], from the cache if that is asked for and nobody wants a call."""
        if not self.options.cache_modulation or not all(map(is_plain, linears)):
            return compute()
        weights = [parameter for linear in linears for parameter in linear.parameters()]
        return self.caches.modulations(conditions, weights, compute)

    def fusible(self, block: nn.Module, tokens: int) -> Swap | None:
        """Return the swap of a block that may be fused with its neighbors: nobody expects the block to be called."""
        swap = swap_in(block)
        if swap is None or not isinstance(swap.home, BlockHome):
            return None
        if swap.dtype != self.dtype or swap.options.int8 != self.options.int8:
            return None
        return swap if swap.lengths.cover(tokens) and is_unhooked(block) and swap.is_as_found() else None

    def modulation_projection(self) -> blocks.Projection:
        assert isinstance(self.home, BlockHome)
        kept = self._block()
        return self.view(self.home.modulation_linear(self.module)) if kept is None else kept[1]

    def sublayers(self, modulation: blocks.Modulation) -> list[blocks.Sublayer]:
        """Return a block's sublayers, behind ``is_as_found``."""
        assert isinstance(self.home, BlockHome)
        kept = self._block()
        if kept is None:
            return self.home.chain(self, modulation)
        attn, mlp = kept[0]
        return blocks.sublayers(
            modulation,
            cast(blocks.SelfAttention, attn.transform),
            cast(blocks.Mlp, mlp.transform),
            attn_norm_eps=attn.norm.eps,
            mlp_norm_eps=mlp.norm.eps,
        )

    def _block(self) -> tuple[list[blocks.Sublayer], blocks.Projection] | None:
        """Return a block's sublayers without vectors, and the linear of these; None where weights are cast, or traced."""
        if self._snapshot is None or self.dtype is not None or not computes_now():
            return None
        if self._kept is None or self._kept[0] is not self.options:
            home = cast(BlockHome, self.home)
            projection = self.view(home.modulation_linear(self.module))
            self._kept = self.options, (home.chain(self, blocks.Modulation()), projection)
        return self._kept[1]

    def modulation(self, activated: Tensor) -> blocks.Modulation:
        """Return the vectors of a block on its own, of SiLU of the conditioning vector [B, D]."""
        (vectors,) = project(activated, [self.modulation_projection()], self.options.int8)  # [B, 6 * D]
        return blocks.Modulation(*vectors.chunk(VECTORS, dim=1))

    def chain(self, modulation: blocks.Modulation | None) -> list[blocks.Sublayer]:
        """Return the block's sublayers for a model's forward, which counts as a fast call."""
        assert isinstance(self.home, BlockHome)
        assert modulation is not None
        if not torch.compiler.is_compiling():
            self.fast_calls += 1
        return self.sublayers(modulation)

    def is_idle(self) -> bool:
        """Return True if the fast forward never ran although it could have: not checked yet, or left to the original."""
        return self.lengths == NO_LENGTHS or (not self.fast_calls and bool(self.original_calls))

    def idle_reason(self) -> str:
        """Return why the fast forward never ran."""
        return self.refuted or (UNCHECKED if not self.original_calls else self.original_calls.most_common(1)[0][0])

    def engine(self) -> str:
        """What the ops of the module take, in words."""
        if not self.is_as_found():
            return "changed since, or hooked inside: its own forward runs"
        weight = next(parameter for parameter in self.module.parameters() if parameter.is_floating_point())
        dtype = self.options.dtype or weight.dtype
        norm = OpShape("layer_norm_modulate", dtype, REPORTED_TOKENS, (REPORTED_TOKENS, weight.shape[-1]))
        backend = choose(weight.device, norm).backend
        heads = self.home.heads(self.module)
        if heads is None:
            return backend
        try:
            attention = OpShape("attention", dtype, REPORTED_TOKENS, (REPORTED_TOKENS, *heads))
            engine = choose_engine(weight.device, attention, self.options.engine).backend
        except RuntimeError as error:
            return str(error)
        known = f"{backend}, attention {engine}"
        chain = self.home.chain(self, blocks.Modulation()) if isinstance(self.home, BlockHome) else []
        if not chain or not cpu_chain.runs_on(weight.device, dtype) or not blocks.are_read(chain):
            return known
        return f"{known}; without gradients the CPU engine{' in int8' if self.options.int8 else ''}"


def swap_in(module: nn.Module) -> Swap | None:
    """Return the swap that a module's forward runs, if any."""
    forward = vars(module).get("forward")
    bound = getattr(forward, "__func__", None)  # in a copy of the module it is the original's
    swap = vars(module).get(NOTE, bound) if isinstance(bound, Swap) else forward
    return swap if isinstance(swap, Swap) else None


def _run_bound(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a swap that was bound to its module like a function, as by Accelerate's ``unwrap_model``."""
    swap = vars(module).get(NOTE)
    return swap(*args, **kwargs) if isinstance(swap, Swap) else type(module).forward(module, *args, **kwargs)
