"""What keeps an answer to its grammar: the mask of the next token, behind each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from vai.llm.words import Words
from vai.request import Output, Request
from vai.text.grammar import GrammarSpec

# Grammars are compiled and masks made by other processes. A thread waits for each: apart from those that are busy with
# texts, and masks apart from grammars, which may take seconds, so few at a time.
_grammar_threads = ThreadPoolExecutor(4, thread_name_prefix="grammars")
mask_threads = ThreadPoolExecutor(32, thread_name_prefix="masks")


class Guide:
    """Keeps one answer to its grammar: behind each token the engine gets the mask of the next."""

    def __init__(self, words: Words, grammar: GrammarSpec, request: Request) -> None:
        """Compiles the grammar where nobody has. Raises BadRequest, Overloaded, Unavailable."""
        self._matcher = words.grammars.matcher(grammar, words.vocabulary)
        self._id = request.id
        self._position = len(request.tokens)

    @classmethod
    async def open(cls, words: Words, grammar: GrammarSpec, request: Request) -> Guide:
        """One made off the loop; nobody's where the answer is given up meanwhile. Raises as the constructor does."""
        with words.grammars.waiting():
            made = _grammar_threads.submit(cls, words, grammar, request)
            try:
                return await asyncio.wrap_future(made)
            except asyncio.CancelledError:
                made.add_done_callback(_close_unclaimed)
                raise

    @property
    def bits(self) -> bytes:
        return self._matcher.bits

    def accept(self, output: Output) -> None:
        """Go on behind the tokens of an output: the slow part, which may run in any thread. Raises BadRequest."""
        for token in output.tokens if output.finish is None else ():
            self._matcher.accept(token)
            self._position += 1

    def allow(self, output: Output, mask: Callable[[str, int, bytes], None]) -> Output:
        """Tell the engine what may come next, by `mask`; the output, with the finish "stop" where nothing may."""
        if output.finish is not None or not output.tokens:
            return output
        if self._matcher.finished:
            return msgspec.structs.replace(output, finish="stop")
        mask(self._id, self._position, self._matcher.bits)
        return output

    def close(self) -> None:
        """The answer is over; another thread, which may still be in `accept`, waits for it."""
        mask_threads.submit(self._matcher.close)


def _close_unclaimed(made: Future[Guide]) -> None:
    if not made.cancelled() and made.exception() is None:
        made.result().close()
