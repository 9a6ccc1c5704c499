"""Lists all meshes of eight devices; the default suite uses a few, `-m slow` all of them."""

import itertools
import math

import pytest

from diffusiongemma.parallel import MESH_AXES

ALL = [
    dict(zip(MESH_AXES, sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(MESH_AXES))
    if math.prod(sizes) == 8
]


def name(axes):
    return '-'.join(f'{axis}{size}' for axis, size in axes.items() if size > 1)


def meshes(*few):
    """Returns test parameters: these meshes, and all others marked as slow."""
    few = [dict.fromkeys(MESH_AXES, 1) | axes for axes in few]
    return [
        pytest.param(axes, id=name(axes), marks=() if axes in few else pytest.mark.slow)
        for axes in ALL
    ]
