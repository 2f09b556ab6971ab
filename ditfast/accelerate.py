"""Swaps the fused ops into somebody else's live model, says what it did, and takes it back.

Nothing of a model changes but the ``forward`` attribute of the modules that are swapped: parameters, names, hooks, classes and
wrappers stay what and where they are. There is no global state: two models in one process never touch each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from . import cpu
from .argument_checks import DTYPES, as_bool, check_choice, check_type
from .dispatch.override import ATTENTION_BACKENDS
from .dtypes import INT8
from .homes import BLOCKS, MODELS, NOTE, Home, Options, Swap, cost_of_int8, swap_in
from .homes.planning import Plan, is_unwrapped
from .model import DiT
from .ops.cpu_chain import check_int8

ATTENTION = {"auto": None, "native": "sdpa", **{name: name for name in ATTENTION_BACKENDS}}

T = TypeVar("T")


class ReportRow(NamedTuple):
    module: str
    swapped: bool
    family: str
    engine: str  # what its ops take on the device it is on now; empty if it is not swapped
    reason: str  # why it is not swapped, or of a swapped one why calls were left to its own forward
    fast_calls: int = 0  # so far; compiled graphs do not count theirs
    original_calls: int = 0


class AccelerationReport(NamedTuple):
    """Report of ``accelerate``: a row for each block and model it looked at; shows itself as a table."""

    rows: tuple[ReportRow, ...]

    def __repr__(self) -> str:
        lines = [("module", "", "family", "engine, or why not")]
        for names, row in _runs(self.rows):
            lines.append((names, "swapped" if row.swapped else "left", row.family, _in_words(row)))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def accelerate(
    model_or_pipeline: T,
    *,
    dtype: torch.dtype | str | None = None,
    attention: str = "auto",
    cache_modulation: bool = False,
    strict: bool = True,
) -> T:
    """Runs a live DiT on the fused ops: official, SiT and forks, timm-style blocks, diffusers' DiT and its pipeline.

    Blocks with adaLN-Zero are swapped one by one; without gradients the model's forward fuses across them as well. Blocks of
    PixArt and Stable Diffusion 3 (diffusers) have their norms and gated residuals swapped. A module is recognized by its
    parts, then held to a parity check: the model runs once on a random input of its own size, in evaluation and in training
    mode, and on copies with random weights each block's fast forward is compared with its own on what it receives. What
    differs is left alone. Blocks of a model whose arguments are not known are checked at their first call, and all blocks
    again at sequences longer or shorter than those checked. Call it before wrapping blocks in FSDP (and for several GPUs take
    DDP: the replicas of nn.DataParallel would call the original's weights). Calling it again replaces the options.

    Args:
        model_or_pipeline: a module, with the models anywhere inside, or a diffusers pipeline.
        dtype: torch.bfloat16 or torch.float16 to compute a DiT in it, without gradients, while the parameters
            stay as they are; copies of the weights are kept in it, and made again when a weight changes (writes through
            ``.data`` are seen after the next forward with gradients). None for the parameters' own. The output has the
            dtype it had. ``"int8"`` has the CPU engine multiply the blocks' linears in int8 and round the conditioning's
            weights to it, as ``DiT.quantize`` does, and prints what that gains and costs on a few random inputs; forwards
            with gradients, or compiled, stay as they are.
        attention: of a DiT: ``"auto"``, or ``"flash"``, ``"sdpa"`` (diffusers' name: ``"native"``) or ``"triton"`` for one
            engine; int8 has no other than ``"auto"``.
        cache_modulation: keep a DiT's modulation vectors for each batch of conditioning vectors met, up to 512 MiB, for
            when the same come again (a second run of a sampler); costs a host read of them in each forward.
        strict: raise if nothing could be swapped; else the report says why.

    Returns:
        The same object. ``acceleration_report`` says what was done, ``restore`` takes it back.

    Raises:
        ValueError: an argument; or nothing could be swapped, with the reasons. The model is as it was.
        TypeError: an argument of the wrong kind; the message names it.
    """
    expected = f"one of {', '.join(map(str, DTYPES))}, 'int8' or None"
    check_type("dtype", dtype, (torch.dtype, str, type(None)), expected)
    cache_modulation, strict = as_bool("cache_modulation", cache_modulation), as_bool("strict", strict)
    int8 = dtype == INT8
    if not int8 and dtype not in (None, *DTYPES):
        raise ValueError(f"dtype: got {dtype}, expected {expected}")
    check_choice("attention", attention, ATTENTION)
    computes_in = dtype if isinstance(dtype, torch.dtype) else None
    options = Options(computes_in, ATTENTION[attention], cache_modulation, int8)
    if int8 and options.engine is not None:
        raise ValueError(f"attention: got {attention!r}, expected 'auto' with int8")
    roots = _roots(model_or_pipeline)
    for root in roots.values():
        if isinstance(root, DiT):
            advice = "; for int8 it has quantize" if int8 else ""
            raise ValueError(f"model_or_pipeline: got a ditfast.DiT, which runs on the fused ops as it is{advice}")
    if int8:
        check_int8("dtype", ())
    before = _take_off(model_or_pipeline)
    try:
        plan = Plan(roots.values(), int8)
        if not plan.swaps and strict:
            why = "with nothing inside that looks like a DiT's block or model"
            if plan.reasons:
                why = f"of which nothing could be swapped: {'; '.join(dict.fromkeys(plan.reasons.values()))}"
            raise ValueError(f"model_or_pipeline: got {type(model_or_pipeline).__name__}, {why}")
        if int8:
            _print_costs(roots, {module: how.home for module, how in plan.swaps.items()})
    except BaseException:
        _put_back(before)
        raise
    swaps = {module: Swap(module, how.home, options, how.lengths, how.check) for module, how in plan.swaps.items()}
    _put_back({**swaps, **plan.reasons})
    return model_or_pipeline


@contextlib.contextmanager
def accelerated(model_or_pipeline: T, **options: Any) -> Iterator[T]:
    """``accelerate`` inside the ``with`` block, and back to what was before. Arguments and errors are ``accelerate``'s."""
    before = {
        module: vars(module)[NOTE]
        for root in _roots(model_or_pipeline).values()
        for module in root.modules()
        if NOTE in vars(module)
    }
    try:
        yield accelerate(model_or_pipeline, **options)
    finally:
        _take_off(model_or_pipeline)
        _put_back(before)


def restore(model_or_pipeline: T) -> T:
    """Gives every swapped module its own forward back: the same code on the same parameters, so the same bits."""
    _take_off(model_or_pipeline)
    return model_or_pipeline


def _take_off(model_or_pipeline: object) -> dict[nn.Module, Swap | str]:
    notes: dict[nn.Module, Swap | str] = {}
    for root in _roots(model_or_pipeline).values():
        for module in root.modules():
            note = vars(module).pop(NOTE, None)
            if note is not None:
                notes[module] = note
            if isinstance(note, Swap):
                note.on = False
                if note.options.int8:
                    cpu.forget(module.parameters())
                if swap_in(module) is not None:
                    del module.forward
    return notes


def _put_back(notes: Mapping[nn.Module, Swap | str]) -> None:
    for module, note in notes.items():
        vars(module)[NOTE] = note
        if isinstance(note, Swap):
            note.on = True
            if is_unwrapped(module):
                module.forward = note


def acceleration_report(model_or_pipeline: object) -> AccelerationReport:
    """Report for each block and model inside: swapped, on which engine and with how many calls so far, or not, and why.

    A module whose fast forward never ran is not swapped: it is not called yet and will be checked at its first call, or
    every call so far was left to its own forward.
    """
    rows = []
    for prefix, root in _roots(model_or_pipeline).items():
        for name, module in root.named_modules(prefix=prefix):
            note = vars(module).get(NOTE, "not accelerated")
            looks = [home.name for home in (*BLOCKS, *MODELS) if home.looks_like(module)]
            if isinstance(note, Swap):
                idle = note.is_idle()
                engine = note.engine() if is_unwrapped(module) else "its forward was wrapped or replaced since"
                reason = note.idle_reason() if idle else "; ".join(note.original_calls)
                calls = note.fast_calls, sum(note.original_calls.values())
                rows.append(ReportRow(name or "(model)", not idle, note.home.name, "" if idle else engine, reason, *calls))
            elif looks:
                rows.append(ReportRow(name or "(model)", False, looks[0], "", note))
    return AccelerationReport(tuple(rows))


def _roots(model_or_pipeline: object) -> dict[str, nn.Module]:
    if isinstance(model_or_pipeline, nn.Module):
        return {"": model_or_pipeline}
    parts = getattr(model_or_pipeline, "components", None)
    if not isinstance(parts, Mapping):
        got = type(model_or_pipeline).__name__
        raise ValueError(f"model_or_pipeline: got {got}, expected a torch.nn.Module or a diffusers pipeline")
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _print_costs(roots: Mapping[str, nn.Module], swaps: Mapping[nn.Module, Home]) -> None:
    """Of each swapped model; of the first block where no model is."""
    names = {module: name for prefix, root in roots.items() for name, module in root.named_modules(prefix=prefix)}
    models = [module for module, home in swaps.items() if home in MODELS]
    for module in models or list(swaps)[:1]:
        inner = {name: swaps[part] for name, part in module.named_modules() if part in swaps and part is not module}
        cost = cost_of_int8(module, swaps[module], inner)
        print(f"{names[module]}: {cost}" if names[module] else cost)


def _in_words(row: ReportRow) -> str:
    """Return the engine and the calls so far, or why the module is left."""
    if not row.swapped or not (row.fast_calls or row.original_calls):
        return row.engine or row.reason
    calls = f"{row.engine}; {row.fast_calls} fast calls"
    return f"{calls}, {row.original_calls} original ({row.reason})" if row.original_calls else calls


def _runs(rows: tuple[ReportRow, ...]) -> Iterator[tuple[str, ReportRow]]:
    """Rows with everything but the name in common, as one: ``blocks.0 .. blocks.27``."""
    start = 0
    for end in range(1, len(rows) + 1):
        if end == len(rows) or rows[end][1:] != rows[start][1:]:
            first, last = rows[start].module, rows[end - 1].module
            yield first if end - start == 1 else f"{first} .. {last}", rows[start]
            start = end


DiT._accelerate = accelerate
