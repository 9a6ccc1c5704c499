"""Tests that shapes in signatures are checked in test runs, and only there."""

import importlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from shape_checks import CHECKED

from diffusiongemma.data.packing import cut_canvases
from diffusiongemma.diffusion.corruption import UniformCorruption
from diffusiongemma.distillation.losses import cross_entropy, mean_weights
from diffusiongemma.models.masks import CausalMask, KeyTokens, canvas_mask
from diffusiongemma.sampling import EntropyBound, StableAndConfident
from diffusiongemma.sampling.controls import restrict
from diffusiongemma.sampling.epilogue import Prediction, read_logits

ONE_KEY_OF_TWO = KeyTokens(jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1), jnp.int32))
AS_A_USER = """
import sys
import jax.numpy as jnp
from diffusiongemma.sampling import EntropyBound
print(EntropyBound().accept(jnp.zeros(3, jnp.int32)).shape, 'beartype' in sys.modules)
"""


@pytest.mark.parametrize('name', CHECKED)
def test_every_module_that_is_listed_is_checked(name):
    loader = importlib.import_module(name).__loader__
    assert type(loader).__module__ == 'jaxtyping._import_hook', f'{name} was imported too early'


@pytest.mark.parametrize(
    'call',
    [
        lambda: EntropyBound().accept(jnp.zeros((2, 3), jnp.int32)),  # entropies are floats
        lambda: StableAndConfident().should_stop(
            jnp.zeros((2, 2, 4), jnp.int32), jnp.zeros((2, 3))
        ),
        lambda: restrict(jnp.zeros((2, 3, 5)), jnp.zeros((2, 4), jnp.int32), None),
        lambda: cross_entropy(jnp.zeros((2, 3, 5)), jnp.zeros((3, 2), jnp.int32)),
        lambda: mean_weights([1.0, 0.0]),  # no array
        lambda: UniformCorruption(5).corrupt(
            jax.random.key(0), jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 1, 1))
        ),
        lambda: canvas_mask(jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.int32), 4, ONE_KEY_OF_TWO, 3),
        lambda: cut_canvases(np.zeros((2, 3), np.int32), 4),
    ],
)
def test_a_wrong_shape_or_dtype_fails_a_test(call):
    with pytest.raises(TypeCheckError):
        call()
    with pytest.raises(TypeCheckError):
        jax.eval_shape(call)  # the same in a compiled program


def test_a_wrong_result_fails_a_test(monkeypatch):
    monkeypatch.setattr(jnp, 'take_along_axis', lambda values, *args, **kwargs: values[None])
    with pytest.raises(TypeCheckError, match='return value'):
        EntropyBound().accept(jnp.zeros((2, 3)))


def test_fields_of_a_pytree_are_checked_where_the_package_makes_one():
    values = read_logits(*(jnp.zeros(s, d) for s, d in [((2, 3, 5), float), *[((2, 3), int)] * 2]))
    leaves = vars(values) | {'margins': jnp.zeros((2, 4))}
    make = 'made = Prediction(**leaves)'
    own = {'Prediction': Prediction, 'leaves': leaves, '__name__': 'diffusiongemma.some_module'}
    with pytest.raises(TypeCheckError, match='margins'):
        exec(make, own)
    exec(make, own | {'leaves': vars(values)})
    # JAX creates pytrees too, with leaves that need not be arrays.
    assert jax.tree.map(lambda leaf: leaf.shape, values).margins == (2, 3)
    mask = CausalMask(*ONE_KEY_OF_TWO, ONE_KEY_OF_TWO, window=None)
    assert jax.tree.map(lambda _: None, mask).positions is None


def test_a_user_has_no_checks():
    done = subprocess.run([sys.executable, '-c', AS_A_USER], capture_output=True, text=True)
    assert done.stdout == '(3,) False\n', done.stderr
