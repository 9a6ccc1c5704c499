"""Type names for arrays, abstract arrays and parameters."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

# An array on a device, a traced array, or an array on the host.
AnyArray = jax.Array | np.ndarray

# The array type of shapes in signatures, `Float[Array, 'B C V']`. NumPy arrays pass the checks of
# the test run too, because functions that are not traced accept them.
if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = AnyArray

# Anything with a shape and a dtype.
ArrayOrShape = jax.Array | jax.ShapeDtypeStruct

# Parameters of a model, or some of them: a nested dict whose leaves are arrays, abstract arrays or
# quantized kernels.
Params = dict[str, Any]
