"""Residual nets in all shapes, and their programs from both front ends."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from rewriter.capture import capture
from rewriter.exporter import export
from rewriter.passes.annotate import Annotate
from rewriter.passes.base import run
from rewriter.passes.normalise import Normalise
from rewriter.passes.program import Program, Rows, Value
from rewriter.passes.unpack import Unpack
from rewriter.shadow import preserved
from rewriter.signature import tree_of_call

WIDTH = 8
FRONT_ENDS = ("fx", "export")


def cases(names: Iterable[str], exported: Iterable[str]) -> list[tuple[str, str]]:
    """(name, front end): all names by fx, some by torch.export too, which takes its time."""
    return [*((name, "fx") for name in names), *((name, "export") for name in exported)]


def program_of(model: nn.Module, *args: Tensor, front_end: str | None = "fx", **kwargs: Tensor) -> Program:
    """The annotated program of a model for tensors with rows in dimension 0. front_end: None where either will do."""
    tensors, tree = tree_of_call(args, kwargs)
    if front_end == "export":
        traced = export(model, tree, tensors, [f"input_{number}" for number in range(len(tensors))], "rows")
        program = Program(model, traced.graph, traced.constants, opaque=traced.opaque)
    else:
        captured = capture(model, args, kwargs, prove=False)
        assert front_end in (None, captured.front_end), captured.front_end
        program = Program(model, captured.graph, captured.constants, opaque=captured.opaque)
    more = tuple(torch.cat([tensor, tensor[:1]]) for tensor in tensors)
    with preserved(model):
        annotate = Annotate(tuple(tensors), more, (len(tensors[0]), len(more[0])))
        return run([Normalise(), annotate, Unpack()], program)[0]


class Branch(nn.Module):
    """Norm, two layers and what lies between them."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))


class HandNorm(nn.Module):
    """A layer norm in seven operations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias


class Net(nn.Module):
    """A stem, `blocks` that `forward` puts together, and a head. extra: further modules by name."""

    def __init__(self, body: Callable[[Net, Tensor], Tensor], blocks: int = 6, **extra: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.stem, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList(Branch() for _ in range(blocks))
        for name, module in extra.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, self.stem(x)))


def linears(count: int, inputs: int = WIDTH) -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(inputs, WIDTH) for _ in range(count))


def repeated(step: Callable[[Tensor, nn.Module], Tensor]) -> Callable[[Net, Tensor], Tensor]:
    """A body that does the same with every block."""

    def body(net: Net, x: Tensor) -> Tensor:
        for block in net.blocks:
            x = step(x, block)
        return x

    return body


def crossed(net: Net, x: Tensor) -> Tensor:
    """A second skip, from the first block's output over the two blocks that follow it."""
    values = [x]
    for number, block in enumerate(net.blocks):
        y = values[-1] + block(values[-1])
        values.append(y + values[1] if number == 2 else y)
    return values[-1]


def conditioned(net: Net, x: Tensor) -> Tensor:
    """A condition that does not come from the stream scales and shifts every block's input (DiT)."""
    condition = net.condition(x.new_ones(x.shape[0], WIDTH))
    for block, scale in zip(net.blocks, net.scales, strict=True):
        x = x + block(x * scale(condition) + condition)
    return x


def around(net: Net, x: Tensor) -> Tensor:
    """One skip around all the blocks (super resolution)."""
    y = x
    for block in net.blocks:
        y = y + block(y)
    return x + net.last(y)


def nested(net: Net, x: Tensor) -> Tensor:
    """Residual blocks of residual blocks."""
    for start in range(0, len(net.blocks), 3):
        y = x
        for block in net.blocks[start : start + 3]:
            y = y + 0.2 * block(y)
        x = x + 0.2 * y
    return x


def gated(net: Net, x: Tensor) -> Tensor:
    """Highway networks."""
    for block, gate in zip(net.blocks, net.gates, strict=True):
        share = torch.sigmoid(gate(x))
        x = share * torch.relu(block(x)) + (1 - share) * x
    return x


def parallel(net: Net, x: Tensor) -> Tensor:
    """Two branches of one normed value, added one after the other (GPT-J)."""
    for number, norm in enumerate(net.norms):
        y = norm(x)
        x = net.blocks[2 * number + 1](y) + (x + net.blocks[2 * number](y))
    return x


def unet(net: Net, x: Tensor) -> Tensor:
    """Residual blocks on the way down and up, skips across."""
    half, kept = len(net.blocks) // 2, []
    for block in net.blocks[:half]:
        x = x + block(x)
        kept.append(x)
        x = torch.relu(x)
    for block, merge in zip(net.blocks[half:], net.merges, strict=True):
        x = merge(torch.cat([x, kept.pop()], -1))
        x = x + block(x)
    return x


def dense(net: Net, x: Tensor) -> Tensor:
    """Every block reads the sum of all earlier values."""
    values = [x]
    for block in net.blocks:
        values.append(block(torch.stack(values).sum(0)))
    return values[-1]


def first_again(net: Net, x: Tensor) -> Tensor:
    """Every block's output is added to the first value."""
    y = x
    for block in net.blocks:
        y = block(y) + x
    return y


def activation(net: Net, x: Tensor) -> Tensor:
    """An activation that adds its input: no parameters in the branch."""
    for block in net.blocks:
        x = block(x)
        x = x + torch.sin(x) ** 2
    return x


def written_in_place(net: Net, x: Tensor) -> Tensor:
    for block in net.blocks:
        y = block(x)
        y += x
        x = F.relu_(y)
    return x


def written_before_it_is_added(net: Net, x: Tensor) -> Tensor:
    """The input is written before it is added: the skip starts behind the write."""
    for layer in net.layers:
        y = layer(F.relu(x, inplace=True))
        x = x + y
    return x


def graph_program(build: Callable[..., Any]) -> Program:
    """A program without a run: build(x, f, add, cat) -> output node(s). All values but x are differentiable, (4, 2)."""
    graph = fx.Graph()
    output = build(
        graph.placeholder("x"),
        lambda value: graph.call_module("f", (value,)),
        lambda *values: graph.call_function(operator.add, values),
        lambda *values: graph.call_function(torch.cat, (list(values),)),
    )
    graph.output(tuple(output) if isinstance(output, Iterable) else (output,))
    for node in graph.nodes:
        node.meta = {"block": (), "source": ""}
    values = {n.name: Value((4, 2), torch.float32, Rows(0), n.op != "placeholder") for n in graph.nodes}
    return Program(nn.ModuleDict({"f": nn.Linear(2, 2)}), graph, values=values)
