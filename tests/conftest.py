"""Sets up eight virtual CPU devices, the compilation cache and tiny configs for all tests."""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# XLA takes most of the time of these tests, because it compiles many small programs that run for
# milliseconds. Without optimizations it takes half as long, and the errors have the same bounds.
COMPILE_FAST = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
_OF_SOME_VERSIONS = (
    '--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
    ' --xla_cpu_prefer_vector_width=128'
)
_DEVICES = '--xla_force_host_platform_device_count=8'


def _starts_with(xla_flags: str) -> bool:
    """Returns whether the installed jaxlib knows the flags; it aborts if it does not."""
    environment = os.environ | {'XLA_FLAGS': xla_flags, 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, '-c', 'import jax; jax.devices()']
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0


# This must be set before jax starts, also for processes that tests start. Equal programs of tests
# and processes are compiled once; pytest's workers inherit the cache of their parent process.
if 'PYTEST_XDIST_WORKER' not in os.environ:
    _COMPILED = tempfile.TemporaryDirectory(prefix='diffusiongemma-tests-')
    os.environ['JAX_COMPILATION_CACHE_DIR'] = _COMPILED.name
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'  # small ones are compiled often
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'
if 'PYTEST_XDIST_WORKER' not in os.environ:
    if _starts_with(f'{COMPILE_FAST} {_OF_SOME_VERSIONS}'):
        COMPILE_FAST = f'{COMPILE_FAST} {_OF_SOME_VERSIONS}'
    os.environ['XLA_FLAGS'] = f'{COMPILE_FAST} {_DEVICES}'
# The environment of processes on one device, as users have it.
COMPILE_FAST = os.environ['XLA_FLAGS'].removesuffix(_DEVICES).strip()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402
import shape_checks  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# This must precede their imports. Processes that tests start have no checks, like those of users.
install_import_hook(shape_checks.CHECKED, 'shape_checks.typechecked')

from diffusiongemma.models import (  # noqa: E402
    AttentionConfig,
    DenoiserConfig,
    ModelConfig,
    MoEConfig,
    PerLayerConfig,
)

# Tracing creates millions of objects, few of which become garbage. Garbage collection at Python's
# default rate, which also scans the objects of imports, takes an eighth of the time of tests.
gc.set_threshold(200_000, 50, 100)


def pytest_collection_finish() -> None:
    """Excludes the objects of imports and of the test collection from garbage collection."""
    gc.collect()
    gc.freeze()


# Every run has the same examples, so that results are reproducible. HYPOTHESIS_PROFILE=explore
# generates new ones.
hypothesis.settings.register_profile('repeatable', derandomize=True, deadline=None)
hypothesis.settings.register_profile('explore', deadline=None)
hypothesis.settings.load_profile(os.environ.get('HYPOTHESIS_PROFILE', 'repeatable'))


@pytest.fixture(autouse=True, scope='module')
def _free_compiled_programs():
    """Frees compiled programs after a file once they are many.

    A process that has more than 65,530 memory maps crashes on Linux. Until then, later files use
    the programs of earlier ones, for which nothing needs to be traced again.
    """
    yield
    maps = Path('/proc/self/maps')
    if not maps.exists() or maps.read_bytes().count(b'\n') > 6_000:
        jax.clear_caches()


@pytest.fixture(scope='session')
def tiny_config() -> ModelConfig:
    """Returns a dense 3-layer denoiser with a scanned pattern, a tail, and short windows."""
    return ModelConfig(
        vocab_size=37,
        width=32,
        num_heads=4,
        ffn_width=48,
        layer_types=('sliding', 'full', 'sliding'),
        sliding=AttentionConfig(num_kv_heads=2, head_dim=8, window=5),
        full=AttentionConfig(
            num_kv_heads=1, head_dim=16, rope_theta=1e6, rope_fraction=0.25, value_is_key=True
        ),
        denoiser=DenoiserConfig(canvas_length=4),
    )


@pytest.fixture(scope='session')
def tiny_moe_config(tiny_config) -> ModelConfig:
    """Returns the same denoiser with routed experts."""
    return tiny_config.replace(moe=MoEConfig(num_experts=4, top_k=2, expert_width=16))


@pytest.fixture(scope='session')
def tiny_gemma3_config(tiny_config) -> ModelConfig:
    """Returns a Gemma 3: (1 + w) norms, scaled queries and positions, no value norm."""
    attention = {'num_kv_heads': 1, 'head_dim': 8}
    return tiny_config.replace(
        sliding=AttentionConfig(**attention, window=5),
        full=AttentionConfig(**attention, rope_theta=1e6, rope_scale=8.0),
        query_scale=8**-0.5,
        value_norm=False,
        layer_scalar=False,
        norm_scale_offset=1.0,
        final_logit_softcap=None,
    )


@pytest.fixture(scope='session')
def tiny_e2b_config(tiny_config) -> ModelConfig:
    """Returns an E2B: per-layer embeddings, shared keys and values, and a wide MLP.

    Both stacks have a scanned pattern and a tail, and a source of keys and values in each.
    """
    return tiny_config.replace(
        layer_types=('sliding', 'full', 'sliding', 'sliding', 'full', 'sliding'),
        full=AttentionConfig(num_kv_heads=1, head_dim=16, rope_theta=1e6, rope_fraction=0.25),
        per_layer=PerLayerConfig(width=6, vocab_size=37),
        num_kv_shared_layers=3,
        kv_shared_ffn_width=96,
    )
