"""What ships inside exported Hugging Face folders: the modelling file, and the configuration that names it."""

from pathlib import Path
from typing import Any

MODELING_FILE = Path(__file__).with_name("modeling_nemotron_h_twotower.py")
ARCHITECTURE = "NemotronHTwoTowerForCausalLM"


def twotower_config_json(backbone_config: dict[str, Any]) -> dict[str, Any]:
    """The `config.json` of a two-tower folder, from that of its backbone.

    Only the class changes: `model_type` stays `nemotron_h` and no diffusion key is added, as in the
    released checkpoint. `auto_map` leads `AutoModelForCausalLM` (with trust_remote_code) to the
    modelling file in the folder.
    """
    auto_map = {"AutoModelForCausalLM": f"{MODELING_FILE.stem}.{ARCHITECTURE}"}
    return backbone_config | {"architectures": [ARCHITECTURE], "auto_map": auto_map}
