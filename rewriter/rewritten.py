"""The returned module: the user's model with its gradients taken from where the plan says."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo
from torch.utils._pytree import tree_leaves

from rewriter.passes.base import Step
from rewriter.passes.partition import readable
from rewriter.runtime.errors import RewriteError
from rewriter.runtime.estimators.quality import Quality
from rewriter.runtime.ledger import Ledger
from rewriter.runtime.objective import Copied, Objective
from rewriter.runtime.region import Clock

from .loss import Loss
from .pipeline import Variant, build, undisturbed
from .plan import Plan
from .signature import signature
from .state import Learnt, Rules

log = logging.getLogger("rewriter")

MAX_SIGNATURES = 8


class Rewritten(nn.Module):
    """A drop-in for the model: `loss = step(x, target=y); loss.backward()` runs the emitted schedule.

    It shares the model's parameters and buffers (same objects, same names), holds the model unregistered as `.model`,
    and lets unknown attributes fall through to it. `step(*args, target=y)` returns exactly what
    `loss(model(*args), y)` returns in eager; without `target` (or without a loss) the model's output. In eval mode or
    without gradients the user's own forward runs. Made by `rewriter.rewrite`.
    """

    model: nn.Module
    plan: Plan
    ledger: Ledger

    def __init__(self, model: nn.Module, plan: Plan, loss: Loss | None, seed: int) -> None:
        super().__init__()
        clock, rules = Clock(seed), Rules()
        state = self.__dict__
        state["training"] = model.training
        state["_parameters"] = model._parameters
        state["_buffers"] = model._buffers
        state["_non_persistent_buffers_set"] = model._non_persistent_buffers_set
        state["_modules"] = {**model._modules, "rewriter": Learnt(clock, rules)}
        state.update(model=model, plan=plan, loss=loss, ledger=Ledger(), _clock=clock, _rules=rules)
        self._reset()

    def _reset(self) -> None:
        """What is made again rather than copied or saved: captures, and the forward with the user's signature."""
        self.__dict__["_variants"] = {}
        self.__dict__["_latest"] = None
        forward = functools.partial(type(self).forward, self)
        forward.__signature__ = _signature(self.model, self.loss)  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward

    # A compiled caller breaks its graph here; the emitted code is its own graph. torch.compiler.disable does the same
    # and imports the compiler at once: two seconds that every worker process of a box would pay for.
    @_disable_dynamo
    def forward(self, *args: Any, target: Any = None, **kwargs: Any) -> Any:
        loss = self.loss
        if target is not None and not (loss is not None and loss.takes_target):
            kwargs["target"], target = self._for_the_model(target), None
        taped = self.training and torch.is_grad_enabled()
        output = self._taped(args, kwargs, target) if taped else self.model(*args, **kwargs)
        if loss is None or (target is None and loss.takes_target):
            return output
        objective, self._clock.objective = self._clock.objective, None
        return loss(output, target) if objective is None else objective.weighed(loss(output, target))

    def _for_the_model(self, target: Any) -> Any:
        """A target that no loss takes, where the model's own forward has an argument of that name."""
        if "target" not in self.__dict__["forward"].__signature__.parameters:
            raise RewriteError(
                "a target was passed and there is no loss that takes it",
                remedy="rewrite(model, plan, loss=...) names the loss, called as loss(output, target)",
            )
        return target

    def _taped(self, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Any:
        variant, tensors = self._variant(args, kwargs)
        self._clock.tick(self._objective(variant, tensors, target))
        model = self.model
        if not (model._forward_hooks or model._forward_pre_hooks or model._backward_hooks or model._backward_pre_hooks):
            return variant.captured.rebuild(variant.emitted.function(*tensors))
        # The root's own hooks belong to its __call__, which is lent the emitted forward for this one call.
        with _forward(model, self._emitted_forward):
            return model(*args, **kwargs)

    def _objective(self, variant: Variant, tensors: list[torch.Tensor], target: Any) -> Objective | None:
        """The loss of this call, where a rule of the plan evaluates it ahead and there is one."""
        loss = self.loss
        if loss is None or (target is None and loss.takes_target) or not any(entry.ahead for entry in self.plan):
            return None
        own, rebuild = loss, variant.captured.rebuild

        def rows(outputs: Sequence[torch.Tensor], copied: Copied | None) -> torch.Tensor:
            if copied is not None:
                copied = copied._replace(clean=rebuild(copied.clean))
            found: torch.Tensor = own.contributions(rebuild(outputs), target, copied)
            return found

        def doubts(outputs: Sequence[torch.Tensor]) -> torch.Tensor | None:
            found: torch.Tensor | None = own.doubts(rebuild(outputs), target)
            return found

        read = [leaf for leaf in tree_leaves(target) if isinstance(leaf, torch.Tensor)]
        return Objective(lambda outputs: own(rebuild(outputs), target), tensors, rows, doubts, read)

    def _emitted_forward(self, *args: Any, **kwargs: Any) -> Any:
        variant, tensors = self._variant(args, kwargs)
        return variant.captured.rebuild(variant.emitted.function(*tensors))

    def _variant(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Variant, list[torch.Tensor]]:
        """The capture that holds for these arguments, made now if there is none."""
        key, tensors = signature(args, kwargs)
        candidates = self._variants.setdefault(key, [])
        reason = None
        for variant in candidates:
            reason = variant.captured.guards.reason(self.model, tensors)
            if reason is None:
                self.__dict__["_latest"] = variant
                return variant, tensors
        if reason is not None:
            log.warning("capturing anew: %s", reason)
        if sum(map(len, self._variants.values())) >= MAX_SIGNATURES:
            raise RewriteError(
                f"more than {MAX_SIGNATURES} call signatures",
                where=type(self.model).__name__,
                why=reason or "each new dtype, rank, tree structure, None, flag or constant argument is one",
                remedy="pass changing numbers as tensors, pad to few shapes, or call step.recapture() to start over",
            )
        variant = undisturbed(lambda: self._build(args, kwargs, tensors, candidates))
        self._share_children()  # one may have been replaced
        self.__dict__["_latest"] = variant
        return variant, tensors

    def _build(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[torch.Tensor], candidates: list[Variant]
    ) -> Variant:
        model = self.model
        for variant in candidates:  # another thread may have made it while this one waited
            if variant.captured.guards.reason(model, tensors) is None:
                return variant
        # A pre-hook of the root may change the arguments while the emitted forward is lent; capture needs the user's.
        own = type(model).forward.__get__(model) if model.__dict__.get("forward") == self._emitted_forward else None
        with nullcontext() if own is None else _forward(model, own):
            variant = build(
                model,
                self.plan,
                args,
                kwargs,
                clock=self._clock,
                ledger=self.ledger,
                rules=self._rules,
                again=bool(candidates),
            )
        candidates.append(variant)
        return variant

    def capture(self, *args: Any, **kwargs: Any) -> None:
        """Capture for these arguments now instead of at the first call."""
        with torch.enable_grad():
            self._variant(args, kwargs)

    def recapture(self) -> None:
        """Forget all captures; the next call captures anew. What the rules have learnt stays."""
        self._variants.clear()
        self.__dict__["_latest"] = None

    @property
    def latest(self) -> Variant:
        """The capture used last. Raises RewriteError before there is one."""
        variant = self._latest
        if variant is None:
            raise RewriteError(
                "the model is not captured yet",
                why="there was no call and no example",
                remedy="rewrite(model, plan, example=(x,)), or call the step once",
            )
        assert isinstance(variant, Variant)
        return variant

    @property
    def history(self) -> tuple[Step, ...]:
        """What each pass did: the program's text, its size and the time, in order."""
        return self.latest.history

    @property
    def quality(self) -> dict[str, Quality]:
        """By region, as of now: cosines, slope, shares changed, clipped and failed, and the bias they leave out."""
        found = {name: rule.quality for name, rule in self._rules.items()}
        return {name: quality for name, quality in found.items() if quality is not None}

    @property
    def quality_history(self) -> dict[str, list[tuple[int, Quality]]]:
        """By region: (index of the forward pass, quality) at every measurement of this process, at most 1,024."""
        return {name: list(rule.history.points) for name, rule in self._rules.items()}

    def graph_module(self) -> torch.fx.GraphModule:
        """A copy of the partitioned graph, to read and play with; it shares nothing with the model."""
        return readable(self.latest.program)

    def explain(self) -> str:
        """Per region: rule, place, width, probes, step size, predicted quality, cost, and whether less would do."""
        from .explain import explain

        return explain(self)

    def check(self, *args: Any, target: Any = None, **kwargs: Any) -> Any:
        """Compare every region's gradient on one batch with autograd, or with a Taylor test where there is none."""
        from .check import check

        return check(self, args, kwargs, target)

    def measure(self, *args: Any, target: Any = None, **kwargs: Any) -> Any:
        """Parameter cosine: how much of the gradient of all parameters is signal, by drawing it anew on one batch."""
        from .measure import measure

        return measure(self, args, kwargs, target)

    def export(self, folder: str | Path) -> Path:
        """Write program.json, program.dot (and .svg where `dot` is installed) and every segment as readable code."""
        from .report.export import export

        return export(self, folder)

    def train(self, mode: bool = True) -> Rewritten:
        self.model.train(mode)
        self.__dict__["training"] = mode
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """What the model has, and any module or parameter, is set on the model, whose forward reads it."""
        own = name in self.__dict__ or hasattr(type(self), name)
        if isinstance(value, nn.Module | nn.Parameter) or name in self._modules or name in self._buffers:
            setattr(self.model, name, value)
            self._share_children()
        elif not own and hasattr(self.model, name):
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def _share_children(self) -> None:
        learnt = self._modules["rewriter"]
        self._modules.clear()
        self._modules.update(self.model._modules, rewriter=learnt)

    def __getattr__(self, name: str) -> Any:
        state = self.__dict__
        for owner in ("_parameters", "_buffers", "_modules"):
            if owner in state and name in state[owner]:
                return state[owner][name]
        if "model" in state:
            return getattr(state["model"], name)
        raise AttributeError(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.model._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        own = f"{prefix}rewriter."  # the model does not know this child and would call its keys unexpected
        theirs = {key: value for key, value in state_dict.items() if not key.startswith(own)}
        self.model._load_from_state_dict(theirs, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for made_again in ("forward", "_variants", "_latest"):
            state.pop(made_again, None)
        # Rules hold evaluators and emitted code; their state waits for the next capture instead.
        learnt = state["_modules"]["rewriter"].get_extra_state()
        state["_modules"] = {name: module for name, module in state["_modules"].items() if name != "rewriter"}
        state.update(_learnt=learnt, _heads=self._rules.heads, _noise=self._rules.noise, _clock=None, _rules=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        learnt, heads, noise = (state.pop(name) for name in ("_learnt", "_heads", "_noise"))
        self.__dict__.update(state)
        clock, rules = Clock(0), Rules(heads, noise)
        own = Learnt(clock, rules)
        own.set_extra_state(learnt)
        self.__dict__.update(_clock=clock, _rules=rules)
        self._modules["rewriter"] = own
        self._reset()

    def __repr__(self) -> str:
        return f"Rewritten(\n  plan: {self.plan!r}\n  model: {self.model!r}\n)"


@contextmanager
def _forward(model: nn.Module, lent: Callable[..., Any]) -> Iterator[None]:
    """Lends the model another forward."""
    own = model.__dict__.get("forward")
    model.__dict__["forward"] = lent
    try:
        yield
    finally:
        if own is None:
            del model.__dict__["forward"]
        else:
            model.__dict__["forward"] = own


def _signature(model: nn.Module, loss: Loss | None) -> inspect.Signature:
    """The user's forward signature, plus `target` where the loss takes one."""
    try:
        own = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return inspect.Signature([inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)])
    if loss is None or not loss.takes_target or "target" in own.parameters:
        return own
    parameters = list(own.parameters.values())
    target = inspect.Parameter("target", inspect.Parameter.KEYWORD_ONLY, default=None)
    place = next((i for i, p in enumerate(parameters) if p.kind is inspect.Parameter.VAR_KEYWORD), len(parameters))
    return own.replace(parameters=[*parameters[:place], target, *parameters[place:]])
