"""The one exception for input that a person can put right."""


class InputError(ValueError):
    """What was asked for cannot be read, found or understood; the message is one sentence that says what to do.

    The command line prints the message without a traceback and exits with code 2.
    """
