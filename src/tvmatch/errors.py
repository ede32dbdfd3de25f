"""The one error that means: what the user gave is at fault, and this is what to change."""


class InputError(ValueError):
    """A mistake in an argument, option, file or data set, told in one line.

    The message names the argument or file and the offending value. The command line prints it
    without a traceback and exits with code 2; from Python it is an ordinary `ValueError`.
    """
