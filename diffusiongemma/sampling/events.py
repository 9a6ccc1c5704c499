"""The events of an engine: `Delta`, `DenoiseStep`, and one `Finished` or `Failed` per request."""

import dataclasses

import numpy as np

from diffusiongemma.sampling.scores import TokenScores
from diffusiongemma.sampling.watch import Draft


@dataclasses.dataclass(frozen=True)
class Result:
    """A response and the number of passes that it took.

    Attributes:
      tokens: all token ids, including the stop token.
      text: the answer; '' if the engine has no tokenizer.
      reason: 'stop' if a stop token or a stop text occurred, else 'length'.
      mode: the decode mode.
      denoising_steps, canvases, causal_passes: the counts of this row, see `SamplerOutput`.
      accepted_lengths: [K + 2] int32 in the lossless mode, see `SamplerOutput`, else None.
      scores: the scores of the tokens [n] if the request has `logprobs`, else None.
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
    def denoise_passes(self) -> int:
        """Returns the number of denoise passes; 0 in autoregressive mode."""
        return 0 if self.mode == 'autoregressive' else self.denoising_steps

    @property
    def encode_passes(self) -> int:
        """Returns the number of causal passes after the prefill, including autoregressive ones."""
        return self.passes - self.denoise_passes

    @property
    def passes(self) -> int:
        """Returns the number of denoise, commit and verify passes, without the prefill."""
        return self.denoising_steps + self.causal_passes

    @property
    def tokens_per_pass(self) -> float:
        """Returns the tokens of the response per pass."""
        return len(self.tokens) / max(self.passes, 1)


@dataclasses.dataclass(frozen=True)
class Delta:
    """The tokens that a step of the engine appended to a response.

    Attributes:
      id: the number of the request.
      tokens: the new token ids.
      text: the additional text that later tokens cannot change.
      denoising_steps: the number of denoise passes of the request so far.
      scores: the scores of the new tokens if the request has `logprobs`, else None.
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
      id: the number of the request.
      draft: the canvas of its row, as numpy arrays.
    """

    id: int
    draft: Draft


@dataclasses.dataclass(frozen=True)
class Finished:
    """The last event of a request that was answered.

    Attributes:
      id: the number of the request.
      result: the response.
    """

    id: int
    result: Result


@dataclasses.dataclass(frozen=True)
class Failed:
    """The last event of a request whose program failed, for example because memory ran out.

    Attributes:
      id: the number of the request.
      error: the exception of the program.
    """

    id: int
    error: Exception


End = Finished | Failed
Event = Delta | DenoiseStep | End
