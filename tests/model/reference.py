"""The dense reference: computes with masks, in the model's precision, what the router computes with gathers.

Every row goes through every layer; rows that are inactive in a stage are masked as keys, and their outputs are thrown away.
"""

import torch

from megavlm.model.backbone import Backbone


def reference_loss(backbone: Backbone, pack) -> torch.Tensor:
    """Sums of cross-entropy per (source, task), like ``backbone(pack)``."""
    lm, model = backbone.causal_lm, backbone.causal_lm.model
    lm.config._attn_implementation = "sdpa"
    lengths = torch.tensor(pack.sequences.lengths)
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    causal_TT = torch.ones(pack.num_tokens, pack.num_tokens, dtype=torch.bool).tril()
    inside_TT = causal_TT & (document_T[:, None] == document_T)
    h = model.embed_tokens(pack.tokens_T)[None]
    rotary = model.rotary_emb(h, pack.positions_T[None])
    for stage in pack.route.stages:
        active_T = torch.zeros(pack.num_tokens, dtype=torch.bool)
        active_T[slice(None) if stage.active_K is None else stage.active_K] = True
        # inactive rows see themselves, so that their thrown-away outputs are numbers
        mask_TT = (inside_TT & active_T) | torch.eye(pack.num_tokens, dtype=torch.bool)
        for layer in model.layers[stage.first_layer : stage.end_layer]:
            out = layer(h, attention_mask=mask_TT[None, None], position_embeddings=rotary)
            h = torch.where(active_T[None, :, None], out, h)
    logits_TV = lm.lm_head(model.norm(h[0]))
    loss_M = torch.nn.functional.cross_entropy(logits_TV[pack.rows_M].float(), pack.targets_M, reduction="none")
    return torch.zeros(backbone.num_groups).index_add(0, pack.groups_M, loss_M)
