"""The one way into every command that has flags."""

import pathlib
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence

import rich.console
from absl import app, flags, logging

from jaxvp import config as config_lib
from jaxvp.errors import UserError, one_line_errors

# Orbax logs the traceback of what it then raises.
logging.get_absl_logger().addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname))


def run(start: Callable[..., None], stopped: str = "", word: str = ""):
    """Parses the flags and calls `start` with them; what is refused ends the command in one line.

    Args:
      start: what the command does.
      stopped: what to say when the user interrupts it.
      word: what the one word before the flags means, in capitals; `start` gets it, too. "": none.
    """
    def main(argv):
        logging.set_verbosity(logging.WARNING)  # JAX tells which backends it did not find.
        sys.unraisablehook = _unraisable
        with one_line_errors(stopped):
            words, wanted = argv[1:], bool(word)
            if len(words) < wanted:
                raise UserError(f"{word} is missing: the first word of this command.")
            if words[wanted:]:
                raise UserError(f"{words[wanted]!r} is not a flag: flags are --name=value.")
            start(flags.FLAGS, *words)

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


def console() -> rich.console.Console:
    """Where a command prints: everything as it is, for paths and texts may look like markup."""
    return rich.console.Console(markup=False, emoji=False, highlight=False)


def make_folder(path: str | pathlib.Path):
    """Makes a folder for results, if there is none, and makes sure that files can be written into
    it: hours of work should not end with a read-only folder.

    Raises:
      OSError: they cannot.
    """
    pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=path).close()


def _unraisable(args):
    """Of the writes of a checkpoint the first that fails is raised, and ends Orbax's event loop;
    TensorStore then prints a traceback for each of the others, which still wants to tell it."""
    if str(args.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(args)


def _parse(arguments: Sequence[str]) -> list[str]:
    """absl's parser, whose errors about flags and a --config become one line; what is wrong in the
    code of a config file keeps its traceback."""
    with one_line_errors():
        try:
            rest = flags.FLAGS(arguments)
            if "config" in flags.FLAGS:
                _ = flags.FLAGS.config.keys  # A file that cannot be read is told on first use.
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
            raise _refusal(error) from error
        except OSError as error:
            said = " ".join(str(error.__cause__ or error).split())
            raise UserError(f"the file of --config cannot be read: {said}") from error
        if "config" in flags.FLAGS:
            config_lib.plain(flags.FLAGS.config)  # Of numbers only finite ones.
        return rest


def _refusal(error: Exception) -> UserError:
    """What parsing the flags refused; `error` is raised again where it is a bug of a config."""
    chain = [error]
    while chain[-1].__context__:  # ml_collections and absl wrap what a config raises.
        chain.append(chain[-1].__context__)
    origin, refusals = chain[-1], [e for e in chain if isinstance(e, UserError)]
    if refusals:
        return UserError(f"--config: {refusals[-1]}")
    frames = [frame.f_code.co_name for frame, _ in traceback.walk_tb(origin.__traceback__)]
    if "get_config" in frames:
        raise error
    if "get_config() takes" in str(origin):
        return UserError("--config: this file has no variants, so no colon after its name.")
    if "no attribute 'get_config'" in str(origin):
        return UserError("--config: this file has no get_config(): take one of configs/.")
    if isinstance(error, AttributeError | KeyError):
        what = " ".join(str(error.args[0]).replace("\\n", " ").split())
        return UserError(f"a --config flag names a key that the config does not have: {what}")
    return UserError(str(error))
