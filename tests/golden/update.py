"""Write the golden losses again, after an intended change: `python tests/golden/update.py`."""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

if __name__ == "__main__":
    import conftest

    from helpers.runs import LONG, losses, settings, train

    class Folders:
        """Makes temporary folders for the fixtures, as the factory of pytest does."""

        def mktemp(self, name: str) -> Path:
            return Path(tempfile.mkdtemp(prefix=name))

    data = conftest.tiny_data.__wrapped__(Folders())
    backbone = conftest.tiny_backbone.__wrapped__(Folders())
    for name, recipe, start, extra in (
        ("tiny_ar", "tiny_ar", None, ()),
        ("tiny", "tiny", backbone, ()),
        ("tiny_100", "tiny", backbone, LONG),
    ):
        run = Folders().mktemp(name) / "run"
        train(recipe, *settings(data, run, start, *extra))
        (HERE / f"{name}.json").write_text(json.dumps([round(x, 7) for x in losses(run).values()], indent=0) + "\n")
        print(f"{name}: written")
