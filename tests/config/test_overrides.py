"""Values of the command line are taken as they are, and what a recipe cannot be is one line."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from helpers.models import TINY, write_backbone
from megatron_twotower.cli import main
from megatron_twotower.common.errors import UserError
from megatron_twotower.config.overrides import plain_overrides
from megatron_twotower.config.recipes import load_recipe, to_yaml
from megatron_twotower.config.schema import flatten

# Characters that Hydra's grammar gives a meaning, or has no place for.
TEXTS = [
    *("a>b", "a,b", "a'b", 'a"b', "a=b", "a b", "für", "日本", "a(b)", "[x]", "{x}", "$x", "a:b", "a\\b", "~/x", "%x"),
    *("a#b", "a@b", "a*b", "!x", "a;b", "a|b", "a&b", "a\nb", "a\tb", " a", "a ", "3", "true", "1_000", "1e3", "-a"),
    *(
        "é,è",
        "a<b",
        "`a",
        "^",
        "+a",
        "a/=b",
        "\\",
        "a\\",
        "a'b\"c",
        "'a",
        'a"',
        "inf",
        "glob(*)",
        "range(1,3)",
        "",
        "😀",
    ),
]


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_hydra_reads_a_text_as_it_is(text):
    for value in (text, f"runs/{text}", f"{text}/x"):
        parsed = OverridesParser.create().parse_override(plain_overrides([f"output={value}"])[0])
        assert str(parsed.value()) == value


def test_texts_come_through_a_recipe_and_its_copy(tmp_path):
    keys = ("output", "data.folder", "data.blend", "logging.project", "logging.name")
    for first in range(0, len(TEXTS), len(keys)):
        values = dict(zip(keys, TEXTS[first:], strict=False))
        config = load_recipe("tiny_ar", [f"{key}={value}" for key, value in values.items()])
        found = dict(flatten(config))
        assert {key: found[key] for key in values} == values
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_recipe(str(tmp_path / "again.yaml")) == config


def test_quotes_null_and_references_keep_the_meaning_of_hydra():
    words = ["output='a,b'", 'data.folder="a b"', "logging.name=null", "logging.project=run ${seed} > x", "seed=7"]
    config = load_recipe("tiny_ar", words)
    assert (config.output, config.data.folder, config.logging.name) == ("a,b", "a b", None)
    assert config.logging.project == "run 7 > x"
    assert load_recipe("tiny_ar", ["logging.name='null'"]).logging.name == "null"


def test_names_of_phases_are_texts_too(tmp_path):
    (tmp_path / "a>b, c.yaml").write_text("defaults: [tiny_ar, _self_]\nphases: [{name: a, tokens: 2560}]\n")
    recipe = str(tmp_path / "a>b, c.yaml")
    assert load_recipe(recipe, ["phases.0.name=ü,b", "train.steps=0"]).phases[0].name == "ü,b"


def test_a_sweep_divides_at_commas():
    several = ["noise.weighting=masked_mean,elbo", "output='a,b',c", "data.folder=a>b", "seed=1,2", "hydra.job.name=x"]
    assert plain_overrides(several, several=True) == [*several[:2], "data.folder='a>b'", *several[3:]]
    with pytest.raises(UserError, match="in quotes"):
        plain_overrides(["output=a>b,c"], several=True)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=a>b"], "override 'seed=a>b': Hydra's grammar cannot read the value, expected a text with special"),
        (["train.steps=²"], "Hydra's grammar cannot read the value"),
        (["phases=[{name: a>b}]"], "expected a text with special characters in quotes"),
        (["seed=1,2"], "Ambiguous value"),
        (["=3"], "override '=3': found no key"),
        (["model=null"], "Config group override must be a string"),
        (["hydra.run.dir=x"], "a key of Hydra itself, which only --multirun uses"),
        (["output=\udcff"], "found bytes that are not UTF-8"),
        (["output=${nothing}"], "Interpolation key 'nothing' not found"),
        (["seed=???"], "seed: found ???, expected a value"),
    ],
)
def test_what_cannot_be_read_is_one_line(words, expected, capsys):
    assert main.main(["train", "recipe=tiny_ar", *words]) == 2
    error = capsys.readouterr().err
    assert expected in error and error.startswith("twotower: ") and error.count("\n") == 1


BASE = "defaults: [tiny_ar, _self_]\n"
RECIPES = {
    "tab": (BASE + "train:\n\tsteps: 3\n", "found character '\\t'"),
    "a key twice": (BASE + "seed: 1\nseed: 2\n", "found duplicate key seed"),
    "Latin-1": ((BASE + "output: café\n").encode("latin-1"), "not UTF-8 at place 39"),
    "UTF-16": (BASE.encode("utf-16"), "not UTF-8 at place 0"),
    "empty": ("", "expected a list `defaults` that begins with run_config"),
    "without defaults": ("seed: 3\n", "expected a list `defaults` that begins with run_config"),
    "only itself": ("defaults: [_self_]\nseed: 3\n", "expected a list `defaults` that begins with run_config"),
    "a text": ("hello\n", "expected a list `defaults`"),
    "a list": ("- a\n", "must be a DictConfig"),
    "not closed": ("defaults: [tiny_ar\n", "while parsing a flow sequence"),
    "no such default": ("defaults: [nothing, _self_]\n", "Could not load 'nothing'"),
    "default that is a text": ("defaults: tiny_ar\n", "defaults must be a list"),
    "default that is a number": ("defaults: [3]\n", "Unsupported type in defaults"),
    "default of itself": ("defaults: [recipe, _self_]\n", "recursion"),
    "no such reference": (BASE + "output: ${nothing}\n", "Interpolation key 'nothing' not found"),
    "reference in a circle": (BASE + "output: ${output}\n", "Recursive interpolation"),
    "tag": (BASE + "seed: !!python/object:os.system x\n", "could not determine a constructor"),
    "section that is a number": (BASE + "train: 3\n", "int is not a subclass of TrainConfig"),
    "phases that are a number": (BASE + "phases: [3]\n", "int is not a subclass of PhaseConfig"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_broken_recipe_is_one_line_that_names_it(case, tmp_path, capsys):
    content, expected = RECIPES[case]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main.main(["train", f"recipe={path}"]) == 2
    error = capsys.readouterr().err
    assert expected in error and str(path) in error and error.startswith("twotower: ") and error.count("\n") == 1


def test_a_file_of_another_suffix_is_no_recipe(tmp_path):
    (tmp_path / "recipe.yml").write_text(BASE)
    with pytest.raises(UserError, match=r"recipe.yml': not found, expected a file NAME.yaml"):
        load_recipe(str(tmp_path / "recipe.yml"))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("backbone") / "hf", TINY)


def test_a_field_of_the_model_beside_a_backbone_is_refused_or_the_same(backbone, tmp_path):
    """Also a value that is the default of the field: what is given counts, not what differs."""
    words = [f"init.backbone={backbone}"]
    alone = load_recipe("tiny", words)
    assert load_recipe("tiny", [*words, f"model.vocab_size={TINY.vocab_size}"]) == alone
    for override, found in (
        ("model.vocab_size=999", TINY.vocab_size),
        ("model.vocab_size=4096", TINY.vocab_size),
        ("model.routed_scaling_factor=1.0", TINY.routed_scaling_factor),
        ("model.time_step_clamp=0.001", TINY.time_step_clamp),
    ):
        key, _, value = override.partition("=")
        with pytest.raises(UserError, match=f"{key}: found {value}, but {backbone}/config.json has {found}"):
            load_recipe("tiny", [*words, override])
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("defaults: [tiny, _self_]\nmodel: {hidden_size: 256}\n")
    with pytest.raises(UserError, match=r"model.hidden_size: found 256, but"):
        load_recipe(str(recipe), words)


def test_what_only_random_weights_depend_on_is_not_compared_unless_it_is_given(tiny_backbone):
    """A run continues from its own export, whose `time_step_min` is another one."""
    words = [f"init.backbone={tiny_backbone}"]
    assert load_recipe("tiny_ar", words).model.time_step_min == 1e-30
    with pytest.raises(UserError, match=r"model.time_step_min: found 0.001, but .* has 1e-30"):
        load_recipe("tiny_ar", [*words, "model.time_step_min=0.001"])
    with pytest.raises(UserError, match=r"model.hidden_size: found 48, but"):
        load_recipe("tiny_ar", [*words, "model.hidden_size=48"])
