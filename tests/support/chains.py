"""Residual chains of every kind, and their gradients against eager's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rewriter import Plan, rewrite

WIDTH = 12


class PreNorm(nn.Module):
    """Attention and a feed-forward part, each behind its norm: two residual blocks."""

    def __init__(self, width: int = WIDTH, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.feed = feed(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.feed(self.second(x))


class PostNorm(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.feed = nn.LayerNorm(width), feed(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.feed(x))


class Small(nn.Module):
    """One residual block: x + two layers of its norm."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.feed = nn.LayerNorm(width), feed(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed(self.norm(x))


class InPlace(nn.Module):
    """Writes its sum into the branch, and its activation into the sum."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.feed = feed(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.feed(x)
        y += x
        return torch.tanh_(y)


class Highways(nn.Module):
    """A highway layer (Srivastava et al. 2015): the skip goes through a gate."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.gate, self.feed = nn.Linear(width, width), feed(width)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x))
        return x * gate + self.feed(x)


class Scaled(nn.Module):
    """x + gain x: its branch is a number times its input."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * x


class Basic(nn.Module):
    """The basic block of ResNet; its activation comes after the sum, its shortcut maps where the shape changes."""

    def __init__(self, given: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(given, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width)])
        self.relu = nn.ReLU(inplace=True)
        shortcut = [nn.Conv2d(given, width, 1, stride, bias=False), nn.BatchNorm2d(width)]
        self.shortcut = nn.Sequential(*shortcut) if stride > 1 or given != width else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.norms[1](self.second(self.relu(self.norms[0](self.first(x)))))
        z += x if self.shortcut is None else self.shortcut(x)
        return self.relu(z)


class ResNet(nn.Module):
    """Three stages of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 4, 3, 1, 1)
        stages = [(4, 4, 1), (4, 6, 2), (6, 8, 2)]
        self.blocks = nn.Sequential(*[nn.Sequential(Basic(a, b, s), Basic(b, b)) for a, b, s in stages])
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Stack(nn.Module):
    """Blocks between an embedding and a head. straight: a layer without a skip follows every third block."""

    def __init__(self, block: Callable[[], nn.Module], count: int, straight: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(5, WIDTH)
        blocks = [block() for _ in range(count)]
        self.blocks = nn.ModuleList(blocks)
        self.between = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(count // 3)]) if straight else None
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if self.between is not None and number % 3 == 2:
                x = self.between[number // 3](x)
        return self.head(x)


class Chained(nn.Module):
    """Blocks and nothing else."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class EveryOutput(nn.Module):
    """Returns what each block leaves, as models with a loss for each do."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList([Small() for _ in range(count)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(x)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return tuple(outputs)


class Asides(nn.Module):
    """Returns something from inside each block's branch, too."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(5, WIDTH)
        self.blocks = nn.ModuleList([feed(WIDTH) for _ in range(count)])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.embed(x)
        asides = []
        for block in self.blocks:
            y = torch.tanh(block(x))
            asides.append(y.sum(-1))
            x = x + y
        return x, *asides


class Translator(nn.Module):
    """Two chains: a decoder of cross-attending blocks reads what an encoder left."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(5, WIDTH)
        self.encoder = nn.ModuleList([Small() for _ in range(count)])
        self.decoder = nn.ModuleList([nn.MultiheadAttention(WIDTH, 2, batch_first=True) for _ in range(count)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        memory, stream = self.embed(x), self.embed(y)
        for block in self.encoder:
            memory = block(memory)
        for block in self.decoder:
            stream = stream + block(stream, memory, memory, need_weights=False)[0]
        return self.head(stream)


def feed(width: int = WIDTH, dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": WIDTH, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
    return GPT2Model(config)


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(1)
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
    )
    return RobertaModel(config, add_pooling_layer=False)


def gradients(call: Callable[..., Any], model: nn.Module, args: tuple[Tensor, ...], seed: int = 7) -> dict[str, Tensor]:
    """Of all trainable parameters and floating inputs, by name, for a fixed scalar of all outputs; zero for none."""
    given = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in args]
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wanted.update({f"input {n}": x for n, x in enumerate(given) if x.requires_grad})
    torch.manual_seed(seed)
    loss = scalar(call(*given))
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {
        name: torch.zeros_like(wanted[name]) if each is None else each for name, each in zip(wanted, found, strict=True)
    }


def scalar(outputs: Any) -> Tensor:
    """Of any outputs: weighted sums, the weights the same at every call."""
    tensors = [outputs] if isinstance(outputs, Tensor) else list(getattr(outputs, "to_tuple", lambda: outputs)())
    generator = torch.Generator().manual_seed(3)
    parts = [(t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)).sum() for t in tensors]
    return torch.stack([part.double() for part in parts]).sum()


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error over all gradients.

    A gradient much shorter than the longest is measured by a millionth of that one: the gradient of a key's bias is
    zero but for rounding.
    """
    assert found.keys() == expected.keys()
    longest = max(float(g.norm()) for g in expected.values())
    return max(float((found[n] - g).norm()) / max(float(g.norm()), 1e-6 * longest) for n, g in expected.items())


def cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    a, b = (torch.cat([each[name].flatten() for name in expected]) for each in (found, expected))
    return float(a @ b / (a.norm() * b.norm()))


def compared(model: nn.Module, args: tuple[Tensor, ...], *entries: Any) -> tuple[float, Any]:
    """(error against eager, the step) of one batch."""
    expected = gradients(model, model, args)
    step = rewrite(model, Plan(entries), example=args)
    return error(gradients(step, model, args), expected), step
