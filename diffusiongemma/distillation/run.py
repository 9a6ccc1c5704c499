"""A distillation run from teacher to evaluated student: targets, both stages, evaluation."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from ml_collections import ConfigDict
from rich.console import Console

from diffusiongemma import configuration
from diffusiongemma.checkpoints.adapters import fingerprint
from diffusiongemma.checkpoints.bundle import TOKENIZER_FILE, save_bundle
from diffusiongemma.checkpoints.load import (
    BASE_DIR,
    DRAFT_IDS_FILE,
    EXPORT_DIR,
    load_model,
    saved_draft_ids,
)
from diffusiongemma.checkpoints.store import CheckpointStore, describe_model
from diffusiongemma.data.packing import tokenize
from diffusiongemma.data.pipeline import eval_examples, make_train_iterator
from diffusiongemma.data.sources import DataSpec, Source, load_source, split_source
from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.diffusion.corruption import Corruption, MaskedCorruption, UniformCorruption
from diffusiongemma.distillation.compute import ComputeConfig
from diffusiongemma.distillation.draft_vocabulary import draft_vocabulary
from diffusiongemma.distillation.drafting import DraftingConfig
from diffusiongemma.distillation.held_out import held_out_batch, held_out_metrics
from diffusiongemma.distillation.loop import LoopConfig, fit, start_or_resume
from diffusiongemma.distillation.lora import LoraStudent, lora_student
from diffusiongemma.distillation.reporting import progress, read_metrics
from diffusiongemma.distillation.stage1 import Stage1
from diffusiongemma.distillation.stage2 import Stage2
from diffusiongemma.distillation.state import (
    OptimizerConfig,
    TrainState,
    create_state,
    make_optimizer,
)
from diffusiongemma.distillation.step import (
    Constants,
    Objective,
    join_parts,
    make_distillation_step,
)
from diffusiongemma.distillation.student import (
    frozen_params,
    student_params_from_teacher,
    trained_params,
)
from diffusiongemma.distillation.targets import TargetsConfig, write_targets
from diffusiongemma.evaluation.compare import Comparison, Contestant, EvalConfig, compare
from diffusiongemma.evaluation.report import (
    comparison_table,
    plot_run,
    plot_sweep,
    print_samples,
    sweep_table,
)
from diffusiongemma.evaluation.sweep import Grid, summary, sweep, write_csv
from diffusiongemma.models.config import LIGHT, DenoiserConfig, LightConfig, ModelConfig
from diffusiongemma.models.denoiser import DRAFT_IDS, DiffusionGemma
from diffusiongemma.models.inference import for_inference
from diffusiongemma.models.transformer import Gemma, init_params, parameter_count
from diffusiongemma.parallel import make_mesh, param_shardings, processes
from diffusiongemma.sampling import Sampler, SamplingConfig
from diffusiongemma.sampling.sampler import main_mode

CONFIG_KEYS = (
    'seed', 'dtype', 'denoise_dtype', 'mesh', 'teacher', 'init', 'canvas_length',
    'denoiser', 'predict_next', 'self_conditioning', 'lora', 'targets', 'data',
    'corruption', 'ar_weight', 'stage1', 'stage2', 'optimizer', 'train', 'sampling', 'eval',
)  # fmt: skip
MAX_COUNTED = 20_000  # of each source, examples whose tokens are counted for a draft vocabulary
# Of a model's config, from one run to the next.
MAY_CHANGE = {'canvas_length', 'self_conditioning', 'mask_id'}


@dataclasses.dataclass(frozen=True)
class BatchConfig:
    """Shape of a training batch.

    Attributes:
      batch_size: rows, over all processes.
      row_length: tokens of a row.
      canvases_per_row: canvas slots of a row; of no use with `config.drafting`, whose canvases
        are drawn anew in each step.
      random_offset_rate: share of the documents whose canvases start inside the response.
      one_canvas: a document has one canvas, drawn at random, instead of all.
      workers: processes that make batches, on each host; 0 for a thread. The order of the data
        depends on it.
    """

    batch_size: int
    row_length: int
    canvases_per_row: int = 0
    random_offset_rate: float = 0.0
    one_canvas: bool = False
    workers: int = 0


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The frozen AR model that is distilled."""

    model: Gemma
    params: dict
    tokenizer: Tokenizer

    def on_host(self) -> 'Teacher':
        """The same with its parameters in host memory."""
        return dataclasses.replace(self, params=processes.on_host(self.params))

    def on_devices(self, mesh: jax.sharding.Mesh | None) -> 'Teacher':
        """The same with its parameters in their shards, or on one device without a mesh."""
        shardings = None if mesh is None else param_shardings(self.model, mesh)
        if shardings is None:
            return dataclasses.replace(self, params=jax.device_put(self.params))
        return dataclasses.replace(self, params=processes.in_shards(self.params, shardings))


def distill(config: ConfigDict, workdir: Path) -> Comparison:
    """Runs the distillation of `config`; goes on where an interrupted one stopped.

    `workdir` then holds config.json, targets/, checkpoints/, tensorboard/, metrics.jsonl, the
    exported student in model/, evaluation.json and distillation.png.
    """
    configuration.check_keys(config, CONFIG_KEYS)
    for source in (config.targets.source, config.eval.source):  # rather than after hours
        load_source(DataSpec.from_config(source))
    configuration.write_resolved(config, workdir)
    teacher = load_teacher(config)
    logging.info('teacher: %d parameters', parameter_count(teacher.params))
    targets_config = configuration.build(TargetsConfig, config.targets, 'targets')
    targets = write_targets(
        teacher.model,
        teacher.params,
        teacher.tokenizer,
        targets_config,
        workdir / 'targets',
        make_mesh(config.mesh),
        seed=config.seed,
    )
    if targets_config.top_k_logits:  # what it said is in the targets
        teacher = teacher.on_host()
    student_model, state = train_student(config, teacher, targets, workdir)
    about = {'teacher': str(config.teacher), 'steps': int(state.step), 'seed': config.seed}
    about['sampling'] = configuration.json_values(config.sampling)
    lora = lora_student(config, student_model)
    if lora is None:
        frozen = frozen_params(student_model.config, teacher.params, saved_draft_ids(workdir))
        params = frozen | state.ema_params
    else:
        lora.save(workdir, state.ema_params, teacher.params, str(config.teacher), about)
        params = lora.combine(lora.base(teacher.params, make_mesh(config.mesh)), state.ema_params)
    on_teacher = {}
    if config.denoiser == LIGHT:  # the trained part alone, which names its teacher
        on_teacher['base'] = _seen_from_anywhere(config.teacher)
        on_teacher['base_fingerprint'] = fingerprint(teacher.params)
        params = {name: value for name, value in params.items() if name not in teacher.params}
    save_bundle(
        workdir / EXPORT_DIR,
        student_model.config,
        params,
        teacher.tokenizer,
        dtype='bfloat16',
        about=about,
        **on_teacher,
    )
    return evaluate_run(config, teacher.on_devices(_mesh_to_load_on(config)), workdir)


def _seen_from_anywhere(model: str) -> str:
    """The name of a model, or its absolute path."""
    return str(Path(model).resolve()) if Path(model).is_dir() else str(model)


def load_teacher(config: ConfigDict) -> Teacher:
    """The teacher of `config.teacher`; raises ValueError without one, or without its tokenizer."""
    if not config.teacher:
        raise ValueError(
            'config.teacher is empty: give the directory of the downloaded checkpoint with '
            '--config.teacher=DIRECTORY.'
        )
    dtype = configuration.compute_dtype(config)
    model, params, tokenizer = load_model(config.teacher, dtype, _mesh_to_load_on(config))
    if tokenizer is None:
        raise ValueError(f'{config.teacher} has no tokenizer.model; copy it there.')
    gemma = _placed(config, Gemma(model.config.autoregressive, model.dtype))
    return Teacher(gemma, params, tokenizer)


def _mesh_to_load_on(config: ConfigDict) -> jax.sharding.Mesh | None:
    """The run's mesh where it splits parameters or has devices of several processes.

    Elsewhere a copy on one device serves.
    """
    mesh = make_mesh(config.mesh)
    return mesh if mesh.size > mesh.shape['data'] or jax.process_count() > 1 else None


def _placed(config: ConfigDict, model: Gemma) -> Gemma:
    """The model, computed where its parameters were loaded to."""
    mesh = _mesh_to_load_on(config)
    return model if mesh is None else ComputeConfig.of(config).place(model, mesh)


def corruption_process(name: str, tokenizer: Tokenizer) -> Corruption:
    """The forward process of `config.corruption`: 'uniform' or 'masked'."""
    if name == 'uniform':
        return UniformCorruption(tokenizer.vocab_size)
    if name == 'masked':
        return MaskedCorruption(tokenizer.mask_id)
    raise ValueError(f"config.corruption must be 'uniform' or 'masked', got {name!r}.")


def objectives(config: ConfigDict, tokenizer: Tokenizer) -> list[tuple[Objective, int]]:
    """The objectives of the run in their order, each with the step at which it ends."""
    corruption = corruption_process(config.corruption, tokenizer)
    if config.get('drafting'):
        drafting = configuration.build(DraftingConfig, config.drafting, 'drafting')
        return [(drafting.objective(corruption, config.canvas_length), config.train.num_steps)]
    if config.denoiser == LIGHT:
        raise ValueError(
            "config.denoiser='light' is trained to draft: give it a section config.drafting, as "
            'configs/tiny.py has.'
        )
    sampling = sampling_config(config, tokenizer)
    shared = {'corruption': corruption, 'schedule': sampling.schedule}
    stage2 = config.stage2.to_dict()
    first_step, last_step = stage2.pop('first_step'), config.train.num_steps
    stages = [
        (configuration.build(Stage1, shared | config.stage1.to_dict(), 'stage1'), first_step),
        (
            configuration.build(
                Stage2, shared | {'acceptance': sampling.acceptance_rule} | stage2, 'stage2'
            ),
            last_step,
        ),
    ]
    return [(objective, min(end, last_step)) for objective, end in stages]


def student_model(config: ConfigDict, teacher: Gemma, tokenizer: Tokenizer) -> DiffusionGemma:
    """The student that `config` makes of an AR Gemma."""
    light = None
    if config.denoiser == LIGHT:
        light = configuration.build(LightConfig, config.get('light') or {}, 'light')
    denoiser = DenoiserConfig(
        canvas_length=config.canvas_length,
        kind=config.denoiser,
        predict_next=config.predict_next,
        self_conditioning=config.self_conditioning,
        mask_id=getattr(corruption_process(config.corruption, tokenizer), 'mask_id', None),
        light=light,
    )
    return DiffusionGemma(teacher.config.replace(denoiser=denoiser), teacher.dtype)


def optimizer_of(config: ConfigDict) -> optax.GradientTransformation:
    """The optimizer of `config.optimizer` for as many steps as `config.train` has."""
    settings = configuration.build(OptimizerConfig, config.optimizer, 'optimizer')
    return make_optimizer(settings, config.train.num_steps)


def distillation_step(
    config: ConfigDict,
    model: DiffusionGemma,
    teacher: Gemma,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    lora: LoraStudent | None,
) -> Callable[..., Any]:
    """The step that `config` asks for, see `make_distillation_step`."""
    return make_distillation_step(
        model,
        teacher,
        objective,
        optimizer,
        ar_weight=config.ar_weight,
        ema_decay=configuration.build(OptimizerConfig, config.optimizer, 'optimizer').ema_decay,
        seed=config.seed,
        microbatches=ComputeConfig.of(config).microbatches,
        combine=join_parts if lora is None else lora.combine,
    )


def draft_ids_of(
    config: ConfigDict, student: ModelConfig, targets: Source, tokenizer: Tokenizer
) -> Any:
    """The draft vocabulary [Vd] int32 of a light student; None without one.

    Tokens are counted in the targets and in all texts of their source, `size` or not: a model that
    writes with 262,144 tokens shows few of them in the targets of one run.
    """
    light = student.denoiser.light if student.denoiser else None
    if light is None or not light.draft_vocab_size:
        return None
    spec = DataSpec.from_config(config.targets.source)
    sources = (targets, load_source(dataclasses.replace(spec, size=None)))
    documents = (
        tokenize(source[index], tokenizer).tokens
        for source in sources
        for index in range(min(len(source), MAX_COUNTED))
    )
    return jnp.asarray(draft_vocabulary(documents, tokenizer, light.draft_vocab_size))


def canvases_per_row(config: ConfigDict, shape: BatchConfig) -> int:
    """Canvas slots of a packed row: none where the objective draws canvases itself."""
    if config.get('drafting'):
        return 0
    if not shape.canvases_per_row:
        raise ValueError('config.data.canvases_per_row is missing: canvas slots of a row, >= 1.')
    return shape.canvases_per_row


def train_student(
    config: ConfigDict, teacher: Teacher, targets: DataSpec, workdir: Path
) -> tuple[DiffusionGemma, TrainState]:
    """From the teacher's weights to a student: stage 1, then stage 2, or all to draft."""
    loop = configuration.build(LoopConfig, config.train, 'train')
    optimizer = optimizer_of(config)
    shape = configuration.build(BatchConfig, config.data, 'data')
    top_k = configuration.build(TargetsConfig, config.targets, 'targets').top_k_logits
    stages = objectives(config, teacher.tokenizer)
    model = student_model(config, teacher.model, teacher.tokenizer)
    mesh, compute = make_mesh(config.mesh), ComputeConfig.of(config)
    model = compute.place(model, mesh)
    teacher = dataclasses.replace(teacher, model=compute.place(teacher.model, mesh))
    teacher_params = processes.in_shards(teacher.params, param_shardings(teacher.model, mesh))
    lora = lora_student(config, model)
    held_out = None
    if config.get('drafting'):
        count = configuration.build(DraftingConfig, config.drafting, 'drafting').held_out
        targets, held_out = split_source(targets, count)
    started = load_student(config, model) if config.init else None
    if lora is None:
        if started is None:
            draft_ids = draft_ids_of(config, model.config, targets, teacher.tokenizer)
        else:  # the rows of its head and of its serial correction stand for these tokens
            draft_ids = started.get(DRAFT_IDS)
        frozen = frozen_params(model.config, teacher_params, draft_ids)
        constants = Constants(teacher=None if frozen else teacher_params, student=frozen)
        shardings = trained_params(model.config, param_shardings(model, mesh))
    else:
        constants = lora.constants(teacher_params, mesh)
        shardings = lora.shardings(teacher_params, mesh)
    if top_k:  # the batches hold what the teacher said
        constants = constants._replace(teacher=None)

    def init(source: dict) -> TrainState:
        """From the teacher's parameters, or those of the student `config.init`."""
        if lora is not None:
            return create_state(lora.init(source), optimizer)
        if not config.init:
            fresh = init_params(model, jax.random.key(config.seed))
            source = student_params_from_teacher(fresh, source, model.config)
        return create_state(trained_params(model.config, source), optimizer)

    source = teacher_params
    if started is not None:
        source = processes.in_shards(started, param_shardings(model, mesh))

    rows = compute.batch_sharding(mesh, shape.batch_size)
    part, parts = processes.data_shard(rows, shape.batch_size)
    batches = make_train_iterator(
        targets,
        teacher.tokenizer,
        batch_size=shape.batch_size // parts,
        row_length=shape.row_length,
        canvases_per_row=canvases_per_row(config, shape),
        canvas_length=config.canvas_length,
        seed=config.seed,
        random_offset_rate=shape.random_offset_rate,
        one_canvas=shape.one_canvas,
        top_k=top_k,
        process_index=part,
        process_count=parts,
        workers=shape.workers,
    )
    about = describe_model(model.config, teacher.tokenizer.content_hash)
    if lora is not None:
        about['lora'] = json.loads(json.dumps(dataclasses.asdict(lora.config)))
    store = CheckpointStore(workdir, loop.max_to_keep, about, loop.best_metric)
    state = start_or_resume(init, shardings, mesh, store, batches, source)
    del source, started, teacher_params  # `constants` has what the steps read
    if processes.is_writer():
        teacher.tokenizer.save(workdir / TOKENIZER_FILE)
    if constants.student:  # checkpoints hold the trained part only
        save_bundle(workdir / BASE_DIR, teacher.model.config, teacher.params, teacher.tokenizer)
        if DRAFT_IDS in constants.student and processes.is_writer():
            np.save(workdir / DRAFT_IDS_FILE, np.asarray(constants.student[DRAFT_IDS]))
        processes.as_writer_says(None)  # it is written
    with contextlib.closing(batches):
        for objective, last_step in stages:
            if int(state.step) >= last_step:
                continue
            step = distillation_step(config, model, teacher.model, objective, optimizer, lora)
            step = jax.jit(step, donate_argnums=0)
            evaluate = None
            if held_out is not None:
                batch = held_out_batch(held_out, teacher.tokenizer, shape.row_length, rows)
                evaluate = held_out_metrics(model, objective, constants, batch)
            state = fit(
                lambda state, batch, step=step: step(state, constants, batch),
                state,
                batches,
                store,
                dataclasses.replace(loop, num_steps=last_step),
                workdir=workdir,
                description=type(objective).__name__.lower(),
                batch_sharding=rows,
                batch_size=shape.batch_size,
                evaluate=evaluate,
            )
    store.close()
    return model, state


def load_student(config: ConfigDict, model: DiffusionGemma) -> dict:
    """The parameters of `config.init`: a student like `model`, but for what training may change."""
    source, params, _ = load_model(config.init, mesh=_mesh_to_load_on(config))
    has, asked = source.config.to_dict(), model.config.to_dict()
    differing = [
        f'{name}={has[name]!r}, not {asked[name]!r}'
        for name in sorted(set(asked) - MAY_CHANGE)
        if has[name] != asked[name]
    ]
    if differing:
        raise ValueError(
            f'config.init: {config.init} is not the student that this config describes: it has '
            f'{"; ".join(differing)}.'
        )
    return params


def sampling_config(config: ConfigDict, tokenizer: Tokenizer) -> SamplingConfig:
    """The `SamplingConfig` of `config.sampling` for this tokenizer."""
    fields = SamplingConfig.tokenizer_fields(tokenizer) | config.sampling.to_dict()
    return configuration.build(SamplingConfig, fields, 'sampling')


class Evaluation(NamedTuple):
    """What `compare` and `sweep` take, in their order."""

    teacher: Contestant
    student: Contestant
    tokenizer: Tokenizer
    examples: list[dict[str, Any]]
    config: EvalConfig


def open_evaluation(config: ConfigDict, teacher: Teacher, checkpoint: str | Path) -> Evaluation:
    """The student in `checkpoint`, the teacher and the examples of `config.eval.source`."""
    values = config.eval.to_dict()
    values.pop('sweep', None)
    examples = eval_examples(DataSpec.from_config(values.pop('source')))
    eval_config = configuration.build(EvalConfig, values, 'eval')
    dtype = configuration.compute_dtype(config)
    student, student_params, tokenizer = load_model(checkpoint, dtype, _mesh_to_load_on(config))
    if tokenizer is None or tokenizer.content_hash != teacher.tokenizer.content_hash:
        raise ValueError(
            f'{checkpoint} and the teacher {config.teacher} have different tokenizers; '
            'a student is compared with the teacher that it was distilled from.'
        )
    student, student_params = for_inference(_placed(config, student), student_params)
    teacher_model, teacher_params = for_inference(teacher.model, teacher.params)
    sampling = sampling_config(config, tokenizer)
    greedy = dataclasses.replace(sampling, temperature=0.0)
    return Evaluation(
        (Sampler(teacher_model, greedy, mode='autoregressive'), teacher_params),
        (Sampler(student, sampling, main_mode(student)), student_params),
        tokenizer,
        examples,
        eval_config,
    )


def compare_with_teacher(
    config: ConfigDict, teacher: Teacher, checkpoint: str | Path
) -> tuple[Comparison, list[dict[str, Any]], list[str], list[str]]:
    """Evaluates the student in `checkpoint` against the teacher on `config.eval.source`.

    Returns:
      The numbers, the examples, the teacher's responses and the student's.
    """
    evaluation = open_evaluation(config, teacher, checkpoint)
    comparison, by_teacher, by_student = compare(
        *evaluation, jax.random.key(config.seed), watch=progress
    )
    return comparison, evaluation.examples, by_teacher, by_student


def sweep_student(config: ConfigDict, checkpoint: str | Path, output: Path) -> dict[str, Any]:
    """Evaluates the student at every point of `config.eval.sweep`.

    Prints the table, writes sweep.csv and sweep.png to the directory `output`.

    Returns:
      The sweep in a few numbers, see `summary`.

    Raises:
      ValueError: the grid is empty or has a bad value, or `output` can't be written.
      FileNotFoundError: there is no such checkpoint.
    """
    grid = configuration.build(Grid, config.eval.get('sweep', {}), 'eval.sweep')
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / 'sweep.csv').touch()
    except OSError as error:  # rather than after the sweep
        raise ValueError(f'cannot write to {output}: {error.strerror}.') from error
    evaluation = open_evaluation(config, load_teacher(config), checkpoint)
    console = Console()
    points = sweep(*evaluation, grid, jax.random.key(config.seed), console)
    write_csv(output / 'sweep.csv', points)
    batch_size = evaluation.config.speed_batch_sizes[0]
    plot_sweep(output / 'sweep.png', points, batch_size)
    console.print(sweep_table(points, batch_size))
    console.print(f'table: {output / "sweep.csv"}  plot: {output / "sweep.png"}')
    return summary(points)


def evaluate_run(config: ConfigDict, teacher: Teacher, workdir: Path) -> Comparison:
    """Evaluates the exported student; prints the table and samples, writes plot and numbers."""
    comparison, examples, by_teacher, by_student = compare_with_teacher(config, teacher, workdir)
    if not processes.is_writer():
        return comparison
    console = Console()
    print_samples(console, examples[:3], by_teacher[:3], by_student[:3])
    console.print(comparison_table(comparison))
    (workdir / 'evaluation.json').write_text(
        json.dumps(dataclasses.asdict(comparison), indent=2) + '\n', encoding='utf-8'
    )
    plot_run(workdir / 'distillation.png', read_metrics(workdir), comparison)
    console.print(f'plot: {workdir / "distillation.png"}  student: {workdir / EXPORT_DIR}')
    print(json.dumps(dataclasses.asdict(comparison)))
    console.print(
        f'next: python -m diffusiongemma.sample --checkpoint={workdir} --mode=lossless --watch '
        f'--prompt={json.dumps(examples[0]["prompt"])}',
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return comparison
