"""Somebody else's live models, accelerated: the same numbers, an honest report, and everything back."""

from __future__ import annotations

import pytest
import timm_style
import torch
from foreign import (
    DITS,
    KINDS,
    assert_same_gradients,
    assert_same_outputs,
    diffusers_dit,
    gradients,
    in_dtype,
    in_float64,
    names_of,
    official,
    official_inputs,
    run,
    state_of,
)
from support import DTYPES, error, raises_naming, randomize
from torch import Tensor, nn

import ditfast
from ditfast import cpu
from ditfast.homes import Swap

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]
ENGINE = "torch, attention sdpa" + ("" if cpu.found()[0] is None else "; without gradients the CPU engine")
WHOLE = {name: not name.startswith(("REPA", "PixArt", "SD3")) for name in KINDS}  # the model's forward is swapped as well


def swap_of(module: nn.Module) -> Swap | None:
    return vars(module).get("forward")


def drop_half_of_the_labels(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.5
    return model


# ------------------------------------------------------------------------------------------------ parity
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", KINDS)
def test_outputs(name: str, dtype: str) -> None:
    model, inputs = drop_half_of_the_labels(KINDS[name].build()).to(DTYPES[dtype]), KINDS[name].example(DTYPES[dtype])
    oracle = in_float64(model)
    for training in (False, True):
        with torch.no_grad():
            eager = run(model.train(training), inputs)
            exact = run(oracle.train(training), in_dtype(inputs, torch.float64))
            with ditfast.accelerated(model):
                rows = {row.module: row for row in ditfast.acceleration_report(model).rows}
                assert [row.module for row in rows.values() if not row.swapped] == (["(model)"] if name == "REPA" else [])
                assert name != "REPA" or "returns a tuple" in rows["(model)"].reason
                assert (swap_of(model) is not None) == WHOLE[name]
                assert_same_outputs(run(model, inputs), exact, eager)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("official, 2x6", "diffusers, eps 1e-6")])
def test_gradients(name: str, dtype: str, training: bool) -> None:
    model = drop_half_of_the_labels(KINDS[name].build()).train(training).to(DTYPES[dtype])
    oracle, inputs = in_float64(model), KINDS[name].example(DTYPES[dtype])
    before = run(model, inputs)
    upstream = [torch.randn(tensor.shape).to(tensor.dtype) for tensor in before]
    eager = gradients(model, inputs, upstream)
    exact = gradients(oracle, in_dtype(inputs, torch.float64), [gradient.double() for gradient in upstream])
    ditfast.accelerate(model)
    assert_same_outputs(run(model, inputs), run(oracle, in_dtype(inputs, torch.float64)), before)
    assert_same_gradients(gradients(model, inputs, upstream), exact, eager)


@pytest.mark.parametrize("name", DITS)
def test_freshly_initialised(name: str) -> None:
    """Gates and output at zero hide everything, from the probe as well unless it looks behind them."""
    if name == "official":
        model = timm_style.DiT().eval()
    else:
        model = diffusers_dit()
        for linear in (model.proj_out_1, model.proj_out_2, *(block.norm1.linear for block in model.transformer_blocks)):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    inputs = KINDS[name].example(torch.float32)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    ditfast.accelerate(model)
    with torch.no_grad():
        assert all(not tensor.any() for tensor in run(model, inputs))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    trained = randomize(model)
    with torch.no_grad():
        found = run(trained, inputs)
        ditfast.restore(model)
        assert error(found[0], run(model, inputs)[0]) <= 1e-5


class Reversed(timm_style.Block):
    """Looks like a DiT's block, and with zero gates computes the same; but scales where the paper shifts."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale1, shift1, gate1, scale2, shift2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(timm_style.modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(timm_style.modulate(self.norm2(x), shift2, scale2))


def test_the_probe_looks_behind_gates_of_zero() -> None:
    model = timm_style.DiT().eval()
    model.blocks[1] = Reversed(64, 4)
    for parameter in model.blocks[1].adaLN_modulation.parameters():
        nn.init.zeros_(parameter)
    ditfast.accelerate(model)
    rows = {row.module: row for row in ditfast.acceleration_report(model).rows}
    assert "came out different" in rows["blocks.1"].reason
    assert rows["blocks.0"].swapped
    assert rows["(model)"].swapped
    inputs = official_inputs()
    randomize(model)
    with torch.no_grad():
        found = run(model, inputs)
        assert error(found[0], run(ditfast.restore(model), inputs)[0]) <= 1e-5


def test_forks_between_models_and_blocks() -> None:
    """A block's inputs may be a training script's own; what a swapped forward does not know, the module's own one does."""
    block = official().blocks[0]
    x, c = torch.randn(2, 16, 64), torch.randn(2, 64)
    expected = block(x, c)
    ditfast.accelerate(block)
    assert error(block(x, c=c), expected) <= 1e-5
    assert error(block(x=x, c=c), expected) <= 1e-5
    for wrong in (lambda: block(x), lambda: block(x, c, c), lambda: block(x, c, mask=None)):
        with pytest.raises(TypeError):
            wrong()


# ------------------------------------------------------------------------------------------------ and back
@pytest.mark.parametrize("name", KINDS)
def test_restore_is_bit_exact(name: str) -> None:
    model, inputs = KINDS[name].build(), KINDS[name].example(torch.float32)
    before, state = run(model, inputs), state_of(model)
    assert ditfast.accelerate(model) is model
    accelerated = state_of(model)
    assert {key: value for key, value in accelerated.items() if key != "vars"} == {
        key: value for key, value in state.items() if key != "vars"
    }
    with torch.no_grad():
        run(model, inputs)
    assert ditfast.restore(model) is model
    assert state_of(model) == state
    assert all(map(torch.equal, run(model, inputs), before))
    assert not any(row.swapped for row in ditfast.acceleration_report(model).rows)
    assert state_of(ditfast.restore(model)) == state


def test_accelerating_twice_replaces_the_options() -> None:
    model, inputs = official(), official_inputs()
    with torch.no_grad():
        before = run(model, inputs)
        ditfast.accelerate(model, dtype=torch.bfloat16, attention="native")
        assert 1e-5 < error(run(model, inputs)[0], before[0]) < 3e-2
        ditfast.accelerate(model)
        assert error(run(model, inputs)[0], before[0]) <= 1e-5
        assert all(isinstance(vars(module)["forward"], Swap) for module in (model, *model.blocks))
        assert torch.equal(run(ditfast.restore(model), inputs)[0], before[0])


def test_a_part_restored_or_accelerated_with_other_options() -> None:
    model, inputs = official(), official_inputs()
    with torch.no_grad():
        before = run(model, inputs)[0]
        for options in ({}, {"dtype": torch.bfloat16}):
            bar = 3e-2 if options else 1e-5
            ditfast.accelerate(model, **options)
            ditfast.restore(model.blocks[1])
            assert error(run(model, inputs)[0], before) <= bar
            ditfast.accelerate(model.blocks[1], attention="sdpa")
            assert error(run(model, inputs)[0], before) <= bar
        ditfast.restore(model.blocks)
        assert error(run(model, inputs)[0], before) <= bar
        assert torch.equal(run(ditfast.restore(model), inputs)[0], before)


def test_context_manager() -> None:
    model, inputs = official(), official_inputs()
    state = state_of(model)
    with torch.no_grad():
        before = run(model, inputs)[0]
        with ditfast.accelerated(model) as same:
            assert same is model
            outer = run(model, inputs)[0]
            swaps = [swap_of(module) for module in model.modules()]
            with ditfast.accelerated(model, dtype=torch.bfloat16):
                assert error(run(model, inputs)[0], before) > 1e-4
            assert torch.equal(run(model, inputs)[0], outer)
            assert [swap_of(module) for module in model.modules()] == swaps
            with pytest.raises(KeyError), ditfast.accelerated(model, attention="sdpa"):
                raise KeyError
            assert [swap_of(module) for module in model.modules()] == swaps
        assert torch.equal(run(model, inputs)[0], before)
        with pytest.raises(KeyError), ditfast.accelerated(model):
            raise KeyError
        assert torch.equal(run(model, inputs)[0], before)
    assert state_of(model) == state


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = official()
    state = state_of(model)
    with pytest.raises(ValueError, match=r"^dtype"):
        ditfast.accelerate(model, dtype=torch.float64)
    assert state_of(model) == state
    ditfast.accelerate(model)
    swaps = [swap_of(module) for module in model.modules()]
    for block in model.blocks:
        block.mlp.act = nn.GELU()
    with pytest.raises(ValueError, match="nothing could be swapped"):
        ditfast.accelerate(model)
    assert [swap_of(module) for module in model.modules()] == swaps
    with pytest.raises(ValueError, match="nothing could be swapped"), ditfast.accelerated(model):
        pass
    assert [swap_of(module) for module in model.modules()] == swaps


# ------------------------------------------------------------------------------------------------ what is refused
def test_errors_name_the_argument() -> None:
    model = official()
    assert "float16" in raises_naming("dtype", lambda: ditfast.accelerate(model, dtype=torch.float64))
    assert "bf16" in raises_naming("dtype", lambda: ditfast.accelerate(model, dtype="bf16"))
    assert "native" in raises_naming("attention", lambda: ditfast.accelerate(model, attention="xformers"))
    assert "str" in raises_naming("model_or_pipeline", lambda: ditfast.accelerate("model"))
    assert "str" in raises_naming("model_or_pipeline", lambda: ditfast.restore("model"))
    assert "str" in raises_naming("model_or_pipeline", lambda: ditfast.acceleration_report("model"))
    with pytest.raises(TypeError, match="dtypes"):
        ditfast.accelerated(model, dtypes=None).__enter__()
    assert not any(row.swapped for row in ditfast.acceleration_report(model).rows)


def test_nothing_to_swap() -> None:
    mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
    assert "nothing inside" in raises_naming("model_or_pipeline", lambda: ditfast.accelerate(mlp))
    assert ditfast.accelerate(mlp, strict=False) is mlp
    assert ditfast.acceleration_report(mlp).rows == ()
    assert str(ditfast.acceleration_report(mlp))
    config = ditfast.DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8)
    assert "as it is" in raises_naming("model_or_pipeline", lambda: ditfast.accelerate(ditfast.DiT(config)))
    raises_naming("model_or_pipeline", lambda: ditfast.accelerate(ditfast.reference.DiT(config)))


# ------------------------------------------------------------------------------------------------ the report
def test_report() -> None:
    model = official()
    model.blocks[2].attn.scale = 1.0
    report = ditfast.acceleration_report(model)
    assert names_of(report.rows) == ["(model)", "blocks.0", "blocks.1", "blocks.2"]
    assert {row.reason for row in report.rows} == {"not accelerated"}
    text = str(ditfast.acceleration_report(ditfast.accelerate(model)))
    assert text.splitlines() == [
        "module                         family            engine, or why not",
        "(model)               swapped  official DiT      torch",
        f"blocks.0 .. blocks.1  swapped  adaLN-Zero block  {ENGINE}",
        "blocks.2              left     adaLN-Zero block  attn.scale is 1.0",
    ]
    with ditfast.backend("triton"):
        assert "triton, attention triton" in str(ditfast.acceleration_report(model))
    handle = model.blocks[0].attn.register_forward_hook(lambda *_: None)
    rows = ditfast.acceleration_report(model).rows
    assert "its own forward runs" in rows[1].engine
    assert rows[2].engine == ENGINE
    handle.remove()
    assert ditfast.acceleration_report(model).rows[1].engine == ENGINE
    inside = nn.ModuleDict({"net": model, "other": nn.Linear(2, 2)})
    assert names_of(ditfast.acceleration_report(inside).rows) == ["net", "net.blocks.0", "net.blocks.1", "net.blocks.2"]
    ditfast.accelerate(model, attention="flash")
    assert "flash-attn does not run on cpu" in str(ditfast.acceleration_report(model))


def test_an_engine_that_cannot_run_says_so() -> None:
    model = ditfast.accelerate(official(), attention="flash")
    with pytest.raises(RuntimeError, match="flash-attn does not run on cpu"):
        model(**official_inputs())


def test_guidance_goes_through_the_swapped_forward() -> None:
    model, inputs = official(), official_inputs(B=4)
    with torch.no_grad():
        before = model.forward_with_cfg(**inputs, cfg_scale=4.0)
        ditfast.accelerate(model, dtype=torch.bfloat16)
        assert 1e-5 < error(model.forward_with_cfg(**inputs, cfg_scale=4.0), before) < 5e-2
