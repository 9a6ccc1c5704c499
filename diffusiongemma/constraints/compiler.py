"""The interface of the JSON schema compiler that `arrays` and `objects` use."""

from typing import Any, Protocol

from diffusiongemma.constraints.branches import Branch, Branches
from diffusiongemma.constraints.expressions import Expression
from diffusiongemma.constraints.schema_parts import Located
from diffusiongemma.constraints.strings import Texts
from diffusiongemma.constraints.validity import Validator


class Compiler(Protocol):
    """A compiler of one schema; `json_schema` implements it.

    Attributes:
      comma: the separator between items.
      colon: the separator after keys.
      max_states: the maximum number of states of every automaton.
      branches: expands the combinations of the schema.
      validator: decides which values are valid.
    """

    comma: str
    colon: str
    max_states: int
    branches: Branches
    validator: Validator

    def value(self, parts: list[Located]) -> Expression:
        """Returns an expression for the texts that are valid under all parts."""

    def count(self, branch: Branch, name: str) -> tuple[int, int | None]:
        """Returns the limits of a count such as `Items`: the minimum, and the maximum or None."""

    def listed(self, values: list[Any], whole: bool) -> Expression:
        """Returns an expression for listed values; with `whole`, numbers have no decimal point."""

    def texts(self, branch: Branch) -> Texts:
        """Returns the constraints that a branch puts on strings."""

    def checked_pattern(self, pattern: str, where: str) -> str:
        """Returns the pattern, or raises ValueError if it is too large."""

    def refuse(self, keyword: str, where: str, why: str) -> ValueError:
        """Returns the error for a keyword that is not supported at this place."""
