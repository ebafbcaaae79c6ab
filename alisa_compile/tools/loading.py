"""Load a model and a prompt for the command line; whatever goes wrong becomes an AlisaError."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from ..errors import AlisaError


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A causal language model, ready for generate, and its tokenizer."""

    model: Any
    tokenizer: Any

    def encode(self, text: str, max_new_tokens: int) -> torch.Tensor:
        """Token ids [1, n] of a prompt that leaves room for the new tokens."""
        tokens: torch.Tensor = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
        count = tokens.shape[1]
        if count == 0:
            raise AlisaError("the prompt is empty", fix="give --prompt TEXT or --prompt-file FILE, or pipe text in")
        room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and count + max_new_tokens > room:
            raise AlisaError(
                "the prompt and the new tokens do not fit the model",
                got=f"{count} + {max_new_tokens} tokens",
                expected=f"at most {room} (max_position_embeddings)",
                fix="shorten the prompt or lower --max-new-tokens",
            )
        return tokens.to(self.model.device)

    def decode(self, tokens: torch.Tensor) -> str:
        """The text of generated tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def padding(self) -> dict[str, int]:
        """`pad_token_id` for generate, which otherwise picks one with a warning for each call."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return {"pad_token_id": token}
        return {}


def load(name: str, dtype: str, device: str | None) -> Loaded:
    """Load from a folder, without any network, or by a name on the Hub."""
    place = _device(device)
    path = Path(name).expanduser()
    local = path.exists()
    if local and not path.is_dir():
        raise AlisaError("the model is not a folder", got=name, fix="give the folder that holds its config.json")
    if not local and not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name):
        raise AlisaError("no such model folder", got=name, expected="a folder, or a name on the Hugging Face Hub")
    source = str(path) if local else name
    try:
        with _bars_off() if local else contextlib.nullcontext():
            config = AutoConfig.from_pretrained(source, local_files_only=local)
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype, local_files_only=local
            )
        return Loaded(model.to(place).eval(), tokenizer)
    except Exception as error:
        # A bad file, a missing library, no network, no memory: many types, one meaning here.
        raise AlisaError(
            f"cannot load the model ({type(error).__name__}: {_first_line(error)})",
            got=name,
            expected="a folder or Hub name of a causal language model that transformers knows",
            fix="--debug shows the whole error",
        ) from error


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise AlisaError("cannot use this device", got=name, expected="such as cpu or cuda:0, present here") from error
    return device


@contextlib.contextmanager
def _bars_off() -> Iterator[None]:
    """transformers' own bar for the weights would garble ours; for a download from the Hub it is wanted."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
