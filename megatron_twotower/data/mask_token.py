"""The mask token of a run: no text may hold it, and folders, tokenizers and the recipe agree on it.

If clean text held the mask token, the denoiser would read it as masked, and could never write it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from megatron_twotower.common.errors import UserError, require
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.config.special_tokens import SpecialTokens, read_special_tokens
from megatron_twotower.data.blend import BlendedDataset
from megatron_twotower.data.dataset import SequenceDataset, global_batch
from megatron_twotower.data.sources import tokenizer_folder
from megatron_twotower.data.tokenizer import TOKENIZER_FILE, check_same_ids, load_tokenizer, text_encoder

# Sequences of clean text that a run compares with its mask token before it starts.
_SEQUENCES = 8


def can_stand_in_text(tokenizer: PreTrainedTokenizerFast, token_id: int) -> bool:
    """Whether some text has this id, as `text_encoder` encodes it.

    A text that spells a special token has the ids of its characters. A text that spells another
    added token has its id. The entries of a vocabulary are reached from text, but for those of BPE
    that are neither one character nor the result of a merge.
    """
    return _reaches(tokenizer, token_id, json.loads(tokenizer.backend_tokenizer.to_str())["model"])


def _reaches(tokenizer: PreTrainedTokenizerFast, token_id: int, model: Mapping[str, Any]) -> bool:
    """`can_stand_in_text` with the parsed model of the tokenizer: a large one takes a second."""
    backend = tokenizer.backend_tokenizer
    content, added = backend.id_to_token(token_id), backend.get_added_tokens_decoder().get(token_id)
    if content is None or (added is not None and not added.special):
        return content is not None
    if content == model.get("unk_token") or token_id == model.get("unk_id"):
        return True
    if model["type"] == "BPE" and not model.get("ignore_merges"):
        return _is_reached_by_merges(model, content)
    if added is None:
        return True
    spelled = text_encoder(tokenizer)([content, f" {content}", f"x{content}x"])
    return any(token_id in ids for ids in spelled)


def _is_reached_by_merges(model: Mapping[str, Any], content: str) -> bool:
    """Whether BPE can give an entry of its vocabulary."""
    if content not in model["vocab"]:
        return False
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    if len(content.removeprefix(prefix).removesuffix(suffix)) <= 1:
        return True
    if model.get("byte_fallback") and len(content) == 6 and content.startswith("<0x"):
        return True
    pairs = (pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"])
    return any(left + right.removeprefix(prefix) == content for left, right in pairs)


def unused_id(tokenizer: PreTrainedTokenizerFast, vocab_size: int, *, taken: Sequence[int] = ()) -> int | None:
    """An id for a mask token: one that no token has, else a special token that nothing names."""
    backend = tokenizer.backend_tokenizer
    free = next((each for each in range(vocab_size) if backend.id_to_token(each) is None), None)
    if free is not None:
        return free
    named = {*tokenizer.all_special_ids, *taken} - {tokenizer.mask_token_id}
    model = json.loads(backend.to_str())["model"]
    special = (each for each, token in backend.get_added_tokens_decoder().items() if token.special)
    return next((each for each in special if each not in named and not _reaches(tokenizer, each, model)), None)


def check_mask_token(
    folder: Path,
    mask_id: int,
    *,
    vocab_size: int,
    key: str,
    eos_ids: Sequence[int] = (),
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> None:
    """Refuse a mask token that clean text can hold.

    Args:
        folder: A folder with a tokenizer.
        mask_id: Id of the mask token.
        vocab_size: Ids of the model.
        key: What sets the mask token.
        eos_ids: Ids that end documents.
        tokenizer: That of the folder, if it is open.

    Raises:
        UserError: It names the token, and ids that can be used.
    """
    tokenizer = tokenizer or load_tokenizer(folder)
    ends = mask_id in eos_ids
    if not ends and not can_stand_in_text(tokenizer, mask_id):
        return
    free, token = unused_id(tokenizer, vocab_size, taken=eos_ids), tokenizer.convert_ids_to_tokens(mask_id)
    unused = "" if free is None else f"{free} is unused, or "
    raise UserError(
        f"{key}: found {mask_id}, which is {token!r} of {folder} and {'ends documents' if ends else 'stands in text'}, "
        f"expected an id that no clean text has: {unused}add a special token to the tokenizer and name it mask_token"
    )


# --- of a run ---


def check_run(config: RunConfig) -> None:
    """Compare the mask token and EOS of a run with its folders and tokenizers.

    Raises:
        UserError: They disagree, or clean text can hold the mask token.
    """
    mask_id, key = config.noise.mask_token_id, "noise.mask_token_id"
    own = [Path(each) for each in (config.init.denoiser, config.init.backbone) if each and Path(each).is_dir()]
    has_data = Path(config.data.blend).is_file() if config.data.blend else bool(config.data.folder)
    data = tokenizer_folder(config) if has_data else None
    folders = [folder for folder in (data, *own) if folder and (folder / TOKENIZER_FILE).is_file()]
    said = {folder: read_special_tokens(folder) for folder in dict.fromkeys((*own, *folders))}
    for folder, tokens in said.items():
        require(
            tokens.mask_token_id in (None, mask_id),
            f"{key}: found {mask_id}, but the mask token of {folder} is {tokens.mask_token_id}, expected the same (a "
            "recipe that leaves the setting out takes that of its folder)",
        )
    if config.init.denoiser and config.init.backbone:
        check_same_ids(Path(config.init.backbone), Path(config.init.denoiser))
    _check_eos(own, said, data)
    eos_ids = sorted({each for tokens in said.values() for each in tokens.eos_token_ids})
    if not folders:
        require(mask_id not in eos_ids, f"{key}: found {mask_id}, which is EOS too, expected another id")
        return
    if config.init.denoiser and said[Path(config.init.denoiser)].mask_token_id is not None:
        key = f"{key} of {config.init.denoiser} (a new denoiser, with init.denoiser=null, may have another)"
    check_mask_token(folders[0], mask_id, vocab_size=config.model.vocab_size, key=key, eos_ids=eos_ids)


def _check_eos(own: Sequence[Path], said: dict[Path, SpecialTokens], data: Path | None) -> None:
    """The EOS with which documents of the data end is one of those of the model."""
    ends = said[data].eos_token_ids if data in said and data is not None else ()
    for folder in own:
        missing = set(ends) - set(said[folder].eos_token_ids or ends)
        require(
            not missing,
            f"{folder}: found eos_token_id {', '.join(map(str, said[folder].eos_token_ids))}, but documents of {data} "
            f"end with {min(missing, default='')}, expected it among them (generation_config.json may have a list)",
        )


def check_corpora(config: RunConfig, source: SequenceDataset | BlendedDataset) -> None:
    """Refuse data whose first sequences hold the mask token.

    Raises:
        UserError: It names the data and the sequence.
    """
    mask_id = config.noise.mask_token_id
    datasets = [source] if isinstance(source, SequenceDataset) else list(source.datasets.values())
    for dataset in datasets:
        corpus = dataset.corpus
        marks = {"BOS": corpus.bos_token_id, "EOS": corpus.eos_token_id}
        for name, token_id in marks.items():
            require(
                token_id != mask_id,
                f"{corpus.folder}: found {name} {token_id} at every document, which is noise.mask_token_id, expected "
                "another mask token",
            )
    batch = global_batch(source, first=0, count=min(_SEQUENCES, config.data.global_batch_size))
    found = (batch.tokens == mask_id).any(-1).nonzero().flatten().tolist()
    require(
        not found,
        f"{datasets[0].corpus.folder}: found the mask token, {mask_id}, in clean text (sequence {found[:1]} of the "
        "run), expected none (noise.mask_token_id: an id that no text has)",
    )
