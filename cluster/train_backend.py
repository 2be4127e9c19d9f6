"""How the workers of Ray Train find each other. Imports torch."""

from __future__ import annotations

from typing import Any

import ray
from ray.train.torch import TorchConfig

from cluster.interfaces import tell_gloo


class OnOwnInterface(TorchConfig):
    """The process group of torch, with each worker on the interface of its node's address."""

    @property
    def backend_cls(self) -> Any:
        """The backend of TorchConfig, which tells the workers first."""
        plain: Any = super().backend_cls

        class Backend(plain):
            def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
                worker_group.execute(_tell_own)
                super().on_start(worker_group, backend_config)

        return Backend


def _tell_own() -> None:
    tell_gloo(ray.util.get_node_ip_address())
