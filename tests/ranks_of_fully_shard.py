"""FSDP2's recipe, ``fully_shard`` of each block and then of the model, as each of several processes runs it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from support import error, randomize
from torch import Tensor, distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import ditfast
from ditfast import DiTConfig, reference
from ditfast.sampling.ranks import Ranks

BATCH = 4
WHOLE = StateDictOptions(full_state_dict=True)


class Recipe(NamedTuple):
    """One way to shard both models; ``precision`` is of all modules, of the blocks alone, or none."""

    conditioning: str = "adaln_zero"
    reshard: bool | None = None  # None: FSDP2's default
    precision: str = "none"
    checkpointing: str = "none"  # ditfast's or torch's
    ends: bool = False  # x_embedder and final_layer are sharded by themselves, too
    steps: int = 2

    def models(self) -> tuple[nn.Module, nn.Module]:
        """The reference and the fast model, of the same weights."""
        torch.manual_seed(0)
        sizes = dict(depth=2, hidden_size=32, num_heads=2, patch_size=2, input_size=8, num_classes=9)
        config = DiTConfig(**sizes, conditioning=self.conditioning)  # type: ignore[arg-type]
        oracle, fast = randomize(reference.DiT(config)).eval(), ditfast.DiT(config).eval()
        fast.load_state_dict(oracle.state_dict())
        fast.checkpoint_activations = self.checkpointing == "ditfast"
        return oracle, fast

    def shard(self, model: nn.Module) -> None:
        if self.checkpointing == "torch":
            blocks = set(model.blocks)
            apply_activation_checkpointing(model, check_fn=lambda module: module in blocks)
        half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        policies = {"none": (MixedPrecisionPolicy(),) * 2, "all": (half, half)}
        policies["blocks"] = dataclasses.replace(half, output_dtype=torch.float32), MixedPrecisionPolicy()
        of_blocks, of_others = policies[self.precision]
        mesh = distributed.device_mesh.init_device_mesh("cpu", (distributed.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard, mp_policy=of_blocks)
        for module in (*((model.x_embedder, model.final_layer) if self.ends else ()), model):
            fully_shard(module, mesh=mesh, reshard_after_forward=self.reshard, mp_policy=of_others)

    def train(self, model: nn.Module, ranks: Ranks) -> list[Tensor]:
        """Losses, norms, gradients of the first step, and weights behind the last: whole, of steps as anybody writes them."""
        found: list[Tensor] = []
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
        for step in range(self.steps):
            chance = torch.Generator().manual_seed(step)
            x, t = torch.randn(BATCH, 4, 8, 8, generator=chance), torch.rand(BATCH, generator=chance) * 999
            share = [values.chunk(ranks.world)[ranks.rank] for values in (x, t, torch.arange(BATCH) % 10)]
            loss = model(*share).float().square().mean()
            loss.backward()
            if step == 0:
                found += [whole(parameter.grad) for parameter in model.parameters() if parameter.requires_grad]
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            found += [loss.detach(), whole(norm)]
            optimizer.step()
            optimizer.zero_grad()
        found += [whole(parameter) for parameter in model.parameters()]
        with torch.no_grad():
            found.append(model(*share))
        return found


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def trains_as_the_reference(ranks: Ranks, recipe: Recipe) -> None:
    results = []
    for model in recipe.models():
        recipe.shard(model)
        results.append(recipe.train(model, ranks))
    expected, found = results
    if recipe.precision == "none":
        for a, b in zip(found, expected, strict=True):
            assert error(a, b) <= 2e-5, recipe
        return
    exact_model = recipe._replace(precision="none").models()[0]
    recipe._replace(precision="none").shard(exact_model)
    exact = recipe.train(exact_model, ranks)
    for a, b, c in zip(found, expected, exact, strict=True):
        assert a.dtype == b.dtype, recipe
        assert error(a, c) <= 1.1 * error(b, c) + 5e-3, recipe


def every_recipe(ranks: Ranks, recipes: list[Recipe]) -> None:
    for recipe in recipes:
        trains_as_the_reference(ranks, recipe)


def states_are_the_reference_s(ranks: Ranks, folder: Path) -> None:
    """State dicts and torch's distributed checkpoints go from either model into the other."""
    recipe = Recipe()
    oracle, fast = recipe.models()
    plain = {name: value.clone() for name, value in fast.state_dict().items()}
    for model in (oracle, fast):
        recipe.shard(model)
    state = get_model_state_dict(fast, options=WHOLE)
    assert set(state) == set(plain)
    for name, value in state.items():
        assert torch.equal(value, plain[name]), name
    recipe.train(fast, ranks)
    trained = [whole(parameter) for parameter in fast.parameters()]
    set_model_state_dict(oracle, get_model_state_dict(fast))
    assert all(map(torch.equal, map(whole, oracle.parameters()), trained))
    dcp.save({"model": get_model_state_dict(fast)}, checkpoint_id=folder)
    another = recipe.models()[1]
    recipe.shard(another)
    loaded = {"model": get_model_state_dict(another)}
    dcp.load(loaded, checkpoint_id=folder)
    set_model_state_dict(another, loaded["model"])
    assert all(map(torch.equal, map(whole, another.parameters()), trained))
