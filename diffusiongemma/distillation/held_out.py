"""Measures accepted lengths on held-out examples."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from diffusiongemma.data.packing import RowLayout, pack_examples
from diffusiongemma.distillation.canvases import Batch
from diffusiongemma.distillation.drafting import (
    Drafting,
    acceptance_by_position,
    accepted_lengths,
)
from diffusiongemma.distillation.step import Constants, causal_pass, teacher_states
from diffusiongemma.models.denoiser import DiffusionGemma
from diffusiongemma.parallel import processes


def held_out_batch(
    examples: Sequence[dict[str, Any]],
    tokenizer: Any,
    row_length: int,
    sharding: jax.sharding.Sharding,
) -> Batch:
    """Returns examples as one packed batch with the sharding of training batches.

    Rows are repeated until all devices have the same number of rows.
    """
    layout = RowLayout(row_length, 0, 0, tokenizer.pad_id)
    packed = pack_examples(examples, tokenizer, layout)
    rows = len(packed['tokens'])
    ways = sharding.num_devices if sharding is not None else 1
    index = np.arange(-(-rows // ways) * ways) % rows
    on_host = {name: value[index] for name, value in packed.items()}
    batch: Batch = processes.in_shards(on_host, jax.tree.map(lambda _: sharding, on_host))
    return batch


def held_out_metrics(
    model: DiffusionGemma, objective: Drafting, constants: Constants, batch: Batch
) -> Callable[[Any], dict[str, jax.Array]]:
    """Returns a function from the trained parameters to metrics of the drafts on a batch.

    `held_out/accepted_length` and `held_out/expected_accepted_length` are tokens per verification,
    including the bonus token. `held_out/acceptance/01`, `02`, ... are the acceptance rates at each
    draft position, given that all earlier tokens were accepted. Anchors are the same in every call
    and only in responses.
    """
    objective = dataclasses.replace(objective, prompts=False)

    @jax.jit
    def metrics(trained: Any, constants: Constants, batch: Batch) -> dict[str, jax.Array]:
        params = constants.student | trained
        hidden, prefix = causal_pass(model, params, batch)
        teacher = teacher_states(model, model, params, constants, batch, hidden)
        draw = objective.draw(jax.random.key(0), batch)
        args = (draw.anchors, draw.noise, batch, prefix, teacher)
        draft = objective.draft(model, params, *args)
        measured = accepted_lengths(draft, draw.canvases)
        shares = acceptance_by_position(draft, draw.canvases)
        measured |= {f'acceptance/{k + 1:02}': share for k, share in enumerate(shares)}
        return {f'held_out/{name}': value for name, value in measured.items()}

    return lambda trained: metrics(trained, constants, batch)
