"""Somebody else's models, small and with random weights; what goes into them, what comes out, how exact that is."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pytest
import timm_style
import torch
from support import UNIT_ROUNDOFF, assert_as_good_as, error, randomize
from torch import Tensor, nn


def diffusers() -> Any:
    """Return the module; the test that asks for it is skipped where it is not installed."""
    return pytest.importorskip("diffusers")


class Kind(NamedTuple):
    build: Callable[..., nn.Module]
    example: Callable[[torch.dtype], dict[str, Any]]  # the arguments of a call


def official_inputs(dtype: torch.dtype = torch.float32, B: int = 2, grid: tuple[int, int] = (4, 4)) -> dict[str, Any]:
    x = torch.randn(B, 4, 2 * grid[0], 2 * grid[1]).to(dtype)
    return {"x": x, "t": torch.rand(B) * 999, "y": torch.randint(10, (B,))}


def diffusers_dit(agree: bool = True, **settings: Any) -> nn.Module:
    config = dict(num_attention_heads=4, attention_head_dim=16, out_channels=8, num_layers=3, sample_size=8)
    model = randomize(diffusers().DiTTransformer2DModel(**{**config, **settings}).eval())
    if agree:
        for block in model.transformer_blocks:
            block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    return model


def diffusers_inputs(dtype: torch.dtype = torch.float32, B: int = 2) -> dict[str, Any]:
    labels = torch.randint(1000, (B,))
    return {"hidden_states": torch.randn(B, 4, 8, 8).to(dtype), "timestep": torch.randint(999, (B,)), "class_labels": labels}


def pixart(**settings: Any) -> nn.Module:
    config = dict(num_attention_heads=4, attention_head_dim=16, num_layers=2, cross_attention_dim=64, caption_channels=24)
    config = {**config, "sample_size": 8, "use_additional_conditions": False, **settings}
    return randomize(diffusers().PixArtTransformer2DModel(**config).eval())


def pixart_inputs(dtype: torch.dtype = torch.float32, B: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(B, 4, 8, 8).to(dtype),
        "timestep": torch.randint(999, (B,)),
        "encoder_hidden_states": torch.randn(B, 6, 24).to(dtype),
        "encoder_attention_mask": (torch.arange(6) < torch.tensor([[4], [6]])).to(dtype),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def sd3(**settings: Any) -> nn.Module:
    config = dict(num_attention_heads=4, attention_head_dim=16, num_layers=3, in_channels=4, out_channels=4, sample_size=8)
    text = dict(joint_attention_dim=24, caption_projection_dim=64, pooled_projection_dim=20, pos_embed_max_size=8)
    return randomize(diffusers().SD3Transformer2DModel(**{**config, **text, **settings}).eval())


def sd3_inputs(dtype: torch.dtype = torch.float32, B: int = 2) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(B, 4, 8, 8).to(dtype),
        "encoder_hidden_states": torch.randn(B, 6, 24).to(dtype),
        "pooled_projections": torch.randn(B, 20).to(dtype),
        "timestep": torch.randint(999, (B,)),
    }


def official(kind: type[timm_style.DiT] = timm_style.DiT, **settings: Any) -> nn.Module:
    return randomize(kind(**settings).eval())


KINDS = {
    "official": Kind(official, official_inputs),
    "official, 2x6": Kind(lambda: official(grid=(2, 6)), lambda dtype: official_inputs(dtype, grid=(2, 6))),
    "SiT": Kind(lambda: official(timm_style.SiT), official_inputs),
    "REPA": Kind(lambda: official(timm_style.Repa), official_inputs),
    "fast-DiT": Kind(lambda: official(timm_style.FastDiT, use_reentrant=False), official_inputs),
    "fast-DiT, reentrant": Kind(lambda: official(timm_style.FastDiT, use_reentrant=True), official_inputs),
    "diffusers": Kind(diffusers_dit, diffusers_inputs),
    "diffusers, copies differ": Kind(lambda: diffusers_dit(agree=False), diffusers_inputs),
    "diffusers, eps 1e-6": Kind(lambda: diffusers_dit(norm_eps=1e-6), diffusers_inputs),
    "diffusers, eps 0.1": Kind(lambda: diffusers_dit(norm_eps=0.1), diffusers_inputs),
    "PixArt": Kind(pixart, pixart_inputs),
    "SD3": Kind(sd3, sd3_inputs),
}
PREFIXES = re.compile(r"\b(_orig_mod|module|_checkpoint_wrapped_module)\.")
DITS = ("official", "diffusers")


# ------------------------------------------------------------------------------------------------ outputs and gradients
def tensors(output: Any) -> list[Tensor]:
    """Of whatever a model returns, in order."""
    if isinstance(output, Tensor):
        return [output]
    parts: Sequence[Any] = list(output.values()) if isinstance(output, Mapping) else output
    return [tensor for part in parts for tensor in tensors(part)]


def run(model: nn.Module, inputs: dict[str, Any], seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)  # of label dropout
    return tensors(model(**inputs))


def in_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, Tensor) and name != "t" and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def gradients(model: nn.Module, inputs: dict[str, Any], upstream: Sequence[Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Of every trained parameter, without the prefixes of wrappers, and of the latents."""
    (latents, x), *others = inputs.items()
    x = x.detach().requires_grad_()
    model.zero_grad()
    outputs = run(model, {latents: x, **dict(others)}, seed)
    torch.autograd.backward(outputs, [gradient.to(output.dtype) for gradient, output in zip(upstream, outputs, strict=True)])
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return {latents: x.grad, **{PREFIXES.sub("", name): gradient for name, gradient in found.items()}}


def joined(gradients: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def assert_same_outputs(found: Sequence[Tensor], exact: Sequence[Tensor], eager: Sequence[Tensor]) -> None:
    """The budget of models; in fp32 1e-5 of what the model gave before, too."""
    for one, true, before in zip(found, exact, eager, strict=True):
        assert_as_good_as(one, true, before)
        if one.dtype == torch.float32:
            assert error(one, before) <= 1e-5


def assert_same_gradients(found: dict[str, Tensor], exact: dict[str, Tensor], eager: dict[str, Tensor]) -> None:
    """The whole gradient within the budget of models, and no parameter's hidden behind the others'."""
    assert set(found) == set(exact) == set(eager)
    assert_as_good_as(joined(found), joined(exact), joined(eager))
    if joined(found).dtype == torch.float32:
        assert error(joined(found), joined(eager)) <= 1e-5
    for name in exact:
        bar = 2 * error(eager[name], exact[name]) + 4 * UNIT_ROUNDOFF[found[name].dtype]
        assert error(found[name], exact[name]) <= bar, f"{name}: {error(found[name], exact[name]):.2e} > {bar:.2e}"


def in_float64(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything that has to be as it was, but for the values of the parameters."""
    return {
        "vars": {name: list(vars(module)) for name, module in model.named_modules()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "state_dict": {key: (value.data_ptr(), value._version) for key, value in model.state_dict().items()},
        "parameters": {name: (id(p), p.requires_grad, p.grad) for name, p in model.named_parameters()},
    }


def names_of(rows: Sequence[Any]) -> list[str]:
    return [row.module for row in rows]
