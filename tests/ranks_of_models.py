"""What each of two processes does in ``test_two_processes_of_ddp_and_fsdp``; apart, so that a spawned process can import it."""

from __future__ import annotations

import copy
import os

import torch
import torch.distributed as dist
from foreign import KINDS, gradients, joined, run
from support import error
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import ditfast


class Wrapped:
    """What one rank holds: the model as it was, its inputs, and the gradient of the mean over both ranks."""

    def __init__(self, kind: str, rank: int):
        torch.manual_seed(0)
        self.model = KINDS[kind].build()
        inputs = KINDS[kind].example(torch.float32)
        self.inputs = {name: value[rank : rank + 1] for name, value in inputs.items()}
        self.upstream = [torch.randn(2, 8, 8, 8)[rank : rank + 1]]
        self.latents = next(iter(inputs))
        self.before = run(self.model, self.inputs)[0].detach()
        self.expected = gradients(self.model, self.inputs, self.upstream)
        for name, gradient in self.expected.items():
            if name != self.latents:
                dist.all_reduce(gradient)
                gradient.div_(2)

    def check(self, wrapped: nn.Module, prefix: str = "") -> None:
        found = gradients(wrapped, self.inputs, self.upstream)
        found = {name: part.full_tensor() if isinstance(part, DTensor) else part for name, part in found.items()}
        assert set(found) == set(self.expected)
        assert error(joined(found), joined(self.expected)) <= 1e-5
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert error(run(wrapped, self.inputs)[0], self.before) <= 1e-5


def ddp(kind: str, rank: int) -> None:
    case = Wrapped(kind, rank)
    case.check(DistributedDataParallel(ditfast.accelerate(copy.deepcopy(case.model))))
    case.check(ditfast.accelerate(DistributedDataParallel(case.model)))


def fsdp2(kind: str, rank: int) -> None:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    case = Wrapped(kind, rank)
    for reshard in (True, False) if kind == "official" else (False,):  # diffusers' own forward reads block 0 at the end
        model = ditfast.accelerate(copy.deepcopy(case.model))
        for block in getattr(model, "blocks", None) or model.transformer_blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        case.check(model)
        rows = {row.module: row for row in ditfast.acceleration_report(model).rows}
        assert all(row.swapped for name, row in rows.items() if name != "(model)")
        assert rows["(model)"].swapped == (kind == "official")  # diffusers' fused forward has no use for hooked blocks


def work(rank: int, port: int, kind: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    ddp(kind, rank)
    fsdp2(kind, rank)
    dist.destroy_process_group()
