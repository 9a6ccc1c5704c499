"""Names for what functions take and return: arrays, what has the shape of one, and parameters."""

from typing import Any

import jax
import numpy as np

# On a device or traced, or on the host; functions that only read it take both.
AnyArray = jax.Array | np.ndarray

# What tells a shape and a dtype.
ArrayOrShape = jax.Array | jax.ShapeDtypeStruct

# Parameters of a model, or some of them: from each name to an array, a shape in the place of one,
# a quantized kernel, or a dict of the same.
Params = dict[str, Any]
