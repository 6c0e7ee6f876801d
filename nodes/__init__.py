"""The nodes, one file per user task."""

from comfy_api.latest import ComfyExtension, io

from . import apply, load, save, stack


class QwenEditLoraExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*load.NODES, *apply.NODES, *stack.NODES, *save.NODES]
