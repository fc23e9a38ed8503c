"""`python -m tinylm serve`: OpenAI's API for the checkpoints of a file or folder."""

import argparse
import logging
from pathlib import Path

from tinylm.cli.model_flags import add_device_flag, add_weights_flags
from tinylm.common.errors import UserError, require_package

logger = logging.getLogger(__name__)

SUMMARY = "serve models with OpenAI's API"
# Flag, default, meaning.
NUMBERS = (
    ("--slots", 8, "texts that are generated at once"),
    ("--max-waiting", 64, "texts that wait for a slot; more get 503"),
    ("--max-models", 1, "models in memory"),
    ("--max-connections", 512, "open connections"),
    ("--max-body-mb", 4, "megabytes of a request's body"),
    ("--timeout", 600, "seconds that a request may take"),
    ("--grace", 10, "seconds that running requests have at the end"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.usage = "python -m tinylm serve [CKPT|FOLDER] [flags]"
    parser.description = (
        "Serve a checkpoint, or the model of each run in a folder, over HTTP with OpenAI's API: "
        "chat, completions, log-probabilities. See docs/SERVING.md."
    )
    parser.add_argument(
        "path",
        nargs="?",
        type=Path,
        default=Path("checkpoints"),
        metavar="CKPT|FOLDER",
        help="a checkpoint, or a folder of runs (checkpoints)",
    )
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path("logs"),
        metavar="FOLDER",
        help="runs that the page shows: training.log_dir (logs)",
    )
    add_device_flag(parser)
    add_weights_flags(parser)
    add_access_flags(parser.add_argument_group("access"))
    add_limit_flags(parser.add_argument_group("limits"))


def add_access_flags(group: argparse._ActionsContainer) -> None:
    """Where the server listens, and whom it answers."""
    group.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen on (127.0.0.1)"
    )
    group.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port; 0: a free one (8000)"
    )
    group.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="ask for a key; the file has one a line",
    )
    group.add_argument(
        "--no-auth", action="store_true", help="ask for no key, whatever the address is"
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="answer requests for this name too, such as that of a proxy; *: any name",
    )
    group.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="URL",
        help="let the pages of this site ask, such as https://example.com",
    )


def add_limit_flags(group: argparse._ActionsContainer) -> None:
    """How much the server does at once."""
    for name, default, meaning in NUMBERS:
        group.add_argument(
            name, type=int, default=default, metavar="N", help=f"{meaning} ({default})"
        )
    group.add_argument(
        "--deterministic",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the same request and seed give the same text, alone and under load (on)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal; 128 + its number."""
    for flag, *_ in NUMBERS:
        lowest = 0 if flag in ("--max-waiting", "--grace") else 1
        value = getattr(arguments, flag.removeprefix("--").replace("-", "_"))
        if not lowest <= value <= 100_000:
            raise UserError(flag, f"must be from {lowest} to 100000, got {value}")

    for package in ("fastapi", "uvicorn", "prometheus_client"):
        require_package(package)

    from tinylm.common.device import pick_device
    from tinylm.serve.models import EngineSettings
    from tinylm.serve.server import ServerSettings, serve

    settings = ServerSettings(
        host=arguments.host,
        port=arguments.port,
        api_key_file=arguments.api_key_file,
        no_auth=arguments.no_auth,
        allow_hosts=tuple(arguments.allow_host),
        allow_origins=tuple(arguments.allow_origin),
        max_models=arguments.max_models,
        max_body=arguments.max_body_mb * 2**20,
        max_connections=arguments.max_connections,
        timeout=arguments.timeout,
        grace=arguments.grace,
        logs=arguments.logs,
    )
    device, reason = pick_device(arguments.device)
    logger.info("device: %s (%s)", device, reason)
    engine = EngineSettings(
        device=device,
        slots=arguments.slots,
        deterministic=arguments.deterministic,
        max_waiting=arguments.max_waiting,
        weights=arguments.weights,
        max_bpb_rise=arguments.max_bpb_rise,
    )
    number = serve(arguments.path, settings, engine)
    return 0 if number is None else 128 + number
