"""Set-up of all tests: Megatron Core on the CPU, one thread, no network, small shared inputs."""

import gc
import os
import random
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import megatron_twotower.mcore  # noqa: F401

torch.set_num_threads(1)


def pytest_configure():
    """Remove variables that decide over the recipes of tests."""
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_NAME"):
        os.environ.pop(name, None)


# Files with long tests, most of which start processes. They come first: then the last tests of
# several test processes are short, and no process waits long for another one.
LONG = (
    "ops/triton/test_interpreter.py",
    "train/test_layouts.py",
    "checkpoint/test_save_and_load.py",
    "train/test_loop.py",
    "plan/test_ranks.py",
    "train/test_watchdog.py",
    "generate/test_prompt_file.py",
    "convert/test_import_run.py",
)


def pytest_collection_modifyitems(items):
    """Put the tests of `LONG` first, in its order; all others keep theirs."""
    place = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
    assert all(file.is_file() for file in place), "a file of LONG is not there"
    items.sort(key=lambda item: place.get(item.path, len(LONG)))


def pytest_collection_finish():
    """Exclude the objects of imported modules from garbage collection: there are millions."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_thread():
    """Check that a test leaves torch with one thread.

    Else the sums of later tests round differently.
    """
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(1)
    assert left == 1, f"leaves torch with {left} threads"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device of a test: the CPU, or a GPU.

    A test that was selected for a GPU fails without one.
    """
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("found no CUDA device, expected one")
    return request.param


@pytest.fixture
def groups():
    """Process groups of one rank."""
    from megatron_twotower.config.schema import RunConfig
    from megatron_twotower.mcore import parallel

    yield parallel.initialise(RunConfig())
    parallel.shutdown()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A prepared data folder.

    Forty short files of generated text, a tokenizer of 512 entries, two splits.
    """
    from megatron_twotower.data.prepare import prepare
    from megatron_twotower.data.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    (folder / "texts").mkdir()
    draw = random.Random(0)
    words = ["alpha", "beta", "gamma", "delta", "count", "value", "index", "result", "total", "name"]
    for number in range(40):
        lines = []
        for _ in range(60):
            a, b, c = draw.choices(words, k=3)
            lines.append(
                draw.choice([f"def {a}({b}):", f"    {a} = {b} + {c}", f"    return {a}", f"if {a} > {b}:", ""])
            )
        (folder / "texts" / f"file{number:02}.py").write_text("\n".join(lines) + "\n")
    texts = [path.read_text() for path in sorted((folder / "texts").iterdir())]
    train_tokenizer(texts, vocab_size=512, output=folder / "tokenizer")
    prepare([str(folder / "texts")], tokenizer=folder / "tokenizer", output=folder / "data", holdout_fraction=0.2)
    return folder / "data"


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    """A NemotronH folder with random weights, of the shape of `recipes/model/tiny.yaml`."""
    from helpers.models import write_backbone
    from megatron_twotower.config.recipes import load_recipe

    model = load_recipe("tiny_ar").model
    return write_backbone(tmp_path_factory.mktemp("backbone") / "hf", model)


@pytest.fixture(scope="session")
def two_tower_folder(tiny_data, tmp_path_factory):
    """An exported two-tower folder with random weights, and the tokenizer of `tiny_data`."""
    from helpers.modeling import save, tiny_model

    folder = tmp_path_factory.mktemp("two_tower") / "model"
    save(folder, tiny_model(dtype=torch.float32, vocab_size=512), vocab_size=512)
    for file in (tiny_data / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.fixture
def records_of():
    """The function that reads the records of a run folder of one kind, by step."""
    from helpers.runs import records

    return records


@pytest.fixture(scope="session")
def identity_folder(tiny_data, tmp_path_factory):
    """An exported folder whose denoiser is its context tower, with the tokenizer of `tiny_data`."""
    from helpers.modeling import become_backbone, save, tiny_model

    folder = tmp_path_factory.mktemp("identity") / "model"
    save(folder, become_backbone(tiny_model(dtype=torch.float32, vocab_size=512)), vocab_size=512)
    for file in (tiny_data / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder
