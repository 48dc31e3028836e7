import io
import json

import torch
from rich.console import Console

from megatron_twotower.bench.results import report
from megatron_twotower.common.machine import machine
from megatron_twotower.common.tables import plain_table


def test_a_report_is_printed_and_written(tmp_path):
    facts, console = machine(), Console(file=io.StringIO(), width=150)
    assert {"device", "processor", "threads", "torch", "commit"} <= facts.keys()
    table = plain_table("title", ("name", "value"), [("a", "1")], left=1)
    report(
        tmp_path / "new", "ops", {"machine": facts}, tables=[table], notes=["[a note]"], picture=b"png", console=console
    )
    text = console.file.getvalue()
    assert all(part in text for part in ("title", "[a note]", torch.__version__, "ops.json", "ops.png"))
    assert json.loads((tmp_path / "new" / "ops.json").read_text())["machine"] == facts
    assert (tmp_path / "new" / "ops.png").read_bytes() == b"png"
