"""What the options of PAL must satisfy, and its parameter groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch.nn import Parameter

from plm.methods.pal.geometry import UserLearner
from plm.methods.pal.heads import Head, Loss

Variant = Literal["A", "B"]
Users = Literal["posterior", "table"]
Mixing = Literal["softmax", "gumbel", "gumbel_hard"]
Residual = Literal["none", "bradley_terry", "reference"]
CHOICES = {
    "variant": Variant,
    "user_learner": UserLearner,
    "head": Head,
    "loss": Loss,
    "users": Users,
    "mixing": Mixing,
    "residual": Residual,
}
GROUPS: dict[str, dict[str, float]] = {
    "projector": {"lr": 1e-3, "weight_decay": 0.01},
    "user_projectors": {"lr": 1e-3, "weight_decay": 0.01},
    "logit_scale": {"lr": 0.02},
    "temperature": {"lr": 0.02},
}
"""What of a parameter group differs from the common learning rate without weight decay."""


def check_options(options: Mapping[str, Any]) -> None:
    """Raise one error about everything that does not fit together.

    Args:
        options: Arguments of the method by name.

    Raises:
        ValueError: Naming every key that is wrong.
    """
    problems = [
        f"model.{name}: expected one of {', '.join(get_args(choice))}, got {options[name]!r}"
        for name, choice in CHOICES.items()
        if options[name] not in get_args(choice)
    ]
    problems += [
        f"model.{name}: expected an integer >= 1, got {options[name]!r}"
        for name in ("num_prototypes", "dim")
        if options[name] is not None and not options[name] >= 1
    ]
    problems += [
        f"model.{name}: expected a number > 0, got {options[name]!r}"
        for name in ("temperature", "gamma")
        if options[name] is not None and not options[name] > 0
    ]
    problems += [
        f"model.{name}: expected a number >= 0, got {options[name]!r}"
        for name in ("ridge", "prototype_ridge", "bound", "lr")
        if not (options[name] or 0.0) >= 0
    ]
    head, loss, learner = options["head"], options["loss"], options["user_learner"]
    if options["variant"] == "B" and learner in ("Pw", "f(Pw)"):
        problems.append(
            f"model.user_learner: variant B mixes functions of the prompt, f(P)w or |f(P)|w, got {learner!r}"
        )
    if options["variant"] == "A" and options["user_projector"] is not None:
        problems.append(f"model.user_projector: acts only with model.variant B, got {options['user_projector']!r}")
    if options["mixing"] != "softmax" and options["users"] != "table":
        problems.append(f"model.mixing: {options['mixing']!r} draws samples of a table; set model.users: table")
    one_sided = loss in ("hinge", "smooth_hinge")
    if options["users"] == "posterior" and one_sided:
        problems.append(f"model.loss: {loss!r} is no likelihood, which model.users: posterior needs; set table")
    if head == "angle_hinge" and not one_sided:
        problems.append(f"model.loss: head angle_hinge takes hinge or smooth_hinge, got {loss!r}")
    if head in ("angle", "dist_logistic") and one_sided:
        problems.append(f"model.loss: head {head} takes cross_entropy or logistic, got {loss!r}")
    if problems:
        raise ValueError("\n".join(problems))


def configure_groups(
    members: Mapping[str, Sequence[Parameter]],
    lr: float,
    changes: Mapping[str, Mapping[str, float]],
    freeze: Sequence[str],
) -> dict[str, dict[str, float]]:
    """Freeze some groups; options of every group by its name.

    Args:
        members: Trainable parameters of every group.
        lr: Learning rate of groups without one of their own.
        changes: Options by group.
        freeze: Groups not to train.

    Raises:
        ValueError: If a name matches no trainable parameter or an option does not exist.
    """
    trained = [name for name, parameters in members.items() if parameters]
    problems = [
        f"model.{where}: expected groups with something to train, {', '.join(trained)}, got {name!r}"
        for where, names in (("groups", list(changes)), ("freeze", list(freeze)))
        for name in names
        if name not in trained or (where == "groups" and name in freeze)
    ]
    problems += [
        f"model.groups.{name}: expected lr or weight_decay >= 0, got {option}: {value!r}"
        for name, options in changes.items()
        for option, value in options.items()
        if option not in ("lr", "weight_decay") or not value >= 0
    ]
    if problems:
        raise ValueError("\n".join(problems))
    for name in freeze:
        for parameter in members[name]:
            parameter.requires_grad_(False)
    return {name: {"lr": lr, **GROUPS.get(name, {}), **changes.get(name, {})} for name in members}
