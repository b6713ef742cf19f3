"""The four lines: from the data alone, and a command that works."""

import dataclasses
import math
import shlex

import pytest

from compare_runs import BLOWN_UP, EXPLODING, comparison, run
from gradkeel.compare import Onset, make_command_plan, make_plan
from gradkeel.compare.findings import findings
from gradkeel.compare.sweep import parse_sweep


def duel(none, clipped, policy="norm:1.0", lr=0.1, **other):
    """Final losses by seed of no clipping, and of a policy."""
    runs = [run("none", lr, seed, (4, 2, end)) for seed, end in enumerate(none)]
    return comparison(
        runs + [run(policy, lr, seed, (4, 2, end), **other) for seed, end in enumerate(clipped)]
    )


def exploded(**other):
    runs = [run("none", 0.1, seed, EXPLODING, onset=BLOWN_UP) for seed in range(3)]
    return comparison(
        runs + [run("norm:1.0", 0.1, seed, (4, 2, 1 + seed / 10), **other) for seed in range(3)]
    )


def replan(command):
    """The plan that a pasted command stands for; fails if `gradkeel compare` would refuse it."""
    words = shlex.split(command)
    assert words[:2] == ["gradkeel", "compare"]
    target = None if words[2] == "--run" else words[2]
    rest = words[2:] if target is None else words[3:]
    options = {}
    for key, value in zip(rest[::2], rest[1::2], strict=True):
        options.setdefault(key, []).append(value)
    one = {key: values[0] for key, values in options.items()}
    if target is None:
        assert not options.keys() & {"--lr", "--steps", "--batch-size"}
        return make_command_plan(one["--run"], policies=options.get("--policy"), sweep=one.get("--sweep"))
    return make_plan(
        target,
        policies=options.get("--policy"),
        learning_rates=[float(lr) for lr in options.get("--lr", [])] or None,
        seeds=int(one["--seeds"]) if "--seeds" in one else None,
        steps=int(one["--steps"]) if "--steps" in one else None,
        batch_size=int(one["--batch-size"]) if "--batch-size" in one else None,
        sweep=one.get("--sweep"),
    )


# ---- FOUND ---------------------------------------------------------------------------------------------------


def test_found_when_all_seeds_agree():
    words = findings(duel([2, 2.1, 2.2], [1, 1.1, 1.2])).found
    assert (
        words
        == "norm:1.0 ended with the lower loss in 3 of 3 seeds: median 1.1, against 2.1 for unclipped training."
    )


def test_found_when_clipping_is_worse_in_all_seeds():
    words = findings(duel([1, 1.1, 1.2], [2, 2.1, 2.2])).found
    assert (
        words
        == "Unclipped training ended with the lower loss in 3 of 3 seeds: median 1.1, against 2.1 for norm:1.0."
    )


@pytest.mark.parametrize("clipped", [[1, 1.1, 3], [2, 2.1, 2.2], [3, 3, 1]])
def test_no_difference_is_found_where_the_seeds_disagree(clipped):
    words = findings(duel([2, 2.1, 2.2], clipped)).found
    lower = sum(a < b for a, b in zip(clipped, [2, 2.1, 2.2], strict=True))
    assert words.startswith("No difference found between norm:1.0 and unclipped training")
    assert f"ended lower in {lower} of 3 seeds" in words


def test_found_says_where_clipping_kept_runs_from_diverging():
    words = findings(exploded()).found
    assert words == (
        "At lr 0.1 unclipped training diverged in 3 of 3 seeds, norm:1.0 in 0. "
        "norm:1.0 ended with the lower loss in 3 of 3 seeds: median 1.1."
    )


def test_found_names_each_ones_best_learning_rate_where_several_were_tried():
    runs = [run("none", lr, s, losses) for s in range(2) for lr, losses in ((1, (4, 2, 2)), (2, EXPLODING))]
    runs += [run("norm:1", lr, s, (4, 2, end)) for s in range(2) for lr, end in ((1, 3), (2, 1))]
    assert findings(comparison(runs)).found == (
        "At lr 2 unclipped training diverged in 2 of 2 seeds, norm:1 in 0. norm:1 at its best lr (2) ended with the "
        "lower loss in 2 of 2 seeds: median 1, against 2 for unclipped training at its best lr (1)."
    )


def test_found_when_everything_diverged():
    runs = [run(policy, 0.1, seed, EXPLODING) for policy in ("none", "norm:1") for seed in range(2)]
    assert findings(comparison(runs)).found.startswith("No difference found: every policy diverged")


def test_found_for_a_single_policy_and_for_two_without_none():
    assert findings(comparison([run("none")])).found == "Only none was run: it diverged in 0 of 1 run."
    runs = [run("norm:1", seed=s, losses=(4, 3, 1)) for s in range(2)]
    runs += [run("value:1", seed=s, losses=(4, 3, 2)) for s in range(2)]
    words = findings(comparison(runs)).found
    assert words == "norm:1 ended with the lower loss in 2 of 2 seeds: median 1, against 2 for value:1."


def test_found_without_losses_says_how_to_get_them():
    runs = [
        run("none", None, 0, (), bad_step=3, validation_loss=None),
        run("norm:1", None, 0, (), validation_loss=None),
    ]
    words = findings(comparison(runs, arguments=("--run", "x"), is_command=True, learning_rates=())).found
    assert words.startswith(
        "Unclipped training diverged in 1 of 1 seed, norm:1 in 0. No loss is known: guard.log(loss=...)"
    )


# ---- WHY -----------------------------------------------------------------------------------------------------


def test_why_names_parameter_and_step_of_the_first_failing_run():
    words = findings(exploded()).why
    assert words == (
        "Unclipped training, lr 0.1, seed 0: at step 2 the update of layer.weight was 7.5 times as large as its "
        "weights (gradient norm 1); after step 3 the loss was no longer finite. Under norm:1.0 no update was that "
        "large."
    )


def test_why_says_so_where_clipped_runs_had_such_updates_too():
    words = findings(exploded(onset=Onset(40, "layer.bias", 1.25))).why
    assert words.endswith("Under norm:1.0 the first such update, at step 40, was 1.25 times as large.")


def test_why_prefers_a_failure_that_its_twin_does_not_share():
    runs = [run("none", 0.1, seed, EXPLODING, onset=BLOWN_UP) for seed in range(2)]
    runs += [run("norm:1", 0.1, seed, onset=BLOWN_UP if seed == 0 else None) for seed in range(2)]
    assert "seed 1" in findings(comparison(runs)).why


def test_why_without_an_onset_and_without_a_failure():
    runs = [run("none", 0.1, 0, (4, 5, 6)), run("norm:1", 0.1, 0)]
    words = findings(comparison(runs)).why
    assert (
        "no update was larger than the weights it changed; after step 1 the loss stayed above where it began"
        in words
    )
    assert findings(duel([2], [1])).why == "No run diverged, so there is no blow-up to explain."


def test_why_with_an_update_that_is_not_finite():
    runs = [run("none", 0.1, 0, EXPLODING, onset=Onset(3, "w", math.nan)), run("norm:1", 0.1, 0)]
    assert "the update of w was not finite, unlike its weights" in findings(comparison(runs)).why


# ---- CAUTION -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "optimizer", "words"),
    [
        (
            "global-norm:0.5", "SGD",
            "global-norm:0.5 clipped in 97% of the steps, which is nearly normalized SGD: lr x bound (here 0.05) is "
            "what you tune.",
        ),
        (
            "norm:0.5", "SGD",
            "norm:0.5 clipped in 97% of the steps, so the bound sets their length: lr x bound (here 0.05) is what you "
            "tune.",
        ),
        (
            "norm:0.5", "AdamW",
            "norm:0.5 clipped in 97% of the steps; AdamW rescales gradients itself, so this evens steps out more than "
            "it shortens them.",
        ),
    ],
)  # fmt: skip
def test_caution_where_nearly_every_step_is_clipped(policy, optimizer, words):
    assert findings(duel([2] * 3, [1] * 3, policy, clip_rate=0.97, optimizer=optimizer)).caution == words


def test_caution_where_nothing_is_clipped():
    words = findings(duel([2] * 3, [2] * 3, clip_rate=0.0)).caution
    assert "norm:1.0 never clipped" in words


def test_caution_about_what_is_excluded():
    runs = [run("norm:1.0", seed=s) for s in range(3)]
    runs += [run("norm:1.0,exclude=*.bias", seed=s, losses=EXPLODING) for s in range(3)]
    words = findings(comparison(runs)).caution
    assert (
        words == "Look at what is excluded: norm:1.0,exclude=*.bias diverged in 3 of 3 runs, norm:1.0 in 0."
    )


def test_caution_about_few_seeds_the_edge_and_interruption():
    assert "Only 1 seed" in findings(duel([2], [1])).caution
    runs = [run("none", lr, s, (4, 2, 2)) for s in range(3) for lr in (1, 2)]
    runs += [run("norm:1", lr, s, (4, 2, 2 - lr / 2)) for s in range(3) for lr in (1, 2)]
    assert findings(comparison(runs)).caution == (
        "The best lr of norm:1 is the highest that was tried; its optimum may lie beyond."
    )
    words = findings(comparison(runs, interrupted=True, seeds=tuple(range(10)))).caution
    assert words.startswith("Interrupted: 12 of 40 runs finished")


def test_there_is_always_a_caution():
    words = findings(duel([2] * 3, [1] * 3)).caution
    assert (
        words == "This is one task and 3 seeds; differences smaller than the ranges in the table mean little."
    )


# ---- NEXT ----------------------------------------------------------------------------------------------------

HIGHEST = [run(p, lr, s, (4, 2, 3 - lr)) for p in ("none", "norm:1") for s in range(2) for lr in (1, 2)]
CASES = {
    "a sweep of the bound": (
        duel([2] * 3, [1] * 3),
        "gradkeel compare char-lstm --sweep norm:0.1..10 --lr 0.1",
    ),
    "a sweep keeps other arguments": (
        duel([2] * 3, [1] * 3, "global-norm:0.25,norm_type=inf"),
        "gradkeel compare char-lstm --sweep global-norm:0.025..2.5,norm_type=inf --lr 0.1",
    ),
    "more seeds where they disagree": (
        duel([2, 2, 2], [1, 3, 1]),
        "gradkeel compare char-lstm --policy none --policy norm:1.0 --lr 0.1 --seeds 6",
    ),
    "more seeds where there is no bound to sweep": (
        duel([2] * 3, [1] * 3, "zclip"),
        "gradkeel compare char-lstm --policy none --policy zclip --lr 0.1 --seeds 6",
    ),
    "more seeds where the bound is a pair": (
        duel([2] * 3, [1] * 3, "value:-0.5,1"),
        "gradkeel compare char-lstm --policy none --policy value:-0.5,1 --lr 0.1 --seeds 6",
    ),
    "higher learning rates": (
        comparison(HIGHEST),
        "gradkeel compare char-lstm --policy none --policy norm:1 --lr 2 --lr 4 --lr 8",
    ),
    "lower ones where everything diverged": (
        comparison([run(p, 0.1, s, EXPLODING) for p in ("none", "norm:1") for s in range(2)]),
        "gradkeel compare char-lstm --policy none --policy norm:1 --lr 0.01 --lr 0.001",
    ),
    "a bound from the norms where none was tried": (
        comparison([run("none", 0.1, norms=[0.5, 2.0, 3.0])]),
        "gradkeel compare char-lstm --policy none --policy global-norm:2 --lr 0.1",
    ),
    "the same again after an interruption": (
        comparison([run("none", 0.1), run("norm:1", 0.1)], interrupted=True, seeds=(0, 1)),
        "gradkeel compare char-lstm --policy none --policy norm:1 --lr 0.1 --seeds 2",
    ),
    "the winner of a sweep, with more seeds": (
        comparison([run("none"), run("norm:1", losses=(4, 2, 0.5))], sweep=parse_sweep("norm:0.1..10")),
        "gradkeel compare char-lstm --policy none --policy norm:1 --lr 0.1 --seeds 2",
    ),
    "what was asked for besides": (
        dataclasses.replace(
            duel([2], [1]),
            plan=dataclasses.replace(duel([2], [1]).plan, arguments=("char-lstm", "--steps", "7")),
        ),
        "gradkeel compare char-lstm --steps 7 --sweep norm:0.1..10 --lr 0.1",
    ),
    "a command of the user's own": (
        comparison(
            [run("none", 0.3), run("norm:1", 0.3, losses=(4, 2, 0.5))],
            arguments=("--run", "python train.py --lr 0.3"), is_command=True, learning_rates=(),
        ),
        "gradkeel compare --run 'python train.py --lr 0.3' --sweep norm:0.1..10",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_next_is_a_command_that_can_be_pasted(case):
    result, command = CASES[case]
    words = findings(result).next
    assert words == command
    assert replan(words).trials


def test_lines_are_labelled_in_order():
    assert [line.label for line in findings(exploded()).lines()] == ["FOUND", "WHY", "CAUTION", "NEXT"]


def test_nothing_is_said_of_nothing():
    with pytest.raises(ValueError, match="no run has finished"):
        findings(comparison([]))
