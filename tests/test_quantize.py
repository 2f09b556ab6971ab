"""``DiT.quantize``: what it prints, what it leaves alone, and how far int8 is from fp32."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable

import pytest
import torch
from cpu_chains import called_at_once
from support import error, raises_naming, randomize
from torch import Tensor, nn

import ditfast
from ditfast import DiT, DiTConfig, cpu
from ditfast.config import CONDITIONINGS
from ditfast.diffusion import GaussianDiffusion, steps
from ditfast.layers import adaln_vectors
from ditfast.sampling import sample

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(cpu.found()[0] is None, reason="needs the CPU engine"),
]
SMALL = {"depth": 2, "hidden_size": 100, "num_heads": 5, "input_size": (8, 12), "num_classes": 10}
LINE = re.compile(
    r"int8: (?P<gain>[\d.]+) times as fast as (?P<plain>fp32|bf16) \((?P<ms>[\d.e+-]+) ms a forward, "
    r"(fp32|bf16) (?P<plain_ms>[\d.e+-]+) ms\), relative error (?P<error>[\d.e-]+)\n"
)
LOWEST, HIGHEST = 1e-5, 1e-2  # of these models' errors in int8


@pytest.fixture(autouse=True)
def _measured_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ditfast.cpu.int8.LEAST_SECONDS", 0)


def new_model(**settings: object) -> DiT:
    return randomize(DiT(DiTConfig(**{**SMALL, **settings}))).eval()


def vectors_of(model: DiT, c: Tensor, int8: bool = False) -> list[Tensor]:
    return adaln_vectors([*model.blocks, model.final_layer], c, int8)


def inputs(model: DiT, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, *model.config.input_shape).to(model.pos_embed.dtype)
    return x, torch.rand(batch) * 999, torch.randint(model.config.num_classes, (batch,))


# ------------------------------------------------------------------------------------------------ what it says and does
@torch.no_grad()
def test_prints_returns_and_undoes(capsys: pytest.CaptureFixture[str]) -> None:
    model, twin = new_model(), new_model()
    twin.load_state_dict(model.state_dict())
    given, state = inputs(model), copy.deepcopy(model.state_dict())
    plain = model(*given)
    assert model.quantize() is model
    printed = LINE.fullmatch(capsys.readouterr().out)
    assert printed is not None
    assert printed["plain"] == "fp32"
    assert float(printed["gain"]) == pytest.approx(float(printed["plain_ms"]) / float(printed["ms"]), abs=0.01)
    assert LOWEST < float(printed["error"]) < HIGHEST
    found = model(*given)
    assert LOWEST < error(found, plain) < HIGHEST
    assert torch.equal(twin(*given), plain)
    assert model.quantize("int8")(*given).equal(found)
    capsys.readouterr()
    assert model.quantize(None) is model
    assert torch.equal(model(*given), plain)
    assert not capsys.readouterr().out
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@torch.no_grad()
def test_every_design(conditioning: str, dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    model = new_model(conditioning=conditioning).to(dtype)
    given = inputs(model)
    plain = model(*given)
    found = model.quantize()(*given)
    assert f"as fast as {'fp32' if dtype == torch.float32 else 'bf16'}" in capsys.readouterr().out
    assert LOWEST < error(found, plain) < HIGHEST


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model()
    assert "expected 'int8' or None" in raises_naming("dtype", lambda: model.quantize("int4"))
    assert "torch.float16 on cpu" in raises_naming("dtype", lambda: copy.deepcopy(model).half().quantize())
    assert "torch.float32 on meta" in raises_naming("dtype", lambda: copy.deepcopy(model).to("meta").quantize())
    with ditfast.backend("torch"):
        assert "forced" in raises_naming("dtype", model.quantize)
    handle = model.blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
    assert "block 1, or a linear in it" in raises_naming("dtype", model.quantize)
    handle.remove()
    monkeypatch.setattr("ditfast.cpu.engine.found", lambda: (None, "the CPU engine needs a compiler"))
    assert raises_naming("dtype", model.quantize) == "dtype: got int8, but the CPU engine needs a compiler"
    assert not model.int8


def test_an_error_while_it_is_measured_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = new_model().train()
    model.y_embedder.eval()
    monkeypatch.setattr(DiT, "forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model.quantize()
    assert (model.int8, model.training, model.y_embedder.training) == (False, True, False)


def test_neither_hooks_nor_modes_nor_randomness_change(capsys: pytest.CaptureFixture[str]) -> None:
    model, seen = new_model().train(), []
    model.blocks[0].eval()
    model.register_forward_hook(lambda *_: seen.append(1))
    generator = torch.get_rng_state()
    with torch.device("meta"):
        model.quantize()
    assert LINE.fullmatch(capsys.readouterr().out)
    assert torch.equal(torch.get_rng_state(), generator)
    assert (seen, model.training, model.blocks[0].training, model.blocks[1].training) == ([], True, False, True)


def test_an_untrained_model_prints_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    DiT(DiTConfig(**SMALL)).quantize()
    assert capsys.readouterr().out.endswith("ms), no error to tell: the output is zero\n")


# ------------------------------------------------------------------------------------------------ training
def test_training_has_the_same_bits() -> None:
    model = new_model().train()
    given = inputs(model)

    def found() -> list[Tensor]:
        torch.manual_seed(3)  # of label dropout
        model.zero_grad()
        loss = model(*given).square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    plain = found()
    model.quantize()
    assert all(map(torch.equal, found(), plain))
    assert len(plain) > 20


# ------------------------------------------------------------------------------------------------ weights that change
def load_others(model: DiT) -> None:
    model.load_state_dict(new_model().state_dict())


def add_in_place(model: DiT) -> None:
    for parameter in model.blocks.parameters():
        parameter.add_(0.05)


def write_through_data(model: DiT) -> None:
    for parameter in model.blocks.parameters():
        parameter.data.mul_(1.5)


@pytest.mark.parametrize("change", [load_others, add_in_place, write_through_data], ids=lambda f: f.__name__)
@torch.no_grad()
def test_weights_are_never_stale(change: Callable[[DiT], None]) -> None:
    model = new_model().quantize()
    given = inputs(model)
    before = model(*given)
    change(model)
    found = model(*given)
    assert error(found, before) > 2 * HIGHEST
    assert LOWEST < error(found, model.quantize(None)(*given)) < HIGHEST


@torch.no_grad()
def test_packed_weights_go_with_int8() -> None:
    chosen, _ = cpu.found()
    assert chosen is not None
    model = new_model()
    before = len(chosen._chains._chains)
    model.quantize()
    assert len(chosen._chains._chains) == before + 2  # the blocks' and the conditioning's
    model.quantize(None)
    assert len(chosen._chains._chains) == before


@torch.no_grad()
def test_the_conditioning() -> None:
    """Its weights are rounded, where no table of its vectors was made beforehand; never for gradients."""
    model = new_model().quantize()
    x, t, y = inputs(model)
    exact = vectors_of(model, model.t_embedder(t) + model.y_embedder(y))
    rounded = vectors_of(model, model.t_embedder(t) + model.y_embedder(y), model.int8)
    assert all(1e-3 < error(*both) < 2e-2 for both in zip(rounded, exact, strict=True))
    assert torch.equal(model.modulation_vectors(t, y), torch.cat(list(exact), dim=1))
    tabulated = model.forward_modulated(x, model.modulation_vectors(t, y))
    assert 0 < error(tabulated, model(x, t, y)) < HIGHEST
    with torch.enable_grad():
        c = model.t_embedder(t).requires_grad_()
        assert all(map(torch.equal, vectors_of(model, c, int8=True), vectors_of(model, c)))


@torch.no_grad()
def test_a_sample_is_rounded_alike_in_any_batch() -> None:
    model = new_model().quantize()
    given = inputs(model, 40)
    alone = [model(*(part[i : i + 1] for part in given)) for i in (0, 39)]
    assert (
        error(torch.cat(alone), model(*given)[[0, 39]]) < 1e-6
    )  # torch embeds and projects patches, which may round otherwise


@torch.no_grad()
def test_a_model_moved_to_fp16_is_in_fp16() -> None:
    model = new_model()
    twin = copy.deepcopy(model).half()
    model.quantize().half()
    given = inputs(model)
    assert torch.equal(model(*given), twin(*given))
    assert LOWEST < error(model.float()(given[0].float(), *given[1:]), twin.float()(given[0].float(), *given[1:])) < HIGHEST


# ------------------------------------------------------------------------------------------------ copies, paths, threads
def unpickled(model: DiT) -> DiT:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("twin_of", [copy.deepcopy, unpickled], ids=lambda f: f.__name__)
@torch.no_grad()
def test_copies_are_in_int8(twin_of: Callable[[DiT], DiT]) -> None:
    model = new_model().quantize()
    given = inputs(model)
    found = model(*given)
    twin = twin_of(model)
    assert torch.equal(twin(*given), found)
    twin.quantize(None)
    assert not torch.equal(twin(*given), found)
    assert torch.equal(model(*given), found)


@torch.no_grad()
def test_batch_and_threads_do_not_change_the_bits() -> None:
    model = new_model().quantize()
    x, t, y = inputs(model, 7)
    vectors = model.modulation_vectors(t, y)
    expected = model.forward_modulated(x, vectors)
    for count in (2, 5):
        torch.set_num_threads(count)
        assert torch.equal(model.forward_modulated(x, vectors), expected)
    torch.set_num_threads(1)
    for size in (1, 3):
        parts = [model.forward_modulated(*both) for both in zip(x.split(size), vectors.split(size), strict=True)]
        assert error(torch.cat(parts), expected) < 1e-6  # torch embeds and projects patches, which may round otherwise


def test_two_threads_at_once() -> None:
    models = [new_model().quantize(), new_model()]
    given = inputs(models[0])
    with torch.inference_mode():
        expected = [model(*given) for model in models]
    for each, one in zip(called_at_once(models, given), expected, strict=True):
        assert all(torch.equal(out, one) for out in each)


# ------------------------------------------------------------------------------------------------ the digits
def test_the_digits(capsys: pytest.CaptureFixture[str]) -> None:
    model = ditfast.load_digits()
    given = inputs(model, 10)
    schedule = steps(GaussianDiffusion("ddim10"), "ddim")
    labels = torch.arange(10)
    with torch.inference_mode():
        plain = model(*given)
    drawn = sample(model, schedule, labels, cfg_scale=2.0, clip=True)
    model.quantize()
    printed = LINE.fullmatch(capsys.readouterr().out)
    assert printed is not None
    assert float(printed["error"]) < 2e-2
    with torch.inference_mode():
        assert 1e-4 < error(model(*given), plain) < 2e-2
    found = sample(model, schedule, labels, cfg_scale=2.0, clip=True)
    assert 1e-4 < error(found, drawn) < 0.1
    assert torch.equal(sample(model, schedule, labels, cfg_scale=2.0, clip=True), found)


class Adapted(nn.Linear):
    """As LoRA libraries have them: an own forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


@torch.no_grad()
def test_a_layer_replaced_later_is_called() -> None:
    model = new_model().quantize()
    given = inputs(model)
    before = model(*given)
    model.blocks[1].attn.proj.__class__ = Adapted
    found = model(*given)
    with ditfast.backend("torch"):
        assert error(found, model(*given)) < HIGHEST  # the conditioning's weights are still rounded
    assert error(found, before) > 2 * HIGHEST
