"""The fast model against the float64 reference, on torch and on the compiled kernels."""

import copy
import dataclasses
import io
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import DTYPES, ON_CPU, TARGETS, WHERE, Runner, assert_as_good_as, raises_naming, randomize
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper
from torch.nn import functional as F

import ditfast
from ditfast import DiT, DiTConfig, reference
from ditfast.config import CONDITIONINGS
from ditfast.layers import Block

SMALL = DiTConfig(depth=2, hidden_size=64, num_heads=2, patch_size=2, input_size=8, num_classes=5)


def pair(config: DiTConfig, dtype: torch.dtype, device: torch.device | None = None) -> tuple[reference.DiT, DiT]:
    """The reference and the fast model with the same random weights, in one dtype."""
    oracle = randomize(reference.DiT(config)).eval()
    fast = DiT(config).eval()
    fast.load_state_dict(oracle.state_dict(), strict=True)
    return oracle.to(device or "cpu", dtype), fast.to(device or "cpu", dtype)


def inputs(config: DiTConfig, dtype: torch.dtype, B: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(B, *config.input_shape).to(dtype)
    return x, torch.rand(B) * 999, torch.randint(config.label_rows, (B,))


@torch.inference_mode()
def check(config: DiTConfig, dtype: torch.dtype, runner: Runner, B: int = 2) -> None:
    oracle, fast = pair(config, dtype, runner.device)
    x, t, y = (tensor.to(runner.device) for tensor in inputs(config, dtype, B))
    eager, found = oracle(x, t, y), fast(x, t, y)
    assert_as_good_as(found, oracle.double()(x.double(), t, y), eager)


@ON_CPU
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flavour", ["official", "diffusers"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_small(conditioning: str, flavour: str, dtype: str, either: Runner) -> None:
    config = DiTConfig(
        depth=3,
        hidden_size=96,
        num_heads=4,
        patch_size=2,
        input_size=(8, 12),
        num_classes=7,
        conditioning=conditioning,
        flavour=flavour,
    )
    check(config, DTYPES[dtype], either, B=3)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_xl_width(conditioning: str, either: Runner) -> None:
    check(DiTConfig(depth=1, conditioning=conditioning), torch.bfloat16, either, B=1)


@pytest.mark.slow
@ON_CPU
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_xl_width_in_fp32(conditioning: str, either: Runner) -> None:
    check(DiTConfig(depth=1, conditioning=conditioning), torch.float32, either, B=1)


@pytest.mark.parametrize("target", TARGETS)
def test_dit_s2_at_256px_through_the_compiled_kernels(target: str) -> None:
    with Runner.open(target) as runner:
        check(DiTConfig.from_name("DiT-S/2", image_size=256), torch.bfloat16, runner, B=1)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_state_dicts_are_interchangeable(conditioning: str) -> None:
    config = DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, conditioning=conditioning)
    oracle, fast = reference.DiT(config), DiT(config)
    assert {k: v.shape for k, v in oracle.state_dict().items()} == {k: v.shape for k, v in fast.state_dict().items()}
    assert list(dict(oracle.named_parameters())) == list(dict(fast.named_parameters()))
    fast.load_state_dict(oracle.state_dict(), strict=True)
    oracle.load_state_dict(fast.state_dict(), strict=True)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_same_initialisation(conditioning: str) -> None:
    config = DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=(8, 4), conditioning=conditioning)
    models = []
    for kind in (reference.DiT, DiT):
        torch.manual_seed(3)
        models.append(kind(config).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(models[0].values(), models[1].values(), strict=True))


def test_guidance(either: Runner) -> None:
    oracle, fast = pair(SMALL, torch.float32, either.device)
    x, t, y = (tensor.to(either.device) for tensor in inputs(SMALL, torch.float32, B=4))
    y = torch.cat([y[:2] % 5, torch.full((2,), SMALL.null_class, device=y.device)])
    with torch.no_grad():
        for channels in (None, 0, 2, 4):
            found = fast.forward_with_cfg(x, t, y, 4.0, channels)
            exact = oracle.double().forward_with_cfg(x.double(), t, y, 4.0, channels)
            assert_as_good_as(found, exact, oracle.float().forward_with_cfg(x, t, y, 4.0, channels))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_autocast(conditioning: str, either: Runner) -> None:
    config = DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, conditioning=conditioning)
    oracle, fast = pair(config, torch.float32, either.device)
    x, t, y = (tensor.to(either.device) for tensor in inputs(config, torch.float32))
    for gradients in (False, True):
        with torch.autocast(x.device.type, torch.bfloat16), torch.set_grad_enabled(gradients):
            eager, found = oracle(x, t, y), fast(x, t, y)
        exact = copy.deepcopy(oracle).double()(x.double(), t, y)
        assert_as_good_as(found, exact, eager)


@pytest.mark.skipif(WHERE != "simulator", reason="counts launches on the simulator")
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_one_kernel_between_any_two_sublayers(conditioning: str) -> None:
    import ptxsim

    config = DiTConfig(depth=3, hidden_size=64, num_heads=2, input_size=8, conditioning=conditioning)
    _, fast = pair(config, torch.bfloat16)
    with Runner.open("sm_80"), ptxsim.record() as launches, torch.no_grad():
        fast(*inputs(config, torch.bfloat16))
    sublayers = 3 * (3 if conditioning == "cross_attention" else 2)
    assert {name: stats.launches for name, stats in launches.items()} == {
        "timestep_embedding_kernel": 1,
        **({"grouped_linear_kernel": 1} if config.modulation_vectors else {}),
        "patch_embed_kernel": 1,
        "layer_norm_modulate_kernel": 1,
        "gated_residual_layer_norm_modulate_kernel": sublayers,
        "linear_kernel": 18 if conditioning == "cross_attention" else 9,
        "attention_kernel": 6 if conditioning == "cross_attention" else 3,
        "linear_gelu_kernel": 3,
        "linear_unpatchify_kernel": 1,
    }


def test_guidance_calls_the_model_as_users_wrapped_it() -> None:
    _, fast = pair(SMALL, torch.float32)
    calls = []
    fast.register_forward_hook(lambda *_: calls.append(1))  # as model.compile() is, skipped by a bare self.forward
    fast.forward_with_cfg(*inputs(SMALL, torch.float32, B=4), 2.0)
    assert calls == [1]


def test_gradients_agree_with_the_reference() -> None:
    oracle, fast = pair(SMALL, torch.float32)
    x, t, y = inputs(SMALL, torch.float32)
    weight = torch.randn(2, 8, 8, 8)
    (fast(x, t, y) * weight).sum().backward()
    (oracle.double()(x.double(), t, y) * weight).sum().backward()
    exact = {name: p.grad for name, p in oracle.named_parameters() if p.requires_grad}
    assert {name for name, p in fast.named_parameters() if p.grad is not None} == set(exact)
    for name, parameter in fast.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad.double(), exact[name], rtol=1e-3, atol=1e-5)


def test_labels_are_dropped_in_training_only() -> None:
    torch.manual_seed(0)
    embedder = DiT(SMALL).y_embedder
    y = torch.full((2000,), 2)
    table = embedder.embedding_table.weight
    assert torch.equal(embedder.eval()(y), table[y])
    dropped = (embedder.train()(y) == table[SMALL.null_class]).all(1).float().mean()
    assert 0.07 < dropped < 0.13


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "to_bf16_and_back", "safetensors"])
def test_copies_compute_the_same_and_stay_independent(copied: str, tmp_path) -> None:
    _, fast = pair(SMALL, torch.float32)
    if copied == "to_bf16_and_back":
        fast.bfloat16().float()
    x, t, y = inputs(SMALL, torch.float32)
    with torch.no_grad():
        before = fast(x, t, y)
        if copied == "pickle":
            buffer = io.BytesIO()
            torch.save(fast, buffer)
            twin = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        elif copied == "safetensors":
            save_file(fast.state_dict(), tmp_path / "model.safetensors")
            twin = DiT(SMALL).eval()
            twin.load_state_dict(load_file(tmp_path / "model.safetensors"), assign=True)
        else:
            twin = copy.deepcopy(fast)
        torch.testing.assert_close(twin(x, t, y), before)
        randomize(fast)
        torch.testing.assert_close(twin(x, t, y), before)
        assert not torch.allclose(fast(x, t, y), before)


@ON_CPU
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_compiles_without_graph_breaks(conditioning: str, either: Runner) -> None:
    config = DiTConfig(depth=2, hidden_size=64, num_heads=2, input_size=8, conditioning=conditioning)
    _, fast = pair(config, torch.float32, either.device)
    x, t, y = (tensor.to(either.device) for tensor in inputs(config, torch.float32))
    torch._dynamo.reset()
    graph = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(graph(x, t, y), fast(x, t, y), rtol=1e-4, atol=1e-5)


class Doubled(nn.Linear):
    """As adapters do: a Linear with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_replaced_linears_are_called() -> None:
    _, fast = pair(SMALL, torch.float32)
    x, t, y = inputs(SMALL, torch.float32)
    with torch.no_grad():
        before = fast(x, t, y)
        calls = []
        handle = fast.final_layer.adaLN_modulation[1].register_forward_hook(lambda *_: calls.append(1))
        torch.testing.assert_close(fast(x, t, y), before)
        handle.remove()
        assert calls == [1]
        handle = fast.final_layer.linear.register_forward_hook(lambda *_: calls.append(2))
        torch.testing.assert_close(fast(x, t, y), before)
        handle.remove()
        assert calls == [1, 2]
        output = fast.final_layer.linear
        fast.final_layer.linear = Doubled(64, 32)
        fast.final_layer.linear.load_state_dict(output.state_dict())
        torch.testing.assert_close(fast(x, t, y), 2 * before)
        fast.final_layer.linear = output
        adapted = Doubled(64, 384)
        adapted.load_state_dict(fast.blocks[0].adaLN_modulation[1].state_dict())
        fast.blocks[0].adaLN_modulation[1] = adapted
        assert not torch.allclose(fast(x, t, y), before)


class Halves(nn.Module):
    """Before a class of blocks: as patches that merge tokens give a block another class."""

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return super().forward(x[:, :-1] / 2, *others)


class Wrapped(nn.Module):
    """Somebody's module around a block."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *given: Tensor) -> Tensor:
        return self.block(*given)


@pytest.mark.parametrize("gradients", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_replaced_blocks_are_called(conditioning: str, gradients: bool) -> None:
    config = dataclasses.replace(SMALL, conditioning=conditioning)
    given = inputs(config, torch.float32)
    found = []
    for model in pair(config, torch.float32):
        model.blocks[0] = Wrapped(model.blocks[0])
        model.blocks[1].__class__ = type("Halved", (Halves, type(model.blocks[1])), {})
        model.blocks.append(Doubled(64, 64))
        model.blocks[-1].load_state_dict(model.blocks[1].attn.proj.state_dict())
        model.blocks[-1].register_forward_pre_hook(lambda module, given: (F.pad(given[0], (0, 0, 0, 1)),))
        with torch.set_grad_enabled(gradients):
            found.append(model(*given))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


PROJECTIONS = (
    "x_embedder.proj",
    "blocks.0.attn.qkv",
    "blocks.0.attn.proj",
    "blocks.0.cross_attn.q",
    "blocks.0.cross_attn.kv",
    "blocks.0.cross_attn.proj",
    "blocks.0.mlp.fc1",
    "blocks.0.mlp.fc2",
    "final_layer.linear",
)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_hooked_wrapped_and_biasless_layers_are_called(name: str) -> None:
    config = dataclasses.replace(SMALL, conditioning="cross_attention")
    oracle, fast = pair(config, torch.float32)
    given = inputs(config, torch.float32)
    layer = fast.get_submodule(name)
    before = fast(*given)
    calls = []
    for register in (layer.register_forward_hook, layer.register_forward_pre_hook, layer.register_full_backward_hook):
        handle = register(lambda *_: calls.append(1))
        after = fast(*given)
        torch.testing.assert_close(after, before)
        after.sum().backward()
        assert calls.pop() == 1
        handle.remove()
    plain = layer.forward
    layer.forward = lambda x: (calls.append(1), plain(x))[1]  # as offloading does it, on the instance
    torch.testing.assert_close(fast(*given), before)
    assert calls == [1]
    del layer.forward
    layer.bias = oracle.get_submodule(name).bias = None
    torch.testing.assert_close(fast(*given), oracle(*given), rtol=1e-4, atol=1e-4)


@ON_CPU
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_blocks_can_be_checkpointed(conditioning: str, either: Runner) -> None:
    config = dataclasses.replace(SMALL, conditioning=conditioning)
    _, fast = pair(config, torch.float32, either.device)
    given = [tensor.to(either.device) for tensor in inputs(config, torch.float32)]
    upstream = torch.randn(2, 8, 8, 8, device=either.device)
    trained = [parameter for parameter in fast.parameters() if parameter.requires_grad]

    def step() -> tuple[list[Tensor], int]:
        kept = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = fast(*given)
        return list(torch.autograd.grad(out, trained, upstream)), kept

    for block in fast.blocks:
        block.register_forward_hook(lambda *_: None)  # called, as wrapped ones are
    expected, plain = step()
    apply_activation_checkpointing(
        fast,
        checkpoint_wrapper_fn=partial(checkpoint_wrapper, context_fn=ditfast.checkpoint_contexts),
        check_fn=lambda module: isinstance(module, Block),
    )
    found, checkpointed = step()
    assert checkpointed < 0.7 * plain
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_guidance_needs_a_null_class() -> None:
    model = DiT(dataclasses.replace(SMALL, class_dropout_prob=0.0))
    assert "no null class" in raises_naming(
        "class_dropout_prob", lambda: model.forward_with_cfg(*inputs(SMALL, torch.float32), 2.0)
    )


@ON_CPU
def test_empty_batch(either: Runner) -> None:
    model = DiT(SMALL).eval().to(either.device)
    x, t, y = (tensor.to(either.device)[:0] for tensor in inputs(SMALL, torch.float32))
    with torch.no_grad():
        assert model(x, t, y).shape == (0, 8, 8, 8)


def test_errors_name_the_argument() -> None:
    model = DiT(SMALL)
    x, t, y = inputs(SMALL, torch.float32)
    assert "[B, 4, 8, 8]" in raises_naming("x", lambda: model(x[:, :3], t, y))
    assert "torch.float32" in raises_naming("x", lambda: model(x.half(), t, y))
    assert "[2]" in raises_naming("t", lambda: model(x, torch.rand(3), y))
    assert "[2]" in raises_naming("t", lambda: model(x, t[None], y))
    assert "[2]" in raises_naming("y", lambda: model(x, t, y[None]))
    assert "integer labels" in raises_naming("y", lambda: model(x, t, y.float()))
    assert "int64 or int32" in raises_naming("y", lambda: model(x, t, y.byte()))
    assert "0..5" in raises_naming("y", lambda: model(x, t, y + 6))
    assert "0..5" in raises_naming("y", lambda: model(x, t, y - 6))
    assert "even" in raises_naming("x", lambda: model.forward_with_cfg(x[:1], t[:1], y[:1], 2.0))
    assert "0..4" in raises_naming("guidance_channels", lambda: model.forward_with_cfg(x, t, y, 2.0, 5))
    assert "float64" in raises_naming("x", lambda: DiT(SMALL).double()(x.double(), t, y))


def test_public_names() -> None:
    for name in ("DiT", "DiTConfig", "ops", "reference", "flops", "backend", "diffusion", "load_digits"):
        assert hasattr(ditfast, name)
