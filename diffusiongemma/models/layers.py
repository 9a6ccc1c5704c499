"""Layers without attention: norms, embedding, gated MLP, rotary embedding.

`weights.py` declares their weights. Parameters are cast to the compute dtype when they are used;
norms and logits are computed in float32.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from diffusiongemma.models.arrays import Array
from diffusiongemma.models.execution import Execution
from diffusiongemma.models.vocabulary import (
    LARGE_VOCABULARY,
    expected_rows_by_parts,
    logits_by_parts,
)
from diffusiongemma.models.weights import WEIGHTS

_ONE_DEVICE = Execution()


def kernel_init(fan_in: int) -> nn.initializers.Initializer:
    """Returns a normal initializer with variance 1 / fan_in."""
    return nn.initializers.normal(stddev=fan_in**-0.5)


def weight(
    module: nn.Module,
    declared: str,
    init: nn.initializers.Initializer,
    shape: Sequence[int],
    execution: Execution = _ONE_DEVICE,
) -> Any:
    """Creates a float32 parameter from its declaration in `models/weights.py`.

    Args:
      module: the module that the parameter belongs to.
      declared: the key of the declaration, whose last part is the name in the module.
      init: the initializer.
      shape: the size of each axis, in the order of the declaration.
      execution: whether the output axes come first (`output_major`), and the mesh on which a
        large kernel is gathered.

    Returns:
      [*maps, *inputs, *outputs], or [*maps, *outputs, *inputs]; a quantized kernel if the model
      is applied to quantized parameters.
    """
    declaration = WEIGHTS[declared]
    axes, sizes = declaration.axes, tuple(shape)
    if execution.output_major:
        axes, sizes = declaration.outputs_first(axes), declaration.outputs_first(sizes)
    partitioned = nn.with_logical_partitioning(init, axes)
    parameter: Any = module.param(declared.split('/')[-1], partitioned, sizes, jnp.float32)
    if declaration.large and not declaration.maps and not is_quantized(parameter):
        return execution.gathered_in_stages(parameter, *axes)
    return parameter


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(equation: str, x: Float[Array, '...'], y: Float[Array, '...']) -> Float[Array, '...']:
    """Returns the einsum of two arrays, accumulated and returned in float32.

    Its gradients are also contractions of operands in the dtypes of x and y. So for bfloat16
    operands, all matmuls of the forward and backward pass run natively on the matrix units of
    TPUs, GPUs and CPUs with AVX512-BF16, and sums are only rounded at their end.

    Args:
      equation: 'indices of x,indices of y->indices of the result'; each index occurs in at least
        two of the three.
      x: an array of any float dtype.
      y: an array of any float dtype.
    """
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _contract_forward(
    equation: str, x: Float[Array, '...'], y: Float[Array, '...']
) -> tuple[Float[Array, '...'], tuple[Float[Array, '...'], Float[Array, '...']]]:
    return contract(equation, x, y), (x, y)


def _contract_backward(
    equation: str,
    operands: tuple[Float[Array, '*X'], Float[Array, '*Y']],
    gradient: Float[Array, '...'],
) -> tuple[Float[Array, '*X'], Float[Array, '*Y']]:
    x, y = operands
    x_indices, y_indices, result_indices = re.split(',|->', equation)
    gradient = gradient.astype(x.dtype)
    by_x = contract(f'{result_indices},{y_indices}->{x_indices}', gradient, y)
    by_y = contract(f'{x_indices},{result_indices}->{y_indices}', x, gradient)
    return by_x.astype(x.dtype), by_y.astype(y.dtype)


contract.defvjp(_contract_forward, _contract_backward)


WEIGHT_PRODUCT = 'weight_product'


def is_quantized(kernel: Any) -> bool:
    """Returns whether a kernel is a `qwix.QArray` (`inference.quantize_weights`)."""
    return hasattr(kernel, 'qvalue')


def as_operand(kernel: Any, dtype: DTypeLike) -> Any:
    """Returns a kernel as an operand of matmuls: cast to `dtype`, or unchanged if quantized."""
    return kernel if is_quantized(kernel) else kernel.astype(dtype)


def project(
    equation: str, x: Float[Array, '...'], kernel: Any, output_major: bool = False
) -> Float[Array, '...']:
    """Returns `contract` with a weight; rematerialization may keep it (`Execution.remat` 'dots').

    Args:
      equation: the equation of `contract`, with the kernel in the layout [in, out].
      x: an array of any float dtype, in which the matmul is computed.
      kernel: a kernel in the layout of `weight`, of any float dtype or quantized.
      output_major: whether the kernel has the transposed layout, see `weight`.
    """
    kernel = as_operand(kernel, x.dtype)
    if output_major:
        return _project_output_major(equation, x, kernel)
    output: jax.Array = checkpoint_name(_multiply(equation, x, kernel), WEIGHT_PRODUCT)
    return output


def _multiply(equation: str, x: Float[Array, '...'], kernel: Any) -> Float[Array, '...']:
    if is_quantized(kernel):
        import qwix  # the import takes a third of a second, and only quantized models need it

        product: jax.Array = qwix.einsum(equation, x, kernel, preferred_element_type=jnp.float32)
        return product
    return contract(equation, x, kernel)


# For up to this many rows, XLA's float32 matmuls on CPUs are up to 3 times faster with the weights
# as the first operand; bfloat16 matmuls are slower in this order.
FEW_ROWS = 64


def _project_output_major(
    equation: str, x: Float[Array, '...'], kernel: Any
) -> Float[Array, '...']:
    x_indices, kernel_indices, result_indices = re.split(',|->', equation)
    inputs = ''.join(index for index in kernel_indices if index in x_indices)
    outputs = ''.join(index for index in kernel_indices if index not in x_indices)
    rows = ''.join(index for index in x_indices if index not in kernel_indices)
    sizes = dict(zip(x_indices, x.shape, strict=True))
    sizes |= dict(zip(outputs + inputs, kernel.shape, strict=True))
    # Reshape to matrices: for several input axes XLA would reorder them and copy the kernel.
    x = x.transpose([x_indices.index(index) for index in rows + inputs])
    x = x.reshape(math.prod(sizes[index] for index in rows), -1)  # [r, i]
    kernel = kernel.reshape(math.prod(sizes[index] for index in outputs), x.shape[1])  # [o, i]
    if len(x) <= FEW_ROWS and x.dtype == jnp.float32 and not is_quantized(kernel):
        # Without the barrier XLA swaps the operands of the matmul to avoid the transpose.
        by_output = jax.lax.optimization_barrier(contract('oi,ri->or', kernel, x))
        product: jax.Array = by_output.T  # [r, o]
    else:
        product = _multiply('ri,oi->ro', x, kernel)
    product = product.reshape([sizes[index] for index in rows + outputs])
    return product.transpose([(rows + outputs).index(index) for index in result_indices])


def rms_normalize(x: Float[Array, '*B D'], eps: float) -> Float[Array, '*B D']:
    """Returns x / rms(x) over the last axis, computed and returned in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)


class RMSNorm(nn.Module):
    """An RMS norm with a learned scale, computed in float32; it returns the input's dtype."""

    eps: float
    scale_offset: float = 0.0
    init_value: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
        init = nn.initializers.constant(self.init_value - self.scale_offset)
        scale: jax.Array = weight(self, 'norm/scale', init, x.shape[-1:])
        return (rms_normalize(x, self.eps) * (scale + self.scale_offset)).astype(x.dtype)


class GatedMLP(nn.Module):
    """A gated MLP, gelu_tanh(x Wg) * (x Wu) Wd without biases; [..., D] -> [..., D]."""

    width: int
    ffn_width: int
    dtype: jnp.dtype
    execution: Execution = Execution()
    zero_init_output: bool = False

    def setup(self) -> None:
        d, f = self.width, self.ffn_width
        self.gate = weight(self, 'mlp/gate', kernel_init(d), (d, f), self.execution)
        self.up = weight(self, 'mlp/up', kernel_init(d), (d, f), self.execution)
        init = nn.initializers.zeros if self.zero_init_output else kernel_init(f)
        self.down = weight(self, 'mlp/down', init, (f, d), self.execution)

    def __call__(self, x: Float[Array, '*B D']) -> Float[Array, '*B D']:
        # Use one matrix of tokens: with several leading axes, the gradients of the kernels would
        # make XLA transpose the hidden layer on CPUs, which doubles the time.
        tokens, output_major = x.reshape(-1, self.width), self.execution.output_major
        gate = project('td,df->tf', tokens, self.gate, output_major)
        up = project('td,df->tf', tokens, self.up, output_major)
        hidden = (nn.gelu(gate, approximate=True) * up).astype(self.dtype)
        output = project('tf,fd->td', hidden, self.down, output_major)
        return output.astype(self.dtype).reshape(x.shape)


class Embedder(nn.Module):
    """The token embedding, which is tied with the output head."""

    vocab_size: int
    width: int
    final_logit_softcap: float | None
    dtype: jnp.dtype
    execution: Execution = Execution()

    def setup(self) -> None:
        shape = (self.vocab_size, self.width)
        self.embedding = weight(self, 'embedder/embedding', kernel_init(self.width), shape)

    def encode(self, tokens: Int[Array, '*B']) -> Float[Array, '*B D']:
        """Returns embeddings scaled by sqrt(D): [...] int32 -> [..., D]."""
        # Rounded to the compute dtype, as in Google's code.
        scale = jnp.asarray(self.width**0.5, self.dtype)
        return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype) * scale

    def soft_encode(
        self,
        logits: Float[Array, '*B V'],
        dtype: DTypeLike,
        log_z: Float[Array, '*B'] | None = None,
    ) -> Float[Array, '*B D']:
        """Returns softmax(logits) @ embedding * sqrt(D): [..., V] -> [..., D].

        The softmax is computed in float32, the matmul with the table in `dtype`. `log_z` is
        logsumexp(logits) if it is known, which saves two passes over the logits.
        """
        table = self._table(dtype)
        rows = logits.astype(jnp.float32).reshape(-1, self.vocab_size)  # [t, V]
        product = functools.partial(contract, 'tv,vd->td')
        if self.execution.output_major and self.vocab_size > LARGE_VOCABULARY:
            soft = expected_rows_by_parts(rows, product, table)  # [t, D]
        elif log_z is not None:
            soft = product(jnp.exp(rows - log_z.reshape(-1, 1)).astype(dtype), table)
        else:
            soft = product(jax.nn.softmax(rows, axis=-1).astype(dtype), table)
        scale: float = self.width**0.5
        return (soft * scale).astype(dtype).reshape(*logits.shape[:-1], self.width)

    def decode(
        self, hidden: Float[Array, '*B D'], table: Float[Array, 'V D'] | None = None
    ) -> Float[Array, '*B V']:
        """Returns float32 logits, soft-capped by cap * tanh(logits / cap): [..., D] -> [..., V].

        `table` [n, D] replaces the whole embedding by the rows of some tokens.
        """
        tokens = hidden.reshape(-1, self.width)  # [t, D]
        dtype = hidden.dtype
        embedding = self._table(dtype) if table is None else table.astype(dtype)  # [n, D]
        large = len(embedding) > LARGE_VOCABULARY
        if self.execution.output_major and large and FEW_ROWS // 2 < len(tokens) <= FEW_ROWS:
            logits = logits_by_parts(tokens, self._logits, embedding)
        else:
            logits = self._logits(tokens, embedding)  # [t, n]
        return logits.reshape(*hidden.shape[:-1], len(embedding))

    def _table(self, dtype: DTypeLike) -> Float[Array, 'n D']:
        """Returns the embedding as matmuls read it: in `dtype`, gathered along the mesh."""
        axes = WEIGHTS['embedder/embedding'].axes
        return self.execution.gathered_in_stages(self.embedding.astype(dtype), *axes)

    def _logits(
        self, tokens: Float[Array, 't D'], table: Float[Array, 'n D']
    ) -> Float[Array, 't n']:
        """Returns the logits of tokens [t, D] for rows [n, D] of the table: [t, n]."""
        if self.execution.output_major:  # the table has the layout [out, in]
            logits = project('td,dv->tv', tokens, table, output_major=True)
        else:
            logits = contract('td,vd->tv', tokens, table)
        if self.final_logit_softcap is None:
            return logits
        return self.final_logit_softcap * jnp.tanh(logits / self.final_logit_softcap)


def rope_tables(
    positions: Int[Array, '*B'], head_dim: int, theta: float, fraction: float, scale: float
) -> tuple[Float[Array, '*B h'], Float[Array, '*B h']]:
    """Returns cosine and sine of the rotary embedding, [..., H/2] float32 for positions [...].

    Frequency i is theta^(-2i/H) for i < fraction * H/2 and zero above ("proportional" RoPE of
    Gemma 4; fraction 1 is the usual RoPE, Su et al. 2021, arXiv:2104.09864). All frequencies are
    divided by `scale` ("linear" scaling of Gemma 3, Chen et al. 2023, arXiv:2306.15595).
    """
    half = head_dim // 2
    index = np.arange(half)
    # Computed on the host in float64: the power function of an accelerator has a relative error of
    # about 1e-6, which is multiplied by the position.
    frequency = np.where(index < int(fraction * half), theta ** (-2.0 * index / head_dim), 0.0)
    angle = positions[..., None].astype(jnp.float32) * np.float32(frequency / scale)  # [..., H/2]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(
    x: Float[Array, '*B heads H'], cos: Float[Array, '*B h'], sin: Float[Array, '*B h']
) -> Float[Array, '*B heads H']:
    """Rotates pairs (i, i + H/2) of x [..., heads, H] by tables [..., H/2], in float32."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [..., heads, H/2]
    cos, sin = cos[..., None, :], sin[..., None, :]  # [..., 1, H/2]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
