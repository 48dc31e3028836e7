"""Conversations: their shapes, what a dozen chat templates score, and the shards that hold it."""

import json
import shutil

import numpy as np
import pytest

from helpers.chat_templates import CHATML, CHATML_MARKED, CONVERSATION, GEMMA, MISTRAL, SCORED, SPECIAL
from helpers.corpora import content, make_tokenizer, read_samples, texts
from megatron_twotower.common.engines import EngineSettings
from megatron_twotower.common.errors import UserError
from megatron_twotower.data.conversations import Conversation, conversation_of_record, open_template, render
from megatron_twotower.data.inspect import SCORED_STYLE, decoded_blocks
from megatron_twotower.data.prepare import prepare
from megatron_twotower.data.record_formats import Fault
from megatron_twotower.data.shards import Corpus, checksum
from megatron_twotower.data.tokenizer import load_tokenizer
from megatron_twotower.data.verify import verify

MASK = 3


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory):
    """A tokenizer with the special tokens of all templates, without a template."""
    small = make_tokenizer(tmp_path_factory.mktemp("chat") / "plain", [*texts(), "user assistant system"])
    opened = load_tokenizer(small)
    opened.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    opened.save_pretrained(small.parent / "special")
    return small.parent / "special"


def scored_texts(pieces):
    assert not isinstance(pieces, Fault), pieces
    return [text for text, is_scored in pieces if is_scored]


def made(tokenizer, template, messages, **more):
    return render(open_template(tokenizer, template), Conversation(messages, **more))


# --- templates ---


@pytest.mark.parametrize("name", SCORED)
def test_what_a_template_scores_is_what_was_written_down_by_hand(name, chat_tokenizer):
    template, messages, expected = SCORED[name]
    pieces = made(chat_tokenizer, template, messages)
    assert scored_texts(pieces) == expected
    # All text is that of the template, up to the last scored token.
    whole = open_template(chat_tokenizer, template).tokenizer.apply_chat_template(messages, tokenize=False)
    joined = "".join(text for text, _ in pieces)
    assert whole.startswith(joined) and not whole.removeprefix(joined).strip()
    assert pieces[-1][1]


@pytest.mark.parametrize("name", SCORED)
def test_the_text_before_an_answer_is_what_generation_reads(name, chat_tokenizer):
    """Except where the record has no thought, and generation begins one."""
    template, messages, _ = SCORED[name]
    opened = open_template(chat_tokenizer, template)
    pieces = render(opened, Conversation(messages))
    prompt = opened.text(messages[:-1], Conversation(messages), begin_answer=True)
    assert prompt.removesuffix("\n") in "".join(text for text, _ in pieces[:-1]) + "\n"
    if name != "nemotron, without thoughts":
        assert prompt == "".join(text for text, _ in pieces[:-1])


def test_of_prompt_and_completion_the_completion_is_scored(chat_tokenizer):
    for template in (CHATML, CHATML_MARKED):
        pieces = made(chat_tokenizer, template, CONVERSATION, first_scored=4)
        assert scored_texts(pieces) == ["  indented\nlines<|im_end|>"]
        assert "Two." in pieces[0][0]


def test_what_follows_the_last_answer_is_not_kept(chat_tokenizer):
    pieces = made(chat_tokenizer, CHATML, CONVERSATION[:4])
    assert scored_texts(pieces) == ["Two.<|im_end|>"]
    assert pieces[-1] == ("Two.<|im_end|>", True)


def test_tools_and_arguments_reach_the_template(chat_tokenizer):
    template = (
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ style }}{% for message in messages %}<|im_start|>"
        "{{ message.role }}\n{% for call in message.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
        "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    record = {
        "messages": [
            {"role": "user", "content": "Sum?"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": [{"type": "text", "text": "It is "}, {"type": "text", "text": "2"}]},
        ],
        "tools": json.dumps([{"name": "add"}]),
        "chat_template_kwargs": {"style": "short"},
    }
    pieces = render(open_template(chat_tokenizer, template), conversation_of_record(record))
    assert scored_texts(pieces) == ["add<|im_end|>", "It is 2<|im_end|>"]
    assert pieces[0][0].startswith('[{"name": "add"}]short<|im_start|>user')


@pytest.mark.parametrize(
    ("template", "messages", "reason"),
    [
        (CHATML, CONVERSATION[:2], "no turn of the assistant"),
        (GEMMA, CONVERSATION, r"does not take turns of system, user, assistant \(System role not supported\)"),
        (MISTRAL, [{"role": "critic", "content": "x"}, *CONVERSATION], "does not take turns of critic, system"),
        (CHATML.replace("in messages", "in messages | reverse"), CONVERSATION, "cannot tell"),
        (
            CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}"),
            [*CONVERSATION, {"role": "tool", "content": "x"}],
            "leaves out turns of tool",
        ),
        (CHATML.replace("<|im_end|>", ""), CONVERSATION, "ends the turn of the assistant with no special token"),
        (
            CHATML.replace("message['content'] ", "message['content'] | upper "),
            CONVERSATION,
            "cannot tell what the chat",
        ),
        (
            CHATML_MARKED.replace("{% generation %}", "").replace(
                "<|im_end|>{% endgen", "{% generation %}<|im_end|>{% endgen"
            ),
            CONVERSATION,
            "changes the last turn",
        ),
        (CHATML_MARKED.replace("== 'assistant'", "== 'nobody'"), CONVERSATION, "marks no text of the assistant"),
    ],
)
def test_a_conversation_that_cannot_be_scored_is_malformed_in_one_line(template, messages, reason, chat_tokenizer):
    found = made(chat_tokenizer, template, messages)
    assert isinstance(found, Fault) and found.malformed and "\n" not in found.reason
    with pytest.raises(AssertionError, match=reason):
        scored_texts(found)


def test_an_empty_answer_is_its_end_and_empty_answers_alone_are_left_out(chat_tokenizer):
    messages = [dict(message) for message in CONVERSATION]
    messages[2]["content"] = " "
    assert scored_texts(made(chat_tokenizer, CHATML, messages))[0] == " <|im_end|>"
    messages[4]["content"] = ""
    assert made(chat_tokenizer, CHATML, messages) == Fault("empty")


# --- records ---

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("record", "first"),
    [
        ({"messages": TURNS}, 0),
        ({"prompt": "a", "completion": "b"}, 1),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, 1),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, 0),
        ({"conversation": TURNS, "prompt": None}, 0),
    ],
)
def test_every_shape_has_the_same_turns(record, first):
    found = conversation_of_record(record)
    assert (found.messages, found.first_scored) == (TURNS, first)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "a"}, "fields 'text', expected messages, or prompt and completion"),
        ({"messages": "a"}, "field 'messages' holds 'a', expected a list of turns"),
        ({"messages": []}, "field 'messages' holds nothing"),
        ({"messages": [{"content": "a"}]}, "turn 1 of 'messages' has the role nothing"),
        ({"messages": ["a"]}, "turn 1 of 'messages' is 'a'"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": 3}]}, "turn 2 of 'messages' has content of int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are no text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "unpaired surrogate"),
        ({"messages": TURNS, "tools": "[1"}, "field 'tools' is not JSON"),
        ({"messages": TURNS, "tools": {}}, "field 'tools' holds {}, expected a list"),
    ],
)
def test_a_record_that_is_no_conversation_says_why(record, reason):
    found = conversation_of_record(record)
    assert isinstance(found, Fault) and found.malformed
    assert reason in found.reason


# --- shards ---


def conversations(count=80):
    """Conversations of one to four turns, with text of various lengths."""
    found = []
    for number in range(count):
        turns = [{"role": "system", "content": f"system {number}"}] if number % 3 == 0 else []
        for turn in range(1 + number % 4):
            turns.append({"role": "user", "content": f"question {number} {turn} " + "x " * (number % 7)})
            turns.append({"role": "assistant", "content": f"answer {number} {turn}" + " ünit" * (number % 11)})
        found.append({"messages": turns})
    return found


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def prepared_chats(folder, tokenizer, records, *, template=CHATML, **changes):
    (folder / "template.jinja").write_text(template)
    write_lines(folder / "chats.jsonl", records)
    settings = {"holdout_fraction": 0.2, "shard_tokens": 500, "chat": True, **changes}
    template_file = {"chat_template": folder / "template.jinja"} if template else {}
    output = settings.pop("output", folder / "prepared")
    inputs = settings.pop("inputs", [str(folder / "chats.jsonl")])
    return output, prepare(inputs, tokenizer=tokenizer, output=output, **template_file, **settings)


def masks_by_name(prepared):
    """Ids and masks of every document as plain webdataset reads them, by the name of the record."""
    return {
        sample["json"]["name"]: (sample["tokens.npy"], sample["scored.npy"])
        for split in ("train", "validation")
        if any((prepared / split).glob("*.tar"))
        for sample in read_samples(prepared / split)
    }


def test_shards_hold_what_is_scored_beside_the_ids(chat_tokenizer, tmp_path):
    records = conversations()
    prepared, summary = prepared_chats(tmp_path, chat_tokenizer, records)
    opened = load_tokenizer(chat_tokenizer)
    found = masks_by_name(prepared)
    assert len(found) == len(records)
    for number, record in enumerate(records, start=1):
        ids, scored = found[f"chats.jsonl:{number}"]
        assert scored.dtype == bool and scored.shape == ids.shape
        answers = [turn["content"] for turn in record["messages"] if turn["role"] == "assistant"]
        runs = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(scored)) + 1)
        written = [opened.decode(ids[run]) for run in runs if scored[run[0]]]
        assert written == [f"{answer}<|im_end|>" for answer in answers]
        whole = opened.apply_chat_template(record["messages"], chat_template=CHATML, tokenize=False)
        assert opened.decode(ids) == whole.removesuffix("\n")
    end = opened.convert_tokens_to_ids("<|im_end|>")
    assert summary["conversations"] == {"turn_ends": [end]} and summary["version"] == 3
    assert (prepared / "tokenizer" / "chat_template.jinja").read_text() == CHATML


def test_any_window_of_the_stream_has_its_mask(chat_tokenizer, tmp_path):
    prepared, _ = prepared_chats(tmp_path, chat_tokenizer, conversations())
    corpus = Corpus.open(prepared / "train")
    assert len(corpus.shards) > 3
    samples = read_samples(prepared / "train")
    ids = np.concatenate([sample["tokens.npy"] for sample in samples])
    scored = np.concatenate([sample["scored.npy"] for sample in samples])
    for first, count in ((0, len(ids)), (17, 900), (len(ids) - 3, 3), (5, 0)):
        assert (corpus.tokens(first, count) == ids[first : first + count]).all()
        assert (corpus.scored(first, count) == scored[first : first + count]).all()
    assert (corpus.scored_document(7) == samples[7]["scored.npy"]).all()


def test_no_token_reaches_from_a_prompt_into_an_answer(chat_tokenizer, tmp_path):
    """The tokenizer has one token for a line break with its indentation."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "    indented"}]
    prepared, _ = prepared_chats(
        tmp_path, chat_tokenizer, [{"messages": turns}] * 2, deduplicate=False, holdout_fraction=0
    )
    ids, scored = masks_by_name(prepared)["chats.jsonl:1"]
    opened = load_tokenizer(chat_tokenizer)
    assert opened.decode(ids[~scored]).endswith("assistant\n")
    assert opened.decode(ids[scored]) == "    indented<|im_end|>"
    prompt = opened.apply_chat_template(turns[:1], chat_template=CHATML, add_generation_prompt=True)["input_ids"]
    assert ids[~scored].tolist() == prompt


def test_the_mask_token_stays_text_and_other_special_tokens_do_not(chat_tokenizer, tmp_path):
    turns = [{"role": "user", "content": "<mask>"}, {"role": "assistant", "content": "<think>a</think> <mask>"}]
    prepared, _ = prepared_chats(tmp_path, chat_tokenizer, [{"messages": turns}], holdout_fraction=0)
    ids, _ = masks_by_name(prepared)["chats.jsonl:1"]
    opened = load_tokenizer(chat_tokenizer)
    assert MASK not in ids and opened.convert_tokens_to_ids("<think>") in ids


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_units_and_forms_change_nothing(workers, chat_tokenizer, tmp_path):
    records = conversations(60)
    expected, _ = prepared_chats(tmp_path, chat_tokenizer, records)
    again, _ = prepared_chats(
        tmp_path,
        chat_tokenizer,
        records,
        output=tmp_path / "again",
        engine=EngineSettings(workers=workers),
        unit_bytes=700,
    )
    assert content(again, leave_out=("provenance.json",)) == content(expected, leave_out=("provenance.json",))
    pyarrow = pytest.importorskip("pyarrow.parquet")
    table = __import__("pyarrow").Table.from_pylist([{"id": 1, **record, "tools": None} for record in records])
    pyarrow.write_table(table, tmp_path / "chats.parquet", row_group_size=7)
    (tmp_path / "array.json").write_text(json.dumps(records))
    shards = [(expected / "train" / f"shard-{number:05d}.tar") for number in range(2)]
    for name in ("chats.parquet", "array.json"):
        other, _ = prepared_chats(
            tmp_path, chat_tokenizer, records, output=tmp_path / f"from-{name}", inputs=[str(tmp_path / name)]
        )
        for shard in shards:  # the names of records differ, and nothing else
            ours, theirs = read_samples(shard.parent), read_samples(other / "train")
            assert all((a["scored.npy"] == b["scored.npy"]).all() for a, b in zip(ours, theirs, strict=True))
            assert all((a["tokens.npy"] == b["tokens.npy"]).all() for a, b in zip(ours, theirs, strict=True))


def test_folders_give_their_records_of_conversations(chat_tokenizer, tmp_path):
    folder = tmp_path / "input"
    folder.mkdir()
    write_lines(folder / "chats.jsonl", conversations(20))
    (folder / "pairs.json").write_text(json.dumps([{"prompt": f"p {n}", "completion": f"c {n}"} for n in range(5)]))
    (folder / "other.json").write_text(json.dumps([{"text": "x"}]))
    (folder / "notes.txt").write_text("text")
    _, summary = prepared_chats(tmp_path, chat_tokenizer, [], inputs=[str(folder)], holdout_fraction=0)
    assert summary["splits"]["train"]["documents"] == 25
    assert summary["passed_over"]["counts"].keys() == {".json without records with 'messages'", ".txt"}


def test_wrong_input_is_one_line(chat_tokenizer, small_tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"no chat template, expected chat_template\.jinja"):
        prepared_chats(tmp_path, chat_tokenizer, conversations(3), template="", output=tmp_path / "a")
    bad = [{"messages": [{"role": "user", "content": "x"}]}, *conversations(3)]
    with pytest.raises(UserError, match=r"chats\.jsonl:1: found no turn of the assistant.*first of 1 malformed"):
        prepared_chats(tmp_path, chat_tokenizer, bad, output=tmp_path / "b")
    _, summary = prepared_chats(tmp_path, chat_tokenizer, bad, output=tmp_path / "c", max_malformed=1)
    assert summary["malformed"] == [f"{tmp_path}/chats.jsonl:1: found no turn of the assistant, expected one to score"]
    with pytest.raises(UserError, match=r"template\.jinja: found text, expected JSON lines"):
        prepared_chats(tmp_path, chat_tokenizer, [], inputs=[str(tmp_path / "template.jinja")], output=tmp_path / "d")
    assert not any((tmp_path / name).exists() for name in "abd")


def test_an_interrupted_run_with_another_template_is_not_resumed(chat_tokenizer, tmp_path):
    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared_chats(tmp_path, chat_tokenizer, conversations(9), progress=stop)
    with pytest.raises(UserError, match="chat_template"):
        prepared_chats(tmp_path, chat_tokenizer, conversations(9), template=CHATML_MARKED)
    # The same if the template of the tokenizer itself has changed.
    own, output = shutil.copytree(chat_tokenizer, tmp_path / "own"), tmp_path / "other"
    (own / "chat_template.jinja").write_text(CHATML)
    with pytest.raises(KeyboardInterrupt):
        prepared_chats(tmp_path, own, conversations(9), template="", output=output, progress=stop)
    (own / "chat_template.jinja").write_text(CHATML_MARKED)
    same = {"holdout_fraction": 0.2, "shard_tokens": 500, "chat": True}
    with pytest.raises(UserError, match="template_sha256"):
        prepare([str(tmp_path / "chats.jsonl")], tokenizer=own, output=output, **same)


# --- commands ---


def test_verify_finds_a_mask_that_is_empty_or_cuts_an_answer(chat_tokenizer, tmp_path, capsys):
    prepared, _ = prepared_chats(tmp_path, chat_tokenizer, conversations(30))
    assert verify(str(prepared)) == []
    corpus = Corpus.open(prepared / "train")
    shard, place = prepared / "train" / corpus.shards[0].file, int(corpus.scored_offsets[0])
    whole, length = shard.read_bytes(), int(corpus.starts[1])
    mask = np.frombuffer(whole, bool, count=length, offset=place)
    cut = mask.copy()
    cut[-1] = False
    index = json.loads((prepared / "train" / "index.json").read_text())
    for changed, expected in (
        (np.zeros(length, bool), "nothing scored in document 0"),
        (cut, "scored turn that ends with"),
    ):
        shard.write_bytes(whole[:place] + changed.tobytes() + whole[place + length :])
        index["shards"][0]["sha256"] = checksum(shard)
        (prepared / "train" / "index.json").write_text(json.dumps(index))
        assert any(expected in problem for problem in verify(str(prepared))), expected


def test_inspect_colours_what_is_scored(chat_tokenizer, tmp_path):
    prepared, _ = prepared_chats(tmp_path, chat_tokenizer, conversations(12), holdout_fraction=0)
    corpus = Corpus.open(prepared / "train")
    shown = decoded_blocks(corpus, 0, block_size=16, tokenizer=load_tokenizer(chat_tokenizer))
    green = "".join(shown.plain[span.start : span.end] for span in shown.spans if span.style == SCORED_STYLE)
    assert green == "answer 0 0<|im_end|>"
    assert shown.plain.replace("|im", "@").count("|") > 1


def test_the_command_refuses_options_that_conversations_do_not_use(chat_tokenizer, tmp_path):
    from megatron_twotower.cli.main import main

    write_lines(tmp_path / "chats.jsonl", conversations(3))
    words = ["data", "prepare", "--input", f"{tmp_path}/chats.jsonl", "--tokenizer", str(chat_tokenizer)]
    words += ["--output", str(tmp_path / "out")]
    for more in (["--chat", "--eos", "document"], ["--chat", "--text-field", "x"], ["--chat-template", "x"]):
        assert main([*words, *more]) == 2
    (tmp_path / "t.jinja").write_text(CHATML)
    assert main([*words, "--chat", "--chat-template", str(tmp_path / "t.jinja"), "--workers", "1"]) == 0
