"""What a generated program may use, and what came of running it."""

from dataclasses import dataclass, field

MIB = 2**20
WORK_FOLDER = "/tmp"  # inside the sandbox; the only place where a program can write


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The resources of one generated program and of everything that it starts.

    Attributes:
        wall_s: seconds until it is killed, compilation included. run_wall_s: seconds of them after the
            compilation.
        cpu_s: seconds of processor time of one process of the compilation. run_cpu_s: of the program itself.
        memory: bytes in RAM of all its processes together; also the most that one process can allocate.
        processes: largest number of processes and threads.
        disk: bytes of all its files. files: largest number of them.
        output: bytes that it may print.
    """

    wall_s: float = 60.0
    run_wall_s: float = 20.0
    cpu_s: int = 40
    run_cpu_s: int = 5
    memory: int = 1024 * MIB
    processes: int = 128
    disk: int = 128 * MIB
    files: int = 20_000
    output: int = MIB


@dataclass(frozen=True, kw_only=True)
class Job:
    """A program to run in a sandbox.

    Attributes:
        files: their texts by path below the work folder.
        compile: command before `run`; empty: none. run: command. Both start in the work folder.
        environment: variables besides PATH, HOME, TMPDIR and LANG.
        folders: of the host that the commands need besides the system's, visible at the same paths.
    """

    files: dict[str, str]
    run: tuple[str, ...]
    compile: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    folders: tuple[str, ...] = ()
    limits: Limits = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        killed_for: the limit that it exceeded, empty if it ended by itself.
        exit_code: negative: minus the signal that ended it.
        output: what it printed on standard output and standard error, up to the limit.
        peak_memory: most bytes in RAM that were seen. peak_processes: most processes that were seen.
    """

    killed_for: str
    exit_code: int
    output: bytes
    peak_memory: int = 0
    peak_processes: int = 0

    @property
    def text(self) -> str:
        """Return the output as text."""
        return self.output.decode("utf-8", errors="replace")
