"""Reads the fields of a JSON object one by one; an error names the field that is wrong."""

import json
from typing import Any


class RequestError(Exception):
    """What a client can mend: an HTTP status from 400 to 499, or 503, and one message.

    Attributes:
      status: the HTTP status.
      param: name of the field that is wrong, or None.
      code: OpenAI's short name of what is wrong, or None.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The error as OpenAI writes it."""
        kind = 'invalid_request_error' if self.status < 500 else 'server_error'
        error = {'message': str(self), 'type': kind, 'param': self.param, 'code': self.code}
        return {'error': error}


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds; raises RequestError."""

    def refuse(constant: str) -> None:
        raise ValueError(f'{constant} is not JSON')

    try:
        value = json.loads(body, parse_constant=refuse)
    except RecursionError:
        raise RequestError(400, 'The body is nested too deeply.') from None
    except ValueError as error:  # bytes that are not UTF-8 too
        raise RequestError(400, f'The body is not valid JSON: {error}.') from None
    if not isinstance(value, dict):
        raise RequestError(400, f'The body must be a JSON object, got {name_of(value)}.')
    return value


def name_of(value: Any) -> str:
    """What JSON calls the type of a value."""
    names = {dict: 'an object', list: 'an array', str: 'a string', bool: 'a boolean'}
    return names.get(type(value), 'null' if value is None else 'a number')


def brief(number: float) -> str:
    """A number for a message, of which the first digits do."""
    text = str(number)
    return text if len(text) <= 40 else f'{text[:37]}...'


class Fields:
    """The fields of an object; `null` stands for a field that is not there.

    Every field is taken once, and `end` refuses those that nobody took.
    """

    def __init__(self, values: dict[str, Any], where: str = '') -> None:
        """Holds the values of an object that is at `where` in the body, '' for the body itself."""
        self._values = {name: value for name, value in values.items() if value is not None}
        self._where = where

    def end(self) -> None:
        """Raises RequestError when there are fields that were not taken."""
        for name in self._values:
            raise self.error(name, f'{self._where}{name} is not known here; leave it out.')

    def error(self, name: str, message: str, code: str | None = None) -> RequestError:
        """An error of status 400 on one of the fields."""
        return RequestError(400, message, self._where + name, code)

    def has(self, name: str) -> bool:
        return name in self._values

    def any(self, name: str) -> Any:
        """A value of any type, or None."""
        return self._values.pop(name, None)

    def text(self, name: str) -> str | None:
        return self._of(name, str, 'a string')

    def flag(self, name: str) -> bool:
        return bool(self._of(name, bool, 'true or false'))

    def array(self, name: str) -> list | None:
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
        """A number in [low, high], or in (low, high] with `above`."""
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

    def only(self, name: str, allowed: tuple, reason: str) -> None:
        """Refuses a field by name unless it has one of the values that ask for nothing."""
        value = self.any(name)
        if value is not None and not any(value == a and type(value) is type(a) for a in allowed):
            raise self.error(name, f'{self._where}{name} is not supported: {reason}')

    def _of(self, name: str, types: Any, kind: str) -> Any:
        value = self.any(name)
        if value is None:
            return None
        if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            raise self.error(name, f'{self._where}{name} must be {kind}, got {name_of(value)}.')
        return value
