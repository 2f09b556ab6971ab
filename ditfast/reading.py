"""What a DiT's forward reads of its layers: asked once, and again as soon as something about them has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from . import blocks, cpu
from .conditioning import project
from .cpu.kept import KeptChain
from .layers import Block, FinalLayer, Transforms, adaln_projections, adaln_vectors, is_read
from .ops import cpu_chain
from .plain import Snapshot
from .torch_modes import computes_now


class Reading:
    """A model's layers as they are now.

    Args:
        layers: the blocks.
        final_layer: what follows them.
        int8: as ``DiT.quantize`` left it.
        is_adaln: blocks and final layer have vectors of their own, made of the conditioning vector.

    Attributes:
        layers: the blocks and the final layer; None in place of those that somebody wants to be called.
        transforms: of each block that is read.
        is_kept_on_cpu: the CPU engine may keep the blocks and the final norm as one chain, for ``run_on_cpu``.
        projections: of the adaLN modulations of the layers that are read; None where one of the modules wants to be called.
    """

    def __init__(self, layers: nn.ModuleList, final_layer: nn.Module, int8: bool, is_adaln: bool):
        read = [cast(Block, block) if is_read(block, Block) else None for block in layers]
        self.layers = [*read, final_layer if is_read(final_layer, FinalLayer) else None]
        self.transforms = [None if block is None else block.transforms(int8) for block in read]
        self.int8, self.is_adaln = int8, is_adaln
        self.is_kept_on_cpu = all(map(_is_kept, self.transforms)) and self.layers[-1] is not None
        self._chain = KeptChain()
        self.projections = None
        if self.is_adaln:
            self.projections = adaln_projections([layer for layer in self.layers if layer is not None])

    def vectors(self, c: Tensor) -> list[Tensor | None]:
        """Return what each layer's ``adaLN_modulation`` makes of c [B, D]; None of those that are called, or have none."""
        if not self.is_adaln:
            return [None] * len(self.layers)
        if self.projections is None:
            made = adaln_vectors([layer for layer in self.layers if layer is not None], c, self.int8)
        else:
            made = project(F.silu(c), self.projections, self.int8)
        of_read = iter(made)
        return [None if layer is None else next(of_read) for layer in self.layers]

    def run_on_cpu(
        self,
        x: Tensor,
        vectors: Sequence[Tensor | None],
        segments: Callable[[], Sequence[blocks.Segment]],
        norm: Callable[[], blocks.Norm | None],
    ) -> Tensor | None:
        """Return x [N, T, D] behind the blocks and the final norm, by a chain that the CPU engine keeps; None if it can not."""
        if not cpu_chain.takes(x):  # as where positions of another kind of tensor were added to the latents
            return None

        def steps() -> tuple[list[cpu.Step], cpu.Final]:
            chain = [sublayer for block in segments() for sublayer in cast(Sequence[blocks.Sublayer], block)]
            return cast(list[cpu.Step], blocks.cpu_steps(chain)), cpu.Final(*cast(blocks.Norm, norm()))

        result = cpu_chain.run_kept(self._chain, x, [vector for vector in vectors if vector is not None], steps)
        return None if result is None else result[1]


def _is_kept(transforms: Transforms | None) -> bool:
    """Return True for a block that the CPU engine reads whole, and whose attention looks at no context."""
    if transforms is None or transforms.cross_attn is not None:
        return False
    return transforms.attn.products() is not None and transforms.mlp.products() is not None


class KeptReading:
    """A model's latest reading. Copies and pickles of the model begin without one."""

    def __init__(self) -> None:
        self._latest: tuple[tuple[Any, ...], Snapshot, Reading] | None = None  # nothing that holds the model: no cycle

    def of(self, layers: nn.ModuleList, final_layer: nn.Module, int8: bool, is_adaln: bool) -> Reading:
        given = layers, final_layer, int8, is_adaln
        if not computes_now():
            return Reading(*given)
        if self._latest is None or not all(map(is_, given, self._latest[0])) or not self._latest[1].holds():
            modules = [module for part in (layers, final_layer) for module in part.modules()]
            self._latest = given, Snapshot(modules), Reading(*given)
        return self._latest[2]

    def forget(self) -> None:
        self._latest = None

    def __getstate__(self) -> dict[str, object]:
        return {}

    def __setstate__(self, state: dict[str, object]) -> None:
        self._latest = None
