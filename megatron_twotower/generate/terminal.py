"""The command `generate` for one prompt or a conversation: live view, figures, table of modes."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.special_tokens import RELEASED_MASK_TOKEN_ID
from megatron_twotower.data.conversations import Conversation, Message, prompt_text, template_of
from megatron_twotower.generate.engine import (
    DECIDING_TOWER,
    MODES,
    Callbacks,
    Generation,
    GenerationSettings,
    check_mode,
    default_devices,
    generate,
    load,
    place_towers,
    with_block_size,
)
from megatron_twotower.generate.quantization import NO_QUANTIZATION, Quantization, first_device
from megatron_twotower.generate.replay.page import write_page
from megatron_twotower.generate.replay.recording import Recorder
from megatron_twotower.hf.modeling_nemotron_h_twotower import DenoisingStep

MASK = "░"
ALL = "all"
FRAMES_PER_SECOND = 12
_WARM_UP_TOKENS = 8


class Canvas:
    """One text while it is generated, for a terminal.

    The prompt and masks are dim, and the newest tokens are highlighted. Of a long text the terminal
    shows the last lines that fit.
    """

    def __init__(
        self, prompt: str, tokenizer: PreTrainedTokenizerFast, *, mask_id: int = RELEASED_MASK_TOKEN_ID
    ) -> None:
        self.prompt, self.tokenizer, self.mask_id = prompt, tokenizer, mask_id
        self.pieces: dict[int, str] = {}
        self.block = 0
        # Finished ids, ids of the current block or pass, and which of the latter are new. Replaced
        # as one tuple, because another thread draws it.
        self.state: tuple[list[int], list[int], list[bool]] = ([], [], [])

    def on_step(self, step: DenoisingStep) -> None:
        """Show a step of mask diffusion."""
        finished, current, _ = self.state
        if step.block != self.block:
            finished, self.block = finished + current, step.block
        self.state = (finished, step.ids[0].tolist(), step.committed[0].tolist())

    def on_tokens(self, ids: Tensor, is_text: Tensor) -> None:
        """Show new tokens of the other modes."""
        finished, current, _ = self.state
        new = ids[0][is_text[0]].tolist()
        self.state = (finished + current, new, [True] * len(new))

    def _piece(self, token: int) -> str:
        if token not in self.pieces:
            self.pieces[token] = MASK if token == self.mask_id else self.tokenizer.decode([token])
        return self.pieces[token]

    def text(self) -> Text:
        """The whole text with its styles."""
        finished, current, is_new = self.state
        text = Text(self.prompt, style="dim")
        text.append("".join(map(self._piece, finished)), style="not dim")
        for token, new in zip(current, is_new, strict=True):
            style = "dim cyan" if token == self.mask_id else "not dim bold black on bright_green" if new else "not dim"
            text.append(self._piece(token), style=style)
        return text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text()
        # Only the end of the text is wrapped: wrapping a long prompt for every frame is slow. The
        # cut is at the start of a line, so that the lines wrap as in the whole text.
        start = text.plain.rfind("\n", 0, max(0, len(text) - console.width * console.height)) + 1
        lines = console.render_lines(text[start:], options.update(height=None), pad=False)
        for line in lines[-max(console.height - 1, 1) :]:
            yield from line
            yield Segment.line()


@contextlib.contextmanager
def live_callbacks(
    console: Console, prompt: str, tokenizer: PreTrainedTokenizerFast, recorder: Recorder | None, *, mask_id: int
) -> Iterator[Callbacks]:
    """Yield the callbacks of a generation.

    They draw a live view if the console is a terminal, and record the steps if there is a recorder.
    """
    canvas = Canvas(prompt, tokenizer, mask_id=mask_id)

    def on_step(step: DenoisingStep) -> None:
        if console.is_interactive:
            canvas.on_step(step)
        if recorder is not None:
            recorder(step)

    if not console.is_interactive:
        yield Callbacks(on_step=on_step if recorder is not None else None)
        return
    # The view is removed at the end, because the complete text is printed in its place.
    with Live(canvas, console=console, refresh_per_second=FRAMES_PER_SECOND, transient=True):
        yield Callbacks(on_step, canvas.on_tokens)


def print_generation(generation: Generation, console: Console) -> None:
    """Print the prompt dim, the new text bright, and a line of figures."""
    text = Text.assemble((generation.prompt, "dim"), (generation.text, "bold"))
    figures = (
        f"{generation.mode}: {generation.new_tokens} tokens in {generation.passes} passes of the "
        f"{DECIDING_TOWER[generation.mode]} ({generation.tokens_per_pass:.2f} per pass), {generation.seconds:.2f} s, "
        f"{generation.tokens_per_second:.0f} tokens/s"
    )
    if generation.accepted is not None:
        figures += f", {generation.accepted / generation.passes:.2f} drafted tokens accepted per pass"
    console.print(text, soft_wrap=True)
    console.print(Text(figures, "cyan"), soft_wrap=True)


def print_comparison(generations: Sequence[Generation], console: Console) -> None:
    """Print a table with a row for each mode.

    `accepted` is the number of accepted drafted tokens per pass, and `x AR` the speed as a multiple
    of that of AR.
    """
    speeds = {each.mode: each.tokens_per_second for each in generations}
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for heading in ("mode", "tokens", "passes", "tokens/pass", "accepted", "seconds", "tokens/s", "x AR"):
        table.add_column(heading, justify="left" if heading == "mode" else "right", no_wrap=True)
    for each in generations:
        accepted = "" if each.accepted is None else f"{each.accepted / each.passes:.2f}"
        table.add_row(
            each.mode,
            f"{each.new_tokens}",
            f"{each.passes}",
            f"{each.tokens_per_pass:.2f}",
            accepted,
            f"{each.seconds:.2f}",
            f"{each.tokens_per_second:.0f}",
            f"{each.tokens_per_second / speeds['ar']:.2f}",
        )
    console.print(table)


def check_page(page: Path, mode: str) -> None:
    """Raise a `UserError` for a page that could not be written, before any work."""
    if mode not in ("mask_diffusion", ALL):
        raise UserError(f"html: found mode {mode}, expected mask_diffusion or {ALL}: the others denoise nothing")
    if not page.parent.is_dir() or page.is_dir():
        raise UserError(f"{page}: cannot be written, expected a file in a folder that exists")


def chat(
    folder: str | Path,
    *,
    mode: str,
    settings: GenerationSettings,
    system: str | None = None,
    devices: Sequence[str] = (),
    quantization: Quantization = NO_QUANTIZATION,
    console: Console | None = None,
    lines: Iterable[str] | None = None,
) -> int:
    """Run the command: a conversation, one line of the user and one answer after the other.

    Args:
        folder: Two-tower Hugging Face folder whose tokenizer has a chat template.
        mode: One of `MODES`.
        settings: How text is generated.
        system: The text of a turn before the conversation; None for no such turn.
        devices: As in `run`.
        quantization: As in `run`.
        console: The console to print on; None for standard output.
        lines: What the user says; None for standard input, up to its end (Ctrl-D).

    Returns:
        The exit status.

    Raises:
        UserError: As `run`, or there is no template, or it does not take the turns.
    """
    check_mode(mode)
    console = console or Console()
    devices = devices or default_devices()
    model, tokenizer = load(folder, device=first_device(quantization, devices), quantization=quantization)
    settings = with_block_size(model, settings)
    template = template_of(tokenizer, folder=folder, mask_id=model.mask_token_id)
    place_towers(model, devices)
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for line in _typed(console) if lines is None else lines:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        prompt = prompt_text(template, Conversation(messages))
        with live_callbacks(console, "", tokenizer, None, mask_id=model.mask_token_id) as callbacks:
            answer = generate(
                model, tokenizer, prompt, mode=mode, settings=settings, callbacks=callbacks, recognised=template.special
            )
        print_generation(dataclasses.replace(answer, prompt=""), console)
        messages.append({"role": "assistant", "content": answer.text})
    return 0


def _typed(console: Console) -> Iterator[str]:
    """Yield the lines of standard input; with a sign before each in a terminal."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(EOFError):
        while True:
            yield console.input("[bold]> [/bold]")


def run(
    folder: str | Path,
    *,
    prompt: str,
    mode: str,
    settings: GenerationSettings,
    page: Path | None = None,
    devices: Sequence[str] = (),
    quantization: Quantization = NO_QUANTIZATION,
    console: Console | None = None,
) -> int:
    """Run the command; mode `all` generates in every mode and compares them.

    Args:
        folder: Two-tower Hugging Face folder.
        prompt: Text to continue.
        mode: One of `MODES`, or `all`.
        settings: How text is generated.
        page: HTML file for a replay of the denoising; None for no replay.
        devices: One, or one for each tower; empty for `default_devices`.
        quantization: Which weights to quantise.
        console: The console to print on; None for standard output.

    Returns:
        The exit status.

    Raises:
        UserError: An empty prompt, an unknown mode, a setting out of range, a folder that is no
            model.
    """
    check_mode(mode, ALL)
    if page is not None:
        check_page(page, mode)
    console = console or Console()
    devices = devices or default_devices()
    model, tokenizer = load(folder, device=first_device(quantization, devices), quantization=quantization)
    settings = with_block_size(model, settings)
    place_towers(model, devices)
    if mode == ALL:  # the first call in each mode is slower, and speeds are compared
        for each in MODES:
            warm_up = GenerationSettings(max_new_tokens=_WARM_UP_TOKENS)
            generate(model, tokenizer, prompt, mode=each, settings=warm_up)
    generations: list[Generation] = []
    for each in MODES if mode == ALL else (mode,):
        recorder = Recorder() if page is not None and each == "mask_diffusion" else None
        with live_callbacks(console, prompt, tokenizer, recorder, mask_id=model.mask_token_id) as callbacks:
            generations.append(generate(model, tokenizer, prompt, mode=each, settings=settings, callbacks=callbacks))
        print_generation(generations[-1], console)
        if recorder is not None and page is not None:
            write_page(page, recorder.recording(generations[-1], tokenizer, model=str(folder), settings=settings))
    if mode == ALL:
        print_comparison(generations, console)
    if page is not None:
        console.print(Text(f"replay: {page}", "cyan"), soft_wrap=True)
    return 0
