"""Schedulers of diffusers in the sampling loop: stepped as a plain loop would, anew for every batch, left as they were."""

from __future__ import annotations

import copy
import functools
import re
from typing import Any

import numpy as np
import pytest
import torch
from support import error, randomize
from torch import Tensor

import ditfast
from ditfast import DiT, DiTConfig
from ditfast.sampling import Sampler, image_noise, sample

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning", "ignore:.*scale_model_input:UserWarning")

CONFIG = DiTConfig(depth=1, hidden_size=32, num_heads=2, input_size=4, num_classes=5)
LABELS = torch.tensor([0, 3, 4])
PLAIN = {"clip_sample": False}
DETERMINISTIC: dict[str, dict[str, Any]] = {
    "CogVideoXDDIMScheduler": PLAIN,
    "DDIMInverseScheduler": PLAIN,
    "DDIMParallelScheduler": PLAIN,
    "DDIMScheduler": PLAIN,
    "DEISMultistepScheduler": {},
    "DPMSolverMultistepInverseScheduler": {},
    "DPMSolverMultistepScheduler": {"solver_order": 3},
    "DPMSolverSinglestepScheduler": {},
    "EDMDPMSolverMultistepScheduler": {},
    "EDMEulerScheduler": {},
    "EulerDiscreteScheduler": {},
    "FlowMatchEulerDiscreteScheduler": {"shift": 3.0},
    "FlowMatchHeunDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "IPNDMScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "PNDMScheduler": {},
    "UniPCMultistepScheduler": {"solver_order": 3},
}
WITH_NOISE: dict[str, dict[str, Any]] = {
    "CMStochasticIterativeScheduler": {},
    "DDPMParallelScheduler": PLAIN,
    "DDPMScheduler": PLAIN,
    "DPMSolverMultistepScheduler": {"algorithm_type": "sde-dpmsolver++"},
    "EulerAncestralDiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "FlowMatchLCMScheduler": {},
    "LCMScheduler": PLAIN,
    "LTXEulerAncestralRFScheduler": {},
    "SASolverScheduler": {},
    "TCDScheduler": PLAIN,
    "UnCLIPScheduler": PLAIN,
}


def tiny() -> DiT:
    model = randomize(DiT(CONFIG)).eval()
    assert isinstance(model, DiT)
    return model


@functools.cache
def _made(name: str, options: tuple[tuple[str, Any], ...]) -> Any:
    scheduler = getattr(diffusers, name)(num_train_timesteps=100, **dict(options))
    scheduler.set_timesteps(5)
    return scheduler


def made(name: str, options: dict[str, Any]) -> Any:
    """A scheduler whose timesteps are set; for some of them setting takes long."""
    return copy.deepcopy(_made(name, tuple(options.items())))


@torch.no_grad()
def plain_loop(model: DiT, scheduler: Any, labels: Tensor, noise: Tensor, **options: Any) -> Tensor:
    """Call and step as diffusers' pipelines do."""
    x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, t.expand(len(labels)).float(), labels)[:, :4], t, x, **options).prev_sample
    return x


def same(now: object, was: object) -> bool:
    if isinstance(now, (list, tuple)):
        return isinstance(was, (list, tuple)) and len(now) == len(was) and all(map(same, now, was))
    if isinstance(now, (Tensor, np.ndarray)):
        return np.array_equal(np.asarray(now), np.asarray(was), equal_nan=True)  # some tables begin with 0 / 0
    return bool(now == was)


CASES = [
    pytest.param(name, options, id="-".join([name.removesuffix("Scheduler"), *map(str, options.values())]))
    for names in (DETERMINISTIC, WITH_NOISE)
    for name, options in names.items()
    if hasattr(diffusers, name)  # in the version that is installed
]
WITHOUT_NOISE = [case for case in CASES if case.values in DETERMINISTIC.items()]
NAMES = [name for name in dir(diffusers) if name.endswith("Scheduler")]
REFUSED = ("AmusedScheduler", "CogVideoXDPMScheduler", "KarrasVeScheduler", "RePaintScheduler", "VQDiffusionScheduler")


@pytest.mark.parametrize(("name", "options"), WITHOUT_NOISE)
def test_every_batch_is_a_plain_loops(name: str, options: dict[str, Any], one_thread: None) -> None:
    model, scheduler = tiny(), made(name, options)
    sampler = Sampler(model, [], scheduler=scheduler)
    for labels, images in ((LABELS, [0, 1, 2]), (LABELS[:2], [7, 8])):
        expected = plain_loop(model, made(name, options), labels, image_noise(CONFIG.input_shape, images, 0))
        assert error(sampler(labels, images=images), expected) < 1e-5


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case not in WITHOUT_NOISE])
def test_a_generator_draws_what_it_draws_in_a_plain_loop(name: str, options: dict[str, Any], one_thread: None) -> None:
    model, ours, theirs = tiny(), *(torch.Generator().manual_seed(3) for _ in range(2))
    sampler = Sampler(model, [], scheduler=made(name, options))
    for labels in (LABELS, LABELS[:2]):
        noise = torch.randn(len(labels), *CONFIG.input_shape, generator=theirs)
        expected = plain_loop(model, made(name, options), labels, noise, generator=theirs)
        assert error(sampler(labels, generator=ours), expected) < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_every_scheduler_of_diffusers_runs_or_is_refused_by_name(name: str, one_thread: None) -> None:
    try:
        scheduler = getattr(diffusers, name)()
    except (ImportError, TypeError, ValueError) as reason:
        pytest.skip(f"it is not made without arguments: {reason}")
    refusal = ""
    try:
        images = ditfast.sample(tiny(), LABELS, scheduler=scheduler, num_steps=4).latents
    except (TypeError, ValueError) as error:
        refusal = str(error)
    if name in REFUSED or refusal:
        assert re.fullmatch(rf"scheduler: got a {name}\b.+", refusal)
        assert name not in {*DETERMINISTIC, *WITH_NOISE}
    else:
        assert images.shape == (3, *CONFIG.input_shape)


def test_timesteps_that_need_more_than_a_number_are_refused(one_thread: None) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(
        ValueError, match=r"^scheduler: got a FlowMatchEulerDiscreteScheduler, but its set_timesteps\(4\) raised"
    ):
        ditfast.sample(tiny(), LABELS, scheduler=scheduler, num_steps=4)
    scheduler.set_timesteps(4, mu=0.5)
    assert ditfast.sample(tiny(), LABELS, scheduler=scheduler).latents.isfinite().all()


@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"])
def test_timesteps_that_nobody_set_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^scheduler: got a {name}, .*: call its set_timesteps"):
        Sampler(tiny(), [], scheduler=getattr(diffusers, name)())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_batches_share_no_history(name: str, options: dict[str, Any], one_thread: None) -> None:
    model, scheduler = tiny(), made(name, options)
    before = copy.deepcopy(scheduler)
    sampler = Sampler(model, [], scheduler=scheduler)
    first = sampler(LABELS)
    sampler(LABELS[:1], images=[9])
    assert torch.equal(sampler(LABELS), first)
    assert vars(scheduler).keys() == vars(before).keys()
    assert [name for name, value in vars(scheduler).items() if not same(value, vars(before)[name])] == []


@pytest.mark.parametrize(("name", "options"), CASES)
def test_images_share_no_history(name: str, options: dict[str, Any], one_thread: None) -> None:
    model, scheduler = tiny(), made(name, options)
    whole = sample(model, [], LABELS, scheduler=scheduler, batch_invariant=True)
    for k in range(len(LABELS)):
        alone = sample(model, [], LABELS[k : k + 1], images=[k], scheduler=scheduler, batch_invariant=True)
        assert torch.equal(alone, whole[k : k + 1])


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_scheduler_that_somebody_stepped_begins_anew(name: str, options: dict[str, Any], one_thread: None) -> None:
    model, used = tiny(), made(name, options)
    fresh = sample(model, [], LABELS, scheduler=used)
    x = torch.randn(3, 4, 4, 4, requires_grad=True)
    for t in used.timesteps[:3]:
        x = used.step(x * 1.5, t, x).prev_sample  # a history that knows its gradients
    if hasattr(used, "set_begin_index"):
        used.set_begin_index(2)
    before = vars(used).copy()
    assert torch.equal(sample(model, [], LABELS, scheduler=used), fresh)
    assert all(vars(used)[name] is value for name, value in before.items())
