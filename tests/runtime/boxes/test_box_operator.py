"""The one operator behind all boxes: graphs, gradients that do not exist, surrogate and memory, non-finite values."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.runtime.boxes import Box, CallableBox, OnnxBox
from rewriter.runtime.boxes.operator import evaluate_box, memoised, surrogate_pullback
from rewriter.runtime.errors import BoxError

Array = np.ndarray[Any, Any]


class Model(nn.Module):
    def __init__(self, box: Box) -> None:
        super().__init__()
        self.encoder, self.box, self.head = nn.Linear(4, 3), box, nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.box(self.encoder(x)))
        return y


@pytest.fixture(params=["onnx", "callable"])
def box(request: pytest.FixtureRequest, doubling: Path) -> Box:
    return OnnxBox(doubling) if request.param == "onnx" else CallableBox(lambda x: 2 * x)


def box_nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is torch.ops.rewriter.evaluate_box.default]


def test_export_shows_one_node_and_keeps_the_batch_free(box: Box) -> None:
    model, x = Model(box), torch.randn(5, 4)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: torch.export.Dim.DYNAMIC}}, strict=False)
    assert len(box_nodes(program.graph)) == 1
    for rows in (5, 9):
        x = torch.randn(rows, 4)
        assert torch.equal(program.module()(x), model(x))


def test_compile_shows_one_node(box: Box) -> None:
    graphs: list[fx.Graph] = []

    def backend(module: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(module.graph)
        return module.forward

    model, x = Model(box), torch.randn(5, 4)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))
    assert [len(box_nodes(graph)) for graph in graphs] == [1]
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_fx_shows_one_node(box: Box) -> None:
    class Leaves(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, Box) or super().is_leaf_module(m, module_qualified_name)

    model, x = Model(box), torch.randn(5, 4)
    graph = Leaves().trace(model)
    assert [node.target for node in graph.nodes if node.op == "call_module"] == ["encoder", "box", "head"]
    assert torch.equal(fx.GraphModule(model, graph)(x), model(x))
    traced = fx.symbolic_trace(model)  # after a call the number of outputs is known
    assert len(box_nodes(traced.graph)) == 1
    assert torch.equal(traced(x), model(x))


def test_modes_and_fake_tensors_see_the_operator(box: Box) -> None:
    """Eager calls on plain tensors skip the dispatcher; whoever looks on must still see the call."""

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    seen: list[Any] = []
    x = torch.randn(5, 3, requires_grad=True)
    with Log():
        assert torch.equal(box(x), 2 * x)
    assert seen.count(torch.ops.rewriter.evaluate_box.default) == 1
    with FakeTensorMode() as mode:
        shape = box(mode.from_tensor(torch.ones(7, 3, dtype=torch.float64)))
    assert (type(shape), shape.shape, shape.dtype) == (FakeTensor, (7, 3), torch.float64)


def test_shapes_that_zeros_cannot_tell() -> None:
    def function(x: Array) -> Array:
        if not x.all():
            raise ValueError("zero")
        return 1 / x

    model = Model(CallableBox(function))
    x = torch.ones(5, 4)
    with pytest.raises(Exception, match="call the box once on real inputs"):
        torch.export.export(model, (x,), strict=False)
    model(x)
    assert len(box_nodes(torch.export.export(model, (x,), strict=False).graph)) == 1


def test_no_rows(box: Box) -> None:
    assert box(torch.ones(0, 3)).shape == (0, 3)


def test_backward_is_refused_with_the_remedy(box: Box) -> None:
    loss = Model(box)(torch.randn(5, 4)).sum()
    with pytest.raises(BoxError, match="has no gradient") as caught:
        loss.backward()
    assert box.label in str(caught.value)
    assert "Plan([BlackBox(" in caught.value.remedy


def test_nothing_to_differentiate_is_no_error(box: Box) -> None:
    model = Model(box)
    model.encoder.requires_grad_(False)
    model(torch.randn(5, 4)).sum().backward()
    assert model.head.weight.grad is not None
    x = torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        assert not box(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(box(x), 2 * x)
    for output in box.evaluate(x):
        assert not output.requires_grad


def test_integer_inputs_and_outputs_carry_no_gradient() -> None:
    box = CallableBox(lambda x, k: (x * k[:, None], k))
    x, k = torch.randn(4, 2, requires_grad=True), torch.arange(4)
    y, same = box(x, k)
    assert (y.requires_grad, same.requires_grad) == (True, False)
    only = CallableBox(lambda k: k / 2)(k)
    assert (only.dtype, only.requires_grad) == (torch.float32, False)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.vmap(f)(x[None]),
        lambda f, x: torch.func.grad(lambda a: f(a).sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.vjp(f, x),
    ],
)
def test_transforms_are_refused(box: Box, transform: Callable[..., Any]) -> None:
    with pytest.raises(BoxError, match=r"inside a transform of torch.func"):
        transform(box, torch.randn(4, 3))


def test_forward_mode_tangents_are_not_dropped_in_silence(box: Box) -> None:
    x = torch.randn(4, 3)
    with forward_ad.dual_level():
        assert torch.equal(box(x), 2 * x)
        with pytest.raises(BoxError, match="inside a transform"):
            box(forward_ad.make_dual(x, x))


def test_surrogate_pullback_is_what_it_says() -> None:
    box = CallableBox(lambda x, k, theta, z: (x[:, :2] + theta.sum(), k, x.sum(1) * z[:, 0, 0]), shared=[2])
    draw = torch.Generator().manual_seed(0)
    x, z = torch.randn(5, 3, generator=draw), torch.randn(5, 2, 2, generator=draw, dtype=torch.float64)
    theta, k = torch.randn(4, generator=draw), torch.arange(5)
    tensors = [tensor.requires_grad_() for tensor in (x, theta, z)]
    with surrogate_pullback():
        first, _, third = box(x, k, theta, z)
    v, w = torch.randn(first.shape, generator=draw), torch.randn(third.shape, generator=draw)
    found = torch.autograd.grad([first, third], tensors, [v, w])
    sums = v.sum(1) / 1 + w / 3
    torch.testing.assert_close(found[0], (sums / (1 * 3))[:, None].expand(5, 3))
    torch.testing.assert_close(found[1], (sums.sum() / (3 * 4)).expand(4))
    torch.testing.assert_close(found[2], (sums.double() / (4 * 4))[:, None, None].expand(5, 2, 2))
    swapped = w.mean() / 1 + v.sum(1) / 3
    assert not torch.allclose(found[0][:, 0], swapped / 3, atol=1e-3)  # which output is which is visible


def test_surrogate_lasts_as_long_as_its_context(box: Box) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    with surrogate_pullback():
        inside = box(x)
    outside = box(x)
    inside.sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 3))  # not 2, the derivative: it is no derivative
    with pytest.raises(BoxError):
        outside.sum().backward()


def test_memoised_counts() -> None:
    calls: list[int] = []

    def function(x: Array, k: Array) -> Array:
        calls.append(len(x))
        return x + k[:, None]

    box, x, k = CallableBox(function, nonfinite="keep"), torch.randn(4, 2), torch.arange(4)
    x[0, 0] = torch.nan  # equal bit for bit all the same
    with memoised():
        first = box(x, k)
        kept = first.clone()
        first.zero_()
        torch.testing.assert_close(box(x.clone(), k), kept, equal_nan=True, rtol=0, atol=0)
        box(x.clone().requires_grad_(), k)
        assert calls == [4]
        box(x + 1, k)
        box(x, k + 1)
        box(x[:3], k[:3])
        CallableBox(function, nonfinite="keep")(x, k)
        box.evaluate(x.double(), k)
        assert calls == [4, 4, 4, 3, 4, 4]
    box(x, k)
    with memoised():
        box(x, k)
    assert len(calls) == 8


def broken(x: Array) -> tuple[Array, Array, Array]:
    return np.where(x < 0, np.nan, x), np.where(x[:, 0] > 5, np.inf, 1.0), np.arange(len(x))


def test_rows_that_are_not_finite() -> None:
    x = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [9.0, 1.0], [3.0, -3.0]])
    with pytest.raises(BoxError, match="2 of 4 rows of output 0 of broken, 1 of 4 rows of output 1 of broken"):
        CallableBox(broken)(x)
    assert torch.equal(CallableBox(broken)(x[:1])[0], x[:1])
    raw = CallableBox(broken).evaluate(x)
    assert raw[0].isnan().sum() == 2
    first, second, count = CallableBox(broken, nonfinite="zero")(x)
    assert first.tolist() == [[1, 2], [0, 0], [0, 0], [0, 0]]
    assert second.tolist() == [1, 0, 0, 0]
    assert count.tolist() == [0, 1, 2, 3]
    kept = CallableBox(broken, nonfinite="keep")(x)
    assert (kept[0].isnan().sum(), kept[1].isinf().sum()) == (2, 1)


def test_large_finite_numbers_are_finite() -> None:
    box, x = CallableBox(lambda x: x, dtype=torch.float32), torch.full((2, 3), 3e38)
    assert torch.equal(box(x), x)


def test_handle_of_a_box_that_is_gone() -> None:
    box: Box = CallableBox(lambda x: x)
    handle = box._handle
    assert torch.equal(evaluate_box(handle, [torch.ones(1, 1)])[0], torch.ones(1, 1))
    del box
    gc.collect()
    with pytest.raises(BoxError, match="no longer exists"):
        evaluate_box(handle, [torch.ones(1, 1)])
