"""From a ConfigDict (ml_collections) to values of frozen dataclasses, and back to JSON."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusiongemma.checkpoints.fields import read_model_config
from diffusiongemma.data.sources import DataSpec, nearest
from diffusiongemma.models.config import ModelConfig
from diffusiongemma.parallel import processes

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar('T', bound='DataclassInstance')

KNOWN = 'known keys'  # what a hint lists

# Of every program that trains; without them nothing changes.
OPTIONAL_KEYS = ('compute', 'light', 'drafting')


def build(cls: type[T], values: Any, where: str) -> T:
    """A config dataclass from a dict of its fields.

    Raises:
      ValueError: an unknown key (the nearest known one is named), or a missing one.
    """
    values = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise ValueError(f'config.{where} has no key {name!r}; {nearest(name, fields, KNOWN)}')
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f'config.{where} lacks {missing}.')
    return cls(**values)


def model_config(config: ConfigDict) -> ModelConfig:
    """The model of `config.model`."""
    return read_model_config(config.model.to_dict(), 'config.model')


def data_specs(config: ConfigDict) -> list[DataSpec]:
    """The sources of `config.data.sources`."""
    return [DataSpec.from_config(source) for source in config.data.sources]


def compute_dtype(config: ConfigDict) -> Any:
    """The dtype of `config.dtype`: 'float32' or 'bfloat16'."""
    if config.dtype not in ('float32', 'bfloat16'):
        raise ValueError(f"config.dtype must be 'float32' or 'bfloat16', got {config.dtype!r}.")
    return jnp.dtype(config.dtype)


def check_keys(config: ConfigDict, known: tuple[str, ...]) -> None:
    """Raises ValueError when the config has a top-level key that this program does not read."""
    for name in config:
        if name not in (*known, *OPTIONAL_KEYS):
            raise ValueError(
                f'config has no key {name!r}; {nearest(name, (*known, *OPTIONAL_KEYS), KNOWN)}'
            )
    # A denoiser that is trained to draft has no stages.
    stages = ('stage1', 'stage2') if config.get('drafting') else ()
    missing = [name for name in known if name not in config and name not in stages]
    if missing:
        raise ValueError(f'config lacks {missing}; see configs/tiny.py.')


def profiled(config: ConfigDict, profile: bool) -> ConfigDict:
    """The config, with `profile` such that a few steps are traced (see `LoopConfig`)."""
    if not profile:
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.train.profile_steps = config.train.get('profile_steps') or 3
    return config


def write_resolved(config: ConfigDict, workdir: Path) -> None:
    """Writes what the run was configured with to `workdir`/config.json.

    Raises:
      ValueError: the processes of the run do not share `workdir`.
    """
    processes.check_shared(workdir)
    if processes.is_writer():
        text = json.dumps(json_values(config), indent=2)
        (workdir / 'config.json').write_text(text + '\n')


def json_values(config: ConfigDict) -> dict[str, Any]:
    """Returns a config as JSON values, rules as their text.

    Raises:
      ValueError: it holds a value that is neither.
    """
    return json.loads(json.dumps(config.to_dict(), default=_as_text))


def _as_text(value: Any) -> str:
    """Returns what JSON holds of a rule: its text, which `SamplingConfig` reads."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return repr(value)
    raise ValueError(
        f'the config holds {value!r}, which config.json cannot: use numbers, texts, tuples, dicts '
        "and rules such as 'TopK(k=4)'."
    )
