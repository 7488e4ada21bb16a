"""`hotneuron chat`: talk to a model in the terminal, in this process, with no server."""

import sys
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import options
from ..console import UserError, note, stderr
from ..settings import ConfigOption

if TYPE_CHECKING:
    from runtime import Engine, SamplingParams, TokenEvent
    from server.text import TextCodec

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends."


def chat(
    model: options.ModelArgument = "default",
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this once, then end.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 is greedy; the model's own default if unset.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="For the same answer again.")] = None,
    device: options.DeviceOption = "auto",
    sparsity: options.SparsityOption = options.Mode.auto,
    vram_budget: options.VramOption = None,
    threads: options.ThreadsOption = None,
    max_context: options.MaxContextOption = None,
    dtype: options.DtypeOption = options.Dtype.auto,
    weights: options.WeightsOption = options.Weights.auto,
    kernels: options.KernelsOption = options.Kernels.auto,
    config: ConfigOption = None,
) -> None:
    """Chat in the terminal; prints tokens per second after each answer."""
    from runtime import EngineConfig, SamplingParams
    from server import load_tokenizer, read_default_sampling
    from server.text import TextCodec

    from ..loading import find_model, load_engine

    folder = find_model(model)
    engine = load_engine(
        EngineConfig(
            model_dir=folder,
            mode=sparsity.value,
            device=device,
            dtype=dtype.value,
            weights=weights.value,
            threads=threads,
            vram_budget_bytes=vram_budget,
            max_batch=1,
            max_queue=1,
            max_context=max_context,
            audit_rate=0.0,
            kernels=kernels.value,
        )
    )
    values: dict[str, Any] = dict(read_default_sampling(folder))
    if temperature is not None:
        values["temperature"] = temperature
    sampling = SamplingParams(**values, seed=seed, max_tokens=max_tokens)
    conversation = Conversation(engine, TextCodec(load_tokenizer(folder)), sampling, system)
    engine.start()
    try:
        if prompt is not None:
            conversation.answer(prompt)
        else:
            conversation.repeat()
    finally:
        engine.stop()


class Conversation:
    """The messages so far; each turn is one request to the engine."""

    def __init__(
        self,
        engine: "Engine",
        codec: "TextCodec",
        sampling: "SamplingParams",
        system: str | None,
    ) -> None:
        if not codec.has_chat_template:
            raise UserError(
                "this model has no chat template, so it cannot chat: serve it and use "
                "/v1/completions, or add chat_template to the folder's tokenizer_config.json"
            )
        self.engine, self.codec, self.sampling = engine, codec, sampling
        self.start = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.start)
        self.turns = 0

    def repeat(self) -> None:
        """Read questions from standard input until it ends."""
        interactive = sys.stdin.isatty()
        note(f"{self.engine.model_name}, mode {self.engine.mode}. {HELP}")
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                return
            if line in ("/exit", "/quit"):
                return
            if line == "/reset":
                self.messages = list(self.start)
                note("forgotten")
            elif line.startswith("/"):
                note(HELP)
            elif line:
                self.turn(line)

    def turn(self, question: str) -> None:
        """One question; what goes wrong with it is said, and the conversation goes on."""
        from runtime.errors import InvalidRequest

        try:
            self.answer(question)
        except InvalidRequest as error:
            self.messages.pop()
            stderr().print(f"error: {error} (/reset starts over)", style="red", markup=False)

    def answer(self, question: str) -> str:
        """Print the answer as it comes, keep it in the conversation, say how fast it was."""
        from server.text import Detokenizer

        self.messages.append({"role": "user", "content": question})
        ids = self.codec.encode(self.codec.render_chat(self.messages), add_special_tokens=False)
        decoder, text, times = Detokenizer(self.codec), "", []
        for event in self._events(ids):
            times.append(time.perf_counter())
            if event.token_id is not None:
                piece = decoder.feed(event.token_id)
                print(piece, end="", flush=True)
                text += piece
            if event.finish_reason == "error":
                raise UserError(f"the engine failed: {event.error}")
        print(decoder.finish(), flush=True)
        self.messages.append({"role": "assistant", "content": text})
        if len(times) > 1:
            rate = (len(times) - 1) / (times[-1] - times[0])
            note(f"[{len(times)} tokens, {rate:.1f} tokens/s]")
        return text

    def _events(self, ids: list[int]) -> "list[TokenEvent] | Any":
        """The engine's events; Ctrl-C ends the answer, not the program."""
        from runtime import Request
        from runtime.errors import ContextLengthExceeded

        self.turns += 1
        request_id = f"chat-{self.turns}"
        room = self.engine.max_context - len(ids)
        if room < 1:
            raise ContextLengthExceeded(
                f"the conversation has {len(ids)} tokens, the context holds "
                f"{self.engine.max_context}"
            )
        events: SimpleQueue[TokenEvent] = SimpleQueue()
        self.engine.submit(Request(request_id, tuple(ids), self._limited(room)), events.put)
        while True:
            try:
                event = events.get()
            except KeyboardInterrupt:
                self.engine.abort(request_id)
                continue
            yield event
            if event.finish_reason is not None:
                return

    def _limited(self, room: int) -> "SamplingParams":
        from dataclasses import replace

        return replace(self.sampling, max_tokens=min(room, self.sampling.max_tokens or room))
