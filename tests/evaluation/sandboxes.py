"""Whether the machine of the tests allows a sandbox at all."""

import os
import shutil
import subprocess

import pytest


def _allows_sandboxes():
    """Say whether bubblewrap is installed, and an ordinary user may make namespaces and mount /proc."""
    if shutil.which("bwrap") is None:
        return False
    words = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    if os.geteuid() == 0:
        words = ["setpriv", "--reuid=65000", "--regid=65000", "--clear-groups", "--", *words]
    return subprocess.run(words, capture_output=True, check=False).returncode == 0


needs_bwrap = pytest.mark.skipif(
    not _allows_sandboxes(), reason="bubblewrap is not installed, or may not make namespaces here"
)
