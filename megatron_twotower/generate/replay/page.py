"""The page that plays a recording of mask diffusion.

A page is one file that needs no network. It contains the recording as JSON, and `read_page` returns
it.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_twotower.common.errors import UserError
from megatron_twotower.common.files import atomic_file
from megatron_twotower.generate.replay.recording import VERSION

_FOLDER = Path(__file__).parent
STYLE, SCRIPT = ((_FOLDER / f"replay.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
_PAGE_STYLE = (_FOLDER / "page.css").read_text(encoding="utf-8")
_RECORDING = re.compile(r'<script type="application/json">(.*?)</script>', re.DOTALL)
_TEMPLATES = Environment(
    loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
)


def fragment(recording: Mapping[str, Any]) -> str:
    """The recording as an element. The page needs `STYLE` in its head and `SCRIPT` at its end."""
    # Without any "<", no text of a model can end the element.
    data = json.dumps(recording, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return _TEMPLATES.get_template("fragment.html").render(recording=recording, data=Markup(data))


def render_page(recording: Mapping[str, Any]) -> str:
    """One self-contained page. Its content-security policy forbids it to load anything."""
    return _TEMPLATES.get_template("page.html").render(
        model=Path(recording["model"]).name,
        settings=recording["settings"],
        style=Markup(_PAGE_STYLE + STYLE),
        script=Markup(SCRIPT),
        replay=Markup(fragment(recording)),
    )


def write_page(path: Path, recording: Mapping[str, Any]) -> None:
    """Write the page of a recording.

    Raises:
        UserError: `path` cannot be written.
    """
    with atomic_file(path) as partial:
        partial.write_text(render_page(recording), encoding="utf-8")


def read_page(path: Path) -> dict[str, Any]:
    """The recording in a page.

    Raises:
        UserError: The file is not a page of `write_page`.
    """
    found = _RECORDING.search(path.read_text(encoding="utf-8"))
    if found is None:
        raise UserError(f"{path}: found no recording, expected a page of `twotower generate --html`")
    try:
        recording = json.loads(found[1])
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: found a damaged recording ({error})") from error
    if recording.get("version") != VERSION:
        raise UserError(f"{path}: found a recording of version {recording.get('version')}, expected {VERSION}")
    return recording
