"""The command line: `trbert train`, `evaluate`, `predict`, `compile`, `benchmark`, `convert`, ...

A command imports slow modules itself, so that help and wrong arguments are answered at once.
"""

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence

from trbert_jax.cli.arguments import COMMANDS, Arguments, parse_arguments, paths_of
from trbert_jax.errors import PreemptedError, UserError
from trbert_jax.io import streams
from trbert_jax.io.outputs import check_outputs

for _part in ("train", "use", "models", "pages", "doctor"):  # in the order of the help
    importlib.import_module(f"trbert_jax.cli.{_part}")

__all__ = ["COMMANDS", "main", "parse_arguments"]

RESUME = "run the same command again to go on from the last checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command, with the arguments of the process by default.

    Returns the exit code: 0; 1 if `verify` finds a difference; 2 after a mistake of the user; 130 after
    Ctrl-C; 141 if the reader of the output has closed it; 143 after SIGTERM, 129 after SIGHUP.
    """
    streams.prepare()
    try:
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:  # argparse has printed help, the version or an error
        return streams.finish(stop.code if isinstance(stop.code, int) else streams.USER_ERROR)
    # JAX handles SIGTERM if several processes have to agree on when to stop.
    several = args.command == "train" and (args.distributed or args.coordinator is not None)
    return streams.finish(_run(args, streams.signals(ended_by_sigterm=not several, last=argv is None)))


def _run(args: Arguments, signals: contextlib.AbstractContextManager[None]) -> int:
    # transformers without PyTorch is intended; its advice to install it is no help.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    streams.setup_logging(args.log_format)
    advice = f"; {RESUME}" if args.command == "train" else ""
    try:
        with signals:
            check_outputs(**paths_of(args))
            return COMMANDS[args.command][0](args) or 0
    except UserError as error:
        streams.say(f"error: {error}")
        return streams.USER_ERROR
    except KeyboardInterrupt:
        streams.say(f"interrupted{advice}")
        return streams.INTERRUPTED
    except PreemptedError as stop:
        streams.say(f"{stop}{advice}")
        return 128 + stop.signal
    except BrokenPipeError:
        return streams.BROKEN_PIPE
    except UnicodeEncodeError as error:
        if not any("\udc80" <= letter <= "\udcff" for letter in error.object):  # a byte of a name
            raise
        streams.say(f"error: {error.object}: the name is not UTF-8; rename it")
        return streams.USER_ERROR
    except ValueError as error:  # of JAX, which checks the variables of its settings as it is imported
        if "jax" in sys.modules or "JAX_" not in str(error).upper():
            raise
        streams.say(f"error: {error}; correct or unset the environment variable")
        return streams.USER_ERROR
    except OSError as error:
        if error.filename is None and streams.in_a_folder():
            raise
        streams.say(f"error: {error.filename or 'the current folder'}: {error.strerror}")
        return streams.USER_ERROR
