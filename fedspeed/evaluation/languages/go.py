"""Go, as in HumanEval-X."""

from fedspeed.evaluation.languages.language import (
    Exercise,
    Language,
    before_last_brace,
    tool,
    up_to_last_brace,
)
from fedspeed.evaluation.sandbox.limits import WORK_FOLDER, Job, Limits

# Imported where a completion uses them: Go refuses imports that are not used.
_PACKAGES = (
    *("math", "strings", "fmt", "strconv", "time", "bytes", "regexp", "sort", "math/rand", "crypto/md5"),
)
# The exercises call one function of testify. Compiling the real package takes longer than an exercise.
_ASSERT = """package assert

import (
	"bytes"
	"reflect"
	"testing"
)

type Assertions struct{ t *testing.T }

func New(t *testing.T) *Assertions { return &Assertions{t} }

func (a *Assertions) Equal(expected, actual interface{}, _ ...interface{}) bool {
	left, isBytes := expected.([]byte)
	right, areBytes := actual.([]byte)
	same := reflect.DeepEqual(expected, actual)
	if isBytes && areBytes && left != nil && right != nil {
		same = bytes.Equal(left, right)
	}
	if !same {
		a.t.Errorf("expected %#v, got %#v", expected, actual)
	}
	return same
}
"""


class Go(Language):
    """Go, in GOPATH mode: without a module and without the network."""

    name = "go"
    title = "Go"
    install = "golang-go"
    trial = (
        'package main\n\nimport (\n"testing"\n"github.com/stretchr/testify/assert"\n)\n\n'
        'func TestTrial(t *testing.T) { if assert.New(t).Equal(1, 1) { print("works") } }\n'
    )

    def source(self, exercise: Exercise, completion: str, proof: str) -> str:
        body = up_to_last_brace(_before_main(completion))
        missing = [
            f'import "{package}"\n'
            for package in _PACKAGES
            if f"{package.rpartition('/')[2]}." in body and f'"{package}"' not in exercise.test_setup
        ]
        test = before_last_brace(exercise.test, f'if !t.Failed() {{ print("{proof}") }}\n')
        prompt = exercise.prompt.replace(exercise.imports, "") if exercise.imports else exercise.prompt
        return f"{exercise.test_setup}\n{''.join(missing)}\n{prompt}{body}\n{test}"

    def job(self, source: str) -> Job:
        go = tool("go")
        return Job(
            files={"main_test.go": source, "go/src/github.com/stretchr/testify/assert/assert.go": _ASSERT},
            compile=(go.path, "test", "-vet=off", "-p=2", "-c", "-o", "main", "main_test.go"),
            run=("./main",),
            environment={
                "GO111MODULE": "off",
                "GOPATH": f"{WORK_FOLDER}/go",
                "GOCACHE": f"{WORK_FOLDER}/cache",
                "GOMAXPROCS": "2",
                "GOFLAGS": "",
                "GOTOOLCHAIN": "local",
                "CGO_ENABLED": "0",
            },
            folders=go.folders,
            limits=Limits(disk=512 * 2**20),
        )


def _before_main(completion: str) -> str:
    """Return a completion without a main function and what begins with a comment at the margin."""
    for text in ("\n//", "\nfunc main("):
        if text in completion:
            completion = completion[: completion.rfind(text)]
    return completion
