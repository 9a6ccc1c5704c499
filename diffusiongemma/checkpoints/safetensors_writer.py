"""Writes safetensors files with the usual file permissions."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def save_tensors(arrays: Mapping[str, np.ndarray], path: Path, metadata: dict[str, str]) -> None:
    """Writes arrays by name to a file with the permissions that the umask allows.

    safetensors itself creates a file that only its owner can read.
    """
    save_file(dict(arrays), path, metadata=metadata)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)
