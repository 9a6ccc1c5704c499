"""What the compiler of a JSON schema gives to the modules of its types."""

from typing import Any, Protocol

from diffusiongemma.constraints.branches import Branch, Branches
from diffusiongemma.constraints.expressions import Expression
from diffusiongemma.constraints.schema_parts import Located
from diffusiongemma.constraints.strings import Texts
from diffusiongemma.constraints.validity import Validator


class Compiler(Protocol):
    """The compiler of one schema, `json_schema`.

    Attributes:
      comma: between items.
      colon: after keys.
      max_states: limit of every automaton.
      branches: finds what holds together.
      validator: says which values are valid.
    """

    comma: str
    colon: str
    max_states: int
    branches: Branches
    validator: Validator

    def value(self, parts: list[Located]) -> Expression:
        """Returns the texts that are valid under all parts."""

    def count(self, branch: Branch, name: str) -> tuple[int, int | None]:
        """Returns the limits of a count."""

    def listed(self, values: list[Any], whole: bool) -> Expression:
        """Returns texts of values; with `whole`, numbers have no point."""

    def texts(self, branch: Branch) -> Texts:
        """Returns the constraints of the strings of a branch."""

    def checked_pattern(self, pattern: str, where: str) -> str:
        """Returns a pattern that is supported."""

    def refuse(self, keyword: str, where: str, why: str) -> ValueError:
        """Returns the error of a keyword that is not supported where it is."""
