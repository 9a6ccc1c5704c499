"""The small JSON files beside weights."""

import json
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file; raises ValueError that names it where it is none."""
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is no JSON ({error}); copy it again.') from error
