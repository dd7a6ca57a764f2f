"""The one bridge between a region and the ordinary tape.

A region's inputs and its trainable parameters enter one `autograd.Function`; its rule runs on detached aliases and
*returns* gradients. Nothing inside touches `.grad`, so tensor hooks, accumulate hooks, DDP buckets and gradient scalers
see exactly what they see in eager.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .ambient import Ambient
from .errors import RewriteError
from .objective import Objective
from .random import Key
from .rule import Call, Gradients, Rule, Taken


class Clock:
    """Counts forward passes, so that random numbers depend on (seed, forward, region, replicate) alone.

    objective: the loss of the present forward pass, None where no rule evaluates it.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.forward = -1
        self.rank = 0
        self.objective: Objective | None = None

    def tick(self, objective: Objective | None = None) -> None:
        self.forward += 1
        self.objective = objective
        distributed = torch.distributed
        self.rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


class Region:
    """Calls a rule as part of the ordinary tape.

    `region(*inputs)` returns the region's outputs (a single one unwrapped): those of the rule's at the positions
    `returned`, or all. `trainable` yields the parameters that the region reads and that require gradients, by name at
    each call. supplies: None, or the positions of the inputs whose gradients it supplies where nothing follows its
    outputs and the loss reaches it through an anchor (`Objective`). Without any differentiable input or in no-grad mode
    the rule runs forward alone and keeps nothing.
    Raises RewriteError inside `torch.func` transforms, on differentiating twice through the region, and on a second
    backward without `retain_graph=True`.
    """

    def __init__(
        self,
        name: str,
        rule: Rule,
        clock: Clock,
        trainable: Callable[[], tuple[Tensor, ...]] = tuple,
        returned: tuple[int, ...] | None = None,
        supplies: frozenset[int] | None = None,
    ) -> None:
        self.name, self.rule, self.clock, self.trainable, self.returned = name, rule, clock, trainable, returned
        self.supplies = supplies

    def __call__(self, *inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise RewriteError(
                "a rewritten region was called inside a torch.func transform",
                where=self.name,
                why="vmap, grad and their kin replace the tape that the region's rule plugs into",
                remedy="call the module outside the transform, or transform `step.model` instead",
            )
        trained = self.trainable()
        if self.supplies is not None:
            inputs = tuple([v if place in self.supplies else _alias(v) for place, v in enumerate(inputs)])
        needed = tuple([isinstance(value, Tensor) and value.requires_grad for value in (*inputs, *trained)])
        call = Call(
            self.name,
            Key(self.clock.seed, self.clock.forward, self.name),
            self.clock.rank,
            needed,
            Ambient.now(),
            self.clock.objective,
        )
        if torch.is_grad_enabled() and True in needed:
            outputs = _apply(self.rule, call, len(inputs), *inputs, *trained)  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                outputs = self.rule.forward(
                    call._replace(needed=(False,) * len(needed)), tuple(map(_alias, inputs)), trained
                ).outputs
        if self.supplies is not None and self.clock.objective is not None:
            self.clock.objective.anchors += outputs
        if self.returned is not None:
            outputs = tuple([outputs[position] for position in self.returned])
        return outputs[0] if len(outputs) == 1 else outputs


def _alias(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def keeps_graph() -> bool:
    """Inside a backward: whether `retain_graph` was set, so that another backward may follow."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


_SPENT = object()
_NOTHING = nullcontext()  # grad mode is off in a backward already, and entering no_grad costs three microseconds


class _Bridge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rule: Rule, call: Call, inputs: int, *tensors: Any) -> tuple[Tensor, ...]:
        aliases = tuple(map(_alias, tensors))
        taken = rule.forward(call, aliases[:inputs], aliases[inputs:])
        ctx.set_materialize_grads(False)
        discrete = [output for output in taken.outputs if not (output.is_floating_point() or output.is_complex())]
        if discrete:
            ctx.mark_non_differentiable(*discrete)
        ctx.save_for_backward(*taken.tensors)
        ctx.rule, ctx.call, ctx.memory = rule, call, taken.memory
        return taken.outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        rule, call = ctx.rule, ctx.call
        if ctx.memory is _SPENT:
            raise RewriteError(
                "backward was called a second time through a region",
                where=call.region,
                why="what its forward kept was freed by the first backward",
                remedy="pass retain_graph=True to the first backward",
            )
        twice = torch.is_grad_enabled()  # create_graph=True: somebody may differentiate this gradient again
        taken = Taken((), ctx.saved_tensors, ctx.memory)
        with torch.no_grad() if twice else _NOTHING, call.ambient.enter():
            gradients = rule.backward(call, taken, cotangents, ctx.needs_input_grad[3:])
        del taken
        if not keeps_graph():
            ctx.memory = _SPENT
        if twice:
            anchor = torch.zeros((), requires_grad=True)
            gradients = _Once.apply(call.region, anchor, *gradients)  # type: ignore[no-untyped-call]
        return None, None, None, *gradients


# The method that `Function.apply` ends in, once it has looked for transforms (refused above) and for a `setup_context`
# (there is none): eight microseconds less.
_apply = super(torch.autograd.Function, _Bridge).apply


class _Once(torch.autograd.Function):
    """Passes gradients on; differentiating them is refused by the region's name.

    The anchor puts them on the tape even where no cotangent is: a second derivative that is silently zero would be
    worse than an error.
    """

    @staticmethod
    def forward(ctx: Any, region: str, anchor: Tensor, *gradients: Tensor | None) -> Gradients:
        ctx.region = region
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        raise RewriteError(
            "a region was differentiated twice",
            where=ctx.region,
            why="the gradient its rule supplies is an estimate or a schedule, not a differentiable function",
            remedy="keep second derivatives (create_graph=True, gradient penalties) out of the region",
        )
