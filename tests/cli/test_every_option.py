"""Every option of every command reaches what the command calls, or is refused in one line.

The functions that the commands call are replaced by recorders. What they do with their arguments is
tested beside them.
"""

import argparse
import contextlib
import functools
import importlib
from types import SimpleNamespace

import pytest

from megatron_twotower.cli import main
from megatron_twotower.cli.command import Group
from megatron_twotower.data.documents import Inputs, PassedOver

INPUTS = {"data.documents:find_inputs": Inputs([], PassedOver(), []), "data.documents:training_texts": []}
PLAN = ["recipe=nano_30b_a3b_phase1", "parallel=h100x64"]
MODEL, DATA = ["--model", "m"], ["--data", "d"]
MEASURED = SimpleNamespace(utilisation=0.5)
PLANS = {"plan.show:run": None, "plan.scale_out:run": None, "plan.scale_out:measured": MEASURED}
TRAIN = {"train.run:run_training": True, "train.run:dry_run": "", "train.multirun:run": None}
# Command lines, and the functions that receive their options: "module:function", with what they
# return. A command whose options depend on each other has several.
CALLS = {
    "plan": (PLAN, PLANS),
    "plan --search": (PLAN, PLANS),
    "plan --scaling 8": (PLAN, PLANS),
    "plan --measured gpu.json": (PLAN, PLANS),
    "data tokenizer": (["--input", "a", "--output", "o"], INPUTS | {"data.tokenizer:train_tokenizer": 0}),
    "data prepare": (["--input", "a", "--tokenizer", "t", "--output", "o"], {"data.prepare:prepare": {}}),
    "data prepare --engine ray": (["--input", "a", "--tokenizer", "t", "--output", "o"], {"data.prepare:prepare": {}}),
    "data prepare --output s3://b/d": (["--input", "a", "--tokenizer", "t"], {"data.prepare:prepare": {}}),
    "data prepare --chat": (["--input", "a", "--tokenizer", "t", "--output", "o"], {"data.prepare:prepare": {}}),
    "data conversations": (["--output", "o"], {"data.library_conversations:write_library_conversations": 3}),
    "data inspect": (["d"], {"data.inspect:inspect": None}),
    "data verify": (["d"], {"data.verify:verify": []}),
    "data questions": (["--output", "o"], {"evaluate.code_documents:write_documents": {}}),
    "convert import": (
        ["--from", "a", "--to", "b"],
        {"convert.import_run:import_folder": SimpleNamespace(objective="ar")},
    ),
    "convert export": (["--from", "a", "--to", "b"], {"convert.export:export": "two_tower"}),
    "convert quantize": (
        ["--from", "a", "--to", "b", "--quantize", "int8"],
        {"generate.quantized_folder:quantize_folder": (2, 1)},
    ),
    "generate --prompt a --quantize int8": (MODEL, {"generate.terminal:run": 0}),
    "generate --prompt a": (MODEL, {"generate.terminal:run": 0}),
    "generate --prompt a --temperature 1": (MODEL, {"generate.terminal:run": 0}),
    "generate --prompts a": ([*MODEL, "--output", "o"], {"generate.prompt_file:run": 0}),
    "generate --prompts a --engine ray": ([*MODEL, "--output", "o"], {"generate.prompt_file:run": 0}),
    "generate --chat": (MODEL, {"generate.terminal:chat": 0}),
    "evaluate --data d": (
        [*MODEL, "--output", "o"],
        {"evaluate.held_out:run": None, "evaluate.answers:has_conversations": False},
    ),
    "evaluate --tasks t": ([*MODEL, "--output", "o"], {"evaluate.tasks:run": None}),
    "evaluate --tasks t --engine ray": ([*MODEL, "--output", "o"], {"evaluate.tasks:run": None}),
    "distil --engine ray": ([*MODEL, *DATA, "--output", "o"], {"generate.distil:run": None}),
    "distil": ([*MODEL, *DATA, "--output", "o"], {"generate.distil:run": None}),
    "study": (["study.yaml"], {"study.command:run": None}),
    "study --show": (["study.yaml"], {"study.command:run": None}),
    "report": (["--run", "a"], {"report.page:write_report": "page"}),
    "train": (
        ["recipe=tiny_ar"],
        {"train.run:run_training": True, "train.run:dry_run": "", "train.multirun:run": None},
    ),
    "doctor": ([], {"doctor:print_doctor": None}),
    "bench data": ([], {"bench.data:run": None}),
    "bench prepare": ([], {"bench.prepare:run": None}),
    "bench convert": ([], {"bench.convert:run": None}),
    "bench passes": (MODEL, {"bench.passes:run": None}),
    "bench pooling": ([*MODEL, *DATA], {"bench.pooling:run": None}),
    "bench soak": ([], {"bench.soak:run": True}),
    "bench ops": ([], {"bench.ops:run": None}),
    "bench ops --quick": ([], {"bench.ops:run": None}),
    "bench step": ([], {"bench.step:run": None}),
    "bench step --quick": ([], {"bench.step:run": None}),
    "bench context": ([], {"bench.context:run": None}),
    "bench context --quick": ([], {"bench.context:run": None}),
    "bench prefill": (MODEL, {"bench.prefill:run": None}),
    "bench prefill --quick": (MODEL, {"bench.prefill:run": None}),
    "bench gpu": ([], {"bench.gpu.command:run": True}),
    "bench gpu --quick": ([], {"bench.gpu.command:run": True}),
    "bench generate": (MODEL, {"bench.generate:run": None}),
    "bench generate --quick": (MODEL, {"bench.generate:run": None}),
    "bench methods": ([*MODEL, *DATA], {"bench.methods:run": None}),
    "bench methods --draft b": ([*MODEL, *DATA], {"bench.methods:run": None}),
    "bench methods --quick": ([*MODEL, *DATA], {"bench.methods:run": None}),
    "bench fp8": ([*MODEL, *DATA], {"bench.fp8:run": None}),
    "bench fp8 --quick": ([*MODEL, *DATA], {"bench.fp8:run": None}),
}


def commands(members=main.COMMANDS, before=()):
    for each in members:
        words = (*before, each.name)
        yield from commands(each.commands, words) if isinstance(each, Group) else [" ".join(words)]


def words_of(call):
    """The command line of a call, and the name of its command."""
    name = max((name for name in commands() if call == name or call.startswith(f"{name} ")), key=len)
    return [*name.split(), *CALLS[call][0], *call.removeprefix(name).split()], name


def options_of(name):
    """The options of a command, as argparse holds them."""
    parser = main.build_parser()
    for word in name.split():
        (choice,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = choice.choices[word]
    parser.complete()
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


@pytest.fixture
def called(monkeypatch):
    """The function that runs a command line, and returns its status and the recorded calls."""

    def run(words, functions):
        seen = []
        for place, value in functions.items():
            module, _, name = place.partition(":")
            module = importlib.import_module(f"megatron_twotower.{module}")
            original = getattr(module, name)

            def record(*args, original=original, value=value, **keywords):
                seen.append((original.__qualname__, args, keywords))
                return value

            monkeypatch.setattr(module, name, functools.wraps(original)(record))
        try:
            return main.main(words), seen
        except SystemExit as stopped:  # argparse's own
            return stopped.code, seen
        finally:
            monkeypatch.undo()

    return run


def accepted(action, value):
    with contextlib.suppress(ValueError):
        vars(action)["accepts"].check("", value)
        return True
    return False


def another(action):
    """Words that give an option another value than its default."""
    if action.nargs == 0:
        return []
    default = action.default[0] if isinstance(action.default, list) and action.default else action.default
    if action.choices:
        return [next(str(choice) for choice in action.choices if choice != default)]
    if action.type in (int, float):
        return [str(next(each for each in (5, 0.5, 16, 3) if each != default and accepted(action, action.type(each))))]
    return ["another"]


@pytest.mark.parametrize("call", CALLS)
def test_every_option_has_an_effect_or_is_refused(call, called, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words, name = words_of(call)
    status, base = called(words, CALLS[call][1])
    assert status in (0, None) and base, f"{call}: {capsys.readouterr().err}"
    for action in options_of(name):
        flag = action.option_strings[0]
        capsys.readouterr()
        status, found = called([*words, flag, *another(action)], CALLS[call][1])
        if status == 2:
            error = capsys.readouterr().err
            assert error.startswith("twotower: ") and error.count("\n") == 1 and not found, f"{call} {flag}: {error}"
        else:
            given = flag in words and words[words.index(flag) + 1 :][: len(another(action))] == another(action)
            assert found != base or given, f"{call} {flag} has no effect and is not refused"


@pytest.mark.parametrize("name", list(commands()))
def test_every_number_has_limits_and_is_refused_beyond_them(name, called, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = next(call for call in CALLS if call == name or call.startswith(f"{name} --"))
    words, _ = words_of(call)
    for action in options_of(name):
        if action.type not in (int, float):
            continue
        accepts, flag = vars(action)["accepts"], action.option_strings[0]
        assert accepts.limited, f"{name} {flag} accepts every number"
        bad = ["nan"] if action.type is float else [str(10**30)]
        bad += [str(accepts.at_least - 1)] if accepts.at_least is not None else []
        bad += [str(limit) for limit in (accepts.above, accepts.below) if limit is not None]
        bad += [str(accepts.at_most + 1)] if accepts.at_most is not None else []
        for value in bad:
            capsys.readouterr()
            status, found = called([*words, flag, value], CALLS[call][1])
            error = capsys.readouterr().err
            assert status == 2 and not found and error.count("\n") == 1, f"{name} {flag} {value}: {error}"
            assert flag in error


KNOWN = {
    "plan --scaling 8 --ranks 4": "--ranks: found with --scaling, which does not use it",
    "plan --rows 3": "--rows: found with no --search, which does not use it",
    "plan --measured gpu.json --utilisation 0.3": "--utilisation: found with --measured, which does not use it",
    "plan --utilisation 0": "--utilisation: found 0.0, expected above 0 and at most 1",
    "generate --prompt a --batch-size 16": "--batch-size: found with --prompt or --chat, which does not use it",
    "generate --prompt a --sampler factor --confidence-threshold 0.8": "--confidence-threshold: found with --sampler, "
    "which does not use it",
    "evaluate --tasks t --sampler factor --confidence-threshold 0.8": "--confidence-threshold: found with --sampler, "
    "which does not use it",
    "evaluate --data d --sampler factor": "--sampler: found with no --tasks, which does not use it",
    "generate --prompt a --sampler factor:x": "sampler: found 'factor:x', expected factor:FACTOR",
    "generate --prompt a --top-k 3": "--top-k: found with --temperature 0, which does not use it",
    "generate --prompts a --workers 2": "--workers: found with --engine local, which does not use it",
    "generate --prompt a --engine ray": "--engine: found with --prompt or --chat, which does not use it",
    "data prepare --address head:6379": "--address: found with --engine local, which does not use it",
    "evaluate --data d --engine ray": "--engine: found with no --tasks, which does not use it",
    "generate --prompt a --quantized-towers context": (
        "--quantized-towers: found with no --quantize, which does not use it"
    ),
    "generate --prompt a --system b": "--system: found with no --chat, which does not use it",
    "data prepare --workspace w": "--workspace: found with an output that is a path, which does not use it",
    "data prepare --chat --eos none": "--eos: found with --chat, which does not use it",
    "data prepare --chat-template a": "--chat-template: found with no --chat, which does not use it",
    "evaluate --data d --mode ar": "--mode: found with no --tasks, which does not use it",
    "evaluate --tasks t --sequences 3": "--sequences: found with --tasks, which does not use it",
    "evaluate --tasks t --seed 4294967296": "--seed: found 4294967296, expected at least 0 and below 4294967296",
    "bench step --quick --lengths 64": "--lengths: found with --quick, which does not use it",
    "bench fp8 --quick --sequences 32": "--sequences: found with --quick, which does not use it",
}


@pytest.mark.parametrize("words", KNOWN)
def test_what_does_not_use_an_option_is_named(words, capsys):
    """Also if the value is the default: what is on the command line counts."""
    call = max((call for call in CALLS if words.startswith(call)), key=len)
    assert main.main([*words.split(), *CALLS[call][0]]) == 2
    assert capsys.readouterr().err == f"twotower: {KNOWN[words]}\n"


def test_every_command_is_called():
    assert {words_of(call)[1] for call in CALLS} == {*commands()}
