"""The command `generate` for one prompt: blocks that fill up in the terminal, figures, a table of the modes."""

import contextlib
from collections.abc import Iterator, Sequence
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
from megatron_twotower.generate.engine import (
    DECIDED_BY,
    MODES,
    Generation,
    GenerationSettings,
    Watch,
    check_mode,
    default_devices,
    generate,
    load,
    mask_token_id,
    place,
)
from megatron_twotower.generate.replay import Recorder, write_page
from megatron_twotower.hf.modeling_nemotron_h_twotower import DenoisingStep

MASK = "░"
ALL = "all"
FRAMES_PER_SECOND = 12
_WARM_UP_TOKENS = 8


class Canvas:
    """One row of text while it is written: the prompt dim, masks dim, what was committed last highlighted.

    A terminal shows its last lines: as many as fit.
    """

    def __init__(self, prompt: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self.prompt, self.tokenizer, self.mask_id = prompt, tokenizer, mask_token_id(tokenizer)
        self.pieces: dict[int, str] = {}
        self.block = 0
        # Settled ids, those of the part at work, which of these are new: replaced at once, as
        # another thread draws.
        self.state: tuple[list[int], list[int], list[bool]] = ([], [], [])

    def on_step(self, seen: DenoisingStep) -> None:
        settled, part, _ = self.state
        if seen.block != self.block:
            settled, self.block = settled + part, seen.block
        self.state = (settled, seen.ids[0].tolist(), seen.committed[0].tolist())

    def on_tokens(self, ids: Tensor, is_text: Tensor) -> None:
        settled, part, _ = self.state
        new = ids[0][is_text[0]].tolist()
        self.state = (settled + part, new, [True] * len(new))

    @property
    def watch(self) -> Watch:
        return Watch(self.on_step, self.on_tokens)

    def _piece(self, token: int) -> str:
        if token not in self.pieces:
            self.pieces[token] = MASK if token == self.mask_id else self.tokenizer.decode([token])
        return self.pieces[token]

    def text(self) -> Text:
        settled, part, fresh = self.state
        text = Text(self.prompt, style="dim")
        text.append("".join(map(self._piece, settled)), style="not dim")
        for token, new in zip(part, fresh, strict=True):
            style = "dim cyan" if token == self.mask_id else "not dim bold black on bright_green" if new else "not dim"
            text.append(self._piece(token), style=style)
        return text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = self.text()
        # From the start of a line, so that nothing wraps anew; a long prompt would else be wrapped
        # for every frame.
        start = text.plain.rfind("\n", 0, max(0, len(text) - console.width * console.height)) + 1
        lines = console.render_lines(text[start:], options.update(height=None), pad=False)
        for line in lines[-max(console.height - 1, 1) :]:
            yield from line
            yield Segment.line()


@contextlib.contextmanager
def watched(
    console: Console, prompt: str, tokenizer: PreTrainedTokenizerFast, recorder: Recorder | None
) -> Iterator[Watch]:
    """What to give to `generate`: a live view where the console is a terminal, and the recorder where there is one."""
    canvas = Canvas(prompt, tokenizer)

    def on_step(seen: DenoisingStep) -> None:
        if console.is_interactive:
            canvas.on_step(seen)
        if recorder is not None:
            recorder(seen)

    if not console.is_interactive:
        yield Watch(on_step=on_step if recorder is not None else None)
        return
    # Wiped at the end: the whole text is printed in its place.
    with Live(canvas, console=console, refresh_per_second=FRAMES_PER_SECOND, transient=True):
        yield Watch(on_step, canvas.on_tokens)


def print_generation(generation: Generation, console: Console) -> None:
    """The prompt dim, what was written bright, and a line of figures."""
    text = Text.assemble((generation.prompt, "dim"), (generation.text, "bold"))
    figures = (
        f"{generation.mode}: {generation.new_tokens} tokens in {generation.passes} passes of the "
        f"{DECIDED_BY[generation.mode]} ({generation.tokens_per_pass:.2f} per pass), {generation.seconds:.2f} s, "
        f"{generation.tokens_per_second:.0f} tokens/s"
    )
    if generation.accepted is not None:
        figures += f", {generation.accepted / generation.passes:.2f} drafted tokens accepted per pass"
    console.print(text, soft_wrap=True)
    console.print(Text(figures, "cyan"), soft_wrap=True)


def print_comparison(generations: Sequence[Generation], console: Console) -> None:
    """The modes beside each other; accepted: drafted tokens that were kept, per pass; speed in multiples of AR's."""
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
    """Refuse, before any work, a page that could not be written."""
    if mode not in ("mask_diffusion", ALL):
        raise UserError(f"html: found mode {mode}, expected mask_diffusion or {ALL}: the others denoise nothing")
    if not page.parent.is_dir() or page.is_dir():
        raise UserError(f"{page}: cannot be written, expected a file in a folder that exists")


def run(
    folder: str | Path,
    *,
    prompt: str,
    mode: str,
    settings: GenerationSettings,
    page: Path | None = None,
    devices: Sequence[str] = (),
    console: Console | None = None,
) -> int:
    """Load, write, print; mode `all` writes in every mode and compares them. Returns the exit status.

    Args:
        page: HTML file for a replay of the denoising.
        devices: one, or one for each tower; empty for what is here.

    Raises: UserError: an empty prompt, an unknown mode, a setting out of range, a folder that is no
        model.
    """
    check_mode(mode, ALL)
    if page is not None:
        check_page(page, mode)
    console = console or Console()
    model, tokenizer = load(folder)
    place(model, devices or default_devices())
    if mode == ALL:  # the first calls of any kind are slower, and would be compared
        for each in MODES:
            warm = GenerationSettings(max_new_tokens=_WARM_UP_TOKENS)
            generate(model, tokenizer, prompt, mode=each, settings=warm)
    generations: list[Generation] = []
    for each in MODES if mode == ALL else (mode,):
        recorder = Recorder() if page is not None and each == "mask_diffusion" else None
        with watched(console, prompt, tokenizer, recorder) as watch:
            generations.append(generate(model, tokenizer, prompt, mode=each, settings=settings, watch=watch))
        print_generation(generations[-1], console)
        if recorder is not None and page is not None:
            write_page(page, recorder.recording(generations[-1], tokenizer, model=str(folder), settings=settings))
    if mode == ALL:
        print_comparison(generations, console)
    if page is not None:
        console.print(Text(f"replay: {page}", "cyan"), soft_wrap=True)
    return 0
