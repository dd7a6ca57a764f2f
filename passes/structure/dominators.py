"""Dominators of an acyclic graph in one sweep: in topological order, a node's is where its predecessors' paths meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


class Tree:
    """A growing tree with jump pointers, so that where two paths to the root meet is found in O(log depth).

    Myers 1983 (an applicative random-access stack).
    """

    def __init__(self, root: int) -> None:
        self.parent = {root: root}
        self.depth = {root: 0}
        self._jump = {root: root}

    def add(self, node: int, parent: int) -> None:
        near = self._jump[parent]
        far = self._jump[near]
        even = self.depth[parent] - self.depth[near] == self.depth[near] - self.depth[far]
        self.parent[node], self.depth[node] = parent, self.depth[parent] + 1
        self._jump[node] = far if even else parent

    def meet(self, a: int, b: int) -> int:
        """The deepest node on both paths to the root."""
        parent, depth, jump = self.parent, self.depth, self._jump
        if depth[a] < depth[b]:
            a, b = b, a
        while depth[a] > depth[b]:
            a = jump[a] if depth[jump[a]] >= depth[b] else parent[a]
        while a != b:
            a, b = (jump[a], jump[b]) if jump[a] != jump[b] else (parent[a], parent[b])
        return a

    def path(self, node: int) -> list[int]:
        """From a node to the root, both included."""
        found = [node]
        while self.parent[node] != node:
            node = self.parent[node]
            found.append(node)
        return found


def dominators(order: Iterable[int], before: Mapping[int, Sequence[int]] | Sequence[Sequence[int]]) -> Tree:
    """The dominator tree of the nodes in `order`: topological, the root first, everything reached from the root.

    before: the predecessors of each node; those outside `order` are passed over.
    Cooper, Harvey and Kennedy 2001, with no iteration, as there are no cycles.
    """
    nodes = iter(order)
    tree = Tree(next(nodes))
    for node in nodes:
        known = [source for source in before[node] if source in tree.parent]
        dominator = known[0]
        for source in known[1:]:
            dominator = tree.meet(dominator, source)
        tree.add(node, dominator)
    return tree
