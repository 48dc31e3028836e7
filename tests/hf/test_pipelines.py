"""Text from a pipeline, streamers and stopping criteria, and other loops than AR in `generate`."""

import inspect
import threading

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria, StopStringCriteria

from helpers.modeling import RELEASE, Recorder, random_ids
from megatron_twotower.hf.modeling_nemotron_h_twotower import (
    LOOPS,
    NOT_OF_AR,
    SAID_BY_FOLDERS,
    NemotronHTwoTowerForCausalLM,
)

PROMPTS = ["def alpha(beta):", "return gamma"]
NEW = 12
OTHERS = [loop for loop in LOOPS if loop != "ar"]
# Of each loop, an argument of its own that changes the text.
OWN = {
    "mask_diffusion": {"confidence_threshold": 0.0, "block_size": 4},
    "mock_ar": {},
    "speculative": {"block_size": 5},
}


@pytest.fixture(scope="module")
def loaded(two_tower_folder):
    return AutoModelForCausalLM.from_pretrained(two_tower_folder, trust_remote_code=True).eval()


@pytest.fixture
def model(loaded):
    """The model of the folder, with its defaults again afterwards."""
    before = loaded.generation_config
    loaded.generation_config = GenerationConfig.from_dict(before.to_dict())
    yield loaded
    loaded.generation_config = before


@pytest.fixture(scope="module")
def tokenizer(two_tower_folder):
    return AutoTokenizer.from_pretrained(two_tower_folder, trust_remote_code=True)


@pytest.fixture
def pipe(model, tokenizer):
    return pipeline("text-generation", model=model, tokenizer=tokenizer)


def written(model, tokenizer, prompt, new=NEW, **settings):
    """New text of a prompt alone, by the method itself."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    return tokenizer.decode(model.generate_ar(ids, new, **settings)[0, ids.shape[1] :], skip_special_tokens=True)


# --- pipelines ---


def test_a_pipeline_of_a_folder(two_tower_folder, model, tokenizer):
    pipe = pipeline("text-generation", model=str(two_tower_folder), trust_remote_code=True)
    (found,) = pipe(PROMPTS[0], max_new_tokens=NEW, do_sample=False)
    assert found == {"generated_text": PROMPTS[0] + written(model, tokenizer, PROMPTS[0])}
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("text-generation", model=str(two_tower_folder), trust_remote_code=False)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch_of_a_pipeline_is_the_text_of_each_alone(pipe, model, tokenizer, batch_size):
    found = pipe(PROMPTS, max_new_tokens=NEW, do_sample=False, return_full_text=False, batch_size=batch_size)
    assert [rows[0]["generated_text"] for rows in found] == [written(model, tokenizer, each) for each in PROMPTS]


def test_tensors_and_several_texts_of_a_pipeline(pipe, model, tokenizer):
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    (found,) = pipe(PROMPTS[0], max_new_tokens=NEW, do_sample=False, return_tensors=True)
    assert found["generated_token_ids"] == model.generate_ar(ids, NEW)[0].tolist()
    torch.manual_seed(3)
    texts = pipe(PROMPTS[0], max_new_tokens=NEW, num_return_sequences=3, do_sample=True, temperature=2.0, top_k=None)
    assert len({each["generated_text"] for each in texts}) == 3


@pytest.mark.skipif(RELEASE < (5, 24), reason="5.3.0 ends at the first token of a stop sequence")
def test_a_stop_sequence_of_a_pipeline(pipe, model, tokenizer):
    text = written(model, tokenizer, PROMPTS[0])
    stop = text[3:5]
    (found,) = pipe(PROMPTS[0], max_new_tokens=NEW, do_sample=False, stop_sequence=stop, return_full_text=False)
    assert (
        stop in found["generated_text"] and text.startswith(found["generated_text"]) and found["generated_text"] != text
    )


@pytest.mark.parametrize("loop", LOOPS)
def test_a_streamer_of_a_pipeline_in_a_thread(pipe, model, tokenizer, loop):
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    settings = {"max_new_tokens": NEW, "do_sample": False, "custom_generate": loop}
    thread = threading.Thread(target=pipe, args=(PROMPTS[0],), kwargs=settings | {"streamer": streamer})
    thread.start()
    parts = list(streamer)
    thread.join()
    (whole,) = pipe(PROMPTS[0], return_full_text=False, **settings)
    assert "".join(parts) == whole["generated_text"]


def test_stop_strings_of_other_loops(model, tokenizer):
    ids = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    stop, settings = written(model, tokenizer, PROMPTS[0])[3:5], {"max_new_tokens": NEW, "tokenizer": tokenizer}
    expected = model.generate(ids, stop_strings=stop, **settings)
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, stop)])
    found = model.generate(ids, stopping_criteria=criteria, generator=torch.Generator(), **settings)
    assert torch.equal(found, expected) and found.shape[1] < ids.shape[1] + NEW
    for others, message in (
        ({"generator": torch.Generator()}, "this loop takes StopStringCriteria"),
        ({"custom_generate": lambda *_, **others: None}, "this loop takes StopStringCriteria"),
        ({"custom_generate": "speculative"}, "this loop ends at a length and at EOS"),
    ):
        with pytest.raises(ValueError, match=f"^stop_strings: found some, expected None: {message}"):
            model.generate(ids, stop_strings=stop, **settings, **others)
        config = GenerationConfig(max_new_tokens=NEW, stop_strings=stop)
        with pytest.raises(ValueError, match=f"^stop_strings: found some, expected None: {message}"):
            model.generate(ids, config, tokenizer=tokenizer, **others)


# --- streamers and stopping criteria of `generate` ---


def test_a_text_streamer_prints_the_text(model, tokenizer, capsys):
    ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    model.generate(
        ids, max_new_tokens=NEW, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    assert capsys.readouterr().out.rstrip("\n") == written(model, tokenizer, PROMPTS[1]).rstrip("\n")


@pytest.mark.parametrize("loop", OTHERS)
@pytest.mark.parametrize("end", [False, True])
def test_a_streamer_gets_the_final_ids_once_and_in_order(model, loop, end):
    ids, settings = random_ids(1, 5), {"max_new_tokens": 11, "custom_generate": loop, **OWN[loop]}
    # One token in each step of mask diffusion, anywhere in the block.
    settings |= {"confidence_threshold": 1.0} if loop == "mask_diffusion" else {}
    text = model.generate(ids, **settings)[0, 5:]
    settings["eos_token_id"] = [int(text[6])] if end else None
    stream = Recorder()
    whole = model.generate(ids, streamer=stream, pad_token_id=0, **settings)
    assert stream.ended and torch.equal(stream.parts[0], ids)
    assert torch.equal(torch.cat(stream.parts[1:]), whole[0, 5:])
    assert all(len(part) for part in stream.parts) and (end or len(stream.parts) > 2)
    assert not end or whole.shape[1] < ids.shape[1] + 11


def test_parts_of_mask_diffusion_come_as_soon_as_nothing_before_them_is_open(model):
    ids, stream, known = random_ids(1, 5), Recorder(), []

    def on_step(step):
        prefix = (step.ids[0] != model.mask_token_id).tolist()
        known.append(step.block * 8 + (prefix.index(False) if False in prefix else 8))
        assert sum(map(len, stream.parts[1:])) in (known[-1], known[-2] if len(known) > 1 else 0)

    settings = {"custom_generate": "mask_diffusion", "block_size": 8, "on_step": on_step}
    model.generate(ids, streamer=stream, max_new_tokens=16, **settings)
    assert sum(map(len, stream.parts[1:])) == 16 and len(known) > 4


# --- other loops than AR ---


@pytest.mark.parametrize("loop", OTHERS)
@pytest.mark.parametrize("padded", [False, True])
def test_a_loop_by_its_name_is_its_method(model, loop, padded):
    ids = random_ids(2, 6)
    mask = torch.tensor([[1] * 6, [0, 0] + [1] * 4]) if padded else None
    expected = getattr(model, LOOPS[loop])(ids, NEW, attention_mask=mask, **OWN[loop])
    settings = {"max_new_tokens": NEW, "attention_mask": mask, "custom_generate": loop}
    assert torch.equal(model.generate(ids, **settings, **OWN[loop]), expected)
    stats = model.last_generation
    assert stats.new_tokens == 2 * NEW
    # The same from a configuration of the call, and from that of the model.
    config = GenerationConfig(max_new_tokens=NEW, custom_generate=loop, **OWN[loop])
    assert torch.equal(model.generate(ids, config, attention_mask=mask), expected)
    model.generation_config = config
    assert torch.equal(model.generate(ids, attention_mask=mask), expected)
    by_ar = model.generate_ar(ids, NEW, attention_mask=mask)
    assert torch.equal(model.generate(ids, attention_mask=mask, custom_generate="ar"), by_ar)
    if loop == "speculative":
        assert torch.equal(expected, by_ar)
    else:
        assert not torch.equal(expected, by_ar)


@pytest.mark.parametrize("loop", OTHERS)
def test_a_loop_samples_as_its_method(model, loop):
    ids, texts = random_ids(2, 6), []
    sampling = {"temperature": 1.7, "top_k": 30, "top_p": 0.9}
    for do_sample in ({}, {"do_sample": True, "max_new_tokens": NEW, "custom_generate": loop}):
        generator = torch.Generator().manual_seed(5)
        method = model.generate if do_sample else getattr(model, LOOPS[loop])
        length = {} if do_sample else {"max_new_tokens": NEW}
        texts.append(method(ids, generator=generator, **length, **do_sample, **sampling, **OWN[loop]))
    assert torch.equal(*texts)
    others = model.generate(
        ids, do_sample=True, max_new_tokens=NEW, custom_generate=loop, num_return_sequences=2, **sampling, **OWN[loop]
    )
    assert others.shape == (4, 6 + NEW) and not torch.equal(others[0], others[1])


@pytest.mark.parametrize("loop", OTHERS)
def test_rows_that_end_are_padded_and_the_result_may_be_a_dictionary(model, loop):
    ids, settings = random_ids(2, 6), {"max_new_tokens": NEW, "custom_generate": loop, **OWN[loop]}
    text = model.generate(ids, **settings)[0, 6:].tolist()
    end = text[3]
    found = model.generate(ids, eos_token_id=[end], pad_token_id=1, return_dict_in_generate=True, **settings).sequences
    first = found[0, 6:].tolist()
    stop = first.index(end)
    assert stop <= 3 and first[: stop + 1] == text[: stop + 1] and set(first[stop + 1 :]) <= {1}
    longest = StoppingCriteriaList([MaxLengthCriteria(9)])
    assert torch.equal(model.generate(ids, stopping_criteria=longest, **settings)[0, 6:], torch.tensor(text[:3]))


def test_a_function_of_ones_own(model):
    def backwards(model, input_ids, generation_config, block_size=0, **_):
        return input_ids.flip(1)[:, block_size : generation_config.max_length]

    ids = random_ids(2, 6)
    assert torch.equal(model.generate(ids, max_new_tokens=3, custom_generate=backwards), ids.flip(1))
    found = model.generate(ids, max_new_tokens=3, custom_generate=backwards, block_size=2)
    assert torch.equal(found, ids.flip(1)[:, 2:])
    for name, value in (("streamer", Recorder()), ("generator", torch.Generator()), ("on_tokens", print)):
        with pytest.raises(ValueError, match=f"^{name}: found one, expected None with custom_generate: functools"):
            model.generate(ids, custom_generate=backwards, **{name: value})


REFUSED = {
    "repetition_penalty": (1.5, "logits_processor: found RepetitionPenaltyLogitsProcessor, expected none"),
    "min_new_tokens": (3, r"logits_processor: found Min\w+LogitsProcessor, expected none"),
    "renormalize_logits": (True, "logits_processor: found LogitNormalization, expected none"),
    "max_time": (1.0, "stopping_criteria: found MaxTimeCriteria, expected none"),
    "stopping_criteria": (StoppingCriteriaList([MaxTimeCriteria(1)]), "stopping_criteria: found MaxTimeCriteria"),
    "output_scores": (True, "output_scores: found another value, expected the default"),
    "output_logits": (True, "output_logits: found another value, expected the default"),
    "prefill_chunk_size": (8, "prefill_chunk_size: found another value, expected the default"),
    "use_cache": (False, "use_cache: found another value, expected the default"),
    "streamer": (Recorder(), "streamer: found 2 rows, expected one"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("loop", OTHERS)
def test_what_a_loop_does_not_use_is_refused(model, loop, name):
    value, message = REFUSED[name]
    settings = {"return_dict_in_generate": True, "eos_token_id": 5} if name != "streamer" else {}
    with pytest.raises(ValueError, match=f"^{message}"):
        model.generate(random_ids(2, 4), max_new_tokens=4, custom_generate=loop, **settings, **{name: value})
    if name != "streamer":
        model.generate(random_ids(2, 4), max_new_tokens=4, **settings, **{name: value})


def test_names_and_arguments_of_other_loops_are_refused(model):
    ids = random_ids(1, 4)
    for value in ("contrastive", "transformers-community/dola", 3):
        message = f"custom_generate: found {value!r}, expected one of ar, mask_diffusion, mock_ar, speculative"
        with pytest.raises(ValueError, match=message):
            model.generate(ids, custom_generate=value)
    with pytest.raises(ValueError, match=r"^on_tokens: found a function, expected None: `on_step` watches"):
        model.generate(ids, custom_generate="mask_diffusion", on_tokens=print)
    for loop, method in LOOPS.items():
        for name in set(NOT_OF_AR) - set(inspect.signature(getattr(model, method)).parameters):
            with pytest.raises(ValueError, match=f"^{name}: found 2, expected None: "):
                model.generate(ids, custom_generate=loop, **{name: 2})
            config = GenerationConfig(max_new_tokens=2, custom_generate=loop, **{name: 2})
            if name in SAID_BY_FOLDERS:  # for the loops that take it
                assert torch.equal(model.generate(ids, config), getattr(model, method)(ids, 2))
                continue
            with pytest.raises(ValueError, match=f"^{name}: found 2, expected None: "):
                model.generate(ids, config)


def test_every_argument_of_a_loop_is_refused_by_the_others():
    """So that an argument that a method gets later cannot be swallowed."""
    of_all = set(inspect.signature(NemotronHTwoTowerForCausalLM.generate_ar).parameters)
    for method in LOOPS.values():
        of_all |= set(inspect.signature(getattr(NemotronHTwoTowerForCausalLM, method)).parameters) - {"self"}
    shared = set(inspect.signature(NemotronHTwoTowerForCausalLM.generate_ar).parameters)
    assert of_all - shared == set(NOT_OF_AR)


def test_processors_of_the_caller_are_used_by_ar_and_refused_by_the_others(model):
    ids = random_ids(1, 4)
    processors = LogitsProcessorList([MinNewTokensLengthLogitsProcessor(4, 6, 5)])
    assert model.generate(ids, max_new_tokens=3, logits_processor=processors).shape == (1, 7)
    with pytest.raises(ValueError, match="logits_processor: found MinNewTokensLengthLogitsProcessor"):
        model.generate(ids, max_new_tokens=3, logits_processor=processors, custom_generate="speculative")
