"""Failures of torch.compile that the machine causes."""

import pytest
from torch._dynamo.exc import BackendCompilerFailed, Unsupported
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from mmdistill.cli.compiler import explain_compiler_errors
from mmdistill.config import ConfigError

FIX = (
    "install a compiler (or set CXX and CC), set TORCHINDUCTOR_CACHE_DIR to a folder on a disk that can be written to, "
    "or use compile=false"
)


@pytest.mark.parametrize(
    ("cause", "reason"),
    [
        (InvalidCxxCompiler(), "No working C++ compiler"),
        (RuntimeError("Failed to find C compiler. Please specify ..."), "Failed to find C compiler"),
        (OSError(30, "Read-only file system", "/tmp/x"), "[Errno 30] Read-only file system: '/tmp/x'"),
    ],
)  # fmt: skip
def test_failure_of_the_machine_is_one_line(cause: Exception, reason: str) -> None:
    for error in (InductorError(cause, None), BackendCompilerFailed(lambda: None, cause, None)):
        with pytest.raises(ConfigError) as raised, explain_compiler_errors():
            raise error
        assert str(raised.value) == f"compile=true: {reason}; {FIX}"


@pytest.mark.parametrize("error", [RuntimeError("[Errno 30] of another call"), Unsupported("a defect")])
def test_other_errors_are_unchanged(error: Exception) -> None:
    with pytest.raises(type(error)), explain_compiler_errors():
        raise error
