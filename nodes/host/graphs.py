"""Links of the running graph, and graphs that a node expands into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from comfy_execution.graph_utils import ExecutionBlocker, GraphBuilder, is_link
from comfy_execution.utils import get_executing_context

from .language import translate

Link = list
"""[node id, output index], as in a graph of the API."""

_queue: Any = None


class RunningNode(NamedTuple):
    """A node of the running graph."""

    id: str
    shown: str
    """The node of the user's graph that shows what it does: another one if this one is part of
    what that one expanded into."""


def connect_queue(queue: Any) -> None:
    """Called once with ComfyUI's prompt queue, which knows the running graph."""
    global _queue
    _queue = queue


def build_graph() -> GraphBuilder:
    """An empty graph for the running node to expand into."""
    return GraphBuilder()


def get_links(dynprompt: Any, node_id: str) -> dict[str, Link]:
    """Input -> its link, for the connected inputs of a node of the running graph."""
    inputs = dynprompt.get_node(node_id)["inputs"]
    return {name: value for name, value in inputs.items() if is_link(value)}


def find_wired_outputs(dynprompt: Any, node_id: str) -> set[int]:
    """The outputs of a node that are connected to another one."""
    return {
        link[1]
        for other in dynprompt.all_node_ids()
        for link in get_links(dynprompt, other).values()
        if link[0] == node_id
    }


def find_running_node(dynprompt: Any) -> RunningNode | None:
    """The node that is running; None outside of a prompt."""
    context = get_executing_context()
    if dynprompt is None or context is None:
        return None
    return RunningNode(context.node_id, dynprompt.get_display_node_id(context.node_id))


def find_weight_readers(dynprompt: Any) -> tuple[str, ...]:
    """Classes of the nodes downstream of the running one that read a MODEL's weights themselves.

    They see ComfyUI's patches, but nothing that runs beside the weights.
    """
    context = get_executing_context()
    if dynprompt is None or context is None:
        return ()
    graph = {node_id: dynprompt.get_node(node_id) for node_id in dynprompt.all_node_ids()}
    return list_weight_readers(graph, context.node_id)


def find_queued_readers() -> tuple[str, ...]:
    """The same while ComfyUI asks whether the node must run again, which passes no graph."""
    context = get_executing_context()
    if context is None or _queue is None:
        return ()
    running, _ = _queue.get_current_queue_volatile()
    graph: Mapping[str, Any] = next(
        (item[2] for item in running if item[1] == context.prompt_id), {}
    )
    return list_weight_readers(graph, context.node_id)


def list_weight_readers(graph: Mapping[str, Any], node_id: str) -> tuple[str, ...]:
    """Those a MODEL reaches from this node of a graph, through any number of nodes."""
    behind: dict[str, set[str]] = {}
    for other, node in graph.items():
        for link in filter(is_link, node["inputs"].values()):
            if gives_model(graph, *link[:2]):
                behind.setdefault(link[0], set()).add(other)
    found: set[str] = set()
    reached: set[str] = set()
    open_ids = [node_id]
    while open_ids:
        for other in behind.get(open_ids.pop(), set()) - reached:
            reached.add(other)
            open_ids.append(other)
            found.add(graph[other]["class_type"])
    return tuple(sorted(filter(reads_weights, found)))


def gives_model(graph: Mapping[str, Any], node_id: str, output: int) -> bool:
    import nodes

    node_class = nodes.NODE_CLASS_MAPPINGS.get(graph.get(node_id, {}).get("class_type"))
    types = getattr(node_class, "RETURN_TYPES", ())
    return output < len(types) and types[output] in ("MODEL", "*")


def has_model(graph: object) -> bool:
    """Whether a node of this graph, which may be anything that was posted, gives a MODEL."""
    import nodes

    listed = graph.values() if isinstance(graph, Mapping) else ()
    names = (node.get("class_type") for node in listed if isinstance(node, Mapping))
    classes = (nodes.NODE_CLASS_MAPPINGS.get(name) for name in names if isinstance(name, str))
    return any("MODEL" in getattr(node_class, "RETURN_TYPES", ()) for node_class in classes)


def reads_weights(class_type: str) -> bool:
    """Judged by ComfyUI's own names, which savers and mergers of other extensions follow."""
    return class_type == "LoraSave" or any(
        part in class_type for part in ("ModelSave", "CheckpointSave", "ModelMerge")
    )


def block_output(message: str) -> ExecutionBlocker:
    """A value that stops every node it reaches, with this message in the user's language."""
    return ExecutionBlocker(translate(message))
