"""Models to try things on: torch's own modules, small nets in the style of torchvision, Hugging Face models.

Every entry is (name, make_module, make_inputs): make_module() -> nn.Module in train mode, make_inputs() ->
(args, kwargs) for it. Both draw from the global generator; seed it first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from nets import NETS
from torch import Tensor, nn

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Entry(NamedTuple):
    name: str
    make_module: Callable[[], nn.Module]
    make_inputs: Callable[[], Inputs]


def _floats(*shape: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(*shape),), {})


def _positive(*shape: int) -> Callable[[], Inputs]:
    return lambda: ((torch.rand(*shape) + 0.1,), {})


def _pair(*shape: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randn(*shape), torch.randn(*shape)), {})


def _tokens(*shape: int) -> Callable[[], Inputs]:
    return lambda: ((torch.randint(0, 10, shape),), {})


_VECTOR, _SERIES, _IMAGE, _VOLUME = _floats(6, 8), _floats(4, 6, 10), _floats(4, 4, 8, 8), _floats(3, 2, 4, 4, 4)


def _attention_inputs() -> Inputs:
    query = torch.randn(4, 5, 8)
    return (query, query, query), {"need_weights": True}


def _mask_inputs() -> Inputs:
    return (torch.randn(4, 5, 8),), {"src_key_padding_mask": torch.arange(5).expand(4, 5) >= 4}


_SIMPLE: tuple[tuple[str, Callable[[], nn.Module], Callable[[], Inputs]], ...] = (
    ("Linear", lambda: nn.Linear(8, 5), _VECTOR),
    ("Bilinear", lambda: nn.Bilinear(8, 8, 3), _pair(6, 8)),
    ("Identity", nn.Identity, _VECTOR),
    ("Embedding", lambda: nn.Embedding(10, 6, padding_idx=0), _tokens(4, 5)),
    ("EmbeddingBag", lambda: nn.EmbeddingBag(10, 6, mode="mean"), _tokens(4, 5)),
    ("Conv1d", lambda: nn.Conv1d(6, 4, 3, padding=1), _SERIES),
    ("Conv2d", lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, padding_mode="reflect", padding=1), _IMAGE),
    ("Conv3d", lambda: nn.Conv3d(2, 3, 2), _VOLUME),
    ("ConvTranspose1d", lambda: nn.ConvTranspose1d(6, 4, 3), _SERIES),
    ("ConvTranspose2d", lambda: nn.ConvTranspose2d(4, 3, 3, stride=2), _IMAGE),
    ("ConvTranspose3d", lambda: nn.ConvTranspose3d(2, 3, 2), _VOLUME),
    ("BatchNorm1d", lambda: nn.BatchNorm1d(8), _VECTOR),
    ("BatchNorm2d", lambda: nn.BatchNorm2d(4), _IMAGE),
    ("BatchNorm3d", lambda: nn.BatchNorm3d(2), _VOLUME),
    ("BatchNorm cumulative", lambda: nn.BatchNorm1d(8, momentum=None), _VECTOR),
    ("BatchNorm untracked", lambda: nn.BatchNorm1d(8, track_running_stats=False), _VECTOR),
    ("InstanceNorm1d", lambda: nn.InstanceNorm1d(6, affine=True), _SERIES),
    ("InstanceNorm2d", lambda: nn.InstanceNorm2d(4, track_running_stats=True), _IMAGE),
    ("LayerNorm", lambda: nn.LayerNorm(8), _VECTOR),
    ("RMSNorm", lambda: nn.RMSNorm(8), _VECTOR),
    ("GroupNorm", lambda: nn.GroupNorm(2, 4), _IMAGE),
    ("LocalResponseNorm", lambda: nn.LocalResponseNorm(3), _IMAGE),
    ("Dropout", lambda: nn.Dropout(0.4), _VECTOR),
    ("Dropout1d", lambda: nn.Dropout1d(0.4), _SERIES),
    ("Dropout2d", lambda: nn.Dropout2d(0.4), _IMAGE),
    ("Dropout3d", lambda: nn.Dropout3d(0.4), _VOLUME),
    ("AlphaDropout", lambda: nn.AlphaDropout(0.4), _VECTOR),
    ("FeatureAlphaDropout", lambda: nn.FeatureAlphaDropout(0.4), _IMAGE),
    ("RReLU", nn.RReLU, _VECTOR),
    ("ReLU", nn.ReLU, _VECTOR),
    ("ReLU6", nn.ReLU6, _VECTOR),
    ("LeakyReLU", nn.LeakyReLU, _VECTOR),
    ("PReLU", lambda: nn.PReLU(8), _VECTOR),
    ("ELU", nn.ELU, _VECTOR),
    ("SELU", nn.SELU, _VECTOR),
    ("CELU", nn.CELU, _VECTOR),
    ("GELU", nn.GELU, _VECTOR),
    ("SiLU", nn.SiLU, _VECTOR),
    ("Mish", nn.Mish, _VECTOR),
    ("Sigmoid", nn.Sigmoid, _VECTOR),
    ("LogSigmoid", nn.LogSigmoid, _VECTOR),
    ("Tanh", nn.Tanh, _VECTOR),
    ("Tanhshrink", nn.Tanhshrink, _VECTOR),
    ("Softplus", nn.Softplus, _VECTOR),
    ("Softshrink", nn.Softshrink, _VECTOR),
    ("Softsign", nn.Softsign, _VECTOR),
    ("Hardshrink", nn.Hardshrink, _VECTOR),
    ("Hardsigmoid", nn.Hardsigmoid, _VECTOR),
    ("Hardswish", nn.Hardswish, _VECTOR),
    ("Hardtanh", nn.Hardtanh, _VECTOR),
    ("Threshold", lambda: nn.Threshold(0.1, 0.2), _VECTOR),
    ("GLU", nn.GLU, _VECTOR),
    ("Softmax", lambda: nn.Softmax(dim=-1), _VECTOR),
    ("Softmax2d", nn.Softmax2d, _IMAGE),
    ("Softmin", lambda: nn.Softmin(dim=-1), _VECTOR),
    ("LogSoftmax", lambda: nn.LogSoftmax(dim=-1), _VECTOR),
    ("MaxPool1d", lambda: nn.MaxPool1d(2), _SERIES),
    ("MaxPool2d", lambda: nn.MaxPool2d(2, return_indices=True), _IMAGE),
    ("MaxPool3d", lambda: nn.MaxPool3d(2), _VOLUME),
    ("AvgPool1d", lambda: nn.AvgPool1d(2), _SERIES),
    ("AvgPool2d", lambda: nn.AvgPool2d(2), _IMAGE),
    ("AvgPool3d", lambda: nn.AvgPool3d(2), _VOLUME),
    ("LPPool2d", lambda: nn.LPPool2d(2, 2), lambda: _positive(4, 4, 8, 8)()),
    ("FractionalMaxPool2d", lambda: nn.FractionalMaxPool2d(2, output_ratio=0.5), _IMAGE),
    ("AdaptiveAvgPool2d", lambda: nn.AdaptiveAvgPool2d(2), _IMAGE),
    ("AdaptiveMaxPool2d", lambda: nn.AdaptiveMaxPool2d(2), _IMAGE),
    ("ZeroPad2d", lambda: nn.ZeroPad2d(1), _IMAGE),
    ("ReflectionPad2d", lambda: nn.ReflectionPad2d(1), _IMAGE),
    ("ReplicationPad1d", lambda: nn.ReplicationPad1d(1), _SERIES),
    ("CircularPad2d", lambda: nn.CircularPad2d(1), _IMAGE),
    ("ConstantPad1d", lambda: nn.ConstantPad1d(1, 0.5), _SERIES),
    ("Upsample", lambda: nn.Upsample(scale_factor=2, mode="bilinear"), _IMAGE),
    ("PixelShuffle", lambda: nn.PixelShuffle(2), _IMAGE),
    ("PixelUnshuffle", lambda: nn.PixelUnshuffle(2), _IMAGE),
    ("ChannelShuffle", lambda: nn.ChannelShuffle(2), _IMAGE),
    ("Flatten", nn.Flatten, _IMAGE),
    ("Unflatten", lambda: nn.Unflatten(1, (2, 4)), _VECTOR),
    ("Fold", lambda: nn.Fold((4, 4), 2, stride=2), _floats(3, 8, 4)),
    ("Unfold", lambda: nn.Unfold(2), _IMAGE),
    ("CosineSimilarity", nn.CosineSimilarity, _pair(6, 8)),
    ("PairwiseDistance", nn.PairwiseDistance, _pair(6, 8)),
    ("RNN", lambda: nn.RNN(6, 5, num_layers=2, dropout=0.3, batch_first=True), _floats(4, 7, 6)),
    ("LSTM", lambda: nn.LSTM(6, 5, num_layers=2, dropout=0.3, bidirectional=True, batch_first=True), _floats(4, 7, 6)),
    ("GRU", lambda: nn.GRU(6, 5, batch_first=True), _floats(4, 7, 6)),
    ("RNNCell", lambda: nn.RNNCell(8, 5), _VECTOR),
    ("LSTMCell", lambda: nn.LSTMCell(8, 5), _VECTOR),
    ("GRUCell", lambda: nn.GRUCell(8, 5), _VECTOR),
    ("MultiheadAttention", lambda: nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True), _attention_inputs),
    (
        "TransformerEncoderLayer",
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.2, batch_first=True),
        _mask_inputs,
    ),
    (
        "TransformerDecoderLayer",
        lambda: nn.TransformerDecoderLayer(8, 2, 16, dropout=0.2, batch_first=True),
        _pair(4, 5, 8),
    ),
    (
        "Sequential",
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3)),
        _VECTOR,
    ),
)


class Inside(nn.Module):
    """A module of torch's between two affine maps of its floating inputs and outputs, so that it is not the root."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module
        self.gain = nn.Parameter(torch.tensor(1.1))

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        scaled = [value * self.gain if value.dtype.is_floating_point else value for value in args]
        return self.inner(*scaled, **kwargs)


def torch_modules() -> list[Entry]:
    """torch's own modules, as roots: those that can be one."""
    return [Entry(*entry) for entry in _SIMPLE if entry[0] != "BatchNorm cumulative"]


def torch_modules_inside() -> list[Entry]:
    """torch's own modules as a part of another one."""

    def inside(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        return lambda: Inside(make())

    return [Entry(f"{name} inside", inside(make), inputs) for name, make, inputs in _SIMPLE]


def nets() -> list[Entry]:
    """Small image nets in torchvision's style: written here, 16x16 inputs, 4 rows."""
    return [Entry(name, make, _floats(4, 3, 16, 16)) for name, make in NETS.items()]


_SMALL = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def huggingface() -> list[Entry]:
    """Tiny random Hugging Face models that compute their own loss from `labels`. Needs the extra `interop`."""
    import transformers as hf

    def text(kind: Any, config: Any, mask: bool = True) -> tuple[Callable[[], nn.Module], Callable[[], Inputs]]:
        def inputs() -> Inputs:
            tokens = torch.randint(3, 100, (4, 8 if mask else 5))
            given = {"input_ids": tokens, "labels": tokens}
            return (), given | ({"attention_mask": torch.ones_like(tokens)} if mask else {})

        return lambda: kind(config()).train(), inputs

    def image() -> Inputs:
        return (), {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.randint(0, 2, (4,))}

    heads = {key: value for key, value in _SMALL.items() if key not in ("num_attention_heads", "intermediate_size")}
    vit = {key: value for key, value in _SMALL.items() if not key.endswith("_id") and key != "vocab_size"}
    tokens = {key: value for key, value in _SMALL.items() if key.endswith("_id")}
    return [
        Entry(
            "GPT-2",
            *text(
                hf.GPT2LMHeadModel,
                lambda: hf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=32, **tokens),
            ),
        ),
        Entry("BERT", *text(hf.BertForMaskedLM, lambda: hf.BertConfig(**_SMALL, max_position_embeddings=32))),
        Entry("RoBERTa", *text(hf.RobertaForMaskedLM, lambda: hf.RobertaConfig(**_SMALL, max_position_embeddings=32))),
        Entry(
            "ViT",
            lambda: hf.ViTForImageClassification(hf.ViTConfig(**vit, image_size=16, patch_size=4)).train(),
            image,
        ),
        Entry(
            "Llama",
            *text(
                hf.LlamaForCausalLM,
                lambda: hf.LlamaConfig(**_SMALL, num_key_value_heads=1, max_position_embeddings=32),
            ),
        ),
        Entry("Mamba", *text(hf.MambaForCausalLM, lambda: hf.MambaConfig(**heads, state_size=4), mask=False)),
    ]
