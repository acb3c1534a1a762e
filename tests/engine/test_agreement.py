"""All ranks agree on the strongest wish of any, one micro-batch after it came; a save waits for the end of a step, and comes once."""

from megavlm.engine import agreement, signals
from megavlm.engine.agreement import Wishes
from megavlm.engine.signals import Wish
from tests.distributed.ranks import run_ranks


def agree_again_and_again(world, run) -> list[list[Wish]]:
    agreement.LOOK_EVERY_S = 0.0
    wishes = Wishes(world, run, lambda: 0.0, None)
    found = [[wishes.agree(step_ends) for step_ends in (False, True)]]
    if world.is_main:
        (run / "save").touch()
    found.append([wishes.agree(step_ends) for step_ends in (False, False, True, False, True)])
    if world.rank == 1:
        signals._noted = Wish.TERMINATE
    found.append([wishes.agree(step_ends) for step_ends in (False, False)])
    wishes.close()
    return found


def test_a_wish_is_granted_one_micro_batch_later(tmp_path):
    nothing = Wish.NOTHING
    expected = [[nothing] * 2, [nothing, nothing, Wish.SAVE, nothing, nothing], [nothing, Wish.TERMINATE]]
    assert run_ranks(2, agree_again_and_again, tmp_path) == [expected] * 2
