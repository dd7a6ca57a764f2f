"""DDP over gloo with 1 and 2 ranks, and `no_sync`: what 2 ranks compute equals one process with the whole batch."""

import copy

import torch
import torch.nn.functional as F
from exact_entry import Exact
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rewriter import BlackBox, CallableBox, Plan, rewrite


def smooth(x):
    import numpy

    return numpy.sin(x) + 0.1 * x**2


class Boxed(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(6, 4)
        self.block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.box = CallableBox(smooth)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.box(self.block(self.encoder(x))))


def make():
    torch.manual_seed(0)
    return Boxed()


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 8, 6, generator=generator), torch.randint(0, 3, (2, 8), generator=generator)


def gradients(module):
    return [parameter.grad.clone() for parameter in module.parameters()]


PLAN = Plan([Exact("block"), BlackBox("box", step_size=1e-3, input_scale=1.0, clip=None)])


def single():
    """One process, whole batches, two accumulated forwards."""
    step = rewrite(make(), PLAN, loss=F.cross_entropy)
    for x, y in zip(*data(), strict=True):
        step(x, target=y).backward()
    return gradients(step)


def work(rank, world, address, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
    step = rewrite(make(), PLAN, loss=F.cross_entropy)
    parallel = DistributedDataParallel(step)
    rows = 8 // world
    (x1, x2), (y1, y2) = data()
    own = slice(rank * rows, (rank + 1) * rows)
    with parallel.no_sync():
        parallel(x1[own], target=y1[own]).backward()
    parallel(x2[own], target=y2[own]).backward()
    results.put((rank, [gradient.numpy() for gradient in gradients(step)]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def spawned(world, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    address = f"file://{tmp_path}/rendezvous{world}"
    processes = [context.Process(target=work, args=(rank, world, address, results)) for rank in range(world)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [[torch.from_numpy(gradient) for gradient in found[rank]] for rank in range(world)]


def test_ddp_with_one_and_two_ranks(tmp_path):
    whole = single()
    (one,) = spawned(1, tmp_path)
    for mine, theirs in zip(one, whole, strict=True):
        assert torch.equal(mine, theirs)
    first, second = spawned(2, tmp_path)
    for a, b, theirs in zip(first, second, whole, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, theirs, rtol=1e-4, atol=1e-6)


def test_the_comparison_can_fail():
    """Other random numbers give another gradient: the ranks above agree because rows, not processes, own them."""
    whole = single()
    step = rewrite(copy.deepcopy(make()), PLAN, loss=F.cross_entropy, seed=1)
    for x, y in zip(*data(), strict=True):
        step(x, target=y).backward()
    assert not torch.allclose(gradients(step)[0], whole[0], rtol=1e-4, atol=1e-6)
