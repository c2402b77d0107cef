"""JavaScript, as in HumanEval-X."""

from fedspeed.evaluation.languages.language import Exercise, Language, tool, up_to_last_brace
from fedspeed.evaluation.sandbox.limits import Job

# console.assert only prints that a condition is false.
_ASSERT = """console.assert = (condition) => {
  if (!condition) throw new Error("assertion failed")
}
"""
# One exercise requires this package, and calls it as one function.
_MD5 = """const { createHash } = require("crypto")
module.exports = (text) => createHash("md5").update(text).digest("hex")
"""


class JavaScript(Language):
    """JavaScript with Node."""

    name = "js"
    title = "JavaScript"
    install = "nodejs"
    trial = 'require("js-md5"); console.log("works")\n'

    def source(self, exercise: Exercise, completion: str, proof: str) -> str:
        return (
            f"{exercise.prompt}{up_to_last_brace(completion)}\n{exercise.test}\n"
            f'require("fs").writeSync(1, "{proof}")\n'
        )

    def job(self, source: str) -> Job:
        node = tool("node")
        return Job(
            files={"main.js": source, "assert.js": _ASSERT, "node_modules/js-md5/index.js": _MD5},
            run=(node.path, "--max-old-space-size=512", "--require=./assert.js", "main.js"),
            environment={"UV_THREADPOOL_SIZE": "1"},
            folders=node.folders,
        )
