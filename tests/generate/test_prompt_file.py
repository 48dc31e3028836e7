"""A file of prompts: what is read, how it is batched, how a killed run resumes, what is written."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest
from rich.console import Console

from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.data.tokenizer import text_encoder
from megatron_twotower.generate import engine, prompt_file
from megatron_twotower.generate.engine import GenerationSettings
from megatron_twotower.generate.journal import open_journal
from megatron_twotower.generate.loaded import model_fingerprint
from megatron_twotower.generate.prompt_file import BatchingSettings, batches, read_prompts

SETTINGS = GenerationSettings(max_new_tokens=6, block_size=4)
SMALL = BatchingSettings(batch_size=3, window_batches=2)
WORDS = ("alpha", "beta", "gamma", "delta", "count")


@pytest.fixture(scope="module")
def loaded(two_tower_folder):
    return engine.load(two_tower_folder)


def prompt(number):
    """Prompts of many lengths, in no order."""
    return " ".join(WORDS[(number + i) % 5] for i in range(1 + (7 * number) % 11))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "prompt": prompt(i), "tags": ["ä"]}) + "\n" for i in range(20)))
    return path


def run(folder, prompts, output, *, mode="mask_diffusion", settings=SETTINGS, batching=SMALL):
    quiet = Console(quiet=True)
    prompt_file.run(
        folder, prompts=prompts, output=output, mode=mode, settings=settings, batching=batching, console=quiet
    )
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("mode", ["mask_diffusion", "speculative"])
def test_rows_have_the_order_of_the_file_and_the_text_of_each_prompt_alone(loaded, two_tower_folder, prompts, mode):
    rows = run(two_tower_folder, prompts, prompts.with_name("out.jsonl"), mode=mode)
    assert [row["id"] for row in rows] == list(range(20))
    for number, row in enumerate(rows):
        alone = engine.generate(*loaded, prompt(number), mode=mode, settings=SETTINGS)
        assert row == {
            "id": number,
            "prompt": prompt(number),
            "tags": ["ä"],
            "text": alone.text,
            "new_tokens": alone.new_tokens,
            "finish_reason": "length" if alone.ids[-1] != loaded[1].eos_token_id else "stop",
        }
    assert sorted(path.name for path in prompts.parent.iterdir()) == ["out.jsonl", "prompts.jsonl"]


def test_rows_that_end_have_the_finish_reason_stop(loaded, tmp_path, monkeypatch):
    model, tokenizer = loaded
    ids = [text_encoder(tokenizer)([prompt(i)])[0] for i in range(4)]
    batch = prompt_file.PromptBatch(0, [0, 1, 2, 3], [{"prompt": prompt(i)} for i in range(4)], ids)
    whole = prompt_file.generate_batch(model, tokenizer, batch, mode="ar", settings=SETTINGS)
    assert {row["finish_reason"] for row in whole} == {"length"}
    new = engine.generate(model, tokenizer, prompt(0), mode="ar", settings=SETTINGS).ids[len(ids[0]) :]
    monkeypatch.setattr(type(tokenizer), "eos_token_id", int(new[2]), raising=False)
    first = int((new == new[2]).nonzero()[0])
    row = prompt_file.generate_batch(model, tokenizer, batch, mode="ar", settings=SETTINGS)[0]
    assert (row["finish_reason"], row["new_tokens"]) == ("stop", first + 1)
    assert row["text"] == tokenizer.decode(new[:first].tolist())
    monkeypatch.undo()
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, int(new[2])])
    assert row == prompt_file.generate_batch(model, tokenizer, batch, mode="ar", settings=SETTINGS)[0]


TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def chat_folder(two_tower_folder, tmp_path):
    folder = shutil.copytree(two_tower_folder, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def write_chats(path, chats):
    path.write_text(
        "".join(json.dumps({"messages": chat} if isinstance(chat, list) else chat) + "\n" for chat in chats)
    )
    return path


def test_conversations_are_answered_as_their_template_renders_them(chat_folder, loaded, tmp_path):
    asked = [{"role": "user", "content": "alpha <mask>"}]
    longer = [*asked, {"role": "assistant", "content": "beta"}, {"role": "user", "content": "gamma"}]
    path = write_chats(tmp_path / "chats.jsonl", [asked, {"prompt": "alpha </s>"}, longer])
    rows = run(chat_folder, path, tmp_path / "out.jsonl")
    special = frozenset({"<unk>", "<s>", "</s>"})
    texts = [
        ("[user] alpha <mask></s>\n[assistant] ", special),
        ("alpha </s>", ()),
        ("[user] alpha <mask></s>\n[assistant] beta</s>\n[user] gamma</s>\n[assistant] ", special),
    ]
    for row, (text, recognised) in zip(rows, texts, strict=True):
        alone = engine.generate(*loaded, text, settings=SETTINGS, recognised=recognised)
        assert row["text"] == alone.text
        ids = text_encoder(loaded[1], recognised=recognised)([text])[0]
        assert alone.ids[: len(ids)].tolist() == ids and ids.count(2) == text.count("</s>") * bool(recognised)
        assert 3 not in ids, "the mask token stays text"
    assert [row.get("messages") for row in rows] == [asked, None, longer]


def test_conversations_that_cannot_be_answered_are_one_line(chat_folder, two_tower_folder, tmp_path):
    asked = [{"role": "user", "content": "alpha"}]
    mistakes = [
        (
            [asked, [{"role": "critic", "content": "x"}]],
            chat_folder,
            r"chats\.jsonl:2: the chat template does not take .*",
        ),
        ([[*asked, {"role": "assistant", "content": "x"}]], chat_folder, r":1: found a last turn of the assistant"),
        ([{"messages": "alpha"}], chat_folder, r":1: field 'messages' holds 'alpha', expected a list of turns"),
        ([asked], two_tower_folder, "found no chat template"),
        ([{"text": "x"}], chat_folder, "with a text field 'prompt' or with 'messages'"),
    ]
    for chats, folder, message in mistakes:
        path = write_chats(tmp_path / "chats.jsonl", chats)
        with pytest.raises(UserError, match=message):
            run(folder, path, tmp_path / "out.jsonl")
        assert not list(tmp_path.glob("out*")), message


def test_a_batch_has_prompts_of_similar_lengths_within_a_window(loaded, prompts):
    encode = text_encoder(loaded[1])
    made = list(batches(prompts, lambda records: encode([record["prompt"] for record in records]), SMALL))
    assert [batch.number for batch in made] == list(range(7))
    assert [len(batch.ids) for batch in made] == [3] * 6 + [2]  # windows of 6, 6, 6 and 2 prompts
    for first in range(0, len(made), 2):
        window = made[first : first + 2]
        places = [place for batch in window for place in batch.positions]
        assert sorted(places) == list(range(first * 3, first * 3 + len(places)))
        lengths = [len(ids) for batch in window for ids in batch.ids]
        assert lengths == sorted(lengths, reverse=True)
    for batch in made:
        assert batch.ids == encode([prompt(place) for place in batch.positions])


@pytest.mark.parametrize("stop", [0, 1, 3, 6])
def test_a_killed_run_resumes_where_it_stopped(two_tower_folder, prompts, monkeypatch, stop):
    """The rows equal those of an uninterrupted run, even sampled; no batch is generated twice."""
    settings = GenerationSettings(max_new_tokens=6, block_size=4, temperature=1.0, seed=5)
    expected = run(two_tower_folder, prompts, prompts.with_name("whole.jsonl"), settings=settings)
    written, generate_batch = [], prompt_file.generate_batch

    def failing(*arguments, **settings):
        if len(written) == stop:
            raise MemoryError
        written.append(arguments[2].number)
        return generate_batch(*arguments, **settings)

    output = prompts.with_name("out.jsonl")
    monkeypatch.setattr(prompt_file, "generate_batch", failing)
    with pytest.raises(MemoryError):
        run(two_tower_folder, prompts, output, settings=settings)
    assert not output.exists()
    partial = prompts.with_name("out.jsonl.partial")
    with open(partial, "ab") as stream:
        stream.write(b'{"batch": 99, "rows": [[0, {"prompt": "torn')
    monkeypatch.setattr(
        prompt_file, "generate_batch", lambda *a, **s: written.append(a[2].number) or generate_batch(*a, **s)
    )
    assert run(two_tower_folder, prompts, output, settings=settings) == expected
    assert written == list(range(7))
    assert not partial.exists()
    assert len({row["text"] for row in expected}) > 10


def test_memory_does_not_grow_with_the_number_of_prompts(two_tower_folder, tmp_path, monkeypatch):
    """Neither prompts nor texts are held: a window is. The peak of Python's own memory."""

    def rows(model, tokenizer, batch, **_):
        return [{"text": f"{number} " * 100, "new_tokens": 1} for number in batch.positions]

    monkeypatch.setattr(prompt_file, "generate_batch", rows)
    peaks = []
    for count in (50, 200, 1800):
        path, output = tmp_path / f"{count}.jsonl", tmp_path / f"out-{count}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{number} " * 100}) + "\n" for number in range(count)))
        tracemalloc.start()
        prompt_file.run(
            two_tower_folder,
            prompts=path,
            output=output,
            mode="mask_diffusion",
            settings=SETTINGS,
            batching=BatchingSettings(batch_size=16, window_batches=4),
            console=Console(quiet=True),
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        with open(output) as lines:
            assert sum(json.loads(line)["text"].startswith(f"{number} ") for number, line in enumerate(lines)) == count
    assert peaks[2] - peaks[1] < 200_000 < 1600 * 200, "the prompts that the last file has more"


def test_only_the_same_request_resumes(two_tower_folder, prompts, monkeypatch):
    output = prompts.with_name("out.jsonl")
    monkeypatch.setattr(prompt_file, "generate_batch", lambda *a, **s: (_ for _ in ()).throw(MemoryError))
    with pytest.raises(MemoryError):
        run(two_tower_folder, prompts, output)
    with pytest.raises(UserError, match="found an interrupted run with max_new_tokens 6, expected 7"):
        run(two_tower_folder, prompts, output, settings=GenerationSettings(max_new_tokens=7, block_size=4))
    prompts.write_text(prompts.read_text().replace("alpha", "gamma"))
    with pytest.raises(UserError, match="found an interrupted run with prompts_sha256"):
        run(two_tower_folder, prompts, output)


def test_two_processes_cannot_write_one_output(two_tower_folder, prompts):
    output = prompts.with_name("out.jsonl")
    with open_journal(prompts.with_name("out.jsonl.partial"), {}), pytest.raises(UserError, match="in use, expected"):
        run(two_tower_folder, prompts, output)


def test_text_files_have_a_prompt_on_each_line(two_tower_folder, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b'def alpha(\r\n {"prompt": 1} \nbeta')
    expected = ["def alpha(", ' {"prompt": 1} ', "beta"]
    for rows in (read_prompts(path), run(two_tower_folder, path, tmp_path / "out.jsonl")):
        assert [row["prompt"] for row in rows] == expected


@pytest.mark.parametrize("name", ["p.json", "P.JSONL", "p.NDJSON", "p.txt", "p", "p.jsonl.gz"])
def test_prompts_are_read_as_what_they_are_under_any_name(name, tmp_path):
    """As a corpus is: JSON lines or one array, with a byte order mark or without."""
    records = [{"prompt": "def alpha(", "id": 1}, {"prompt": "beta", "id": 2}]
    lines = "".join(json.dumps(record) + "\r\n" for record in records).encode()
    for content in (lines, b"\xef\xbb\xbf" + lines, json.dumps(records, indent=1).encode()):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert list(read_prompts(tmp_path / name)) == records


def test_a_byte_order_mark_is_no_prompt(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfdef alpha(\n \xef\xbb\xbf{\n")
    assert [record["prompt"] for record in read_prompts(path)] == ["def alpha(", " \ufeff{"]


def test_half_a_surrogate_pair_beside_a_prompt_is_copied(two_tower_folder, tmp_path):
    """JSON can escape what UTF-8 cannot encode; the output escapes it again."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "alpha", "id": "\\ud83d"}\n{"prompt": "é", "id": "ä"}\n')
    rows = run(two_tower_folder, path, tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["\ud83d", "ä"]
    assert "ä".encode() in (tmp_path / "out.jsonl").read_bytes()


def test_the_fingerprint_changes_with_configuration_and_weights(two_tower_folder, tmp_path):
    before = model_fingerprint(two_tower_folder)
    assert model_fingerprint(two_tower_folder) == before
    for name in ("config.json", "model.safetensors"):
        folder = tmp_path / name
        folder.mkdir()
        for path in two_tower_folder.iterdir():
            content = path.read_bytes()
            (folder / path.name).write_bytes(content[:-1] + b" " if path.name == name else content)
        assert model_fingerprint(folder) != before


MISTAKES = {
    "no file": (None, "prompts.jsonl: cannot be read (No such file or directory)"),
    "not JSON": (b'{"prompt": "a"}\n{"prompt": }\n', "prompts.jsonl:2: not valid JSON (Expecting value, column 12)"),
    "a blank line": (b'{"prompt": "a"}\n\n', "prompts.jsonl:2: not valid JSON"),
    "no object": (b'"a"\n', "prompts.jsonl:1: found '\"a\"', expected a JSON object with a text field"),
    "no prompt": (b'{"prompt": "a"}\n{"text": "b"}\n', "prompts.jsonl:2: found"),
    "a number": (b'{"prompt": 5}\n', "prompts.jsonl:1: found '{\"prompt\": 5}', expected a JSON object"),
    "an empty prompt": (b'{"prompt": "a"}\n{"prompt": ""}\n', "prompts.jsonl:2: found an empty prompt"),
    "a field of ours": (b'{"prompt": "a", "text": 1}\n', "prompts.jsonl:1: found a field 'text', which the output"),
    "not text": (b'{"prompt": "\xff"}\n', "prompts.jsonl: cannot be read (not UTF-8)"),
    "empty": (b"", "prompts.jsonl: found no prompt"),
    "half a surrogate pair": (
        b'{"prompt": "a"}\n{"prompt": "\\ud83d"}\n',
        "prompts.jsonl:2: field 'prompt' holds an unpaired surrogate",
    ),
    "a value of an array": (
        b'[{"prompt": "a"}, {"text": "b"}]',
        'prompts.jsonl:2: found \'{"text": "b"}\', expected a',
    ),
    "half an array": (b'[{"prompt": "a"}, {"prom', "prompts.jsonl: not a JSON array (after 1 values"),
    "deep JSON": (b'{"prompt": ' + b"[" * 100_000, "prompts.jsonl:1: not valid JSON (maximum recursion depth"),
    "zip": (b"PK\x03\x04", "prompts.jsonl: found a zip file, expected text, records"),
}


def test_prompts_in_json_that_is_no_list_of_records_are_refused(two_tower_folder, tmp_path, capsys):
    for name, content, expected in (
        (
            "a.json",
            '{\n "prompts": ["a"]\n}',
            "a.json: found one JSON object over several lines, expected JSON lines or",
        ),
        ("a.parquet", "PAR1", "a.parquet: found parquet, expected JSON lines, a JSON array or lines of text"),
    ):
        (tmp_path / name).write_text(content)
        assert main.main(arguments(two_tower_folder, tmp_path / name)) == 2
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out.jsonl*"))


def arguments(folder, path, *more):
    output = path.with_name("out.jsonl")
    return ["generate", "--model", str(folder), "--prompts", str(path), "--output", str(output), *more]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_prompt_that_cannot_be_used_is_named_by_file_and_line(mistake, two_tower_folder, tmp_path, capsys):
    content, expected = MISTAKES[mistake]
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    assert main.main(arguments(two_tower_folder, path)) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith(f"twotower: {path}") and error.count("\n") == 1
    assert not list(tmp_path.glob("out.jsonl*"))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--mode", "all"], "mode: found 'all', expected one of mask_diffusion, mock_ar, ar, speculative"),
        (["--batch-size", "0"], "--batch-size: found 0, expected at least 1"),
        (["--block-size", "0"], "--block-size: found 0, expected at least 1"),
        (["--model", "/no/such"], "/no/such/config.json: not found"),
    ],
)
def test_a_mistake_leaves_no_file(more, expected, two_tower_folder, prompts, capsys):
    assert main.main(arguments(two_tower_folder, prompts, *more)) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("twotower: ") and error.count("\n") == 1
    assert not list(prompts.parent.glob("out.jsonl*"))


def test_an_output_that_exists_is_kept(two_tower_folder, prompts, capsys):
    prompts.with_name("out.jsonl").write_text("precious")
    assert main.main(arguments(two_tower_folder, prompts)) == 2
    assert "out.jsonl: exists already" in capsys.readouterr().err
    assert prompts.with_name("out.jsonl").read_text() == "precious"


@pytest.mark.slow
def test_a_killed_process_resumes(two_tower_folder, tmp_path):
    """SIGKILL in the middle, through the command."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(prompt(i) + "\n" for i in range(120)))
    more = ["--batch-size", "2", "--max-new-tokens", "24", "--temperature", "1"]
    command = [sys.executable, "-m", "megatron_twotower", *arguments(two_tower_folder, path, *more)]
    partial, output = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 10):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = partial.read_bytes().count(b"\n") - 1
    assert 10 <= done < 60 and not output.exists()
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [prompt(i) for i in range(120)]
    output.rename(tmp_path / "resumed.jsonl")
    subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert output.read_bytes() == (tmp_path / "resumed.jsonl").read_bytes()
