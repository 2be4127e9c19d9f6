"""What the actors can do today, where a plan hangs on it. The one place to change when they can do more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the code in actors/ does with memory."""

    # When its turn ends, the trainer of a shared GPU gives back what torch keeps for its next pass
    # (torch.cuda.empty_cache). Where not, its peak stays taken while the generator works.
    trainer_gives_cache_back: bool = False


TODAY = Abilities()
