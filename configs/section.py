"""What the parts of a recipe are made of: frozen sections that refuse unknown keys, and kinds of numbers."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

Dtype = Literal["float32", "bfloat16"]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Section(BaseModel):
    """A part of a recipe: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, given: object) -> object:
        """A section that is named in part keeps the rest of its default: `optimizer: {lr: 1e-4}` its schedule."""
        if not isinstance(given, dict):
            return given
        tree = cast(dict[Any, Any], given)
        parts = {
            name: field.default.model_dump(exclude_unset=True) | tree[name]
            for name, field in cls.model_fields.items()
            if isinstance(field.default, Section) and isinstance(tree.get(name), dict)
        }
        return {**tree, **parts}


class OptimizerConfig(Section):
    """AdamW, with a linear warm-up and then a constant rate or, where the number of steps is known, a cosine."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # of matrices; norms and biases have none
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_share: Share = 0.1  # of lr, where a cosine ends
