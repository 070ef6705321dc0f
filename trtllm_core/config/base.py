"""What all configs share: frozen, no unknown fields, and errors of one clear sentence."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from trtllm_core.errors import ConfigError


class Config(BaseModel):
    """Base of all configs.

    Raises:
        ConfigError: for an unknown field, a missing field or a value out of range, naming each of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)

    def __init__(self, /, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise ConfigError(f"{type(self).__name__}: {problems(type(self), error)}") from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated like a new one."""
        fields = {name: getattr(self, name) for name in self.model_fields_set}
        return type(self)(**{**fields, **changes})


def problems(cls: type[BaseModel], error: ValidationError) -> str:
    """What is wrong with the fields that a model was made of, in one line."""
    found = []
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            found.append(f"it has no field {where!r} (known: {', '.join(sorted(cls.model_fields))})")
        elif item["type"] == "missing":
            found.append(f"field {where!r} is required")
        else:
            what = item["msg"].removeprefix("Value error, ")
            found.append(f"{where} = {item['input']!r}: {what}" if where else what)
    return "; ".join(found)
