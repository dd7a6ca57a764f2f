"""A clean graph: what is dropped, and where attributes are read."""

import torch
from exact_entry import Exact
from torch import nn

from rewriter import BlackBox, CallableBox, Plan, rewrite

X = torch.linspace(-1, 1, 15).reshape(5, 3)


def after(model, name="normalise", plan=(), x=X):
    """The program's text after one pass."""
    step = rewrite(model, plan, example=(x,))
    return next(line.text for line in step.history if line.name == name)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.skip = nn.Identity()

    def forward(self, x):
        return self.first(x) + self.skip(x)


def test_identities_are_dropped():
    assert after(Residual()) == "\n".join(
        (
            "x = placeholder()",
            "first = call_module first(x)",
            "add = call_function add(first, x)",
            "output = output(add)",
        )
    )


def test_an_identity_with_a_hook_or_a_subclass_stays():
    class Own(nn.Identity):
        def forward(self, x):
            return x * 2

    hooked, other = Residual(), Residual()
    hooked.skip.register_forward_hook(lambda module, inputs, output: output * 3)
    other.skip = Own()
    assert "call_module skip" in after(hooked)
    assert "mul = call_function mul(x)" in after(other)


class Tied(nn.Module):
    """One parameter under two names, read by the root twice and by a part that holds it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.part = Scaled(self.scale)

    def forward(self, x):
        return self.part(x * self.scale) + self.scale


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scale = scale

    def forward(self, x):
        return self.linear(x) * self.scale


def test_each_use_has_its_own_read_and_tied_parameters_share_a_name():
    model = Tied()
    assert after(model) == "\n".join(
        (
            "x = placeholder()",
            "scale = get_attr scale()",
            "mul = call_function mul(x, scale)",
            "part_linear = call_module part.linear(mul)",
            "scale_1 = get_attr scale()",
            "mul_1 = call_function mul(part_linear, scale_1)",
            "scale_2 = get_attr scale()",
            "add = call_function add(mul_1, scale_2)",
            "output = output(add)",
        )
    )
    program = rewrite(model, Exact("part"), example=(X,)).latest.program
    assert program.regions[0].owned == ("part_linear", "scale_1", "mul_1")


class Passed(nn.Module):
    """A parameter of the root is passed to a part, which uses it twice."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.part = Uses()

    def forward(self, x):
        return self.part(x, self.scale)


class Uses(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x, scale):
        return self.linear(x) * scale + scale


def test_what_is_passed_to_a_part_is_read_before_it_and_is_its_input():
    assert after(Passed()).splitlines()[1:3] == [
        "scale = get_attr scale()",
        "part_linear = call_module part.linear(x)",
    ]
    program = rewrite(Passed(), Exact("part"), example=(X,)).latest.program
    assert program.regions[0].owned == ("part_linear", "mul", "add")
    assert program.segments[1].inputs == ("x", "scale")


def test_a_read_of_a_box_argument_is_outside_the_box():
    class Simulator(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Linear(3, 3)
            self.rates = nn.Parameter(torch.ones(3))
            self.box = CallableBox(lambda x, rates: x * rates, shared=[1])

        def forward(self, x):
            return self.box(self.before(x) * self.rates, self.rates)

    program = rewrite(Simulator(), Plan([BlackBox("box")]), example=(X,)).latest.program
    assert program.regions[0].owned == ("box",)


def test_an_output_that_is_a_parameter_stays():
    class Returns(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x * self.scale, self.scale

    model = Returns()
    step = rewrite(model, example=(X,))
    assert step(X)[1] is model.scale


def test_draws_and_writes_stay_though_nobody_reads_them():
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)
            self.drop = nn.Dropout(0.5)

        def forward(self, x):
            self.norm(x)
            torch.rand_like(x)
            return self.drop(x)

    model = Draws()
    step = rewrite(model, example=(X,))
    torch.manual_seed(0)
    first = step(X)
    assert model.norm.num_batches_tracked == 1
    torch.manual_seed(0)
    assert torch.equal(first, model(X))
