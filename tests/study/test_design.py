"""A study's file: what follows from it, and each mistake in one line."""

from dataclasses import replace

import pytest
import yaml

from megatron_twotower.common.errors import UserError
from megatron_twotower.config.recipes import recipes_folder, to_yaml
from megatron_twotower.config.schema import ScheduleConfig
from megatron_twotower.study.design import Arm, Study, read_study, trainings

FILE = {
    "question": "Does it learn?",
    "recipe": "quickstart",
    "overrides": ["parallel.threads_per_rank=1"],
    "sizes": {"small": ["init.backbone=recipes/backbones/small"]},
    "seeds": [3, 4],
    "reference": "as it is",
    "arms": {
        "as it is": {"overrides": [], "shares": [1]},
        "halves": {"overrides": ["data.micro_batch_size=4", "data.global_batch_size=4"], "shares": [0.25, 0.5]},
    },
}


@pytest.fixture
def study(tmp_path) -> Study:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(FILE, sort_keys=False))
    return read_study(path)


def test_a_file_is_read(study):
    assert study.seeds == (3, 4) and study.reference == "as it is"
    assert study.arms["halves"] == Arm(("data.micro_batch_size=4", "data.global_batch_size=4"), (0.25, 0.5), ("small",))


def test_an_arm_can_be_of_some_sizes_only(study, tmp_path):
    sizes = {"small": study.sizes["small"], "mini": ("init.backbone=recipes/backbones/mini",)}
    arms = study.arms | {"halves": replace(study.arms["halves"], sizes=("mini",))}
    arms["as it is"] = replace(arms["as it is"], sizes=("small", "mini"))
    found = trainings(replace(study, sizes=sizes, arms=arms, seeds=(3,)), tmp_path)
    assert [(each.size, each.arm, each.share) for each in found] == [
        ("small", "as it is", 1),
        ("mini", "as it is", 1),
        ("mini", "halves", 0.25),
        ("mini", "halves", 0.5),
    ]


def test_trainings_are_in_proportion(study, tmp_path):
    """Half the batch takes twice the steps; warm-up and decay keep their parts of the steps."""
    study = replace(study, overrides=("train.steps=360", "schedule.warmup_steps=20", "schedule.decay_steps=160"))
    study = replace(study, overrides=(*study.overrides, "data.global_batch_size=8", "data.micro_batch_size=8"))
    found = {(each.arm, each.share, each.seed): each for each in trainings(study, tmp_path)}
    assert list(found) == [
        (*arm, seed) for seed in (3, 4) for arm in (("as it is", 1), ("halves", 0.25), ("halves", 0.5))
    ]
    expected = {
        ("as it is", 1): (360, 20, 160, 8),
        ("halves", 0.25): (180, 10, 80, 4),
        ("halves", 0.5): (360, 20, 160, 4),
    }
    for (arm, share, seed), each in found.items():
        config = each.config
        steps = config.train.steps, config.schedule.warmup_steps, config.schedule.decay_steps
        assert (*steps, config.data.global_batch_size) == expected[arm, share]
        assert config.train.validate_every_steps == config.train.steps and config.seed == seed
        assert each.folder == tmp_path / "small" / f"{arm}-{share:g}" / f"seed-{seed}"
        assert config.output == str(each.folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": {}}, "arm: unknown or missing"),
        ({"seeds": []}, r"seeds: found \[\], expected different seeds"),
        ({"seeds": [1, 1]}, "seeds: found .1, 1., expected different seeds"),
        ({"overrides": ["steps"]}, "overrides: found .'steps'., expected a list of key=value"),
        ({"reference": "nobody"}, "reference: found 'nobody', expected one of as it is, halves"),
        ({"arms": {"as it is": {"overrides": [], "shares": [0]}}}, "arms.as it is.shares: found .0., expected"),
        ({"arms": {"as it is": {"overrides": [], "shares": [1], "sizes": ["huge"]}}}, "arms.as it is.sizes: found"),
        ({"arms": {"as it is": {"overrides": []}}}, "arms.as it is: shares: unknown or missing"),
        ({"sizes": {"a/b": []}}, "sizes: found .*, expected names"),
    ],
)
def test_mistakes_in_the_file(change, message, tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(FILE | change))
    with pytest.raises(UserError, match=message) as error:
        read_study(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_mistakes_in_a_recipe(study, tmp_path):
    wrong = replace(study, overrides=("noise.speed=3",))
    with pytest.raises(UserError, match="speed"):
        trainings(wrong, tmp_path)


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "bad.yaml").write_text("a: [")
    for name in ("none.yaml", "bad.yaml"):
        with pytest.raises(UserError, match=r"expected the file of a study") as error:
            read_study(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", sorted(recipes_folder().glob("studies/*.yaml")), ids=lambda path: path.stem)
def test_shipped_studies(path, tmp_path):
    """Every arm is a valid recipe, and no two arms of a study train the same."""
    study = read_study(path)
    size = {"small": study.sizes["small"]}  # it has all arms
    configs = [each.config for each in trainings(replace(study, sizes=size, seeds=(1,)), tmp_path)]

    def without_length(config):
        train = replace(config.train, steps=1, validate_every_steps=1)
        return to_yaml(replace(config, output="", schedule=ScheduleConfig(), train=train))

    assert len({without_length(config) for config in configs}) == len(study.arms)
