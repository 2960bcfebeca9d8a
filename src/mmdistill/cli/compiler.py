"""A failure of ``compile=true`` that the machine causes, in one line. Imports no torch."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mmdistill.config import ConfigError

_REASON = (
    r"No working C\+\+ compiler|Compiler: \S+ is not found|Failed to find C compiler|C\+\+ compile error|"
    r"\[Errno \d+\] [^:\n]+(: '[^']+')?"
)


@contextmanager
def explain_compiler_errors() -> Iterator[None]:
    """While open, an error of `torch.compile` about a missing compiler or its folder becomes a `ConfigError`."""
    try:
        yield
    except RuntimeError as error:
        is_of_compiler = type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc")
        reason = re.search(_REASON, str(error))
        if not is_of_compiler or reason is None:
            raise
        raise ConfigError(
            f"compile=true: {reason[0]}; install a compiler (or set CXX and CC), set TORCHINDUCTOR_CACHE_DIR to a "
            "folder on a disk that can be written to, or use compile=false"
        ) from error
