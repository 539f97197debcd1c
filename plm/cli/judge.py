"""``plm judge``: do the users' policies of a checkpoint write what they like?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console

from plm.backbones import Backbone, CausalLM, Policy, device
from plm.checkpoint import load_method
from plm.cli.options import OptionParser
from plm.cli.writing import PROMPTS, add_settings, progress_bar, settings_of
from plm.generation import sample
from plm.judging import report as judge_report
from plm.judging.tastes import REWARDS, read_tastes
from plm.judging.written import Written, held_out, judgement, score, users_of
from plm.method.abilities import Writer


def run(args: list[str]) -> None:
    """Write, value, compare and report.

    Raises:
        ValueError: For whatever the user can mend.
    """
    parser = OptionParser(
        prog="plm judge",
        description="Whether each user's policy writes what the user likes. Users' policies, the population's (of an\n"
        "unknown user) and the unaligned one, the language model as it is, write on the same held-out prompts with\n"
        "the same seeds; every person of --rewards values all texts, in standard deviations of the unaligned policy's\n"
        "texts (z_score: false: as they come). Intervals resample prompts. Where rows have a split, only those of the\n"
        "test are used.",
    )
    parser.add_argument("--ckpt_path", required=True, metavar="FILE", help="checkpoint of a method with a policy")
    parser.add_argument("--prompts", required=True, metavar="FILE", help=PROMPTS)
    parser.add_argument("--rewards", required=True, metavar="YAML", help=REWARDS)
    parser.add_argument("--user", nargs="+", metavar="ID", help="default: the people who are users of the checkpoint")
    parser.add_argument("--num_prompts", type=int, metavar="N", help="the first N prompts (default: all)")
    parser.add_argument("--num_samples", type=int, default=4, metavar="N", help="texts on each prompt (default 4)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        help="folder for judge.md and judge.json; default: <stem>.judge beside the checkpoint",
    )
    add_settings(parser)
    options = parser.parse(args)
    for name in ("num_prompts", "num_samples"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: expected an integer >= 1, got {getattr(options, name)}")
    tastes = read_tastes(options.rewards, [])
    prompts = held_out(options.prompts)[: options.num_prompts]
    method = load_method(options.ckpt_path, device())
    if not isinstance(method, Writer):
        raise ValueError(f"plm judge needs a method with a policy, got {type(method).__name__}")
    users = users_of(method, tastes, options.user, options.ckpt_path)
    unaligned = Policy(cast(CausalLM, Backbone.from_spec(method.policy.backbone.spec()))).to(device())
    settings = settings_of(options)
    with progress_bar("writing", (2 + len(users)) * len(prompts) * options.num_samples) as tell:
        more: dict[str, Any] = {**settings, "num_samples": options.num_samples, "progress": tell}
        texts = [sample(unaligned, prompts, **more), sample(method, prompts, **more)]
        mixed = sample(method, prompts * len(users), user_id=[user for user in users for _ in prompts], **more)
    texts += [mixed[start : start + len(prompts)] for start in range(0, len(mixed), len(prompts))]
    raw = score(tastes, prompts, texts)
    scale = np.ones_like(raw[0, 0, 0]) if not tastes.z_score else raw[0].std(axis=(0, 1))
    shift = np.zeros_like(scale) if not tastes.z_score else raw[0].mean(axis=(0, 1))
    flat = [name for name, size in zip(tastes.rewards, scale.tolist(), strict=True) if size == 0]
    if flat:
        raise ValueError(f"rewards {flat} are the same for all texts of the unaligned policy; leave them out")
    values = np.stack([(raw - shift) / scale @ weights for weights in tastes.weights.values()], axis=-1)
    written = Written(unaligned, prompts, users, texts, list(tastes.rewards), raw)
    result = judgement(written, values, list(tastes.weights), settings)
    judge_report.show(result, Console())
    folder = Path(options.output or Path(options.ckpt_path).with_suffix(".judge"))
    judge_report.write(result, folder)
    print(f"written to {folder}")
