"""What annotate says of each value: rows from two batch sizes, shapes, FLOPs, saved bytes, queries."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rewriter import BlackBox, CallableBox, RewriteError, rewrite
from rewriter.passes.program import Cost, Rows, Value

B, T, D = 4, 3, 5


def program_of(model, *args, plan=()):
    return rewrite(model, plan, example=args).latest.program


class Tokens(nn.Module):
    """(B, T, D) in: rows in dimension 0, three to a row in (B * T, D), in dimension 1 transposed, nowhere in a mean."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.table = nn.Parameter(torch.ones(T, D))

    def forward(self, x):
        y = self.linear(x.flatten(0, 1))
        z = y.unflatten(0, (-1, T)).transpose(0, 1)
        return z * self.table.unsqueeze(1), y.mean()


def test_where_rows_live():
    program = program_of(Tokens(), torch.randn(B, T, D))
    values = program.values
    assert values["x"] == Value((B, T, D), torch.float32, Rows(0), False)
    assert values["flatten"] == Value((B * T, D), torch.float32, Rows(0, T), False)
    assert values["linear"] == Value((B * T, D), torch.float32, Rows(0, T), True)
    assert values["transpose"] == Value((T, B, D), torch.float32, Rows(1), True)
    assert values["table"] == Value((T, D), torch.float32, None, True)
    assert values["mean"] == Value((), torch.float32, None, True)
    assert [values[name].width for name in ("x", "linear", "transpose", "table", "mean")] == [15, 15, 15, 15, 1]


def test_a_size_equal_to_the_batch_is_not_taken_for_rows():
    """The second batch size tells a 4 that is the batch from a 4 that is a feature."""
    program = program_of(nn.Sequential(nn.Linear(B, B), nn.Flatten(0)), torch.randn(B, B))
    assert program.values["_0"].rows == Rows(0)
    assert program.values["_1"].rows == Rows(0, B)


def test_one_row_is_doubled():
    assert program_of(Tokens(), torch.randn(1, T, D)).values["linear"].rows == Rows(0, T)


def test_a_model_of_one_batch_size_only():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, D)
            self.offset = nn.Parameter(torch.zeros(B, D))

        def forward(self, x):
            return self.linear(x) + self.offset

    values = program_of(Fixed(), torch.randn(B, D)).values
    assert values["linear"].rows == Rows(0)


def test_texts():
    program = program_of(Tokens(), torch.randn(B, T, D))
    shown = {line.split(" = ")[0]: line for line in str(program).splitlines()}
    assert shown["linear"] == "linear = call_module linear(flatten) : float32[12, 5] rows dim 0 x3"
    assert shown["transpose"] == "transpose = call_method transpose(unflatten) : float32[3, 4, 5] rows dim 1"
    assert shown["mean"] == "mean = call_method mean(linear) : float32[]"


def test_tuples_integers_and_non_tensors():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(D, 2, batch_first=True)

        def forward(self, x, ids):
            out, (h, _) = self.lstm(x)
            return out[ids.argmax()] * x.size(1), h

    values = program_of(Mixed(), torch.randn(B, T, D), torch.arange(3)).values
    out, (h, c) = values["lstm"]
    assert (out.rows, h.rows, c.rows) == (Rows(0), Rows(1), Rows(1))
    assert values["ids"] == Value((3,), torch.int64, None, False)
    assert values["argmax"].dtype == torch.int64
    assert values["size"] is None


def test_flops_and_saved_bytes_against_a_hand_count():
    """Linear: 2 B n m FLOPs, keeps its input; tanh keeps its output, which the next Linear keeps too (counted once)."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.ReLU())
    program = program_of(model, torch.randn(16, 6))
    costs = program.costs
    assert costs["_0"] == Cost(flops=2 * 16 * 6 * 8, saved=4 * 16 * 6)
    assert costs["_1"] == Cost(flops=0, saved=4 * 16 * 8)
    assert costs["_2"] == Cost(flops=2 * 16 * 8 * 4, saved=0)
    assert costs["_3"] == Cost(flops=0, saved=4 * 16 * 4)
    (segment,) = program.segments
    assert segment.cost == Cost(flops=2 * 16 * (48 + 32), saved=4 * 16 * (6 + 8 + 4))


def test_saved_bytes_are_what_the_tape_keeps():
    """The same count from outside, by saved-tensor hooks around the user's own forward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4), nn.LogSoftmax(-1))
    x = torch.randn(16, 6)
    fixed = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in fixed:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    assert sum(cost.saved for cost in program_of(model, x).costs.values()) == sum(kept.values())
    assert output.requires_grad


def test_queries():
    class Boxed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.box = nn.Linear(D, D), CallableBox(lambda x: x[:, :2])

        def forward(self, x):
            return self.box(self.linear(x))

    program = program_of(Boxed(), torch.randn(B, D), plan=BlackBox("box"))
    assert program.costs["box"] == Cost(queries=B)
    assert [segment.cost.queries for segment in program.segments] == [0, B]


def test_buffers_generators_and_grads_are_left_alone():
    model = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D), nn.Dropout())
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    program_of(model, torch.randn(B, D, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.rand(1), expected)
    assert model[1].num_batches_tracked == 0
    assert torch.equal(model[1].running_mean, torch.zeros(D))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_in_another_dimension_are_refused_for_a_box():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.box = nn.Linear(D, D), CallableBox(lambda x: x + 1)

        def forward(self, x):
            return F.relu(self.box(self.linear(x).t()).t())

    with pytest.raises(RewriteError, match=r"dimension 1[\s\S]*transpose"):
        program_of(Transposed(), torch.randn(B, D), plan=BlackBox("box"))


class Effects(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.drop, self.norm = nn.Linear(D, D), nn.Dropout(0.5), nn.BatchNorm1d(D)
        self.box = CallableBox(np.tanh)

    def forward(self, x):
        y = self.norm(self.drop(self.linear(x)))
        z = y + 1
        z.mul_(2)
        return z + self.box(x) + torch.rand_like(x).relu()


def test_effects_are_draws_writes_and_boxes():
    assert program_of(Effects(), torch.randn(B, D)).effects == {"drop", "norm", "mul_", "box", "rand_like"}


def test_effects_of_an_exported_graph():
    class Sized(Effects):
        def forward(self, x):
            return super().forward(x) + torch.rand(D)  # of a fixed size: fx would freeze it

    effects = program_of(Sized(), torch.randn(B, D)).effects
    kinds = {name.rstrip("_0123456789") for name in effects}
    assert kinds == {"dropout", "batch_norm", "add", "mul", "evaluate_box", "rand_like", "rand"}  # add: batches counted
