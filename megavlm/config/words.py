"""What users look for under other names, and what the blocks of a recipe look like. Tested by `tests/config/test_words.py`."""

SOUGHT = {
    **dict.fromkeys(("lora", "peft", "adapter", "qlora"), "there is no LoRA: all weights are trained"),
    **dict.fromkeys(("freeze", "frozen", "trainable"), "nothing can be frozen: all weights are trained"),
    "ema": "there is no average of the weights",
    **dict.fromkeys(("quantization", "load_in_4bit", "load_in_8bit"), "weights are not quantised; see model.dtype"),
    **dict.fromkeys(
        ("batch_size", "global_batch_size", "micro_batch_size", "per_device_train_batch_size", "train_batch_size"),
        "a step has data.num_lanes packs of up to data.pack_tokens tokens; set these",
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "gradient_accumulation", "accumulate_grad_batches"),
        "each process runs data.num_lanes / processes packs in a step; set data.num_lanes",
    ),
    **dict.fromkeys(("max_length", "max_seq_length", "model_max_length", "cutoff_len", "seq_len"), "set data.pack_tokens"),
    **dict.fromkeys(
        ("num_epochs", "num_train_epochs", "max_epochs"), "a run has optimizer.num_steps; `megavlm init` counts them for your data"
    ),
    **dict.fromkeys(("max_steps", "num_train_steps", "total_steps"), "set optimizer.num_steps"),
    **dict.fromkeys(("lr", "peak_lr"), "set optimizer.learning_rate"),
    **dict.fromkeys(
        ("scheduler", "lr_scheduler", "lr_scheduler_type"),
        "set optimizer.schedule: cosine, wsd, linear or constant, after optimizer.warmup_steps",
    ),
    **dict.fromkeys(("max_grad_norm", "grad_clip", "clip_grad_norm"), "set optimizer.gradient_clipping"),
    **dict.fromkeys(("fp16", "bf16", "precision", "mixed_precision"), "set model.dtype"),
    **dict.fromkeys(("gradient_checkpointing", "grad_checkpointing"), "set model.activation_checkpointing"),
    **dict.fromkeys(
        ("offload", "offload_optimizer", "cpu_offload", "zero_stage", "stage"), "it is ZeRO-3 without offloading; see engine.deepspeed"
    ),
    **dict.fromkeys(("output_dir", "out_dir", "log_dir"), "set run_dir"),
    **dict.fromkeys(("resume", "resume_from", "resume_from_checkpoint"), "a run goes on by itself when its run_dir has a checkpoint"),
    **dict.fromkeys(
        ("pretrained", "model_name_or_path", "model_name", "checkpoint_path"), "set model.architecture and init_from to the folder"
    ),
    **dict.fromkeys(("save_steps", "save_every"), "set checkpoint.every_steps"),
    **dict.fromkeys(("save_total_limit",), "set checkpoint.keep_last"),
    **dict.fromkeys(("eval_steps", "val_check_interval", "eval_every", "evaluation_strategy"), "set validation.every_steps"),
    **dict.fromkeys(("val", "val_data", "eval_data", "eval_dataset", "valid", "dev"), "name held-out shards in validation.sources"),
    **dict.fromkeys(("train_data", "dataset", "datasets", "train_dataset", "data_path"), "name shards in data.sources"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance_scale"), "set evaluation.guidance"),
    **dict.fromkeys(("tokenizer", "text_tokenizer"), "set vocabulary.text_model"),
    **dict.fromkeys(
        ("shuffle", "shuffle_buffer"), "lanes choose from data.look_ahead_samples samples; shuffle the samples when shards are written"
    ),
    **dict.fromkeys(("report_to", "wandb_project"), "figures go to RUN/tensorboard"),
    **dict.fromkeys(("attn_implementation", "flash_attention", "use_flash_attn"), "packed attention takes the best kernel of the machine"),
}
"""Name that no setting has -> what to say instead of the nearest name."""

EXAMPLES = {
    "run_dir": "run_dir: runs/mine",
    "model": "model: {architecture: {model_type: qwen3, hidden_size: 128, num_hidden_layers: 4, num_attention_heads: 4, …}}",
    "model.architecture": "architecture: models/Qwen3-0.6B",
    "vocabulary": "vocabulary: {text_model: data/text.model, image_tokenizer: {kind: pixel, height: 8, width: 8}}",
    "vocabulary.text_model": "text_model: data/text.model (`megavlm data tokenizer` makes one)",
    "data": 'data: {sources: {captions: {shards: "data/captions/{000000..000009}.tar"}}}',
    "data.sources": 'sources: {captions: {shards: "data/captions/{000000..000009}.tar"}}',
    "optimizer": "optimizer: {num_steps: 1000, learning_rate: 1e-3, warmup_steps: 100}",
    "optimizer.num_steps": "num_steps: 1000",
    "optimizer.learning_rate": "learning_rate: 1e-3",
}
"""Setting without a default -> how it may look."""
