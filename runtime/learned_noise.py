"""Standard deviations of a cut's noise that the user's optimizer steps with everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import RewriteError

_MAP = 3  # dimensions from which a row's value is a feature map, channels in front


class LearnedNoise(nn.Module):
    """log_sigma: logarithms of standard deviations, (channels,), in units of what the first batch starts them at.

    They are zero until they learn, so that an optimizer made before the first batch has them and its weight decay
    draws them to where they started.
    """

    def __init__(self, channels: int, like: Tensor) -> None:
        super().__init__()
        wide = torch.float64 if like.dtype is torch.float64 else torch.float32
        self.log_sigma = nn.Parameter(torch.zeros(channels, dtype=wide, device=like.device))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # A checkpoint of the model alone has no noise, and nothing is missing from it.
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


def channels_of(shapes: Sequence[Sequence[int]]) -> Tensor:
    """(width,): the channel of every element of a row, of tensors side by side.

    shapes: (multiplicity, the other dimensions) of a row in each tensor. A channel is an element of a vector, an index
    of the first dimension of a feature map (C, H, W), of the last of a sequence (T, C); entries of a folded row share.
    """
    found, before = [], 0
    for multiplicity, *own in shapes:
        # Where channels lie, and how often each is repeated behind and in front of that.
        place = 0 if len(own) >= _MAP else len(own) - 1
        count = own[place] if own else 1
        behind = torch.Size(own[place + 1 :]).numel()
        front = multiplicity * (torch.Size(own[:place]).numel() if own else 1)
        found.append(torch.arange(count).repeat_interleave(behind).repeat(front) + before)
        before += count
    return torch.cat(found)


def sizes_of(noise: nn.ModuleList | None, cuts: int) -> list[nn.Parameter]:
    """log_sigma of each cut, where it is learnt; another capture may have more cuts than this one."""
    learnt = [each for each in noise or () if isinstance(each, LearnedNoise)]
    return [each.log_sigma for each in learnt[:cuts]]


def size_gradient(
    learnt: tuple[Tensor, Tensor] | None, elements: Tensor | None, held: Tensor | None, scale: Tensor
) -> Tensor:
    """(channels,): gradient in log_sigma; zero where a step along it would lead further beyond a bound.

    learnt: log_sigma, and the channel of each element; elements: (width,), gradients in each element's logarithm; held:
    1 where the lower bound holds, -1 where the upper one does; scale: the loss's cotangent.
    """
    assert learnt is not None
    assert elements is not None
    assert held is not None
    log_sigma, channels = learnt
    gradient = log_sigma.new_zeros(log_sigma.shape).index_add_(0, channels, elements.to(log_sigma))
    gradient = gradient * scale.to(gradient)
    return torch.where(gradient * held > 0, 0, gradient)


def learned_sizes(known: nn.ModuleList | None, channels: Sequence[Tensor], like: Tensor, label: str) -> nn.ModuleList:
    """One `LearnedNoise` for each cut; those of an earlier capture where it has as many channels.

    Raises RewriteError where this capture has more cuts, or others: an optimizer would not have their parameters.
    """
    counts = [int(each.max()) + 1 for each in channels]
    if known is None:
        return nn.ModuleList(LearnedNoise(count, like) for count in counts)
    if counts != [len(noise.log_sigma) for noise in known][: len(counts)]:  # type: ignore[arg-type]
        raise RewriteError(
            "a capture has cuts whose noise was not there to be learnt before",
            where=label,
            why=f"{len(counts)} cuts of {', '.join(map(str, dict.fromkeys(counts)))} standard deviations, and an "
            "optimizer made earlier does not have these parameters",
            remedy="give rewrite the longest sequence as example=, or a fixed sigma",
        )
    return known
