"""The oracle itself is checked against the paper's statements, and against diffusers' independent implementation."""

import pytest
import torch
from support import randomize

from ditfast import DiTConfig, reference
from ditfast.config import CONDITIONINGS

SMALL = {"depth": 2, "hidden_size": 48, "num_heads": 4, "patch_size": 2, "input_size": 8, "num_classes": 5}


def small(**fields: object) -> DiTConfig:
    return DiTConfig(**{**SMALL, **fields})  # type: ignore[arg-type]


def inputs(config: DiTConfig, B: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(B, *config.input_shape), torch.rand(B) * 999, torch.randint(config.num_classes, (B,))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_starts_at_zero(conditioning: str) -> None:
    config = small(conditioning=conditioning)
    assert torch.equal(reference.DiT(config)(*inputs(config)), torch.zeros(3, 8, 8, 8))


def test_adaln_zero_blocks_start_as_the_identity() -> None:
    config = small()
    x, c = torch.randn(3, 16, 48), torch.randn(3, 48)
    block = reference.DiT(config).blocks[0]
    assert torch.equal(block(x, c, torch.randn(3, 2, 48)), x)
    assert not torch.equal(reference.DiT(small(conditioning="adaln")).blocks[0](x, c, torch.randn(3, 2, 48)), x)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_input_matters(conditioning: str) -> None:
    config = small(conditioning=conditioning)
    model = randomize(reference.DiT(config).double()).eval()
    x, t, y = inputs(config)
    out = model(x.double(), t, y)
    assert not torch.allclose(out, model(x.double(), t + 100, y))
    assert not torch.allclose(out, model(x.double(), t, (y + 1) % 5))
    assert not torch.allclose(out, model(x.double(), t + 0.25, y)), "fractional timesteps have to matter"
    assert not torch.allclose(out, model(x.double().flip(3), t, y).flip(3)), "positions have to matter"


def test_official_parameter_names() -> None:
    names = set(reference.DiT(small()).state_dict())
    for expected in (
        "x_embedder.proj.weight",
        "t_embedder.mlp.0.bias",
        "t_embedder.mlp.2.weight",
        "y_embedder.embedding_table.weight",
        "pos_embed",
        "blocks.1.attn.qkv.weight",
        "blocks.1.attn.proj.bias",
        "blocks.1.mlp.fc1.weight",
        "blocks.1.mlp.fc2.bias",
        "blocks.1.adaLN_modulation.1.weight",
        "final_layer.linear.weight",
        "final_layer.adaLN_modulation.1.bias",
    ):
        assert expected in names
    cross = set(reference.DiT(small(conditioning="cross_attention")).state_dict())
    assert {f"blocks.0.cross_attn.{part}.weight" for part in ("q", "kv", "proj")} <= cross
    assert not any("adaLN" in name for name in cross)


def test_patches_go_back_where_they_came_from() -> None:
    config = small(input_size=(4, 8), learn_sigma=False)
    model = reference.DiT(config)
    values = torch.arange(4 * 4 * 8.0).view(1, 4, 4, 8)
    tokens = values.reshape(1, 4, 2, 2, 4, 2).permute(0, 2, 4, 3, 5, 1).reshape(1, 8, 16)  # (row, column, channel) in a patch
    assert torch.equal(model.unpatchify(tokens), values)


def test_guidance() -> None:
    config = small()
    model = randomize(reference.DiT(config).double()).eval()
    x, t, y = inputs(config, 2)
    x, t = torch.cat([x, torch.randn_like(x)]).double(), torch.cat([t, t])
    y = torch.cat([y, torch.full_like(y, config.null_class)])
    conditional, unconditional = model(torch.cat([x[:2], x[:2]]), t, y).chunk(2)
    out = model.forward_with_cfg(x, t, y, 3.0)
    torch.testing.assert_close(out[:2, :3], unconditional[:, :3] + 3 * (conditional - unconditional)[:, :3])
    assert torch.equal(out[:2, :3], out[2:, :3])
    assert torch.equal(out[:, 3:], torch.cat([conditional, unconditional])[:, 3:])
    everything = model.forward_with_cfg(x, t, y, 3.0, guidance_channels=4)
    torch.testing.assert_close(everything[:2, 3], unconditional[:, 3] + 3 * (conditional - unconditional)[:, 3])


def test_labels_are_dropped_in_training_only() -> None:
    config = small(class_dropout_prob=0.5)
    embedder = reference.DiT(config).y_embedder
    y = torch.full((1000,), 2)
    table = embedder.embedding_table.weight
    assert torch.equal(embedder.eval()(y), table[y])
    dropped = (embedder.train()(y) == table[config.null_class]).all(1).float().mean()
    assert 0.4 < dropped < 0.6


def test_agrees_with_diffusers() -> None:
    """Position table and whole forward of the diffusers flavour against its own class, weights copied by name."""
    diffusers = pytest.importorskip("diffusers")
    config = DiTConfig(depth=2, hidden_size=48, num_heads=4, input_size=8, num_classes=1000, flavour="diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2, sample_size=8, patch_size=2
    )
    theirs = theirs.double().eval()
    ours = randomize(reference.DiT(config).double()).eval()
    torch.testing.assert_close(ours.pos_embed.float(), theirs.pos_embed.pos_embed.float(), rtol=1e-6, atol=1e-6)
    theirs.load_state_dict(_in_diffusers_names(ours.state_dict(), depth=2), strict=False)
    x, t, y = torch.randn(3, 4, 8, 8).double(), torch.tensor([1, 500, 999]), torch.tensor([3, 999, 1000])
    expected = theirs(x, timestep=t, class_labels=y).sample
    torch.testing.assert_close(ours(x, t, y), expected, rtol=1e-6, atol=1e-6)


def _in_diffusers_names(state: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    renamed: dict[str, torch.Tensor] = {}
    for kind in ("weight", "bias"):
        renamed[f"pos_embed.proj.{kind}"] = state[f"x_embedder.proj.{kind}"]
        renamed[f"proj_out_1.{kind}"] = state[f"final_layer.adaLN_modulation.1.{kind}"]
        renamed[f"proj_out_2.{kind}"] = state[f"final_layer.linear.{kind}"]
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            q, k, v = state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            renamed |= {f"{block}.attn1.to_{name}.{kind}": part for name, part in zip("qkv", (q, k, v), strict=True)}
            renamed[f"{block}.attn1.to_out.0.{kind}"] = state[f"blocks.{i}.attn.proj.{kind}"]
            renamed[f"{block}.ff.net.0.proj.{kind}"] = state[f"blocks.{i}.mlp.fc1.{kind}"]
            renamed[f"{block}.ff.net.2.{kind}"] = state[f"blocks.{i}.mlp.fc2.{kind}"]
            renamed[f"{block}.norm1.linear.{kind}"] = state[f"blocks.{i}.adaLN_modulation.1.{kind}"]
            renamed[f"{block}.norm1.emb.timestep_embedder.linear_1.{kind}"] = state[f"t_embedder.mlp.0.{kind}"]
            renamed[f"{block}.norm1.emb.timestep_embedder.linear_2.{kind}"] = state[f"t_embedder.mlp.2.{kind}"]
    for i in range(depth):
        table = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
        renamed[table] = state["y_embedder.embedding_table.weight"]
    return renamed
