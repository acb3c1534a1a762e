"""megavlm: train unified vision-language models with ZeRO-3, spending fewer FLOPs on image tokens.

The way of the data, one module per arrow::

    shards --data.lane--> samples --data.encode--> tokens --data.packer--> pack + route
           --model.backbone--> (loss, weight) per task --engine.trainer--> step

Shape letters used throughout: T tokens of a pack, K active tokens of a stage, S sequences (samples) of a
pack, D model width, H heads, V vocabulary, N image spans, M labelled rows.
"""

import os

if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # torch's older name
    # before torch is imported, which reads it: packs of many shapes leave holes in fixed segments
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

__version__ = "0.1.0"
