"""The shadow step: proves a captured graph against the user's own forward, values, gradients and state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.runtime.boxes.operator import memoised, surrogate_pullback

from .guards import Guards
from .signature import flatten, tree_of_call
from .untouched import World, seed_everything

Forward = Callable[[tuple[Any, ...], dict[str, Any]], Any]
_SEEDS = (1_000_003, 2_000_003)
_TOLERANCE = 1e3  # in units of the dtype's eps


class MismatchError(Exception):
    """The graph does not say what the model does: what differs first."""


@dataclass
class _Outcome:
    """What one run leaves behind."""

    structure: Any = None
    outputs: list[Tensor] = field(default_factory=list)
    gradients: dict[str, Tensor | None] | None = None
    state: dict[str, Any] = field(default_factory=dict)


def prove(
    model: nn.Module, run: Forward, args: tuple[Any, ...], kwargs: Mapping[str, Any], guards: Guards
) -> tuple[str, ...]:
    """Compares a captured graph with the model: two random states on the example, one on another batch size.

    run: (args, kwargs) -> output, by the graph.
    Compared bit by bit, or to 1e3 eps relative to the largest entry: outputs and their structure, gradients of a fixed
    random projection to every parameter and floating input (None-ness too), and what the run leaves in buffers and
    attributes. Raises MismatchError naming what differs first; what the model itself raises is passed on.
    Returns notes on what could not be compared. Everything is as before afterwards.
    """
    with preserved(model) as world, trial_run(), torch.enable_grad():
        trial = _Trial(model, world, args, kwargs)
        for seed in _SEEDS:
            trial.compare(run, trial.tensors, seed, "on the example")
        other = _other_batch(trial.tensors)
        if other is None or guards.reason(model, other) is not None:
            trial.notes.add("not compared at another batch size: the graph is for this one only")
        elif (refusal := trial.refusal(other)) is not None:
            trial.notes.add(f"not compared at another batch size: the model fails on {len(other[0])} rows ({refusal})")
        else:
            trial.compare(run, other, _SEEDS[1], f"on {len(other[0])} rows instead of {len(trial.tensors[0])}")
    return tuple(sorted(trial.notes))


class _Trial:
    """One model, one example, and runs of both from the same state."""

    def __init__(self, model: nn.Module, world: World, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.model, self.world = model, world
        self.tensors, self.tree = tree_of_call(args, kwargs)
        self.notes: set[str] = set()
        # A leaf that requires gradients cannot be written in place.
        self._differentiate_inputs = True
        self._differentiate_inputs = self.refusal(self.tensors) is None

    def refusal(self, tensors: Sequence[Tensor]) -> str | None:
        """Why the model itself does not run on these tensors; None where it does."""
        try:
            self.eager(tensors, _SEEDS[0])
        except Exception as error:
            return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        return None

    def compare(self, run: Forward, tensors: Sequence[Tensor], seed: int, where: str) -> None:
        expected = self.eager(tensors, seed)
        try:
            found = self._run(run, tensors, seed)
        except Exception as error:
            text = next(iter(str(error).splitlines()), "")
            raise MismatchError(f"the graph fails {where}: {type(error).__name__}: {text}") from error
        if expected.gradients is None:
            self.notes.add("gradients not compared: the model differentiates through reentrant checkpoints")
        difference = _difference(expected, found)
        if difference is None:
            return
        again = _difference(expected, self.eager(tensors, seed))
        if again is not None:
            raise MismatchError(f"the model is not reproducible: run twice from the same state, {again}")
        raise MismatchError(f"{where}, {difference}")

    def eager(self, tensors: Sequence[Tensor], seed: int) -> _Outcome:
        """The model's own forward. Not its call: the root's hooks are no part of its graph."""
        return self._run(lambda args, kwargs: self.model.forward(*args, **kwargs), tensors, seed)

    def _run(self, forward: Forward, tensors: Sequence[Tensor], seed: int) -> _Outcome:
        self.world.restore()
        seed_everything(seed)
        copies = [self._copy(tensor) for tensor in tensors]
        args, kwargs = self.tree.rebuild(copies)
        try:
            outputs, tree = flatten(forward(args, kwargs))
            gradients = _gradients(outputs, self.model, copies)
            state = _state(self.model) | {f"input {index}": copy.detach() for index, copy in enumerate(copies)}
            return _Outcome(tree.outline(), [_snapshot(output) for output in outputs], gradients, state)
        finally:
            self.world.restore()

    def _copy(self, tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone()
        wanted = self._differentiate_inputs and tensor.dtype.is_floating_point
        return copy.requires_grad_(wanted or tensor.requires_grad)


def _snapshot(output: Tensor) -> Tensor:
    return output.detach().clone().requires_grad_(output.requires_grad)


def _gradients(
    outputs: Sequence[Tensor], model: nn.Module, inputs: Sequence[Tensor]
) -> dict[str, Tensor | None] | None:
    """Gradients of a fixed random projection of the differentiable outputs; without touching any `.grad`."""
    generator = torch.Generator().manual_seed(7)
    roots = [output for output in outputs if output.requires_grad]
    wanted: dict[str, Tensor] = {name: value for name, value in model.named_parameters() if value.requires_grad}
    wanted |= {f"input {index}": value for index, value in enumerate(inputs) if value.requires_grad}
    if not roots or not wanted:
        return {}
    weights = [torch.randn(root.shape, generator=generator, dtype=torch.float64).to(root) for root in roots]
    try:
        found = torch.autograd.grad(roots, list(wanted.values()), weights, allow_unused=True)
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        return None  # reentrant checkpoints differentiate by .backward() only, which would write into `.grad`
    return dict(zip(wanted, (None if value is None else value.detach().clone() for value in found), strict=True))


def _state(model: nn.Module) -> dict[str, Any]:
    """Values of buffers, plain tensors and scalar attributes after a run."""
    state: dict[str, Any] = {}
    for prefix, module in model.named_modules():
        for name, value in (*module._buffers.items(), *vars(module).items()):
            if isinstance(value, Tensor):
                state[f"{prefix}.{name}"] = value.detach().clone()
            elif type(value) in (bool, int, float, str):
                state[f"{prefix}.{name}"] = value
    return state


def _difference(expected: _Outcome, found: _Outcome) -> str | None:
    if expected.structure != found.structure:
        return f"the output has another structure: {found.structure} where the model gives {expected.structure}"
    for index, (left, right) in enumerate(zip(expected.outputs, found.outputs, strict=True)):
        if left.requires_grad != right.requires_grad or not _equal(left, right):
            return f"output {index} differs {_how(left, right)}"
    theirs, ours = expected.gradients or {}, found.gradients or {}
    if theirs.keys() != ours.keys():
        return "one of them has gradients and the other has none"
    for name, gradient in theirs.items():
        if not _equal(gradient, ours[name]):
            return f"the gradient of `{name}` differs {_how(gradient, ours[name])}"
    for name in expected.state.keys() | found.state.keys():
        if not _equal(expected.state.get(name), found.state.get(name)):
            return f"the state `{name.lstrip('.')}` differs {_how(expected.state.get(name), found.state.get(name))}"
    return None


def _equal(left: Any, right: Any) -> bool:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return left is right or (not isinstance(left, Tensor) and not isinstance(right, Tensor) and bool(left == right))
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    if not left.dtype.is_floating_point and not left.dtype.is_complex:
        return torch.equal(left, right)
    if not torch.equal(left.isnan(), right.isnan()):
        return False
    if torch.equal(left.nan_to_num(), right.nan_to_num()):
        return True
    limit = _TOLERANCE * torch.finfo(left.dtype).eps * float(left.nan_to_num().abs().max())
    return float((left.nan_to_num() - right.nan_to_num()).abs().max()) <= limit


def _how(left: Any, right: Any) -> str:
    if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
        return f"({_named(right)} where the model gives {_named(left)})"
    if left.dtype != right.dtype or left.shape != right.shape:
        return f"({right.dtype} {tuple(right.shape)} where the model gives {left.dtype} {tuple(left.shape)})"
    gap = (left.to(torch.complex128) - right.to(torch.complex128)).abs().max() if left.numel() else 0
    return f"(by {float(gap):.3g} at most)"


def _named(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else repr(value)


def _other_batch(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """The same call with one row less (from three rows on) or twice the rows: dimension 0 of the first."""
    if not tensors or not tensors[0].ndim or not len(tensors[0]):
        return None
    rows = len(tensors[0])

    def change(tensor: Tensor) -> Tensor:
        if not tensor.ndim or len(tensor) != rows:
            return tensor
        return tensor[:-1] if rows >= 3 else torch.cat([tensor, tensor])

    return [change(tensor.detach()) for tensor in tensors]


@contextmanager
def preserved(model: nn.Module) -> Iterator[World]:
    """Restores buffers, attributes, generators and random states on leaving, whatever happened inside.

    Tensor hooks on the parameters are lifted meanwhile: they belong to the user's own backwards.
    """
    world = World(model)
    hooked = [(parameter, parameter._backward_hooks) for parameter in model.parameters() if parameter._backward_hooks]
    for parameter, _ in hooked:
        parameter._backward_hooks = None
    try:
        yield world
    finally:
        for parameter, hooks in hooked:
            parameter._backward_hooks = hooks
        world.restore()


@contextmanager
def trial_run() -> Iterator[None]:
    """Boxes answer equal inputs from memory, and their backward is a fixed linear pullback instead of an error."""
    with surrogate_pullback(), memoised():
        yield


def examples(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], guards: Guards | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None, tuple[int, int] | None]:
    """The tensors of a call, the same call at another batch size, and the two numbers of rows.

    The second is None where the model (or, given its guards, the graph) does not take one; the numbers are None where
    the call has no tensor with rows.
    """
    tensors, tree = tree_of_call(args, kwargs)
    other = _other_batch(tensors)
    if other is None:
        return tuple(tensors), None, None
    rows = (len(tensors[0]), len(other[0]))
    if guards is not None and guards.reason(model, other) is not None:
        return tuple(tensors), None, rows
    with preserved(model), trial_run(), torch.enable_grad():
        try:
            other_args, other_kwargs = tree.rebuild(other)
            model.forward(*other_args, **other_kwargs)
        except Exception:
            return tuple(tensors), None, rows
    return tuple(tensors), tuple(other), rows
