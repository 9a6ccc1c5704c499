"""Frames that describe a canvas after every step, independent of how they are drawn."""

import codecs
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from diffusiongemma.data.tokenizer import Tokenizer
from diffusiongemma.sampling.events import Delta, DenoiseStep, Event, Finished
from diffusiongemma.sampling.state import SamplerOutput
from diffusiongemma.sampling.watch import Draft

State = Literal['settled', 'open', 'noise', 'refused']
Color = tuple[int, int, int]
QUIET: Color = (139, 148, 158)  # the color of captions
SPECIAL = '·'  # shown for a token without text, such as padding or a turn end

# The colors of open tokens, from certain to uncertain, as red, green, blue.
_SCALE: tuple[Color, ...] = ((86, 211, 100), (227, 179, 65), (248, 81, 73))
_COLORS: dict[State, Color] = {
    'settled': (230, 237, 243),
    'noise': (110, 118, 129),
    'refused': (248, 81, 73),
}


def counted(number: int, noun: str) -> str:
    """Returns the number with its noun, in the plural unless there is one: '3 tokens', '1 pass'."""
    if number == 1:
        return f'1 {noun}'
    return f'{number:,} {noun}{"es" if noun.endswith("s") else "s"}'


def counted_passes(number: int, mode: str) -> str:
    """Returns `SamplerOutput.denoising_steps` in words; autoregressive passes are causal ones."""
    return counted(number, 'pass' if mode == 'autoregressive' else 'denoise pass')


@dataclasses.dataclass(frozen=True)
class Cell:
    """A token in a frame.

    Attributes:
      text: the text of the token; line breaks occur only in 'settled' tokens.
      state: 'settled': committed; 'open': the argmax token of the latest denoise step; 'noise':
        not denoised yet; 'refused': a draft token that the causal pass rejected (lossless mode).
      entropy: the entropy of its prediction in nats; infinite for noise, 0 for settled and
        refused tokens.
    """

    text: str
    state: State
    entropy: float = 0.0

    @property
    def certainty(self) -> float:
        """Returns exp(-entropy): 1 if certain, 1/k if k tokens are equally likely, 0 if NaN."""
        return 0.0 if math.isnan(self.entropy) else math.exp(-self.entropy)

    @property
    def color(self) -> Color:
        return _COLORS.get(self.state) or color_of(self.certainty)


def color_of(certainty: float) -> Color:
    """Returns red, green, blue in [0, 255]: green for 1, amber for 1/2, red for 0."""
    place = (1 - certainty) * (len(_SCALE) - 1)
    low = min(int(place), len(_SCALE) - 2)
    share = place - low
    red, green, blue = (
        round((1 - share) * a + share * b)
        for a, b in zip(_SCALE[low], _SCALE[low + 1], strict=True)
    )
    return red, green, blue


def css(color: Color) -> str:
    """Returns the color in CSS notation."""
    return '#{:02x}{:02x}{:02x}'.format(*color)


def legend() -> list[tuple[str, Color | None]]:
    """Returns the legend of the colors of open tokens: texts with their colors, None for gray."""
    marks = (('0', 1.0), ('ln 2', 0.5), ('large', 0.0))
    return [
        ('entropy of a token  ', None),
        *((f'■ {entropy}  ', color_of(certainty)) for entropy, certainty in marks),
    ]


@dataclasses.dataclass(frozen=True)
class Frame:
    """A response at one point in time.

    Attributes:
      cells: the committed tokens, followed by those of the canvas.
      canvas: the number of the canvas, counted from 1; 0 in autoregressive mode.
      step: the number of denoise steps of this canvas; None after a commit or a verification.
      tokens: the number of committed tokens.
      denoising_steps: the number of denoise passes so far, over all canvases.
      seconds: the time that the sampler has taken so far.
    """

    cells: tuple[Cell, ...]
    canvas: int
    step: int | None
    tokens: int
    denoising_steps: int
    seconds: float

    @property
    def mean_entropy(self) -> float | None:
        """Returns the mean entropy of the open tokens in nats; None if there are none."""
        entropies = [cell.entropy for cell in self.cells if cell.state == 'open']
        return float(np.mean(entropies)) if entropies else None

    @property
    def text(self) -> str:
        return ''.join(cell.text for cell in self.cells)

    @property
    def caption(self) -> str:
        """Returns one line with the position and the number of passes."""
        if not self.canvas:  # autoregressive mode
            return f'{counted(self.tokens, "token")}, {counted(self.denoising_steps, "pass")}'
        refused = sum(cell.state == 'refused' for cell in self.cells)
        entropy = self.mean_entropy
        if self.step is None:
            moment = f'{refused} refused' if refused else 'committed'
        else:
            moment = f'step {self.step}' if self.step else 'noise'
        if entropy is not None:
            moment += f', {entropy:.2f} nats'
        return (
            f'canvas {self.canvas}: {moment} | {counted(self.tokens, "token")}, '
            f'{counted(self.denoising_steps, "denoise pass")}'
        )

    @property
    def rate(self) -> str:
        """Returns committed tokens per second while watching, which is slower than sampling."""
        return f'{self.tokens / self.seconds:,.0f} tokens/s' if self.tokens else '- tokens/s'


def frames(
    drafts: Iterable[Draft | SamplerOutput], tokenizer: Tokenizer, stop_ids: Sequence[int]
) -> Iterator[Frame]:
    """Yields frames from the results of `sampling.watch.watch` for a batch of one prompt.

    Args:
      drafts: the results of `watch`. Only the time to compute them is counted, not the time to
        process a frame.
      tokenizer: the tokenizer of the model.
      stop_ids: ids of stop tokens; draft tokens after one of them do not count as refused.
    """
    drafts, seconds, reel = iter(drafts), 0.0, _Reel(tokenizer, stop_ids)
    while True:
        start = time.perf_counter()
        draft = next(drafts, None)
        if draft is None:
            return
        moment = _read(draft)
        seconds += time.perf_counter() - start
        yield from reel.frames(
            moment, int(draft.step) if isinstance(draft, Draft) else None, seconds
        )


class EventFrames:
    """A converter from the events of a watched request to frames.

    The time of a frame counts from the creation of this object and includes all other work of the
    engine.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        """Takes the arguments of `frames`; must be called before the first event."""
        self._tokenizer, self._reel = tokenizer, _Reel(tokenizer, stop_ids)
        self._start, self._tokens = time.perf_counter(), list[int]()
        self._has_canvas = False

    def of(self, event: Event) -> Iterator[Frame]:
        """Yields the frames of an event; a mode without a canvas has a frame for every token."""
        seconds = time.perf_counter() - self._start
        if isinstance(event, DenoiseStep):
            self._has_canvas = True
            yield from self._reel.frames(_read(event.draft), int(event.draft.step), seconds)
        elif isinstance(event, Delta) and not self._has_canvas:
            self._tokens += event.tokens
            steps, count = event.denoising_steps, len(self._tokens)
            moment = _Moment(list(self._tokens), [], 0, steps, count)
            yield _frame(self._tokenizer, moment, 0, None, seconds)
        elif isinstance(event, Finished) and self._has_canvas:
            result = event.result
            count = len(result.tokens)
            moment = _Moment(result.tokens, [], result.canvases, result.denoising_steps, count)
            yield from self._reel.frames(moment, None, seconds)


class _Token(NamedTuple):
    id: int
    state: State
    entropy: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Moment:
    """The committed tokens and the tokens of the canvas after them, on the host.

    Attributes:
      settled: the ids of the committed tokens.
      open: the tokens of the canvas; [] after the last canvas.
      canvases: the number of committed canvases.
      denoising_steps: the number of denoise passes so far.
      limit: the maximum number of tokens of the response.
    """

    settled: list[int]
    open: list[_Token]
    canvases: int
    denoising_steps: int
    limit: int


def _read(draft: Draft | SamplerOutput) -> _Moment:
    output = draft.output if isinstance(draft, Draft) else draft
    step, canvas = 0, []
    if isinstance(draft, Draft):
        step = int(draft.step)
        tokens = np.asarray(draft.argmax if step else draft.canvas)[0].tolist()
        entropies = np.asarray(draft.entropies)[0].tolist()
        state: State = 'open' if step else 'noise'
        canvas = [_Token(token, state, e) for token, e in zip(tokens, entropies, strict=True)]
    tokens = np.asarray(output.tokens)[0]
    return _Moment(
        settled=tokens[: int(output.lengths[0])].tolist(),
        open=canvas,
        canvases=int(output.canvases[0]),
        denoising_steps=int(output.denoising_steps[0]) + step,
        limit=len(tokens),
    )


class _Reel:
    """A converter from a sequence of moments to frames."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]) -> None:
        self._tokenizer, self._stop_ids = tokenizer, stop_ids
        self._latest: _Moment | None = None

    def frames(self, moment: _Moment, step: int | None, seconds: float) -> Iterator[Frame]:
        """Yields a frame of newly committed tokens, if any, and of the canvas if `step` is set."""
        latest, self._latest = self._latest, moment
        if latest is not None and moment.canvases > latest.canvases:
            after = dataclasses.replace(moment, open=_refused(latest, moment, self._stop_ids))
            yield _frame(self._tokenizer, after, moment.canvases, None, seconds)
        if step is not None:
            yield _frame(self._tokenizer, moment, moment.canvases + 1, step, seconds)


def _refused(before: _Moment, after: _Moment, stop_ids: Sequence[int]) -> list[_Token]:
    """Returns the draft tokens that were rejected, unless the response ended with this draft."""
    accepted = len(after.settled) - len(before.settled)
    ended = after.settled[-1] in stop_ids or len(after.settled) >= after.limit
    return [] if ended else [_Token(token.id, 'refused') for token in before.open[accepted:]]


def _frame(
    tokenizer: Tokenizer, moment: _Moment, canvas: int, step: int | None, seconds: float
) -> Frame:
    settled = [_Token(token, 'settled') for token in moment.settled]
    decoder = codecs.getincrementaldecoder('utf-8')('replace')  # a character can span tokens
    cells = []
    for token, state, entropy in [*settled, *moment.open]:
        text = printable(decoder.decode(tokenizer.token_bytes(token)))
        if state != 'settled':
            text = SPECIAL if token in tokenizer.special_ids else text.replace('\n', '↵')
        cells.append(Cell(text, state, entropy))
    return Frame(
        cells=tuple(cells),
        canvas=canvas,
        step=step,
        tokens=len(moment.settled),
        denoising_steps=moment.denoising_steps,
        seconds=seconds,
    )


def printable(text: str) -> str:
    """Returns the text without control characters, except for line breaks."""
    return ''.join(char if char.isprintable() or char == '\n' else SPECIAL for char in text)
