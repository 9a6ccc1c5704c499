"""What an engine says of its requests: first `Delta`s and `DenoiseStep`s, last the end of each."""

import dataclasses

import numpy as np

from diffusiongemma.sampling.scores import TokenScores
from diffusiongemma.sampling.watch import Draft


@dataclasses.dataclass(frozen=True)
class Result:
    """A response and what it cost.

    Attributes:
      tokens: all token ids, the stop token included.
      text: the answer; '' for an engine without a tokenizer.
      reason: 'stop', a stop token or stop text came, or 'length'.
      mode: the decode mode.
      denoising_steps, canvases, causal_passes: as in SamplerOutput, of this row.
      accepted_lengths: [K + 2] int32 in the lossless mode, as in SamplerOutput, else None.
      scores: of the tokens [n], where the request asks for `logprobs`, else None.
    """

    tokens: list[int]
    text: str
    reason: str
    mode: str
    denoising_steps: int
    canvases: int
    causal_passes: int
    accepted_lengths: np.ndarray | None
    scores: TokenScores | None = None

    @property
    def passes(self) -> int:
        """Denoise passes, commits and verifications; the prefill is not counted."""
        return self.denoising_steps + self.causal_passes

    @property
    def tokens_per_pass(self) -> float:
        return len(self.tokens) / max(self.passes, 1)


@dataclasses.dataclass(frozen=True)
class Delta:
    """What the response of request `id` gained in a step.

    Attributes:
      id: the request's number.
      tokens: token ids.
      text: what is certain of their text.
      denoising_steps: denoise passes so far.
      scores: of the tokens, where the request asks for `logprobs`.
    """

    id: int
    tokens: list[int]
    text: str
    denoising_steps: int
    scores: TokenScores | None = None


@dataclasses.dataclass(frozen=True)
class DenoiseStep:
    """The canvas of a watched request after a denoise step, or its noise before the first one.

    Attributes:
      id: the request's number.
      draft: of one row, as numpy arrays.
    """

    id: int
    draft: Draft


@dataclasses.dataclass(frozen=True)
class Finished:
    """The last event of a request that was answered."""

    id: int
    result: Result


@dataclasses.dataclass(frozen=True)
class Failed:
    """The last event of a request whose program failed, such as for lack of memory."""

    id: int
    error: Exception


End = Finished | Failed
Event = Delta | DenoiseStep | End
