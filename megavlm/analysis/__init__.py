"""The laboratory: where attention goes, which layers can do without image tokens, and how the gradients of the two tasks agree.

All instruments work on the checkpoints of a run (`megavlm analyze`). `attention` and `gradients` also work while a run trains
(`megavlm.observers.instruments`).
"""
