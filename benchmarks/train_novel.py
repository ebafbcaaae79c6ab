"""Train a small Llama on a folder of text files: the way the embedded model novel-7m was made.

    python -m benchmarks.train_novel TEXT_FOLDER --output runs/novel --held-out TEXT_FOLDER/moby-dick.txt

Plain novels alone do not teach a model of this size to look far back, and a test of sparse attention needs
heads that do. So part of the sequences carry something that only attention can predict: passages that come
twice, random tokens that come twice, and "secret number" sentences whose number is asked for later.

The data of step N depends on the seed, on N and on the number of steps only, so a resumed run sees what the
uninterrupted one would have seen.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
END_ID = 0
MAX_POSITIONS = 4096
NAMES = (
    "Anna Boris Clara David Edith Frank Grace Henry Irene James Kate Louis Mary Nora Oscar Paul Quentin Rose "
    "Simon Tom Ursula Victor Walter Emma Peter Lucy Martha Arthur Jane Charles Sophie George Helen Isaac "
    "Julia Konstantin Laura Martin Nell Oliver"
).split()

Tokens = npt.NDArray[np.int64]


class TrainingError(Exception):
    """Something the user can put right; the message says how."""


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run; a checkpoint may be continued only under equal settings."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    batch_tokens: int
    short_length: int
    long_length: int
    long_fraction: float
    pattern_fraction: float
    muon_lr: float
    adamw_lr: float
    weight_decay: float
    warmup: float
    decay: str
    seed: int

    def check(self) -> None:
        """Refuse what would only fail later, or fail obscurely."""
        if self.vocab_size < 257:
            raise TrainingError(f"--vocab-size {self.vocab_size}: at least 257 (256 bytes and {END_OF_TEXT})")
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 2:
            raise TrainingError(
                f"--hidden-size {self.hidden_size} with --heads {self.heads}: the size of a head must be "
                "whole and even (rotary positions turn pairs of channels)"
            )
        if self.heads % self.kv_heads:
            raise TrainingError(f"--heads {self.heads} must be a multiple of --kv-heads {self.kv_heads}")
        if not 2 <= self.short_length <= self.long_length <= MAX_POSITIONS:
            raise TrainingError(
                f"--short-length {self.short_length}, --long-length {self.long_length}: expected "
                f"2 <= short <= long <= {MAX_POSITIONS}"
            )
        if self.batch_tokens < self.long_length:
            raise TrainingError(
                f"--batch-tokens {self.batch_tokens} holds no sequence of --long-length {self.long_length}"
            )
        for name in ("long_fraction", "pattern_fraction", "warmup"):
            if not 0 <= getattr(self, name) <= 1:
                raise TrainingError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 to 1")


def find_texts(folder: Path, held_out: Sequence[Path]) -> list[Path]:
    """The training files of `folder`, sorted by path so that runs agree; held-out files are left out."""
    if not folder.is_dir():
        raise TrainingError(f"{folder} is not a folder: give a folder with .txt files")
    for path in held_out:
        if not path.is_file():
            raise TrainingError(f"--held-out {path}: no such file")
    excluded = {path.resolve() for path in held_out}
    files = sorted(path for path in folder.rglob("*.txt") if path.resolve() not in excluded)
    if not files:
        raise TrainingError(f"{folder} holds no .txt file to train on (held-out files do not count)")
    return files


def read_text(path: Path) -> str:
    """The file as UTF-8 text, or an error that names the file."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise TrainingError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): convert it") from error


def train_tokenizer(files: Sequence[Path], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every byte has an entry, so no text is ever out of vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((read_text(path) for path in files), trainer=trainer, length=len(files))
    if tokenizer.get_vocab_size() < vocab_size:
        raise TrainingError(
            f"the text yields only {tokenizer.get_vocab_size()} tokenizer entries of the {vocab_size} "
            "asked for: add text or lower --vocab-size"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> Tokens:
    """Token ids of `text`, without the length warning of the high-level call."""
    return np.asarray(tokenizer.backend_tokenizer.encode(text).ids, dtype=np.int64)


def encode_files(tokenizer: PreTrainedTokenizerFast, files: Sequence[Path]) -> Tokens:
    """All files as one stream, an end-of-text token after each."""
    parts: list[Tokens] = []
    for path in tqdm(files, desc="tokenise", unit="file"):
        parts.extend((encode(tokenizer, read_text(path)), np.asarray([END_ID])))
    return np.concatenate(parts)


def weave(filler: Tokens, inserts: Sequence[Tokens], rng: np.random.Generator) -> Tokens:
    """Put `inserts` into `filler`, in their order, at random places."""
    pieces = np.split(filler, np.sort(rng.integers(0, len(filler) + 1, size=len(inserts))))
    parts: list[Tokens] = [pieces[0]]
    for insert, piece in zip(inserts, pieces[1:], strict=True):
        parts.extend((insert, piece))
    return np.concatenate(parts)


def secret_pair(tokenizer: PreTrainedTokenizerFast, name: str, rng: np.random.Generator) -> tuple[Tokens, Tokens]:
    """A sentence that tells a number, and the question with its answer."""
    number = "-".join(str(digit) for digit in rng.integers(0, 10, size=5))
    told = f" The secret number of {name} is {number}.\n"
    asked = f" What is the secret number of {name}? It is {number}.\n"
    return encode(tokenizer, told), encode(tokenizer, asked)


def secret_inserts(tokenizer: PreTrainedTokenizerFast, room: int, rng: np.random.Generator) -> list[Tokens]:
    """Told and asked sentences of a few people, shuffled, each number told before it is asked for."""
    count = int(rng.integers(1, 5))
    chosen = [NAMES[i] for i in rng.permutation(len(NAMES))[:count]]
    pairs = [secret_pair(tokenizer, name, rng) for name in chosen]
    while pairs and sum(len(told) + len(asked) for told, asked in pairs) > room:
        pairs.pop()
    seen: set[int] = set()
    inserts: list[Tokens] = []
    for i in rng.permutation(np.repeat(np.arange(len(pairs)), 2)).tolist():
        inserts.append(pairs[i][1] if i in seen else pairs[i][0])
        seen.add(i)
    return inserts


class Sequences:
    """Draws training sequences from the token stream."""

    def __init__(self, stream: Tokens, tokenizer: PreTrainedTokenizerFast, settings: Settings) -> None:
        if len(stream) <= settings.long_length:
            raise TrainingError(
                f"the text has {len(stream)} tokens, fewer than one sequence of --long-length "
                f"{settings.long_length}: add text"
            )
        self.stream = stream
        self.tokenizer = tokenizer
        self.settings = settings

    def _slice(self, length: int, rng: np.random.Generator) -> Tokens:
        start = int(rng.integers(0, len(self.stream) - length + 1))
        return self.stream[start : start + length]

    def _inserts(self, length: int, rng: np.random.Generator) -> list[Tokens]:
        """Nothing, or one of the three patterns, with at least half of the sequence left to ordinary text."""
        if rng.random() >= self.settings.pattern_fraction:
            return []
        room = length // 2
        kind = int(rng.integers(0, 4))
        if kind >= 2:  # twice as often as the others: the hardest of the three to learn
            return secret_inserts(self.tokenizer, room, rng)
        size = int(rng.integers(1, max(2, room // 2 + 1)))
        passage = self._slice(size, rng) if kind == 0 else rng.integers(1, self.settings.vocab_size, size=size)
        return [passage, passage]

    def draw(self, length: int, rng: np.random.Generator) -> Tokens:
        """One sequence of exactly `length` tokens."""
        inserts = self._inserts(length, rng)
        filler = self._slice(length - sum(map(len, inserts)), rng)
        return weave(filler, inserts, rng)

    def batch(self, step: int, steps: int) -> torch.Tensor:
        """The input of `step`, `[batch, length]`: short sequences first, long ones at the end of the run."""
        settings = self.settings
        is_long = step >= round(steps * (1 - settings.long_fraction))
        length = settings.long_length if is_long else settings.short_length
        rng = np.random.default_rng((settings.seed, step))
        rows = [self.draw(length, rng) for _ in range(settings.batch_tokens // length)]
        return torch.from_numpy(np.stack(rows))


def build_model(settings: Settings) -> LlamaForCausalLM:
    """The architecture of novel-7m at the given sizes, in float32: master weights of a bfloat16 run."""
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden_size // settings.heads,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
    )
    return LlamaForCausalLM(config)


def build_optimizers(model: LlamaForCausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms.

    Muon equalises the singular values of an update, which makes sense for maps between hidden states only.
    """
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers." in n]
    chosen = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=settings.muon_lr, weight_decay=settings.weight_decay),
        torch.optim.AdamW(rest, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def lr_scale(step: int, steps: int, settings: Settings) -> float:
    """Factor on every learning rate: a linear rise, then a linear or cosine fall to a twentieth."""
    warmup = max(1, round(settings.warmup * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    left = 1 - done if settings.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return 0.05 + 0.95 * left


def save_checkpoint(
    path: Path,
    step: int,
    model: LlamaForCausalLM,
    optimizers: Sequence[torch.optim.Optimizer],
    settings: Settings,
) -> None:
    """Written beside and moved into place, so that a killed run never leaves half a file under the name."""
    state = {
        "step": step,
        "settings": json.dumps(asdict(settings), sort_keys=True),
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


def load_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizers: Sequence[torch.optim.Optimizer], settings: Settings
) -> int:
    """Restore model and optimisers; returns the number of steps done."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        saved: dict[str, Any] = json.loads(state["settings"])
        step = int(state["step"])
    except Exception as error:  # torch.load raises whatever unpickling a broken file happens to raise
        raise TrainingError(f"{path} cannot be read ({error}): delete it and start without --resume") from error
    now = asdict(settings)
    changed = [f"{key}: {saved.get(key)} then, {now[key]} now" for key in now if saved.get(key) != now[key]]
    if changed:
        raise TrainingError(f"{path} was written under other settings ({'; '.join(changed)}): use the same ones")
    model.load_state_dict(state["model"])
    for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    return step


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 for matrix products; weights, norms and the loss stay in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, tokens: Tokens, window: int, max_windows: int) -> float:
    """Perplexity per token over separate windows of `window` tokens."""
    count = min(len(tokens) // window, max_windows)
    if not count:
        raise TrainingError(f"a held-out file has {len(tokens)} tokens, fewer than one window of {window}")
    losses = []
    for row in tokens[: count * window].reshape(count, window):
        ids = torch.from_numpy(row)[None].to(model.device)
        with autocast(model.device):
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    return math.exp(sum(losses) / count)


@torch.no_grad()
def secret_digits_right(
    model: LlamaForCausalLM,
    filler: Tokens,
    tokenizer: PreTrainedTokenizerFast,
    length: int,
    trials: int,
    seed: int,
) -> float:
    """Share of secret digits predicted right, the digits before given; 0.1 is chance."""
    rng = np.random.default_rng((seed, 1))
    right = total = 0
    for _ in range(trials):
        told, asked = secret_pair(tokenizer, NAMES[int(rng.integers(0, len(NAMES)))], rng)
        room = max(0, min(length - len(told) - len(asked), len(filler)))
        start = int(rng.integers(0, len(filler) - room + 1))
        ids = np.concatenate([told, filler[start : start + room], asked])
        with autocast(model.device):
            logits = model(input_ids=torch.from_numpy(ids)[None].to(model.device)).logits[0]
        guesses = logits.argmax(-1).cpu().numpy()
        digits = [
            i for i in range(len(ids) - len(asked), len(ids)) if str(tokenizer.decode([ids[i]])).strip().isdigit()
        ]
        right += sum(int(guesses[i - 1] == ids[i]) for i in digits)
        total += len(digits)
    return right / total


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Everything from the folder of text to the saved model."""
    settings.check()
    if args.steps < 1 or args.checkpoint_every < 1:
        raise TrainingError("--steps and --checkpoint-every must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise TrainingError("--device cuda: torch sees no CUDA device here; use --device cpu")
    output: Path = args.output
    if output.exists() and not output.is_dir():
        raise TrainingError(f"--output {output} is a file: name a folder")
    checkpoint = output / "checkpoint.pt"
    if args.resume and not checkpoint.is_file():
        raise TrainingError(f"--resume: {checkpoint} does not exist; leave --resume out to start a run")
    if checkpoint.exists() and not args.resume:
        raise TrainingError(f"{checkpoint} exists: continue it with --resume, or choose another --output")

    files = find_texts(args.folder, args.held_out)
    if args.resume:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output)
    else:
        tokenizer = train_tokenizer(files, settings.vocab_size)
        tokenizer.save_pretrained(output)
    sequences = Sequences(encode_files(tokenizer, files), tokenizer, settings)

    device = torch.device(args.device)
    model = build_model(settings).to(device)
    optimizers = build_optimizers(model, settings)
    first = load_checkpoint(checkpoint, model, optimizers, settings) if args.resume else 0
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(files)} files, {len(sequences.stream):,} tokens, {parameters / 1e6:.2f} M parameters, {device}")

    model.train()
    progress = tqdm(range(first, args.steps), desc="train", unit="step", initial=first, total=args.steps)
    for step in progress:
        ids = sequences.batch(step, args.steps).to(device)
        with autocast(device):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = lr_scale(step, args.steps, settings)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0 or step + 1 == args.steps:
            progress.set_postfix(loss=f"{loss.item():.4f}", length=ids.shape[1])
        if (step + 1) % args.checkpoint_every == 0 or step + 1 == args.steps:
            save_checkpoint(checkpoint, step + 1, model, optimizers, settings)

    model.eval()
    for path in args.held_out:
        tokens = encode(tokenizer, read_text(path))
        value = perplexity(model, tokens, settings.long_length, args.eval_windows)
        print(f"{path.name}: perplexity {value:.2f} per token, windows of {settings.long_length}")
    share = secret_digits_right(model, sequences.stream, tokenizer, settings.long_length, 16, settings.seed)
    print(f"secret-number digits right: {share:.2f} (chance 0.10)")

    model.generation_config.do_sample = False
    model.generation_config.pad_token_id = END_ID
    model.to(torch.bfloat16).save_pretrained(output)
    print(f"saved to {output}")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Settings]:
    """The defaults are those of novel-7m."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_novel", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="folder with .txt files, searched with its subfolders")
    parser.add_argument("--output", type=Path, required=True, help="folder for tokenizer, checkpoint and model")
    parser.add_argument("--held-out", type=Path, nargs="*", default=[], help="files to measure on, not to train on")
    parser.add_argument("--steps", type=int, default=2700, help="about one pass over 11 M tokens at 4,096 a step")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--eval-windows", type=int, default=64, help="held-out windows to measure at most")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--intermediate-size", type=int, help="width of the MLP; default 2.75 x hidden size")
    parser.add_argument("--batch-tokens", type=int, default=4096, help="tokens of one step")
    parser.add_argument("--short-length", type=int, default=256, help="sequence length of the first part")
    parser.add_argument("--long-length", type=int, default=1024, help="sequence length of the last part")
    parser.add_argument("--long-fraction", type=float, default=0.3, help="share of the steps at the long length")
    parser.add_argument("--pattern-fraction", type=float, default=0.4, help="share of sequences with a pattern")
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adamw-lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01, help="of the hidden matrices")
    parser.add_argument("--warmup", type=float, default=0.02, help="share of the steps with a rising learning rate")
    parser.add_argument("--decay", choices=("linear", "cosine"), default="linear")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for name in ("hidden_size", "layers", "heads", "kv_heads", "eval_windows"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.intermediate_size is None:
        args.intermediate_size = args.hidden_size * 11 // 4
    return args, Settings(**{name: getattr(args, name) for name in Settings.__dataclass_fields__})


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry: 0 on success, 2 with one line on something the user can put right."""
    args, settings = parse(argv)
    try:
        run(args, settings)
    except (TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
