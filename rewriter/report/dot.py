"""program.json -> DOT: segments as clusters, coloured by the rule that gives their gradient."""

from __future__ import annotations

from typing import Any

import graphviz

COLOURS = {"exact": "#e8eef4", "black-box": "#ffd9b3"}
OTHER = "#e5d4ef"
READABLE = 40  # boxes per cluster; a larger segment is drawn by its blocks


def dot(program: dict[str, Any]) -> graphviz.Digraph:
    """Draw the data that `describe` makes. Large segments show one box per block ("x24" nodes)."""
    drawing = graphviz.Digraph(
        "program",
        graph_attr={"rankdir": "TB", "fontname": "sans-serif", "label": _title(program), "labelloc": "t"},
        node_attr={"shape": "box", "style": "rounded,filled", "fillcolor": "white", "fontname": "sans-serif"},
        edge_attr={"color": "#555555"},
    )
    nodes = {node["name"]: node for node in program["nodes"]}
    boxes: dict[str, str] = {}
    for segment in program["segments"]:
        members = _boxes(segment, nodes)
        with drawing.subgraph(name=f"cluster_{segment['name']}") as cluster:
            cluster.attr(
                label=_heading(segment),
                labeljust="l",
                style="rounded,filled",
                color="#999999",
                fillcolor=COLOURS.get(segment["rule"], OTHER),
            )
            for title, names in members.items():
                box = title.replace(":", "_")  # graphviz takes a colon for the start of a port
                cluster.node(box, label=_label(title.partition("/")[2], names, nodes))
                boxes.update(dict.fromkeys(names, box))
    for node in program["nodes"]:
        if node["op"] in ("placeholder", "output"):
            boxes[node["name"]] = node["name"]
            drawing.node(node["name"], label=_label(node["name"], [node["name"]], nodes), shape="ellipse")
    edges = {
        (boxes[source], boxes[node["name"]]): None
        for node in program["nodes"]
        for source in node["inputs"]
        if boxes[source] != boxes[node["name"]]
    }
    for tail, head in edges:
        drawing.edge(tail, head)
    return drawing


def _title(program: dict[str, Any]) -> str:
    count = len(program["regions"])
    return f"{program['model']}: {count} region{'' if count == 1 else 's'}, captured by {program['front_end']}"


def _heading(segment: dict[str, Any]) -> str:
    cost = segment["cost"]
    parts = [f"{segment['name']} [{segment['rule']}]"]
    if cost["flops"]:
        parts.append(f"{cost['flops'] / 1e6:.3g} MFLOP")
    if cost["saved_bytes"]:
        parts.append(f"{cost['saved_bytes'] / 2**20:.3g} MiB saved")
    if cost["queries"]:
        parts.append(f"{cost['queries']} queries per forward")
    return "\n".join((parts[0], ", ".join(parts[1:]))).strip()


def _boxes(segment: dict[str, Any], nodes: dict[str, Any]) -> dict[str, list[str]]:
    """Box name -> node names. Reads of attributes are folded into the node that uses them."""
    read = {source for name in segment["nodes"] for source in nodes[name]["inputs"]}
    shown = [name for name in segment["nodes"] if nodes[name]["op"] != "get_attr" or name not in read]
    found: dict[str, list[str]] = {}
    for name, key in _keys(shown, nodes).items():
        found.setdefault(f"{segment['name']}/{key}", []).append(name)
    hidden = [name for name in segment["nodes"] if name not in shown]
    for name in hidden:
        user = next(other for other in shown if name in nodes[other]["inputs"])
        next(names for names in found.values() if user in names).append(name)
    return found


def _keys(shown: list[str], nodes: dict[str, Any]) -> dict[str, str]:
    """What each node is drawn as: itself, or where that is too much, its block at the greatest readable depth."""
    keys = {name: name for name in shown}
    depth = max((len(nodes[name]["block"]) for name in shown), default=0)
    while len(set(keys.values())) > READABLE and depth:
        keys = {name: (nodes[name]["block"][:depth] or [name])[-1] for name in shown}
        depth -= 1
    return keys


def _label(title: str, names: list[str], nodes: dict[str, Any]) -> str:
    real = [name for name in names if nodes[name]["op"] != "get_attr"] or names
    last = nodes[real[-1]]
    lines = [title if len(real) == 1 else f"{title}  x{len(real)}"]
    if len(real) == 1 and last["op"] not in ("placeholder", "output"):
        lines.append(last["module"] or last["target"].rpartition("torch.")[2])
    lines += [f"{v['dtype']}{v['shape']}" for v in last["values"] if v][:2]
    return str(graphviz.escape("\n".join(lines)))
