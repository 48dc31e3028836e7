"""`config.json` is read as transformers reads it, or refused by the name of a field."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import NemotronHConfig, PretrainedConfig

from helpers.models import TINY
from megatron_twotower.common.errors import UserError
from megatron_twotower.config import hf_config
from megatron_twotower.config.hf_config import DEFAULTS, ONLY_VALUES, OTHER_NAMES, WITHOUT_EFFECT, model_from_hf
from megatron_twotower.config.schema import ModelConfig
from megatron_twotower.convert.model_card import backbone_config_json, plain_config, trained_config, two_tower_config
from megatron_twotower.hf.modeling_nemotron_h_twotower import Mamba, NemotronHTwoTowerForCausalLM

READ = [item.name for item in dataclasses.fields(ModelConfig) if item.name in DEFAULTS]


def fields(**changes):
    found = backbone_config_json(TINY, dtype=torch.float32) | {"time_step_min": 0.001} | changes
    return {key: value for key, value in found.items() if value is not ...}


def read(**changes):
    return model_from_hf(fields(**changes), source="config.json")


def theirs(**changes):
    given = fields(**changes)
    return NemotronHConfig(**{key: value for key, value in given.items() if key not in ("model_type", "architectures")})


def test_every_field_of_transformers_has_a_place_and_its_value():
    found, tables = NemotronHConfig().to_dict(), (DEFAULTS, ONLY_VALUES, WITHOUT_EFFECT)
    own = found.keys() - PretrainedConfig().to_dict().keys()
    own |= {"tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache"} & found.keys()
    own -= {"num_hidden_layers", "model_type"}  # the length of layers_block_type, checked; checked
    for name in own:
        assert sum(name in table for table in tables) == 1, f"{name}: expected in one of the tables"
    for name, value in {**DEFAULTS, **ONLY_VALUES}.items():
        if name in found:
            theirs = tuple(found[name]) if isinstance(value, tuple) else found[name]
            assert theirs == value, name
    assert {item.name for item in dataclasses.fields(ModelConfig)} - DEFAULTS.keys() == {
        "hybrid_override_pattern",
        "time_step_clamp",
    }


def test_a_configuration_without_fields_is_that_of_transformers():
    found, expected = model_from_hf({"model_type": "nemotron_h"}, source="config.json"), NemotronHConfig()
    assert all(getattr(found, name) == getattr(expected, name) for name in READ)
    assert found.hybrid_override_pattern == "ME*-"


@pytest.mark.parametrize("name", READ)
def test_a_field_that_is_left_out_is_that_of_transformers(name):
    fitting = {"num_attention_heads": 8, "mamba_num_heads": 8} | {name: ...}  # 8 groups divide them
    assert getattr(read(**fitting), name) == getattr(theirs(**fitting), name) == DEFAULTS[name]


@pytest.mark.parametrize("name", sorted(set(OTHER_NAMES) - {"layer_types", "attention_head_dim"}))
def test_another_name_of_a_field_is_read_as_by_transformers(name):
    usual = OTHER_NAMES[name]
    value = {"time_step_limit": [0.02, math.inf], "use_conv_bias": True}.get(usual, 2.0 if "time" in usual else 2)
    given = {usual: ..., name: value}
    expected = getattr(theirs(**given), usual)
    if usual in READ:
        assert getattr(read(**given), usual) == expected == value
    elif usual == "time_step_limit":
        assert read(**given).time_step_clamp == expected[0] == 0.02
    if usual != "use_conv_bias":
        with pytest.raises(UserError, match=f"found {name} .* and {usual} .*, expected the same value or one field"):
            read(**{usual: [0.5, math.inf] if usual == "time_step_limit" else 4, name: value})


def test_the_older_name_of_the_head_size_is_read_everywhere():
    assert read(head_dim=..., attention_head_dim=12).head_dim == 12
    with pytest.raises(UserError, match="found attention_head_dim 12 and head_dim 6, expected the same"):
        read(attention_head_dim=12)
    shipped = NemotronHTwoTowerForCausalLM(theirs(head_dim=..., attention_head_dim=12))
    assert shipped.context_tower.layers[2].mixer.q_proj.out_features == 12 * TINY.num_attention_heads
    assert shipped.config.head_dim == 12
    with pytest.raises(ValueError, match="head_dim: found 6, expected attention_head_dim, 12"):
        NemotronHTwoTowerForCausalLM(theirs(attention_head_dim=12))
    for written in (plain_config, two_tower_config):
        assert written(fields(head_dim=..., attention_head_dim=12), dtype=torch.float32)["head_dim"] == 12


@pytest.mark.parametrize("high", [math.inf, {"__float__": "Infinity"}])
def test_a_lower_limit_of_the_time_step_is_the_clamp_of_training(high):
    assert read(time_step_limit=[0.25, high]).time_step_clamp == 0.25
    assert read(time_step_limit=[0, high]).time_step_clamp == 0 == read().time_step_clamp


def test_the_clamp_of_a_run_is_read_back_and_applied_by_the_shipped_file():
    from megatron_twotower.config.schema import RunConfig

    for objective in ("ar", "two_tower"):
        config = RunConfig(objective=objective, model=dataclasses.replace(TINY, time_step_clamp=0.25))
        for found in (trained_config(fields(), config), backbone_config_json(config.model, dtype=torch.float32)):
            assert model_from_hf(json.loads(json.dumps(found)), source="config.json").time_step_clamp == 0.25
            known = {key: value for key, value in found.items() if key not in ("model_type", "architectures")}
            assert Mamba(NemotronHConfig(**known)).step_limit == (0.25, math.inf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_step_limit": [0.0, 0.1]}, r"time_step_limit: found \[0.0, 0.1\], expected .* no upper one"),
        ({"time_step_limit": None}, "time_step_limit: found None"),
        ({"time_step_limit": [-1, math.inf]}, "time_step_limit: found"),
        ({"vocab_size": "48"}, "vocab_size: found '48', expected a whole number"),
        ({"head_dim": None}, "head_dim: found None, expected a whole number"),
        ({"head_dim": 6.5}, "head_dim: found 6.5, expected a whole number"),
        ({"routed_scaling_factor": True}, "routed_scaling_factor: found True, expected a number"),
        ({"num_hidden_layers": 5}, "num_hidden_layers: found 5, expected 4, the layers of 'ME"),
        ({"layers_block_type": ["moe"]}, "found hybrid_override_pattern 'ME.*' and layers_block_type of 'E'"),
        ({"layers_block_type": "moe"}, "layers_block_type: found 'moe', expected a list"),
        ({"hybrid_override_pattern": 4}, "hybrid_override_pattern: found 4, expected letters"),
        ({"attention_dropout": 0.1}, "attention_dropout: found 0.1, expected 0.0"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers: found 1, expected 0"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message) as raised:
        read(**changes)
    assert "\n" not in str(raised.value)


def test_key_value_heads_of_null_are_the_attention_heads():
    assert read(num_key_value_heads=None).num_key_value_heads == TINY.num_attention_heads


def test_a_file_that_is_not_an_object_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config.json: found a list, expected a JSON object"):
        hf_config.read_hf_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"config.json: not valid JSON"):
        hf_config.read_hf_config(tmp_path)
