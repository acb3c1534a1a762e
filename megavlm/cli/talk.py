"""The commands that ask a trained model and let it draw. Tested by `tests/talk/test_commands.py`."""

from pathlib import Path

from megavlm.cli.arguments import NotNegative, Positive

# imports of the heavy parts stand in the commands, so that --help and mistakes answer at once


class TalkCommands:
    """A part of the commands of `megavlm`, which inherit from it."""

    def ask(self, run: str, *words: str, max_tokens: Positive = 64, temperature: float = 0.0, top_k: NotNegative = 0, **overrides):
        """Ask about images. The answer is printed as it comes.

            megavlm ask runs/mine photo.png "What is this?"
            megavlm ask runs/mine a.png b.png "What differs?" "Which is older?"      two turns of one conversation

        Args:
            run: The run folder, one checkpoint in it, or an exported folder.
            words: Images and questions in order; what ends like an image's name is one. Every question is answered, with all before it.
            max_tokens: Most tokens of an answer.
            temperature: Of the sampling; 0 takes the most likely token.
            top_k: Draw among the k most likely tokens; 0 is all.
            overrides: Settings of the run to change: --evaluation.route=trained --seed=1
        """
        import sys

        from megavlm.parts.trained import load_trained
        from megavlm.talk.talker import Talker, Writing, read_settings
        from megavlm.talk.words import read_parts, turns_of

        turns = [read_parts(turn) for turn in turns_of([str(word) for word in words])]
        talker = Talker(load_trained(str(run), overrides)[0])
        given = {"max_tokens": max_tokens, "temperature": temperature, "top_k": top_k, "seed": talker.model.seed}
        writing = read_settings(Writing, given)
        said = []
        for turn in turns:
            said += turn
            shown = ""
            for answer in talker.answer(said, writing):
                print(answer.text[len(shown) :], end="", flush=True)
                shown = answer.text
            print(flush=True)
            if answer.ended == "length":
                print(f"(cut after {answer.num_tokens} tokens: see --max_tokens)", file=sys.stderr)
            said.append(shown)

    def generate(self, run: str, *words: str, out: str = "grid.png", num: Positive = 10, **overrides):
        """Draw images for a prompt: a text, or texts and images in order.

            megavlm generate runs/mine "a handwritten seven" --out grid.png
            megavlm generate runs/mine photo.png "the same at night" --num=4

        Args:
            run: The run folder, one checkpoint in it, or an exported folder.
            words: What to draw: "a handwritten seven". What ends like an image's name is one.
            out: Where the grid of drawings goes (PNG).
            num: How many.
            overrides: Settings to change: --evaluation.temperature=0.8 --evaluation.top_k=8 --evaluation.guidance=3 --seed=1
        """
        from megavlm.errors import MegavlmError
        from megavlm.evaluation.prompts import check_length, to_draw
        from megavlm.parts.trained import load_trained
        from megavlm.system.pictures import save_grid
        from megavlm.talk.talker import Talker
        from megavlm.talk.words import is_picture, read_parts

        words = tuple(str(word) for word in words)
        if not words:
            raise MegavlmError('there is nothing to draw\n  do:    megavlm generate RUN "a handwritten seven"')
        parts = read_parts(words)
        talker = Talker(load_trained(str(run), overrides)[0])
        check_length(to_draw(talker.model.encoder, parts), talker.longest)
        images = talker.model.image_tokenizer.decode(talker.model.draw([parts] * num))
        prompt = " ".join(Path(word).name if is_picture(word) else word for word in words)
        save_grid(images, [""] * num, Path(str(out)), title=prompt)
        print(f"{num} drawings of {prompt!r}: {out}")

    def batch(
        self,
        run: str,
        requests: str,
        out: str,
        num: Positive = 1,
        max_tokens: Positive = 64,
        batch_size: Positive = 64,
        max_bad: NotNegative = 100,
        **overrides,
    ):
        """Answer and draw all requests of a file; writes OUT/index.jsonl and the pictures.

            megavlm batch runs/mine requests.jsonl out

        Args:
            run: The run folder, one checkpoint in it, or an exported folder.
            requests: JSON lines: {"question": "…", "image": "a.png"} is answered, {"prompt": "…"} is drawn; "images" takes several.
                Paths begin at the file's folder.
            out: New folder.
            num: Drawings per prompt.
            max_tokens: Most tokens of an answer.
            batch_size: Requests at a time; another size gives other drawings.
            max_bad: Most lines that may be unusable.
            overrides: Settings of the run to change: --evaluation.guidance=3 --seed=1
        """
        from megavlm.parts.trained import load_trained
        from megavlm.talk.batch import Batch
        from megavlm.talk.talker import Talker

        talker = Talker(load_trained(str(run), overrides)[0])
        sizes = {"num": num, "max_tokens": max_tokens, "batch_size": batch_size, "max_bad": max_bad}
        print(Batch(talker, Path(str(requests)), Path(str(out)), **sizes).run())

    def serve(self, run: str, host: str = "127.0.0.1", port: NotNegative = 7860, page: bool = True, **overrides):
        """Serve a page to ask and draw, and an endpoint for clients.

        The endpoint is what clients of OpenAI understand. Needs `pip install 'megavlm[serve]'`.

            megavlm serve runs/mine            then open http://127.0.0.1:7860

        Nothing is sent or fetched. Requests are done one after another. Ctrl-C ends it.

        Args:
            run: The run folder, one checkpoint in it, or an exported folder.
            host: Address to listen on; another than 127.0.0.1 lets other machines use the model.
            port: Port; 0 takes a free one.
            page: --nopage serves the endpoint alone.
            overrides: Settings of the run to change: --evaluation.guidance=3 --evaluation.route=trained
        """
        from megavlm.talk.serve import serve

        serve(str(run), str(host), port, overrides, has_page=bool(page))
