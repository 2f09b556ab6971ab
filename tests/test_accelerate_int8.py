"""Somebody else's models in int8 on the CPU engine: what is printed, what is refused, and what stays as it was."""

from __future__ import annotations

import re

import pytest
import timm_style
import torch
from foreign import DITS, KINDS, gradients, joined, official, official_inputs, run
from support import error, raises_naming, randomize
from test_accelerate import swap_of
from test_accelerate_copies import TWINS
from torch import nn

import ditfast
from ditfast import cpu

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(cpu.found()[0] is None, reason="needs the CPU engine"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]
LINE = re.compile(
    r"(?P<name>[\w.]+: )?int8: [\d.]+ times as fast as (fp32|bf16) \([\d.e+-]+ ms a forward, (fp32|bf16) [\d.e+-]+ ms\), "
    r"relative error (?P<error>[\d.e-]+)\n"
)
CHAINS = ("official", "REPA", "diffusers")
SEPARATE = ("PixArt", "SD3")  # whose linears are called one by one
LOWEST, HIGHEST = 3e-5, 3e-3  # of these models' errors in int8


@pytest.mark.parametrize("name", CHAINS)
@torch.no_grad()
def test_int8_and_back(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = KINDS[name].build(), KINDS[name].example(torch.float32)
    own = run(model, inputs)[0]
    plain = run(ditfast.accelerate(model), inputs)[0]
    assert not capsys.readouterr().out
    with ditfast.accelerated(model, dtype="int8"):
        printed = LINE.fullmatch(capsys.readouterr().out)
        found = run(model, inputs)[0]
        assert torch.equal(run(model, inputs)[0], found)
        rows = [row for row in ditfast.acceleration_report(model).rows if "blocks" in row.module]
        assert all(row.engine.endswith("; without gradients the CPU engine in int8") for row in rows)
    assert printed is not None
    assert (printed["name"] == "blocks.0: ") == (name == "REPA")
    assert LOWEST < error(found, own) < HIGHEST
    assert LOWEST < float(printed["error"]) < HIGHEST
    assert torch.equal(run(model, inputs)[0], plain)
    assert torch.equal(run(ditfast.accelerate(model, dtype="int8"), inputs)[0], found)
    assert torch.equal(run(ditfast.accelerate(model), inputs)[0], plain)
    assert torch.equal(run(ditfast.restore(model), inputs)[0], own)


@torch.no_grad()
def test_bf16_weights(capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = official().to(torch.bfloat16), official_inputs(torch.bfloat16)
    own = run(model, inputs)[0]
    found = run(ditfast.accelerate(model, dtype="int8"), inputs)[0]
    assert "times as fast as bf16" in capsys.readouterr().out
    assert error(found, own) < 1e-2


@pytest.mark.parametrize("name", ["official", "fast-DiT", "fast-DiT, reentrant", "diffusers"])
def test_training_has_the_same_bits(name: str) -> None:
    model, inputs = KINDS[name].build().train(), KINDS[name].example(torch.float32)
    upstream = [torch.randn_like(tensor) for tensor in run(model, inputs)]

    def found() -> list[torch.Tensor]:
        return [*run(model, inputs), joined(gradients(model, inputs, upstream))]

    own, plain = found(), None
    for dtype in (None, "int8"):
        ditfast.accelerate(model, dtype=dtype)
        loss, gradient = found()
        if dtype is None or name == "fast-DiT, reentrant":  # of which, in int8, the own code runs
            assert error(loss, own[0]) <= 1e-5
            assert error(gradient, own[1]) <= 1e-5
            plain = [loss, gradient]
        else:
            assert plain is not None
            assert torch.equal(loss, plain[0])
            assert torch.equal(gradient, plain[1])


@pytest.mark.parametrize("twin_of", TWINS)
@pytest.mark.parametrize("kind", DITS)
@torch.no_grad()
def test_copies_are_in_int8(kind: str, twin_of: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, inputs = KINDS[kind].build(), KINDS[kind].example(torch.float32)
    before = run(ditfast.accelerate(model, dtype="int8"), inputs)[0]
    capsys.readouterr()
    twin = TWINS[twin_of](model)
    assert torch.equal(run(twin, inputs)[0], before)
    assert ditfast.acceleration_report(twin).rows == ditfast.acceleration_report(model).rows
    assert not capsys.readouterr().out
    ditfast.accelerate(twin)
    assert LOWEST < error(run(twin, inputs)[0], before) < HIGHEST
    assert torch.equal(run(model, inputs)[0], before)


@torch.no_grad()
def test_weights_may_change() -> None:
    model, inputs = ditfast.accelerate(official(), dtype="int8"), official_inputs()
    before = run(model, inputs)[0]
    torch.manual_seed(1)
    randomize(model)
    found = run(model, inputs)[0]
    assert error(found, before) > 0.1
    assert LOWEST < error(found, run(ditfast.restore(model), inputs)[0]) < HIGHEST


@torch.no_grad()
def test_a_part_with_another_dtype_is_no_part_of_the_chain() -> None:
    model, inputs = official(), official_inputs()
    exact = run(model, inputs)[0]
    errors = []
    for parts in ([model.blocks[0]], [model.blocks[1]], [*model.blocks], [model]):
        ditfast.accelerate(model)
        for part in parts:
            ditfast.accelerate(part, dtype="int8")
        errors.append(error(run(model, inputs)[0], exact))
    assert all(LOWEST < found < HIGHEST for found in errors)
    assert len(set(errors)) == 4  # the model has the final layer's conditioning too


@torch.no_grad()
def test_cached_modulation_is_that_of_its_backend() -> None:
    """In int8 its weights are rounded, on another backend they are not."""
    model, inputs = official(), official_inputs()
    with ditfast.backend("torch"):
        exact = run(ditfast.accelerate(model), inputs)[0]
    ditfast.accelerate(model, dtype="int8", cache_modulation=True)
    assert LOWEST < error(run(model, inputs)[0], exact) < HIGHEST
    with ditfast.backend("torch"):
        assert torch.equal(run(model, inputs)[0], exact)


class Adapted(nn.Linear):
    """As LoRA libraries have them: an own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)


@torch.no_grad()
def test_a_block_whose_linear_wants_to_be_called_is_left() -> None:
    model, inputs = official(), official_inputs()
    exact = run(model, inputs)[0]
    model.blocks[1].mlp.fc1.__class__ = Adapted
    ditfast.accelerate(model, dtype="int8")
    rows = {row.module: row for row in ditfast.acceleration_report(model).rows}
    assert rows["blocks.1"].reason.startswith("its linears are called one by one")
    assert rows["blocks.2"].engine.endswith("in int8")
    assert LOWEST < error(run(model, inputs)[0], exact) < HIGHEST
    model.blocks[2].mlp.fc1.__class__ = Adapted
    rows = {row.module: row for row in ditfast.acceleration_report(model).rows}
    assert "CPU engine" not in rows["blocks.2"].engine


@torch.no_grad()
def test_an_untrained_model_prints_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    ditfast.accelerate(timm_style.DiT().eval(), dtype="int8")
    assert capsys.readouterr().out.endswith("ms), no error to tell: the output is zero\n")


def test_neither_hooks_nor_grad_mode_nor_training_mode_change(capsys: pytest.CaptureFixture[str]) -> None:
    model, seen = official().train(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    ditfast.accelerate(model, dtype="int8")
    assert LINE.fullmatch(capsys.readouterr().out)
    assert (seen, model.training, model.blocks[0].training) == ([], True, True)
    assert model(**official_inputs()).requires_grad


@pytest.mark.parametrize("name", SEPARATE)
def test_families_without_int8(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = KINDS[name].build()
    assert "called one by one" in raises_naming("model_or_pipeline", lambda: ditfast.accelerate(model, dtype="int8"))
    ditfast.accelerate(model, dtype="int8", strict=False)
    assert not any(row.swapped for row in ditfast.acceleration_report(model).rows)
    assert not capsys.readouterr().out


class Pipeline:
    def __init__(self, **components: object):
        self.components = components


def test_a_pipeline_names_its_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Of which another part may well be in fp16."""
    pipeline = Pipeline(transformer=official(), vae=nn.Linear(3, 3).half(), scheduler="ddim")
    ditfast.accelerate(pipeline, dtype="int8")
    printed = LINE.fullmatch(capsys.readouterr().out)
    assert printed is not None
    assert printed["name"] == "transformer: "


def test_a_half_in_fp16_is_left() -> None:
    pipeline = Pipeline(transformer=official(), other=official().half())
    ditfast.accelerate(pipeline, dtype="int8")
    rows = {row.module: row for row in ditfast.acceleration_report(pipeline).rows}
    assert rows["transformer.blocks.1"].swapped
    assert rows["other.blocks.1"].reason.endswith("not for weights of torch.float16 on cpu")


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, own = official(), ditfast.DiT(ditfast.DiTConfig(depth=1, hidden_size=64, num_heads=2, input_size=8))

    def refused(argument: str, *models: object, **options: str) -> str:
        (one,) = models
        return raises_naming(argument, lambda: ditfast.accelerate(one, **{"dtype": "int8", **options}))

    assert "quantize" in refused("model_or_pipeline", own)
    assert "expected 'auto' with int8" in refused("attention", model, attention="sdpa")
    assert "'int8'" in refused("dtype", model, dtype="int4")
    assert "float16 on cpu" in refused("model_or_pipeline", official().half())
    assert "meta device" in refused("model_or_pipeline", official().to("meta"))
    with ditfast.backend("torch"):
        assert "forced" in refused("dtype", model)
    monkeypatch.setattr("ditfast.cpu.engine.found", lambda: (None, "the CPU engine needs a compiler"))
    assert refused("dtype", model) == "dtype: got int8, but the CPU engine needs a compiler"
    assert swap_of(model) is None


def test_an_error_while_it_is_measured_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ditfast.accelerate(official(), dtype=torch.bfloat16)
    swaps = [swap_of(module) for module in model.modules()]

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cpu, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        ditfast.accelerate(model, dtype="int8")
    assert [swap_of(module) for module in model.modules()] == swaps
