"""Our engine as a language model of lm-evaluation-harness, so that its tasks run on a base that is streamed.

This module and `lm_eval_runs` are the only ones that import `lm_eval`, which is an optional requirement
(requirements-eval.txt); `evaluation.harness` imports them when a task of the harness is asked for.

Texts become tokens exactly as in the harness's own `hf` model, so that both score the same tokens.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, resolve_max_length
from transformers import PreTrainedTokenizerBase

from fedspeed import activity
from fedspeed.engine.client_engine import ClientEngine
from fedspeed.errors import DataError
from fedspeed.evaluation.answer_end import before_stop_text, has_stop_text

MAX_NEW = 256  # tokens of an answer, where a task does not say
# What a task may say of the generation of its answers.
KNOWN_SETTINGS = {"do_sample", "temperature", "top_p", "seed"}

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]  # (texts, context, continuation)


class EngineLM(TemplateLM):
    """A language model of the harness that computes with the state in client slot 0 of an engine.

    Engine calls are collective: the ranks of a client, and ranks that share the base, run the same tasks of
    the harness together. So each of them is rank 0 of a world of one for the harness.

    Args:
        max_length: tokens of a sequence; None: as many as the model has positions.
    """

    backend = "causal"

    def __init__(
        self, engine: ClientEngine, tokenizer: PreTrainedTokenizerBase, *, max_length: int | None = None
    ):
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_length or resolve_max_length(engine.model.config, tokenizer)
        self._engine = engine

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_gen_toks(self) -> int:
        """Return the largest number of tokens of an answer, where a task does not say it."""
        return MAX_NEW

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_options: Any) -> list[int]:
        """Return the tokens of a text. Special tokens that the tokenizer puts before a text are added unless
        the text begins with one, as one from a chat template does.
        """
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, verbose=False, **options)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return (log-probability, whether all its tokens are the most likely ones) of each continuation.

        The requests of each task are computed together: what all of its prompts begin with is computed once.
        """
        scores = []
        for name, some in itertools.groupby(requests, lambda request: request.task_name):
            of_task = list(some)
            with activity.during(f"the evaluation on {name}", len(of_task), "choice"):
                scores += super().loglikelihood(of_task, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(self, requests: Sequence[Encoded], **_options: Any) -> list[tuple[float, bool]]:
        sequences = []
        spans = []
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"a continuation of {len(continuation)} tokens cannot be scored, the model takes 1 to "
                    f"{self.max_length}: {texts or 'part of a text'}; leave this item out"
                )
            # Of a long context, the end is kept. The last token is predicted and not computed.
            kept = [*context, *continuation][-(self.max_length + 1) :]
            sequences.append(np.array(kept, dtype=np.int64))
            spans.append((len(kept) - len(continuation), len(kept)))
        results = []
        for (texts, _, _), score in zip(requests, self._engine.token_scores(sequences, spans)):
            result = (float(score.logprobs.sum(dtype=np.float64)), bool(score.likeliest.all()))
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
            results.append(result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Return the log-probability of each text, all its tokens counted. A text that is longer than the
        model's context is divided into windows; the last one has a full context.
        """
        windows: list[Encoded] = []
        counts = []
        for (text,) in [request.args for request in requests]:
            pairs = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            of_text = [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
            windows += of_text
            counts.append(len(of_text))
        with activity.during("the evaluation of texts", len(windows), "window"):
            values = [value for value, _ in self._loglikelihood_tokens(windows)]
        ends = np.cumsum([0, *counts])
        totals = [float(sum(values[start:end])) for start, end in zip(ends, ends[1:])]
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return the answer to each prompt, up to the first of its stop texts."""
        answers: list[str] = [""] * len(requests)
        numbers: dict[str, list[int]] = {}  # settings as text -> the requests that have them
        for number, request in enumerate(requests):
            numbers.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for same in numbers.values():
            prompts = [requests[number].args[0] for number in same]
            settings = requests[same[0]].args[1]
            with activity.during(f"the evaluation on {requests[same[0]].task_name}", len(same), "answer"):
                found = self._answers(prompts, settings)
            for number, answer in zip(same, found):
                answers[number] = answer
                self.cache_hook.add_partial("generate_until", requests[number].args, answer)
        return answers

    def _answers(self, prompts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Generate an answer to each prompt.

        Raises:
            DataError: a setting is unknown, or leaves no room for a prompt.
        """
        known: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        stops = [text for text in known.pop("until") if text]
        max_new = known.pop("max_gen_toks")
        room = self.max_length - max_new
        unknown = sorted(known.keys() - KNOWN_SETTINGS)
        if unknown or room < 1:
            reason = (
                f"asks for the generation setting {unknown[0]}={known[unknown[0]]!r}, which is not known here"
                if unknown
                else f"asks for {max_new} new tokens, and the model has {self.max_length} positions"
            )
            raise DataError(f"the task {reason}; change generation_kwargs of the task")
        encoded = [self._prompt_tokens(prompt)[-room:] for prompt in prompts]
        generated = self._engine.generate(
            [np.array(tokens, dtype=np.int64) for tokens in encoded],
            max_new=max_new,
            temperature=known["temperature"] if known["do_sample"] else 0.0,
            top_p=known.get("top_p", 1.0),
            seed=known.get("seed", 0),
            stop=self._stop_ids(stops),
            is_done=has_stop_text(self.tokenizer, stops),
        )
        texts = [self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True) for [tokens] in generated]
        return [before_stop_text(text, stops) for text in texts]

    def _prompt_tokens(self, prompt: str) -> list[int]:
        begins_special = bool(self.tokenizer.bos_token) and prompt.startswith(self.tokenizer.bos_token)
        return self.tok_encode(prompt, add_special_tokens=False if begins_special else None)

    def _stop_ids(self, stops: Sequence[str]) -> list[int]:
        """Return the tokens that end an answer: end-of-sequence, those of the model's own settings, and stop
        texts that are names of special tokens.
        """
        settings = getattr(self._engine.model, "generation_config", None)
        ids = getattr(settings, "eos_token_id", None)
        more = ids if isinstance(ids, list) else [ids]
        special = set(stops) & set(self.tokenizer.all_special_tokens)
        named = self.tokenizer.convert_tokens_to_ids(sorted(special))
        return sorted({self.eot_token_id, *named, *(token for token in more if token is not None)})
