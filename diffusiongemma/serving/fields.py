"""Reads the fields of a JSON object one by one; an error names the field that is wrong."""

import json
from typing import Any, TypeVar

T = TypeVar('T')


class RequestError(Exception):
    """An error response: an HTTP status from 400 to 499, or 503, and a one-line message.

    Attributes:
      status: the HTTP status.
      param: the name of the invalid field, or None.
      code: OpenAI's short name of the error, or None.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """Returns the JSON body of the error in OpenAI's format."""
        kind = 'invalid_request_error' if self.status < 500 else 'server_error'
        error = {'message': str(self), 'type': kind, 'param': self.param, 'code': self.code}
        return {'error': error}


def parse_object(body: bytes) -> dict[str, Any]:
    """Parses a request body as a JSON object; raises RequestError if it is not one."""

    def refuse(constant: str) -> None:
        raise ValueError(f'{constant} is not JSON')

    try:
        value = json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise RequestError(400, 'The body is nested too deeply.') from None
    except ValueError as error:  # includes bytes that are not valid UTF-8
        raise RequestError(400, f'The body is not valid JSON: {error}.') from None
    if not isinstance(value, dict):
        raise RequestError(400, f'The body must be a JSON object, got {name_of(value)}.')
    return value


def name_of(value: Any) -> str:
    """Returns the JSON name of the type of a value."""
    names = {dict: 'an object', list: 'an array', str: 'a string', bool: 'a boolean'}
    return names.get(type(value), 'null' if value is None else 'a number')


def brief(number: float) -> str:
    """Returns a number as text for a message, with at most 40 characters."""
    text = str(number)
    return text if len(text) <= 40 else f'{text[:37]}...'


class Fields:
    """A parser of the fields of a JSON object; `null` counts as a missing field.

    Every method removes the field that it returns; `end` raises an error if fields remain.
    """

    def __init__(self, values: dict[str, Any], where: str = '') -> None:
        """Takes an object and its path in the body, such as 'messages[0].'; '' for the body."""
        self._values = {name: value for name, value in values.items() if value is not None}
        self._where = where

    def end(self) -> None:
        """Raises RequestError if there are fields that no method has read."""
        for name in self._values:
            raise self.error(name, f'{self._where}{name} is not known here; leave it out.')

    def error(self, name: str, message: str, code: str | None = None) -> RequestError:
        """Returns an error with status 400 for one of the fields."""
        return RequestError(400, message, self._where + name, code)

    def has(self, name: str) -> bool:
        return name in self._values

    def any(self, name: str) -> Any:
        """Returns the value of a field, of any type, or None if it is missing."""
        return self._values.pop(name, None)

    def text(self, name: str) -> str | None:
        return self._of(name, str, 'a string')

    def flag(self, name: str) -> bool:
        return bool(self._of(name, bool, 'true or false'))

    def array(self, name: str) -> list[Any] | None:
        return self._of(name, list, 'an array')

    def object(self, name: str) -> 'Fields | None':
        value = self._of(name, dict, 'an object')
        return None if value is None else Fields(value, f'{self._where}{name}.')

    def integer(self, name: str, low: int, high: int) -> int | None:
        value = self._of(name, int, 'an integer')
        if value is not None and not low <= value <= high:
            raise self.error(
                name, f'{self._where}{name} must lie in [{low}, {high}], got {brief(value)}.'
            )
        return value

    def number(self, name: str, low: float, high: float, above: bool = False) -> float | None:
        """Returns a number in [low, high], or in (low, high] if `above`; None if missing."""
        value = self._of(name, (int, float), 'a number')
        if value is None:
            return None
        if not (low < value <= high if above else low <= value <= high):
            bracket = '(' if above else '['
            raise self.error(
                name,
                f'{self._where}{name} must lie in {bracket}{low:g}, {high:g}], got {brief(value)}.',
            )
        return float(value)

    def only(self, name: str, allowed: tuple[Any, ...], reason: str) -> None:
        """Raises RequestError unless the field is missing or has one of the `allowed` values."""
        value = self.any(name)
        if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
            raise self.error(name, f'{self._where}{name} is not supported: {reason}')

    def _of(self, name: str, types: type[T] | tuple[type[T], ...], kind: str) -> T | None:
        value = self.any(name)
        if value is None:
            return None
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise self.error(name, f'{self._where}{name} must be {kind}, got {name_of(value)}.')
        return value
