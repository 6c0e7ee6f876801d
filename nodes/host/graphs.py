"""Links of the running graph, and graphs that a node expands into."""

from __future__ import annotations

from typing import Any

from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder, is_link

Link = list
"""[node id, output index], as in a graph of the API."""


def build_graph() -> GraphBuilder:
    """An empty graph for the running node to expand into."""
    return GraphBuilder()


def get_links(dynprompt: Any, node_id: str) -> dict[str, Link]:
    """Input -> where it comes from, for the connected inputs of a node of the running graph."""
    inputs = dynprompt.get_node(node_id)["inputs"]
    return {name: value for name, value in inputs.items() if is_link(value)}


def find_wired_outputs(dynprompt: Any, node_id: str) -> set[int]:
    """Which outputs of a node another one takes."""
    return {
        link[1]
        for other in dynprompt.all_node_ids()
        for link in get_links(dynprompt, other).values()
        if link[0] == node_id
    }


def block_output(message: str) -> ExecutionBlocker:
    """A value that stops every node it reaches, with this message."""
    return ExecutionBlocker(message)
