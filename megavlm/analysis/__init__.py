"""The laboratory: where attention goes, which layers can do without image tokens, and how the two tasks pull on one set of weights.

`attention` and `gradients` also work while a run trains (`during`); all of them on its checkpoints (`megavlm analyze`).
"""
