"""mlx-lm's llama where attention slides in every layer (Mistral 7B v0.1), which its own class does not take."""

from dataclasses import replace

from mlx_lm.models import llama

ModelArgs = llama.ModelArgs


class Model(llama.Model):
    """A Llama all of whose layers slide."""

    def __init__(self, args: llama.ModelArgs):
        super().__init__(replace(args, layer_types=["full_attention"] * args.num_hidden_layers))
        self.model.swa_idx = 0
        for block in self.model.layers:
            block.use_sliding = True
