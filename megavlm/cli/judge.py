"""The commands under `megavlm judge`. Tested by `tests/evaluation/sets/test_judge.py`."""

import json
from pathlib import Path

from megavlm.cli.arguments import NotNegative, Positive

# imports of the heavy parts stand in the commands, so that --help and mistakes answer at once


class JudgeCommands:
    """Judge a run on published sets from local files; nothing is fetched.

    Each kind reads a file, asks the newest checkpoint (or the one that you name), and writes the figures and every answer to RUN/judged/.
    Entries that cannot be used (broken line, missing image) are named and counted; more than --max_bad of them end the judging. See
    docs/judging.md.

    Any setting of the run can be changed: --evaluation.route=trained --evaluation.guidance=3 --seed=1
    """

    def vqa(
        self,
        run: str,
        questions: str,
        annotations: str = "",
        images: str = "",
        image_name: str = "",
        template: str = "{question}",
        max_tokens: Positive = 16,
        batch_size: Positive = 64,
        max_bad: NotNegative = 100,
        **overrides,
    ):
        """Judge short answers (VQAv2, OK-VQA, GQA and the like): exact match, and VQA score where a question has ten answers.

            megavlm judge vqa runs/mine OpenEnded_val2014_questions.json --annotations=val2014_annotations.json --images=val2014
            megavlm judge vqa runs/mine testdev_balanced_questions.json --images=gqa/images --image_name="{}.jpg"

        Args:
            run: The run folder, or one checkpoint in it.
            questions: VQA's or GQA's own file; or a JSON list, or JSON lines, with image, question, and answer or answers.
            annotations: VQA's annotations, where the questions are VQA's file.
            images: Folder of the images; by default the file's own folder.
            image_name: Pattern that makes a file name of an image's id or name: "{}.jpg", "COCO_val2014_{:012d}.jpg".
            template: The prompt: "{question} Answer with one word."
            max_tokens: Most tokens of an answer.
            batch_size: Questions per batch.
            max_bad: Most entries that may be unusable.
            overrides: Settings of the run to change.
        """
        from megavlm.evaluation.sets.vqa import VqaScore, read_questions

        judge = _judge(run, "vqa", questions, batch_size, max_bad, overrides, template=template, max_tokens=max_tokens)
        second = Path(str(annotations)) if annotations else None
        items = read_questions(judge.bad.file, second, str(image_name), str(template), bad=judge.bad)
        _show(judge.read(items, _folder(images, judge), max_tokens, VqaScore()))

    def yesno(
        self,
        run: str,
        questions: str,
        images: str = "",
        template: str = "{question}",
        max_tokens: Positive = 8,
        batch_size: Positive = 64,
        max_bad: NotNegative = 100,
        **overrides,
    ):
        """Judge yes-or-no answers, as in POPE: accuracy, precision, recall, F1, share of yes.

            megavlm judge yesno runs/mine coco_pope_adversarial.json --images=val2014

        Args:
            run: The run folder, or one checkpoint in it.
            questions: JSON lines with image, text (or question) and label (yes or no).
            images: Folder of the images; by default the file's own folder.
            template: The prompt: "{question} Answer yes or no."
            max_tokens: Most tokens of an answer.
            batch_size: Questions per batch.
            max_bad: Most entries that may be unusable.
            overrides: Settings of the run to change.
        """
        from megavlm.evaluation.sets.yes_no import YesNoScore, read_yes_no

        judge = _judge(run, "yesno", questions, batch_size, max_bad, overrides, template=template, max_tokens=max_tokens)
        items = read_yes_no(judge.bad.file, str(template), bad=judge.bad)
        _show(judge.read(items, _folder(images, judge), max_tokens, YesNoScore()))

    def captions(
        self,
        run: str,
        captions: str,
        images: str = "",
        prompt: str = "Describe the image.",
        max_tokens: Positive = 48,
        batch_size: Positive = 64,
        max_bad: NotNegative = 100,
        **overrides,
    ):
        """Judge captions against those of people: CIDEr-D and BLEU-4.

        Args:
            run: The run folder, or one checkpoint in it.
            captions: JSON lines, or a JSON list, with image and captions.
            images: Folder of the images; by default the file's own folder.
            prompt: The prompt; use one that the model was trained with.
            max_tokens: Most tokens of a caption.
            batch_size: Images per batch.
            max_bad: Most entries that may be unusable.
            overrides: Settings of the run to change.
        """
        from megavlm.evaluation.sets.captions import CaptionScore, read_captions

        judge = _judge(run, "captions", captions, batch_size, max_bad, overrides, prompt=prompt, max_tokens=max_tokens)
        items = read_captions(judge.bad.file, str(prompt), judge.bad)
        _show(judge.read(items, _folder(images, judge), max_tokens, CaptionScore()))

    def geneval(
        self,
        run: str,
        prompts: str,
        detector: str,
        num: Positive = 4,
        min_score: float = 0.3,
        min_score_counting: float = 0.9,
        batch_size: Positive = 64,
        max_bad: NotNegative = 100,
        **overrides,
    ):
        """Judge objects in drawings: presence, number, colour and place. GenEval's checks, with a detector of yours.

            megavlm judge geneval runs/mine evaluation_metadata.jsonl --detector=detector.py:detect

        Args:
            run: The run folder, or one checkpoint in it.
            prompts: JSON lines with prompt and include; exclude and tag are optional.
            detector: module:function or file.py:function; takes an image, returns a list of class, box, score, color.
            num: Drawings per prompt.
            min_score: Detections with a lower score are left out.
            min_score_counting: The same for the tag `counting`.
            batch_size: Drawings per batch; another size gives other drawings.
            max_bad: Most entries that may be unusable.
            overrides: Settings of the run to change.
        """
        from megavlm.evaluation.sets.entries import find_function
        from megavlm.evaluation.sets.objects import ObjectScore, read_requests

        score = ObjectScore(find_function(str(detector), "--detector"), min_score, min_score_counting)
        chosen = {"detector": detector, "min_score": min_score, "min_score_counting": min_score_counting}
        judge = _judge(run, "geneval", prompts, batch_size, max_bad, overrides, **chosen)
        _show(judge.draw(read_requests(judge.bad.file, judge.bad), num, score))

    def fid(
        self,
        run: str,
        prompts: str,
        real: str,
        features: str,
        num: Positive = 1,
        batch_size: Positive = 64,
        max_bad: NotNegative = 100,
        **overrides,
    ):
        """Judge the distance of drawings from real images: FID, with features of yours.

            megavlm judge fid runs/mine captions.txt --real=real.npz --features=inception.py:pool

        Args:
            run: The run folder, or one checkpoint in it.
            prompts: A text file with a prompt per line, or JSON with "prompt".
            real: Features of real images: npy [N, D], or npz with `features`, or npz with `mu` and `sigma`.
            features: module:function or file.py:function; takes images [N, H, W, 3], returns features [N, D].
            num: Drawings per prompt.
            batch_size: Drawings per batch; another size gives other drawings.
            max_bad: Most entries that may be unusable.
            overrides: Settings of the run to change.
        """
        from megavlm.evaluation.sets.entries import find_function
        from megavlm.evaluation.sets.features import FidScore, read_prompts, real_moments

        score = FidScore(find_function(str(features), "--features"), real_moments(Path(str(real))))
        judge = _judge(run, "fid", prompts, batch_size, max_bad, overrides, real=real, features=features)
        _show(judge.draw(read_prompts(judge.bad.file, judge.bad), num, score))

    def clip(
        self,
        run: str,
        prompts: str,
        image_features: str,
        text_features: str,
        num: Positive = 1,
        batch_size: Positive = 64,
        max_bad: NotNegative = 100,
        **overrides,
    ):
        """Judge how well drawings match their prompts: CLIP score, with features of yours.

            megavlm judge clip runs/mine captions.txt --image_features=clip.py:images --text_features=clip.py:texts

        Args:
            run: The run folder, or one checkpoint in it.
            prompts: A text file with a prompt per line, or JSON with "prompt".
            image_features: module:function or file.py:function; takes images [N, H, W, 3], returns features [N, D].
            text_features: The same; takes a list of N texts.
            num: Drawings per prompt.
            batch_size: Drawings per batch; another size gives other drawings.
            max_bad: Most entries that may be unusable.
            overrides: Settings of the run to change.
        """
        from megavlm.evaluation.sets.entries import find_function
        from megavlm.evaluation.sets.features import ClipScore, read_prompts

        functions = {"image_features": image_features, "text_features": text_features}
        score = ClipScore(*(find_function(str(name), f"--{option}") for option, name in functions.items()))
        judge = _judge(run, "clip", prompts, batch_size, max_bad, overrides, **functions)
        _show(judge.draw(read_prompts(judge.bad.file, judge.bad), num, score))


def _judge(run, kind: str, file, batch_size: int, max_bad: int, overrides: dict, **settings):
    from megavlm.evaluation.sets.entries import BadEntries
    from megavlm.evaluation.sets.judge import Judge
    from megavlm.parts.trained import load_trained

    model, _ = load_trained(str(run), overrides)
    return Judge(model, kind, BadEntries(Path(str(file)), max_bad), batch_size, options=settings)


def _folder(images, judge) -> Path:
    return Path(str(images)) if images else judge.bad.file.parent


def _show(result: dict) -> None:
    print(json.dumps({name: value for name, value in result.items() if name != "bad_entries"}, indent=1, ensure_ascii=False))
