"""Layers of the fast DiT that somebody wants to be called: they are, and take and return what the reference's do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import error, randomize
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves, tree_map

from ditfast import DiT, DiTConfig, reference
from ditfast.config import CONDITIONINGS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:For backward hooks to be called"),
]

CONFIG = DiTConfig(depth=3, hidden_size=64, num_heads=2, patch_size=2, input_size=(8, 12), num_classes=5)
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
LAYERS = (
    *("x_embedder", "x_embedder.proj", "t_embedder", "t_embedder.mlp.0", "y_embedder", "y_embedder.embedding_table"),
    *("blocks.0", "blocks.1", "blocks.2", "blocks.1.attn", "blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp"),
    *("blocks.1.mlp.fc1", "blocks.1.mlp.fc2", "final_layer", "final_layer.linear"),
)
ADALN = (
    "blocks.1.adaLN_modulation",
    "blocks.0.adaLN_modulation.0",
    "blocks.2.adaLN_modulation.1",
    "final_layer.adaLN_modulation",
)
CROSS = ("blocks.1.cross_attn", "blocks.1.cross_attn.q", "blocks.1.cross_attn.kv", "blocks.1.cross_attn.proj")
EVERY_LAYER = [
    *(("adaln_zero", name) for name in (*LAYERS, *ADALN)),
    *(("cross_attention", name) for name in (*LAYERS[6:11], *CROSS)),
    *(("adaln", name) for name in (*LAYERS[6:8], ADALN[0])),
    *(("in_context", name) for name in ("x_embedder", "blocks.0", "blocks.2", "final_layer")),
]
each_layer = pytest.mark.parametrize(("conditioning", "name"), EVERY_LAYER)
MODES = pytest.mark.parametrize(
    ("dtype", "gradients"), [(torch.float32, True), (torch.bfloat16, False)], ids=["fp32-grad", "bf16-no_grad"]
)
GRADIENTS = pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])


def pair(conditioning: str = "adaln_zero", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The reference and the fast model, of the same random weights."""
    config = dataclasses.replace(CONFIG, conditioning=conditioning)
    oracle, fast = randomize(reference.DiT(config)).eval(), DiT(config).eval()
    fast.load_state_dict(oracle.state_dict())
    return oracle.to(dtype), fast.to(dtype)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, *CONFIG.input_shape).to(dtype), torch.rand(2) * 999, torch.tensor([3, 5])


def tensors(*given: Any) -> list[Tensor]:
    return [leaf.detach().clone() for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]


def alike(found: list[Tensor], expected: list[Tensor], limit: float = 1e-5) -> None:
    assert [(tensor.shape, tensor.dtype) for tensor in found] == [(tensor.shape, tensor.dtype) for tensor in expected]
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) <= limit


def step(model: nn.Module, given: tuple[Tensor, ...], gradients: bool = True) -> list[Tensor]:
    """The output and the gradients of a forward, and a backward where there are any."""
    with torch.set_grad_enabled(gradients):
        out = model(*given)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [out.detach(), *(torch.autograd.grad(out.square().mean(), trained) if gradients else ())]


def listen(layer: nn.Module, kind: str, seen: list[list[Tensor]]) -> Any:
    register = {
        "forward": layer.register_forward_hook,
        "pre": layer.register_forward_pre_hook,
        "backward": layer.register_full_backward_hook,
        "backward pre": layer.register_full_backward_pre_hook,
    }
    return register[kind](lambda module, *given: seen.append(tensors(*given)))


@each_layer
@MODES
def test_hooks_see_what_the_reference_s_see(conditioning: str, name: str, dtype: torch.dtype, gradients: bool) -> None:
    given, found = inputs(dtype), []
    for model in pair(conditioning, dtype):
        seen: list[list[Tensor]] = []
        for kind in ("forward", "pre", *(("backward", "backward pre") if gradients else ())):
            listen(model.get_submodule(name), kind, seen)
        outcome = step(model, given, gradients)
        found.append((outcome[:1], seen))
    (expected, wanted), (out, seen) = found
    assert len(seen) == len(wanted) > 0
    for a, b in zip(seen, wanted, strict=True):
        alike(a, b, LIMIT[dtype])
    alike(out, expected, LIMIT[dtype])


@each_layer
def test_what_a_hook_changes_changes_the_result(conditioning: str, name: str) -> None:
    def change(module: nn.Module, given: Any, out: Any) -> Any:
        return tree_map(lambda part: part * torch.linspace(0.5, 2, part.shape[-1]), out)

    models, given = pair(conditioning), inputs()
    before = step(models[1], given)
    for model in models:
        model.get_submodule(name).register_forward_hook(change)
    expected, found = (step(model, given) for model in models)
    assert error(found[0], before[0]) > 1e-4
    alike(found, expected, 2e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_global_hook_sees_every_layer(conditioning: str) -> None:
    found = []
    for model in pair(conditioning):
        seen: list[str] = []
        with register_module_forward_hook(lambda module, *_, seen=seen: seen.append(type(module).__name__)):
            out = model(*inputs())
        found.append((sorted(seen), out))
    (expected, _), (seen, _) = found
    assert seen == expected


class Own(nn.Module):
    """Somebody's layer in place of another."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *given: Tensor) -> Tensor:
        return self.layer(*given) + 1


def wrap(change: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module, str], None]:
    def apply(model: nn.Module, name: str) -> None:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, change(model.get_submodule(name)))

    return apply


def own_forward(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)
    plain = layer.forward
    layer.forward = lambda *given: plain(*given) + 1  # type: ignore[method-assign]


def other_class(model: nn.Module, name: str) -> None:
    layer = model.get_submodule(name)

    def forward(self: nn.Module, *given: Tensor) -> Tensor:
        return super(kind, self).forward(*given) + 1

    kind = type("Other", (type(layer),), {"forward": forward})
    layer.__class__ = kind


def compiled(model: nn.Module, name: str) -> None:
    model.get_submodule(name).compile(backend="eager")


class Scaled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


def parametrized(model: nn.Module, name: str) -> None:
    for part in model.get_submodule(name).modules():
        if isinstance(part, nn.Linear):
            parametrize.register_parametrization(part, "weight", Scaled())


CHANGES = {
    "replaced": wrap(Own),
    "wrapped for checkpointing": wrap(checkpoint_wrapper),
    "own forward": own_forward,
    "other class": other_class,
    "compiled": compiled,
    "parametrized": parametrized,
}


@pytest.mark.parametrize(
    "change", [pytest.param(name, marks=pytest.mark.full if name == "compiled" else ()) for name in CHANGES]
)
@pytest.mark.parametrize("name", ["x_embedder", "y_embedder", "blocks.1", "blocks.1.attn", "final_layer"])
@GRADIENTS
def test_changed_layers_are_called(name: str, change: str, gradients: bool) -> None:
    found = []
    for model in pair():
        step(model, inputs(), gradients)  # which has read the layers
        CHANGES[change](model, name)
        torch.manual_seed(0)
        found.append(step(model, inputs(), gradients))
    alike(found[1], found[0], 2e-5)


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
def test_what_is_called_between_fused_blocks_costs_no_fusion(gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block of three is called: the other two are read, and share a call for their vectors with the final layer."""
    from ditfast import conditioning

    _, fast = pair()
    counts: list[int] = []
    together = conditioning._together
    monkeypatch.setattr(
        conditioning, "_together", lambda c, linears, *rest: (counts.append(len(linears)), together(c, linears, *rest))[1]
    )
    fast.blocks[1].register_forward_hook(lambda *_: None)
    step(fast, inputs(), gradients)
    assert counts == [3, 1]


@pytest.mark.parametrize("name", ["blocks.1", "final_layer"])
@GRADIENTS
def test_a_child_appended_to_an_adaln_module_is_called(name: str, gradients: bool) -> None:
    models, given = pair(), inputs()
    before = step(models[1], given, gradients)
    for model in models:
        model.get_submodule(f"{name}.adaLN_modulation").append(nn.ReLU())
    expected, found = (step(model, given, gradients) for model in models)
    assert error(found[0], before[0]) > 1e-4
    alike(found, expected, 2e-5)


@pytest.mark.parametrize(
    ("conditioning", "hooked", "count"),
    [("adaln_zero", None, 0), ("adaln", "final_layer", 0), ("adaln_zero", "blocks.1", 1), ("in_context", None, 1)],
)
def test_the_embeddings_are_stacked_only_for_layers_that_read_both(
    conditioning: str, hooked: str | None, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle, fast = pair(conditioning)
    given, counts, stack = inputs(), [], torch.stack
    expected = oracle(*given)
    if hooked is not None:
        fast.get_submodule(hooked).register_forward_hook(lambda *_: None)
    monkeypatch.setattr(torch, "stack", lambda *args, **options: (counts.append(1), stack(*args, **options))[1])
    assert error(fast(*given), expected) <= 1e-5
    assert len(counts) == count


def test_vectors_made_beforehand_are_not_for_layers_that_are_called() -> None:
    _, fast = pair()
    x, t, y = inputs()
    vectors = fast.modulation_vectors(t, y)
    for name in ("blocks.1", "final_layer"):
        handle = fast.get_submodule(name).register_forward_hook(lambda *_: None)
        with pytest.raises(ValueError, match=f"{name}: got a layer that was hooked"):
            fast.forward_modulated(x, vectors)
        handle.remove()
    assert error(fast.forward_modulated(x, vectors), fast(x, t, y)) <= 1e-5


# ------------------------------------------------------------------------------------------------ labels, times, strides
@pytest.mark.parametrize("y", [torch.randn(2, 7), torch.tensor([3, 19]), ["one", "two"]], ids=["vectors", "20 classes", "text"])
def test_a_replaced_y_embedder_is_given_what_it_takes(y: Any) -> None:
    class Text(nn.Linear):
        def forward(self, words: list[str]) -> Tensor:
            return super().forward(torch.tensor([[float(len(word))] for word in words]))

    new = nn.Embedding(21, 64) if isinstance(y, Tensor) and y.dim() == 1 else nn.Linear(7, 64)
    new = Text(1, 64) if isinstance(y, list) else new
    x, t, _ = inputs()
    found = []
    for model in pair():
        model.y_embedder = new
        found.append(step(model, (x, t, y)))
    alike(found[1], found[0])


def test_labels_are_those_of_the_table_that_is_there() -> None:
    _, fast = pair()
    x, t, _ = inputs()
    with pytest.raises(ValueError, match=r"y: got labels 3\.\.20, expected 0\.\.5"):
        fast(x, t, torch.tensor([3, 20]))
    fast.y_embedder.embedding_table = nn.Embedding(21, 64)
    fast(x, t, torch.tensor([3, 20]))
    with pytest.raises(ValueError, match=r"y: got labels 3\.\.21, expected 0\.\.20"):
        fast(x, t, torch.tensor([3, 21]))
    with pytest.raises(ValueError, match=r"y: got shape \(3,\), expected \[2\]"):
        fast(x, t, torch.tensor([3, 4, 5]))


@pytest.mark.parametrize("kind", ["reference", "fast"])
@pytest.mark.parametrize("t", [7, 7.5, torch.tensor(7), torch.tensor([7.5]), torch.tensor([7]).numpy()[0]], ids=repr)
def test_one_time_is_that_of_all_samples(t: Any, kind: str) -> None:
    model = dict(zip(("reference", "fast"), pair(), strict=True))[kind]
    x, _, y = inputs()
    times = torch.full((2,), float(t))
    with torch.no_grad():
        assert torch.equal(model(x, t, y), model(x, times, y))
        both = torch.cat([x, x]), t, torch.cat([y, y])
        assert error(model.forward_with_cfg(*both, 2.0)[:2], model(x, times, y)) <= 1e-5
        assert model(x[:0], t, y[:0]).shape == (0, 8, 8, 12)


@pytest.mark.parametrize(
    ("t", "message"),
    [
        (torch.rand(3), r"t: got shape \(3,\), expected \[2\]"),
        (torch.rand(2, 1), r"t: got shape \(2, 1\), expected \[2\]"),
        (torch.rand(1, 1), r"t: got shape \(1, 1\), expected \[2\]"),
        (True, "t: got True, expected"),
        ("7", "t: got '7', expected"),
        (None, "t: got None, expected"),
        ([1, 2], "t: got .*, expected"),
    ],
    ids=["3", "2x1", "1x1", "bool", "text", "none", "list"],
)
def test_other_times_are_refused(t: Any, message: str) -> None:
    x, _, y = inputs()
    with pytest.raises((ValueError, TypeError), match=message):
        DiT(CONFIG)(x, t, y)


@MODES
def test_channels_last(dtype: torch.dtype, gradients: bool) -> None:
    _, fast = pair(dtype=dtype)
    x, t, y = inputs(dtype)
    expected = step(fast, (x, t, y), gradients)
    fast.to(memory_format=torch.channels_last)
    for given in (x, x.to(memory_format=torch.channels_last)):
        for a, b in zip(step(fast, (given, t, y), gradients), expected, strict=True):
            assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------ tensor subclasses
SUBCLASSED = (
    *("x", "t", "y", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.1.adaLN_modulation.1.weight"),
    "final_layer.linear.bias",
)


@pytest.mark.parametrize("name", SUBCLASSED)
@GRADIENTS
def test_tensors_that_wrap_others_are_computed_with(name: str, gradients: bool) -> None:
    """A ``TwoTensor`` has no memory of its own, and does in-place operations on others twice."""
    _, fast = pair()
    given = dict(zip("xty", inputs(), strict=True))
    with torch.set_grad_enabled(gradients):
        expected = fast(**given)
        if name in given:
            given[name] = TwoTensor(given[name].clone(), given[name].clone())
        else:
            module, _, leaf = name.rpartition(".")
            weight = fast.get_parameter(name)
            both = TwoTensor(weight.detach().clone(), weight.detach().clone())
            setattr(fast.get_submodule(module), leaf, nn.Parameter(both, requires_grad=weight.requires_grad))
        found = fast(**given)
    assert isinstance(found, TwoTensor)
    alike([found.a, found.b], [expected, expected])


@pytest.mark.skipif(not distributed.is_available() or not distributed.is_gloo_available(), reason="needs gloo")
def test_distributed_tensors_are_refused_by_name() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        _, fast = pair()
        given = dict(zip("xty", inputs(), strict=True))
        for name, value in given.items():
            with pytest.raises(TypeError, match=f"{name}: got a DTensor, expected a tensor of this process"):
                fast(**{**given, name: distribute_tensor(value, mesh)})
            if name != "x":
                times_and_labels = {"t": given["t"], "y": given["y"], name: distribute_tensor(value, mesh)}
                with pytest.raises(TypeError, match=f"{name}: got a DTensor, expected a tensor of this process"):
                    fast.modulation_vectors(**times_and_labels)
        fully_shard(fast, mesh=mesh)
        with pytest.raises(TypeError, match="pos_embed: got a DTensor, expected gathered weights"):
            fast.forward(**given)
        fast(**given)
    finally:
        distributed.destroy_process_group()
