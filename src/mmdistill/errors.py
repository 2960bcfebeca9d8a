"""The base class of all errors that this package raises on purpose.

The command line prints such an error as one line and exits with its `exit_status`. Any other exception is a defect and
is printed with its traceback.
"""


class MMDistillError(Exception):
    """An expected failure. The message names the file or the key and the fix.

    Attributes:
        exit_status: status of the process that ends with this error.
    """

    exit_status = 1


class InputError(MMDistillError, ValueError):
    """A file, config value or argument that cannot be used as it is."""

    exit_status = 2
