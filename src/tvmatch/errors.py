"""The errors that tell a user what to change, and the one that tells what is broken outside."""


class InputError(ValueError):
    """A mistake in an argument, option, file or data set, told in one line.

    The message names the argument or file and the offending value. The command line prints it
    without a traceback and exits with code 2; from Python it is an ordinary `ValueError`.
    """


class DataError(RuntimeError):
    """A data set failed, by an error of its own or because a process that reads it has ended.

    The message quotes the error. The command line prints it without a traceback and exits with code 1.
    """
