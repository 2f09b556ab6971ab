"""Models that are not a plain DiT: what sample runs is their own forward, and its bits are those of calling them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from foreign import diffusers_dit, official
from support import error, randomize
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import ditfast
from ditfast import DiT, DiTConfig, reference
from ditfast.diffusion import GaussianDiffusion, apply_update, steps
from ditfast.modulation_table import can_tabulate
from ditfast.sampling import Sampler, image_noise, sample

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, num_classes=5)
LABELS = torch.tensor([0, 3])
DDIM = steps(GaussianDiffusion("ddim4"), "ddim")


def new_dit(kind: type[DiT] = DiT) -> DiT:
    model = randomize(kind(CONFIG)).eval()
    assert isinstance(model, DiT)
    return model


class Halved(DiT):
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.5 * super().forward(x, t, y)


class HalvedTable(DiT):
    """A DiT with a modulation of its own, which a plain forward does not ask for."""

    def modulation_vectors(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.5 * super().modulation_vectors(t, y)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return 0.5 * self.module(x, t, y)


def hook_forward(model: DiT) -> None:
    model.register_forward_hook(lambda module, given, out: 0.5 * out)


def hook_inputs(model: DiT) -> None:
    model.register_forward_pre_hook(lambda module, given: (0.5 * given[0], *given[1:]))


def replace_forward(model: DiT) -> None:
    own = model.forward
    model.forward = lambda x, t, y: 0.5 * own(x, t, y)  # type: ignore[method-assign]


def hook_labels(model: DiT) -> None:
    model.y_embedder.register_forward_hook(lambda module, given, out: out + len(out))  # which differs in a table


def hook_label_table(model: DiT) -> None:
    model.y_embedder.embedding_table.register_forward_hook(lambda module, given, out: out + len(out))


def hook_times(model: DiT) -> None:
    model.t_embedder.register_forward_hook(lambda module, given, out: out + len(out))


def hook_adaln(model: DiT) -> None:
    model.adaln_linears()[1].register_forward_hook(lambda module, given, out: out + len(out))


class Counting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + len(x)


def replace_adaln(model: DiT) -> None:
    linear = Counting(CONFIG.hidden_size, model.adaln_linears()[0].out_features)
    linear.load_state_dict(model.adaln_linears()[0].state_dict())
    model.blocks[0].adaLN_modulation[1] = linear


CHANGES: dict[str, Callable[[DiT], None]] = {
    "forward hook": hook_forward,
    "pre-hook": hook_inputs,
    "replaced forward": replace_forward,
    "hook on the labels' embedder": hook_labels,
    "hook inside the labels' embedder": hook_label_table,
    "hook on the times' embedder": hook_times,
    "hook on an adaLN linear": hook_adaln,
    "replaced adaLN linear": replace_adaln,
}


@torch.no_grad()
def plain_ddim(call: Callable[[Tensor, Tensor, Tensor], Tensor], config: DiTConfig, scale: float = 3.0) -> Tensor:
    """Call a model on both halves of guidance in one batch, as the official sampler does."""
    x = image_noise(config.input_shape, range(len(LABELS)), 0)
    y = torch.cat([LABELS, torch.full_like(LABELS, config.null_class)])
    for step in DDIM:
        out = call(torch.cat([x, x]), torch.full((len(y),), step.t), y)
        conditional, unconditional = out[:, : config.in_channels].chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        channels = config.guidance_channels
        x = apply_update(x, torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1), None, step.update)
    return x


# ------------------------------------------------------------------------------------------------ forwards of its own
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_hooks_and_replaced_modules_are_called_in_every_step(change: Callable[[DiT], None]) -> None:
    model = new_dit()
    unchanged = sample(model, DDIM, LABELS, cfg_scale=3.0)
    assert can_tabulate(model)
    change(model)
    assert not can_tabulate(model)
    found = sample(model, DDIM, LABELS, cfg_scale=3.0)
    assert error(found, plain_ddim(model, CONFIG)) < 1e-5
    assert error(found, unchanged) > 1e-3


@pytest.mark.parametrize("kind", [Halved, HalvedTable])
def test_a_subclass_samples_with_its_own_forward(kind: type[DiT]) -> None:
    model = new_dit(kind)
    assert error(sample(model, DDIM, LABELS, cfg_scale=3.0), plain_ddim(model, CONFIG)) < 1e-5


class OwnSequential(nn.Sequential):
    def forward(self, c: Tensor) -> Tensor:
        return 2 * super().forward(c)


@pytest.mark.parametrize("layer", ["blocks.1", "final_layer"])
def test_an_adaln_module_that_is_hooked_or_replaced_has_no_table(layer: str) -> None:
    model = new_dit()
    adaln = model.get_submodule(f"{layer}.adaLN_modulation")
    for module in (adaln, adaln[0], adaln[1]):
        handle = module.register_forward_hook(lambda module, given, out: None)
        assert not can_tabulate(model)
        handle.remove()
        assert can_tabulate(model)
    for other in (OwnSequential(*adaln), nn.Sequential(nn.ReLU(), adaln[1]), nn.Linear(64, 64)):
        model.get_submodule(layer).adaLN_modulation = other
        assert not can_tabulate(model)


@pytest.mark.parametrize("layer", ["blocks.1", "final_layer"])
def test_a_plain_sequential_in_place_of_an_adaln_module_is_read(layer: str) -> None:
    model, x, t = new_dit(), torch.randn(len(LABELS), *CONFIG.input_shape), torch.full(LABELS.shape, 500.0)
    with torch.no_grad():
        expected = sample(model, DDIM, LABELS, cfg_scale=3.0), model(x, t, LABELS), model.modulation_vectors(t, LABELS)
        adaln = model.get_submodule(f"{layer}.adaLN_modulation")
        model.get_submodule(layer).adaLN_modulation = nn.Sequential(OrderedDict(activation=adaln[0], linear=adaln[1]))
        assert can_tabulate(model)
        found = sample(model, DDIM, LABELS, cfg_scale=3.0), model(x, t, LABELS), model.modulation_vectors(t, LABELS)
    assert all(map(torch.equal, found, expected))


def test_a_child_appended_to_an_adaln_module_leaves_no_table() -> None:
    model = new_dit()
    model.blocks[1].adaLN_modulation.append(nn.ReLU())
    assert not can_tabulate(model)
    assert error(sample(model, DDIM, LABELS, cfg_scale=3.0), plain_ddim(model, CONFIG)) < 1e-5


def test_a_subclass_without_a_forward_keeps_the_table() -> None:
    class Named(DiT):
        pass

    assert can_tabulate(new_dit(Named))


def test_a_global_hook_sees_every_step() -> None:
    model, seen = new_dit(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, given, out: seen.append(type(module)))
    try:
        sample(model, DDIM, LABELS)
    finally:
        hook.remove()
    assert seen.count(DiT) == len(DDIM)


def test_a_hook_added_between_batches_counts() -> None:
    model = new_dit()
    sampler = Sampler(model, DDIM)
    before = sampler(LABELS)
    handle = model.register_forward_hook(lambda module, given, out: 0.5 * out)
    assert error(sampler(LABELS), before) > 1e-3
    handle.remove()
    assert torch.equal(sampler(LABELS), before)


def test_offloading_with_a_hook_is_refused() -> None:
    model = new_dit()
    sampler = Sampler(model, DDIM, offload_conditioning=True)
    hook_labels(model)
    with pytest.raises(ValueError, match=r"^offload_conditioning: got True, but"):
        sampler(LABELS)


# ------------------------------------------------------------------------------------------------ wrappers
@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("wrap", [AveragedModel, nn.DataParallel], ids=["AveragedModel", "DataParallel"])
def test_an_averaged_or_replicated_model_is_the_module_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = new_dit()
    wrapped = wrap(model).eval()
    assert can_tabulate(Sampler(wrapped, DDIM).denoiser.model)
    assert torch.equal(sample(wrapped, DDIM, LABELS, cfg_scale=3.0), sample(model, DDIM, LABELS, cfg_scale=3.0))


@pytest.mark.usefixtures("one_process")
def test_a_ddp_model_is_the_module_inside() -> None:
    model = new_dit()
    wrapped = DistributedDataParallel(model)  # in training mode, while the module is not
    assert torch.equal(sample(wrapped, DDIM, LABELS, cfg_scale=3.0), sample(model, DDIM, LABELS, cfg_scale=3.0))
    model.train()
    with pytest.raises(ValueError, match=r"^model: got a model in training mode"):
        sample(wrapped, DDIM, LABELS)


def test_a_hook_on_a_wrapper_is_called() -> None:
    wrapped = AveragedModel(new_dit()).eval()
    hook_forward(wrapped)  # type: ignore[arg-type]
    assert error(sample(wrapped, DDIM, LABELS, cfg_scale=3.0), plain_ddim(wrapped, CONFIG)) < 1e-5


def test_a_wrapper_of_ones_own_is_called() -> None:
    wrapped = Wrapper(new_dit()).eval()
    assert error(sample(wrapped, DDIM, LABELS, cfg_scale=3.0), plain_ddim(wrapped, CONFIG)) < 1e-5


@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile", "model.compile"])
def test_a_compiled_model_runs_its_compiled_forward(in_place: bool) -> None:
    model, compilations = new_dit(), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compilations.append(graph)
        return graph.forward

    compiled: Any = model
    if in_place:
        model.compile(backend=backend)
    else:
        compiled = torch.compile(model, backend=backend)
    expected = plain_ddim(model.forward, CONFIG)
    assert error(sample(compiled, DDIM, LABELS, cfg_scale=3.0), expected) < 1e-5
    assert compilations


def test_a_model_that_accelerate_prepared_is_called() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = new_dit()
    expected = plain_ddim(model, CONFIG)
    prepared = accelerate.Accelerator(cpu=True).prepare(model).eval()
    assert error(sample(prepared, DDIM, LABELS, cfg_scale=3.0), expected) < 1e-5


# ------------------------------------------------------------------------------------------------ models of others
@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
def test_an_official_model_describes_itself(accelerated: bool) -> None:
    model = official()
    config = DiTConfig(input_size=8, num_classes=10)
    expected = plain_ddim(model, config)
    if accelerated:
        ditfast.accelerate(model)
    assert error(sample(model, DDIM, LABELS, cfg_scale=3.0), expected) < 1e-5


@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "accelerated"])
def test_a_diffusers_model_describes_itself(accelerated: bool) -> None:
    model: Any = diffusers_dit()
    config = DiTConfig(input_size=8, num_classes=1000, flavour="diffusers")
    expected = plain_ddim(lambda x, t, y: model(x, timestep=t, class_labels=y).sample, config)
    if accelerated:
        ditfast.accelerate(model)
    assert error(sample(model, DDIM, LABELS, cfg_scale=3.0), expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_the_reference_is_sampled(dtype: torch.dtype) -> None:
    model = randomize(reference.DiT(CONFIG)).eval().to(dtype)
    expected = plain_ddim(lambda x, t, y: model(x.to(dtype), t, y).float(), CONFIG)
    assert error(sample(model, DDIM, LABELS, cfg_scale=3.0), expected) < 1e-5


class Mine(nn.Module):
    def __init__(self, channels: int = 2):
        super().__init__()
        self.convolution = nn.Conv2d(2, channels, 3, padding=1)
        self.labels = nn.Embedding(5, channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.convolution(x) * (1 + t / 1000).cos()[:, None, None, None] + self.labels(y)[..., None, None]


MINE = SimpleNamespace(in_channels=2, input_size=(3, 5), num_classes=4)


@pytest.mark.parametrize("compiled", [False, True], ids=["module", "function"])
def test_a_model_of_ones_own_is_sampled_as_its_config_says(compiled: bool) -> None:
    model = Mine().eval()
    call: Any = (lambda x, t, y: model(x, t, y)) if compiled else model
    config = DiTConfig(patch_size=1, in_channels=2, input_size=(3, 5), num_classes=4, learn_sigma=False, flavour="diffusers")
    found = sample(call, DDIM, LABELS, cfg_scale=3.0, config=MINE)
    assert found.shape == (2, 2, 3, 5)
    assert error(found, plain_ddim(model, config)) < 1e-5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, r"config: got None, expected a ditfast\.DiTConfig, or an object with .*, as the model \(.*\.Mine\) does not"),
        (SimpleNamespace(in_channels=2, num_classes=4), "config: got a SimpleNamespace, expected a ditfast.DiTConfig"),
        (SimpleNamespace(in_channels=2, input_size=0, num_classes=4), "config: input_size: got 0"),
        (SimpleNamespace(in_channels=2, input_size=3, num_classes=1.5), "config: num_classes: got 1.5"),
        (3, "config: got 3, expected a ditfast.DiTConfig"),
    ],
    ids=["none", "no size", "size", "classes", "number"],
)
def test_a_config_that_describes_nothing_is_named(config: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        sample(Mine().eval(), DDIM, LABELS, config=config)


def test_an_output_of_another_shape_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^model: got shape \(2, 3, 3, 5\) from it, expected \(2, 2, 3, 5\) or \(2, 4, 3, 5\)"
    ):
        sample(Mine(channels=3).eval(), DDIM, LABELS, config=MINE)


def test_a_missing_variance_is_named() -> None:
    learned = steps(GaussianDiffusion("4"), "ddpm")
    with pytest.raises(ValueError, match=r"^model: got 2 channels from it, expected 4, as these steps read a variance"):
        sample(Mine().eval(), learned, LABELS, config=MINE)
    fixed = steps(GaussianDiffusion("4", learn_sigma=False), "ddpm")
    assert sample(Mine().eval(), fixed, LABELS, config=MINE).isfinite().all()


@torch.no_grad()
def test_of_two_runs_at_once_each_has_its_own_variance() -> None:
    learned, fixed = (steps(GaussianDiffusion("4", learn_sigma=sigma), "ddpm") for sigma in (True, False))
    sampler = Sampler(Mine().eval(), fixed, config=MINE)
    batch = sampler._batch(LABELS, 1.0, None, None, None, None)
    states = sampler._run.solved(fixed, batch)
    next(states)
    with pytest.raises(ValueError, match=r"^model: got 2 channels from it"):
        next(sampler._run.solved(learned, batch))
    assert len(list(states)) == 3


# ------------------------------------------------------------------------------------------------ what comes back
def test_images_are_tensors_to_train_on() -> None:
    images = sample(new_dit(), DDIM, LABELS)
    assert not images.is_inference()
    images.mul_(0.5)
    nn.Conv2d(4, 1, 3)(images).sum().backward()
    with torch.inference_mode():
        assert sample(new_dit(), DDIM, LABELS).isfinite().all()
