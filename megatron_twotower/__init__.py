"""Train two-tower diffusion language models on Megatron Core."""

import logging

__version__ = "0.1.0"

# transformers imports torchao wherever it is installed. torchao 0.18 then warns of kernels for CUDA
# that a CPU cannot load, and torch of how torchao registers types; nothing here uses either.
for _name, _words in (("torchao", "Failed to load"), ("torch.utils._pytree", "register_constant")):
    logging.getLogger(_name).addFilter(lambda record, words=_words: words not in record.getMessage())
