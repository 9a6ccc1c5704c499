"""Reads the small JSON files beside weights."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
      ValueError: if it is not valid JSON or not an object; the message names the file.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not valid JSON ({error}); copy it again.') from error
    if not isinstance(content, dict):
        raise ValueError(f'{path} is not a JSON object, but {str(content)[:40]!r}; copy it again.')
    return content
