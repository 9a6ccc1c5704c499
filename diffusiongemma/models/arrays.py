"""Type names for arrays, abstract arrays and parameters."""

from typing import Any

import jax
import numpy as np

# An array on a device, a traced array, or an array on the host.
AnyArray = jax.Array | np.ndarray

# Anything with a shape and a dtype.
ArrayOrShape = jax.Array | jax.ShapeDtypeStruct

# Parameters of a model, or some of them: a nested dict whose leaves are arrays, abstract arrays or
# quantized kernels.
Params = dict[str, Any]
