"""The command under `megavlm data` that trains a UniCompress plug-in. Tested by `tests/cli/test_main.py`."""

import json
from pathlib import Path

from megavlm.cli.arguments import Positive
from megavlm.errors import ConfigError

# imports of the heavy parts stand in the command, so that --help and mistakes answer at once


class CompressorCommands:
    """A part of the commands of `megavlm data`, which inherit from it."""

    def compressor(
        self,
        recipe: str,
        shards,
        out: str,
        factor: Positive = 2,
        num_global: Positive = 4,
        codebook_size: Positive = 512,
        hidden_width: Positive = 128,
        num_layers: Positive = 4,
        num_heads: Positive = 4,
        embedding_width: Positive = 16,
        steps: Positive = 2000,
        batch_images: Positive = 64,
        learning_rate: float = 1e-3,
        max_images: Positive = 1_000_000,
        seed: int = 0,
        format: str = "",
        device: str = "",
        **overrides,
    ):
        """Train a UniCompress plug-in: fewer tokens per image.

        See docs/compress.md.

            megavlm data compressor digits "data/digits/generation-train-{00..07}.tar" out

        Args:
            recipe: The recipe with the image tokenizer.
            shards: With raw images, or codes of that tokenizer.
            out: Folder to write, with reconstructions.png.
            factor: 2 or 4: blocks of 2 x 2 or 4 x 4 codes become one.
            num_global: Global tokens per image.
            codebook_size: Entries of the plug-in's codebook.
            hidden_width: Width inside the plug-in.
            num_layers: Layers of the decompressor.
            num_heads: Attention heads.
            embedding_width: Of codes, where the tokenizer has none.
            steps: Optimizer steps.
            batch_images: Images per step.
            learning_rate: Peak of the learning rate.
            max_images: Most images to read.
            seed: Seed of weights and data order.
            format: Of the samples, if the indexes do not say it.
            device: cpu or cuda; cuda where there is a GPU.
            overrides: Settings of the recipe to change.
        """
        import torch
        from pydantic import ValidationError

        from megavlm.cli.tokenizers import as_shards, source_of
        from megavlm.config import load_config
        from megavlm.data.read.shards import expand_shards
        from megavlm.data.tools.images import read_codes
        from megavlm.image_tokenizers.build import build_image_tokenizer
        from megavlm.image_tokenizers.compressor import PlugInSettings
        from megavlm.image_tokenizers.plug_in_training import Plan, train_plug_in

        config = load_config(str(recipe), overrides)
        if config.vocabulary.image_tokenizer.kind == "compressed":
            raise ConfigError(f"{recipe}: its image tokenizer is compressed already\n  do:    name a recipe with the tokenizer inside")
        device = str(device) or ("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = build_image_tokenizer(config.vocabulary.image_tokenizer, device)
        codebook_VD = tokenizer.codebook()
        sizes = {"factor": factor, "num_global": num_global, "codebook_size": codebook_size}
        sizes |= {"hidden_width": hidden_width, "num_layers": num_layers, "num_heads": num_heads}
        sizes |= {"num_dense_codes": tokenizer.codebook_size, "height": tokenizer.height, "width": tokenizer.width}
        sizes |= {
            "embedding_width": embedding_width if codebook_VD is None else codebook_VD.shape[1],
            "has_codebook": codebook_VD is not None,
        }
        try:
            settings = PlugInSettings.model_validate(sizes)
        except ValidationError as error:
            lines = [f"  {'.'.join(map(str, m['loc']))} {m['msg']} (value {m['input']!r})" for m in error.errors()]
            raise ConfigError("the plug-in cannot be made:\n" + "\n".join(lines)) from error
        plan = Plan(steps, batch_images, learning_rate, max_images=max_images, seed=seed)
        urls = expand_shards("shards", as_shards(shards))
        codes_Nhw = read_codes(urls, source_of(urls, format), tokenizer, max_images)
        metrics = train_plug_in(codes_Nhw, tokenizer, codebook_VD, settings, out=Path(str(out)), plan=plan, device=device)
        print(json.dumps({name: value for name, value in metrics.items() if name != "history"}, indent=1))
