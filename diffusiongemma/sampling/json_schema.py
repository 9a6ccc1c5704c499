"""The former path of `diffusiongemma.constraints.json_schema`."""

from diffusiongemma.constraints.json_schema import to_pattern

__all__ = ['to_pattern']
