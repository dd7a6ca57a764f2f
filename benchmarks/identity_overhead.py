"""What a rewritten step costs when the plan says nothing: added CPU time per step, and capture times.

    python benchmarks/identity_overhead.py

Alternates eager and rewritten steps in one process, one thread, and takes the minimum CPU time of each. The bound is
100 us + .1 us per module on a step of about 20 ms with 24 blocks.
"""

import time

import torch
import torch.nn.functional as F
from torch import nn

from rewriter import rewrite
from rewriter.capture import capture


class Block(nn.Module):
    """A pre-norm transformer block with hand-written attention."""

    def __init__(self, width, heads=4):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        h = self.norm_1(x)
        q, k, v = (layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in self._projections())
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))

    def _projections(self):
        return self.query, self.key, self.value


class Transformer(nn.Module):
    """24 blocks, tied embedding."""

    def __init__(self, width=64, blocks=24, vocabulary=100):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class CellLoop(nn.Module):
    """A GRU cell called in a Python loop."""

    def __init__(self, width=32):
        super().__init__()
        self.cell = nn.GRUCell(width, width)

    def forward(self, x, h):
        for t in range(256):
            h = self.cell(x[:, t], h)
        return h


def step_time(call, tokens, parameters):
    start = time.thread_time()
    logits = call(tokens)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    spent = time.thread_time() - start
    for parameter in parameters:
        parameter.grad = None
    return spent


def overhead(rounds=150):
    torch.manual_seed(0)
    model = Transformer()
    step = rewrite(model)
    parameters = list(model.parameters())
    tokens = torch.randint(0, 100, (2, 12))
    eager, rewritten = [], []
    for _ in range(rounds + 3):
        eager.append(step_time(model, tokens, parameters))
        rewritten.append(step_time(step, tokens, parameters))
    modules = len(list(model.modules()))
    best, mine = min(eager[3:]) * 1e6, min(rewritten[3:]) * 1e6
    print(f"step: eager {best / 1e3:.2f} ms, rewritten {mine / 1e3:.2f} ms, {rounds} alternating runs, minimum")
    print(f"added: {mine - best:+.0f} us; bound {100 + 0.1 * modules:.0f} us (100 us + .1 us x {modules} modules)")
    bookkeeping = [_timed(lambda: step._variant((tokens,), {})) for _ in range(200)]
    print(f"of these, finding the capture (signature and guards): {min(bookkeeping) * 1e6:.1f} us")


def _timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def captures():
    tokens = torch.randint(0, 100, (4, 24))
    cases = [
        ("transformer, 24 blocks", Transformer(), (tokens,), {}, 0.5),
        ("GRU cell loop, 256 steps", CellLoop(), (torch.randn(4, 256, 32), torch.zeros(4, 32)), {}, 0.2),
    ]
    try:
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=100, n_positions=64)
        cases.append(("GPT-2 (transformers)", GPT2LMHeadModel(config), (), {"input_ids": tokens, "labels": tokens}, 3))
    except ImportError:
        print("GPT-2 is left out: transformers is not installed")
    for name, model, args, kwargs, bound in cases:
        found = [capture(model.train(), args, kwargs, prove=False) for _ in range(3)]
        best = min(found, key=lambda captured: captured.seconds)
        nodes = len(best.graph.nodes)
        print(f"capture of {name}: {best.seconds:.2f} s ({best.front_end}, {nodes} nodes; bound {bound} s)")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, seed 0")
    overhead()
    captures()
