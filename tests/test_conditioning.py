import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support import DTYPES, assert_as_good_as, raises_naming, randomize
from torch import Tensor, nn
from torch.nn import functional as F

from ditfast import DiT, DiTConfig, cpu
from ditfast.blocks import view
from ditfast.conditioning import project, timestep_embedding
from ditfast.modulation_table import offloaded_conditioning


def test_timestep_features_by_hand() -> None:
    t = torch.tensor([0.0, 7.25, 999.0])
    features = timestep_embedding(t)
    assert features.dtype == torch.float32
    for k in (0, 1, 127):
        angle = t.double() * math.exp(-math.log(10000) * k / 128)
        torch.testing.assert_close(features[:, k].double(), angle.cos(), rtol=0, atol=1e-4)
        torch.testing.assert_close(features[:, 128 + k].double(), angle.sin(), rtol=0, atol=1e-4)


def test_diffusers_frequencies_reach_further() -> None:
    last = timestep_embedding(torch.tensor([999.0]), frequency_divisor=127)[0, 127]
    assert last.item() == pytest.approx(math.cos(999 / 10000), abs=1e-6)


def test_timestep_errors() -> None:
    assert "[B]" in raises_naming("t", lambda: timestep_embedding(torch.zeros(2, 1)))
    assert "even" in raises_naming("dim", lambda: timestep_embedding(torch.zeros(2), dim=7))


# ------------------------------------------------------------------------------------------------ a model's vectors
CONFIG = DiTConfig(depth=2, hidden_size=64, num_heads=2, patch_size=2, input_size=8, num_classes=5)


@pytest.mark.parametrize("t", [7, 7.5, torch.tensor(7), torch.tensor([7.5])], ids=repr)
def test_one_time_is_that_of_all_modulation_vectors(t: Tensor | float) -> None:
    model, y = randomize(DiT(CONFIG)).eval(), torch.tensor([3, 5])
    with torch.no_grad():
        assert torch.equal(model.modulation_vectors(t, y), model.modulation_vectors(torch.full((2,), float(t)), y))


@pytest.mark.parametrize(
    ("t", "y", "message"),
    [
        (torch.rand(3), torch.tensor([3, 5]), r"t: got shape \(3,\), expected \[2\], one for each sample of y"),
        (torch.rand(2), torch.tensor([3]), r"t: got shape \(2,\), expected \[1\], one for each sample of y"),
        (torch.rand(2), torch.tensor(3), r"y: got shape \(\), expected \[B\]"),
    ],
    ids=["3-2", "2-1", "scalar label"],
)
def test_modulation_vectors_need_a_time_for_each_label(t: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiT(CONFIG).modulation_vectors(t, y)


# ------------------------------------------------------------------------------------------------ modulations
def linears(dtype: torch.dtype = torch.float32) -> list[nn.Linear]:
    return [nn.Linear(16, width).to(dtype) for width in (48, 48, 32)]


def modulations(x: Tensor, layers: list[nn.Linear]) -> list[Tensor]:
    return project(x, [view(layer) for layer in layers])


def assert_as_one_by_one(layers: list[nn.Linear], x: Tensor) -> None:
    exact = [F.linear(x.double(), layer.weight.double(), layer.bias.double()) for layer in layers]
    for out, layer, expected in zip(modulations(x, layers), layers, exact, strict=True):
        assert_as_good_as(out, expected, layer(x))
        assert out.stride(1) == 1


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("B", [1, 2, 5, 16, 17])
def test_modulations_are_those_of_the_linears_one_by_one(dtype: torch.dtype, B: int) -> None:
    with torch.no_grad():
        assert_as_one_by_one(linears(dtype), torch.randn(B, 16).to(dtype))


@pytest.mark.parametrize("change", ["in place", "assigned", "deepcopied", "moved", "transposed"])
def test_changed_weights_are_never_stale(change: str) -> None:
    layers = linears()
    x = torch.randn(3, 16)
    with torch.no_grad():
        modulations(x, layers)
    if change == "in place":
        nn.init.normal_(layers[1].weight)
    elif change == "assigned":
        layers[1].load_state_dict({"weight": torch.randn(48, 16), "bias": torch.randn(48)}, assign=True)
    elif change == "deepcopied":
        layers = copy.deepcopy(layers)
        nn.init.normal_(layers[2].weight)
    elif change == "moved":
        layers[0].weight.data = torch.randn(48, 16)
    else:
        layers[0].weight.data = torch.randn(16, 48).T
    with torch.no_grad():
        assert_as_one_by_one(layers, x)


def test_a_hooked_linear_is_called() -> None:
    layers, called = linears(), []
    layers[1].register_forward_hook(lambda module, args, out: called.append(out) or out + 1)
    with torch.no_grad():
        first, second, third = modulations(torch.zeros(2, 16), layers)
    assert len(called) == 1
    assert torch.equal(first, layers[0].bias.expand(2, -1))
    assert torch.equal(second, called[0] + 1)
    assert torch.equal(third, layers[2].bias.expand(2, -1))


def test_gradients_reach_every_linear() -> None:
    layers = linears()
    sum(out.sum() for out in modulations(torch.randn(3, 16), layers)).backward()
    assert all(layer.weight.grad is not None and layer.weight.grad.any() for layer in layers)


def test_modulations_compile_into_one_graph() -> None:
    layers, x = linears(), torch.randn(3, 16)
    compiled = torch.compile(lambda x: modulations(x, layers), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for out, expected in zip(compiled(x), modulations(x, layers), strict=True):
            torch.testing.assert_close(out, expected)


def test_the_cpu_engine_reads_all_weights_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, why = cpu.found()
    if engine is None:
        pytest.skip(why)
    model, seen = DiT(DIT).eval(), []
    run = engine.grouped_linear
    monkeypatch.setattr(engine, "grouped_linear", lambda x, given: seen.append(given) or run(x, given))
    with torch.no_grad():
        model(torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 2]))
    (given,) = seen
    assert [weight for weight, _ in given] == [linear.weight for linear in model.adaln_linears()]


# ------------------------------------------------------------------------------------------------ storages
DIT = DiTConfig(depth=3, hidden_size=64, num_heads=2, input_size=8, num_classes=10)


def used(model: DiT) -> DiT:
    with torch.no_grad():
        model(torch.randn(2, 4, 8, 8, dtype=model.pos_embed.dtype), torch.rand(2), torch.tensor([1, 2]))
    return model


def loaded(model: DiT) -> DiT:
    other = DiT(DIT)
    other.load_state_dict(model.state_dict())
    return other


def assigned(model: DiT) -> DiT:
    other = DiT(DIT)
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return other


def offloaded(model: DiT) -> DiT:
    with offloaded_conditioning(model):
        used(model)
    return model


WAYS: dict[str, Callable[[DiT], DiT]] = {
    "new": lambda model: model,
    "in-training": lambda model: model.train(),
    "bf16": lambda model: model.to(torch.bfloat16),
    "half-and-back": lambda model: model.half().float(),
    "loaded": loaded,
    "assigned": assigned,
    "deepcopied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "offloaded": offloaded,
    "int8": lambda model: model.quantize("int8"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_parameter_has_a_storage_of_its_own(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    if way == "int8" and cpu.found()[0] is None:
        pytest.skip(cpu.found()[1])
    model = used(WAYS[way](used(DiT(DIT))))
    parameters = list(model.parameters())
    assert len({parameter.untyped_storage().data_ptr() for parameter in parameters}) == len(parameters)
    for parameter in parameters:
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


def test_safetensors_saves_and_loads_the_model(tmp_path: Path) -> None:
    model, other = randomize(DiT(DIT)), DiT(DIT)
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    assert safetensors.torch.load_model(other, tmp_path / "model.safetensors") == (set(), [])
    for name, value in other.state_dict().items():
        assert torch.equal(value, model.get_parameter(name))


def test_accelerate_saves_every_weight(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, accelerator = randomize(DiT(DIT)), accelerate.Accelerator(cpu=True)
    accelerator.save_model(accelerator.prepare(model), tmp_path)
    saved = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())


def test_accelerate_saves_and_loads_its_state(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(randomize(DiT(DIT)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accelerator.save_state(str(tmp_path))
    randomize(model)
    accelerator.load_state(str(tmp_path))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_hub_mixin_saves_and_loads_the_model(tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Mine(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self) -> None:
            super().__init__()
            self.dit = randomize(DiT(DIT))

    model = Mine()
    model.save_pretrained(tmp_path)
    other = Mine.from_pretrained(tmp_path)
    assert all(torch.equal(other.state_dict()[name], value) for name, value in model.state_dict().items())
