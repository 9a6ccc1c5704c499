"""The former path of `diffusiongemma.constraints.grammar`."""

from diffusiongemma.constraints.grammar import from_json_schema, from_regex, from_texts

__all__ = ['from_json_schema', 'from_regex', 'from_texts']
