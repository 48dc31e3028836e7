"""The model class for lm-evaluation-harness, run by the harness on task files of the tests."""

import functools
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.modeling import become_backbone, save, tiny_model
from helpers.ray_nodes import set_up_own_ray
from helpers.scores import cross_entropy, exact_score
from megatron_twotower.cli import main
from megatron_twotower.common.engines import EngineSettings
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import recipes_folder
from megatron_twotower.evaluate.task_recipes import HarnessTask, chosen_tasks, read_task_recipe

# Without the harness nothing here is tested; `pytest -ra` lists this reason.
pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra `eval`): the harness is not tested")

import lm_eval.tasks
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from megatron_twotower.evaluate import answering, comparison, harness, task_runner
from megatron_twotower.evaluate.answer_scores import SCORE_FUNCTIONS, plan_batches
from megatron_twotower.evaluate.harness import TwoTower
from megatron_twotower.evaluate.harness_settings import (
    AnswerSettings,
    Compared,
    HarnessSettings,
    read_generation_kwargs,
    text_before_stop,
)
from megatron_twotower.hf.modeling_nemotron_h_twotower import GenerationStats

VOCABULARY = 512


@pytest.fixture(scope="module")
def folder(tiny_data, tmp_path_factory):
    path = tmp_path_factory.mktemp("harness") / "model"
    save(path, tiny_model(dtype=torch.float64, vocab_size=VOCABULARY), vocab_size=VOCABULARY)
    for file in (tiny_data / "tokenizer").iterdir():
        shutil.copyfile(file, path / file.name)
    return path


def opened(folder, **settings):
    return TwoTower(folder, **({"block_size": 4, "steps_per_block": 4, "batch_size": 3} | settings))


def asked(kind, *arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


PAIRS = [
    ("def alpha(", "beta):"),
    ("def alpha(", "gamma + count"),
    ("x", " ="),
    ("if value > index: return", " name"),
    ("", "total = 3"),
]


def ids_of(lm, pair):
    return lm._encode_pair(*pair) if pair[0] else ([lm.eot_token_id], lm.tok_encode(pair[1]))


# --- scoring ---


def test_the_harness_finds_the_model_by_its_name(folder):
    assert get_model("twotower") is TwoTower
    text = f"pretrained={folder},mode=ar,scoring=bound,block_size=4,confidence_threshold=0.5"
    lm = get_model("twotower").create_from_arg_string(text, {"batch_size": 2, "device": None})
    found = lm.settings
    assert (found.mode, found.scoring, found.block_size, found.batch_size) == ("ar", "bound", 4, 2)
    assert found.confidence_threshold == 0.5
    by_sampler = get_model("twotower").create_from_arg_string(f"pretrained={folder},sampler=prefix:0.5", {})
    assert by_sampler.settings.sampler == "prefix:0.5"


def test_answers_are_scored_by_the_context_tower(folder):
    lm = opened(folder)
    for pair, (score, greedy) in zip(PAIRS, lm.loglikelihood(asked("loglikelihood", *PAIRS), True), strict=True):
        context, answer = ids_of(lm, pair)
        logits = lm.model(torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
        nats = sum(cross_entropy(row, token) for row, token in zip(logits, answer, strict=True))
        assert score == pytest.approx(-nats)
        assert greedy == all(int(row.argmax()) == token for row, token in zip(logits, answer, strict=True))
    written = lm.model.generate_ar(torch.tensor([lm.tok_encode("def alpha(")]), 3)[0, -3:].tolist()
    assert lm.score([(lm.tok_encode("def alpha("), written)], quiet=True)[0][1] is True


def test_a_context_is_read_once_for_all_its_answers(folder, monkeypatch):
    lm, read = opened(folder), []
    prefill = lm.model.prefill
    monkeypatch.setattr(lm.model, "prefill", lambda ids, mask=None: read.append(len(ids)) or prefill(ids, mask))
    lm.loglikelihood(asked("loglikelihood", *[("def alpha(", word) for word in ("a", "beta)", "gamma", "x y z")]), True)
    assert read == [1]


def test_answers_are_scored_by_the_bound(folder):
    lm = opened(folder, scoring="bound", bound_draws=400)
    for pair, (score, greedy) in zip(PAIRS, lm.loglikelihood(asked("loglikelihood", *PAIRS), True), strict=True):
        assert score == pytest.approx(exact_score(lm.model, *ids_of(lm, pair), 4), rel=0.05)
        assert greedy is False


def test_mock_ar_scores_like_ar_where_the_denoiser_is_the_backbone(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    save(copy, become_backbone(tiny_model(vocab_size=VOCABULARY)), vocab_size=VOCABULARY)
    pairs = [ids_of(opened(copy), pair) for pair in PAIRS]
    ar, mock = (opened(copy, scoring=scoring).score(pairs, quiet=True) for scoring in ("ar", "mock_ar"))
    for (score, greedy), (other, other_greedy) in zip(ar, mock, strict=True):
        assert other == pytest.approx(score)
        assert other_greedy == greedy
    assert opened(folder, scoring="mock_ar").score(pairs, quiet=True) != opened(folder).score(pairs, quiet=True)


@pytest.mark.parametrize("scoring", ["ar", "bound", "mock_ar"])
def test_scores_do_not_depend_on_the_batch(folder, scoring):
    lm = opened(folder, scoring=scoring, bound_draws=2)
    pairs = [ids_of(lm, pair) for pair in PAIRS]
    together, alone = lm.score(pairs, quiet=True), [lm.score([pair], quiet=True)[0] for pair in pairs]
    assert [score for score, _ in together] == pytest.approx([score for score, _ in alone])


@pytest.mark.parametrize("scoring", ["ar", "bound", "mock_ar"])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_batches_that_are_scored_apart_are_those_of_the_whole(folder, scoring, batch_size):
    """Bit for bit: other processes may score them."""
    lm = opened(folder, scoring=scoring, bound_draws=2, batch_size=batch_size)
    pairs = [ids_of(lm, pair) for pair in [*PAIRS, *PAIRS[:2], ("x", " ="), ("def", "")]]
    whole = [(0.0, True)] * len(pairs)
    for numbers, scores in SCORE_FUNCTIONS[scoring](lm.model, pairs, lm.settings, lm.mask_id):
        for number, score in zip(numbers, scores, strict=True):
            whole[number] = score
    assert lm.score(pairs, quiet=True) == whole
    assert sorted(number for batch in plan_batches(scoring, pairs, batch_size) for number in batch) == [
        number for number, (_, answer) in enumerate(pairs) if answer or scoring == "ar"
    ]


def test_rolling_scores_cover_whole_texts(folder):
    texts = ["def alpha(beta): return gamma", "x", ""]
    lm = opened(folder)
    expected = []
    for text in texts:
        ids = [lm.eot_token_id, *lm.tok_encode(text)]
        logits = lm.model(torch.tensor([ids])).logits[0]
        expected.append(-sum(cross_entropy(logits[i], token) for i, token in enumerate(ids[1:])))
    rolling = asked("loglikelihood_rolling", *[(text,) for text in texts])
    assert lm.loglikelihood_rolling(rolling, True) == pytest.approx(expected)
    # In windows of four: each token is scored once, after the text before it that fits.
    short, ids = opened(folder, max_length=4), lm.tok_encode(texts[0])
    total, text = 0.0, [lm.eot_token_id, *ids]
    for start in range(0, len(ids), 4):
        predicted = ids[start : start + 4]
        end = start + len(predicted)
        context = text[max(0, end - 4) : start + 1]
        total += lm.score([(context, predicted)], quiet=True)[0][0]
    assert short.loglikelihood_rolling(rolling[:1], True) == pytest.approx([total])


def test_a_long_context_loses_its_beginning(folder):
    lm, short = opened(folder), opened(folder, max_length=6)
    context, answer = list(range(10, 30)), [7, 8]
    assert short.score([(context, answer)], quiet=True) == lm.score([(context[-5:], answer)], quiet=True)
    with pytest.raises(UserError, match="an answer of 7 tokens: expected at most max_length, 6"):
        short.score([(context, list(range(7)))], quiet=True)


# --- writing ---

PROMPTS = ["def alpha(", "x", "if value > index: return name", "count = total +"]


@pytest.mark.parametrize("mode", ["mask_diffusion", "mock_ar", "ar", "speculative"])
def test_every_mode_generates_in_a_batch_the_text_of_each_prompt_alone(folder, mode):
    lm = opened(folder, mode=mode)
    kwargs = {"until": [], "max_gen_toks": 70, "do_sample": False}
    texts = lm.generate_until(asked("generate_until", *[(prompt, kwargs) for prompt in PROMPTS]), True)
    for prompt, text in zip(PROMPTS, texts, strict=True):
        ids, eos = torch.tensor([lm.tok_encode(prompt)]), lm.eot_token_id
        if mode == "mask_diffusion":
            whole = lm.model.generate_mask_diffusion(
                ids, 70, 4, 4, lm.mask_id, confidence_threshold=0.8, eos_token_id=eos
            )
        else:  # speculative text is that of AR
            one_by_one = lm.model.generate_mock_ar if mode == "mock_ar" else lm.model.generate_ar
            whole = one_by_one(ids, 70, eos_token_id=eos)
        new = whole[0, ids.shape[1] :].tolist()
        assert text == lm.tokenizer.decode(new[: new.index(eos)] if eos in new else new, skip_special_tokens=True)
    assert lm.passes > 0 and lm.new_tokens >= 4 * 70 // 2


def test_every_eos_of_the_folder_ends_an_answer_and_its_block_size_is_used(folder, tmp_path):
    lm = opened(folder, mode="ar")
    ids = torch.tensor([lm.tok_encode(PROMPTS[0])])
    new = lm.model.generate_ar(ids, 70, eos_token_id=())[0, ids.shape[1] :].tolist()
    eos = next(token for token in new[5:] if token != 2)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, eos], "block_size": 8}))
    lm = TwoTower(copy, mode="ar", device="cpu")
    assert (lm.eos_ids, lm.settings.block_size) == ((2, eos), 8)
    text = lm.generate_until(asked("generate_until", (PROMPTS[0], {"max_gen_toks": 70})), True)[0]
    end = min(new.index(token) for token in lm.eos_ids if token in new)
    assert text == lm.tokenizer.decode(new[:end], skip_special_tokens=True)


def test_text_ends_before_the_first_stop_string(folder):
    lm = opened(folder, mode="ar")
    whole = lm.generate_until(asked("generate_until", (PROMPTS[0], {"max_gen_toks": 200})), True)[0]
    stop = whole[30:34]
    kwargs = {"until": ["never there", stop], "max_gen_toks": 200}
    lm.new_tokens = 0
    texts = lm.generate_until(asked("generate_until", (PROMPTS[0], kwargs), (PROMPTS[1], {"max_gen_toks": 9})), True)
    assert texts[0] == whole[: whole.index(stop)]
    assert text_before_stop("abcd", ["d", "b"]) == "a" and text_before_stop("abcd", ["x", ""]) is None


@pytest.mark.parametrize("mode", ["mask_diffusion", "mock_ar", "ar", "speculative"])
def test_an_answer_reads_its_prompt_once_and_is_not_written_beyond_its_end(folder, mode, monkeypatch):
    lm = opened(folder, mode=mode, batch_size=2)
    prompts = [lm.tok_encode(prompt) for prompt in PROMPTS[:2]]
    wholes = lm.write(prompts, AnswerSettings(max_new_tokens=150))
    stop = next(text for text in wholes[0][8:] if text not in wholes[0][:8] and not text.isspace())
    read, prefill = [], lm.model.prefill
    monkeypatch.setattr(lm.model, "prefill", lambda ids, *rest, **own: read.append(1) or prefill(ids, *rest, **own))
    lm.new_tokens = 0
    expected = [text.partition(stop)[0] for text in wholes]
    assert lm.write(prompts, AnswerSettings((stop,), 150)) == expected and len(read) == 1
    # What ends an answer is written, and at most the rest of a block.
    least = [len(lm.tok_encode(text)) for text in expected]
    assert lm.new_tokens <= sum(least) + 2 * (lm.block_size + 1)


def test_generation_kwargs_of_a_task_are_read():
    assert read_generation_kwargs({"until": "\n", "do_sample": False, "temperature": 0.7}) == AnswerSettings(("\n",))
    assert read_generation_kwargs({"until": ["a", "b"], "max_gen_toks": 5, "temperature": 0.0}) == AnswerSettings(
        ("a", "b"), 5
    )
    assert read_generation_kwargs({"do_sample": True, "temperature": 0.7, "top_p": 0.9}) == AnswerSettings(
        (), None, 0.7, None, 0.9
    )
    with pytest.raises(UserError, match="found num_beams"):
        read_generation_kwargs({"num_beams": 4})


def test_sampled_text_follows_the_seed(folder):
    kwargs = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12}
    request = asked("generate_until", (PROMPTS[0], kwargs))
    texts = [opened(folder, mode="ar", seed=seed).generate_until(request, True)[0] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_mistakes_are_named(folder):
    for settings, message in (
        ({"mode": "beam"}, "mode: found 'beam', expected one of mask_diffusion"),
        ({"scoring": "x"}, "scoring: found 'x', expected one of ar, bound, mock_ar"),
        ({"batch_size": "auto"}, "batch_size: found auto"),
        ({"bound_draws": 0}, "bound_draws: found 0"),
    ):
        with pytest.raises(UserError, match=message):
            opened(folder, **settings)
    with pytest.raises(UserError, match="no chat template"):
        opened(folder).apply_chat_template([{"role": "user", "content": "x"}])


# --- chats ---

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ message.role }}] {{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
BOS, EOS = 1, 2


@pytest.fixture
def chat_folder(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "chat")
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    return copy


def test_special_tokens_of_a_rendered_template_become_their_ids(chat_folder):
    lm = opened(chat_folder)
    assert min(lm.tok_encode("<s>alpha</s>")) > 3  # before the first chat it is text
    text = lm.apply_chat_template([{"role": "user", "content": "alpha <mask>"}])
    assert text == "<s>[user] alpha <mask></s>\n[assistant] "
    ids = lm.tok_encode(text)
    assert ids[0] == BOS and ids.count(EOS) == 1 and lm.mask_id not in ids
    assert lm.tokenizer.decode(ids) == text
    context, answer = lm._encode_pair(text, "beta")
    assert context[0] == BOS and lm.tokenizer.decode(context + answer) == text + "beta"
    texts = asked("loglikelihood_rolling", ("<s>alpha",))
    assert lm.loglikelihood_rolling(texts, True) == opened(chat_folder).loglikelihood_rolling(texts, True)


def test_requests_from_the_cache_of_the_harness_are_chats_too(chat_folder):
    """They were rendered by another process; the harness asks for this name only for chats."""
    lm = opened(chat_folder)
    assert lm.tokenizer_name.endswith("chat")
    assert lm.tok_encode("<s>") == [BOS]


def test_a_prefilled_turn_stays_open(chat_folder):
    lm, turns = opened(chat_folder), [{"role": "user", "content": "x"}]
    closed = lm.apply_chat_template(turns, add_generation_prompt=False)
    assert closed == "<s>[user] x</s>\n"
    turns.append({"role": "assistant", "content": "count ="})
    assert lm.apply_chat_template(turns, add_generation_prompt=False) == f"{closed}[assistant] count ="


def test_a_conversation_that_the_template_refuses_is_one_line(chat_folder):
    with pytest.raises(UserError, match=r"chat template: cannot be applied to turns of user, tool \(no tools\)"):
        opened(chat_folder).apply_chat_template([{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}])


def test_a_stop_string_with_a_special_token_ends_an_answer(folder, monkeypatch):
    lm = opened(folder)
    words = lm.tok_encode("alpha beta🙂\n")  # one character of four tokens
    later = lm.tok_encode("gamma\ndelta")
    written = [*words, BOS, *later, BOS, *words]
    ended = []

    def generate(model, ids, *, callbacks, **_):
        new = torch.tensor([written + [7] * (64 - len(written))])
        for count in range(1, 65) if callbacks.stop else ():
            ended.append(bool(callbacks.stop(new, torch.tensor([count]))))
        return torch.cat([ids, new], dim=1), GenerationStats(64, 64, 64, 1.0)

    monkeypatch.setattr(harness, "generate_ids", generate)
    for until, expected in (
        (["<s>"], "alpha beta🙂\n"),
        (["\n<s>"], "alpha beta🙂"),
        (["ta🙂\n<s>", "x"], "alpha be"),
        (["<s>gamma\nd"], "alpha beta🙂\n"),
        (["delta<s>"], "alpha beta🙂\ngamma\n"),
        (["delta<s>", "gamma"], "alpha beta🙂\n"),
        (["\ngam"], "alpha beta🙂"),  # special tokens are no part of the text
        (["a<s>"], "alpha beta🙂\ngamma\ndelt"),
    ):
        ended.clear()
        (request,) = asked("generate_until", ("x", {"until": until, "max_gen_toks": 200}))
        assert lm.generate_until([request], True) == [expected], until
        # It ends with the last token of the string.
        end = ended.index(True)
        assert all(ended[end:]) and lm._text_before_stop(written[: end + 1], until) == expected
        assert lm._text_before_stop(written[:end], until) is None
    (request,) = asked("generate_until", ("x", {"until": ["<s></s>"], "max_gen_toks": 64}))
    assert lm.generate_until([request], True)[0].startswith("alpha beta🙂\ngamma\ndeltaalpha beta🙂\n")


# --- tasks ---

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """
task: tiny_write
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def task_files(folder, tmp_path, monkeypatch):
    """Task files and their data: four questions, of which the context tower answers three right."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lm, choices, lines = opened(folder, mode="ar"), [" alpha", " beta", " gamma"], []
    for number, prompt in enumerate(PROMPTS):
        scores = lm.loglikelihood(asked("loglikelihood", *[(prompt, choice) for choice in choices]), True)
        best = max(range(3), key=lambda i: scores[i][0])
        text = lm.generate_until(asked("generate_until", (prompt, {"until": "\n\n", "max_gen_toks": 12})), True)[0]
        right = number < 3
        lines.append(
            {
                "question": prompt,
                "choices": [choice.strip() for choice in choices],
                "answer": best if right else (best + 1) % 3,
                "written": text if right else text + "x",
            }
        )
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (tasks / f"{name}.yaml").write_text(text.replace("FILE", str(data)))
    return tasks


def test_the_command_runs_local_tasks_from_end_to_end(folder, task_files, tmp_path, capsys):
    output = tmp_path / "new" / "tasks.json"
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "tasks:\n- {name: Choice, tasks: tiny_choice, shots: 0, metric: 'acc,none', card: {ar: 50.0}, note: ours}\n"
    )
    arguments = [
        "--model",
        str(folder),
        "--task-files",
        str(task_files),
        "--output",
        str(output),
        "--mode",
        "ar",
        "--batch-size",
        "3",
        "--block-size",
        "4",
        "--steps-per-block",
        "4",
    ]
    assert main.main(["evaluate", *arguments, "--tasks", str(recipe), "tiny_write"]) == 0
    found = json.loads(output.read_text())
    choice, write = found["tasks"]
    assert (choice["name"], choice["value"], choice["documents"], choice["metric"]) == ("Choice", 0.75, 4, "acc,none")
    assert (write["name"], write["value"], write["documents"]) == ("tiny_write", 0.75, 4)
    assert choice["stderr"] == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert (choice["card"], choice["note"], choice["tokens_per_pass"]) == ({"ar": 50.0}, "ours", None)
    assert write["tokens_per_pass"] == 1.0 and write["tokens_per_second"] > 0
    assert found["settings"]["mode"] == "ar" and found["lm_eval"] and len(found["weights_sample_sha256"]) == 64
    assert found["machine"]["commit"]
    printed = capsys.readouterr().out
    assert "75.00 ± 25.00" in printed and "tiny_write" in printed and "card, AR" in printed
    assert "writing by ar, scoring by ar" in printed


def test_shots_and_limit_and_every_scoring_reach_the_harness(folder, task_files):
    for scoring, shots in (("ar", 2), ("bound", 0), ("mock_ar", 0)):
        settings = HarnessSettings(scoring=scoring, bound_draws=2, block_size=4, steps_per_block=4)
        tasks = [HarnessTask("choice", ("tiny_choice",), shots)]
        manager = task_runner.task_manager(tasks, task_files)
        found = task_runner.run_tasks(folder, tasks, manager, settings=settings, limit=2)
        assert found["tasks"][0]["documents"] == 2
        assert found["tasks"][0]["metric"] == "acc,none"
        assert found["limit"] == 2


TIMES = ("seconds", "tokens_per_second", "speedup")


def without_times(found):
    """Results but for times, at any depth."""
    if isinstance(found, dict):
        return {key: without_times(value) for key, value in found.items() if key not in TIMES}
    return [without_times(each) for each in found] if isinstance(found, list) else found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ray")
def test_tasks_on_a_ray_have_the_figures_of_one_process(folder, task_files, monkeypatch):
    set_up_own_ray(monkeypatch)
    tasks = [HarnessTask(name, (f"tiny_{name}",), 0) for name in ("choice", "write")]
    settings = HarnessSettings(block_size=4, steps_per_block=4, batch_size=1)
    manager, on_ray = task_runner.task_manager(tasks, task_files), {"engine": EngineSettings("ray", workers=2)}
    for run, own in (
        (task_runner.run_tasks, {}),
        (comparison.compare_tasks, {"compare": Compared((0.5, 0.01), (8,), drafts=(3,))}),
    ):
        here = run(folder, tasks, manager, settings=settings, **own)
        there = run(folder, tasks, manager, settings=settings, **own, **on_ray)
        assert without_times(there) == without_times(here)
        assert json.dumps(here).count('"new_tokens"') > 0


def test_an_interrupted_comparison_asks_only_what_is_missing(folder, task_files, tmp_path, monkeypatch):
    tasks = [HarnessTask(name, (f"tiny_{name}",), 0) for name in ("choice", "write")]
    settings = HarnessSettings(block_size=4, steps_per_block=4, batch_size=1, bound_draws=1)
    arguments = {"settings": settings, "compare": Compared(thresholds=(0.5,))}
    manager = task_runner.task_manager(tasks, task_files)
    whole = comparison.compare_tasks(folder, tasks, manager, **arguments)
    asked_for, answer = [], answering.answer

    def failing(asked):
        if len(asked_for) == 4:
            raise KeyboardInterrupt
        asked_for.append(asked)
        return answer(asked)

    monkeypatch.setattr(answering, "answer", failing)
    with pytest.raises(KeyboardInterrupt):
        comparison.compare_tasks(folder, tasks, manager, **arguments, journal=tmp_path / "journal")
    monkeypatch.setattr(answering, "answer", lambda asked: asked_for.append(asked) or answer(asked))
    again = comparison.compare_tasks(folder, tasks, manager, **arguments, journal=tmp_path / "journal")
    assert len(asked_for) == len(set(map(str, asked_for))) > 4
    assert without_times(again) == without_times(whole)


def test_answers_are_kept_and_not_asked_again(folder, task_files, tmp_path, monkeypatch):
    tasks = [HarnessTask(name, (f"tiny_{name}",), 0) for name in ("choice", "write")]
    settings = HarnessSettings(mode="ar", block_size=4, steps_per_block=4, batch_size=1)
    manager, arguments = task_runner.task_manager(tasks, task_files), {"settings": settings}
    whole = task_runner.run_tasks(folder, tasks, manager, **arguments)
    journal, asked_for, answer = tmp_path / "journal", [], answering.answer

    def failing(asked):
        if len(asked_for) == 6:
            raise KeyboardInterrupt
        asked_for.append(asked.task)
        return answer(asked)

    monkeypatch.setattr(answering, "answer", failing)
    with pytest.raises(KeyboardInterrupt):
        task_runner.run_tasks(folder, tasks, manager, **arguments, journal=journal)
    monkeypatch.setattr(answering, "answer", lambda asked: asked_for.append(asked.task) or answer(asked))
    again = task_runner.run_tasks(folder, tasks, manager, **arguments, journal=journal)
    assert len(asked_for) == 8 and len({str(task) for task in asked_for}) == 8
    assert without_times(again) == without_times(whole)
    with pytest.raises(UserError, match="found an interrupted run with batch_size 1, expected 2"):
        task_runner.run_tasks(
            folder, tasks, manager, **arguments | {"settings": replace(settings, batch_size=2)}, journal=journal
        )


def test_the_harness_makes_chats_with_begun_turns(chat_folder, task_files, monkeypatch):
    from lm_eval import simple_evaluate

    task = task_files / "begun.yaml"
    task.write_text((task_files / "write.yaml").read_text().replace("tiny_write", "begun") + 'gen_prefix: "count ="\n')
    lm, prompts = opened(chat_folder, mode="ar"), []
    write = lm.write
    monkeypatch.setattr(lm, "write", lambda rows, *rest: prompts.extend(rows) or write(rows, *rest))
    manager = task_runner.task_manager([HarnessTask("begun", ("begun",), 0)], task_files)
    found = simple_evaluate(
        lm, tasks=["begun"], task_manager=manager, apply_chat_template=True, log_samples=False, bootstrap_iters=0
    )
    assert found["n-samples"]["begun"]["effective"] == 4
    expected = sorted(f"<s>[user] {prompt}</s>\n[assistant] count =" for prompt in PROMPTS)
    assert sorted(lm.tokenizer.decode(ids) for ids in prompts) == expected
    assert all(ids[0] == BOS and ids.count(EOS) == 1 for ids in prompts)


def test_tasks_are_asked_as_turns_if_wanted(chat_folder, task_files, monkeypatch):
    prompts, write = [], TwoTower.write

    def recording(self, rows, *rest):
        prompts.extend(self.tokenizer.decode(row) for row in rows)
        return write(self, rows, *rest)

    monkeypatch.setattr(TwoTower, "write", recording)
    settings, task = HarnessSettings(mode="ar"), [HarnessTask("write", ("tiny_write",), 0)]
    manager = task_runner.task_manager(task, task_files)
    for wanted in (True, False):
        prompts.clear()
        found = task_runner.run_tasks(chat_folder, task, manager, settings=settings, apply_chat_template=wanted)
        assert found["apply_chat_template"] is wanted
        assert len(prompts) == 4 and all(prompt.startswith("<s>[user]") is wanted for prompt in prompts)


def test_mistakes_in_tasks_are_one_line(folder, task_files, tmp_path, capsys, monkeypatch):
    # Without the harness's own tasks, which are thousands of files.
    own_files = functools.partial(task_runner.TaskManager, include_defaults=False)
    monkeypatch.setattr(task_runner, "TaskManager", lambda include_path, **_: own_files(include_path=include_path))
    output = tmp_path / "tasks.json"
    arguments = ["evaluate", "--model", str(folder), "--task-files", str(task_files), "--output", str(output)]
    bad = tmp_path / "bad.yaml"
    bad.write_text("tasks:\n- {name: Choice, tasks: tiny_choice, metric: 'f1,none'}\n")
    (task_files / "lost.yaml").write_text(CHOICE.replace("tiny_choice", "lost").replace("FILE", "/no/such.jsonl"))
    for tasks, message in (
        (["nothing"], "task 'nothing': not found"),
        ([str(bad)], "metric 'f1,none': not found, expected one of acc,none"),
        (["lost"], "task lost: cannot be run"),
    ):
        assert main.main([*arguments, "--tasks", *tasks]) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("twotower: ")]
        assert len(errors) == 1 and message in errors[0]
    assert not output.exists()


# --- the recipe of the card ---

CARD = recipes_folder() / "evaluation" / "card.yaml"


@pytest.mark.slow  # the harness reads thousands of files
def test_the_harness_has_the_tasks_of_the_card():
    tasks = read_task_recipe(CARD)
    assert {name for task in tasks for name in task.tasks} <= set(task_runner.task_manager(tasks).all_tasks)


def test_the_recipe_has_the_eleven_tasks_of_the_card():
    tasks = read_task_recipe(CARD)
    names = [
        "MMLU",
        "MMLU-Pro",
        "ARC-C",
        "WinoGrande",
        "RACE",
        "HumanEval",
        "MBPP-sanitized",
        "GSM8K",
        "MATH-500",
        "MMLU-Global-Lite",
        "MGSM",
    ]
    assert [task.name for task in tasks] == names
    assert all(set(task.card) == {"ar", "mask_diffusion"} and task.shots is not None for task in tasks)
    assert (tasks[0].card["mask_diffusion"], tasks[-1].card["ar"]) == (78.24, 80.80)
    # The card's summary: 98.7 % of the AR model's quality.
    ar, two = (sum(task.card[key] for task in tasks) for key in ("ar", "mask_diffusion"))
    assert two / ar == pytest.approx(0.987, abs=0.003)


@pytest.fixture
def local(tmp_path, monkeypatch):
    """A data set of one document as a `test` split."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(document):
        (tmp_path / "data.jsonl").write_text(json.dumps(document) + "\n")
        files = {"test": str(tmp_path / "data.jsonl")}
        return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}

    return write


def test_math_500_shows_its_examples_and_reads_boxed_answers(local):
    recipe = {task.name: task for task in read_task_recipe(CARD)}["MATH-500"]
    manager = task_runner.task_manager([recipe], Path(lm_eval.tasks.__file__).parent / "hendrycks_math")
    document = {"problem": "What is $1/2 + 1/4$?", "solution": "It is $\\boxed{\\frac{3}{4}}$.", "answer": "3/4"}
    here = replace(recipe, overrides={**recipe.overrides, **local(document)})
    (task,) = task_runner.load_tasks(here, manager)
    task.set_config(key="num_fewshot", value=recipe.shots)
    context = task.fewshot_context(task.test_docs()[0], num_fewshot=recipe.shots)
    assert context.count("Problem:") == 5 and context.count("\\boxed{") == 4
    assert context.endswith("Problem: What is $1/2 + 1/4$?\nAnswer:")
    assert "is_fewshot" not in context and "$x$" in context
    for text, right in ((" It is $\\boxed{\\frac{3}{4}}$.", 1), (" so $2$. $\\boxed{\\frac{3}{5}}$", 0), (" 3/4", 0)):
        instance = Instance("generate_until", task.test_docs()[0], (context, {}), 0)
        instance.resps.append(text)
        task._instances = [instance]
        task.apply_filters()
        found = task.process_results(task.test_docs()[0], [instance.filtered_resps["boxed"]])
        assert found["exact_match"] == right, text


def test_recipes_tasks_and_files_are_distinguished_by_name(tmp_path):
    assert [task.name for task in chosen_tasks(["card"])][:2] == ["MMLU", "MMLU-Pro"]
    assert chosen_tasks(["gsm8k", "card"], shots=1)[0] == HarnessTask("gsm8k", ("gsm8k",), 1)
    assert {task.shots for task in chosen_tasks(["card"], shots=1)} == {1}
    for text, message in (
        ("[]", "expected a list `tasks`"),
        ("tasks: [{name: a}]", r"tasks\[0\]: expected the keys name and tasks"),
        ("tasks: [{name: a, tasks: b, shot: 5}]", "shot: unknown key"),
        ("tasks: [", "cannot be read"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            read_task_recipe(tmp_path / "bad.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        chosen_tasks([str(tmp_path / "missing.yaml")])
