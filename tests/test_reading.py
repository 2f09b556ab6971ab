"""What a model's forward reads of its layers is kept until something about them changes, and no longer."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ditfast import DiT, DiTConfig
from ditfast.cpu import engine as cpu_engine
from ditfast.plain import Snapshot
from ditfast.reading import Reading

CONFIG = DiTConfig(input_size=8, patch_size=2, in_channels=4, hidden_size=32, depth=3, num_heads=4, num_classes=10)


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Sequential(nn.SiLU(), nn.Linear(4, 1))
        self.num_heads = 2
        self.scale = torch.ones(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Other(Part):
    def forward(self, x: Tensor) -> Tensor:
        return x


def own_forward(part: Part) -> None:
    part.first.forward = lambda x: x  # type: ignore[method-assign]


EDITS: dict[str, Callable[[Part], Any]] = {
    "forward hook": lambda part: part.first.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda part: part.second.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda part: part.second[0].register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda part: part.register_full_backward_pre_hook(lambda *_: None),
    "class": lambda part: setattr(part, "__class__", Other),
    "own forward": own_forward,
    "attribute": lambda part: setattr(part, "num_heads", 4),
    "new attribute": lambda part: setattr(part, "dropout", 0.1),
    "attribute gone": lambda part: delattr(part, "num_heads"),
    "tensor attribute": lambda part: setattr(part, "scale", torch.ones(2)),
    "mode": lambda part: part.second.eval(),
    "compiled": lambda part: part.first.compile(backend="eager"),
    "child": lambda part: setattr(part, "first", nn.Linear(4, 4)),
    "child of a child": lambda part: part.second.__setitem__(1, nn.Linear(4, 1)),
    "new child": lambda part: part.second.append(nn.Identity()),
    "child gone": lambda part: part.second.pop(1),
    "parameter": lambda part: setattr(part.first, "weight", nn.Parameter(part.first.weight.detach().clone())),
    "equal parameter of one element": lambda part: setattr(part.second[1], "bias", nn.Parameter(part.second[1].bias.detach())),
    "parameter gone": lambda part: part.first.register_parameter("bias", None),
    "new parameter": lambda part: part.register_parameter("gate", nn.Parameter(torch.ones(4))),
    "buffer": lambda part: part.register_buffer("mask", torch.ones(4)),
    "parametrized": lambda part: nn.utils.parametrizations.weight_norm(part.first),
    "spectral norm of old": lambda part: nn.utils.spectral_norm(part.first),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_is_noticed(edit: Callable[[Part], Any]) -> None:
    part = Part()
    snapshot = Snapshot(part.modules())
    assert snapshot.holds()
    edit(part)
    assert not snapshot.holds()


def test_a_global_hook_and_a_patched_class_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part()
    snapshot = Snapshot(part.modules())
    handle = torch_module.register_module_forward_hook(lambda *_: None)
    assert not snapshot.holds()
    handle.remove()
    assert snapshot.holds()
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: x)
    assert not snapshot.holds()


def test_training_changes_nothing_that_is_read() -> None:
    part = Part()
    snapshot = Snapshot(part.modules())
    optimizer = torch.optim.SGD(part.parameters(), 0.1)
    part(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    part.load_state_dict(part.state_dict())
    part.double()
    assert snapshot.holds()


# ------------------------------------------------------------------------------------------------ kept chains
def model_and_inputs(B: int = 2, **fields: Any) -> tuple[DiT, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    config = DiTConfig(**{**vars(CONFIG), **fields})
    model = DiT(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model, (torch.randn(B, *config.input_shape), torch.arange(B) * 100, torch.arange(B))


@pytest.fixture
def fields_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts how often the engine's fields of a chain are made."""
    if cpu_engine.found()[0] is None:
        pytest.skip("no CPU engine here")
    made: list[int] = []
    fields = cpu_engine.Engine.fields
    monkeypatch.setattr(cpu_engine.Engine, "fields", lambda *args: (made.append(1), fields(*args))[1])
    return made


def without_keeping(model: DiT, inputs: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    with monkeypatch.context() as patched:
        patched.setattr(Reading, "run_on_cpu", lambda *args: None)
        return model(*inputs)


@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "in_context"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_kept_chain_has_the_bits_of_one_made_anew(
    conditioning: str, dtype: torch.dtype, fields_made: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (x, t, y) = model_and_inputs(conditioning=conditioning)
    model, x = model.to(dtype), x.to(dtype)
    with torch.no_grad():
        model(x, t, y)
        assert len(fields_made) == 1
        for inputs in ((x, t, y), (x + 1, t + 7, y.flip(0)), (-x, t, y)):
            kept = model(*inputs)
            assert torch.equal(kept, without_keeping(model, inputs, monkeypatch))
    assert len(fields_made) == 4  # the last three are those without keeping


def test_other_sizes_and_dtypes_have_chains_of_their_own(fields_made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, t, y) = model_and_inputs(4)
    with torch.no_grad():
        for B in (1, 2, 3, 4, 1, 2, 3, 4):
            inputs = x[:B], t[:B], y[:B]
            with torch.autocast("cpu", torch.bfloat16, enabled=B % 2 == 0):
                assert torch.equal(model(*inputs), without_keeping(model, inputs, monkeypatch))
    assert len(fields_made) == 4 + 8


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: nn.init.normal_(model.blocks[1].mlp.fc1.weight),
        lambda model: model.load_state_dict({name: value + 0.1 for name, value in model.state_dict().items()}),
        lambda model: model.blocks[2].attn.proj.weight.data.neg_(),
        lambda model: setattr(model.blocks[0].attn.qkv, "bias", nn.Parameter(torch.randn(96))),
        lambda model: nn.init.normal_(model.blocks[0].adaLN_modulation[1].bias),
        lambda model: setattr(model.blocks[1].attn, "num_heads", 8),
        lambda model: model.blocks[1].mlp.register_forward_hook(lambda module, given, out: out + 1),
    ],
    ids=["in place", "load_state_dict", "data", "assigned", "modulation", "heads", "hook"],
)
def test_an_edit_reaches_the_next_forward(edit: Callable[[DiT], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_and_inputs()
    with torch.no_grad():
        before = model(*inputs)
        edit(model)
        fresh = DiT(model.config).eval()
        after = model(*inputs)
        assert not torch.equal(after, before)
        if not model.blocks[1].mlp._forward_hooks:
            fresh.load_state_dict(model.state_dict())
            fresh.blocks[1].attn.num_heads = model.blocks[1].attn.num_heads
            assert torch.equal(after, without_keeping(fresh, inputs, monkeypatch))


class Wrapping(Tensor):
    """A subclass, which may want to see each operation."""


def test_vectors_of_another_kind_of_tensor_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_and_inputs()
    vectors = Reading.vectors
    with torch.no_grad():
        plain = model(*inputs)
        wrap = lambda made: [vector.as_subclass(Wrapping) for vector in made]  # noqa: E731
        monkeypatch.setattr(Reading, "vectors", lambda reading, c: wrap(vectors(reading, c)))
        monkeypatch.setattr(cpu_engine.Engine, "call", lambda *args: pytest.fail("the engine has read them"))
        assert torch.allclose(model(*inputs).as_subclass(Tensor), plain, atol=1e-5)


def test_threads_share_a_kept_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, t, y) = model_and_inputs()
    kinds = [(x * scale, t, y) for scale in (1, 2, 3, 4)]
    with torch.no_grad():
        expected = [without_keeping(model, inputs, monkeypatch) for inputs in kinds]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            wrong.extend(index for _ in range(50) if not torch.equal(model(*kinds[index]), expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(kinds))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_model_that_nobody_holds_is_gone_at_once() -> None:
    """Memory of a GPU is free without Python's collector of cycles."""
    model, inputs = model_and_inputs()
    with torch.no_grad():
        model(*inputs)
    weight = weakref.ref(model.blocks[0].mlp.fc1.weight)
    gc.disable()
    try:
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_copies_and_pickles_read_their_own_layers() -> None:
    model, inputs = model_and_inputs()
    with torch.no_grad():
        before = model(*inputs)
        copied = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        for other in (copied, loaded):
            assert torch.equal(other(*inputs), before)
            nn.init.normal_(other.blocks[0].mlp.fc2.weight)
            assert not torch.equal(other(*inputs), before)
        assert torch.equal(model(*inputs), before)
