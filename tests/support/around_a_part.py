"""A model with one part in the middle."""

from torch import nn


class Net(nn.Module):
    """Linear, a part, Linear."""

    def __init__(self, part, outputs=4):
        super().__init__()
        self.before = nn.Linear(3, 4)
        self.part = part
        self.after = nn.Linear(outputs, 2)

    def forward(self, x):
        return self.after(self.part(self.before(x)))
