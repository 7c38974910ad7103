"""The one way into every command that has flags."""

import pathlib
from collections.abc import Callable, Sequence

from absl import app, flags, logging

from jaxvp.errors import UserError, one_line_errors


def run(start: Callable[[flags.FlagValues], None], stopped: str = ""):
    """Parses the flags and calls `start` with them; what is refused ends the command in one line.

    Args:
      start: what the command does.
      stopped: what to say when the user interrupts it.
    """
    def main(argv):
        logging.set_verbosity(logging.WARNING)  # JAX tells which backends it did not find.
        with one_line_errors(stopped):
            if argv[1:]:
                raise UserError(f"{argv[1]!r} is not a flag: flags are --name=value.")
            start(flags.FLAGS)

    app.run(main, flags_parser=_parse)


def define_config(what: str = "What is trained"):
    """Defines --config, and with it --config.key=value."""
    from ml_collections import config_flags
    config_flags.DEFINE_config_file(
        "config", None, f"{what}: a file of configs/. FILE:ARGUMENT chooses one of its variants, "
        "--config.key=value changes a key.")
    flags.mark_flag_as_required("config")


def config_name() -> str:
    """What --config names, without folders: FILE.py or FILE.py:VARIANT."""
    from ml_collections import config_flags
    return pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).name


def _parse(arguments: Sequence[str]) -> list[str]:
    """absl's parser, whose errors about flags and a --config become one line."""
    with one_line_errors():
        try:
            rest = flags.FLAGS(arguments)
            if "config" in flags.FLAGS:
                _ = flags.FLAGS.config.keys  # A file that cannot be loaded is told on first use.
            return rest
        except (AttributeError, KeyError) as error:
            what = " ".join(str(error.args[0]).replace("\\n", " ").split())
            raise UserError("a --config flag names a key that the config does not have: "
                            f"{what}") from error
        except (flags.Error, TypeError, ValueError) as error:
            raise UserError(str(error)) from error
