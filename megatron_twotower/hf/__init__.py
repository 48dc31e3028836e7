"""Parts of exported two-tower Hugging Face folders: the modelling file and the configuration."""

from pathlib import Path
from typing import Any

from megatron_twotower.config.hf_config import TWO_TOWER_MODEL_TYPE

MODELING_FILE = Path(__file__).with_name("modeling_nemotron_h_twotower.py")
ARCHITECTURE = "NemotronHTwoTowerForCausalLM"
CONFIGURATION = "NemotronHTwoTowerConfig"


def twotower_config_json(backbone_config: dict[str, Any]) -> dict[str, Any]:
    """Make the `config.json` of a two-tower folder from that of its backbone.

    Only the class changes; no diffusion key is added. With trust_remote_code, `auto_map` makes
    `AutoConfig` and `AutoModelForCausalLM` load the modelling file in the folder. Without it
    transformers refuses the folder, because it does not know the model type. (Under `nemotron_h`
    it would load its own class and fill its tower with random numbers.)
    """
    classes = {"AutoConfig": CONFIGURATION, "AutoModelForCausalLM": ARCHITECTURE}
    auto_map = {auto: f"{MODELING_FILE.stem}.{name}" for auto, name in classes.items()}
    return backbone_config | {"model_type": TWO_TOWER_MODEL_TYPE, "architectures": [ARCHITECTURE], "auto_map": auto_map}
