"""Re-exports `diffusiongemma.constraints.grammar` under its former path."""

from diffusiongemma.constraints.grammar import from_json_schema, from_regex, from_texts

__all__ = ['from_json_schema', 'from_regex', 'from_texts']
