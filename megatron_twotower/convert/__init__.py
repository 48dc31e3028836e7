"""Weights between Hugging Face folders, Megatron modules and checkpoints, tensor by tensor."""
