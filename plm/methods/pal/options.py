"""What the options of PAL must satisfy, and its parameter groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch.nn import Parameter

from plm.messages import Problems
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
    problems = Problems("model.")
    problems.choices(**{name: (options[name], get_args(choice)) for name, choice in CHOICES.items()})
    problems.integers(1, num_prototypes=options["num_prototypes"], dim=options["dim"])
    problems.positive(temperature=options["temperature"], gamma=options["gamma"])
    problems.numbers(**{name: options[name] for name in ("ridge", "prototype_ridge", "bound", "lr")})
    head, loss, learner = options["head"], options["loss"], options["user_learner"]
    one_sided = loss in ("hinge", "smooth_hinge")
    problems.say(
        f"model.user_learner: variant B mixes functions of the prompt, f(P)w or |f(P)|w, got {learner!r}",
        when=options["variant"] == "B" and learner in ("Pw", "f(Pw)"),
    )
    problems.say(
        f"model.user_projector: acts only with model.variant B, got {options['user_projector']!r}",
        when=options["variant"] == "A" and options["user_projector"] is not None,
    )
    problems.say(
        f"model.mixing: {options['mixing']!r} draws samples of a table; set model.users: table",
        when=options["mixing"] != "softmax" and options["users"] != "table",
    )
    problems.say(
        f"model.loss: {loss!r} is no likelihood, which model.users: posterior needs; set table",
        when=options["users"] == "posterior" and one_sided,
    )
    problems.say(
        f"model.loss: head angle_hinge takes hinge or smooth_hinge, got {loss!r}",
        when=head == "angle_hinge" and not one_sided,
    )
    problems.say(
        f"model.loss: head {head} takes cross_entropy or logistic, got {loss!r}",
        when=head in ("angle", "dist_logistic") and one_sided,
    )
    problems.check()


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
