"""Shows evaluation results: tables, responses side by side, and plots."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from diffusiongemma.evaluation.compare import Comparison
from diffusiongemma.evaluation.metrics import SampleMeasures
from diffusiongemma.evaluation.sweep import Point
from diffusiongemma.evaluation.tasks import is_correct


def comparison_table(result: Comparison) -> Table:
    """Returns a table with columns for the teacher, each mode of the student, and lookup drafts."""
    modes = ('diffusion', 'lossless') if result.mode == 'diffusion' else ('lossless',)
    table = Table(
        title=f'{result.num_examples} held-out problems: the teacher (autoregressive) and the '
        f'student; speed at batch {result.speed_batch_size}, same process, interleaved',
        caption='lookup: lossless with drafts copied from the text so far (no training)',
    )
    table.add_column('', no_wrap=True)
    for name in ('teacher', *modes, 'lookup'):
        table.add_column(name, justify='right')

    def row(name: str, teacher: str, diffusion: str, lossless: str, lookup: str = '-') -> None:
        cells = {'diffusion': diffusion, 'lossless': lossless}
        table.add_row(name, teacher, *(cells[mode] for mode in modes), lookup)

    row(
        'accuracy',
        f'{result.teacher_accuracy:.1%}',
        f'{result.student_accuracy:.1%}',
        f'{result.lossless_accuracy:.1%}',
    )
    row(
        "equal to the teacher's",
        '100.0%',
        f'{result.exact_match:.1%}',
        f'{result.lossless_exact_match:.1%}',
    )
    for name, teacher_value, student_value in _measures(result.teacher_samples, result):
        if result.mode == 'diffusion':
            row(name, teacher_value, student_value, '-')
    acceptance, lookup = result.acceptance, result.lookup_acceptance
    row(
        'accepted length (tokens per verification)',
        '-',
        '-',
        f'{acceptance.accepted_length:.2f}',
        f'{lookup.accepted_length:.2f}',
    )
    row('denoise passes per canvas', '-', f'{result.denoising_steps_per_canvas:.2f}', '-')
    row(
        'tokens per denoise pass',
        '-',
        f'{result.tokens_per_denoise_pass:.2f}',
        f'{result.lossless_tokens_per_denoise_pass:.2f}',
    )
    row(
        'tokens per pass, all counted',
        '1.00',
        f'{result.tokens_per_pass:.2f}',
        f'{result.lossless_tokens_per_pass:.2f}',
        f'{result.lookup_tokens_per_pass:.2f}',
    )
    row('share of the time that drafts take', '-', '-', f'{result.lossless_draft_share:.0%}')
    row(
        'tokens/s',
        f'{result.teacher_tokens_per_second:,.0f}',
        f'{result.student_tokens_per_second:,.0f}',
        f'{result.lossless_tokens_per_second:,.0f}',
        f'{result.lookup_tokens_per_second:,.0f}',
    )
    for speeds in (result, *result.larger_batches):
        row(
            f'speed-up at batch {speeds.speed_batch_size}',
            '1.00x',
            _ratio(speeds.speedup, speeds.speedup_spread),
            _ratio(speeds.lossless_speedup, speeds.lossless_speedup_spread),
            _ratio(speeds.lookup_speedup, speeds.lookup_speedup_spread),
        )
    return table


def _ratio(middle: float, spread: tuple[float, float]) -> str:
    """Returns a text such as '1.28x (1.15-1.41)': median, 10th and 90th percentile."""
    return f'{middle:.2f}x ({spread[0]:.2f}-{spread[1]:.2f})'


def _measures(*samples: SampleMeasures) -> Iterator[tuple[str, ...]]:
    """Yields table rows: the name of a measure, and its value for each set of samples."""

    def row(name: str, field: str, form: str) -> tuple[str, ...]:
        values = [getattr(sample, field) for sample in samples]
        return name, *('-' if value is None else format(value, form) for value in values)

    yield row('tokens before they differ', 'common_prefix', '.1f')
    yield row('teacher NLL, nats per token', 'teacher_nll', '.3f')
    yield row('token entropy, nats', 'token_entropy', '.2f')
    yield row('repeated 4-grams', 'repetition_4', '.1%')
    yield row('implausible pairs in canvases', 'implausible_within', '.1%')
    yield row('implausible pairs across borders', 'implausible_across', '.1%')


def print_samples(
    console: Console,
    examples: Sequence[Mapping[str, Any]],
    teacher_responses: Sequence[str],
    student_responses: Sequence[str],
) -> None:
    """Prints each problem with the answers of teacher and student side by side."""
    for example, by_teacher, by_student in zip(
        examples, teacher_responses, student_responses, strict=True
    ):
        grid = Table.grid(expand=True, padding=(0, 1))
        grid.add_column(ratio=1)
        grid.add_column(ratio=1)
        for name, response in (('teacher', by_teacher), ('student', by_student)):
            mark = '[green]right[/]' if is_correct(example, response) else '[red]wrong[/]'
            grid.columns[0 if name == 'teacher' else 1].header = f'{name}: {mark}'
        grid.show_header = True
        grid.add_row(_plain(by_teacher), _plain(by_student))
        console.print(_plain(f'\n{example["prompt"]}'), style='bold')
        console.print(Panel(grid))


def _plain(text: str) -> str:
    """Returns the text with console markup escaped, because a model may write square brackets."""
    from rich.markup import escape

    return escape(text)


def plot_run(path: Path, metrics: Sequence[Mapping[str, float]], result: Comparison) -> None:
    """Writes a PNG with the losses of the run and the comparison of student and teacher."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6), layout='constrained')
    loss_axes, quality_axes, speed_axes = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    _plot_training(loss_axes, metrics)
    names, colors = ['teacher', 'lossless'], ['tab:gray', 'tab:green']
    accuracies = [result.teacher_accuracy, result.lossless_accuracy]
    speeds = [result.teacher_tokens_per_second, result.lossless_tokens_per_second]
    ratios = [1.0, result.lossless_speedup]
    if result.mode == 'diffusion':
        names.append('diffusion')
        colors.append('tab:blue')
        accuracies.append(result.student_accuracy)
        speeds.append(result.student_tokens_per_second)
        ratios.append(result.speedup)
    bars = quality_axes.bar(names, [100 * value for value in accuracies], color=colors)
    quality_axes.bar_label(bars, fmt='%.1f')
    quality_axes.set(ylabel='held-out accuracy [%]', ylim=(0, 108), title='quality')
    ticks = [f'{name}\n{ratio:.2f}x' for name, ratio in zip(names, ratios, strict=True)]
    bars = speed_axes.bar(ticks, speeds, color=colors)
    speed_axes.bar_label(bars, fmt='%.0f')
    speed_axes.set(
        ylabel=f'tokens/s at batch {result.speed_batch_size}',
        ylim=(0, 1.1 * max(speeds)),
        title='speed',
    )
    figure.savefig(path, dpi=120)


ACCEPTED_LENGTH = 'held_out/accepted_length'
EXPECTED_ACCEPTED_LENGTH = 'held_out/expected_accepted_length'


def _plot_training(axes: Any, metrics: Sequence[Mapping[str, float]]) -> None:
    """Plots the accepted length of a student that is trained to draft, or else its losses."""
    if any(ACCEPTED_LENGTH in row for row in metrics):
        rows = [row for row in metrics if ACCEPTED_LENGTH in row]
        steps = [row['step'] for row in rows]
        axes.plot(steps, [row[ACCEPTED_LENGTH] for row in rows])
        axes.set(
            xlabel='step',
            ylabel='tokens per verification',
            title='accepted length on held-out text',
        )
        return
    steps = [row['step'] for row in metrics]
    for name, label in (('loss/denoise', 'denoise pass'), ('loss/encode', 'encode pass (KL)')):
        losses = [row[name] for row in metrics]
        if any(losses):  # a frozen encode pass has a loss of 0
            axes.plot(steps, losses, label=label)
    axes.set(xlabel='step', ylabel='loss [nats/token]', title='distillation', yscale='log')
    axes.legend()


def sweep_table(points: Sequence[Point], batch_size: int) -> Table:
    """Returns a table with one row per point of a sweep; speeds are measured at `batch_size`."""
    table = Table(
        title=f'quality against speed at batch {batch_size}, same process',
        caption='NLL under the teacher, nats per token; tok/denoise: tokens per denoise pass; '
        'tok/pass: commits and verifications counted too; steps: denoise passes per canvas; '
        'ratio of tokens/s to the teacher',
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    columns = {
        'mode': ('mode', ''),
        'canvas': ('canvas_length', 'd'),
        'bound': ('entropy_bound', 'g'),
        'max steps': ('max_denoising_steps', 'd'),
        'accuracy': ('accuracy', '.1%'),
        'NLL': ('teacher_nll', '.3f'),
        'tok/denoise': ('tokens_per_denoise_pass', '.2f'),
        'tok/pass': ('tokens_per_pass', '.2f'),
        'steps': ('steps_per_canvas', '.2f'),
        'ratio': ('speedup', '.2f'),
    }
    if any(point.acceptance for point in points):
        columns['rule'] = ('acceptance', '')
    for name in columns:
        table.add_column(name, justify='left' if name in ('mode', 'rule') else 'right')
    for point in points:
        values = [(getattr(point, field), form) for field, form in columns.values()]
        table.add_row(*('-' if value is None else format(value, form) for value, form in values))
    return table


def plot_sweep(path: Path, points: Sequence[Point], batch_size: int) -> None:
    """Writes a PNG with accuracy over tokens per pass and over measured speed.

    A line connects the points with one acceptance rule (its color) and one canvas length (its
    dashes); the marker shows the maximum number of steps. `points` is the result of `sweep`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout='constrained')
    left, right = figure.subplots(1, 2, sharey=True)
    styles = _styles(points[2:])
    _plot_points(left, points, 'tokens_per_pass', styles)
    _plot_points(right, points, 'speedup', styles)
    left.set(xlabel='tokens per pass, all counted', ylabel='held-out accuracy [%]')
    right.set(xlabel=f'tokens/s at batch {batch_size}, ratio to the teacher')
    figure.legend(handles=_legend(styles), loc='outside right upper')
    figure.savefig(path, dpi=120)


_Style = dict[str, Any]  # keyword arguments of a line in matplotlib
_TEACHER: _Style = {'label': 'teacher, AR', 'color': 'black', 'marker': '*', 'markersize': 11}
_LOSSLESS: _Style = {'label': 'student, lossless', 'color': 'tab:red', 'marker': 'D'}


class _Styles(NamedTuple):
    """The plot style for each value of a setting."""

    colors: dict[str, Any]  # by acceptance rule
    markers: dict[int, str]  # by maximum number of steps
    dashes: dict[int, str]  # by canvas length


def _styles(points: Sequence[Point]) -> _Styles:
    import matplotlib

    steps, lengths = (
        sorted({getattr(point, field) for point in points})
        for field in ('max_denoising_steps', 'canvas_length')
    )
    in_order = sorted(points, key=lambda point: (point.acceptance or '', point.entropy_bound or 0))
    rules = list(dict.fromkeys(point.rule for point in in_order))
    shade = matplotlib.colormaps['viridis']
    colors = {rule: shade(0.85 * i / max(len(rules) - 1, 1)) for i, rule in enumerate(rules)}
    markers = dict(zip(steps, itertools.cycle('os^vPX<>'), strict=False))
    dashes = dict(zip(lengths, itertools.cycle(('-', '--', ':', '-.')), strict=False))
    return _Styles(colors, markers, dashes)


def _plot_points(axes: Any, points: Sequence[Point], field: str, styles: _Styles) -> None:
    """Plots accuracy over one field of all points into a panel."""
    teacher, lossless, *diffusion = points
    axes.axhline(100 * teacher.accuracy, color='black', linewidth=0.8, linestyle=':')
    for length, rule in itertools.product(styles.dashes, styles.colors):
        line = [p for p in diffusion if (p.canvas_length, p.rule) == (length, rule)]
        xs, ys = [getattr(p, field) for p in line], [100 * p.accuracy for p in line]
        color = styles.colors[rule]
        axes.plot(xs, ys, color=color, linestyle=styles.dashes[length], linewidth=1)
        for x, y, point in zip(xs, ys, line, strict=True):
            axes.plot(x, y, color=color, marker=styles.markers[point.max_denoising_steps or 0])
    for point, style in ((teacher, _TEACHER), (lossless, _LOSSLESS)):
        axes.plot(getattr(point, field), 100 * point.accuracy, linestyle='', **style)
    axes.grid(alpha=0.3)


def _legend(styles: _Styles) -> list[Any]:
    from matplotlib.lines import Line2D

    def handle(label: str, **style: Any) -> Line2D:
        return Line2D([], [], label=label, **style)

    gray = {'color': 'gray'}
    return [
        handle(**_TEACHER, linestyle=''),
        handle(**_LOSSLESS, linestyle=''),
        *(handle(rule, color=color) for rule, color in styles.colors.items()),
        *(
            handle(f'steps ≤ {n}', marker=marker, linestyle='', **gray)
            for n, marker in styles.markers.items()
        ),
        *(handle(f'canvas of {n}', linestyle=dash, **gray) for n, dash in styles.dashes.items()),
    ]
