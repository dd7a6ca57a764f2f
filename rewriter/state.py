"""What a rewritten module has learnt, as part of its `state_dict()` under `rewriter.`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.runtime.errors import RewriteError
from rewriter.runtime.heads import AuxiliaryHeads
from rewriter.runtime.horizon import HorizonRule
from rewriter.runtime.region import Clock
from rewriter.runtime.rule import Rule
from rewriter.runtime.ulr_cut import UlrCutRule

_VERSION = 2


class Rules(dict[str, Rule]):
    """The rules that run, by region name. A rule made after its state was loaded gets that state as it is added.

    heads, noise: what rules learn as parameters, by region; a copied or unpickled step has them before the rules.
    """

    def __init__(self, heads: nn.ModuleDict | None = None, noise: nn.ModuleDict | None = None) -> None:
        super().__init__()
        self.waiting: dict[str, dict[str, Any]] = {}
        self.heads = nn.ModuleDict() if heads is None else heads
        self.noise = nn.ModuleDict() if noise is None else noise

    def __setitem__(self, name: str, rule: Rule) -> None:
        super().__setitem__(name, rule)
        if isinstance(rule, HorizonRule) and isinstance(rule.heads, AuxiliaryHeads):
            rule.heads.modules = _kept(self.heads, name, rule.heads.modules)
        if isinstance(rule, UlrCutRule) and rule.noise is not None:
            rule.noise = _kept(self.noise, name, rule.noise)
        if name in self.waiting:
            rule.set_state(self.waiting.pop(name))


def _kept(learnt: nn.ModuleDict, region: str, made: nn.ModuleList) -> nn.ModuleList:
    """What a region had learnt before its rule was made; what was made with it where there is none."""
    spelled = region.replace(".", "_")
    known = dict(learnt.items()).get(spelled)
    if isinstance(known, nn.ModuleList):
        return known
    learnt[spelled] = made
    return made


class Learnt(nn.Module):
    """Counters and running statistics of the rules, as one extra state, and the heads and noise they train.

    It is a byte tensor holding JSON, so it passes through every checkpoint format that takes tensors, is read without
    executing anything, and restores floats exactly. Loading a checkpoint without it leaves the present state alone.
    """

    def __init__(self, clock: Clock, rules: Rules) -> None:
        super().__init__()
        self.clock, self.rules, self.heads, self.noise = clock, rules, rules.heads, rules.noise

    def get_extra_state(self) -> Tensor:
        states = {**self.rules.waiting, **{name: rule.get_state() for name, rule in self.rules.items()}}
        content = {"version": _VERSION, "seed": self.clock.seed, "forward": self.clock.forward, "rules": states}
        text = json.dumps(_plain(content), sort_keys=True)
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        try:
            content = _restored(json.loads(bytes(state.to("cpu", torch.uint8).tolist()).decode()))
            version, seed, forward = content["version"], int(content["seed"]), int(content["forward"])
            rules: dict[str, dict[str, Any]] = dict(content["rules"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RewriteError("the state of a rewritten module could not be read", why=str(error)) from error
        if version != _VERSION:
            raise RewriteError("the state of a rewritten module has another version", why=f"{version}, not {_VERSION}")
        self.clock.seed, self.clock.forward = seed, forward
        self.rules.waiting = {name: kept for name, kept in rules.items() if name not in self.rules}
        for name, rule in self.rules.items():
            if name in rules:
                rule.set_state(rules[name])

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}_extra_state" in state_dict:
            super()._load_from_state_dict(state_dict, prefix, *args)


def _plain(value: Any) -> Any:
    """Tensors, tuples and dicts as JSON; a float survives exactly because JSON prints its shortest exact form."""
    if isinstance(value, Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"tensor", "dtype"}:
        dtype = getattr(torch, value["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"{value['dtype']} is not a dtype")
        return torch.tensor(value["tensor"], dtype=dtype)
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return value
