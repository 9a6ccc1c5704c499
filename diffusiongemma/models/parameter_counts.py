"""Counts the parameters of a config without allocating any."""

import dataclasses

import jax
from flax.traverse_util import flatten_dict

from diffusiongemma.models.config import ModelConfig
from diffusiongemma.models.denoiser import model_for
from diffusiongemma.models.transformer import init_params


@dataclasses.dataclass(frozen=True)
class ParameterCounts:
    """The numbers of parameters of a model.

    Attributes:
      total: all parameters; embedding and output head are one table.
      embedding: the parameters of the token embedding.
      per_layer: the parameters of the per-layer embeddings.
      active: the parameters that one token uses, without the per-layer embeddings (of which it
        reads one row) and without experts that it is not routed to. Model cards call them "active"
        for a mixture of experts and "effective" for E2B and E4B.
    """

    total: int
    embedding: int
    per_layer: int
    active: int

    @property
    def bfloat16_bytes(self) -> int:
        return 2 * self.total


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Returns the numbers of parameters that `init_params` would create."""
    model = model_for(config)
    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    sizes = {name: leaf.size for name, leaf in flatten_dict(shapes, sep='/').items()}
    total = sum(sizes.values())
    per_layer = sizes.get('per_layer_embedder/embedding', 0)
    unused = sum(size for name, size in sizes.items() if '/experts/' in name)
    if config.moe is not None:
        unused -= unused * config.moe.top_k // config.moe.num_experts
    embedding = sizes['embedder/embedding']
    return ParameterCounts(total, embedding, per_layer, total - per_layer - unused)
