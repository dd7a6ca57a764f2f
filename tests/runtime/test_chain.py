"""A chain's run: vjps of single blocks, apart and at once, and what they gather."""

import pytest
import torch
from chains import PostNorm, Small, Stack

from rewriter import Highway, Plan, rewrite
from rewriter.runtime.chain import Run
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.random import Key
from rewriter.runtime.rule import Call


def run_of(block, needs_input=True, taped=True):
    """(run, blocks, the chain's input, a cotangent of a block's output)."""
    model = Stack(block, 3).double()
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    step = rewrite(model, Plan([Highway("blocks", tape="never")]), example=(x,))
    (region,) = step.latest.emitted.regions.values()
    chain = region.rule.chain
    given = torch.randn(4, 12, dtype=torch.float64)
    parameters = chain.segment.trainable()
    needed = (needs_input, *(True for _ in parameters))
    run = Run(chain, Call("blocks", Key(0, 0, "blocks"), needed=needed), (given,), [p.detach() for p in parameters])
    for number in range(3):
        run.block(number, taped)
    return run, list(model.blocks), given, torch.randn(4, 12, dtype=torch.float64)


def expected(block, x, cotangent):
    """(stream, branch, parameters) by autograd; the branch is what the block does but for its identity."""
    alias = x.detach().requires_grad_()
    found = torch.autograd.grad(block(alias), [alias, *block.parameters()], cotangent)
    return found[0], found[0] - cotangent, found[1:]


@pytest.mark.parametrize("block", [Small, PostNorm])
def test_branch_and_skip_make_the_whole(block):
    run, blocks, given, cotangent = run_of(block)
    ledger = Ledger()
    x = blocks[1](blocks[0](given)).detach()
    whole, branch, parameters = expected(blocks[2], x, cotangent)
    parts = [run.pull(2, [cotangent], ledger, keep=True, stream=s, rest=False) for s in ("branch", "skip")]
    assert torch.allclose(parts[0] + parts[1], whole, rtol=1e-13)
    assert ledger.total("vjps") == (1 if run.chain.blocks[2].identity else 2)
    if block is Small:
        assert torch.allclose(parts[0], branch, rtol=1e-12, atol=1e-14)
        assert parts[1] is cotangent
    assert not run.gradients
    assert torch.equal(run.pull(2, [cotangent], ledger, keep=False), whole)
    for own, gradient in zip(blocks[2].parameters(), parameters, strict=True):
        assert torch.equal(run.gradients[id(own)], gradient)
    found = run.collected((True,) * (1 + len(run.chain.segment.trainable())))
    assert sum(each is not None for each in found) == len(parameters)
    assert not run.gradients
    assert run.pull(2, [cotangent], ledger, keep=False) is None  # its tape is gone


def test_several_blocks_at_once_are_as_one_by_one():
    run, *_, cotangent = run_of(Small)
    ledger = Ledger()
    alone = [run.pull(n, [cotangent * n], ledger, keep=True) for n in (1, 2)]
    gathered = dict(run.gradients)
    run.gradients.clear()
    asked = [(n, [cotangent * n], "both") for n in (1, 2)]
    together = run.pull_all(asked, ledger, keep=True, rest=True)
    assert all(map(torch.equal, alone, together))
    assert gathered.keys() == run.gradients.keys()
    assert all(torch.equal(gathered[key], run.gradients[key]) for key in gathered)
    assert ledger.total("vjps") == 4


def test_a_parameter_that_two_blocks_share_is_counted_once():
    block = Small()
    run, *_, cotangent = run_of(lambda: block)
    ledger = Ledger()
    for number in (1, 2):
        run.pull(number, [cotangent], ledger, keep=True)
    alone = dict(run.gradients)
    run.gradients.clear()
    run.pull_all([(n, [cotangent], "both") for n in (1, 2)], ledger, keep=True, rest=True)
    assert all(torch.allclose(alone[key], run.gradients[key], rtol=1e-12) for key in alone)


def test_what_is_not_needed_is_not_taped():
    run, *_, cotangent = run_of(Small, taped=False)
    assert not any(map(run.taped, range(3)))
    assert run.pull(0, [cotangent], Ledger(), keep=False) is None
    run, *_ = run_of(Small, needs_input=False)
    assert run.pull(0, [cotangent], Ledger(), keep=False) is None  # parameters only: nothing goes on
    assert run.gradients


def test_nothing_is_pulled_for_nothing():
    run, *_ = run_of(Small)
    ledger = Ledger()
    assert run.pull(1, [None], ledger, keep=True) is None
    assert ledger.total("vjps") == 0


def test_a_freed_tape_is_gone():
    run, *_ = run_of(Small)
    run.free(1)
    assert not run.taped(1)
    assert run.taped(2)
