"""The nodes, one file per user task."""

from comfy_api.latest import ComfyExtension, io

from . import apply, compare, effect, inspect, load, save, stack, sweep, sweep_grid, toolbox


class QwenEditLoraExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        files = (load, apply, stack, save, inspect, compare, toolbox, sweep, sweep_grid, effect)
        return [node for file in files for node in file.NODES]
