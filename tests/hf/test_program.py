"""The shipped class in a user's program: the habits of transformers and PEFT, and refusals."""

import copy
import inspect
import io
import json
import shutil
import warnings

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NemotronHConfig,
    NemotronHForCausalLM,
    StoppingCriteriaList,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria, StopStringCriteria

from helpers.modeling import VOCABULARY, Recorder, known, random_ids, save, tiny_config, tiny_model
from megatron_twotower.config.hf_config import model_from_hf, read_hf_config
from megatron_twotower.config.schema import RunConfig
from megatron_twotower.convert.hf_folder import HfFolder
from megatron_twotower.hf.modeling_nemotron_h_twotower import (
    NOT_OF_AR,
    NOT_OF_FORWARD,
    NOT_OF_GENERATE,
    NemotronHTwoTowerConfig,
    NemotronHTwoTowerForCausalLM,
)

PATTERN = known("ME*-")
# All text fits into one chunk: before 5.17 the scan of transformers is wrong beyond it.
CHUNK = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "model"
    model = tiny_model(PATTERN, dtype=torch.float32, chunk_size=CHUNK)
    save(path, model, pattern=PATTERN, chunk_size=CHUNK)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


@torch.no_grad()
def same_text(first, second):
    ids = random_ids(2, 5)
    return torch.allclose(first(ids).logits, second(ids).logits, atol=1e-4) and torch.equal(
        first.generate_mask_diffusion(ids, 8), second.generate_mask_diffusion(ids, 8)
    )


# --- loading ---


@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AutoModelForCausalLM])
def test_without_trust_remote_code_a_folder_is_refused(folder, auto):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        auto.from_pretrained(folder)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        auto.from_pretrained(folder, trust_remote_code=False)


def as_before(folder, path, **changes):
    """The same folder with the `config.json` of an older export, or of a released one."""
    shutil.copytree(folder, path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "nemotron_h", **changes}
    (path / "config.json").write_text(json.dumps(config))
    return path


OLDER = {"AutoModelForCausalLM": "modeling_nemotron_h_twotower.NemotronHTwoTowerForCausalLM"}
RELEASED = OLDER | {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"}


@pytest.mark.parametrize("auto_map", [OLDER, RELEASED])
def test_older_and_released_folders_are_read_and_saved_under_the_new_type(folder, model, tmp_path, caplog, auto_map):
    older = as_before(folder, tmp_path / "older", auto_map=auto_map)
    assert model_from_hf(read_hf_config(older), source="") == model_from_hf(read_hf_config(folder), source="")
    found = [NemotronHTwoTowerForCausalLM.from_pretrained(older)]
    if auto_map is OLDER:  # with its own code, a released folder is none of this class's
        found.append(AutoModelForCausalLM.from_pretrained(older, trust_remote_code=True))
    assert "model of type" not in caplog.text
    for number, each in enumerate(found):
        assert type(each.config).__name__ == "NemotronHTwoTowerConfig"
        each.save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(number), trust_remote_code=True)
        assert same_text(again, model)


def test_a_configuration_of_transformers_stays_as_it_is():
    config = tiny_config(PATTERN)
    model = NemotronHTwoTowerForCausalLM(config)
    assert type(config) is NemotronHConfig
    assert type(model.config) is NemotronHTwoTowerConfig
    assert model.config.to_dict() == config.to_dict() | {"model_type": "nemotron_h_twotower"}


def test_another_model_is_refused(folder, tmp_path):
    other = as_before(folder, tmp_path / "other", model_type="llama")
    message = "model_type: found 'llama', expected 'nemotron_h_twotower' or 'nemotron_h'"
    with pytest.raises(ValueError, match=message):
        NemotronHTwoTowerForCausalLM.from_pretrained(other)


FORMS = [
    lambda folder: {"pretrained_model_name_or_path": folder},
    lambda folder: {"pretrained_model_name_or_path": str(folder), "torch_dtype": "auto"},
    lambda folder: {"pretrained_model_name_or_path": folder, "dtype": torch.float32, "low_cpu_mem_usage": True},
    lambda folder: {"pretrained_model_name_or_path": folder, "device_map": "cpu"},
    lambda folder: {"pretrained_model_name_or_path": folder, "device_map": "auto", "local_files_only": True},
    lambda folder: {"pretrained_model_name_or_path": folder, "attn_implementation": "sdpa", "use_safetensors": True},
    lambda folder: {
        "pretrained_model_name_or_path": folder,
        "config": AutoConfig.from_pretrained(folder, trust_remote_code=True),
    },
]


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_from_pretrained(folder, model, form):
    assert same_text(AutoModelForCausalLM.from_pretrained(trust_remote_code=True, **form(folder)), model)


def test_from_pretrained_without_a_folder_and_in_a_subfolder(folder, model, tmp_path):
    own = NemotronHTwoTowerForCausalLM
    assert same_text(own.from_pretrained(None, config=model.config, state_dict=model.state_dict()), model)
    shutil.copytree(folder, tmp_path / "sub")
    assert same_text(own.from_pretrained(tmp_path, subfolder="sub"), model)
    (tmp_path / "sub" / "context_tower.json").write_text(json.dumps({"backbone": "../gone", "sha256": ""}))
    with pytest.raises(ValueError, match="gone: not found, expected the backbone of"):
        own.from_pretrained(tmp_path, subfolder="sub")


def test_a_setting_that_is_not_built_is_refused(folder):
    with pytest.raises(ValueError, match="attn_implementation: found 'eager', expected 'sdpa'"):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, attn_implementation="eager")


# --- copies ---


def test_a_model_can_be_pickled_and_copied(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (torch.load(buffer, weights_only=False), copy.deepcopy(model)):
        assert type(copied) is type(model)
        assert same_text(copied, model)


@pytest.mark.parametrize(("rows", "multiple", "size"), [(53, None, 53), (49, 8, 56), (40, None, 40)])
def test_both_towers_are_resized(model, tmp_path, rows, multiple, size):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.denoiser_tower.embeddings.requires_grad_(False)
    returned = model.resize_token_embeddings(rows, pad_to_multiple_of=multiple)
    assert returned is model.get_input_embeddings() is model.context_tower.embeddings
    kept = min(size, VOCABULARY)
    for name, tensor in model.state_dict().items():
        assert tensor.shape[0] == (
            size if name.endswith(("embeddings.weight", "lm_head.weight")) else before[name].shape[0]
        )
        assert torch.equal(tensor[:kept], before[name][:kept])
    assert not model.denoiser_tower.embeddings.weight.requires_grad
    assert model.lm_head.weight.requires_grad
    assert model.resize_token_embeddings() is returned
    model.save_pretrained(tmp_path / "resized")
    assert same_text(AutoModelForCausalLM.from_pretrained(tmp_path / "resized", trust_remote_code=True), model)
    shape = model_from_hf(read_hf_config(tmp_path / "resized"), source="config.json")
    assert shape.vocab_size == size
    HfFolder.open(tmp_path / "resized").check(RunConfig(model=shape))


# --- forward, against the one-tower class of transformers ---


@pytest.fixture
def plain(model):
    """The context tower as transformers' own class."""
    reference, state = NemotronHForCausalLM(tiny_config(PATTERN, chunk_size=CHUNK)).eval(), {}
    reference.generation_config = copy.deepcopy(model.generation_config)
    for name, tensor in model.state_dict().items():
        if name.startswith("context_"):
            own = "lm_head.weight" if name == "context_lm_head.weight" else name.replace("context_tower.", "model.", 1)
            before, experts, rest = own.partition(".mixer.experts.")
            number, _, projection = rest.partition(".")
            if experts:
                own = before + experts + projection.removesuffix(".weight")
                rows = state.setdefault(own, torch.empty(reference.state_dict()[own].shape))
                rows[int(number)] = tensor
            else:
                state[own] = tensor
    reference.load_state_dict(state)
    return reference


@torch.no_grad()
def test_arguments_of_forward_are_those_of_transformers(model, plain):
    ids = random_ids(2, 7)
    labels = ids.masked_fill(ids % 5 == 0, -100)
    embedded = model.get_input_embeddings()(ids)
    positions = torch.arange(7).expand(2, -1)
    for settings in (
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions, "labels": labels},
        {"inputs_embeds": embedded, "labels": labels, "output_attentions": None, "use_cache": False},
        {"input_ids": ids, "labels": labels, "num_items_in_batch": torch.tensor(5)},
        {"input_ids": ids, "logits_to_keep": 2},
        {"input_ids": ids, "logits_to_keep": torch.tensor([1, 4])},
        {"input_ids": ids, "output_hidden_states": True},
    ):
        found, expected = model(**settings), plain(**settings)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
        if "labels" in settings:
            torch.testing.assert_close(found.loss, expected.loss, atol=1e-4, rtol=1e-4)
        if "output_hidden_states" in settings:
            assert len(found.hidden_states) == 1 + len(PATTERN)
            torch.testing.assert_close(found.hidden_states, expected.hidden_states, atol=1e-4, rtol=1e-4)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 1 + len(PATTERN)
    model.config.output_hidden_states = False
    loss, logits = model(ids, labels=labels, return_dict=False)
    assert logits.shape == (2, 7, VOCABULARY) and loss.ndim == 0
    model.config.return_dict = False
    assert isinstance(model(ids), tuple)


def test_arguments_that_forward_refuses(model):
    for name in (*NOT_OF_FORWARD, "pixel_values"):
        with pytest.raises(ValueError, match=f"^{name}: found True, expected None: "):
            model(random_ids(1, 4), **{name: True})


def test_inputs_that_forward_refuses(model):
    ids = random_ids(2, 6)
    packed = torch.tensor([0, 1, 2, 0, 1, 2]).expand(2, -1)
    for settings, message in (
        ({}, "input_ids and inputs_embeds: found neither, expected one"),
        ({"input_ids": ids, "inputs_embeds": torch.zeros(2, 6, 32)}, "input_ids and inputs_embeds: found both"),
        (
            {"inputs_embeds": torch.zeros(2, 6, 31)},
            r"inputs_embeds: found shape \(2, 6, 31\), expected \(rows, tokens, 32\)",
        ),
        ({"input_ids": ids, "position_ids": packed}, "position_ids: found positions that are not consecutive"),
        ({"input_ids": ids, "labels": ids, "logits_to_keep": 1}, "logits_to_keep: found 1, expected 0 with labels"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**settings)


def test_positions_of_padded_rows_are_accepted(model):
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    ids = random_ids(2, 4)
    assert torch.equal(model(ids, mask, position_ids=positions).logits, model(ids, mask).logits)


# --- generate, against the one-tower class of transformers ---


def ends(model, ids):
    """Two ends, of which the first row meets the second one."""
    text = model.generate(ids, max_new_tokens=8, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :].tolist()
    return [next(each for each in range(VOCABULARY) if each not in text), text[4]]


CASES = {
    "length": lambda model, ids: {"max_length": 12},
    "config": lambda model, ids: {"generation_config": GenerationConfig(max_new_tokens=4, pad_token_id=1)},
    "ends": lambda model, ids: {"max_new_tokens": 8, "eos_token_id": ends(model, ids), "pad_token_id": 9},
    "one end": lambda model, ids: {"max_new_tokens": 8, "eos_token_id": ends(model, ids)[1]},
    "no cache": lambda model, ids: {"max_new_tokens": 6, "use_cache": False},
    "processors": lambda model, ids: {
        "max_new_tokens": 6,
        "eos_token_id": ends(model, ids)[1],
        "logits_processor": LogitsProcessorList(
            [MinNewTokensLengthLogitsProcessor(ids.shape[1], 6, ends(model, ids)[1])]
        ),
    },
    "penalties": lambda model, ids: {"max_new_tokens": 8, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "criteria": lambda model, ids: {
        "max_new_tokens": 8,
        "stopping_criteria": StoppingCriteriaList([MaxLengthCriteria(ids.shape[1] + 3)]),
    },
    "allowed tokens": lambda model, ids: {
        "max_new_tokens": 4,
        "prefix_allowed_tokens_fn": lambda row, text: [7 + len(text) % 3],
    },
    "samples": lambda model, ids: {
        "max_new_tokens": 6, "do_sample": True, "temperature": 0.7, "top_k": 20, "num_return_sequences": 3
    },
}  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_generate_is_that_of_transformers(model, plain, case, padded):
    ids = random_ids(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0] + [1] * 4]) if padded else None
    settings, texts = CASES[case](model, ids), []
    for each in (model, plain):
        torch.manual_seed(7)
        each.generation_config.pad_token_id = 0
        texts.append(each.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(*texts), texts
    assert model.last_generation.passes == texts[0].shape[1] - 6


def test_results_and_streams_of_generate(model, plain):
    ids, streams = random_ids(1, 5), (Recorder(), Recorder())
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    found, expected = (
        each.generate(ids, streamer=stream, **settings) for each, stream in zip((model, plain), streams, strict=True)
    )
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)
    assert [part.tolist() for part in streams[0].parts] == [part.tolist() for part in streams[1].parts]
    assert streams[0].ended
    assert model.compute_transition_scores(found.sequences, found.scores).shape == (1, 6)
    mixed = Recorder()
    model.generate(ids, max_new_tokens=6, streamer=mixed, generator=torch.Generator())
    assert [part.tolist() for part in mixed.parts] == [part.tolist() for part in streams[0].parts]
    assert mixed.ended


def test_a_stop_string_ends_a_row(folder, tiny_data, tmp_path):
    model = tiny_model(PATTERN, dtype=torch.float32, vocab_size=512)
    tokenizer = AutoTokenizer.from_pretrained(tiny_data / "tokenizer")
    ids = random_ids(1, 4)
    text = model.generate(ids, max_new_tokens=12)[0, 4:]
    stop = tokenizer.decode(text[3:5])
    expected = StopStringCriteria(tokenizer, [stop])
    first = next(n for n in range(1, 13) if expected(text[None, :n], None)[0])
    found = model.generate(ids, max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer)
    assert found.tolist() == [ids[0].tolist() + text[:first].tolist()]
    assert first < 12


def test_without_a_length_there_are_128_new_tokens(model):
    model.generation_config.eos_token_id = None
    assert model.generate(random_ids(1, 3)).shape == (1, 131)
    model.generation_config.max_new_tokens = 4
    assert model.generate(random_ids(1, 3)).shape == (1, 7)


WRONG = {"num_beams": 4, "num_beam_groups": 2, "guidance_scale": 1.5, "cache_implementation": "paged"}


def test_arguments_that_generate_refuses(model):
    ids, of_configurations = random_ids(1, 4), GenerationConfig().to_dict()
    for name in (*NOT_OF_GENERATE, *NOT_OF_AR):
        value = WRONG.get(name, True)
        with pytest.raises(ValueError, match=f"^{name}: found {value!r}, expected .*: "):
            model.generate(ids, **{name: value})
        if name in of_configurations:
            config = GenerationConfig(max_new_tokens=2)
            setattr(config, name, value)
            with pytest.raises(ValueError, match=f"^{name}: found {value!r}, expected .*: "):
                model.generate(ids, config)


# What transformers does with the other settings of generation: the loop or what it calls uses them,
# or transformers warns that they have no effect without beams or an assistant model.
USED = """max_length max_new_tokens min_length min_new_tokens max_time stop_strings do_sample use_cache temperature
    prefill_chunk_size top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty
    encoder_repetition_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids renormalize_logits forced_bos_token_id
    forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    sequence_bias token_healing watermarking_config num_return_sequences output_scores output_logits
    return_dict_in_generate pad_token_id bos_token_id eos_token_id disable_compile transformers_version"""
OF_BEAMS_OR_ASSISTANTS = """early_stopping length_penalty diversity_penalty num_assistant_tokens
    num_assistant_tokens_schedule assistant_confidence_threshold max_matching_ngram_size assistant_lookbehind
    target_lookbehind assistant_ensemble_weight"""
# Not of a decoder, of `generate_batch`, and of a method that transformers no longer has.
OF_OTHERS = "decoder_start_token_id continuous_batching_config low_memory"


def test_every_setting_of_generation_is_used_or_refused():
    fields = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    known_fields = {*USED.split(), *OF_BEAMS_OR_ASSISTANTS.split(), *OF_OTHERS.split(), *NOT_OF_GENERATE}
    assert not fields - known_fields
    arguments = {"self", "input_ids", "attention_mask", "position_ids", "others"}
    assert not set(inspect.signature(NemotronHTwoTowerForCausalLM.forward).parameters) - arguments - known_fields


def test_other_arguments_that_generate_refuses(model):
    ids = random_ids(2, 4)
    with pytest.raises(ValueError, match="generation_config: found a Tensor, expected a GenerationConfig"):
        model.generate(ids, torch.ones_like(ids))
    with pytest.raises(ValueError, match="no_such_argument"):
        model.generate(ids, no_such_argument=1)
    with pytest.raises(ValueError, match="pad_token_id: found 99, expected 0 to 47"):
        model.generate(ids, pad_token_id=99)


# --- training ---


def test_training_says_that_it_trains_one_tower(model):
    ids = random_ids(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, labels=ids)
        model.train()
        with torch.no_grad():
            model(ids, labels=ids)
    with pytest.warns(UserWarning, match="this loss trains the context tower alone. The denoiser gets no gradient"):
        model(ids, labels=ids).loss.backward()
    trained = {name.partition(".")[0] for name, each in model.named_parameters() if each.grad is not None}
    assert trained == {"context_tower", "context_lm_head"}


def test_trainer_says_so_too_and_saves_a_folder_that_loads(model, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in random_ids(8, 6)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    first = trainer.evaluate()["eval_loss"]
    with pytest.warns(UserWarning, match="this loss trains the context tower alone"):
        trainer.train()
    # The number of labels in all micro-batches of a step divides the loss.
    assert abs(trainer.state.log_history[-1]["train_loss"] / first - 1) < 0.5
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed and all(name.startswith("context_") for name in changed)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    assert same_text(again, model.eval())


# --- PEFT ---


def test_lora_trains_is_saved_and_is_merged(folder, model, tmp_path):
    peft = pytest.importorskip("peft")
    ids, targets = random_ids(2, 6), ["q_proj", "v_proj", "in_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).train()
    with pytest.warns(UserWarning, match="this loss trains the context tower alone"):
        loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.optim.SGD(adapted.parameters(), 0.1).step()
    adapted.eval()
    assert adapted(input_ids=ids, labels=ids).loss < loss
    adapted.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert same_text(again, adapted)
    text = adapted.generate(input_ids=ids, max_new_tokens=5)
    assert torch.equal(again.generate(input_ids=ids, max_new_tokens=5), text)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    torch.testing.assert_close(merged(ids).logits, adapted(input_ids=ids).logits, atol=1e-3, rtol=1e-3)


def test_learned_prompts_train_and_are_refused_by_generate(model):
    peft = pytest.importorskip("peft")
    ids = random_ids(2, 6)
    adapted = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()
    with pytest.warns(UserWarning, match="this loss trains the context tower alone"):
        adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert adapted.prompt_encoder["default"].embedding.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="PeftModelForCausalLM: found learned prompts, expected none"):
        adapted.generate(input_ids=ids, max_new_tokens=2)


def test_an_adapter_of_the_convolution_is_refused(model):
    peft = pytest.importorskip("peft")
    channels = model.context_tower.layers[0].mixer.conv1d.out_channels
    config = peft.LoraConfig(r=channels, target_modules=["conv1d"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="target_modules: found conv1d, expected other modules"):
        peft.get_peft_model(model, config)(input_ids=random_ids(1, 4))
