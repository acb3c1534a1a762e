"""The commands under `megavlm analyze`. Tested by `tests/analysis/test_report.py`."""

from megavlm.cli.arguments import Positive
from megavlm.errors import ConfigError

# imports of the heavy parts stand in the commands, so that --help and mistakes answer at once


class AnalyzeCommands:
    """Look into a trained run: where attention goes, which layers need image tokens, how the gradients of the tasks agree.

    Results go to RUN/analysis/ as JSON and PNG, and into the run's TensorBoard. Samples are the first ones of the training's
    sources, or held-out shards: --shards="data/digits/{understanding,generation}-test-00.tar"
    """

    def attention(self, run: str, shards=None, num_packs: Positive = 8, num_rows: Positive = 64, **overrides):
        """Say where attention goes, by layer, head, task and kind of query.

        Heads are key/value heads; a query is text or image.

        The figures: shares on text, image, special and sink tokens, entropy, and the effective number of image tokens. Some rows of every
        sequence are computed again in float32, from the queries and keys that the fused kernel gets.

        Args:
            run: The run folder (the newest checkpoint is used), or one checkpoint in it.
            shards: Held-out shards in megavlm's own format, braces expand; by default the training's sources.
            num_packs: Packs to look at.
            num_rows: Most rows of one kind of query in one sequence.
            overrides: Settings to change: --evaluation.route=trained uses the training's route instead of the dense one.
        """
        from megavlm.analysis.report import analyze_attention
        from megavlm.analysis.subject import Subject

        _show(*analyze_attention(Subject(str(run), shards, num_packs, overrides), num_rows))

    def drops(
        self,
        run: str,
        flops_share: float | None = None,
        shared: bool = False,
        shards=None,
        num_packs: Positive = 8,
        keep_ratios=(0.1, 0.25, 0.5, 0.75),
        **overrides,
    ):
        """Say what it costs when image tokens leave; suggest a route.

            megavlm analyze drops runs/mine --flops_share=0.6

        Images that are read leave for good after a layer; images that are drawn come back for the last one. With --flops_share, bypasses
        are tried as well, and RUN/analysis/route.yaml is written. Nothing is trained.

        Args:
            run: The run folder (the newest checkpoint is used), or one checkpoint in it.
            flops_share: Most forward FLOPs of the suggested route, as a share of the dense ones on these packs, 0 to 1.
            shared: Suggest one block of layers for both tasks (`shared_bypass`).
            shards: Held-out shards in megavlm's own format, braces expand; by default the training's sources.
            num_packs: Packs to measure on.
            keep_ratios: Shares of the tokens that bypasses keep.
            overrides: Settings to change.
        """
        from rich import print as show

        from megavlm.analysis.report import analyze_drops
        from megavlm.analysis.subject import Subject

        ratios = keep_ratios if isinstance(keep_ratios, (list, tuple)) else (keep_ratios,)
        if not all(isinstance(ratio, (int, float)) and 0 < ratio <= 1 for ratio in ratios):
            raise ConfigError(
                f"keep_ratios: {keep_ratios!r} are not shares\n  do:    give numbers above 0 and up to 1: --keep_ratios=0.25,0.5"
            )
        subject = Subject(str(run), shards, num_packs, overrides)
        table, chosen, written = analyze_drops(subject, ratios, None if flops_share is None else float(flops_share), bool(shared))
        _show(table, written)
        if chosen:
            show(f"leaves {chosen.flops_share:.1%} of the forward FLOPs, loss {chosen.weighted_rise:+.4f} untrained; for your recipe:\n")
            print(chosen.recipe())

    def geometry(self, run: str, shards=None, num_packs: Positive = 4, num_images: Positive = 128, **overrides):
        """Compare the tasks at every checkpoint that still exists: their gradients, and their states of the same images.

        Gradients: cosine, norms and interference, per layer and part (norms, q, k, v, o, mlp), embedding and head. States: linear CKA
        between an image that is read and the same image drawn, layer by layer.

        Args:
            run: The run folder. Keep checkpoints with --checkpoint.keep_every_steps while it trains.
            shards: Held-out shards in megavlm's own format, braces expand; by default the training's sources.
            num_packs: Packs to take gradients of.
            num_images: Images whose read and drawn states are compared.
            overrides: Settings to change: --evaluation.route=trained takes gradients along the training's route.
        """
        from megavlm.analysis.report import analyze_geometry
        from megavlm.analysis.subject import Subject

        _show(*analyze_geometry(Subject(str(run), shards, num_packs, overrides), num_images))


def _show(table, written) -> None:
    from rich import print as show

    show(table)
    show("\n".join(f"written: {path}" for path in written))
