"""Tests of what only diffusers has: pipelines, embedders in every block, dict outputs, configs, processors and switches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import KINDS, diffusers_dit, diffusers_inputs, pixart, run, sd3, sd3_inputs
from support import error, raises_naming, randomize
from torch import Tensor, nn

import ditfast

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.usefixtures("one_thread")


def count_embeddings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """On the class: hooks on an embedder would have it called."""
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings

    calls: list[int] = []
    plain = CombinedTimestepLabelEmbeddings.forward
    monkeypatch.setattr(
        CombinedTimestepLabelEmbeddings,
        "forward",
        lambda self, *args, **kwargs: (calls.append(1), plain(self, *args, **kwargs))[1],
    )
    return calls


@pytest.mark.parametrize("agree", [True, False], ids=["agree", "differ"])
def test_timesteps_and_labels_are_embedded_once(agree: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    small = dict(num_attention_heads=2, attention_head_dim=8, num_embeds_ada_norm=4)
    model = diffusers_dit(agree, num_layers=28, **small)
    inputs = {**diffusers_inputs(), "class_labels": torch.tensor([1, 4])}
    calls = count_embeddings(monkeypatch)
    with torch.no_grad():
        before = run(model, inputs)[0]
        assert len(calls) == 29
        ditfast.accelerate(model)
        for mode in (torch.no_grad, torch.inference_mode):
            calls.clear()
            with mode():
                assert error(run(model, inputs)[0], before) <= 1e-5
            assert len(calls) == (1 if agree else 28)
        calls.clear()
        model.transformer_blocks[3].register_forward_hook(lambda *_: None)
        assert error(run(model, inputs)[0], before) <= 1e-5
        assert len(calls) == (2 if agree else 28), "a block that is called embeds for itself"
    calls.clear()
    run(model, inputs)
    assert len(calls) == 29, "with gradients each copy has its own"
    calls.clear()
    with torch.no_grad():
        run(model.train(), inputs)
    assert len(calls) == 29, "in training each copy drops labels of its own"


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("gradients", [True, False])
def test_outputs_are_of_the_same_type(return_dict: bool, gradients: bool) -> None:
    for model, inputs in ((diffusers_dit(), diffusers_inputs()), (sd3(), sd3_inputs())):
        with torch.set_grad_enabled(gradients):
            expected = model(**inputs, return_dict=return_dict)
            found = ditfast.accelerate(model)(**inputs, return_dict=return_dict)
        assert type(found) is type(expected)
        assert error(found[0], expected[0]) <= 1e-5
        if return_dict:
            assert found.sample is found[0]
            assert list(found) == list(expected)


def test_positional_arguments() -> None:
    model, inputs = diffusers_dit(), diffusers_inputs()
    x, t, y = inputs.values()
    with torch.no_grad():
        expected = model(x, t, y, None, False)[0]
        ditfast.accelerate(model)
        assert error(model(x, t, y, None, False)[0], expected) <= 1e-5
        assert error(model(x, t, class_labels=y).sample, expected) <= 1e-5
        assert error(model(x, t, y, cross_attention_kwargs={}).sample, expected) <= 1e-5
        with pytest.raises(TypeError):
            model(x, t, y, guidance=1.0)
        larger = torch.randn(2, 4, 12, 12)  # positions are made again
        assert error(model(larger, t, y).sample, ditfast.restore(model)(larger, t, y).sample) <= 1e-5


def test_attention_kwargs_go_to_the_processor() -> None:
    model, inputs = diffusers_dit(), diffusers_inputs()
    seen = []

    class Listening(nn.Module):
        def __call__(self, attn: nn.Module, hidden_states: Tensor, weight: int = 0, **kwargs: object) -> Tensor:
            seen.append(weight)
            return hidden_states

    for block in model.transformer_blocks[1:]:
        block.attn1.set_processor(Listening())
    ditfast.accelerate(model)
    seen.clear()  # the probe runs a model's own code, but for hooks
    with torch.no_grad():
        found = model(**inputs, cross_attention_kwargs={"weight": 3}).sample
        assert seen == [3, 3]
        assert error(found, ditfast.restore(model)(**inputs, cross_attention_kwargs={"weight": 3}).sample) <= 1e-5


# ------------------------------------------------------------------------------------------------ the pipeline
def pipeline(**settings: object) -> object:
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(16,),
        norm_num_groups=4,
    )
    transformer = diffusers_dit(**settings)
    randomize(vae).decoder.conv_out.weight.data.mul_(20)  # or all images would be one grey
    made = diffusers.DiTPipeline(transformer, vae.eval(), diffusers.DDIMScheduler(), {0: "zero", 1: "one"})
    made.set_progress_bar_config(disable=True)
    return made


def draw(made: object, guidance_scale: float = 4.0) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    settings = dict(guidance_scale=guidance_scale, generator=generator, num_inference_steps=4, output_type="pt")
    return made([3, 207], **settings).images


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("agree", [True, False], ids=["agree", "differ"])
def test_pipeline(agree: bool, guidance_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pipeline(agree=agree)
    expected = draw(made, guidance_scale)
    assert expected.std() > 0.1
    assert ditfast.accelerate(made) is made
    rows = ditfast.acceleration_report(made).rows
    assert [row.module for row in rows] == ["transformer", *(f"transformer.transformer_blocks.{i}" for i in range(3))]
    assert all(row.swapped for row in rows)
    calls = count_embeddings(monkeypatch)
    assert error(draw(made, guidance_scale), expected) <= 1e-5
    assert len(calls) == 4 * (1 if agree else 3)
    assert torch.equal(draw(ditfast.restore(made), guidance_scale), expected)
    with ditfast.accelerated(made, cache_modulation=True):
        first = draw(made, guidance_scale)
        assert torch.equal(draw(made, guidance_scale), first)
        assert error(first, expected) <= 1e-5
    assert torch.equal(draw(made, guidance_scale), expected)


def test_pipeline_in_bf16() -> None:
    made = pipeline()
    expected = draw(made)
    ditfast.accelerate(made, dtype=torch.bfloat16)
    found = draw(made)
    assert found.dtype == torch.float32
    assert 1e-5 < error(found, expected) < 0.1
    ditfast.accelerate(made.to(torch.bfloat16))
    assert error(draw(made), draw(ditfast.restore(made))) < 0.1


def test_saved_and_loaded_as_ever(tmp_path: Path) -> None:
    model, inputs = diffusers_dit(), diffusers_inputs()
    with torch.no_grad():
        expected = run(model, inputs)[0]
        ditfast.accelerate(model).save_pretrained(tmp_path)
        loaded = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)
        assert torch.equal(run(loaded, inputs)[0], expected)
        assert not any(row.swapped for row in ditfast.acceleration_report(loaded).rows)


def test_other_models_of_diffusers_are_refused() -> None:
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    assert "nothing inside" in raises_naming("model_or_pipeline", lambda: ditfast.accelerate(unet))
    conditional = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, cross_attention_dim=8,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    raises_naming("model_or_pipeline", lambda: ditfast.accelerate(conditional))
    made = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    assert "DDPMPipeline" in raises_naming("model_or_pipeline", lambda: ditfast.accelerate(made))
    assert ditfast.accelerate(made, strict=False) is made
    assert ditfast.acceleration_report(made).rows == ()


def test_blocks_of_sd3_with_two_attentions_are_left() -> None:
    model, inputs = sd3(dual_attention_layers=(0,), qk_norm="rms_norm"), sd3_inputs()
    expected = run(model, inputs)[0]
    rows = ditfast.acceleration_report(ditfast.accelerate(model)).rows
    assert [row.swapped for row in rows] == [False, True, True]
    assert "two attentions" in rows[0].reason
    assert error(run(model, inputs)[0], expected) <= 1e-5


def test_diffusers_is_imported_only_by_who_has_it() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); import timm_style, torch, ditfast;"
        "model = ditfast.accelerate(timm_style.DiT().eval());"
        "torch.no_grad().__enter__(); model(torch.randn(1, 4, 8, 8), torch.ones(1), torch.ones(1).long());"
        "print(*sys.modules)"
    )
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not {"diffusers", "timm", "triton", "torch._dynamo"} & set(done.stdout.split())


# ------------------------------------------------------------------------------------------------ diffusers' own switches
class Doubled:
    """A processor of one's own."""

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor2_0

        self.plain = AttnProcessor2_0()

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * self.plain(*args, **kwargs)


def fuse(model: nn.Module) -> None:
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    for block in model.transformer_blocks:
        block.attn1.fuse_projections()
        block.attn1.set_processor(FusedAttnProcessor2_0())


def older_processor(model: nn.Module) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    model.transformer_blocks[1].attn1.set_processor(AttnProcessor())


SWITCHES = {
    "processor": lambda model: model.transformer_blocks[1].attn1.set_processor(Doubled()),
    "older processor": older_processor,
    "fused projections": fuse,
    "chunked ff": lambda model: [block.set_chunk_feed_forward(8, 1) for block in model.transformer_blocks],
    "checkpointing": lambda model: model.enable_gradient_checkpointing(),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_of_diffusers(switch: str, when: str) -> None:
    model, inputs = diffusers_dit(), diffusers_inputs()
    if when == "after":
        ditfast.accelerate(model)
        run(model, inputs)
    with torch.no_grad():
        SWITCHES[switch](model)
    model.train()
    ditfast.accelerate(model, strict=False) if when == "before" else None
    rows = ditfast.acceleration_report(model).rows
    idle = [row for row in rows if row.reason or "its own forward" in row.engine]
    expected_idle = {"fused projections": 3, "chunked ff": 3, "processor": 1}.get(switch, 0)
    assert len([row for row in idle if row.module != "(model)"]) == expected_idle
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> list[Tensor]:
        out = run(model, inputs)[0]
        gradient = torch.autograd.grad(out.square().sum(), trained, allow_unused=True)
        return [out, torch.cat([part.flatten() for part in gradient if part is not None])]

    def inference() -> Tensor:
        with torch.no_grad():
            return run(model.eval(), inputs)[0]

    found = [*step(), inference()]
    ditfast.restore(model)
    model.train()
    for one, other in zip(found, [*step(), inference()], strict=True):
        assert error(one, other) <= 1e-5
    if switch == "checkpointing":
        ditfast.accelerate(model.train())
        model.disable_gradient_checkpointing()
        assert all(error(one, other) <= 1e-5 for one, other in zip(step(), found[:-1], strict=True))


def test_chunked_pixart() -> None:
    model, inputs = pixart(), KINDS["PixArt"].example(torch.float32)
    ditfast.accelerate(model)
    model.transformer_blocks[0].set_chunk_feed_forward(8, 1)
    rows = ditfast.acceleration_report(model).rows
    assert ["its own forward" in row.engine for row in rows] == [True, False]
    found = run(model, inputs)[0]
    assert error(found, run(ditfast.restore(model), inputs)[0]) <= 1e-5


def test_a_block_that_attends_elsewhere() -> None:
    block = diffusers_dit().transformer_blocks[0]
    block.only_cross_attention = True
    with pytest.raises(ValueError, match="attends to something else"):
        ditfast.accelerate(block)
