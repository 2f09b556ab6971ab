"""Choice of the modules to swap: recognized by their parts, then held to the parity check. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from . import BLOCKS, INPUTS, MODELS
from .build import build_of
from .calls import NO_LENGTHS, UNLIMITED, Lengths
from .comparison import example_call, in_one_line, reason_of, weight_of, why_not_block
from .home import Home, Mismatch, Swap, swap_in
from .int8 import why_not_int8
from .parity import ModelRun, Verdicts, check_first_call, representatives


class Planned(NamedTuple):
    """Way to swap a module; ``lengths`` and ``check`` are ``Swap``'s."""

    home: Home
    lengths: Lengths
    check: Callable[[Swap, Sequence[Any], Mapping[str, Any]], str | None] | None


class Plan:
    """Modules to swap, and why not the others that look like it."""

    def __init__(self, roots: Iterable[nn.Module], int8: bool):
        self.swaps: dict[nn.Module, Planned] = {}
        self.reasons: dict[nn.Module, str] = {}
        modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
        candidates = self._recognized(modules, BLOCKS)
        if int8:
            reasons = {block: why_not_int8(block, home) for block, home in candidates.items()}
            self.reasons.update((block, reason) for block, reason in reasons.items() if reason)
            candidates = {block: home for block, home in candidates.items() if not reasons[block]}
        models = self._recognized(modules, MODELS)
        runs = self._run_models(modules, models, candidates)
        self._plan_blocks(candidates, runs)
        self._plan_models(models, runs)
        self.reasons = {module: reason for module, reason in self.reasons.items() if module not in self.swaps}

    def _recognized(self, modules: Iterable[nn.Module], homes: Sequence[Home]) -> dict[nn.Module, Home]:
        """Return the modules built as a family takes for granted, with the first family of each."""
        recognized: dict[nn.Module, Home] = {}
        for module in modules:
            for home in homes:
                if not home.looks_like(module):
                    continue
                reason = why_not_built(module, home)
                if not reason:
                    recognized[module] = home
                    break
                self.reasons.setdefault(module, reason)
        return recognized

    def _run_models(
        self, modules: Iterable[nn.Module], models: Mapping[nn.Module, Home], candidates: Mapping[nn.Module, Home]
    ) -> dict[nn.Module, ModelRun]:
        """Run the own forward of each model whose arguments are known."""
        runs: dict[nn.Module, ModelRun] = {}
        for module in modules:
            inputs = next((family for family in (models.get(module), *INPUTS) if family and family.looks_like(module)), None)
            blocks = {name: candidates[part] for name, part in module.named_modules() if part in candidates}
            if inputs is None or not blocks or module in candidates:
                continue
            run = ModelRun(module, blocks)
            reason = reason_of(partial(run.run, inputs))
            if reason:
                self.reasons.setdefault(module, reason)
            else:
                runs[module] = run
        return runs

    def _plan_blocks(self, candidates: Mapping[nn.Module, Home], runs: Mapping[nn.Module, ModelRun]) -> None:
        builds = {block: build_of(block) for block in candidates}
        chosen = set(representatives(builds))
        verdicts: Verdicts = {}
        on_example: dict[Any, str] = {}
        for run in runs.values():
            run.judge(self.reasons)
        called = {run.model.get_submodule(name): lengths for run in runs.values() for name, lengths in run.lengths.items()}
        for block, home in candidates.items():
            if block in self.reasons:
                continue
            if block not in called:
                key = home.name, builds[block]
                if key not in on_example:
                    on_example[key] = why_not_block(block, home, [example_call(block, home)])
                if on_example[key]:
                    self.reasons[block] = on_example[key]
                    continue
            self.swaps[block] = Planned(
                home, called.get(block, NO_LENGTHS), partial(check_first_call, verdicts, block in chosen)
            )

    def _plan_models(self, models: Mapping[nn.Module, Home], runs: Mapping[nn.Module, ModelRun]) -> None:
        for model in models:
            inner = any(part in self.swaps for part in model.modules() if part is not model)
            known = any(home.looks_like(part) for part in model.modules() for home in BLOCKS)
            if not inner:
                self.reasons[model] = "none of its blocks could be swapped" if known else "no block inside was recognized"
            if not inner or model not in runs:
                continue
            swapped = [name for name in runs[model].blocks if model.get_submodule(name) in self.swaps]
            for home in MODELS:
                if not home.looks_like(model) or why_not_built(model, home):
                    continue
                reason = reason_of(partial(runs[model].compare, home, swapped))
                if not reason:
                    self.swaps[model] = Planned(home, UNLIMITED, None)
                    break
                self.reasons.setdefault(model, reason)


def why_not_built(module: nn.Module, home: Home) -> str:
    """Return why a module is not built as its family takes for granted, or nothing."""
    if not is_unwrapped(module):
        return "its forward was replaced before"
    try:
        home.check(module)
        weight_of(module)
    except Mismatch as mismatch:
        return str(mismatch)
    except Exception as error:  # it may lack anything that its family has
        return f"it is built otherwise: {in_one_line(error)}"
    return ""


def is_unwrapped(module: nn.Module) -> bool:
    """Return True if a module's forward is its own or a swap; a swap that is off is somebody's memory of one."""
    return "forward" not in vars(module) or swap_in(module) is not None
