"""Experts in one tensor: their numbers, their parameters, and passes that can be run again."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

from helpers.modeling import MASK, PATTERNS, random_ids, tiny_model
from megatron_twotower.hf import modeling_nemotron_h_twotower as modeling
from megatron_twotower.hf.modeling_nemotron_h_twotower import (
    ArgumentError,
    ExpertStack,
    MixtureOfExperts,
    routed_experts,
    routed_stack,
)

EXPERTS, TOP, HIDDEN, WIDTH = 8, 3, 32, 24


def drawn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_stack(dtype, *, biases=False, quantised=None):
    shapes = (EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)
    up, down = (drawn(*shape, seed=seed, dtype=dtype) * 0.2 for seed, shape in enumerate(shapes))
    up_bias, down_bias = (drawn(EXPERTS, shape[1], seed=5, dtype=dtype) if biases else None for shape in shapes)
    if quantised is None:
        return ExpertStack(up, down, up_bias, down_bias)
    scales = [each.abs().amax(-1, keepdim=True).float() / 127 for each in (up, down)]
    numbers = [(each / scale).round().to(quantised) for each, scale in zip((up, down), scales, strict=True)]
    return ExpertStack(*numbers, up_bias, down_bias, *scales)


def random_choices(tokens):
    scores = drawn(tokens, EXPERTS, seed=9)
    scores[:, 2] = -1e9  # an expert without tokens
    return scores.softmax(-1)[:, :TOP].contiguous(), scores.topk(TOP, dim=-1).indices


def one_by_one(tokens, weights, chosen, stack):
    """Every choice of every token by itself, in float64."""
    up, down = stack.up.double(), stack.down.double()
    if stack.up_scale is not None:
        up, down = up * stack.up_scale.double(), down * stack.down_scale.double()
    out = torch.zeros(tokens.shape, dtype=torch.float64)
    for row, token in enumerate(tokens.double()):
        for weight, expert in zip(weights[row].double(), chosen[row], strict=True):
            hidden = up[expert] @ token
            hidden = hidden if stack.up_bias is None else hidden + stack.up_bias[expert].double()
            output = down[expert] @ hidden.clamp(min=0).square()
            out[row] += weight * (output if stack.down_bias is None else output + stack.down_bias[expert].double())
    return out


TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}
WAYS = {
    "grouped": {"has_grouped_product": lambda *_: True, "uses_few": lambda *_: False},
    "each": {"has_grouped_product": lambda *_: False},
    "batched": {"has_grouped_product": lambda *_: False, "uses_few": lambda *_: False, "batched": True},
    "batched copies": {"has_grouped_product": lambda *_: False, "uses_few": lambda *_: True, "batched": True},
}


@pytest.mark.parametrize("tokens", [1, 2, 17])
@pytest.mark.parametrize("quantised", [None, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(
    ("way", "dtype"),
    [(way, dtype) for way in WAYS for dtype in TOLERANCES if way != "grouped" or dtype != torch.float64],
)
def test_every_way_gives_the_sum_of_the_choices(monkeypatch, way, dtype, biases, quantised, tokens):
    replaced = dict(WAYS[way])
    is_batched = replaced.pop("batched", False)
    for name, value in replaced.items():
        monkeypatch.setattr(modeling, name, value)
    stack = random_stack(dtype, biases=biases, quantised=quantised)
    x, (weights, chosen) = drawn(tokens, HIDDEN, seed=3, dtype=dtype), random_choices(tokens)
    if is_batched:
        found = (modeling._batched_choices(x, chosen, stack) * weights.unsqueeze(-1)).sum(1).to(dtype)
    elif way == "grouped" and quantised:  # which the CPU does not choose
        ids, order, ends = modeling.sorted_by_expert(chosen, EXPERTS)
        rows = x[order // TOP]
        hidden = modeling._grouped_product(rows, stack.up, stack.up_bias, stack.up_scale, ids=ids, ends=ends)
        hidden = F.relu(hidden).square()
        outputs = modeling._grouped_product(hidden, stack.down, stack.down_bias, stack.down_scale, ids=ids, ends=ends)
        found = modeling.combined_choices(outputs, order, weights, dtype)
    else:
        found = routed_stack(x, weights, chosen, *stack)
    expected = one_by_one(x, weights, chosen, stack)
    assert found.dtype == dtype
    error = (found.double() - expected).norm() / expected.norm()
    assert error < TOLERANCES[dtype], error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_the_grouped_product_has_the_numbers_of_the_modules(dtype):
    stack = random_stack(dtype)
    x, (weights, chosen) = drawn(16, HIDDEN, seed=3, dtype=dtype), random_choices(16)
    assert modeling.has_grouped_product(stack.up, dtype) == hasattr(F, "grouped_mm")

    def expert(number):
        return lambda rows: F.linear(F.relu(F.linear(rows, stack.up[number])).square(), stack.down[number])

    expected = routed_experts(x, weights, chosen, [expert(number) for number in range(EXPERTS)])
    assert torch.equal(routed_stack(x, weights, chosen, *stack), expected)


# --- parameters ---


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def pass_of(model):
    """The hidden states of a block after a text."""
    return model.denoise_block(random_ids(1, 4, seed=2), torch.ones(1), model.prefill(random_ids(1, 9)))


def by_modules(model, monkeypatch, function=pass_of):
    with monkeypatch.context() as patch:
        patch.setattr(MixtureOfExperts, "stack", lambda *_: None)
        for moe in experts_of(model):
            patch.setattr(moe, "_stack", None)
        return function(model)


def storages(model):
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in model.parameters()}


def test_a_stack_takes_no_memory_and_changes_no_name():
    model = tiny_model(dtype=torch.float32)
    names, size = list(model.state_dict()), sum(storages(model).values())
    own = storages(model)
    pass_of(model)
    for moe in experts_of(model):
        weights = [expert.up_proj.weight for expert in moe.experts]
        assert {each.untyped_storage().data_ptr() for each in weights} == {moe._stack.up.data_ptr()}
        assert all(torch.equal(each, row) for each, row in zip(weights, moe._stack.up, strict=True))
    assert len(storages(model)) < len(own) and sum(storages(model).values()) == size
    assert list(model.state_dict()) == names and "_stack" not in str(names)
    before = [moe._stack for moe in experts_of(model)]
    pass_of(model)
    assert all(moe._stack is stack for moe, stack in zip(experts_of(model), before, strict=True))


def in_place(expert):
    with torch.no_grad():
        expert.up_proj.weight.mul_(3)


def new_data(expert):
    expert.down_proj.weight.data = expert.down_proj.weight.data * 3


def new_parameter(expert):
    expert.up_proj.weight = torch.nn.Parameter(expert.up_proj.weight.detach() * 3)


def new_linear(expert):
    linear = torch.nn.Linear(*expert.up_proj.weight.shape[::-1], bias=False)
    linear.weight = torch.nn.Parameter(expert.up_proj.weight.detach() * 3)
    expert.up_proj = linear


def wrapped(expert):
    expert.up_proj = torch.nn.Sequential(expert.up_proj, torch.nn.Dropout(0.0))
    in_place(type("", (), {"up_proj": expert.up_proj[0]}))


def loaded(expert):
    state = {name: tensor * 3 for name, tensor in expert.state_dict().items()}
    expert.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [in_place, new_data, new_parameter, new_linear, wrapped, loaded])
def test_a_changed_expert_is_seen(change, monkeypatch):
    model = tiny_model(dtype=torch.float32)
    cache, block = model.prefill(random_ids(1, 9)), random_ids(1, 4, seed=2)
    before = model.denoise_block(block, torch.ones(1), cache)
    for moe in experts_of(model):
        for expert in moe.experts:
            change(expert)
    found = pass_of(model)
    assert not torch.allclose(found, before)
    assert torch.equal(found, by_modules(model, monkeypatch))
    # Not only `prefill` looks.
    if change is wrapped:
        return
    for look in (lambda model: model.score(random_ids(1, 9)), lambda model: model(random_ids(1, 9)).logits):
        with torch.no_grad():
            before = look(model)
            for expert in experts_of(model)[0].experts:
                change(expert)
            found = look(model)
            assert not torch.equal(found, before) and torch.equal(found, by_modules(model, monkeypatch, look))


def test_copies_and_pickles_have_tensors_of_their_own():
    model = tiny_model(dtype=torch.float32)
    expected, size = pass_of(model), sum(p.numel() * p.element_size() for p in model.parameters())
    copied = copy.deepcopy(model)
    written = pickle.dumps(model)
    buffer = io.BytesIO()
    pass_of(model)
    torch.save(model.state_dict(), buffer)
    assert len(written) < 1.5 * size and buffer.tell() < 1.5 * size
    for other in (copied, pickle.loads(written)):
        assert not storages(other).keys() & storages(model).keys()
        assert torch.equal(pass_of(other), expected)
        assert sum(storages(other).values()) == sum(storages(model).values())


def test_files_hold_each_tensor_once(tmp_path):
    model = tiny_model(dtype=torch.float32)
    pass_of(model)
    save_file(model.state_dict(), tmp_path / "plain.safetensors")
    model.save_pretrained(tmp_path)
    for path in (tmp_path / "plain.safetensors", tmp_path / "model.safetensors"):
        found = load_file(path)
        assert found.keys() == model.state_dict().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_that_generated_in_inference_mode_can_be_trained(monkeypatch):
    model = tiny_model(dtype=torch.float32)
    with torch.inference_mode():
        before = pass_of(model)
    ids = random_ids(2, 6)
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    found = pass_of(model)
    assert not torch.equal(found, before) and torch.equal(found, by_modules(model, monkeypatch))
    wide = model.to(torch.float64)
    assert all(moe._stack is None for moe in experts_of(wide))
    torch.testing.assert_close(pass_of(wide), found.double(), atol=1e-3, rtol=1e-3)


# --- passes over a cache of fixed shape ---


def steps_of_a_text(model, *, padded, **settings):
    """Blocks, their noise levels, and a cache that reads each of them; two prompts and no text."""
    ids, mask = random_ids(2, 8), torch.ones(2, 8, dtype=torch.int64)
    mask[1, :3] = 0
    for prompt, its_mask in ((ids, mask if padded else None), (ids[:, :0], None)):
        cache = model.prefill(prompt, its_mask, **settings)
        for seed in range(4):
            block = random_ids(2, 4, seed=seed)
            block[:, ::3] = MASK
            yield block, model.modulations(torch.tensor([0.25, 1.0]) * (seed + 1) / 4), cache
            model.extend(cache, block)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_cache_of_fixed_shape_gives_the_same(pattern, padded):
    model = tiny_model(pattern)
    fixed = steps_of_a_text(model, padded=padded, capacity=40)
    for (block, levels, cache), (_, _, other) in zip(steps_of_a_text(model, padded=padded), fixed, strict=True):
        expected = model.denoise_hidden(block, levels, cache)
        torch.testing.assert_close(model.denoise_hidden(block, levels, other), expected)


@pytest.mark.parametrize("mode", ["ar", "mock_ar", "mask_diffusion", "speculative"])
def test_text_with_a_cache_of_fixed_shape_is_the_same(mode):
    model, ids = tiny_model(), random_ids(2, 9)
    expected = getattr(model, f"generate_{mode}")(ids, 20)
    model.cache_capacity = 9 + 20 + 16
    assert torch.equal(getattr(model, f"generate_{mode}")(ids, 20), expected)
    model.cache_capacity = 14
    with pytest.raises(ArgumentError, match="capacity: found 14, expected at least"):
        getattr(model, f"generate_{mode}")(ids, 20)


def test_one_graph_serves_a_whole_text():
    torch._dynamo.reset()
    model, counter = tiny_model(dtype=torch.float32), CompileCounter()
    compiled = torch.compile(model.denoise_hidden, backend=counter, fullgraph=True)
    cache, ids = model.prefill(random_ids(2, 8), capacity=64), random_ids(2, 4)
    for seed in range(6):
        levels = model.modulations(torch.tensor([0.25, 1.0]))
        with torch.no_grad():
            found, expected = compiled(ids, levels, cache), model.denoise_hidden(ids, levels, cache)
        torch.testing.assert_close(found, expected)
        model.extend(cache, ids)
        ids = random_ids(2, 4, seed=seed)
    assert counter.frame_count == 1


def addresses(cache):
    tensors = [cache.place]
    for state in cache.denoiser:
        tensors += [] if state is None else getattr(state, "buffers", None) or [state.conv, state.ssm]
    return [each.data_ptr() for each in tensors]


def test_a_recorded_pass_can_be_run_again_after_more_text():
    """As a CUDA graph would: the operations of one pass, on the same addresses, without Python."""
    model = tiny_model(dtype=torch.float32)
    cache, block, levels = model.prefill(random_ids(2, 8), capacity=64), random_ids(2, 4), None
    levels = model.modulations(torch.tensor([0.25, 1.0]))
    recorded = make_fx(lambda block, levels: model.denoise_hidden(block, levels, cache))(block, levels)
    where, seen = addresses(cache), []
    for seed in range(5):
        block, levels = random_ids(2, 4, seed=seed), model.modulations(torch.tensor([0.5, 0.1 * seed]))
        found = recorded(block, levels)
        assert torch.equal(found, model.denoise_hidden(block, levels, cache))
        seen.append(found)
        model.extend(cache, random_ids(2, 1 + seed, seed=20 + seed))
        assert addresses(cache) == where
    assert len({each.sum().item() for each in seen}) == len(seen)


# --- experts that a block shares ---


def one_row_at_a_time(scores, count, top):
    """The experts of each token by loops: of a row the `count` best, and of them its own `top`."""
    chosen = []
    for row in scores.tolist():
        best = sorted(range(EXPERTS), key=lambda expert: -max(token[expert] for token in row))[:count]
        chosen += [sorted(best, key=lambda expert: -token[expert])[:top] for token in row]
    return chosen


@pytest.mark.parametrize("count", range(TOP, EXPERTS + 1))
def test_the_tokens_of_a_block_share_experts(count):
    scores = drawn(3, 5, EXPERTS, seed=1)
    shared = modeling.shared_experts_only(scores, count)
    assert torch.equal(shared.isinf(), (shared == -torch.inf)) and torch.equal(
        shared[~shared.isinf()], scores[~shared.isinf()]
    )
    assert ((~shared.isinf()).any(1).sum(-1) == count).all()
    found = shared.topk(TOP, dim=-1).indices.flatten(0, 1).sort().values
    assert found.tolist() == [sorted(each) for each in one_row_at_a_time(scores, count, TOP)]


def most_experts(tower, rows, run):
    """The most different experts that a row has in a layer of a tower while `run` runs."""
    counts = []

    def count(_, __, output):
        counts.extend(len(row.unique()) for row in output[1].view(rows, -1))

    hooks = [each.register_forward_hook(count) for each in tower.modules() if isinstance(each, modeling.Router)]
    run()
    for hook in hooks:
        hook.remove()
    return max(counts)


def test_a_limit_of_experts_is_that_of_blocks_alone():
    model, ids = tiny_model(), random_ids(2, 9)
    top, every = model.config.num_experts_per_tok, model.config.n_routed_experts

    def text(experts, ids=ids):
        return model.generate_mask_diffusion(ids, 8, experts_per_block=experts)

    assert most_experts(model.denoiser_tower, 2, lambda: text(None)) > top
    assert most_experts(model.denoiser_tower, 2, lambda: text(top)) == top
    assert most_experts(model.context_tower, 2, lambda: text(top)) > top
    assert torch.equal(text(every), text(None))
    # A row is decided by itself.
    assert torch.equal(text(top), torch.cat([text(top, row) for row in ids.split(1)]))


def test_a_limit_of_experts_is_refused_where_it_means_nothing():
    model, ids = tiny_model(), random_ids(1, 5)
    top, every = model.config.num_experts_per_tok, model.config.n_routed_experts
    for count in (top - 1, every + 1):
        with pytest.raises(ArgumentError, match=f"experts_per_block: found {count}, expected {top} to {every}"):
            model.generate_mask_diffusion(ids, 4, experts_per_block=count)
    with pytest.raises(ArgumentError, match="experts_per_block: found 2, expected None: `generate_mask_diffusion`"):
        model.generate(ids, max_new_tokens=4, experts_per_block=2)
    for custom in ("speculative", "mock_ar"):
        with pytest.raises(ArgumentError, match="experts_per_block"):
            model.generate(ids, max_new_tokens=4, custom_generate=custom, experts_per_block=2)
    model.generate(ids, max_new_tokens=4, custom_generate="mask_diffusion", experts_per_block=top)
