"""The ssh of a lab: keys, known hosts and configuration in its folder. No ~/.ssh or /etc/ssh is read or
written.
"""

import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.lab.hosts import LabHost

SSHD = "/usr/sbin/sshd"  # sshd insists on being started by its full path


@dataclass(frozen=True)
class SshFiles:
    """`sshd_config` is for the hosts' servers; `client` is the program that takes the place of `/usr/bin/ssh`
    on the hosts.
    """

    sshd_config: Path
    client: Path


def write_ssh(folder: Path, hosts: tuple[LabHost, ...], session_env: dict[str, str]) -> SshFiles:
    """Make keys and configuration in `folder` (which must exist and be empty).

    Args:
        folder: is readable by its owner only.
        hosts: all hosts of the lab, which share one host key.
        session_env: variables of every login, as a site's profile sets them.
    """
    for key in ("host_key", "user_key"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "fedspeed lab", "-f", str(folder / key)],
            check=True,
        )
    host_key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    (folder / "known_hosts").write_text("".join(f"{host.name},{host.address} {host_key}\n" for host in hosts))

    # Without the keep-alive, pdsh and mpirun would wait forever for a host that is off.
    (folder / "ssh_config").write_text(f"""\
IdentityFile {folder}/user_key
IdentitiesOnly yes
UserKnownHostsFile {folder}/known_hosts
GlobalKnownHostsFile none
StrictHostKeyChecking yes
BatchMode yes
ConnectTimeout 10
ServerAliveInterval 5
ServerAliveCountMax 3
LogLevel ERROR
""")
    # StrictModes would refuse the key because /tmp is world-writable; PAM may not be configured for logins.
    # All launchers log in at the same time, and MaxStartups must not drop any login.
    variables = " ".join(f'{name}="{value}"' for name, value in session_env.items())
    (folder / "sshd_config").write_text(f"""\
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
PidFile none
UseDNS no
PrintMotd no
MaxStartups 512
SetEnv {variables}
""")
    # A copy is started, because the wrapper is mounted over the original.
    shutil.copy2(shutil.which("ssh"), folder / "ssh.real")
    client = folder / "ssh"
    client.write_text(
        f'#!/bin/sh\nexec {shlex.quote(str(folder))}/ssh.real -F {shlex.quote(str(folder))}/ssh_config "$@"\n'
    )
    os.chmod(client, 0o755)
    return SshFiles(folder / "sshd_config", client)
