"""What the actors can do today, where a plan hangs on it. The one place to change when they can do more."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Abilities:
    """What the code in actors/ does with memory."""

    # Under ZeRO 3 a worker that trains keeps only its share of the base, from the first parameter on (actors/load.py).
    # Where not, the whole base is put on each GPU before DeepSpeed spreads it.
    base_is_sharded_at_load: bool = True
    # The reference in a group of its own is spread over its workers under ZeRO 3. It has no engine whose hooks would
    # gather the weights, so it is not (cluster/roles.py).
    reference_is_sharded: bool = False
    # When its turn ends, the trainer of a shared GPU gives back what torch keeps for its next pass
    # (torch.cuda.empty_cache). Where not, its peak stays taken while the generator works.
    trainer_gives_cache_back: bool = False


TODAY = Abilities()
