"""Two small prepared corpora and a blend of them, and the overrides of a recipe that reads it."""

from megatron_twotower.data.prepare import prepare


def write_two_corpora(root, *, tokenizer):
    """Write `blend.yaml` and its corpora `numbers` and `calls` into the folder `root`."""
    for name, word in (("numbers", "value = {}"), ("calls", "def total(count): return index({})")):
        (root / "texts" / name).mkdir(parents=True)
        for file in range(12):
            lines = [word.format(file * line) for line in range(3 + 5 * file)]
            (root / "texts" / name / f"{file}.py").write_text("\n".join(lines))
        prepare(
            [str(root / "texts" / name)],
            tokenizer=tokenizer,
            output=root / name,
            holdout_fraction=0.3,
            shard_tokens=400,
        )
    (root / "blend.yaml").write_text(
        "corpora:\n  numbers: {folder: numbers}\n  calls: {folder: calls}\n"
        "mixtures:\n  breadth: {numbers: 3, calls: 1}\n  quality: {numbers: 1, calls: 4}\n"
    )
    return root


def settings(corpora, run, backbone, *extra):
    return [f"data.blend={corpora / 'blend.yaml'}", f"output={run}", f"init.backbone={backbone}", *extra]
