"""Where decoding may begin: refuses what would depend on tokens that are not there yet.

Letters: C candidates, R rows that are read as features.

Tested by `tests/model/test_routes.py`.
"""

from collections.abc import Sequence

import numpy as np

from megavlm.data.pack.pack import Pack
from megavlm.errors import MegavlmError
from megavlm.routing.route import Choice
from megavlm.routing.selectors import DEVICE_SELECTORS, Candidates


def check_start(pack: Pack, prompt_lengths: Sequence[int]) -> None:
    """Refuse to decode where a token that is not given decides which of the tokens before it are active.

    Args:
        pack: The whole sequences, on the host.
        prompt_lengths: Tokens given of each.

    Raises:
        MegavlmError: Naming the sequence, what is missing, and where to begin instead.
    """
    if pack.has_patches:
        raise MegavlmError(
            "decoding: blocks of codes are single tokens under the policy patches, which trains and does not draw\n"
            "  do:    go along the dense route: --evaluation.route=dense"
        )
    lengths = np.array(pack.sequences.lengths)
    starts = np.cumsum(lengths) - lengths
    given_S = np.array(prompt_lengths)
    if len(given_S) != len(lengths) or (given_S < 1).any() or (given_S > lengths).any():
        raise MegavlmError(
            f"decoding: prompts of {given_S.tolist()} tokens for sequences of {lengths.tolist()}\n"
            "  do:    give at least the first token of every sequence, and at most all"
        )
    is_given_T = pack.positions_T.numpy() < np.repeat(given_S, lengths)
    owner_T = np.repeat(np.arange(len(lengths)), lengths)

    def check(rows: np.ndarray, what: str) -> None:
        missing = rows[~is_given_T[rows]]
        if len(missing):
            sequence, end = owner_T[missing[0]], rows[-1] + 1
            raise MegavlmError(
                f"decoding: sequence {sequence} has {given_S[sequence]} given tokens, but {what}\n"
                f"  do:    give at least {end - starts[sequence]} tokens of it, or go along the dense route"
            )

    features_R = pack.feature_rows_R.numpy()
    for sequence in range(len(lengths)):
        check(features_R[owner_T[features_R] == sequence], "the model reads its image as features, which no token can stand for")
    for stage in pack.route.stages:
        for choice in stage.choices:
            if choice.plan.how == "gate":  # looks back only
                continue
            _check_choice(choice, pack.route.candidates[choice.task], check)


def _check_choice(choice: Choice, among: Candidates, check) -> None:
    needs_question = choice.plan.ranks and DEVICE_SELECTORS[choice.selector].needs_question
    name = choice.selector if choice.plan.ranks else "merge"
    rows_C, span_C = among.rows_C.numpy(), among.span_C.numpy()
    for n, (length, kept) in enumerate(zip(among.lengths, choice.kept)):
        if kept in (0, length):  # content decides nothing
            continue
        check(rows_C[span_C == n], f"{name} looks at a whole image to say which of its tokens are active")
        if needs_question:
            question = among.question_rows_Q[among.question_span_Q == n].numpy()
            check(question, f"{name} looks at the whole question to say which tokens of an image are active")
