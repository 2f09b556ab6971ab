"""A run: from data to weights, killed at any moment and resumed; to the same bits on a CPU, or if deterministic."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.utils.data import Dataset

from ..argument_checks import as_bool, check_callable, check_choice, check_type, describe
from ..checkpoints import CheckpointError, CheckpointSource, save_checkpoint
from ..checkpoints.runs import CHECKPOINTS
from ..checkpoints.source import describe_flavour
from ..checkpoints.trained_for import TrainedFor, training_to_json
from ..config import DiTConfig
from ..diffusion import NUM_TRAIN_STEPS
from ..dtypes import DTYPES
from ..flops.memory import FP32, MOMENTS
from ..model import DiT
from ..sampling.ranks import Ranks
from .averages import Averages
from .checkpoints import CheckpointFault, Checkpoints, start_at_zero
from .data import Data, Stream, as_data
from .determinism import check_workspace, deterministic
from .errors import PYTHON, RunError, TrainingInterrupted, TrainingStopped
from .evaluation import evaluate, preview
from .export import check_exportable, exported_state, predicting, source_of, trained_for
from .folder import claimed
from .log import RunLog
from .loss_curve import LossCurve
from .objective import Objective
from .order import batch_indices, rows
from .parallel import KINDS, distribute, full_tensors
from .settings import RunOptions, TrainSettings
from .speed import Speed, Speedometer
from .step import Stepper, StepReport, freeze_label_dropout
from .stopping import asked_to_stop
from .unsaved import Unsaved

WEIGHTS = "model.safetensors"
CURVE_EVERY = 500  # steps


class Trainer:
    """Trains a model by a recipe.

    A run's folder gets ``run.json``, ``log.jsonl`` (a line a step), ``timesteps.jsonl`` (losses by timestep),
    ``evaluation.jsonl``, ``samples/``, ``tensorboard/``, ``checkpoints/`` and at the end ``model.safetensors``, the first
    average in the official layout. The optimizer is AdamW, betas 0.9 and 0.999.

    Args:
        model: fp32, on its device: a ``ditfast.DiT``, or ``ditfast.reference.DiT``, whose ``config`` it reads.
        data: latents and labels that fit the model: ``Data``, or a map-style dataset of pairs (x, y), x [C, H, W] floats and y
            a class, such as a torch Dataset or a list of tuples.
        settings: the recipe.
        out: the run's folder, made if it does not exist.
        options: what the run does beside its steps.
        ranks: which process of how many this is, ``parallel.joined`` already.
        parallel: ``"ddp"`` or ``"fsdp"``, of several ranks.
        decode: latents [N, C, H, W] to images [N, 1 or 3, H', W'] in [-1, 1], for samples; None where they are images.
        on_step: called after each step with its report, the number of steps done, and the speed (progress).

    Raises:
        DataError: a dataset's records are no such pairs.
        RunError: data, model, ranks and settings do not fit each other, or the model could not be exported: it has adapters,
            parametrizations or layers that no DiT has, or all of it is frozen.
        TypeError: an argument of the wrong kind; the message names it.
        ValueError: an unknown ``parallel``.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data | Dataset[Any] | Sequence[tuple[Tensor, int]],
        settings: TrainSettings,
        out: str | os.PathLike[str],
        options: RunOptions | None = None,
        *,
        ranks: Ranks | None = None,
        parallel: str = "ddp",
        decode: Callable[[torch.Tensor], torch.Tensor] | None = None,
        on_step: Callable[[StepReport, int, Speed], None] = lambda report, done, speed: None,
    ):
        _check_kinds(model, settings, out, options, ranks, parallel, decode, on_step)
        self.caller = PYTHON  # a command puts its own names here
        self.settings, self.out = settings, Path(out)
        self.options = options or RunOptions()
        self.ranks = ranks or Ranks()
        self.decode, self.on_step = decode, on_step
        self.done = 0  # steps
        self.config = predicting(model, settings)
        self._source = source_of(model)
        check_exportable(model, self.config)
        self.data = as_data(data, self.config.num_classes)
        _check(self.config, self.data, settings, self.ranks)
        self.device = next(model.parameters()).device
        if settings.deterministic and self.device.type == "cuda":
            check_workspace()
        model.config = self.config  # type: ignore[assignment]
        if self._source is not None:
            model.source = self._source._replace(trained_for=self.trained_for)  # type: ignore[assignment]
        model.train()
        freeze_label_dropout(model)
        if isinstance(model, DiT):
            model.checkpoint_activations = settings.checkpoint_activations
        if settings.compile:
            model.compile()
        self._module = model  # where self.model wraps it
        self.model = distribute(model, parallel, self.ranks)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(trained.values(), lr=settings.rate, weight_decay=settings.weight_decay, fused=True)
        start_at_zero(self.model, self.optimizer)
        self.averages = Averages(trained, settings.ema)
        self.objective = Objective(settings, self.config)
        self.curve = LossCurve(1 if settings.loss == "flow" else NUM_TRAIN_STEPS)
        share = rows(settings.batch, self.ranks.rank, self.ranks.world)
        self.stepper = Stepper(
            self.model, self.config, self.data, self.objective, self.optimizer, self.averages, settings, share, self.device
        )
        self.checkpoints = Checkpoints(self.out / CHECKPOINTS, self.options.keep, self.ranks)
        of_trained = 2 + len(settings.ema)  # AdamW's moments, and averages
        state = [*model.parameters(), *of_trained * [*trained.values()]]
        self.unsaved = Unsaved(self.out, sum(tensor.nbytes for tensor in state))
        self.skipped = 0
        self.skipped_in_a_row = 0

    # ------------------------------------------------------------------------------------------------ the loop
    def run(self, resume: bool = False) -> Path:
        """The rest of the steps; the exported weights' path.

        Args:
            resume: go on from the newest whole checkpoint in the folder, if there is one; else the folder has to be empty.

        Raises:
            RunError: the folder holds another run, or one while ``resume`` is False, or another process trains in it.
            TrainingStopped: too many steps in a row were skipped, the run was asked to stop (SIGTERM, or Ctrl-C:
                TrainingInterrupted), or its logs or samples cannot be written.
            KeyboardInterrupt: Ctrl-C came a second time, before there was a checkpoint.
            DataError: too many records were unreadable, or a process that reads them ended.
            CheckpointFault: a checkpoint, or the weights at the end, cannot be written.
        """
        resume = as_bool("resume", resume)
        try:
            with claimed(self.out, self._record(), resume, self.ranks, self._bytes_to_come(), self.caller):
                return self._run(resume)
        except OSError as error:
            what = f"{error.filename or self.out}: {error.strerror or error}"
            raise TrainingStopped(
                f"step {self.done}: {what}; {self.caller.resume} goes on from the newest checkpoint"
            ) from error

    def _run(self, resume: bool) -> Path:
        if resume:
            self._resume()
        log = RunLog(self.out, self.done, writes=self.ranks.rank == 0)
        dtype = DTYPES[self.settings.dtype]
        repeatable = partial(deterministic, self.device, self.settings.compile) if self.settings.deterministic else nullcontext
        speedometer = Speedometer(self.config, self.settings.batch, self.ranks.world, self.device, dtype)
        try:
            self.unsaved.begin(self.unsaved.newest)
            with asked_to_stop(self._announce_interrupt) as stop_asked:
                for batch in self._stream():
                    with repeatable():
                        report = self.stepper.take(self.done, batch, stop_asked)
                    self._after_step(report, log)
                    speed = speedometer.step()
                    log.scalars("speed", self.done, speed._asdict())
                    self.on_step(report, self.done, speed)
                    if report.stop:
                        path = self._save(log)
                        kind = TrainingInterrupted if stop_asked.interrupts else TrainingStopped
                        rest = f"{self.caller.resume} goes on from there"
                        raise kind(f"stopped at step {self.done}, which {path} holds; {rest}")
        finally:
            log.close()
        return self._export()

    def _announce_interrupt(self, last: bool) -> str | None:
        return (
            None if self.ranks.rank else f"{self.caller.program}: {self.unsaved.describe_interrupt(last, self.caller.resume)}"
        )

    def _stream(self) -> Iterator[Any]:
        left = self.settings.steps - self.done
        stream = Stream(
            self.data,
            self.settings.seed,
            self.settings.batch,
            rank=self.ranks.rank,
            world=self.ranks.world,
            start_step=self.done,
            workers=self.options.workers,
            max_bad_records=self.options.max_bad_records,
        )
        return (batch for _, batch in zip(range(left), stream, strict=False))

    def _after_step(self, report: StepReport, log: RunLog) -> None:
        self.done += 1
        self.unsaved.count_step()
        self.skipped += not report.taken
        self.skipped_in_a_row = 0 if report.taken else self.skipped_in_a_row + 1
        self.curve.add(report.t, report.losses)
        log.write("log", self.done, _line(report, self.skipped))
        if self.skipped_in_a_row > self.settings.max_skipped:
            raise TrainingStopped(self._why_skipped(report))
        last = self.done == self.settings.steps
        if last or self.done % CURVE_EVERY == 0:
            log.write("timesteps", self.done, {"loss": self.curve.take()})
        if _due(self.options.sample_every, self.done, last) or _due(self.options.evaluate_every, self.done, last):
            self._look(log)
        if last or self.done % self.options.save_every == 0:
            self._save(log)

    def _why_skipped(self, report: StepReport) -> str:
        indices = batch_indices(self.settings.seed, len(self.data), self.settings.batch, self.done - 1)
        bad = [index for index, loss in zip(indices, report.losses.tolist(), strict=True) if not math.isfinite(loss)]
        what = f"of the records {bad[:16]}" if bad else "of the gradient only,"
        return (
            f"step {self.done}: the loss or gradient was infinite or NaN for {self.skipped_in_a_row} steps in a row, "
            f"{what} of the batch {indices[:16]}{'...' if len(indices) > 16 else ''}"
        )

    # ------------------------------------------------------------------------------------------------ checkpoints
    def _save(self, log: RunLog) -> Path:
        log.sync()
        about = {
            "settings": self._record(),
            "samples": self.done * self.settings.batch,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "scale": self.stepper.scale.scale,
            "finite_steps": self.stepper.scale.finite_steps,
            "trained_for": training_to_json(self.trained_for),
        }
        with self.unsaved.saving(self.checkpoints.path(self.done)):
            return self.checkpoints.save(self.done, self._state(), about)

    def _bytes_to_come(self) -> int:
        """Return what the checkpoints and weights to come take on the disk, beside what is there, at most."""
        weights = FP32 * sum(parameter.numel() for parameter in self._module.parameters())
        trained = FP32 * sum(value.numel() for value in self.averages.by_decay[self.settings.ema[0]].values())
        there, every = self.checkpoints.steps(), self.options.save_every
        saves = math.ceil(self.settings.steps / every) - max(there, default=0) // every
        at_once = min(saves, self.options.keep + 1 - min(len(there), self.options.keep))
        return at_once * (weights + (MOMENTS + len(self.settings.ema)) * trained) + weights

    def _resume(self) -> None:
        newest = self.checkpoints.newest()
        if newest is None:
            return
        path, about = newest
        if about["step"] > self.settings.steps:
            raise RunError(f"steps: got {self.settings.steps}, but {self.out} has taken {about['step']} already")
        state = self._state()
        self.checkpoints.load(path, state)
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.unsaved.newest = path
        self.done, self.skipped, self.skipped_in_a_row = about["step"], about["skipped"], about["skipped_in_a_row"]
        self.stepper.scale.scale, self.stepper.scale.finite_steps = about["scale"], about["finite_steps"]

    def _state(self) -> dict[str, Any]:
        """Tensors that change in place, but for the optimizer's, by names that do not depend on the number of ranks."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {
            "model": model,
            "optimizer": optimizer,
            "averages": {str(decay): average for decay, average in self.averages.by_decay.items()},
            "timesteps": self.objective.sampler.state(),
            "curve": self.curve.state(),
        }

    def _record(self) -> dict[str, Any]:
        """What decides the weights; neither the number of ranks nor how they share the model."""
        model = self.config.as_dict()
        if self.settings.loss == "flow":  # which says it, in runs of earlier versions too
            model.pop("prediction", None)
        return {
            "model": model,
            "data": self.data.fingerprint,
            **self.settings.decisive(self.device.type),
        }

    @property
    def trained_for(self) -> TrainedFor:
        """Objective and data of the training, as the weights' file says it."""
        return trained_for(self.config, self.settings, self.data, self._source, self.done)

    # ------------------------------------------------------------------------------------------------ the average
    def average(self) -> DiT | None:
        """The first average as a model of its own, in eval mode on the run's device; on other ranks than the first None."""
        check_exportable(self._module, self.config)
        weights = full_tensors(exported_state(self._module, self.averages.by_decay[self.settings.ema[0]]))
        if self.ranks.rank:
            return None
        model = DiT(self.config).to(self.device, torch.float32)
        model.load_state_dict(weights)
        model.source = CheckpointSource(str(self.out), "official", "ema", describe_flavour(self.config), self.trained_for)
        return model.eval()

    def _look(self, log: RunLog) -> None:
        model = self.average()
        if model is None:
            return
        last = self.done == self.settings.steps
        if _due(self.options.sample_every, self.done, last):
            folder = self.out / "samples"
            folder.mkdir(exist_ok=True)
            preview(folder / f"step-{self.done:08d}.png", model, self.settings, self.decode)
        if _due(self.options.evaluate_every, self.done, last):
            log.write("evaluation", self.done, evaluate(model, self.data, self.settings))

    def _export(self) -> Path:
        model = self.average()
        if model is not None:
            try:
                save_checkpoint(model, self.out / WEIGHTS)
            except CheckpointError as error:
                raise CheckpointFault(str(error)) from error
        return self.out / WEIGHTS


def _due(every: int, done: int, last: bool) -> bool:
    return every > 0 and (last or done % every == 0)


def _line(report: StepReport, skipped: int) -> Mapping[str, Any]:
    """Of log.jsonl; null is what was infinite or NaN."""
    numbers = {**report.parts, "norm": report.norm, "rate": report.rate}
    line: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return line if report.taken else {**line, "skipped": skipped}


def _check_kinds(
    model: Any, settings: Any, out: Any, options: Any, ranks: Any, parallel: Any, decode: Any, on_step: Any
) -> None:
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "config", None), DiTConfig):
        raise TypeError(f"model: got {_came(model)}, expected a ditfast.DiT or a ditfast.reference.DiT{_hint(model)}")
    check_type("settings", settings, TrainSettings, "a TrainSettings")
    check_type("out", out, (str, os.PathLike), "the path of the run's folder")
    check_type("options", options, (RunOptions, type(None)), "a RunOptions or None")
    check_type("ranks", ranks, (Ranks, type(None)), "a Ranks or None")
    check_choice("parallel", parallel, KINDS)
    if decode is not None:
        check_callable("decode", decode, "a function of latents, or None")
    check_callable("on_step", on_step)


def _came(model: Any) -> str:
    config = getattr(model, "config", None)
    if not isinstance(model, nn.Module) or config is None:
        return describe(model)
    return f"{describe(model)} whose config is {describe(config)}"


def _hint(model: Any) -> str:
    if isinstance(getattr(getattr(model, "module", None), "config", None), DiTConfig):
        return ": give the model that it wraps, model.module"
    is_module = isinstance(model, nn.Module)
    return "; ditfast.load_checkpoint(model.state_dict()) makes one of a DiT's weights" if is_module else ""


def _check(config: DiTConfig, data: Data, settings: TrainSettings, ranks: Ranks) -> None:
    if data.input_shape != config.input_shape:
        raise RunError(f"data: got latents {data.input_shape}, but the model takes {config.input_shape}")
    if data.num_classes > config.num_classes:
        raise RunError(f"data: got {data.num_classes} classes, but the model has {config.num_classes}")
    if len(data) < settings.batch:
        raise RunError(f"batch: got {settings.batch}, expected at most the {len(data)} records of the data")
    parts = ranks.world * settings.accumulate
    if settings.batch % parts:
        why = f"{ranks.world} ranks, accumulate {settings.accumulate}"
        raise RunError(f"batch: got {settings.batch}, expected a multiple of {parts}: {why}")
