"""From what a file holds to one flat state dict: which of its weights, and without the names that wrappers put before them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .errors import CheckpointError, listed
from .pickles import Inert

WEIGHTS = ("auto", "ema", "model")
# DistributedDataParallel, torch.compile, FSDP and activation checkpointing put these in, also within blocks.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_EMA_KEYS = ("ema_model", "ema_model_state_dict", "ema_state_dict", "model_ema", "model_ema_state_dict", "state_dict_ema")
_MODEL_KEYS = ("model", "model_state_dict", "module", "net", "state_dict")  # module is DeepSpeed's
_KEYS = {**dict.fromkeys(("ema", *_EMA_KEYS), "ema"), **dict.fromkeys(_MODEL_KEYS, "model")}
_DEEPEST = 4
# Heads that REPA (projectors) and SRA (ap_head) train beside the model, and the counter of torch.optim.swa_utils.
_NOT_WEIGHTS = re.compile(r"(projectors?|projection_heads?|proj_heads?|ap_head)\..+|n_averaged")
_ARRAYS = ("_reconstruct", "_frombuffer")  # functions of NumPy that make arrays


def choose_weights(content: object, weights: str) -> tuple[str, Mapping[object, object]]:
    """Return the weights asked for and their name, which is ``unnamed`` for a flat state dict.

    Args:
        content: a flat state dict, or a dict that holds some under one of the usual names, perhaps nested.
        weights: ``ema`` or ``model``; ``auto`` takes the EMA if there is one.

    Raises:
        CheckpointError: there are no such weights; the message says which there are.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"got a {type(content).__name__}, expected a dict of tensors")
    held = _held(content, _DEEPEST)
    chosen = next((name for name in ("ema", "model") if name in held), "unnamed") if weights == "auto" else weights
    if chosen == "unnamed":
        return chosen, content
    if chosen not in held:
        raise CheckpointError(
            f"weights: got {weights!r}, but it holds {' and '.join(held) or 'one unnamed set of weights'} only"
        )
    return chosen, held[chosen]


def _held(content: Mapping[object, object], depth: int) -> dict[str, Mapping[object, object]]:
    """Return the sets of weights by ``ema`` and ``model``; those of a wrapper within a wrapper go by the outer name."""
    held: dict[str, Mapping[object, object]] = {}
    for key, name in _KEYS.items():
        state = content.get(key)
        if isinstance(state, Mapping) and state:
            inner = _held(state, depth - 1) if depth else {}
            for inner_name, inner_state in (inner or {name: state}).items():
                held.setdefault("ema" if name == "ema" else inner_name, inner_state)
    return held


def strip_wrappers(state: Mapping[object, object]) -> dict[str, object]:
    """Return the state dict with names without the parts that wrappers of modules put in, wherever they stand."""
    names = {key: ".".join(part for part in str(key).split(".") if part not in _WRAPPERS) for key in state}
    return _renamed(state, names, "module. or _orig_mod.")


def under_prefix(state: Mapping[str, object], prefix: str) -> dict[str, object]:
    """Return the part of a state dict whose names begin with a prefix, without it; names of wrappers in it do not count.

    Raises:
        CheckpointError: no name begins with it; the message says how names begin.
    """
    parts = [part for part in prefix.split(".") if part and part not in _WRAPPERS]
    start = "".join(f"{part}." for part in parts)
    taken = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
    if not taken:
        first = sorted({f"{name.split('.')[0]}." for name in state})
        raise CheckpointError(f"prefix: got {prefix!r}, but names begin with {listed(first) or 'nothing'}")
    return taken


def strip_prefix(state: Mapping[str, object], prefix: str) -> dict[str, object]:
    """Return the state dict with names without a prefix, where they have it."""
    return _renamed(state, {name: name.removeprefix(prefix) for name in state}, repr(prefix))


def _renamed(state: Mapping[Any, object], names: Mapping[Any, str], what: str) -> dict[str, object]:
    """Return a state dict with other names; raise CheckpointError if two become the same."""
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise CheckpointError(f"there twice, once {what} is stripped: {listed(twice)}")
    return {names[key]: value for key, value in state.items()}


def leave_out(state: Mapping[str, object]) -> tuple[dict[str, object], list[str]]:
    """Return the weights of a DiT, and the names of what is none: heads for training only, counters, paths, NumPy's scalars.

    Raises:
        CheckpointError: an array of NumPy stands where a tensor belongs.
    """
    for name, value in state.items():
        if isinstance(value, Inert) and value.type_name.endswith(_ARRAYS):
            raise CheckpointError(f"refused: it holds {value.type_name}, expected tensors among the weights: {listed([name])}")
    left_out = [name for name, value in state.items() if isinstance(value, Inert) or _NOT_WEIGHTS.fullmatch(name)]
    return {name: value for name, value in state.items() if name not in left_out}, left_out
