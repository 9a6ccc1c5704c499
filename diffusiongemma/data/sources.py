"""interim"""
import dataclasses
from typing import Any
Source = Any
@dataclasses.dataclass(frozen=True)
class DataSpec:
    kind: str
    split: str = 'train'
    size: int = 1_000_000
    seed: int = 0
    weight: float = 1.0
    def describe(self): return f'{self.kind}:{self.split}'
    @classmethod
    def from_config(cls, c): return cls(**dict(c))
def load_source(spec):
    from diffusiongemma.data.tasks import sudoku, wordmath
    if spec.kind == 'wordmath': return wordmath.Wordmath(spec.split, spec.size, spec.seed)
    return sudoku.Sudoku(spec.split, spec.size, spec.seed)
