"""What a policy may ask of a task, whoever wrote it. What cannot be computed exactly is refused when the recipe is read.

Tested by `tests/routing/test_route.py`.
"""

from collections.abc import Sequence

from megavlm.errors import ConfigError
from megavlm.routing.policies import LayerPlan, Policy, SharedBypass
from megavlm.routing.selectors import DEVICE_SELECTORS, HOST_SELECTORS
from megavlm.routing.tasks import TASKS, Task


def check_policies(understanding: Policy, generation: Policy, of_task: Sequence[Sequence[LayerPlan]], num_layers: int) -> None:
    """Refuse policies that do not fit the model, their task, or each other.

    Args:
        understanding: Policy for image spans without a loss.
        generation: Policy for image spans with a loss.
        of_task: The plans of both, layer by layer.
        num_layers: Layers of the model.

    Raises:
        ConfigError: Naming the task, the policy and the layer.
    """
    for task, policy, plans in zip(TASKS, (understanding, generation), of_task):
        if len(plans) != num_layers:
            raise ConfigError(
                f"routing.{task}: {policy.policy} has plans for {len(plans)} layers, the model has {num_layers}\n"
                "  do:    return one LayerPlan for each layer from its method layers(num_layers)"
            )
        for layer, plan in enumerate(plans):
            before = plans[layer - 1] if layer else None
            mistake = _mistake_of_share(plan) or _mistake_of_nesting(plan, before)
            if mistake:
                what, remedy = mistake
                raise ConfigError(f"routing.{task}: {policy.policy}, layer {layer}: {what}\n  do:    {remedy}")
    _check_generation(generation, of_task[Task.GENERATION])
    _check_attention(understanding, of_task[Task.UNDERSTANDING])
    _check_merge(understanding, of_task[Task.UNDERSTANDING])
    _check_shared(understanding, generation, of_task)


Mistake = tuple[str, str] | None
"""What is wrong, and what to do."""


def _mistake_of_share(plan: LayerPlan) -> Mistake:
    if not 0 <= plan.keep_ratio <= 1:
        return f"keep_ratio is {plan.keep_ratio}", "keep a share from 0 to 1"
    if plan.how == "inject" and plan.keep_ratio > 0:
        return "injected tokens do not travel", "give it keep_ratio 0"
    if plan.how == "merge" and plan.keep_ratio < 0.5:
        return f"merge cannot leave {plan.keep_ratio} of the tokens: at most every second one merges", "keep a share of at least 0.5"
    return None


def _mistake_of_nesting(plan: LayerPlan, before: LayerPlan | None) -> Mistake:
    if not plan.nested or before is None or plan.how == "merge":
        return None
    if not plan.ranks:
        return f"{plan.how} does not rank, so it cannot be nested", "leave nested=True to layers with a selector"
    if plan.keep_ratio > before.keep_ratio:
        return (
            f"nested=True keeps a share of what the layer before has, but {plan.keep_ratio} is more than its {before.keep_ratio}",
            "lower keep_ratio, or leave nested=True out",
        )
    if before.keep_ratio < 1 and not before.ranks:
        return f"nested=True after a layer with {before.how}", "nest after layers with a selector only"
    return None


def _check_generation(policy: Policy, plans: Sequence[LayerPlan]) -> None:
    if any(plan.how == "merge" for plan in plans):
        raise ConfigError("routing.generation: merge would mix tokens with what they predict\n  do:    use it for understanding")
    if plans[-1].keep_ratio < 1 and plans[-1].how not in ("inject", "skip_mlp"):
        raise ConfigError(
            f"routing.generation: {policy.policy} drops tokens before their loss\n"
            "  do:    choose a policy whose tokens come back before the last layer, such as random_ltd"
        )
    if policy.selector_name in DEVICE_SELECTORS:
        raise ConfigError(
            f"routing.generation: the selector {policy.selector_name} looks at what the model must predict\n"
            f"  do:    use one of {', '.join(HOST_SELECTORS)}, or the policy mixture_of_depths"
        )


def _check_attention(policy: Policy, plans: Sequence[LayerPlan]) -> None:
    selector = DEVICE_SELECTORS.get(policy.selector_name)
    if selector and selector.needs_attention and plans[0].keep_ratio < 1:
        raise ConfigError(
            f"routing.understanding: {policy.selector_name} looks at the layer before, and the first layer has none\n"
            "  do:    leave the first layer dense"
        )


def _check_merge(policy: Policy, plans: Sequence[LayerPlan]) -> None:
    """Once, of whole spans, for good: merged tokens would otherwise merge again, or stand beside those that became part of them."""
    merging = [layer for layer, plan in enumerate(plans) if plan.how == "merge" and plan.keep_ratio < 1]
    if not merging:
        return
    first = merging[0]
    is_whole = first > 0 and all(plan.keep_ratio == 1 for plan in plans[:first])
    if not is_whole or any(plan != plans[first] for plan in plans[first:]):
        raise ConfigError(
            f"routing.understanding: {policy.policy} merges from layer {first} on, but not once and for good\n"
            "  do:    keep every token in the layers before, at least in the first, and give all layers from there on the same plan"
        )


def _check_shared(understanding: Policy, generation: Policy, of_task: Sequence[Sequence[LayerPlan]]) -> None:
    blocks = [[plan.draw for plan in plans] for plans in of_task]
    is_shared = isinstance(understanding, SharedBypass) and understanding.policy == generation.policy
    if is_shared and blocks[0] != blocks[1]:
        raise ConfigError(
            f"routing: {generation.policy} has one block of layers for understanding and another for generation\n"
            "  do:    give both the same first_layer and end_layer; only keep_ratio may differ"
        )
