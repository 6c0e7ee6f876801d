"""The nodes, one file per user task."""

from comfy_api.latest import ComfyExtension, io

from . import (
    apply,
    compare,
    dataset,
    effect,
    hold,
    inspect,
    job,
    load,
    save,
    stack,
    sweep,
    sweep_grid,
    toolbox,
    train,
)
from .translated_errors import translate_errors


class QwenEditLoraExtension(ComfyExtension):
    async def on_load(self) -> None:
        from .server import routes  # here, so that the nodes can be imported without a server

        routes.start()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        files = (load, apply, stack, save, inspect, compare, toolbox, sweep, sweep_grid, effect)
        nodes = [node for file in (*files, dataset, train, job, hold) for node in file.NODES]
        return [translate_errors(node) for node in nodes]
