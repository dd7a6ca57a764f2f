"""The analysis is fast, and takes time in proportion to the graph, for any shape of graph."""

import time

import pytest
import torch
from nets import Transformer
from structures import graph_program, program_of

from rewriter.passes.structure import analyse


def residual(count):
    def build(x, f, add, cat):
        for _ in range(count // 3):
            x = add(x, f(f(x)))
        return x

    return build


def plain(count):
    def build(x, f, add, cat):
        for _ in range(count):
            x = f(x)
        return x

    return build


def first_again(count):
    def build(x, f, add, cat):
        first = x
        for _ in range(count // 2):
            x = add(f(x), first)
        return x

    return build


def halfway_back(count):
    """Skips of all lengths, none inside another."""

    def build(x, f, add, cat):
        values = [x]
        for number in range(count // 2):
            values.append(add(f(values[-1]), values[number // 2]))
        return values[-1]

    return build


def ladder(count):
    """Skips of all lengths, each inside the next."""

    def build(x, f, add, cat):
        kept = []
        for _ in range(count // 3):
            x = f(x)
            kept.append(x)
        for _ in range(count // 3):
            x = f(add(x, kept.pop()))
        return x

    return build


def towers(count):
    def build(x, f, add, cat):
        outputs = []
        for _ in range(60):
            y = f(x)
            for _ in range(count // 120):
                y = add(y, f(y))
            outputs.append(y)
        return cat(*outputs)

    return build


SHAPES = (residual, plain, first_again, halfway_back, ladder, towers)


def seconds(program):
    """CPU time of the quicker of two runs."""
    found = []
    for _ in range(2):
        start = time.process_time()
        analyse(program)
        found.append(time.process_time() - start)
    return min(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_time_grows_with_the_graph(shape):
    """Five times the nodes: five times the time where it is linear, 25 times where it is quadratic."""
    small, large = (graph_program(shape(count)) for count in (500, 2_500))
    assert seconds(large) < 12 * seconds(small)


def test_ten_thousand_nodes():
    program = graph_program(residual(10_000))
    start = time.process_time()
    assert len(analyse(program).chains[0].segments) == 3_333
    assert time.process_time() - start < 5  # about one second


def test_a_transformer_of_24_layers():
    program = program_of(Transformer(24), torch.randint(0, 20, (2, 8)))
    assert len(program.graph.nodes) > 600
    assert len(analyse(program).chains[0].residual) == 48
    assert seconds(program) < 2  # a tenth of a second
