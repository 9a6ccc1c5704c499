"""A model whose layers are a loop, and the same model without the loop."""

from typing import Any

import jax

from diffusiongemma.models.transformer import Gemma

STACKED = ('layers', 'shared_layers')


def unroll_layers(model: Gemma, params: Any) -> tuple[Gemma, dict]:
    """The same function with the loop over layers unrolled, and the parameters that it takes.

    A loop copies each layer's weights out of the stacked ones before it uses them, which on a CPU
    takes longer than a pass over few tokens itself; without the loop they are read where they lie.
    Compile time then grows with depth. For inference: checkpoints and training are of stacked
    parameters.

    Args:
      model: of any family, with `config.scan_layers`.
      params: its parameters; nested dict of arrays.

    Returns:
      The model and its parameters: `layers` [G, ...] has become `layers_0` to `layers_{G - 1}`.

    Raises:
      ValueError: the model is unrolled already.
    """
    if not model.config.scan_layers:
        raise ValueError('the layers of this model are unrolled already (scan_layers=False).')

    def unrolled(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        made = {}
        for name, child in node.items():
            if name in STACKED:
                for g in range(jax.tree.leaves(child)[0].shape[0]):
                    made[f'{name}_{g}'] = jax.tree.map(lambda leaf, g=g: leaf[g], child)
            else:
                made[name] = unrolled(child)
        return made

    return model.clone(config=model.config.replace(scan_layers=False)), unrolled(params)
