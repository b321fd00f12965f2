"""What the sections of a recipe have in common."""

import os
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """A part of the recipe. Frozen: a run never changes its own recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is no number, `~/x` is the home directory everywhere, and YAML takes a bare `on` for `true`."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and "on" in get_args(annotation):
            return "on" if value else "off"
        if isinstance(value, bool) and annotation is not bool and bool not in get_args(annotation):
            raise ValueError("true and false are no values of this key")
        return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value
