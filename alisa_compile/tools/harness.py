"""alisa as a model of EleutherAI's lm-evaluation-harness; importing this needs the package `lm_eval`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..config import AlisaConfig
from ..errors import NotAvailableError
from .emulation import Decoder
from .loading import Loaded
from .scoring import Pair, score


class HarnessModel(TemplateLM):
    """One model under one configuration of alisa, decoding token by token whatever it is asked about.

    dense_tokens, length, batch_size, advance: as in `score`.
    """

    def __init__(
        self,
        loaded: Loaded,
        decoder: Decoder,
        config: AlisaConfig,
        *,
        dense_tokens: int,
        length: int,
        batch_size: int,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        super().__init__()
        self.tokenizer = loaded.tokenizer
        self._decoder, self._config = decoder, config
        self._dense_tokens, self._length, self._batch_size = dense_tokens, length, batch_size
        self._advance = advance

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        for token in (self.tokenizer.eos_token_id, self.tokenizer.bos_token_id):
            if token is not None:
                return int(token)
        return 0  # a tokenizer of bytes or characters may have no such token

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        token = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else int(token)

    @property
    def max_length(self) -> int:
        """The most tokens that are read."""
        return self._length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Without special tokens, as the harness does it for decoder models."""
        return list(self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False)["input_ids"])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Of a continuation after a context, both text."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return self._score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Of whole texts: in windows of `max_length` tokens, each after a single token of context."""
        windows: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(text), prefix_token=self.prefix_token_id, max_seq_len=self._length,
                context_len=1,
            )  # fmt: skip
            before = len(windows)
            windows += map(make_disjoint_window, found)
            counts.append(len(windows) - before)
        scores = iter(self._score(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> NoReturn:
        """No task of the suite asks for it."""
        raise NotAvailableError(
            "tasks that generate text are not available with this adapter",
            got="a request for generate_until",
            expected="tasks that score given answers or texts",
        )

    def _score(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        return score(
            self._decoder, pairs, self._config, dense_tokens=self._dense_tokens, length=self._length,
            batch_size=self._batch_size, advance=self._advance,
        )  # fmt: skip
