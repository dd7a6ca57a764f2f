"""Small image nets in torchvision's style, each with the construction that makes its family hard to capture."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Basic(nn.Module):
    """ResNet's basic block: in-place ReLU after an in-place residual add."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        middle = outputs // 4
        self.branch = nn.Sequential(
            _conv(inputs, middle, 1), _conv(middle, middle, 3, stride), _conv(middle, outputs, 1)
        )
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.stem = _conv(3, 8)
        self.layer1 = nn.Sequential(block(8, 8, 1), block(8, 8, 1))
        self.layer2 = nn.Sequential(block(8, 16, 2), block(16, 16, 1))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(_conv(3, 8), nn.MaxPool2d(2), _conv(8, 16), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Linear(256, 32), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))


class DenseLayer(nn.Module):
    """Takes one tensor or the list of all earlier ones."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv, self.drop_rate = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, growth, 3, 1, 1), 0.2

    def forward(self, features: Tensor | list[Tensor]) -> Tensor:
        earlier = [features] if isinstance(features, Tensor) else features
        new = self.conv(F.relu(self.norm(torch.cat(earlier, 1))))
        return F.dropout(new, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else new


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8)
        self.block = nn.ModuleDict({f"layer{i}": DenseLayer(8 + 4 * i, 4) for i in range(3)})
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.block.values():
            features.append(layer(features))
        return self.fc(torch.cat(features, 1).mean((2, 3)))


class UNet(nn.Module):
    """Skips through a list, sizes matched by padding as computed from shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_conv(3, 8), _conv(8, 16)])
        self.bottom = _conv(16, 16)
        self.up = nn.ModuleList([nn.ConvTranspose2d(16, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)])
        self.merge = nn.ModuleList([_conv(32, 16), _conv(16, 8)])
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = up(x)
            height, width = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
            x = merge(torch.cat([skip, F.pad(x, [0, width, 0, height])], dim=1))
        return self.out(x)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.up(F.silu(self.down(x.mean((2, 3), keepdim=True)))))


class StochasticDepth(nn.Module):
    """Drops whole rows of a branch; the noise is made from the input's own shape."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        return x * x.new_empty(shape).bernoulli_(1 - self.rate).div_(1 - self.rate)


class InvertedResidual(nn.Module):
    """MobileNet's and EfficientNet's block."""

    def __init__(self, inputs: int, outputs: int, stride: int, excite: bool = False) -> None:
        super().__init__()
        hidden = inputs * 2
        self.use_skip = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            _conv(inputs, hidden, 1),
            _conv(hidden, hidden, 3, stride, groups=hidden),
            SqueezeExcite(hidden) if excite else nn.Identity(),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.drop = StochasticDepth(0.3 if excite else 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.body(x)) if self.use_skip else self.body(x)


class MobileNet(nn.Module):
    def __init__(self, excite: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv(3, 8, stride=2), InvertedResidual(8, 8, 1, excite), InvertedResidual(8, 16, 2, excite)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class Fire(nn.Module):
    def __init__(self, inputs: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1, self.expand3 = nn.Conv2d(squeeze, expand, 1), nn.Conv2d(squeeze, expand, 3, padding=1)
        self.activation = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.squeeze(x))
        return torch.cat([self.activation(self.expand1(x)), self.activation(self.expand3(x))], 1)


class SqueezeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(_conv(3, 8), Fire(8, 4, 8), nn.MaxPool2d(3, 2, ceil_mode=True), Fire(16, 4, 8))
        self.last = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(F.relu(self.last(F.dropout(self.features(x), 0.5, self.training))), 1).flatten(1)


class Inception(nn.Module):
    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [_conv(inputs, 4, 1), nn.Sequential(_conv(inputs, 4, 1), _conv(4, 8)), _conv(inputs, 4, 5)]
        )

    def forward(self, x: Tensor) -> Tensor:
        outputs = [branch(x) for branch in self.branches]
        return torch.cat([*outputs, F.avg_pool2d(x, 3, 1, 1)], 1)


class GoogLeNet(nn.Module):
    """With an auxiliary head in train mode: the output is a dict then, a tensor otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = _conv(3, 8), Inception(8), Inception(24)
        self.aux, self.fc = nn.Linear(24, 5), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        first = self.first(self.stem(x))
        logits = self.fc(self.second(first).mean((2, 3)))
        return {"logits": logits, "aux": self.aux(first.mean((2, 3)))} if self.training else logits


class ConvNeXtBlock(nn.Module):
    """Channels last and back, a learnt scale per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(1e-1 * torch.ones(width))
        self.drop = StochasticDepth(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + self.drop(y.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.blocks = nn.Sequential(ConvNeXtBlock(8), ConvNeXtBlock(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((-2, -1)))


class ShuffleBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(width // 2, width // 2, 1), _conv(width // 2, width // 2, groups=width // 2))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        x = torch.cat((kept, self.branch(changed)), dim=1)
        batch, channels, height, width = x.size()
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, -1, height, width)


class ShuffleNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = _conv(3, 8, stride=2), nn.Sequential(ShuffleBlock(8), ShuffleBlock(8))
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean([2, 3]))


class Attention(nn.Module):
    """Hand-written: width split by parameters' sizes, mask from a buffer sliced by the sequence length."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("causal", torch.tril(torch.ones(length, length, dtype=torch.bool)))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.project(x).split(self.out.weight.shape[0], dim=2)
        q, k, v = (part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) * (width // self.heads) ** -0.5
        scores = scores.masked_fill(~self.causal[:length, :length], float("-inf"))
        return self.out((F.softmax(scores, -1) @ v).transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.ln1, self.attn, self.ln2 = nn.LayerNorm(width), Attention(width, heads, length), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Transformer(nn.Module):
    """A language model with a tied embedding, an assertion on the length and positions by arange."""

    def __init__(self, blocks: int = 2, width: int = 16, tokens: int = 20, length: int = 16) -> None:
        super().__init__()
        self.length = length
        self.tokens, self.positions = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 4, length) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, tokens, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, index: Tensor) -> Tensor:
        _, length = index.size()
        assert length <= self.length, f"at most {self.length} tokens, got {length}"
        x = self.tokens(index) + self.positions(torch.arange(length, device=index.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PatchTransformer(nn.Module):
    """A vision transformer: a class token repeated per row."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.Sequential(Block(16, 2, 17), Block(16, 2, 17))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.head(self.blocks(x)[:, 0])


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet-basic": lambda: ResNet(Basic),
    "resnet-bottleneck": lambda: ResNet(Bottleneck),
    "vgg": VGG,
    "densenet": DenseNet,
    "unet": UNet,
    "mobilenet": MobileNet,
    "efficientnet": lambda: MobileNet(excite=True),
    "squeezenet": SqueezeNet,
    "inception": GoogLeNet,
    "convnext": ConvNeXt,
    "shufflenet": ShuffleNet,
    "vision-transformer": PatchTransformer,
}
