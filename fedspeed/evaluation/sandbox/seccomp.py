"""The system calls that a generated program is denied, as a filter program of the kernel (seccomp).

Denied are those that bypass the other limits (memory outside of the processes, such as shared segments and
anonymous files; new namespaces and mounts; sockets, of which some kinds know no network namespace), and
entrances to the kernel that no solution of an exercise needs.
"""

import errno
import platform
import struct

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH_*, column below
# Numbers on x86_64 and aarch64.
_DENIED = {
    "socket": (41, 198),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
_CLONE = (56, 220)
_CLONE3 = (435, 435)
_NEW_NAMESPACE = 0x7E020000  # all CLONE_NEW* flags of clone
_X32 = 0x40000000  # system calls of the x32 interface, numbered from here
# Instructions, results, and offsets in struct seccomp_data.
_LOAD = 0x20
_RETURN = 0x06
_JUMP_EQUAL = 0x15
_JUMP_SET = 0x45
_JUMP_GREATER = 0x35
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ERRNO = 0x00050000
_OFFSET_NUMBER = 0
_OFFSET_ARCHITECTURE = 4
_OFFSET_ARGUMENT = 16


def is_supported(machine: str) -> bool:
    """Return whether there is a filter for a kind of machine, such as `x86_64`."""
    return machine in _ARCHITECTURES


def filter_program(machine: str = "") -> bytes:
    """Return the filter as an array of struct sock_filter, for bwrap --seccomp.

    Args:
        machine: kind of machine; empty: this one.
    """
    architecture, column = _ARCHITECTURES[machine or platform.machine()]
    program = [
        _instruction(_LOAD, _OFFSET_ARCHITECTURE),
        _instruction(_JUMP_EQUAL, architecture, then=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _OFFSET_NUMBER),
        *_returning(_JUMP_GREATER, _X32, errno.ENOSYS),
    ]
    for numbers in _DENIED.values():
        program += _returning(_JUMP_EQUAL, numbers[column], errno.EPERM)
    # The C library falls back to clone, the flags of which a filter can read.
    program += _returning(_JUMP_EQUAL, _CLONE3[column], errno.ENOSYS)
    program += [
        _instruction(_JUMP_EQUAL, _CLONE[column], otherwise=3),
        _instruction(_LOAD, _OFFSET_ARGUMENT),
        *_returning(_JUMP_SET, _NEW_NAMESPACE, errno.EPERM),
        _instruction(_RETURN, _ALLOW),
    ]
    return b"".join(program)


def _returning(jump: int, value: int, error: int) -> list[bytes]:
    """Return instructions that fail the system call with an error if the condition holds."""
    return [_instruction(jump, value, otherwise=1), _instruction(_RETURN, _ERRNO | error)]


def _instruction(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("=HBBI", code, then, otherwise, value)
