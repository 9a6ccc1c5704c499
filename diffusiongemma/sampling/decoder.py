"""The steps of a decode mode one by one, for programs that call them inside a jit of their own."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from diffusiongemma.models.arrays import Array, Params
from diffusiongemma.sampling import diffusion, lossless, passes
from diffusiongemma.sampling.controls import Controls
from diffusiongemma.sampling.drafter import LosslessState
from diffusiongemma.sampling.passes import CausalModel
from diffusiongemma.sampling.sampler import AUTOREGRESSIVE, MODES, Sampler
from diffusiongemma.sampling.state import DenoiseState, GenerationState


@flax.struct.dataclass
class Decoder:
    """A sampler bound to its parameters: a pytree whose leaves are the parameters.

        decoder = Decoder.of(sampler, params)
        state = decoder.prefill(tokens, lengths, rng)
        state = decoder.commit(state, decoder.denoise(state))  # mode 'diffusion'
        state = decoder.verify(state, *decoder.draft(state))   # mode 'lossless'

    All methods are pure and may be traced; arguments are not checked (`Sampler.checked` does). Put
    one after the other until `state.running` is false they do what a call of the sampler does, and
    `state.output()` is its output.

    Attributes:
      params: the model's parameters.
      sampler: model, config and mode; static.
    """

    params: Params
    sampler: Sampler = flax.struct.field(pytree_node=False)

    @classmethod
    def of(cls, sampler: Sampler, params: Params) -> 'Decoder':
        """The decoder of a sampler."""
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
          Empty responses after them; in the autoregressive mode with their first token.
        """
        controls = Controls() if controls is None else controls
        start = MODES[self.sampler.mode].start
        return start(self.model, self.sampler.config, self.params, tokens, lengths, rng, controls)

    def denoise(self, state: GenerationState, max_steps: int | None = None) -> DenoiseState:
        """The next canvas of every row [B, C], denoised until the stopping rule ends it.

        Args:
          state: of the diffusion mode.
          max_steps: limit of the steps beside the config's.
        """
        task = diffusion.canvas_task(self.model, state)
        model = passes.denoising(self.model)
        arguments = (model, self.sampler.config, self.params, state.cache, task)
        return diffusion.denoise_canvas(*arguments, max_steps)

    def commit(self, state: GenerationState, canvas: DenoiseState) -> GenerationState:
        """Appends a canvas to the responses and encodes it where a row goes on."""
        arguments = (self.model, self.sampler.config, self.params, state, canvas)
        return diffusion.commit_canvas(*arguments)

    def draft(self, state: LosslessState) -> lossless.Drafted:
        """Returns what may follow the pending tokens."""
        config = self.sampler.config
        noise = lossless.text_noise(self.model, config, state)
        return lossless.draft(self.model, config, self.params, state, noise)

    def verify(
        self,
        state: LosslessState,
        tokens: Int[Array, 'B K'],
        steps: Int[Array, ' B'],
        finite: Bool[Array, ' B'] | None = None,
    ) -> LosslessState:
        """Encodes pending tokens and drafts, appends what the model would have written itself.

        Args:
          state: of the lossless mode.
          tokens: [B, K] int32, of `draft` or of any other source: the text does not depend on it.
          steps: [B] int32, denoise passes that the draft took, which are counted.
          finite: [B] bool, whether the logits of these passes were finite; None: they were.
        """
        config = self.sampler.config
        noise = lossless.text_noise(self.model, config, state)
        finite = jnp.ones_like(state.finished) if finite is None else finite
        drafted = lossless.Drafted(tokens, steps, finite)
        return lossless.verify_draft(self.model, config, self.params, state, drafted, noise)

    def next_token(self, state: GenerationState) -> GenerationState:
        """One more token of every unfinished row, in the autoregressive mode."""
        return AUTOREGRESSIVE.advance(self.model, self.sampler.config, self.params, state)
