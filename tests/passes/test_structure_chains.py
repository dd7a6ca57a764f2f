"""Residual chains: how many segments, which skip, what follows the sum, what is beside them, and why there is none."""

import pytest
import torch
from nets import NETS, Basic, Bottleneck, ResNet, Transformer
from structures import (
    FRONT_ENDS,
    WIDTH,
    Branch,
    HandNorm,
    Net,
    activation,
    around,
    cases,
    conditioned,
    crossed,
    dense,
    first_again,
    gated,
    linears,
    nested,
    parallel,
    program_of,
    repeated,
    unet,
    written_before_it_is_added,
    written_in_place,
)
from torch import nn

from rewriter.passes.structure import analyse

B = 3


def vectors(*, rows=B):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(0))


def images():
    return torch.randn(B, 3, 16, 16)


def chains_of(model, *args, front_end="fx"):
    return analyse(program_of(model, *(args or (vectors(),)), front_end=front_end)).chains


def norms(count):
    return nn.ModuleList(HandNorm() for _ in range(count))


def with_norms(after):
    def body(net, x):
        for block, norm in zip(net.blocks, net.norms, strict=True):
            x = norm(x + block(x)) if after else x + block(norm(x))
        return x if after else net.last(x)

    return body


FOUND = {
    "residual": (lambda: Net(repeated(lambda x, f: x + f(x))), 6),
    "branch first": (lambda: Net(repeated(lambda x, f: f(x) + x)), 6),
    "subtracted branch": (lambda: Net(repeated(lambda x, f: x - 0.1 * f(x))), 6),
    "scaled skip": (lambda: Net(repeated(lambda x, f: 0.5 * x + f(x))), 6),
    "norms written by hand, after": (lambda: Net(with_norms(after=True), norms=norms(6)), 6),
    "norms written by hand, before": (lambda: Net(with_norms(after=False), norms=norms(6), last=HandNorm()), 6),
    "conditioned": (lambda: Net(conditioned, condition=nn.Linear(WIDTH, WIDTH), scales=linears(6)), 6),
    "around": (lambda: Net(around, last=nn.Linear(WIDTH, WIDTH)), 6),
    "nested": (lambda: Net(nested), 2),
    "gated": (lambda: Net(gated, gates=linears(6)), 6),
    "parallel": (lambda: Net(parallel, norms=norms(3)), 3),
    "crossed": (lambda: Net(crossed), 5),
    "in place": (lambda: Net(written_in_place), 6),
    "written before it is added": (lambda: Net(written_before_it_is_added, layers=linears(6)), 6),
}
FOUND_EXPORTED = (
    "residual",
    "subtracted branch",
    "norms written by hand, after",
    "conditioned",
    "gated",
    "parallel",
    "written before it is added",
)
NONE = {
    "plain": lambda: Net(repeated(lambda x, f: f(x))),
    "U-Net of residual blocks": lambda: Net(unet, merges=linears(3, 2 * WIDTH)),
    "dense": lambda: Net(dense),
    "first value again": lambda: Net(first_again),
    "activation": lambda: Net(activation),
    "one block": lambda: Net(repeated(lambda x, f: x + f(x)), blocks=1),
    "two branches alike": lambda: Net(repeated(lambda x, f: f.down(f.up(x)) + f.norm(torch.tanh(x)))),
}


@pytest.mark.parametrize(("name", "front_end"), cases(FOUND, FOUND_EXPORTED))
def test_one_chain(name, front_end):
    make, count = FOUND[name]
    (chain,) = chains_of(make(), front_end=front_end)
    assert len(chain.residual) == count
    assert [segment.input for segment in chain.segments[1:]] == [segment.output for segment in chain.segments[:-1]]


@pytest.mark.parametrize(("name", "front_end"), cases(NONE, ("U-Net of residual blocks", "activation")))
def test_no_chain(name, front_end):
    structure = analyse(program_of(NONE[name](), vectors(), front_end=front_end))
    assert structure.chains == ()
    assert structure.reason
    assert f"no residual chain here: {structure.reason}" in str(structure)


@pytest.mark.parametrize(("layers", "front_end"), [(1, "fx"), (2, "fx"), (5, "fx"), (2, "export")])
def test_a_transformer_has_two_segments_a_layer(layers, front_end):
    tokens = torch.randint(0, 20, (B, 6))
    (chain,) = chains_of(Transformer(layers), tokens, front_end=front_end)
    assert len(chain.segments) == len(chain.residual) == 2 * layers
    assert {(segment.skip, segment.after) for segment in chain.segments} == {("identity", ())}
    assert [segment.block for segment in chain.segments] == [f"blocks.{n // 2}" for n in range(2 * layers)]


class PostNorm(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.tokens = nn.Embedding(20, WIDTH)
        self.branches = nn.ModuleList(Branch() for _ in range(2 * layers))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * layers))
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(WIDTH, 20)

    def forward(self, index):
        x = self.drop(self.tokens(index))
        for branch, norm in zip(self.branches, self.norms, strict=True):
            x = norm(x + self.drop(branch(x)))
        return self.head(x)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_norms_after_the_sum_belong_to_their_segments(front_end):
    (chain,) = chains_of(PostNorm(3), torch.randint(0, 20, (B, 6)), front_end=front_end)
    assert len(chain.residual) == 6
    assert all(len(segment.after) == 1 and segment.after[0] == segment.output for segment in chain.segments)


def resnet(depth, block=Basic):
    """ResNet-(6 n + 2): three stages of n blocks."""

    class Deep(ResNet):
        def __init__(self):
            super().__init__(block)
            n = (depth - 2) // 6
            widths = [(8, 8, 1)] * n + [(8, 16, 2)] + [(16, 16, 1)] * (n - 1) + [(16, 32, 2)] + [(32, 32, 1)] * (n - 1)
            self.layer1 = nn.Sequential(*(block(*each) for each in widths))
            self.layer2, self.fc = nn.Sequential(), nn.Linear(32, 5)

    return Deep()


@pytest.mark.parametrize(("depth", "block"), [(8, Basic), (20, Basic), (32, Basic), (20, Bottleneck)])
def test_a_resnet_has_a_segment_for_each_block(depth, block):
    (chain,) = chains_of(resnet(depth, block), images())
    n = (depth - 2) // 6
    skips = [segment.skip for segment in chain.segments]
    assert len(skips) == 3 * n
    assert [place for place, skip in enumerate(skips) if skip == "projection"] == [n, 2 * n]
    assert all(len(segment.after) == 1 for segment in chain.segments)  # the ReLU, the last block's too


def test_a_resnet_by_the_other_front_end():
    (chain,) = chains_of(resnet(8), images(), front_end="export")
    assert [segment.skip for segment in chain.segments] == ["identity", "projection", "projection"]
    assert [len(segment.skip_nodes) for segment in chain.segments] == [0, 1, 1]


def test_what_joins_two_stages_is_a_segment_without_skip():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.ModuleList(Branch(w) for _ in range(2)) for w in (WIDTH, 2 * WIDTH))
            self.norm, self.wider = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

        def forward(self, x):
            for block in self.first:
                x = x + block(x)
            x = self.wider(self.norm(x))
            for block in self.second:
                x = x + block(x)
            return x

    (chain,) = chains_of(Stages())
    assert [segment.skip for segment in chain.segments] == ["identity", "identity", "none", "identity", "identity"]
    assert chain.segments[2].branch == ("norm", "wider")
    assert chain.segments[2].add is None


def test_skips_are_named():
    (chain,) = chains_of(Net(gated, gates=linears(6)))
    assert {segment.skip for segment in chain.segments} == {"gate"}
    assert all(len(segment.skip_nodes) == 1 for segment in chain.segments)
    (chain,) = chains_of(Net(repeated(lambda x, f: x.double().float() + f(x))))
    assert {segment.skip for segment in chain.segments} == {"identity"}
    (chain,) = chains_of(Net(repeated(lambda x, f: 0.5 * x + f(x))))
    assert {segment.skip for segment in chain.segments} == {"projection"}


def test_the_model_may_start_with_the_chain():
    """Its input is no differentiable value; it is the first segment's all the same."""

    class Bare(Net):
        def forward(self, x):
            return self.body(self, x)

    (chain,) = chains_of(Bare(repeated(lambda x, f: x + f(x))))
    assert chain.input == "x"
    assert len(chain.segments) == 6


def test_a_skip_starts_behind_a_write_to_the_input():
    (chain,) = chains_of(Net(written_before_it_is_added, layers=linears(6)))
    assert [segment.input for segment in chain.segments] == ["relu", *(f"relu_{number}" for number in range(1, 6))]


def test_side_inputs_are_told_by_segment():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.memory, self.stem = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.keys, self.blocks = linears(3), nn.ModuleList(Branch() for _ in range(6))

        def forward(self, x, mask, source):
            memory = torch.tanh(self.memory(source))
            x = self.stem(x)
            for number, key in enumerate(self.keys):
                x = x + self.blocks[2 * number](x) * mask
                x = x + self.blocks[2 * number + 1](x * key(memory))
            return x

    (chain,) = chains_of(Masked(), vectors(), torch.ones(B, 1), vectors())
    assert len(chain.segments) == 6
    assert [segment.side_inputs for segment in chain.segments[::2]] == [("mask",)] * 3
    assert set(chain.side_inputs) == {"mask", *(segment.side_inputs[0] for segment in chain.segments[1::2])}


def test_keys_made_of_a_memory_belong_to_the_block_that_makes_them():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.branch = nn.Linear(WIDTH, WIDTH), Branch()

        def forward(self, x, memory):
            return x + self.branch(x * self.key(memory))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Net(repeated(lambda x, f: x + f(x)), blocks=2)
            self.encoder.head = nn.Linear(WIDTH, WIDTH)
            self.stem, self.layers = nn.Linear(WIDTH, WIDTH), nn.ModuleList(Cross() for _ in range(3))

        def forward(self, x, source):
            memory = self.encoder(source)
            x = self.stem(x)
            for layer in self.layers:
                x = layer(x, memory)
            return x

    decoder, encoder = sorted(chains_of(Decoder(), vectors(), vectors()), key=lambda chain: -len(chain.segments))
    assert len(encoder.segments) == 2
    assert [segment.side_inputs for segment in decoder.segments] == [("encoder_head",)] * 3
    assert [f"layers_{n}_key" in segment.nodes for n, segment in enumerate(decoder.segments)] == [True] * 3


def test_values_read_elsewhere_are_told():
    class Heads(Net):
        def forward(self, x):
            x, outputs = self.stem(x), []
            for block, head in zip(self.blocks, self.heads, strict=True):
                x = x + block(x)
                outputs.append(head(x))
            return self.head(x), *outputs, x

    (chain,) = chains_of(Heads(None, heads=linears(6)))
    assert len(chain.segments) == 6
    assert all(segment.read_elsewhere == (segment.output,) for segment in chain.segments)


def test_two_chains_in_one_model():
    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = (Net(repeated(lambda x, f: x + f(x)), blocks=count) for count in (2, 4))

        def forward(self, x, y):
            return self.one(x), self.two(y)

    found = chains_of(Towers(), vectors(), vectors())
    assert sorted(len(chain.segments) for chain in found) == [2, 4]
    assert sorted(chain.segments[0].block for chain in found) == ["one", "two"]


def test_frozen_blocks_at_the_start_are_none_of_the_chain():
    model = Net(repeated(lambda x, f: x + f(x)))
    for parameter in (*model.stem.parameters(), *model.blocks[:2].parameters(), *model.blocks[4].parameters()):
        parameter.requires_grad_(False)
    for front_end in FRONT_ENDS:
        (chain,) = chains_of(model, front_end=front_end)
        assert len(chain.segments) == 4, front_end


@pytest.mark.parametrize("taken", [0, 3, 5])
def test_a_block_without_its_shortcut_is_not_counted(taken):
    def body(net, x):
        for number, block in enumerate(net.blocks):
            x = block(x) if number == taken else x + block(x)
        return x

    (chain,) = chains_of(Net(body))
    assert len(chain.residual) == 5


def test_a_skip_over_two_blocks_makes_one_segment_of_them():
    """The value it starts from stays alive, so what lies between is no cut."""
    (with_it,), (without,) = chains_of(Net(crossed)), chains_of(Net(repeated(lambda x, f: x + f(x))))
    assert (len(with_it.segments), len(without.segments)) == (5, 6)
    wide = with_it.segments[1]
    assert wide.skip == "identity"
    assert len(wide.branch) > 2 * len(with_it.segments[0].branch)


REASONS = {
    "vgg": "no node adds a value to what was computed from that value",
    "densenet": "`stem_2` in stem.2 is read again 16 nodes later, by cat (`cat_3`)",
    "unet": "`down_0_2` in down.0.2 is read again 29 nodes later, by cat (`cat_1`)",
    "mobilenet": "one residual add only (`add` in features.1)",
    "squeezenet": "no cut lies between `features_1_activation` in features.1.activation and `cat` in features.1",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_reason_names_what_stands_against_it(name):
    assert REASONS[name] in analyse(program_of(NETS[name](), images())).reason


def test_reasons_for_what_cannot_be_seen():
    encoder = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
    reason = analyse(program_of(nn.Sequential(nn.Linear(WIDTH, WIDTH), encoder), torch.randn(B, 4, WIDTH))).reason
    assert "what is inside 1 is not seen, as it stays whole" in reason
    frozen = Net(repeated(lambda x, f: x + f(x))).requires_grad_(False)
    assert "nothing in this graph is differentiable" in analyse(program_of(frozen, vectors())).reason


def test_the_text():
    structure = analyse(program_of(Net(repeated(lambda x, f: x + f(x)), blocks=2), vectors()))
    assert str(structure).splitlines() == [
        "4 single-tensor cuts",
        "repeats: 2 x 1 segment(s) from number 2",
        "residual chain of 2 segments, stem -> add_1",
        "    1 stem -> add  identity + 4 node(s)",
        "    2 add -> add_1  identity + 4 node(s)",
        "  repeats: 2 x 1 segment(s) from number 1",
    ]


def test_writes_are_followed_under_every_name_of_a_value():
    """`y` and `x` are one value: the skip of the second block reads what the last write left."""

    def body(net, x):
        y = x.add_(0.5)
        x.mul_(2.0)
        for block in net.blocks:
            y = y + block(x)
            x = y
        return y

    (chain,) = chains_of(Net(body, blocks=3))
    assert chain.values == ("mul_", "add", "add_1", "add_2")
