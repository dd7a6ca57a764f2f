"""Ours: the two lines of the README, with every option at its default."""

from __future__ import annotations

import torch.nn.functional as F
from method import AdamTrainer, Method, rates_alone
from tasks import Task
from torch import Tensor

from rewriter import BlackBox, Plan, rewrite


class Rewritten(AdamTrainer):
    def __init__(self, task: Task, rate: float) -> None:
        super().__init__(task, rate)
        self.rewritten = rewrite(task.network, Plan([BlackBox("box")]), loss=F.cross_entropy, seed=task.seed)

    def differentiate(self, images: Tensor, labels: Tensor) -> None:
        self.rewritten(images, target=labels).backward()


METHODS = [Method("rewriter", Rewritten, rates_alone, note='`BlackBox("box")`, nothing set')]
