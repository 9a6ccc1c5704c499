"""Evaluation of quality and speed: the student compared with the teacher."""

from diffusiongemma.evaluation.compare import Acceptance, Comparison
from diffusiongemma.evaluation.metrics import (
    SampleMeasures,
    exact_match,
    negative_log_likelihood,
    sample_measures,
)
from diffusiongemma.evaluation.report import comparison_table, plot_run, plot_sweep, sweep_table
from diffusiongemma.evaluation.sweep import Grid, Point
from diffusiongemma.evaluation.tasks import accuracy, is_correct
from diffusiongemma.evaluation.timing import Speed, Speeds, speeds_of

__all__ = [
    'Acceptance',
    'Comparison',
    'Grid',
    'Point',
    'SampleMeasures',
    'Speed',
    'Speeds',
    'accuracy',
    'comparison_table',
    'exact_match',
    'is_correct',
    'negative_log_likelihood',
    'plot_run',
    'plot_sweep',
    'sample_measures',
    'speeds_of',
    'sweep_table',
]
