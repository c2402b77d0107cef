"""Java, as in HumanEval-X."""

from fedspeed.evaluation.languages.language import (
    Exercise,
    Language,
    before_last_brace,
    tool,
    up_to_last_brace,
)
from fedspeed.evaluation.sandbox.limits import Job, Limits

# Small and quick to start: each program has a virtual machine of its own.
_MACHINE = (
    "-Xms16m",
    "-Xmx512m",
    "-Xss8m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
)


class Java(Language):
    """Java with javac."""

    name = "java"
    title = "Java"
    install = "default-jdk-headless"
    trial = 'public class Main { public static void main(String[] a) { System.out.println("works"); } }\n'

    def source(self, exercise: Exercise, completion: str, proof: str) -> str:
        end = exercise.test.rstrip()
        assert end.endswith("}")
        test = f'{before_last_brace(end[:-1], f"""System.out.println("{proof}");""")}}}'
        return f"{exercise.prompt}{_whole_class(completion)}\n{test}"

    def job(self, source: str) -> Job:
        compiler = tool("javac")
        java = tool("java")
        options = [f"-J{option}" for option in _MACHINE]
        return Job(
            files={"Main.java": source},
            compile=(compiler.path, *options, "-proc:none", "-nowarn", "Main.java"),
            run=(java.path, *_MACHINE, "-cp", ".", "Main"),
            folders=tuple({*compiler.folders, *java.folders}),
            limits=Limits(run_cpu_s=10),
        )


def _whole_class(completion: str) -> str:
    """Return a completion without a main method, and with the brace that closes the class."""
    main = completion.find("public static void main")
    if main >= 0:
        completion = completion[:main] + "}"
    completion = up_to_last_brace(completion)
    closes_method_only = completion.count("{") + 1 == completion.count("}")
    return completion + "\n}" if closes_method_only else completion
