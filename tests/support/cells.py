"""Cells written as users write them: functions of (inputs, states, weights), and examples to run them on."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gru(inputs, states, weights):
    """The gates of nn.GRU, from two linear maps."""
    (x,), (h,), (w, u, b, d) = inputs, states, weights
    xr, xz, xn = F.linear(x, w, b).chunk(3, 1)
    hr, hz, hn = F.linear(h, u, d).chunk(3, 1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    n = torch.tanh(xn + r * hn)
    return ((1 - z) * n + z * h,)


def separate(inputs, states, weights):
    """The same from a linear map for each gate."""
    (x,), (h,), (wr, wz, wn, ur, uz, un) = inputs, states, weights
    r = torch.sigmoid(F.linear(x, wr) + F.linear(h, ur))
    z = torch.sigmoid(F.linear(x, wz) + F.linear(h, uz))
    n = torch.tanh(F.linear(x, wn) + r * F.linear(h, un))
    return (n + z * (h - n),)


def reset_first(inputs, states, weights):
    """The first form of the GRU: the reset gate acts before the product, on the joined vector."""
    (x,), (h,), (wrz, wn) = inputs, states, weights
    r, z = torch.sigmoid(F.linear(torch.cat([x, h], 1), wrz)).chunk(2, 1)
    n = torch.tanh(F.linear(torch.cat([x, r * h], 1), wn))
    return ((1 - z) * h + z * n,)


def sliced(inputs, states, weights):
    """Gates cut out by slices; a leak that is learnt; an output of its own."""
    (x,), (h,), (w, u, leak) = inputs, states, weights
    size = h.shape[1]
    gates = x @ w + h @ u
    g, n = torch.sigmoid(gates[:, :size]), torch.tanh(gates[:, size:])
    after = torch.sigmoid(leak) * h + g * n
    return after, F.relu(after) * x[:, :1]


def normed(inputs, states, weights):
    """Layer norm and a hidden layer: nothing there is element by element."""
    (x,), (h,), (w, u, v, scale, shift) = inputs, states, weights
    hidden = F.gelu(F.linear(torch.cat([x, h], 1), w))
    inner = F.layer_norm(F.linear(hidden, u), h.shape[1:], scale, shift)
    return (h + torch.tanh(F.linear(inner, v)),)


def gates_as_views(inputs, states, weights):
    """Gates in a dimension of their own, a product of the states with each other, two states."""
    (x,), (h, c), (w, u) = inputs, states, weights
    gates = (F.linear(x, w) + F.linear(h, u)).view(h.shape[0], 2, h.shape[1])
    f, g = torch.sigmoid(gates[:, 0]), torch.tanh(gates.select(1, 1))
    mixed = torch.bmm(h.unsqueeze(2), g.unsqueeze(1)).sum(2) / h.shape[1]
    c = f * c + (1 - f) * g
    return torch.tanh(c) + mixed, c


def fast_weights(inputs, states, weights):
    """A matrix as the state: linear attention."""
    (x,), (s,), (wq, wk, wv) = inputs, states, weights
    q, k, v = F.linear(x, wq), F.linear(x, wk), F.linear(x, wv)
    s = 0.9 * s + k.unsqueeze(2) * v.unsqueeze(1)
    return s, torch.einsum("bk,bkv->bv", q, s)


def example(cell, steps=6, rows=3, width=4, size=5, dtype=torch.float64, seed=0):
    """(inputs for all steps, states, weights) for one of the cells above."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape, scale=0.5):
        return scale * torch.randn(shape, generator=generator, dtype=dtype)

    both = width + size
    shapes = {
        gru: [(3 * size, width), (3 * size, size), (3 * size,), (3 * size,)],
        separate: [(size, width)] * 3 + [(size, size)] * 3,
        reset_first: [(2 * size, both), (size, both)],
        sliced: [(width, 2 * size), (size, 2 * size), (size,)],
        normed: [(7, both), (size, 7), (size, size), (size,), (size,)],
        gates_as_views: [(2 * size, width), (2 * size, size)],
        fast_weights: [(size, width), (size, width), (size, width)],
    }
    states = {gates_as_views: [(rows, size)] * 2, fast_weights: [(rows, size, size)]}.get(cell, [(rows, size)])
    return (
        (made(steps, rows, width, scale=1.0),),
        tuple(made(*shape) for shape in states),
        tuple(made(*shape) for shape in shapes[cell]),
    )


ALL = (gru, separate, reset_first, sliced, normed, gates_as_views, fast_weights)


def in_a_loop(cell, inputs, states, weights):
    """The cell called step by step: every state after every step and every output, time first."""
    found = []
    for given in zip(*(each.unbind(0) for each in inputs), strict=True):
        results = cell(given, states, weights)
        states = results[: len(states)]
        found.append(results)
    return tuple(torch.stack(each) for each in zip(*found, strict=True))
