"""Several processes train one model: the same weights after every step, however they share them."""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..argument_checks import check_choice
from ..config import DiTConfig
from ..devices import with_index
from ..sampling.ranks import Ranks, RanksError
from ..sampling.rendezvous import rendezvous

KINDS = ("ddp", "fsdp")
PATIENCE = datetime.timedelta(hours=2)  # the others wait while one rank draws samples or writes
# DDP's reducer may outlive the block, held by the model or by an exception's traceback. Were it the last to hold the group, it
# would wait for gloo's threads while it holds Python's lock, for which they may be waiting (seen in torch 2.13).
_groups: list[object] = []


@contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """The ranks talk to each other inside the block, over nccl between GPUs, else over gloo; a single rank to nobody.

    Raises:
        RanksError: the others are not there, or no longer.
    """
    if ranks.world == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(with_index(device))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store = rendezvous(ranks.rank, ranks.world, PATIENCE)
        distributed.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RanksError(f"rank {ranks.rank} of {ranks.world} does not find the others: {error}") from error
    _groups.append(distributed.group.WORLD)
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, distributed.DistError) or "gloo" in str(error):
            raise RanksError("another rank ended; the same command goes on from the newest checkpoint") from error
        raise
    finally:
        distributed.destroy_process_group()


def distribute(model: nn.Module, kind: str, ranks: Ranks) -> nn.Module:
    """The model of all ranks, to be called in place of this one; it begins with the first rank's weights.

    Args:
        model: fp32, on this rank's device.
        kind: ``"ddp"``: each rank holds all of it; ``"fsdp"``: each rank holds a part of every weight, of its gradient and of
            what the optimizer keeps of it, and ``model`` itself turns into that.
        ranks: one alone trains the model as it is.

    Raises:
        ValueError: there is no such kind.
    """
    check_choice("parallel", kind, KINDS)
    if ranks.world == 1:
        return model
    if kind == "ddp":
        return _settled(DistributedDataParallel(model, gradient_as_bucket_view=True), cast(DiTConfig, model.config))
    device = next(model.parameters()).device
    for parameter in model.parameters():
        distributed.broadcast(parameter.detach(), 0)
    mesh = init_device_mesh(device.type, (ranks.world,))
    # In two processes over gloo a step of DiT-S/8 takes 4% less than with the adaLN linears in groups of their own.
    for module in (*model.get_submodule("blocks").children(), model):
        fully_shard(module, mesh=mesh)
    return model


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[object]:
    """For one of several forwards and backwards whose gradients add up; only the last one's need to reach the other ranks.

    A sharded model's do each time: a rank without room for all weights has none for all gradients.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def clip_gradients(optimizer: torch.optim.Optimizer, max_norm: float | None, scale: float = 1.0) -> float:
    """Divides the gradients by the loss's scale, and then scales them down to ``max_norm`` if theirs is larger.

    Returns:
        Their norm before that, over all ranks, in the unscaled loss's units; infinite or NaN where a gradient is, and then
        they stay as they are but for the division.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if scale != 1:
        torch._foreach_mul_(gradients, 1 / scale)
    total = nn.utils.get_total_norm(gradients)
    norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
    if max_norm is not None and max_norm < norm < math.inf:
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


def gathered(values: Tensor) -> Tensor:
    """All ranks' values [..., n], one behind the other in the order of the ranks: [..., world * n], on every rank."""
    if not distributed.is_initialized():
        return values
    parts = [torch.empty_like(values) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts, dim=-1)


def told(value: Any) -> list[Any]:
    """What each rank has to say, in their order, on every rank."""
    if not distributed.is_initialized():
        return [value]
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def full_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole, on the first rank, what every rank holds its part of; on the others nothing."""
    first = not distributed.is_initialized() or distributed.get_rank() == 0
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if first:
            found[name] = whole
    return found


def _settled(model: DistributedDataParallel, config: DiTConfig) -> DistributedDataParallel:
    """DDP behind its first backward, where it packs gradients anew into the buckets that ranks add up.

    Of three ranks or more, a gradient's place in a bucket decides in what order the ranks' are added: without this a resumed
    run's first step would round otherwise than the same step of a run that nobody interrupted.
    """
    weight = next(model.parameters())
    x = torch.zeros(1, *config.input_shape, device=weight.device, dtype=weight.dtype)  # [1, C, H, W]
    zero = torch.zeros(1, device=weight.device, dtype=torch.int64)  # [1]
    with torch.compiler.set_stance("force_eager"):  # nothing is compiled for a batch of one
        model(x, zero, zero).sum().backward()
    model.zero_grad()
    return model
