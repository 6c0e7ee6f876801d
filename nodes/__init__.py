"""The nodes, one file per user task."""

from comfy_api.latest import ComfyExtension, io

from . import apply, compare, inspect, load, save, stack, toolbox


class QwenEditLoraExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        files = (load, apply, stack, save, inspect, compare, toolbox)
        return [node for file in files for node in file.NODES]
