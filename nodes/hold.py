"""The prompt that waits while a training job uses ComfyUI's device."""

from __future__ import annotations

from comfy_api.latest import io

from .server import job_host
from .sockets import CATEGORY


class QwenEditLoraHold(io.ComfyNode):
    """Queued by `routes` ahead of all other prompts, for jobs with the policy "pause prompts"."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QwenEditLoraHold",
            display_name="Hold Prompts (internal)",
            category=CATEGORY,
            description="Queued while a training job has the GPU and prompts should wait. Not "
            "for graphs.",
            is_dev_only=True,
            is_output_node=True,
            not_idempotent=True,
            inputs=[],
            outputs=[],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        job_host.get_jobs().policy.hold_prompts()
        return io.NodeOutput()


NODES = [QwenEditLoraHold]
