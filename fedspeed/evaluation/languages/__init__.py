"""The programming languages of code tasks, by name."""

from fedspeed.evaluation.languages.cpp import Cpp
from fedspeed.evaluation.languages.go import Go
from fedspeed.evaluation.languages.java import Java
from fedspeed.evaluation.languages.javascript import JavaScript
from fedspeed.evaluation.languages.language import Language
from fedspeed.evaluation.languages.python import Python

LANGUAGES: dict[str, Language] = {
    language.name: language for language in (Python(), Cpp(), Go(), Java(), JavaScript())
}
