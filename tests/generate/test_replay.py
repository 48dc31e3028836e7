"""Recordings of mask diffusion, the page that plays them, and the page in a browser."""

import json
import re

import pytest
import torch

from helpers.browser import in_browser, tiles
from megatron_twotower.common.errors import UserError
from megatron_twotower.generate import engine
from megatron_twotower.generate.engine import Callbacks, GenerationSettings
from megatron_twotower.generate.replay.page import fragment, read_page, render_page, write_page
from megatron_twotower.generate.replay.recording import Recorder

PROMPT = "def </script><!--alpha(b & c):\n"
SETTINGS = GenerationSettings(max_new_tokens=20, block_size=8, confidence_threshold=0.1)


@pytest.fixture(scope="module")
def loaded(two_tower_folder):
    return engine.load(two_tower_folder)


@pytest.fixture(scope="module")
def recorded(loaded):
    """The steps, their recording, and the generation."""
    steps, recorder = [], Recorder()
    callbacks = Callbacks(on_step=lambda seen: (steps.append(seen), recorder(seen)))
    written = engine.generate(*loaded, PROMPT, settings=SETTINGS, callbacks=callbacks)
    return steps, recorder.recording(written, loaded[1], model="runs/a<b>", settings=SETTINGS), written


def test_a_recording_contains_every_step(recorded, loaded):
    steps, recording, written = recorded
    assert json.loads(json.dumps(recording)) == recording
    assert [len(block) for block in recording["blocks"]] == [
        sum(step.block == block for step in steps) for block in range(3)
    ]
    flat = [step for block in recording["blocks"] for step in block]
    assert len(flat) == written.passes == recording["passes"] > 3
    for step, seen in zip(flat, steps, strict=True):
        assert step["predicted"] == seen.predicted[0].tolist()
        assert step["committed"] == seen.committed[0].nonzero().flatten().tolist()
        torch.testing.assert_close(torch.tensor(step["confidence"]), seen.confidence[0], atol=1e-4, rtol=0)
        assert step["t"] == pytest.approx(float(seen.t[0]), abs=1e-4)
    for block in recording["blocks"]:
        assert sorted(column for step in block for column in step["committed"]) == list(range(8))
    # What the steps commit is the text.
    ids = [0] * 24
    for number, block in enumerate(recording["blocks"]):
        for step in block:
            for column in step["committed"]:
                ids[8 * number + column] = step["predicted"][column]
    assert ids[: written.new_tokens] == written.ids[-written.new_tokens :].tolist()
    assert "".join(recording["pieces"][str(token)] for token in ids[: written.new_tokens]) == written.text
    assert recording["settings"]["confidence_threshold"] == 0.1


def test_no_step_is_recorded_after_the_end_of_a_row(loaded):
    model, tokenizer = loaded
    ids = torch.tensor([tokenizer("alpha", add_special_tokens=False)["input_ids"][:1]] * 2)
    ids[1] += 1
    rows = model.generate_mask_diffusion(ids, 24, 8)[:, 1:].tolist()
    eos = next(token for token in rows[0][:8] if token not in rows[1])
    recorders = [Recorder(row) for row in range(2)]
    model.generate_mask_diffusion(
        ids, 24, 8, eos_token_id=eos, on_step=lambda seen: [recorder(seen) for recorder in recorders]
    )
    assert sum(map(bool, recorders[0].blocks)) == 1 < sum(map(bool, recorders[1].blocks))


def test_a_page_is_one_file_that_loads_nothing(recorded, tmp_path):
    _, recording, _ = recorded
    write_page(tmp_path / "a.html", recording)
    text = (tmp_path / "a.html").read_text()
    assert read_page(tmp_path / "a.html") == recording
    assert "default-src 'none'" in text
    assert not re.findall(r"https?:|url\(|@import|\bsrc=|\bhref=|fetch\(|XMLHttp|import\(", text)
    assert text.count("</script>") == 2, "no text of a prompt or a model ends a script"
    assert "a&lt;b&gt;" in text and "<b>" not in text
    assert fragment(recording) in text


def test_other_pages_are_refused(recorded, tmp_path):
    path = tmp_path / "a.html"
    path.write_text("<p>nothing</p>")
    with pytest.raises(UserError, match=r"a\.html: found no recording, expected a page"):
        read_page(path)
    path.write_text(render_page(recorded[1] | {"version": 99}))
    with pytest.raises(UserError, match="found a recording of version 99, expected 1"):
        read_page(path)
    with pytest.raises(UserError, match="cannot be written"):
        write_page(tmp_path / "none" / "a.html", recorded[1])


@pytest.mark.slow
def test_a_browser_shows_a_step(recorded, tmp_path):
    _, recording, written = recorded
    write_page(tmp_path / "a.html", recording)
    first, second = len(recording["blocks"][0]), recording["blocks"][1]
    # Frames: the first block before its steps and after each, then the second: here after its
    # second step.
    document = in_browser(tmp_path / "a.html", tmp_path / "profile", fragment=f"#step={first + 1 + 2}")
    shown = tiles(document)
    assert len(shown) == 16
    committed = sum(len(step["committed"]) for step in second[:2])
    assert sum("masked" in name for name, _ in shown) == 8 - committed
    fresh = [index - 8 for index, (name, _) in enumerate(shown) if "fresh" in name]
    assert fresh == second[1]["committed"]
    assert f"block 2 of 3, step 2 of {len(second)}" in document
    assert f"{8 - committed} left" in document
    assert document.count('class="rp-map"') == 1
    assert len(re.findall(r'<td class="fresh"', document)) == 8
    # Without a step in the address the page shows all tokens; those after the end are crossed out.
    shown = tiles(in_browser(tmp_path / "a.html", tmp_path / "profile"))
    assert len(shown) == 24 and not any("masked" in name for name, _ in shown)
    assert [" cut" in name for name, _ in shown] == [index >= written.new_tokens for index in range(24)]


CLICKS = """
const root = document.querySelector(".replay"), seen = [];
const note = () => seen.push(Number(root.dataset.frame));
const click = (name) => { root.querySelector(name).click(); note(); };
const key = (name) => { root.dispatchEvent(new KeyboardEvent("keydown", { key: name })); note(); };
note(); key("Home"); click(".rp-forward"); click(".rp-forward"); click(".rp-back"); click(".rp-next");
click(".rp-previous"); key("ArrowRight"); key("End");
const slider = root.querySelector(".rp-slider");
slider.value = 3; slider.dispatchEvent(new Event("input")); note();
root.querySelector("tbody tr").click(); note();
root.querySelector(".rp-token").dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
const tip = root.querySelector(".rp-tip.shown").innerText;
root.querySelector("input[type=checkbox]").click();
root.querySelector("select").value = 70;
key("Home"); root.querySelector(".rp-play").click();
const label = root.querySelector(".rp-play").textContent;
setTimeout(() => {
  note();
  const result = document.createElement("output");
  result.textContent = JSON.stringify({ seen, tip, label, end: root.querySelector(".rp-play").textContent,
    hidden: root.classList.contains("rp-hide-guesses") });
  document.body.append(result);
}, 10000);
"""


@pytest.mark.slow
def test_a_browser_plays_and_every_control_works(recorded, tmp_path):
    _, recording, _ = recorded
    write_page(tmp_path / "a.html", recording)
    document = in_browser(tmp_path / "a.html", tmp_path / "profile", script=CLICKS)
    result = json.loads(re.search(r"<output>(.*?)</output>", document)[1])
    lengths = [len(block) + 1 for block in recording["blocks"]]
    last = sum(lengths) - 1
    assert result["seen"] == [last, 0, 1, 2, 1, lengths[0], 0, 1, last, 3, 1, 0, last]
    assert result["label"] == "⏸ pause" and result["end"] == "▶ play"
    assert result["hidden"] is True
    first = recording["blocks"][0][0]
    if 0 in first["committed"]:
        assert "committed at step 1" in result["tip"]
    else:
        assert "best guess" in result["tip"] and f"with {100 * first['confidence'][0]:.1f} %" in result["tip"]
