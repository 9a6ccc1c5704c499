"""A chat in a terminal: reads questions and commands, and streams answers."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

from diffusiongemma.sampling.chat import ChatSampler
from diffusiongemma.sampling.sampler import MODES
from diffusiongemma.view.frames import counted, counted_passes, printable
from diffusiongemma.view.interrupt import interruptible

HELP = """\
/mode [diffusion|autoregressive|lossless]  sets the decode mode, or prints it without an argument
/steps [N]  limits the denoise steps per canvas (lossless mode: per draft), or prints the limit
/reset      forgets the conversation
/help       prints this text
/quit       ends the chat, like the end of the input
Ctrl-C      stops an answer, which the conversation then forgets
Any other text is sent to the model; //text sends /text."""


class Conversation:
    """A conversation with a `ChatSampler` through functions that read and write text.

    Conversation(chat, read=lambda: input('> '), write=print_part).run()
    """

    def __init__(
        self, chat: ChatSampler, read: Callable[[], str], write: Callable[[str], None]
    ) -> None:
        """Continues the history of `chat`.

        Args:
          chat: the sampler that answers.
          read: returns the user's next line; EOFError ends the conversation.
          write: shows a part of a text immediately, without a line break after it.
        """
        self._chat, self._read, self._write = chat, read, write
        self._forgotten = 0

    def run(self) -> None:
        """Reads and answers until /quit or the end of the input."""
        while True:
            try:
                line = self._read().strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._write('\n/quit ends the conversation.\n')
                continue
            if line == '/quit':
                return
            try:
                self._turn(line)
            except (ValueError, FloatingPointError) as error:
                self._write(f'error: {error}\n')
            except KeyboardInterrupt:
                self._write('\n[stopped; the conversation is as it was before]\n')

    def _turn(self, line: str) -> None:
        if line.startswith('/') and not line.startswith('//'):
            self._command(*line[1:].split())
        elif line:
            self._answer(line.removeprefix('/'))

    def _command(self, name: str = '', *arguments: str) -> None:
        sampler = self._chat.sampler
        field = 'max_draft_steps' if sampler.mode == 'lossless' else 'max_denoising_steps'
        if name == 'mode' and len(arguments) < 2:
            if arguments:
                if arguments[0] not in MODES:
                    raise ValueError(f'no mode {arguments[0]!r}; there are {", ".join(MODES)}.')
                sampler = dataclasses.replace(sampler, mode=arguments[0])
            self._write(f'[mode {sampler.mode}]\n')
        elif name == 'steps' and len(arguments) < 2:
            if arguments:
                if not arguments[0].isdecimal():
                    raise ValueError(f'/steps takes a number, got {arguments[0]!r}.')
                changed: dict[str, Any] = {field: int(arguments[0])}
                config = dataclasses.replace(sampler.config, **changed)
                sampler = dataclasses.replace(sampler, config=config)
            self._write(f'[{field} {getattr(sampler.config, field)}]\n')
        elif name == 'reset' and not arguments:
            self._chat.reset()
            self._forgotten = 0
            self._write('[the conversation starts anew]\n')
        elif name == 'help':
            self._write(HELP + '\n')
        else:
            raise ValueError(f'no command /{" ".join((name, *arguments))}; /help names them.')
        self._chat.sampler = sampler

    def _answer(self, text: str) -> None:
        start, shown = time.perf_counter(), 0
        for reply in interruptible(self._chat.stream(text)):
            # With max_turns=1 a chat says at its start that each question is a conversation.
            if reply.forgotten > self._forgotten and self._chat.max_turns != 1:
                self._write(f'[{_sees(reply.forgotten)}]\n')
                self._forgotten = reply.forgotten
            # A character can span several tokens; an incomplete one is not shown yet.
            complete = reply.text if reply.finished else reply.text.rstrip('\ufffd')
            self._write(printable(complete[shown:]))
            shown = max(shown, len(complete))
        self._write(printable(reply.text[shown:]))
        steps, seconds = reply.denoising_steps, time.perf_counter() - start
        passes = counted_passes(steps, self._chat.sampler.mode)
        tokens = counted(len(reply.tokens), 'token')
        self._write(f'\n[{tokens}, {passes}, {seconds:.2f} s]\n')


def _sees(forgotten: int) -> str:
    turns = 'the first turn' if forgotten == 1 else f'the first {forgotten} turns'
    return f'the model no longer sees {turns} of this conversation'
