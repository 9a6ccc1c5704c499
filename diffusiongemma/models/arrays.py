"""Names for what functions take and return: arrays, what has the shape of one, and parameters."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

# On a device or traced, or on the host; functions that only read it take both.
AnyArray = jax.Array | np.ndarray

# The arrays of shapes in signatures, `Float[Array, 'B C V']`. NumPy's pass the checks of the test
# run too: functions that are not traced work with them as well.
if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = AnyArray

# What tells a shape and a dtype.
ArrayOrShape = jax.Array | jax.ShapeDtypeStruct

# Parameters of a model, or some of them: from each name to an array, a shape in the place of one,
# a quantized kernel, or a dict of the same.
Params = dict[str, Any]
