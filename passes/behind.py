"""What follows a cut: whether it can be evaluated on copies of rows, and as code from the cut to the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import AlphaDropout, FeatureAlphaDropout, _DropoutNd

from .base import Refused
from .program import Program, Value, is_box_call, reach
from .structure.operations import name_of, writes

CUT = "cut"  # in the meta of a node: it hands on the value at a cut
REPLAYED = "replayed"  # in the meta of a node: a dropout's mask, which copies share with the clean pass

RANDOM = frozenset(
    (
        *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli"),
        *("multinomial", "normal", "uniform", "exponential", "poisson", "rrelu", "gumbel_softmax"),
        *("alpha_dropout", "feature_alpha_dropout"),
    )
)
_FLAT = frozenset(
    (
        *("round", "floor", "ceil", "trunc", "fix", "sign", "sgn", "signbit", "heaviside", "floor_divide", "floordiv"),
        *("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "detach"),
        *("gt", "ge", "lt", "le", "eq", "ne", "argmax", "argmin", "argsort", "one_hot", "searchsorted", "bucketize"),
    )
)
TRAINING = 5  # position of that argument of batch_norm
_EVALUATED = "what follows a cut is evaluated on copies of rows"


@dataclass(frozen=True)
class Behind:
    """nodes: what the outputs need of what depends on the cut, and what makes numbers (sizes) for it or reads
    parameters, in graph order; sides: tensors it reads beside it."""

    nodes: tuple[fx.Node, ...]
    sides: tuple[fx.Node, ...]


def behind(program: Program, cut: Sequence[fx.Node]) -> Behind | Refused:
    """What follows the values `cut` up to the model's outputs."""
    after = set(reach(list(cut)))
    found: set[fx.Node] = set()
    sides: dict[fx.Node, None] = {}
    stack = list(program.graph.output_node().all_input_nodes)
    while stack:
        node = stack.pop()
        if node in cut or node in found or node in sides:
            continue
        value = program.values.get(node.name)
        # As on the tape, what the model detaches is a constant: copies read the clean pass's.
        if (
            node.meta.get(REPLAYED)
            or _detaches(node)
            or (node not in after and isinstance(value, Value) and node.op != "get_attr")
        ):
            sides[node] = None
            continue
        if node not in after:
            tensors = isinstance(value, tuple) and any(item is not None for item in value)  # a shape has none
            if tensors or node.op in ("placeholder", "call_module"):
                return Refused(node.name, "a tuple as a whole crosses the cut", "take it apart where it is returned")
        found.add(node)
        stack.extend(node.all_input_nodes)
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    return Behind(tuple(sorted(found, key=order.__getitem__)), tuple(sorted(sides, key=order.__getitem__)))


def _detaches(node: fx.Node) -> bool:
    return node.target in ("detach", torch.detach) and not node.meta.get(CUT)


def behind_all(program: Program, cuts: Sequence[Sequence[fx.Node]]) -> Behind | Refused:
    """What follows any of several cuts, which need not lie behind each other."""
    nodes: set[fx.Node] = set()
    sides: set[fx.Node] = set()
    for cut in cuts:
        tail = behind(program, cut)
        if isinstance(tail, Refused):
            return tail
        nodes.update(tail.nodes)
        sides.update(tail.sides)
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    return Behind(tuple(sorted(nodes, key=order.__getitem__)), tuple(sorted(sides - nodes, key=order.__getitem__)))


def dropouts(tail: Behind, program: Program) -> list[fx.Node]:
    """The dropouts behind a cut that do something."""
    return [node for node in tail.nodes if _drops(node, program)]


def _drops(node: fx.Node, program: Program) -> bool:
    if node.op == "call_module":
        module = program.module(str(node.target))
        return isinstance(module, _DropoutNd) and _plain_dropout(module) and module.training and module.p > 0
    name = name_of(node, program.module)
    return "dropout" in name and name not in RANDOM and not off(node)


def _plain_dropout(module: nn.Module) -> bool:
    return not isinstance(module, AlphaDropout | FeatureAlphaDropout)


def with_masks(program: Program, nodes: Sequence[fx.Node]) -> Program | Refused:
    """The program in which these dropouts are products with masks, drawn as eager draws them.

    A mask is the dropout of ones: the same numbers from the generator, and the same product.
    """
    owners = {name: region for region in program.regions for name in region.owned}
    for node in nodes:
        if node.name in owners:
            region = owners[node.name]
            return Refused(
                f"{region.name}: {node.name}",
                f"{_EVALUATED} with the clean pass's dropout masks, and {region.entry} keeps this one to itself",
                "set its p to 0, or take one of the two entries out of the plan",
            )
    graph = program.edit()
    own = {node.name: node for node in graph.nodes}
    values = dict(program.values)
    for name in [node.name for node in nodes]:
        dropout = own[name]
        source = dropout.args[0] if dropout.args else dropout.kwargs["input"]
        assert isinstance(source, fx.Node)
        with graph.inserting_before(dropout):
            ones = graph.call_function(torch.ones_like, (source,))
            mask = graph.node_copy(dropout, lambda node, s=source, o=ones: o if node is s else node)  # type: ignore[misc]
            into = writes(dropout, program.module)
            product = (
                graph.call_method("mul_", (source, mask)) if into else graph.call_function(torch.mul, (source, mask))
            )
        before = program.values[name]
        assert isinstance(before, Value)
        for node in (ones, mask, product):
            node.meta["block"] = dropout.meta.get("block", ())
            values[node.name] = Value(
                before.shape, before.dtype, before.rows, before.differentiable and node is product
            )
        mask.meta[REPLAYED] = True
        dropout.replace_all_uses_with(product)
        graph.erase_node(dropout)
    graph.lint()
    return program.with_(graph=graph, values=values)


def against(tail: Behind, cut: Sequence[fx.Node], program: Program) -> Refused | None:
    """Why it cannot be evaluated on copies of rows. Call it once dropouts are products."""
    inside = {*tail.nodes, *cut}
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    for node in sorted(reach(list(cut)), key=order.__getitem__):
        if node in inside or not node.all_input_nodes or not writes(node, program.module):
            continue
        written = node.all_input_nodes[0]
        if any(order[user] > order[node] for user in written.users):
            # Nobody reads what the write returns, so it is no part of the tail, and copies would not see the change.
            why = f"{_EVALUATED}, and {node.name} changes {written.name} in place, which is read after that"
            return Refused(node.name, why, "use what the operation returns, or one that is not in place")
    for node in tail.nodes:
        reason = _against(node, inside, program)
        if reason is not None:
            remedy = "put it into eval()" if "statistics" in reason or "training" in reason else "cut behind it"
            return Refused(node.name, f"{_EVALUATED}, and {reason}", remedy)
    return None


def not_replayable(node: fx.Node, inside: Sequence[fx.Node], program: Program) -> str | None:
    """Why a node among others cannot be evaluated for one row alone, as in the clean pass."""
    return "it draws a dropout" if _drops(node, program) else _against(node, set(inside), program)


def _against(node: fx.Node, inside: set[fx.Node], program: Program) -> str | None:
    if is_box_call(node, program):
        return None
    if writes(node, program.module) and node.all_input_nodes and node.all_input_nodes[0] not in inside:
        return f"{node.name} writes into {node.all_input_nodes[0].name}, which they have in common"
    if node.op != "call_module":
        return _against_call(node, name_of(node, program.module))
    module, target = program.module(str(node.target)), str(node.target)
    opaque = program.opaque.get(target, "")
    if "changes its attribute" in opaque or "draws from" in opaque:
        return f"{target} {opaque}"
    for name, part in module.named_modules(prefix=target):
        reason = _of_part(part)
        if reason is not None:
            return f"{name} ({type(part).__name__}) {reason}"
    if node.name in program.effects and any(True for _ in module.buffers()):
        return f"{target} changes its buffers in training, which every evaluation of copies would do again"
    return None


def _of_part(part: nn.Module) -> str | None:
    if part._forward_hooks or part._forward_pre_hooks:
        return "has hooks, which would see every copy"
    if not part.training:
        return None
    drops = getattr(part, "p", 0) if isinstance(part, _DropoutNd) else getattr(part, "dropout", 0)
    if isinstance(part, nn.RReLU) or (isinstance(drops, float) and drops > 0):
        return "draws random numbers in training that cannot be replayed"
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        return "couples rows through the statistics of the batch in training"
    if isinstance(part, _NormBase) and part.track_running_stats:
        return "changes its running statistics in training"
    return None


def _against_call(node: fx.Node, name: str) -> str | None:
    if name in RANDOM:
        return f"{name} draws random numbers that cannot be replayed"
    if "batch_norm" in name and argument(node, TRAINING, "training") is not False:
        return "batch_norm couples rows through the statistics of the batch in training"
    drops = argument(node, 4, "dropout_p") if "scaled_dot_product" in name else 0
    if isinstance(drops, float) and drops > 0:
        return "attention draws a dropout in training that cannot be replayed"
    return None


def off(node: fx.Node) -> bool:
    """Whether a dropout's own arguments say that it does nothing."""
    return argument(node, 1, "p") == 0 or argument(node, 2, "training", "train") is False


def argument(node: fx.Node, position: int, *names: str) -> object:
    """An argument of a call, by position or name; None where it is not given."""
    named: Iterable[object] = [node.kwargs[name] for name in names if name in node.kwargs]
    return next(iter(named), node.args[position] if len(node.args) > position else None)


def trainable_of(node: fx.Node, program: Program) -> Iterator[str]:
    """Qualified names of the trainable parameters that a node itself reads."""
    if node.op == "call_module":
        module = program.module(str(node.target))
        yield from (f"{node.target}.{name}" for name, p in module.named_parameters() if p.requires_grad)
    elif node.op == "get_attr":
        value = program.attribute(str(node.target))
        if isinstance(value, nn.Parameter) and value.requires_grad:
            yield str(node.target)


def obstacles(program: Program, tail: Behind, ends: Sequence[fx.Node]) -> dict[fx.Node, str]:
    """Nodes of a tail whose every way to the loss meets an operation without a derivative, and the first such.

    ends: where gradients come from: the model's outputs, and values at further cuts.
    """
    inside = set(tail.nodes)
    found: dict[fx.Node, str] = {}
    for node in reversed(tail.nodes):
        users = [user for user in node.users if user in inside]
        if node not in ends and users and all(user in found for user in users):
            found[node] = found[users[0]]
        elif not _smooth(node, program):
            found[node] = name_of(node, program.module)
    return found


def _smooth(node: fx.Node, program: Program) -> bool:
    if node.meta.get(CUT) or any(node.name in region.owned for region in program.regions):
        return True  # its entry sees to its gradient
    value = program.values.get(node.name)
    if isinstance(value, Value) and not value.dtype.is_floating_point:
        return False
    return not is_box_call(node, program) and name_of(node, program.module) not in _FLAT
