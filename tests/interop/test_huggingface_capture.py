"""Hugging Face models are captured by torch.export and train exactly as eager does, dropout and loss included."""

import pytest
import torch
from oracle import compare, run_captured, snapshot

pytest.importorskip("transformers")
pytestmark = pytest.mark.interop

from zoo import huggingface  # noqa: E402

from rewriter.capture import capture  # noqa: E402
from rewriter.signature import signature  # noqa: E402


@pytest.mark.parametrize("entry", huggingface(), ids=lambda entry: entry.name)
def test_capture(entry):
    torch.manual_seed(0)
    model = entry.make_module()
    args, kwargs = entry.make_inputs()
    before = snapshot(model)
    captured = capture(model, args, kwargs)
    assert repr(snapshot(model)) == repr(before)
    assert captured.front_end == "export"
    assert captured.opaque == {}
    assert captured.notes == ()
    assert compare(model, captured, args, kwargs) is None
    rows = {name: torch.cat([value, value, value]) for name, value in kwargs.items()}
    assert captured.guards.reason(model, signature((), rows)[1]) is None
    assert compare(model, captured, (), rows, steps=1) is None
    output = run_captured(model, captured, args, kwargs)
    assert type(output) is type(model(*args, **kwargs))
    names = dict(model.named_parameters()) | dict(model.named_buffers())
    for node in captured.graph.nodes:
        if node.op == "get_attr" and not node.target.startswith("_constants"):
            assert node.target in names
        if node.op not in ("placeholder", "output"):
            assert isinstance(node.meta["block"], tuple)
