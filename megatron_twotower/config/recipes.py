"""From a Hydra recipe and overrides to a resolved `RunConfig`, and back to YAML."""

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from megatron_twotower.common.errors import UserError, require
from megatron_twotower.config.hf_config import model_from_hf, read_hf_config, read_pointer, read_token_shift
from megatron_twotower.config.overrides import plain_overrides, quoted
from megatron_twotower.config.phases import steps_of
from megatron_twotower.config.schema import FROM_FOLDER, InitConfig, ModelConfig, RunConfig, flatten
from megatron_twotower.config.special_tokens import RELEASED_BLOCK_SIZE, RELEASED_MASK_TOKEN_ID, read_special_tokens


def load_recipe(recipe: str, overrides: Sequence[str] = (), *, planning: bool = False) -> RunConfig:
    """Compose a recipe with Hydra overrides, and resolve it.

    Args:
        recipe: Name of a shipped recipe, or path of a YAML file.
        overrides: Hydra overrides, `section.key=value`.
        planning: See `resolve`.

    Raises:
        UserError: Unknown recipe, unknown key, wrong type, or a backbone that cannot be read.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    path, search = prepare_hydra(recipe)
    words = plain_overrides(overrides)
    try:
        with initialize_config_dir(str(path.parent), version_base="1.3"):
            composed = compose(path.stem, overrides=[*search, *words])
    # Hydra passes on what the YAML reader raises, and raises ValueError for some defaults lists.
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"recipe {recipe}: {_first_cause(error)}") from error
    return resolve_composed(composed, recipe=recipe, planning=planning)


def resolve_composed(composed: Any, *, recipe: str, planning: bool = False) -> RunConfig:
    """Make a configuration of what Hydra composed, and resolve it.

    Args:
        composed: What Hydra composed from a recipe and overrides.
        recipe: Name of the recipe for error messages.
        planning: See `resolve`.

    Raises:
        UserError: The recipe does not build on `run_config`, a value is missing or refers to no
            key, or see `resolve`.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    require(
        OmegaConf.get_type(composed) is RunConfig,
        f"recipe {recipe}: found no settings of a run, expected a list `defaults` that begins with run_config or "
        "another recipe",
    )
    given = {str(key) for key in composed.model if not OmegaConf.is_missing(composed.model, key)}
    for item in dataclasses.fields(ModelConfig):
        if item.name not in given:
            composed.model[item.name] = item.default
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        require(not missing, f"recipe {recipe}: {', '.join(missing)}: found ???, expected a value")
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise UserError(f"recipe {recipe}: {_first_cause(error)}") from error
    assert isinstance(config, RunConfig)
    return resolve(config, planning=planning, given=given)


def resolve(config: RunConfig, *, planning: bool = False, given: Collection[str] = ()) -> RunConfig:
    """Fill in what a recipe leaves to a folder, and the steps of all phases.

    From a folder come the model of the backbone, the mask token, the block size and the token
    shift.

    Args:
        config: A composed configuration.
        planning: If the backbone's folder does not exist, the recipe's model is enough.
        given: The fields of `model` that the recipe or an override sets.

    Raises:
        UserError: The recipe has neither a model nor a backbone, or the backbone has another value
            than the recipe.
    """
    if config.phases and config.train.steps == 0:
        total = sum(steps_of(phase.tokens, config.data) for phase in config.phases)
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=total))
    shaped = config.model.hybrid_override_pattern != ""
    if planning and shaped and not (config.init.backbone and Path(config.init.backbone).is_dir()):
        return _with_noise_of_folders(config)
    config = _with_noise_of_folders(dataclasses.replace(config, init=_with_backbone(config.init)))
    if config.init.backbone is None:
        require(
            shaped,
            "model.hybrid_override_pattern: found nothing, expected layer letters or init.backbone to take them from",
        )
        require(
            config.objective == "ar",
            "init.backbone: found null, expected a NemotronH folder (both towers start from it)",
        )
        return config
    source = f"{config.init.backbone}/config.json"
    found = model_from_hf(read_hf_config(config.init.backbone), source=source)
    for key, value in flatten(config.model):
        other, compared = getattr(found, key), key in given or (shaped and key not in _OF_RANDOM_WEIGHTS)
        require(other == value or not compared, f"model.{key}: found {value!r}, but {source} has {other!r}")
    _check_denoiser(config.init, found)
    return dataclasses.replace(config, model=found)


# What only random weights depend on. A recipe with a shape and a backbone need not repeat it: an
# export has another `time_step_min` than the run had (`convert/model_card.py`).
_OF_RANDOM_WEIGHTS = ("initializer_range", "time_step_min", "time_step_max", "time_step_floor")
# What two towers of one shape may say differently.
_NOT_OF_THE_SHAPE = ("max_position_embeddings", "initializer_range")


def _check_denoiser(init: InitConfig, model: ModelConfig) -> None:
    """Refuse a denoiser of another shape than the context tower that a recipe names for it."""
    if init.denoiser in (None, init.backbone) or not (Path(init.denoiser or "") / "config.json").is_file():
        return
    source = f"{init.denoiser}/config.json"
    other = model_from_hf(read_hf_config(str(init.denoiser)), source=source)
    for key, value in flatten(model):
        require(
            key in _NOT_OF_THE_SHAPE or getattr(other, key) == value,
            f"init.denoiser: {key}: found {getattr(other, key)!r} in {source}, expected {value!r} as in init.backbone "
            f"{init.backbone}",
        )


def _with_backbone(init: InitConfig) -> InitConfig:
    """Fill in `init.backbone` with the context tower that belongs to `init.denoiser`.

    A recipe that names another one trains the denoiser with that one from now on.
    """
    if init.denoiser is None:
        return init
    pointer = read_pointer(init.denoiser)
    return dataclasses.replace(init, backbone=init.backbone or (pointer["backbone"] if pointer else init.denoiser))


def _with_noise_of_folders(config: RunConfig) -> RunConfig:
    """Fill in the mask token, the block size and the token shift if the recipe does not say.

    The first folder that names a token or a size decides: the denoiser, the backbone, the tokenizer
    of the data. The token shift is that of the denoiser.
    """
    config = _with_shift_of_denoiser(config)
    noise, data = config.noise, config.data
    if FROM_FOLDER not in (noise.mask_token_id, noise.block_size_tokens):
        return config
    named = [config.init.denoiser, config.init.backbone, f"{data.folder}/tokenizer" if data.folder else None]
    folders = [folder for folder in named if folder and Path(folder).is_dir()]
    said = [read_special_tokens(each) for each in folders] if config.objective == "two_tower" else []

    def first(name: str, default: int) -> int:
        found = (getattr(each, name) for each in said)
        return next((value for value in found if value is not None), default)

    if noise.mask_token_id == FROM_FOLDER:
        noise = dataclasses.replace(noise, mask_token_id=first("mask_token_id", RELEASED_MASK_TOKEN_ID))
    if noise.block_size_tokens == FROM_FOLDER:
        noise = dataclasses.replace(noise, block_size_tokens=first("block_size", RELEASED_BLOCK_SIZE))
    return dataclasses.replace(config, noise=noise)


def _with_shift_of_denoiser(config: RunConfig) -> RunConfig:
    """Fill in the token shift if the recipe does not say; refuse another than the denoiser's."""
    shift, folder = config.noise.token_shift, config.init.denoiser
    if folder and config.objective == "two_tower" and Path(folder).is_dir():
        own = read_token_shift(folder)
        require(
            shift in (None, own),
            f"noise.token_shift: found {str(shift).lower()}, but the denoiser of {folder} has {str(own).lower()}, "
            "expected the same",
        )
        shift = own
    return dataclasses.replace(config, noise=dataclasses.replace(config.noise, token_shift=bool(shift)))


def recipes_folder() -> Path:
    """Return the folder of the shipped recipes: in the package, or next to it in a source tree."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "recipes", package.parent / "recipes"):
        if folder.is_dir():
            return folder
    raise UserError(f"{package / 'recipes'}: not found, expected the recipes folder of the package")


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def prepare_hydra(recipe: str) -> tuple[Path, list[str]]:
    """Find the file of a recipe, and register `RunConfig` with Hydra.

    The fields of `model` are registered without values, so that what is composed tells which of
    them a recipe or an override sets.

    Returns:
        The file, and the overrides with which Hydra finds the shipped recipes.

    Raises:
        UserError: Unknown recipe, or a file that is not UTF-8.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import MISSING, OmegaConf

    path = Path(recipe) if recipe.endswith(".yaml") else recipes_folder() / f"{recipe}.yaml"
    if not path.is_file():
        raise UserError(
            f"recipe {recipe!r}: not found, expected a file NAME.yaml or one of {', '.join(recipe_names())}"
        )
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {recipe}: found bytes that are not UTF-8 at place {error.start}") from error
    node = OmegaConf.structured(RunConfig)
    _allow_changes(node)
    # Else what a recipe says could not be distinguished from what it leaves out.
    node.noise.mask_token_id = node.noise.block_size_tokens = FROM_FOLDER
    node.noise.token_shift = None
    for item in dataclasses.fields(ModelConfig):
        node.model[item.name] = MISSING
    ConfigStore.instance().store(name="run_config", node=node)
    return path.resolve(), [f"hydra.searchpath=[{quoted(f'file://{recipes_folder()}')}]"]


def _allow_changes(node: Any) -> None:
    """Clear the read-only flags of frozen dataclasses, or OmegaConf could not merge a recipe."""
    from omegaconf import DictConfig, OmegaConf

    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _allow_changes(child)


def _first_cause(error: BaseException) -> str:
    """Return the innermost message of an error in one line: it names the key and the value."""
    cause = error.__cause__
    text = f"{error}\n{cause}" if cause is not None else str(error)
    noise = ("object_type", "reference_type", "To append")
    lines = [line.strip() for line in text.splitlines()]
    return "; ".join(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))


def to_yaml(config: RunConfig) -> str:
    """Return a resolved configuration as YAML that `twotower train recipe=PATH` reads again."""
    from omegaconf import OmegaConf

    return "defaults:\n  - run_config\n  - _self_\n\n" + OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))
