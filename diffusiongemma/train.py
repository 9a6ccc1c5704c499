"""Trains an autoregressive Gemma, the teacher.

python -m diffusiongemma.train --config=configs/tiny_teacher.py --workdir=/tmp/teacher
"""

from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import config_flags

from diffusiongemma import cli, configuration, process_flags

with cli.extra_named(__name__):
    import optax

    from diffusiongemma.checkpoints.bundle import TOKENIZER_FILE, save_bundle
    from diffusiongemma.checkpoints.load import EXPORT_DIR, load_model
    from diffusiongemma.checkpoints.store import CheckpointStore, describe_model
    from diffusiongemma.data.pipeline import make_train_iterator
    from diffusiongemma.data.tokenizer import Tokenizer
    from diffusiongemma.distillation.ar_step import make_ar_train_step
    from diffusiongemma.distillation.experiment import TeacherTraining, write_resolved
    from diffusiongemma.distillation.loop import fit, start_or_resume
    from diffusiongemma.distillation.state import TrainState, create_state, make_optimizer
    from diffusiongemma.models.execution import compute_dtype
    from diffusiongemma.models.transformer import Gemma, init_params, parameter_count
    from diffusiongemma.parallel import param_shardings, processes

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Path of the config file.')
_WORKDIR = flags.DEFINE_string('workdir', None, 'Directory for checkpoints and metrics.')
_PROFILE = flags.DEFINE_bool('profile', False, 'Trace a few steps for xprof, to workdir/profile.')


def train(training: TeacherTraining, workdir: Path) -> TrainState:
    """Trains the Gemma of `training`, or resumes from the newest checkpoint in `workdir`.

    The averaged parameters are exported to `workdir`/model.
    """
    tokenizer = _load_tokenizer(training)
    write_resolved(training, workdir)
    model = Gemma(training.model, compute_dtype(training.dtype))
    loop, data, compute = training.train, training.data, training.compute
    optimizer = make_optimizer(training.optimizer, loop.num_steps)

    mesh = training.mesh.make()
    model = compute.place(model, mesh)
    rows = compute.batch_sharding(mesh, data.batch_size)
    part, parts = processes.data_shard(rows, data.batch_size)
    batches = make_train_iterator(
        data.sources,
        tokenizer,
        batch_size=data.batch_size // parts,
        row_length=data.row_length,
        canvases_per_row=0,
        canvas_length=0,
        seed=training.seed,
        process_index=part,
        process_count=parts,
    )
    about = describe_model(model.config, tokenizer.content_hash)
    store = CheckpointStore(workdir, loop.max_to_keep, about, loop.best_metric)
    state = start_or_resume(
        lambda: _initial_state(training, model, optimizer),
        param_shardings(model, mesh),
        mesh,
        store,
        batches,
    )
    write_resolved(training, workdir, fits=True)
    if processes.is_writer():
        tokenizer.save(workdir / TOKENIZER_FILE)
    logging.info('%d parameters', parameter_count(state.params))
    train_step = make_ar_train_step(
        model, optimizer, training.optimizer.ema_decay, compute.microbatches
    )
    state = fit(
        jax.jit(train_step, donate_argnums=0),
        state,
        batches,
        store,
        loop,
        workdir=workdir,
        description='teacher',
        batch_sharding=rows,
        batch_size=data.batch_size,
    )
    store.close()
    about = {'init': training.init, 'seed': training.seed, 'steps': int(state.step)}
    export, params = workdir / EXPORT_DIR, state.evaluated_params
    save_bundle(export, model.config, params, tokenizer, dtype='bfloat16', about=about)
    return state


def _load_tokenizer(training: TeacherTraining) -> Tokenizer:
    """Returns the tokenizer; raises ValueError if the model has no room for its tokens."""
    tokenizer, size = Tokenizer.load(training.tokenizer), training.model.vocab_size
    if tokenizer.vocab_size > size:
        raise ValueError(
            f'config.model.vocab_size={size} is less than the {tokenizer.vocab_size} tokens of '
            f'config.tokenizer={training.tokenizer}; use at least {tokenizer.vocab_size}.'
        )
    return tokenizer


def _initial_state(
    training: TeacherTraining, model: Gemma, optimizer: optax.GradientTransformation
) -> TrainState:
    """Returns the state at step 0, with random parameters or those of the model `config.init`."""
    if not training.init:
        params = init_params(model, jax.random.key(training.seed))
    else:
        source, params, _ = load_model(training.init)
        if source.config != model.config:
            raise ValueError(
                f'config.init: {training.init} has another architecture than config.model; '
                'change one of them.'
            )
    return create_state(params, optimizer, average=training.optimizer.average)


def main(argv: list[str]) -> None:
    """Starts or resumes the training of a teacher."""
    del argv
    process_flags.join()
    cli.say_devices()
    config = configuration.profiled(_CONFIG.value, _PROFILE.value)
    workdir = cli.output_directory('workdir', _WORKDIR.value)
    train(TeacherTraining.of(config), workdir)
    if processes.is_writer():
        print(
            f'teacher: {_WORKDIR.value}/{EXPORT_DIR}  next: python -m diffusiongemma.distill '
            f'--config=configs/tiny.py --config.teacher={_WORKDIR.value} --workdir=DIRECTORY'
        )


if __name__ == '__main__':
    flags.mark_flags_as_required(['config', 'workdir'])
    cli.run_main(main, TeacherTraining)
