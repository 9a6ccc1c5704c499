"""Re-exports `diffusiongemma.constraints.json_schema` under its former path."""

from diffusiongemma.constraints.json_schema import to_pattern

__all__ = ['to_pattern']
