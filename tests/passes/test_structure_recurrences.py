"""Recurrences: one cell on its own state, step after step; and what only looks like one."""

import functools

import pytest
import torch
import torch.nn.functional as F
from structures import FRONT_ENDS, WIDTH, Branch, Net, cases, linears, program_of, repeated
from torch import fx, nn

from rewriter.passes.annotate import Runner
from rewriter.passes.structure import analyse
from rewriter.shadow import preserved

B, T = 3, 4


def sequence():
    return torch.randn(B, T, WIDTH, generator=torch.Generator().manual_seed(0))


class HandCell(nn.Module):
    """A gated recurrent unit in its single operations."""

    def __init__(self):
        super().__init__()
        self.inputs, self.state = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, h):
        (a, b, c), (d, e, f) = self.inputs(x).chunk(3, -1), self.state(h).chunk(3, -1)
        reset, keep = torch.sigmoid(a + d), torch.sigmoid(b + e)
        return (1 - keep) * torch.tanh(c + reset * f) + keep * h


class Loop(nn.Module):
    """step(model, x_t, h) -> h, over time; returns every state, or the last one."""

    def __init__(self, step, every=False, **modules):
        super().__init__()
        self.step, self.every = step, every
        for name, module in modules.items():
            self.register_module(name, module)

    def forward(self, x):
        h = x.new_zeros(x.shape[0], WIDTH)
        states = []
        for t in range(T):
            h = self.step(self, x[:, t], h)
            states.append(h)
        return torch.stack(states, 1) if self.every else h


class Bare(nn.Module):
    """Parameters of the model's own, and something behind the cell."""

    def __init__(self):
        super().__init__()
        self.inputs, self.weight = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        h = x.new_zeros(x.shape[0], WIDTH)
        for t in range(T):
            h = F.dropout(torch.tanh(self.inputs(x[:, t]) + h @ self.weight.t()), 0.1, self.training)
        return h


class LongShort(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.cell, self.head = (
            nn.Embedding(10, WIDTH),
            nn.LSTMCell(WIDTH, WIDTH),
            nn.Linear(WIDTH, 10),
        )

    def forward(self, index):
        x = self.tokens(index)
        h = c = x.new_zeros(x.shape[0], WIDTH)
        outputs = []
        for t in range(T):
            h, c = self.cell(x[:, t], (h, c))
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


def gates(model, x, h):
    """Three layers that wait for each other."""
    both = torch.cat([x, h], -1)
    keep, reset = torch.sigmoid(model.keep(both)), torch.sigmoid(model.reset(both))
    return h + keep * (torch.tanh(model.new(torch.cat([x, reset * h], -1))) - h)


def call(model, x, h):
    return model.cell(x, h)


def gate_modules():
    return {name: nn.Linear(2 * WIDTH, WIDTH) for name in ("keep", "reset", "new")}


LOOPS = {
    "torch's cell": (lambda: Loop(call, cell=nn.GRUCell(WIDTH, WIDTH)), "cell", 4),
    "torch's cell, every state": (lambda: Loop(call, every=True, cell=nn.GRUCell(WIDTH, WIDTH)), "cell", 4),
    "a cell by hand": (lambda: Loop(call, cell=HandCell()), "cell", 4),
    "a cell by hand, every state": (lambda: Loop(call, every=True, cell=HandCell()), "cell", 4),
    "parameters": (Bare, "weight", 1),
    "gates": (lambda: Loop(gates, **gate_modules()), "keep, reset, new", 6),
    "behind the cell": (lambda: Loop(lambda m, x, h: torch.tanh(m.cell(x, h)) * 0.9, cell=HandCell()), "cell", 4),
}


LOOP_CASES = cases(LOOPS, ("torch's cell", "a cell by hand, every state", "parameters", "gates"))


@functools.cache
def built(name, front_end):
    return program_of(LOOPS[name][0]().eval(), sequence(), front_end=front_end)


@pytest.mark.parametrize(("name", "front_end"), LOOP_CASES)
def test_a_loop(name, front_end):
    _, cell, parameters = LOOPS[name]
    (found,) = analyse(built(name, front_end)).recurrences
    assert (found.kind, found.cell, found.steps, len(found.parameters)) == ("loop", cell, T, parameters)
    assert [len(state) for state in found.states] == [1] * T
    assert len(found.initial) == 1
    assert len(found.calls) == len(found.side_inputs) == T


@pytest.mark.parametrize(("name", "front_end"), LOOP_CASES)
def test_a_step_makes_the_next_state(name, front_end):
    """Each step run alone, from the state before it and its side inputs."""
    program = built(name, front_end)
    (found,) = analyse(program).recurrences
    with preserved(program.model), torch.no_grad():
        runner = Kept(program, program.graph)
        runner.run(sequence())
        for step in range(T):
            before = found.states[step - 1] if step else found.initial
            graph, mapping = fx.Graph(), {}
            for source in dict.fromkeys((*before, *found.side_inputs[step])):
                mapping[program.node(source)] = graph.placeholder(source)
            for node in map(program.node, found.calls[step]):
                mapping[node] = graph.node_copy(node, mapping.__getitem__)
            graph.output(tuple(mapping[program.node(state)] for state in found.states[step]))
            given = [runner.seen[source] for source in dict.fromkeys((*before, *found.side_inputs[step]))]
            (state,) = Runner(program, graph).run(*given)
            assert torch.equal(state, runner.seen[found.states[step][0]])


class Kept(Runner):
    def __init__(self, program, graph):
        super().__init__(program, graph)
        self.seen = {}

    def run_node(self, n):
        self.seen[n.name] = super().run_node(n)
        return self.seen[n.name]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_two_states(front_end):
    program = program_of(LongShort(), torch.randint(0, 10, (B, T)), front_end=front_end)
    (found,) = analyse(program).recurrences
    assert (found.cell, found.steps) == ("cell", T)
    last = 2 if front_end == "fx" else 0  # the exported graph has no trace of the cell state that nobody reads
    assert [len(state) for state in found.states] == [2] * (T - 1) + [last]
    assert len(found.initial) == 2


def test_side_inputs_are_the_time_steps():
    program = program_of(Loop(call, cell=HandCell()), sequence())
    (found,) = analyse(program).recurrences
    assert all(len(sides) == 1 for sides in found.side_inputs[1:])
    assert {program.node(name).target.__name__ for sides in found.side_inputs[1:] for name in sides} == {"getitem"}


def test_stacked_cells_are_two_recurrences():
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.lower, self.upper = nn.GRUCell(WIDTH, WIDTH), nn.GRUCell(WIDTH, WIDTH)

        def forward(self, x):
            lower = upper = x.new_zeros(x.shape[0], WIDTH)
            for t in range(T):
                lower = self.lower(x[:, t], lower)
                upper = self.upper(lower, upper)
            return upper

    found = analyse(program_of(Stacked(), sequence())).recurrences
    assert [(each.cell, each.steps) for each in found] == [("lower", T), ("upper", T)]


def test_one_layer_called_again_is_a_chain_and_a_recurrence():
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nn.Linear(WIDTH, WIDTH), Branch()

        def forward(self, x):
            x = self.stem(x)
            for _ in range(4):
                x = x + self.block(x)
            return x

    structure = analyse(program_of(Again(), torch.randn(B, WIDTH)))
    (chain,), (found,) = structure.chains, structure.recurrences
    assert len(chain.segments) == found.steps == 4
    assert [state for (state,) in found.states] == list(chain.values[1:])
    assert [(repeat.count, repeat.shared) for repeat in chain.repeats] == [(4, True)]
    own = analyse(program_of(Net(repeated(lambda x, f: x + f(x)), blocks=4), torch.randn(B, WIDTH)))
    assert own.recurrences == ()
    assert [(repeat.count, repeat.shared) for repeat in own.chains[0].repeats] == [(4, False)]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_torchs_recurrent_modules(front_end):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(WIDTH, WIDTH, 2, batch_first=True)
            self.lstm, self.rnn = nn.LSTM(WIDTH, WIDTH), nn.RNN(WIDTH, WIDTH, bidirectional=True)

        def forward(self, x):
            x = self.gru(x)[0].transpose(0, 1)
            return self.rnn(self.lstm(x)[0])[0].transpose(0, 1)

    found = analyse(program_of(Three(), sequence(), front_end=front_end)).recurrences
    assert [(each.cell, each.kind, each.steps) for each in found] == [
        ("gru", "GRU", T),
        ("lstm", "LSTM", T),
        ("rnn", "RNN", T),
    ]
    assert [len(each.parameters) for each in found] == [8, 4, 8]


class Attentive(nn.Module):
    """Every step reads all states before it."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x):
        h, states = x.new_zeros(x.shape[0], WIDTH), []
        for t in range(T):
            states.append(self.cell(x[:, t], h))
            h = torch.stack(states).mean(0)
        return h


class Siamese(nn.Module):
    """One net on two inputs."""

    def __init__(self):
        super().__init__()
        self.net = Branch()

    def forward(self, x):
        return self.net(x[:, 0]) - self.net(x[:, 1])


class OneNorm(nn.Module):
    """One norm between blocks of their own."""

    def __init__(self):
        super().__init__()
        self.norm, self.layers = nn.LayerNorm(WIDTH), linears(4)

    def forward(self, x):
        x = x[:, 0]
        for layer in self.layers:
            x = torch.tanh(layer(self.norm(x)))
        return x


class Tied(nn.Module):
    """An embedding that is the head too."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x[:, 0], self.weight)), self.weight.t())


@pytest.mark.parametrize("model", [Attentive, Siamese, OneNorm, Tied])
def test_what_is_no_recurrence(model):
    assert analyse(program_of(model(), sequence())).recurrences == ()


def test_a_loop_may_start_from_a_constant():
    class Zeros(Loop):
        def forward(self, x):
            h = torch.zeros(1, WIDTH)
            for t in range(T):
                h = self.step(self, x[:, t], h)
            return h

    program = program_of(Zeros(call, cell=HandCell()), sequence())
    (found,) = analyse(program).recurrences
    assert (found.steps, [program.node(name).op for name in found.initial]) == (T, ["get_attr"])
