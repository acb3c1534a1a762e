"""The step: processes, schedule, checkpoints, and the trainer that puts them together over DeepSpeed ZeRO-3."""
