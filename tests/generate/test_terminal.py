"""What a terminal shows during a generation and after it: text, figures, a table, a page."""

import io
import re
import shutil

import pytest
import torch
from rich.console import Console

from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.generate import engine
from megatron_twotower.generate import terminal as generate_terminal
from megatron_twotower.generate.engine import MODES, Generation, GenerationSettings
from megatron_twotower.generate.replay.page import read_page
from megatron_twotower.generate.terminal import MASK, Canvas
from megatron_twotower.hf.modeling_nemotron_h_twotower import DenoisingStep

PROMPT = "def alpha(beta):\n"
SETTINGS = GenerationSettings(max_new_tokens=12, block_size=8)


@pytest.fixture(scope="module")
def loaded(two_tower_folder):
    return engine.load(two_tower_folder)


def terminal(**kind):
    return Console(file=io.StringIO(), width=80, height=12, **kind)


def step(block, ids, committed):
    ids, committed = torch.tensor([ids]), torch.tensor([committed])
    return DenoisingStep(block, 0, torch.ones(1), ids, ids, committed.float(), committed)


def test_masks_are_dim_and_new_tokens_are_highlighted(loaded):
    tokenizer = loaded[1]
    a, b, c = tokenizer("alpha beta\n", add_special_tokens=False)["input_ids"][:3]
    canvas = Canvas("x = [bold]", tokenizer)
    canvas.on_step(step(0, [3, a, 3], [False, True, False]))
    assert canvas.text().plain == f"x = [bold]{MASK}{tokenizer.decode([a])}{MASK}"
    canvas.on_step(step(0, [b, a, 3], [True, False, False]))
    canvas.on_step(step(0, [b, a, c], [False, False, True]))
    canvas.on_step(step(1, [3, 3, c], [False, False, True]))
    text = canvas.text()
    first = "".join(map(tokenizer.decode, ([b], [a], [c])))
    assert text.plain == f"x = [bold]{first}{MASK}{MASK}{tokenizer.decode([c])}"
    fresh = [text.plain[span.start : span.end] for span in text.spans if "bright_green" in str(span.style)]
    assert fresh == [tokenizer.decode([c])]
    assert [str(span.style) for span in text.spans if text.plain[span.start : span.end] == MASK] == ["dim cyan"] * 2


def test_tokens_of_the_other_modes_are_shown_as_they_come(loaded):
    tokenizer = loaded[1]
    a, b = tokenizer("alpha beta", add_special_tokens=False)["input_ids"][:2]
    canvas = Canvas("", tokenizer)
    canvas.on_tokens(torch.tensor([[a]]), torch.tensor([[True]]))
    canvas.on_tokens(torch.tensor([[b, a, a]]), torch.tensor([[True, True, False]]))
    text = canvas.text()
    assert text.plain == "".join(map(tokenizer.decode, ([a], [b], [a])))
    assert text.plain[: text.spans[0].end] == tokenizer.decode([a])
    assert len([span for span in text.spans if "bright_green" in str(span.style)]) == 2


@pytest.mark.parametrize("count", [40, 4000])
def test_a_long_text_is_shown_from_its_end(loaded, count):
    console = terminal()
    console.print(Canvas("".join(f"line {i}\n" for i in range(count)) + "x" * 200, loaded[1]), end="")
    lines = console.file.getvalue().split("\n")
    # Eleven lines of twelve, of which the last wraps into three.
    expected = [*(f"line {count - 8 + i}" for i in range(8)), "x" * 80, "x" * 80, "x" * 40]
    assert [line for line in lines if line] == expected


@pytest.mark.parametrize("mode", MODES)
def test_a_terminal_shows_every_step(loaded, two_tower_folder, mode, monkeypatch):
    drawn = []

    class EveryStep(Canvas):
        """Drawn after every step; a terminal draws only a few times a second."""

        def on_step(self, seen):
            super().on_step(seen)
            drawn.append(self.text().plain)

        def on_tokens(self, ids, is_text):
            super().on_tokens(ids, is_text)
            drawn.append(self.text().plain)

    monkeypatch.setattr(generate_terminal, "Canvas", EveryStep)
    console = terminal(force_terminal=True)
    assert generate_terminal.run(two_tower_folder, prompt=PROMPT, mode=mode, settings=SETTINGS, console=console) == 0
    expected = engine.generate(*loaded, PROMPT, mode=mode, settings=SETTINGS)
    assert len(drawn) == expected.passes
    assert drawn[-1].startswith(PROMPT + expected.text)
    assert any(MASK in text for text in drawn) == (mode == "mask_diffusion")
    out = console.file.getvalue()
    assert "\x1b[?25l" in out and "\x1b[?25h" in out  # the cursor, hidden and back
    assert f"{mode}: {expected.new_tokens} tokens in {expected.passes} passes" in out


def test_a_pipe_receives_plain_text_only(loaded, two_tower_folder):
    console = terminal()
    generate_terminal.run(two_tower_folder, prompt=PROMPT, mode="mask_diffusion", settings=SETTINGS, console=console)
    expected = engine.generate(*loaded, PROMPT, settings=SETTINGS)
    out = console.file.getvalue()
    assert out.startswith(PROMPT + expected.text)
    assert "\x1b" not in out and MASK not in out


@pytest.mark.parametrize(("mode", "tower"), [("ar", "context tower"), ("mask_diffusion", "denoiser")])
def test_text_is_printed_without_markup(mode, tower):
    found = Generation(mode, "x = [bold]", "1[/bold] # :smile:\n", torch.arange(3), 12, 4, 0.5)
    console = terminal()
    generate_terminal.print_generation(found, console)
    text, figures = console.file.getvalue().rsplit("\n", 2)[:2]
    assert text == "x = [bold]1[/bold] # :smile:\n"
    assert figures == f"{mode}: 12 tokens in 4 passes of the {tower} (3.00 per pass), 0.50 s, 24 tokens/s"


def test_figures_have_the_accepted_drafted_tokens():
    found = Generation("speculative", "x", "y", torch.arange(3), 12, 4, 0.5, accepted=9)
    console = terminal()
    generate_terminal.print_generation(found, console)
    assert "in 4 passes of the context tower" in console.file.getvalue()
    assert console.file.getvalue().endswith("24 tokens/s, 2.25 drafted tokens accepted per pass\n")


def test_the_table_of_all_modes_fits_a_terminal():
    seconds = {"mask_diffusion": 1.0, "mock_ar": 4.0, "ar": 2.0, "speculative": 8.0}
    generations = [
        Generation(mode, "", "", torch.arange(3), 1000, 100, s, accepted=150 if mode == "speculative" else None)
        for mode, s in seconds.items()
    ]
    console = terminal()
    generate_terminal.print_comparison(generations, console)
    rows = {line.split()[0]: line.split()[1:] for line in console.file.getvalue().splitlines() if line.split()[1:]}
    assert rows["mode"] == ["tokens", "passes", "tokens/pass", "accepted", "seconds", "tokens/s", "x", "AR"]
    assert rows["mask_diffusion"] == ["1000", "100", "10.00", "1.00", "1000", "2.00"]
    assert rows["ar"] == ["1000", "100", "10.00", "2.00", "500", "1.00"]
    assert rows["speculative"] == ["1000", "100", "10.00", "1.50", "8.00", "125", "0.25"]


def test_the_command_writes_in_all_modes_and_a_page(two_tower_folder, loaded, tmp_path, capsys):
    page = tmp_path / "replay.html"
    arguments = ["generate", "--model", str(two_tower_folder), "--prompt", PROMPT, "--mode", "all", "--html", str(page)]
    assert main.main([*arguments, "--max-new-tokens", "12", "--block-size", "8"]) == 0
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in re.findall(r"^\w+: \d+ tokens in .*$", out, re.MULTILINE)] == list(MODES)
    assert "x AR" in out and f"replay: {page}" in out
    recording = read_page(page)
    expected = engine.generate(*loaded, PROMPT, settings=SETTINGS)
    assert recording["text"] == expected.text and recording["passes"] == expected.passes


MISTAKES = {
    "empty prompt": (["--prompt", ""], "prompt: found no text, expected at least one token"),
    "unknown mode": (["--prompt", "x", "--mode", "ara"], "mode: found 'ara', expected one of mask_diffusion, "),
    "no folder": (["--prompt", "x", "--model", "/no/such"], "/no/such/config.json: not found"),
    "out of range": (["--prompt", "x", "--temperature", "-1"], "temperature: found -1.0, expected at least 0"),
    "no number": (["--prompt", "x", "--block-size", "many"], "invalid int value: 'many'"),
    "nothing to continue": ([], "one of the arguments --prompt --prompts --chat is required"),
    "two kinds of prompt": (["--prompt", "x", "--prompts", "y"], "not allowed with argument --prompt"),
    "no such device": (["--prompt", "x", "--device", "nowhere"], "device: found nowhere, expected"),
    "no page of ar": (["--prompt", "x", "--mode", "ar", "--html", "a.html"], "html: found mode ar, expected"),
    "page in no folder": (["--prompt", "x", "--html", "/no/such/a.html"], "/no/such/a.html: cannot be written"),
    "output of one prompt": (["--prompt", "x", "--output", "a.jsonl"], "--output: found a.jsonl, expected it with"),
    "page of many prompts": (["--prompts", "x", "--html", "a.html"], "--html: found a.html, expected it with --prompt"),
    "prompts without output": (["--prompts", "x"], "--output: found none"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(mistake, two_tower_folder, capsys):
    arguments, expected = MISTAKES[mistake]
    try:
        status = main.main(["generate", "--model", str(two_tower_folder), *arguments])
    except SystemExit as stopped:  # argparse's own
        status = stopped.code
    captured = capsys.readouterr()
    assert status == 2
    assert expected in captured.err
    assert captured.err.startswith("twotower: ") and captured.err.count("\n") == 1
    assert not captured.out


# --- conversations ---


@pytest.mark.parametrize("interactive", [True, False])
def test_a_conversation_goes_on_with_its_own_answers(two_tower_folder, tmp_path, monkeypatch, interactive):
    folder = shutil.copytree(two_tower_folder, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    prompts, answers, call = [], [], generate_terminal.generate

    def generate(model, tokenizer, prompt, **settings):
        prompts.append((prompt, settings["recognised"]))
        answers.append(call(model, tokenizer, prompt, **settings))
        return answers[-1]

    monkeypatch.setattr(generate_terminal, "generate", generate)
    console = terminal(force_terminal=interactive)
    lines = ["alpha\n", "\n", "beta <mask>\n"]
    status = generate_terminal.chat(
        folder, mode="mask_diffusion", settings=SETTINGS, system="short", console=console, lines=lines
    )
    assert status == 0 and len(prompts) == 2
    first = "[system] short</s>[user] alpha</s>[assistant]"
    assert prompts[0] == (first, frozenset({"<unk>", "<s>", "</s>"}))
    assert prompts[1][0] == f"{first} {answers[0].text}</s>[user] beta <mask></s>[assistant]"
    shown = console.file.getvalue()
    assert shown.count("mask_diffusion: ") == 2
    if not interactive:
        assert answers[0].text.split("\n")[0] in shown and "[user]" not in shown
    else:
        assert "\x1b[?25l" in shown, "a live view"


def test_a_conversation_needs_a_template(two_tower_folder):
    with pytest.raises(UserError, match="found no chat template"):
        generate_terminal.chat(two_tower_folder, mode="ar", settings=SETTINGS, console=terminal(), lines=["x"])
