"""A model that lies on the disk of every node. Imported by the engine's own process only."""

from __future__ import annotations

from ray.llm._internal.common.callbacks.base import CallbackBase  # it has no other name


class LocalModel(CallbackBase):
    """Spares the task that would fetch the model to the node: a process of its own, which imports vLLM once more."""

    async def on_before_node_init(self) -> None:
        """Called before the node is made ready."""
        self.ctx.run_init_node = False
