"""The part of an engine that generates: answers to prompts, and the log-probabilities of given tokens.

A rank gets the results of all prompts of its client, whose ranks share the work as they share the rows of a
step (`ClientEngine.data_share`). Ranks that gather weights from each other make their passes together: before
each pass they agree on whether there is one, and a rank that has nothing left to do joins it with a pass that
computes nothing. So all of them call together, each with any number of prompts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from transformers import PreTrainedModel

from fedspeed.engine.generation.batches import BatchLimits
from fedspeed.engine.generation.decode import AnswerSettings, PieceSeries, generate_answers, score_spans
from fedspeed.engine.generation.pieces import Piece, TokenScores, token_scores
from fedspeed.engine.generation.sampling import Sampling
from fedspeed.errors import FedSpeedError, ModelError
from fedspeed.models.positions import row_limit
from fedspeed.schedule.limits import CACHE_BYTES, EVAL_TOKENS, PIECE_TOKENS, logits_bytes


class Generating(ABC):
    """The part of a `ClientEngine` that generates, under the state of client slot 0.

    Attributes:
        model: as built.
    """

    model: PreTrainedModel
    _clock: Any

    def generate(
        self,
        prompts: Sequence[np.ndarray],
        *,
        max_new: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        n: int = 1,
        seed: int = 0,
        stop: Iterable[int] = (),
        is_done: Callable[[Sequence[int]], bool] | None = None,
    ) -> list[list[np.ndarray]]:
        """Continue prompts, with a cache of keys and values; what all prompts begin with is computed once.
        A prompt is one unit of the current activity.

        A streamed base is loaded once a token, whatever the number of prompts in a batch. Collective over the
        client's ranks, which give the same prompts, and over the ranks that share the base.

        Args:
            prompts: tokens [t] of each. max_new: tokens of an answer at most. stop: tokens that end one.
            temperature: 0 takes the most likely token. top_p: see `Sampling`. n: answers a prompt.
            seed: of random choices, which depend on nothing else but the numbers of prompt, answer and token.
            is_done: called with the tokens of an answer after each new one, except a stop token; True ends
                the answer, which keeps its tokens. Ranks that compute the same answer together each call it,
                so it must depend on nothing but the tokens.

        Returns:
            For each prompt its n answers, [t] int64: without the prompt, and without the stop token that
            ended it.

        Raises:
            ModelError: a prompt is empty, or longer than the model's table of positions leaves room for.
            FedSpeedError: a setting is out of its range.
        """
        if n < 1 or max_new < 0:
            raise FedSpeedError(
                f"n={n}, max_new={max_new}: ask for at least one answer, of no less than 0 tokens"
            )
        shares, share = self.data_share
        settings = AnswerSettings(
            max_new=max_new,
            samples=n,
            stop=frozenset(stop),
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
            is_done=is_done,
            progress=shares / n,
        )
        self._check([len(prompt) for prompt in prompts], max_new)
        numbered = list(enumerate(prompts))[share::shares]
        table = np.full((len(prompts), n, max_new + 1), 0.0)
        for prompt, sample, tokens in self._execute_series(
            generate_answers(numbered, settings, self._batch_limits())
        ):
            table[prompt, sample, 0] = len(tokens)
            table[prompt, sample, 1 : len(tokens) + 1] = tokens
        if shares > 1:
            table = self.sum_over_client(table.reshape(-1)).reshape(table.shape)
        return [[row[1 : int(row[0]) + 1].astype(np.int64) for row in answers] for answers in table]

    def logprobs(self, tokens: Sequence[np.ndarray], spans: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Compute the log-probability of each token of a span, given all tokens before it; see
        `token_scores`.

        Returns:
            [b - a] fp32 of each sequence.
        """
        return [scores.logprobs for scores in self.token_scores(tokens, spans)]

    def token_scores(
        self, tokens: Sequence[np.ndarray], spans: Sequence[tuple[int, int]]
    ) -> list[TokenScores]:
        """Score each token of a span, given all tokens before it. What several spans follow is computed once.
        Collective as `generate` is. A sequence is one unit of the current activity.

        Args:
            tokens: [t] of each sequence. spans: (a, b) of each, from a, at least 1, up to b, at most t.

        Returns:
            For each sequence the scores of the b - a tokens of its span.

        Raises:
            ModelError: a span is empty, begins before token 1 or ends behind the sequence, or the table of
                positions does.
        """
        for i, (sequence, (a, b)) in enumerate(zip(tokens, spans, strict=True)):
            if not 1 <= a < b <= len(sequence):
                raise ModelError(
                    f"sequence {i} has {len(sequence)} tokens, and the span {a}:{b}: it must begin at token "
                    "1 or later "
                    "(nothing stands before token 0), hold a token, and end with the sequence at the latest"
                )
        self._check([b - 1 for _, b in spans], 0)  # a span's last token is not computed
        shares, share = self.data_share
        numbered = list(zip(range(len(tokens)), tokens, spans))[share::shares]
        scored = self._execute_series(score_spans(numbered, self._batch_limits(), progress=shares))
        ends = np.cumsum([0, *(b - a for a, b in spans)])
        values = np.zeros(ends[-1])
        for i, of_span in scored:
            values[ends[i] : ends[i + 1]] = of_span
        if shares > 1:
            values = self.sum_over_client(values)
        return [token_scores(values[start:end]) for start, end in zip(ends, ends[1:])]

    def _execute_series(self, series: PieceSeries) -> list:
        """Compute the pieces of a series, pass by pass, together with the ranks that share the base; returns
        its result.
        """
        result: list = []
        pieces: list[Piece] = []
        self.begin_pieces()
        try:
            pieces = next(series)
        except StopIteration as end:
            result = end.value
        while most := self._agree(own := self.piece_passes(pieces)):
            values: list[np.ndarray] = []
            if pieces:
                with self._clock.stage("compute"):
                    values = self.compute_pieces(pieces)
            for _ in range(most - own):
                with self._clock.stage("idle"):
                    self.compute_pieces([])
            if pieces:
                try:
                    pieces = series.send(values)
                except StopIteration as end:
                    pieces = []
                    result = end.value
        self.end_pieces()
        return result

    def _check(self, lengths: Sequence[int], more: int) -> None:
        """Refuse sequences that the model cannot continue by some tokens, given their lengths.

        Raises:
            ModelError: one is empty, or has too few positions.
        """
        limit = row_limit(self.model.config.to_dict())
        for i, length in enumerate(lengths):
            if not length:
                raise ModelError(
                    f"prompt {i} is empty: give it at least one token, the tokenizer's first special one "
                    "for example"
                )
            if limit is not None and length + more > limit.tokens:
                raise ModelError(
                    f"prompt {i} has {length} tokens, and {more} more are asked for: the model has "
                    f"{limit.reason}; shorten it, ask for fewer tokens, or evaluate this model by its "
                    "held-out loss"
                )

    def _batch_limits(self) -> BatchLimits:
        """Return the bounds of what this rank's device computes together."""
        config = self.model.config
        kind = "cpu" if get_accelerator().is_synchronized_device() else "gpu"
        nbytes = torch.finfo(self._computing_dtype).bits // 8
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return BatchLimits(
            slot_bytes=2 * heads * width * nbytes,
            blocks=config.num_hidden_layers,
            cache_bytes=CACHE_BYTES[kind],
            batch_tokens=EVAL_TOKENS,
            piece_tokens=PIECE_TOKENS,
            step_tokens=self._logit_rows,
        )

    @property
    def _logit_rows(self) -> int:
        """Return the number of tokens whose logits are in memory at once."""
        kind = "cpu" if get_accelerator().is_synchronized_device() else "gpu"
        row = self.model.config.vocab_size * torch.finfo(torch.float32).bits // 8
        return max(1, logits_bytes("auto", kind) // row)

    @property
    def _computing_dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    # Implemented by MatchedPasses and ClientEngine.

    @property
    @abstractmethod
    def data_share(self) -> tuple[int, int]:
        """Return (the number of shares that a client's rows are divided into, this rank's share)."""

    @abstractmethod
    def sum_over_client(self, values: np.ndarray) -> np.ndarray:
        """Sum a float64 vector over the ranks of the client."""

    @abstractmethod
    def _agree(self, passes: int) -> int:
        """Return the largest number of passes of the ranks that share the base."""

    # Implemented by each kind of engine.

    def begin_pieces(self) -> None:
        """Prepare for a series of passes; all ranks that share the base do so together."""

    def end_pieces(self) -> None:
        """Free what a series of passes has needed."""

    @abstractmethod
    def piece_passes(self, pieces: Sequence[Piece]) -> int:
        """Return the number of passes that `compute_pieces` makes."""

    @abstractmethod
    def compute_pieces(self, pieces: Sequence[Piece]) -> list[np.ndarray]:
        """Take pieces through the model; returns the values of each, [k]. Without any, make a pass that only
        joins the collectives of other ranks.
        """
