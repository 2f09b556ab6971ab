"""From what a file holds to one flat state dict: which of its weights, and without the wrappers' prefixes."""

from __future__ import annotations

from collections.abc import Mapping

from .errors import CheckpointError, listed

WEIGHTS = ("auto", "ema", "model")
PREFIXES = ("module", "_orig_mod")  # of DistributedDataParallel and torch.compile
_KEYS = (("ema", "ema"), ("model", "model"), ("model", "state_dict"))


def choose_weights(content: object, weights: str) -> tuple[str, Mapping[object, object]]:
    """The weights asked for and their name, which is ``unnamed`` for a flat state dict.

    Args:
        content: a flat state dict, or a dict that holds some under ``ema``, ``model`` or ``state_dict``.
        weights: ``ema`` or ``model``; ``auto`` takes the EMA if there is one.

    Raises:
        CheckpointError: there are no such weights; the message says which there are.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(f"got a {type(content).__name__}, expected a dict of tensors")
    held: dict[str, Mapping[object, object]] = {}
    for name, key in _KEYS:
        if isinstance(content.get(key), Mapping):
            held.setdefault(name, content[key])
    chosen = next(iter(held), "unnamed") if weights == "auto" else weights
    if chosen == "unnamed":
        return chosen, content
    if chosen not in held:
        raise CheckpointError(
            f"weights: got {weights!r}, but it holds {' and '.join(held) or 'one unnamed set of weights'} only"
        )
    return chosen, held[chosen]


def strip_prefixes(state: Mapping[object, object]) -> dict[str, object]:
    """Names without the parts that DistributedDataParallel and torch.compile put in, wherever they stand."""
    stripped: dict[str, object] = {}
    twice: list[str] = []
    for key, value in state.items():
        name = ".".join(part for part in str(key).split(".") if part not in PREFIXES)
        if name in stripped:
            twice.append(name)
        stripped[name] = value
    if twice:
        raise CheckpointError(
            f"there twice, once {' or '.join(f'{prefix}.' for prefix in PREFIXES)} is stripped: {listed(twice)}"
        )
    return stripped
