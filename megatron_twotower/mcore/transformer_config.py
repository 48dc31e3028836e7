"""Megatron's `TransformerConfig` of a run."""

import torch.nn.functional as F
from megatron.core import activations
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_twotower.common.device import is_cpu
from megatron_twotower.config.pipeline_stages import pipeline_stages
from megatron_twotower.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_twotower.mcore import modules


def squared_relu(x: Tensor) -> Tensor:
    """The activation of all MLPs: the square of ReLU."""
    return F.relu(x).square()


def leave_uninitialised(tensor: Tensor) -> Tensor:
    """Megatron's `init_method`: all weights are loaded from named tensors after construction."""
    return tensor


def transformer_config(config: RunConfig, *, transformer_impl: str | None = None) -> TransformerConfig:
    """The configuration that Megatron's layers, optimizer and schedules read.

    Args:
        config: The configuration of the run.
        transformer_impl: A key of `modules.LAYER_MODULES`. `None` chooses by the configuration and
            by what is installed.

    Raises:
        UserError: The configuration asks for modules or kernels that are not available.
    """
    model, parallel, train = config.model, config.parallel, config.train
    transformer_impl = transformer_impl or modules.choose_transformer_impl(config)
    implementation = modules.implementation_fields(config, transformer_impl=transformer_impl)
    fused_activation = implementation.get("use_fused_weighted_squared_relu")
    pipeline: dict[str, object] = {}
    if parallel.pipeline > 1:
        # Megatron's default is to batch sends and receives. With interleaved stages that would mix
        # the forward and backward messages between two stages.
        interleaved = parallel.pipeline_chunks > 1
        pipeline = {
            "pipeline_model_parallel_size": parallel.pipeline,
            "pipeline_model_parallel_layout": _megatron_layout(model, parallel),
            "pipeline_dtype": implementation["params_dtype"],
            # Gloo reads the output until an overlapped send has finished. NCCL keeps its own
            # reference.
            "deallocate_pipeline_outputs": not (interleaved and is_cpu()),
            "overlap_p2p_comm": interleaved,
            "batch_p2p_comm": not interleaved,
        }
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
        # Megatron fuses the activation only if it is Megatron's own function.
        activation_func=activations.squared_relu if fused_activation else squared_relu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=leave_uninitialised,
        output_layer_init_method=leave_uninitialised,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.expert_tensor_ranks,
        calculate_per_token_loss=True,
        **implementation,
        **pipeline,
        **experts,
    )


def _megatron_layout(model: ModelConfig, parallel: ParallelConfig) -> list[list[str]]:
    """The pipeline stages in Megatron's notation, which allows stages of any length."""
    layout = [["decoder"] * len(stage.layers) for stage in pipeline_stages(model, parallel)]
    return [["embedding", *layout[0]], *layout[1:-1], [*layout[-1], "loss"]]
