"""``plm serve``: a reward server that knows each of its users."""

from __future__ import annotations

import gc
import os

from plm.cli.options import ROWS, OptionParser, check_encoder, integer


def run(args: list[str]) -> int:
    """Serve until stopped, or check that what is served is what ``plm score`` says.

    Raises:
        ValueError: If the checkpoint, its users or the keys cannot be read, or FastAPI is not installed.
    """
    parser = OptionParser(
        prog="plm serve",
        description="Serve the rewards of a checkpoint over HTTP: POST /classify and /score (vLLM's bodies),\n"
        "/get_reward (OpenRLHF's), /v1/rewards, /v1/users/ID/pairs, next-question, beliefs and undo; GET and DELETE\n"
        "/v1/users/ID; GET /v1/users, /health, /v1/models, /metrics and /openapi.json. A policy also writes for its\n"
        "users: POST /v1/chat/completions (OpenAI's); large ones go by plm export --all and vLLM. At / is a page for\n"
        "a browser: compare users, ask a person which of two responses is better, see who is known. An unknown user\n"
        "gets the population's reward or text, with user_known false. docs/serving.md shows requests. It needs\n"
        "pip install 'plm[serve]'.",
    )
    parser.add_shared("--ckpt_path", required=True)
    parser.add_shared("--users")
    parser.add_shared("--pool", help=f"pairs that the page asks people about, at most 1024: {ROWS}, as of plm query")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1: this machine)")
    parser.add_argument("--port", type=integer(1), default=8000, metavar="N", help="port (default 8000)")
    parser.add_argument("--model_name", help="what clients call the model; default: the file's name without its ending")
    parser.add_argument(
        "--api_keys", metavar="FILE", help="keys, one a line; a request must bring one as a bearer (default: none)"
    )
    parser.add_shared(
        "--workers",
        default=1,
        help="processes, each with its own copy of the model, on one store of users (default 1)",
    )
    parser.add_argument(
        "--max_queue", type=integer(1), default=128, metavar="N", help="requests at once; more get 429 (default 128)"
    )
    parser.add_argument(
        "--max_body", type=integer(1), default=4 * 2**20, metavar="N", help="bytes of a request (default 4194304)"
    )
    parser.add_argument("--label_is_user", action="store_true", help="the labels of /get_reward are ids of users")
    parser.add_argument(
        "--end_of_turn",
        default="",
        metavar="TEXT",
        help="/get_reward takes this off the end of responses: '<|im_end|>'",
    )
    parser.add_shared(
        "--encoder_url",
        help="features come from an OpenAI-compatible server, such as http://localhost:8000/v1, whose key, if it wants "
        "one, is the environment variable PLM_ENCODER_KEY; at the start they are compared with those of the one here",
    )
    parser.add_shared("--encoder_model")
    parser.add_shared("--encoder_unchecked", help="serve without that comparison")
    check_help = "score, and write, by HTTP and by plm score and generate, compare, and stop"
    parser.add_argument("--check", action="store_true", help=check_help)
    options = parser.parse(args)
    check_encoder(parser, options)
    if options.check and options.encoder_url is not None:
        parser.error("--check compares to the last bit, which another encoder does not keep: leave out --encoder_url")

    # before torch, whose threads spin for a while after each piece of work: between requests they keep a processor busy
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    gc.disable()  # the imports leave nothing to collect: looking for it takes an eighth of the start
    try:
        from plm.serving.check import CHAT, check
        from plm.serving.server import Settings, serve
    except ModuleNotFoundError as error:
        raise ValueError(f"plm serve needs {error.name}; pip install 'plm[serve]'") from error
    finally:
        gc.enable()
    settings = Settings(*(getattr(options, name) for name in Settings._fields))
    if not options.check:
        serve(settings, options.host, options.port, options.workers)
        return 0
    found = check(settings)
    for one in found:
        if one.found != one.expected:
            command = "plm generate" if one.endpoint == CHAT else "plm score"
            print(f"different: {one.endpoint} for {one.user!r} gives {one.found}, {command} {one.expected}")
    scored, written = (
        [one.found == one.expected for one in found if (one.endpoint == CHAT) == is_text] for is_text in (False, True)
    )
    print(f"{sum(scored)} of {len(scored)} requests give the rewards of plm score, to the last bit")
    if written:
        print(f"{sum(written)} of {len(written)} the texts of plm generate")
    return int(not all(scored + written))
