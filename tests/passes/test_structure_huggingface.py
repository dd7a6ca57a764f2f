"""Hugging Face models as they are captured: loss inside, masks, caches that are returned, rotary tables."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.interop

from structures import program_of  # noqa: E402

from rewriter.passes.structure import analyse  # noqa: E402

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LAYERS = SMALL["num_hidden_layers"]


def tokens():
    return torch.randint(3, 50, (3, 6))


def structure_of(model):
    given = {"input_ids": tokens(), "attention_mask": torch.ones(3, 6, dtype=torch.long), "labels": tokens()}
    return analyse(program_of(model.train(), front_end=None, **given))


def gpt2():
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": LAYERS, "n_head": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


MODELS = {
    "GPT-2": (gpt2, "pre", "transformer.h"),
    "BERT": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)), "post", "layer"),
    "RoBERTa": (
        lambda: transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SMALL)),
        "post",
        "layer",
    ),
    "Llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=1)),
        "pre",
        "model.layers",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_residual_segments(name):
    make, norm, block = MODELS[name]
    (chain,) = structure_of(make()).chains
    count = 2 * LAYERS
    assert len(chain.segments) == len(chain.residual) == count
    assert {segment.skip for segment in chain.segments} == {"identity"}
    normed = [any("norm" in node for node in segment.after) for segment in chain.segments]
    assert normed == [norm == "post"] * count
    assert all(f"{block}.{number // 2}" in segment.block for number, segment in enumerate(chain.segments))
    (repeat,) = chain.repeats
    assert (repeat.start, repeat.period * repeat.count, repeat.count, repeat.shared) == (0, count, LAYERS, False)
