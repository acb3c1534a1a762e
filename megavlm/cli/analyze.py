"""The commands under `megavlm analyze`."""

from megavlm.cli.arguments import Positive
from megavlm.errors import ConfigError

# imports of the heavy parts stand in the commands, so that --help and mistakes answer at once


class AnalyzeCommands:
    """Look into a trained run: where attention goes, what image tokens are needed for, how the tasks pull on the weights.

    Everything is written to RUN/analysis/ as JSON and PNG, and into the run's TensorBoard. Samples are the first ones of the
    training's sources, or held-out shards: --shards="data/digits/{understanding,generation}-test-00.tar"
    """

    def attention(self, run: str, shards=None, num_packs: Positive = 8, num_rows: Positive = 64, **overrides):
        """Say where attention goes, by layer, key/value head, task, and whether text or image asks.

        Shares on text, image, special and sink tokens, entropy, and the effective number of image tokens. Some rows of every sequence are
        computed again in float32 from the queries and keys that the fused kernel gets.

        Args:
            run: The run folder; its newest checkpoint is taken.
            shards: Held-out shards in megavlm's own format, braces expand; the training's sources if not given.
            num_packs: Packs to look at.
            num_rows: Most rows of one kind in one sequence.
            overrides: Settings to change: --evaluation.route=trained looks along the training's route.
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
        """Say how much the losses rise when image tokens leave after a layer, and suggest a route for a share of the FLOPs.

            megavlm analyze drops runs/mine --flops_share=0.6

        Images that are read leave for good; those that are drawn skip all layers up to the last, in which they must be back for their loss.
        With a share, bypasses of parts of the tokens are tried as well, and the block `routing:` of a recipe is printed and written
        to RUN/analysis/route.yaml. Nothing is trained: the rise is what leaving costs a model that has not learnt to live with it.

        Args:
            run: The run folder; its newest checkpoint is taken.
            flops_share: Forward FLOPs that the route may leave of the dense ones on these packs, 0 to 1.
            shared: Suggest the same block of layers for both tasks (`shared_bypass`).
            shards: Held-out shards in megavlm's own format, braces expand; the training's sources if not given.
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
        """Compare the tasks at every checkpoint that still exists: gradients per block, and states of the same images.

        Cosine, norms and interference of the tasks' gradients per layer and part (norms, q, k, v, o, mlp), embedding and head; linear CKA
        between the states of an image read and of the same image drawn, layer by layer.

        Args:
            run: The run folder. Keep checkpoints with --checkpoint.keep_every_steps while it trains.
            shards: Held-out shards in megavlm's own format, braces expand; the training's sources if not given.
            num_packs: Packs to take gradients of.
            num_images: Drawn images to compare with their read versions.
            overrides: Settings to change: --evaluation.route=trained takes gradients along the training's route.
        """
        from megavlm.analysis.report import analyze_geometry
        from megavlm.analysis.subject import Subject

        _show(*analyze_geometry(Subject(str(run), shards, num_packs, overrides), num_images))


def _show(table, written) -> None:
    from rich import print as show

    show(table)
    show("\n".join(f"written: {path}" for path in written))
