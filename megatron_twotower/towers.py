"""The towers: one stack of layers, and two of them in lockstep.

`Tower` is a NemotronH backbone. `TwoTower` is what is trained: the denoiser with its time conditioning, beside a
frozen context tower that it does not own. The context tower is deliberately not a submodule: no wrapper, optimizer,
router-bias update or checkpoint that walks over modules can reach it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_twotower.adaln import TimeConditioning
from megatron_twotower.config import ModelConfig, RunConfig
from megatron_twotower.host import device
from megatron_twotower.layers import HANDING_ON, DenoiserLayer, Layer, RMSNorm
from megatron_twotower.records import Blocks, Handoff, NoisyBatch


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


def leave_uninitialised(tensor: Tensor) -> Tensor:
    """Megatron's init_method: weights always come from named tensors, loaded later and counted."""
    return tensor


def transformer_config(config: RunConfig) -> TransformerConfig:
    """The configuration that Megatron's layers, optimizer and schedules read."""
    model, parallel, train = config.model, config.parallel, config.train
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[train.precision]
    experts: dict[str, object] = {}
    if "E" in model.hybrid_override_pattern:
        experts = {
            "num_moe_experts": model.n_routed_experts,
            "moe_router_topk": model.num_experts_per_tok,
            "moe_ffn_hidden_size": model.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": train.router_bias_update_rate,
            "moe_router_topk_scaling_factor": model.routed_scaling_factor,
            "moe_router_dtype": train.router_dtype,
            "moe_router_load_balancing_type": "seq_aux_loss" if train.sequence_aux_loss else "none",
            "moe_aux_loss_coeff": train.sequence_aux_loss,
            "moe_token_dispatcher_type": parallel.moe_dispatcher,
            "moe_grouped_gemm": False,
        }
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=model.layer_norm_epsilon,
        activation_func=squared_relu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=leave_uninitialised,
        output_layer_init_method=leave_uninitialised,
        params_dtype=dtype,
        bf16=train.precision == "bf16",
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor_ranks,
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        **experts,
    )


class Tower(MegatronModule):
    """A NemotronH backbone: embedding, layers, final norm, head. Hidden states are (l, b, h)."""

    def __init__(
        self, model: ModelConfig, config: TransformerConfig, groups: ProcessGroupCollection, *,
        layer: Callable[..., Layer] = Layer,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self.groups = groups
        self.embedding = VocabParallelEmbedding(
            model.vocab_size, model.hidden_size, init_method=config.init_method, config=config, tp_group=groups.tp
        )
        kinds = enumerate(model.hybrid_override_pattern)
        self.layers = nn.ModuleList([layer(kind, i, model, config, groups) for i, kind in kinds])
        self.final_norm = RMSNorm(config)
        self.output_layer = ColumnParallelLinear(
            model.hidden_size, model.vocab_size, config=config, init_method=config.init_method, bias=False,
            gather_output=False, tp_group=groups.tp,
        )  # fmt: skip

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens (b, l) -> (l, b, h), this rank's part of l under sequence parallelism."""
        hidden = self.embedding(tokens).transpose(0, 1).contiguous()
        return scatter_to_sequence_parallel_region(hidden, self.groups.tp) if self._sequence_parallel else hidden

    def whole_sequence(self, hidden: Tensor) -> Tensor:
        """All of l again, for a loss whose gradient every tensor-parallel rank computes in full."""
        if not self._sequence_parallel:
            return hidden
        return gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.groups.tp)

    @property
    def _sequence_parallel(self) -> bool:
        return bool(self.config.sequence_parallel)

    def vocabulary_start(self) -> int:
        """First vocabulary entry of this rank's slice of the head."""
        return int(self.embedding.vocab_start_index)


class BackboneModel(MegatronModule):
    """A single backbone for the `ar` objective."""

    def __init__(self, config: RunConfig, megatron: TransformerConfig, groups: ProcessGroupCollection) -> None:
        super().__init__(megatron)
        self.model_type = ModelType.encoder_or_decoder
        self.tower = Tower(config.model, megatron, groups)

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Pipeline stages receive hidden states here; with one stage there is nothing to receive."""

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Tokens (b, l), and documents (b, l) where their boundaries count -> final hidden states (l, b, h)."""
        hidden, blocks = self.tower.embed(tokens), Blocks(documents=documents)
        for layer in self.tower.layers:
            hidden, _ = layer(hidden, blocks)
        return self.tower.whole_sequence(self.tower.final_norm(hidden))


class TwoTower(MegatronModule):
    """Context tower and denoiser in lockstep: layer i of one, then layer i of the other."""

    def __init__(
        self, config: RunConfig, megatron: TransformerConfig, groups: ProcessGroupCollection, context: Tower
    ) -> None:
        super().__init__(megatron)
        self.model_type = ModelType.encoder_or_decoder
        self.tower = Tower(config.model, megatron, groups, layer=DenoiserLayer)
        self.conditioning = TimeConditioning(
            config.model.hidden_size, config.conditioning, dtype=megatron.params_dtype, device=device()
        )
        for parameter in self.conditioning.parameters():
            parameter.sequence_parallel = megatron.sequence_parallel  # type: ignore[attr-defined]
        self.recompute = frozenset(config.train.recompute_layers)
        self._frozen = (context,)  # in a tuple: not a submodule
        # The context tower goes no further than the last layer that hands something on.
        handing_on = [i for i, kind in enumerate(config.model.hybrid_override_pattern) if kind in HANDING_ON]
        self.context_layers = max(handing_on, default=-1) + 1

    @property
    def context(self) -> Tower:
        return self._frozen[0]

    def set_input_tensor(self, input_tensor: list[Tensor | None]) -> None:
        """Pipeline stages receive hidden states here; with one stage there is nothing to receive."""

    def forward(self, batch: NoisyBatch) -> Tensor:
        """Final hidden states (l, r b, h) of the noisy stream of every block."""
        conditioning, blocks = self.conditioning(batch.times), Blocks(batch.block, batch.documents)
        with torch.no_grad():
            clean = self.context.embed(batch.tokens)
        noisy = self.tower.embed(batch.noisy)
        for i in range(len(self.tower.layers)):
            handoff = None
            if i < self.context_layers:
                with torch.no_grad():
                    clean, handoff = self.context.layers[i](clean, blocks)
            noisy = self._denoise(i, noisy, conditioning, handoff, blocks)
        return self.tower.whole_sequence(self.tower.final_norm(noisy))

    def _denoise(
        self, number: int, noisy: Tensor, conditioning: Tensor, handoff: Handoff, blocks: Blocks
    ) -> Tensor:  # fmt: skip
        layer, context = self.tower.layers[number], self.context.layers[number]
        assert isinstance(layer, DenoiserLayer) and isinstance(context, Layer)
        if layer.kind not in self.recompute or not torch.is_grad_enabled():
            return layer.denoise(noisy, conditioning, handoff, blocks)
        # The forward pass reads the hand-off as it came; the backward pass makes it again from what is held.
        at_hand, again = [handoff], context.held(handoff, blocks)

        def run(noisy: Tensor, conditioning: Tensor) -> Tensor:
            ready = at_hand.pop() if at_hand else again()
            return layer.denoise(noisy, conditioning, ready, blocks)

        return tensor_parallel.checkpoint(run, False, noisy, conditioning)


def build_context_tower(config: RunConfig, megatron: TransformerConfig, groups: ProcessGroupCollection) -> Tower:
    """A tower without gradients, in evaluation mode for good: its weights are the caller's to load."""
    return Tower(config.model, megatron, groups).requires_grad_(False).eval()
