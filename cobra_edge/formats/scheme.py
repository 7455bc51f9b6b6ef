"""Table of the quantization schemes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import InputError
from ..terminal.suggestions import near_matches

# Codes along the input axis that are loaded together, by bits: the packed block (docs/bundle.md), or for one-byte codes the
# number that a step of the native matmul takes.
_BLOCKS = {3: 64, 4: 32, 8: 32}
WHOLE_ROW: Literal["row"] = "row"

# How codes become values: "int" is defined in docs/bundle.md; the others are bitsandbytes' formats.
CodeFormat = Literal["int", "nf4", "int8-rows"]
# numpy dtypes of stored codes and scales, by format.
_DTYPES: dict[CodeFormat, tuple[str, str]] = {
    "int": ("uint8", "float16"),
    "nf4": ("uint8", "float32"),
    "int8-rows": ("int8", "float32"),
}


@dataclass(frozen=True)
class Scheme:
    """How the weights of a matrix are stored.

    Attributes:
        name: as on the command line; w4a16-g128 has 4-bit weights, 16-bit activations, one scale per 128 weights of a row.
        weight_bits: bits per code: 3, 4, 8, or 16 for plain float16 without codes.
        group_size: weights along the input axis that share a scale; "row" for all of them, None for no groups (float16).
        activation_bits: 8 if a runtime quantizes the inputs of matmuls by default, None if it does not.
        code_format: how codes become values.
    """

    name: str
    weight_bits: int
    group_size: int | Literal["row"] | None
    activation_bits: int | None = None
    code_format: CodeFormat = "int"

    @property
    def zero_code(self) -> int:
        """The zero point: the unsigned code of 0, around which codes are symmetric. Only for format "int"."""
        return 1 << (self.weight_bits - 1)

    @property
    def code_dtype(self) -> str:
        """Dtype of stored codes, as named by numpy."""
        return _DTYPES[self.code_format][0]

    @property
    def scale_dtype(self) -> str:
        """Dtype of stored scales, as named by numpy."""
        return _DTYPES[self.code_format][1]

    @property
    def block(self) -> int:
        """Codes per block along the input axis; a row consists of whole blocks. Only for schemes with codes."""
        return _BLOCKS[self.weight_bits]

    @property
    def any_width(self) -> bool:
        """Whether rows need not consist of whole blocks: 8-bit codes with one scale per row, such as a narrow dt_proj's."""
        return self.code_format == "int" and self.weight_bits == 8 and self.group_size == WHOLE_ROW

    def in_blocks(self, in_features: int) -> bool:
        """Return whether rows of `in_features` codes consist of whole blocks, which the kernels on codes need."""
        return in_features % self.block == 0

    def group(self, in_features: int) -> int:
        """Return the number of weights per scale in a matrix with `in_features` inputs. Only for schemes with codes."""
        assert self.group_size is not None
        return in_features if self.group_size == WHOLE_ROW else self.group_size

    def refuses(self, in_features: int) -> str | None:
        """Return why a matrix with `in_features` inputs cannot be stored in this scheme, or None if it can."""
        if self.group_size is None:
            return None
        if in_features % self.group(in_features):
            return f"group size {self.group_size} does not divide in_features {in_features}"
        if in_features % self.block and not self.any_width:
            return f"{self.weight_bits}-bit codes come in blocks of {self.block}, which do not divide in_features {in_features}"
        return None


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("fp16", 16, None),
        Scheme("w8a16-channel", 8, WHOLE_ROW),
        Scheme("w8a16-g128", 8, 128),
        Scheme("w4a16-g128", 4, 128),
        Scheme("w4a16-g64", 4, 64),
        Scheme("w4a16-g32", 4, 32),
        Scheme("w3a16-g64", 3, 64),
        Scheme("w8a8", 8, 128, activation_bits=8),
        Scheme("w4a8", 4, 128, activation_bits=8),
        Scheme("bnb-nf4", 4, 64, code_format="nf4"),
        Scheme("bnb-int8", 8, WHOLE_ROW, code_format="int8-rows"),
    )
}


def scheme_named(name: str) -> Scheme:
    """Return a scheme of the table. Raises InputError with near matches."""
    if name not in SCHEMES:
        raise InputError(f"unknown scheme {name!r}{near_matches(name, SCHEMES)}")
    return SCHEMES[name]
