"""The single steps of each decode mode, for programs that call them inside their own jit."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from diffusiongemma.models.arrays import Array, Params
from diffusiongemma.sampling import autoregressive, diffusion, drafter, lossless
from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.drafter import LosslessState
from diffusiongemma.sampling.interface import CausalModel, denoising
from diffusiongemma.sampling.sampler import MODES, Sampler
from diffusiongemma.sampling.state import DenoiseState, GenerationState


@flax.struct.dataclass
class Decoder:
    """A sampler bound to its parameters: a pytree whose leaves are the parameters.

        decoder = Decoder.of(sampler, params)
        state = decoder.prefill(tokens, lengths, rng)
        state = decoder.commit(state, decoder.denoise(state))  # mode 'diffusion'
        state = decoder.verify(state, *decoder.draft(state))   # mode 'lossless'

    All methods are pure and may be traced; they do not check arguments (`Sampler.checked` does).
    Repeated until `state.running` is false, these steps are equivalent to a call of the sampler,
    and `state.output()` is its output.

    Attributes:
      params: the parameters of the model.
      sampler: the model, config and mode; static.
    """

    params: Params
    sampler: Sampler = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, sampler: Sampler, params: Params) -> 'Decoder':
        """Returns the decoder of a sampler with its parameters."""
        return cls(params=params, sampler=sampler)

    @property
    def model(self) -> CausalModel:
        return self.sampler.model

    def prefill(
        self,
        tokens: Int[Array, 'B P'],
        lengths: Int[Array, ' B'],
        rng: jax.Array,
        controls: Controls | None = None,
    ) -> GenerationState | LosslessState:
        """Encodes prompts.

        Args:
          tokens: [B, P] int32, right-padded.
          lengths: [B] int32, at least 1.
          rng: one key, of which row r uses `fold_in(rng, r)`, or [B] keys.
          controls: settings and constraints of the rows.

        Returns:
          The state with empty responses; in the autoregressive mode with their first token.
        """
        controls = Controls() if controls is None else controls
        start = MODES[self.sampler.mode].start
        return start(self.model, self.sampler.config, self.params, tokens, lengths, rng, controls)

    def denoise(self, state: GenerationState, max_steps: int | None = None) -> DenoiseState:
        """Denoises the next canvas [B, C] of every row until the stopping rule ends it.

        Args:
          state: the state of the diffusion mode.
          max_steps: an additional limit on the number of steps.
        """
        task = diffusion.canvas_task(self.model, state)
        model = denoising(self.model)
        arguments = (model, self.sampler.config, self.params, state.cache, task)
        return diffusion.denoise_canvas(*arguments, max_steps)

    def commit(self, state: GenerationState, canvas: DenoiseState) -> GenerationState:
        """Appends a canvas to the responses and encodes it for the rows that continue."""
        arguments = (self.model, self.sampler.config, self.params, state, canvas)
        return diffusion.commit_canvas(*arguments)

    def draft(self, state: LosslessState) -> drafter.Drafted:
        """Returns drafts of the tokens after the pending ones; ignores `model_draft_length`."""
        config = self.sampler.config
        noise = lossless.text_noise(self.model, config, state)
        return drafter.draft(self.model, config, self.params, state, noise)

    def verify(
        self,
        state: LosslessState,
        tokens: Int[Array, 'B K'],
        steps: Int[Array, ' B'],
        finite: Bool[Array, ' B'] | None = None,
    ) -> LosslessState:
        """Encodes pending tokens and drafts, and appends the accepted tokens and a new one.

        Args:
          state: the state of the lossless mode.
          tokens: [B, K] int32, drafts from `draft` or any other source; the resulting text is
            independent of the drafts.
          steps: [B] int32, the number of denoise passes of the draft, which are counted.
          finite: [B] bool, whether the logits of these passes were finite; None if they were.
        """
        config = self.sampler.config
        noise = lossless.text_noise(self.model, config, state)
        finite = jnp.ones_like(state.finished) if finite is None else finite
        drafted = drafter.Drafted(tokens, steps, finite)
        return lossless.verify_draft(self.model, config, self.params, state, drafted, noise)

    def next_token(self, state: GenerationState) -> GenerationState:
        """Appends one token to every unfinished row, in the autoregressive mode."""
        return autoregressive.next_token(self.model, self.sampler.config, self.params, state)
