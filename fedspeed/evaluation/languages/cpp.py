"""C++, as in HumanEval-X."""

from fedspeed.evaluation.languages.language import (
    Exercise,
    Language,
    before_last_brace,
    tool,
    up_to_last_brace,
)
from fedspeed.evaluation.sandbox.limits import Job

# Included where a prompt does not: a model cannot add includes above its prompt.
_INCLUDES = tuple(
    f"#include<{name}>"
    for name in (
        *("stdlib.h", "algorithm", "math.h", "stdio.h", "vector", "string"),
        *("climits", "cstring", "iostream"),
    )
)
_MD5 = "openssl/md5.h"


class Cpp(Language):
    """C++ 11 with g++. Three exercises need boost, and one OpenSSL's MD5."""

    name = "cpp"
    title = "C++"
    install = "g++, libboost-dev and libssl-dev"
    trial = (
        f"#include <boost/any.hpp>\n#include <{_MD5}>\n#include <stdio.h>\n"
        'int main() { unsigned char sum[16]; MD5(sum, 0, sum); boost::any any = sum[0]; puts("works"); }\n'
    )

    def source(self, exercise: Exercise, completion: str, proof: str) -> str:
        includes = "\n".join(line for line in _INCLUDES if line not in exercise.prompt)
        test = before_last_brace(exercise.test, f'fputs("{proof}", stderr);\n')
        return f"{includes}\n{exercise.prompt}{up_to_last_brace(completion)}\n{test}"

    def job(self, source: str) -> Job:
        compiler = tool("g++")
        libraries = ("-lcrypto",) if _MD5 in source else ()
        return Job(
            files={"main.cpp": source},
            compile=(compiler.path, "-std=c++11", "-O0", "-w", "-o", "main", "main.cpp", *libraries),
            run=("./main",),
            folders=compiler.folders,
        )
