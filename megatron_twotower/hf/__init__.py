"""Parts of exported two-tower Hugging Face folders: the modelling file and the configuration."""

from pathlib import Path
from typing import Any

MODELING_FILE = Path(__file__).with_name("modeling_nemotron_h_twotower.py")
ARCHITECTURE = "NemotronHTwoTowerForCausalLM"


def twotower_config_json(backbone_config: dict[str, Any]) -> dict[str, Any]:
    """Make the `config.json` of a two-tower folder from that of its backbone.

    Only the class changes. As in the released checkpoint, `model_type` stays `nemotron_h` and no
    diffusion key is added. With trust_remote_code, `auto_map` makes `AutoModelForCausalLM` load the
    modelling file in the folder.
    """
    auto_map = {"AutoModelForCausalLM": f"{MODELING_FILE.stem}.{ARCHITECTURE}"}
    return backbone_config | {"architectures": [ARCHITECTURE], "auto_map": auto_map}
