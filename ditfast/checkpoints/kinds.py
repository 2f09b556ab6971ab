"""Training objective of checkpoints that do not state it: the official DiT's, SiT's, or that of a diffusers scheduler."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import VELOCITY
from ..diffusion import NUM_TRAIN_STEPS
from .arguments import flow_path_in_arguments
from .files import OFFICIAL_FILE, SCHEDULER_FILE, Stored, read_json
from .trained_for import TrainedFor

_SIT = re.compile(r"(?<![a-z])sit(?![a-z])", re.IGNORECASE)
_PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}  # by diffusers' names


def usual_training(stored: Stored, layout: str, path: str | None) -> TrainedFor | None:
    """Return what a checkpoint's kind tells of its training; None for the official DiT's: noise, linear, learned variance.

    A file or folder whose path is named after SiT is SiT's; a state dict has no path.
    """
    if layout == "diffusers":
        folder = None if stored.file is None else stored.file.parent
        places = () if folder is None else (folder / "scheduler", folder.parent / "scheduler", folder)
        file = next((file for place in places if (file := place / SCHEDULER_FILE).is_file()), None)
        return None if file is None else _of_scheduler(read_json(file))
    flow_path = flow_path_in_arguments(stored.content, stored.metadata)
    if flow_path is None and not _is_named_sit(path):
        return None
    return TrainedFor(VELOCITY, flow_path or "linear", learned_variance=False)


def _is_named_sit(path: str | None) -> bool:
    file = Path(path or "")
    return bool(_SIT.search(file.parent.name if file.name == OFFICIAL_FILE else file.name))


def _of_scheduler(written: Mapping[str, Any]) -> TrainedFor:
    name = str(written.get("_class_name", ""))
    if name.startswith("FlowMatch") or written.get("prediction_type") == "flow_prediction":
        return TrainedFor(VELOCITY, name or "flow_prediction", learned_variance=False)
    prediction = _PREDICTIONS.get(str(written.get("prediction_type", "epsilon")), "epsilon")
    variance = written.get("variance_type") in (None, "learned_range")
    return TrainedFor(prediction, _schedule(written), learned_variance=variance)


def _schedule(written: Mapping[str, Any]) -> str:
    count = written.get("num_train_timesteps", NUM_TRAIN_STEPS)
    name = written.get("beta_schedule", "linear")
    start, end = written.get("beta_start", 1e-4), written.get("beta_end", 2e-2)
    if count == NUM_TRAIN_STEPS and written.get("trained_betas") is None:
        if (name, start, end) == ("linear", 1e-4, 2e-2):
            return "linear"
        if name == "squaredcos_cap_v2":
            return "cosine"
    return f"{name} from {start} to {end} in {count} steps"
