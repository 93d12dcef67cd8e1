"""Holds the study file's section `compression`: what `compress` makes by hand, and which keys each method takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field, create_model, field_validator, model_validator

from compressors.choices import DTYPES, SCHEMES, Choice
from compressors.plan import CHOICES, DIMENSIONS
from search.config.section import Section
from search.config.spelling import nearest, require_known

METHODS = {  # method of `compress` → its keys, at least one of which has to be set
    **{
        method: tuple(record.key for record in DIMENSIONS.values() if record.method == method)
        for method in dict.fromkeys(record.method for record in DIMENSIONS.values())
    },
    "quantize": ("scheme",),
    "cast": ("dtype",),
}
for _method in ("reduce_hidden", "reduce_ffn"):
    METHODS[_method] = (*METHODS[_method], "target_dim")
HOW = {  # method of `compress` → the keys of the choices that it also takes
    method: tuple(name for name, record in CHOICES.items() if method in record.methods) for method in METHODS
}
LISTED = {name: record for name, record in CHOICES.items() if not record.is_number}


class CompressionKeys(Section):
    """CompressionKeys holds the plan that `compress` builds by hand; null keeps the base model's value.

    The choices of `compressors.plan.CHOICES` are added to it.
    """

    method: str | list[str] | None = None
    keep_layers: Annotated[int, Field(ge=1)] | None = None
    drop_from: str | list[Annotated[int, Field(ge=0)]] = "importance"  # or the numbers of the layers that go, from 0
    keep_heads: Annotated[int, Field(ge=1)] | None = None
    keep_kv_heads: Annotated[int, Field(ge=1)] | None = None
    target_dim: Annotated[int, Field(ge=1)] | None = None  # the width for reduce_hidden or reduce_ffn
    hidden_size: Annotated[int, Field(ge=1)] | None = None
    intermediate_size: Annotated[int, Field(ge=1)] | None = None
    scheme: str | None = None
    dtype: str | None = None

    @field_validator("method", "scheme", "dtype", *(name for name in LISTED if name != "drop_from"), check_fields=False)
    @classmethod
    def _known(cls, value: Any, info: Any) -> Any:
        known: dict[str, Sequence[Any]] = {"method": tuple(METHODS), "scheme": SCHEMES, "dtype": DTYPES}
        name = info.field_name
        allowed = known[name] if name in known else CHOICES[name].values
        require_known(value if isinstance(value, list) else None if value is None else [value], allowed)
        return value

    @field_validator("drop_from")
    @classmethod
    def _drop_from(cls, value: str | list[int]) -> str | list[int]:
        rules = [str(rule) for rule in CHOICES["drop_from"].values]
        if isinstance(value, list):
            if not value or len(set(value)) != len(value):
                raise ValueError("needs the number of at least one layer, and none twice")
        elif value not in rules:
            raise ValueError(f"{value!r} is not one of {', '.join(rules)}{nearest(value, rules)}, nor a list of layers")
        return value

    @property
    def methods(self) -> list[str]:
        """The named methods as a list, which is empty for none."""
        return [self.method] if isinstance(self.method, str) else list(self.method or ())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.scheme and self.dtype:
            raise ValueError(f"scheme is {self.scheme} and dtype {self.dtype}: a model is quantized or cast, not both")
        if not self.methods:
            if self.target_dim is not None:
                raise ValueError("target_dim needs a method, reduce_hidden or reduce_ffn; or set hidden_size")
            return self
        if self.target_dim is not None and {"reduce_hidden", "reduce_ffn"} <= set(self.methods):
            raise ValueError("target_dim is ambiguous with both methods; set hidden_size and intermediate_size")
        repair = getattr(self, "repair", None) or "none"
        if set(self.methods) == {"drop_layers"} and repair == "ridge":
            raise ValueError("repair: ridge can't repair where only layers are dropped; choose stream, distill or none")
        learns = repair == "distill" and self.scheme == "W4A16"
        if set(self.methods) == {"quantize"} and repair != "none" and not learns:
            raise ValueError(
                f"repair: {repair} mends what a cut took, and quantize alone cuts nothing; the scales of W4A16 can "
                "learn, with distill"
            )
        given = {name for name in type(self).model_fields if getattr(self, name) is not None} - {"method", "drop_from"}
        if isinstance(self.drop_from, list):
            given.add("keep_layers")
        for method in self.methods:
            if not given & set(METHODS[method]):
                raise ValueError(f"method {method} needs {' or '.join(METHODS[method])}")
        for key in sorted(given - {key for method in self.methods for key in (*METHODS[method], *HOW[method])}):
            owner = next(method for method in METHODS if key in (*METHODS[method], *HOW[method]))
            raise ValueError(
                f"{key} belongs to {owner}, and method is {', '.join(self.methods)}; add it there: "
                f"method=[{','.join([*self.methods, owner])}]"
            )
        return self


def _by_hand(record: Choice) -> tuple[Any, Any]:
    """Return the type and the default of a choice in `compression`."""
    if record.is_number:
        return Annotated[int, Field(ge=0)] | None, None
    return type(record.default) | None, None


if TYPE_CHECKING:

    class Compression(CompressionKeys):
        """Compression holds the plan that `compress` builds by hand."""

        def __getattr__(self, name: str) -> Any: ...

else:
    Compression = create_model(
        "Compression",
        __base__=CompressionKeys,
        **{name: _by_hand(record) for name, record in CHOICES.items() if name != "drop_from"},
    )
