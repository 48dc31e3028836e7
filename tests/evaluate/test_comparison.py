"""AR against mask diffusion on tasks: each setting as if it were alone, in one run."""

import json
from dataclasses import replace
from statistics import covariance, fmean, variance

import pytest

from megatron_twotower.cli import main
from megatron_twotower.common.engines import ONE_PROCESS
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import recipes_folder
from megatron_twotower.evaluate import code_documents
from megatron_twotower.evaluate.task_recipes import (
    TaskSetup,
    chosen_setup,
    chosen_tasks,
    read_task_recipe,
    read_task_setup,
)

# Without the harness nothing here is tested; `pytest -ra` lists this reason.
pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra `eval`): the harness is not tested")

from megatron_twotower.evaluate import comparison, task_runner
from megatron_twotower.evaluate.harness import TwoTower, WriteTask
from megatron_twotower.evaluate.harness_settings import AnswerSettings, HarnessSettings
from megatron_twotower.evaluate.speed_quality import SweepPoint
from megatron_twotower.hf.modeling_nemotron_h_twotower import NemotronHTwoTowerForCausalLM as TwoTowerModel

RECIPE = recipes_folder() / "evaluation" / "code_small.yaml"
SETTINGS = HarnessSettings(block_size=4, batch_size=2, bound_draws=1, confidence_threshold=0.01)
POINTS = [SweepPoint(0.01, 4), SweepPoint(1.0, 4), SweepPoint(0.01, 8), SweepPoint(None, 4, None, "factor:9")]


def test_what_is_retained_and_its_error():
    ar, other = [[1.0, 0.0, 1.0, 1.0]], [[1.0, 0.0, 0.0, 1.0]]
    ratio, error = comparison.retained(ar, other)
    (a,), (b,) = ar, other
    assert ratio == pytest.approx(2 / 3)
    spread = variance(b) - 2 * ratio * covariance(a, b) + ratio**2 * variance(a)
    assert error == pytest.approx((spread / 4) ** 0.5 / fmean(a))
    # Of several tasks the means are compared, whatever the numbers of documents.
    ratio, error = comparison.retained([[1.0, 1.0], [0.0, 0.5, 0.1]], [[1.0, 0.0], [0.0, 0.5, 0.1]])
    assert ratio == pytest.approx((0.5 + 0.2) / (1.0 + 0.2)) and error > 0
    assert comparison.retained(ar, ar) == (1.0, 0.0), "answers that are the same have no error"
    assert comparison.retained([[0.0, 0.0]], [[1.0, 0.0]]) == (None, None)
    assert comparison.retained([[1.0]], [[0.5]]) == (0.5, None)


def test_settings_of_a_comparison():
    ar, *diffusion = comparison.compared_settings(SETTINGS, POINTS[:3])
    assert (ar.mode, ar.scoring) == ("ar", "ar")
    assert [(each.mode, each.scoring) for each in diffusion] == [("mask_diffusion", "bound")] * 3
    assert [(e.confidence_threshold, e.block_size, e.steps_per_block) for e in diffusion] == [
        (0.01, 4, 4),
        (1.0, 4, 4),
        (0.01, 8, 8),
    ]
    by_sampler = comparison.compared_settings(SETTINGS, [SweepPoint(None, 4, None, "factor:9")])[1]
    assert (by_sampler.sampler, by_sampler.confidence_threshold) == ("factor:9", HarnessSettings.confidence_threshold)
    _, _, *drafts = comparison.compared_settings(SETTINGS, POINTS[:1], [2, 6])
    assert [(e.mode, e.scoring, e.block_size) for e in drafts] == [("speculative", "ar", 2), ("speculative", "ar", 6)]


@pytest.fixture
def model(two_tower_folder):
    kind = comparison.ComparedTwoTower
    with task_runner.opened(kind, two_tower_folder, SETTINGS, engine=ONE_PROCESS, journal=None) as found:
        yield found


def written_by(model, prompts, answer):
    (reply,) = model._replies([WriteTask(prompts, answer)])
    return reply.values


def test_every_setting_answers_as_if_it_were_alone(model, two_tower_folder):
    compared = comparison.compared_settings(model.settings, POINTS, [3])
    model.begin(compared)
    prompts = [model.tok_encode(text) for text in ("def alpha(", "if value > index:")]
    answer, pairs = AnswerSettings((), 12), [(prompts[0], prompts[1])]
    passes, texts = [], []
    for each in compared:
        model.use(each)
        found, scores = written_by(model, prompts, answer), model.score(pairs, quiet=True)
        assert model.settings == each
        alone = task_runner.open_model(TwoTower, two_tower_folder, each)
        assert found == alone.write(prompts, answer)
        assert scores == alone.score(pairs, quiet=True)
        written = model.written[each]
        assert (written.passes, written.new_tokens) == (alone.passes, alone.new_tokens) and written.seconds > 0
        passes.append(written.passes)
        texts.append(found)
    assert passes[1] < passes[2], "a low threshold commits more at once"
    assert texts[-1] == texts[0] and passes[-1] <= passes[0], "what the context tower verifies is the text of AR"
    written = [replace(model.written[each]) for each in compared]
    assert written_by(model, prompts, answer) == found and written == [model.written[each] for each in compared]
    model.forget()
    written_by(model, prompts, answer)
    assert model.written[compared[0]].new_tokens == 2 * written[0].new_tokens


def test_prompts_are_read_once_for_all_settings(model, monkeypatch):
    compared = comparison.compared_settings(model.settings, POINTS)
    model.begin(compared)
    model.use(compared[0])
    read, prefill = [], TwoTowerModel.prefill
    monkeypatch.setattr(
        TwoTowerModel,
        "prefill",
        lambda self, ids, *rest, **own: read.append(len(ids)) or prefill(self, ids, *rest, **own),
    )
    written_by(model, [model.tok_encode(text) for text in ("def alpha(", "if value > index:")], AnswerSettings((), 9))
    assert read == [2] and all(model.written[each].new_tokens == 18 for each in compared)


# --- the recipe ---


def test_the_recipe_asks_every_kind_of_question():
    setup = read_task_setup(RECIPE)
    assert setup.questions and setup.compare.thresholds == (0.9, 0.8, 0.7, 0.6, 0.5)
    assert setup.compare.block_sizes == (8, 16, 32) and setup.compare.drafts == (4, 8)
    tasks = read_task_recipe(RECIPE)
    manager = task_runner.task_manager(tasks, setup.task_files)
    asked = {name for task in tasks for name in task.tasks}
    assert asked == set(manager.all_tasks) == {f"code_{kind}" for kind in code_documents.KINDS}


def test_a_recipe_with_settings_is_alone(tmp_path):
    assert chosen_setup(["card", "gsm8k"]) == TaskSetup()
    assert chosen_setup(["code_small"]).settings == {"batch_size": 1, "bound_draws": 4}
    assert chosen_tasks(["code_small"])[0].name == "next line"
    with pytest.raises(UserError, match="--tasks: found code_small with others, expected it alone"):
        chosen_setup(["gsm8k", "code_small"])
    for text, message in (
        ("tasks: [{name: a, tasks: b}]\ncomparison: {}", "comparison: unknown key, expected of tasks"),
        ("tasks: [{name: a, tasks: b}]\ncompare: {threshold: [1]}", "compare: found threshold, expected of thresholds"),
        ("tasks: [{name: a, tasks: b}]\ncompare: {drafts: [1]}", "drafts: found 1, expected at least 2"),
        ("tasks: [{name: a, tasks: b}]\ncompare: {thresholds: [1.5]}", "thresholds: found 1.5, expected 0 to 1"),
        ("tasks: [{name: a, tasks: b}]\ncompare: {block_sizes: [8.0]}", "block_sizes: found 8.0, expected at least 1"),
        ("tasks: [{name: a, tasks: b}]\ncompare: {samplers: [2]}", "samplers: found 2, expected a name"),
        ("tasks: [{name: a, tasks: b}]\ncompare: {drafts: 4}", "compare.drafts: found 4, expected a list"),
        ("tasks: [{name: a, tasks: b}]\nsettings: [1]", r"settings: found \[1\], expected of mode"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            read_task_setup(tmp_path / "bad.yaml")
    for name, found in (("batch_size", "two"), ("draft_steps", 0), ("block_size", 4.5)):
        with pytest.raises(UserError, match=f"{name}: found {found!r}, expected at least 1"):
            HarnessSettings(**{name: found})


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Two questions of each kind from one package, with short prompts."""
    folder = tmp_path_factory.mktemp("questions")
    with pytest.MonkeyPatch.context() as short:
        short.setattr(code_documents, "TEXT_CHARACTERS", 64)
        short.setattr(code_documents, "LONGEST_PROMPT", 500)
        code_documents.write_documents(folder / "q", packages=["click"], count=2)
    return folder / "q"


@pytest.mark.parametrize(
    ("pair", "threshold"), [("random", 0.01), pytest.param("shipped", 0.5, marks=pytest.mark.slow)]
)
def test_the_command_prints_and_writes_the_comparison(pair, threshold, two_tower_folder, questions, tmp_path, capsys):
    """Of a small random pair, and of the shipped one. Figures of two questions say nothing."""
    folder = two_tower_folder if pair == "random" else recipes_folder() / "models" / "bytes"
    output = tmp_path / "code.json"
    words = ["--model", str(folder), "--tasks", "code_small", "--output", str(output), "--block-size", "16"]
    words += ["--questions", str(questions), "--confidence-threshold", f"{threshold}", "--samplers", "factor:3"]
    words += ["--drafts", "4"]
    assert main.main(["evaluate", *words]) == 0
    found = json.loads(output.read_text())
    ar, diffusion, sampled, drafted = found["settings"]
    assert (drafted["mode"], drafted["block_size"], drafted["draft_steps"]) == ("speculative", 4, 1)
    assert drafted["retained"] in (1.0, None) and drafted["new_tokens"] >= ar["new_tokens"]
    assert (sampled["sampler"], sampled["confidence_threshold"], sampled["block_size"]) == ("factor:3", None, 16)
    assert sampled["retained"] is not None or ar["retained"] is None
    assert (ar["mode"], ar["speedup"], ar["tokens_per_pass"], ar["retained"]) == ("ar", 1.0, 1.0, None)
    assert (diffusion["confidence_threshold"], diffusion["block_size"]) == (threshold, 16)
    assert diffusion["tokens_per_pass"] > 1 and diffusion["passes"] < ar["passes"]
    names = ["next line", "parses", "identifier", "closing", "signature", "nats/byte"]
    assert [task["name"] for task in found["tasks"]] == names
    assert [task["documents"] for task in found["tasks"]] == [2, 2, 2, 4, 2, 2]
    for task in found["tasks"]:
        assert len(task["values"]) == len(task["stderrs"]) == 4
        assert task["values"][3] == task["values"][0], "drafts give the answers of AR"
        assert task["larger_is_better"] is (task["name"] != "nats/byte")
        assert all(0 <= value <= 1 for value in task["values"]) or task["name"] == "nats/byte"
    counted = [task["values"] for task in found["tasks"][:-1]]
    mean_ar, mean_other = (fmean(values[i] for values in counted) for i in (0, 1))
    assert diffusion["retained"] == (pytest.approx(mean_other / mean_ar) if mean_ar else None)
    assert found["questions"] == code_documents.read_index(questions)
    printed = capsys.readouterr().out
    assert (
        f"{threshold:g}, S 16" in printed
        and "factor:3, S 16" in printed
        and "drafts, S 4" in printed
        and "wall-clock against cached AR" in printed
        and "nats/byte (2)" in printed
    )
    # The likelihood of AR is that of the context tower, in an independent computation.
    model = TwoTower(folder, mode="ar")
    rows = [json.loads(line) for line in (questions / "texts.jsonl").read_text().splitlines()]
    nats = [
        -model.score([([model.eot_token_id], model.tok_encode(row["prompt"]))], quiet=True)[0][0]
        / len(row["prompt"].encode())
        for row in rows
    ]
    assert found["tasks"][-1]["values"][0] == pytest.approx(fmean(nats))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "ar"], "--mode: found with a comparison of AR and mask diffusion, which does not use it"),
        (["--sampler", "factor"], "--sampler: found with a comparison of AR and mask diffusion, which does not use it"),
        (["--thresholds", "0.5", "--draft-steps", "2"], "--draft-steps: found with a comparison of AR and mask"),
        (["--drafts", "4", "--draft-steps", "4"], "--drafts: found 4 with --draft-steps 4, expected more than it"),
        (["--drafts", "1"], "--drafts: found 1, expected at least 2"),
        (["--samplers", "none"], "sampler: found 'none', expected one of factor, "),
        (["--task-files", "t"], "--task-files: found with code_small, which has files of its own"),
        (["--questions", "/no/such"], "documents.json: cannot be read"),
    ],
)
def test_what_a_comparison_does_not_use_is_refused(words, message, tmp_path, capsys):
    arguments = ["evaluate", "--model", str(tmp_path), "--tasks", "code_small", "--output", str(tmp_path / "o.json")]
    assert main.main([*arguments, *words]) == 2
    assert message in capsys.readouterr().err


def test_questions_are_refused_by_other_tasks(tmp_path, capsys):
    arguments = ["evaluate", "--model", str(tmp_path), "--tasks", "gsm8k", "--output", str(tmp_path / "o.json")]
    assert main.main([*arguments, "--questions", str(tmp_path)]) == 2
    assert "--questions: found with gsm8k, which asks none" in capsys.readouterr().err
