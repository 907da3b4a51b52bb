"""Train the demo tokenizer and language model on data/corpus and measure them on held-out text.

Run as `python data/train_model.py WORK --minutes 55`. Checkpoints and the record of losses go into
WORK, a folder outside the repository. The same command resumes an interrupted run; `--minutes 0`
exports the latest checkpoint as it is. The learning rate follows the share of the minutes that has
passed, so that a run on a shared machine still ends on time with a decayed learning rate.
"""

import argparse
import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

log = logging.getLogger("train_model")

HERE = Path(__file__).parent
END_OF_TEXT = "<|endoftext|>"
VOCAB = 4096
CONTEXT = 256  # tokens a training window predicts
BATCH = 32  # windows a step
SEED = 0
MUON_LR = 0.012
ADAM_LR = 4e-3
WARMUP, DECAY_FROM = 0.01, 0.35  # shares of the run
CHECKPOINT_SECONDS = 180
LOG_STEPS = 20
QUICK_WINDOWS = 128  # held-out windows measured at each checkpoint


@dataclass
class Progress:
    """What changes during a run; saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0


# --- text and tokens ---------------------------------------------------------------------------


def texts(split: str) -> list[str]:
    return pq.read_table(HERE / "corpus" / f"{split}.parquet")["text"].to_pylist()


def train_tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts("train"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, split: str) -> np.ndarray:
    """All documents of a split as one stream, with END_OF_TEXT before each and after the last."""
    end = [tokenizer.eos_token_id]
    ids = tokenizer(texts(split), verbose=False)["input_ids"]
    return np.concatenate([part for row in ids for part in (end, row)] + [end]).astype(np.int64)


def windows(stream: np.ndarray, start: int = 0) -> np.ndarray:
    """Windows (n, CONTEXT + 1); neighbours share a token, so that each token is predicted once."""
    count = (len(stream) - 1 - start) // CONTEXT
    return np.lib.stride_tricks.sliding_window_view(stream[start:], CONTEXT + 1)[::CONTEXT][:count]


def batches(stream: np.ndarray, step: int) -> Iterator[torch.Tensor]:
    """Batches from `step` on; each epoch cuts the stream at its own offset, in its own order."""
    per_epoch = ((len(stream) - 1) // CONTEXT - 1) // BATCH
    while True:
        epoch, position = divmod(step, per_epoch)
        random = np.random.default_rng([SEED, epoch])
        cut = windows(stream, random.integers(CONTEXT))
        order = random.permutation(len(cut))
        for first in range(position * BATCH, per_epoch * BATCH, BATCH):
            yield torch.from_numpy(cut[order[first : first + BATCH]])
        step = (epoch + 1) * per_epoch


# --- measurement -------------------------------------------------------------------------------


def window_loss(model: torch.nn.Module, batch: torch.Tensor, reduction: str) -> torch.Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return cross_entropy(
        logits.flatten(0, 1).float(), batch[:, 1:].reshape(-1), reduction=reduction
    )


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, stream: np.ndarray) -> float:
    """Nats per token over all tokens of the stream except the first; a window has no context.

    The first predictions of each window see little context, so the result is an upper bound.
    """
    cut = windows(stream)
    total = sum(
        window_loss(model, torch.from_numpy(cut[i : i + BATCH].copy()), "sum").item()
        for i in range(0, len(cut), BATCH)
    )
    rest = torch.from_numpy(stream[cut.shape[0] * CONTEXT :].copy())[None]
    if rest.shape[1] > 1:
        total += window_loss(model, rest, "sum").item()
    return total / (len(stream) - 1)


def unigram_loss(train: np.ndarray, held_out: np.ndarray) -> float:
    counts = np.bincount(train, minlength=VOCAB) + 1.0
    return float(-np.log(counts / counts.sum())[held_out[1:]].mean())


def bigram_loss(train: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """(loss, discount) of interpolated Kneser-Ney (Chen and Goodman 1999, section 2.7).

    The discount is tuned on the held-out stream itself, which favours the baseline.
    """
    pairs = np.bincount(train[:-1] * VOCAB + train[1:], minlength=VOCAB**2).reshape(VOCAB, VOCAB)
    continuation = (pairs > 0).sum(0) + 0.1
    continuation = continuation / continuation.sum()
    total, kinds = pairs.sum(1), (pairs > 0).sum(1)
    before, after = held_out[:-1], held_out[1:]
    seen, rows, kinds = pairs[before, after], np.maximum(total[before], 1), kinds[before]

    def loss(discount: float) -> float:
        back_off = np.where(total[before] > 0, discount * kinds / rows, 1.0)
        chance = np.maximum(seen - discount, 0) / rows + back_off * continuation[after]
        return float(-np.log(chance).mean())

    return min((loss(discount), discount) for discount in np.arange(0.05, 1.0, 0.05).round(2))


# --- training ----------------------------------------------------------------------------------


def new_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=704,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def make_optimizers(model: LlamaForCausalLM) -> dict[str, torch.optim.Optimizer]:
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in named.items() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0)
    return {"muon": muon, "adam": adam}


def lr_share(done: float) -> float:
    """Learning rate as a share of its peak: warm-up, plateau, linear decay; `done` is in [0, 1]."""
    return max(min(1.0, done / WARMUP, (1 - done) / (1 - DECAY_FROM)), 0.0)


def save_checkpoint(path: Path, model, optimizers: dict, progress: Progress) -> None:
    state = {"model": model.state_dict(), "progress": asdict(progress)}
    state |= {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_checkpoint_(path: Path, model, optimizers: dict) -> Progress:
    if not path.exists():
        return Progress()
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(state[name])
    log.info("resumed at step %d", state["progress"]["step"])
    return Progress(**state["progress"])


def record(work: Path, **values: float) -> None:
    log.info("%s", " ".join(f"{k}={v:.4g}" for k, v in values.items()))
    with (work / "losses.jsonl").open("a") as file:
        file.write(json.dumps({k: round(v, 4) for k, v in values.items()}) + "\n")


def make_step(model: LlamaForCausalLM, compiled: bool):
    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return window_loss(model, batch, "mean")

    return torch.compile(loss_of, dynamic=False) if compiled else loss_of


def update_(model, optimizers: dict, share: float) -> None:
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * share
        optimizer.step()
        optimizer.zero_grad()


def quick_loss(model: LlamaForCausalLM, held_out: np.ndarray) -> float:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return held_out_loss(model, held_out[: QUICK_WINDOWS * CONTEXT + 1])


def train(model, streams: dict, work: Path, minutes: float, compiled: bool) -> Progress:
    optimizers = make_optimizers(model)
    checkpoint = work / "checkpoint.pt"
    progress = load_checkpoint_(checkpoint, model, optimizers)
    source = batches(streams["train"], progress.step)
    loss_of = make_step(model, compiled)
    recent, clock, saved_at = [], time.monotonic(), progress.seconds
    while progress.seconds < minutes * 60:
        loss = loss_of(next(source))
        loss.backward()
        update_(model, optimizers, lr_share(progress.seconds / (minutes * 60)))
        now = time.monotonic()
        progress.seconds, clock = progress.seconds + now - clock, now
        progress.step += 1
        recent.append(loss.item())
        if progress.step % LOG_STEPS == 0:
            record(work, **asdict(progress), train=float(np.mean(recent)))
            recent.clear()
        over = progress.seconds >= minutes * 60
        if over or progress.seconds - saved_at > CHECKPOINT_SECONDS:
            save_checkpoint(checkpoint, model, optimizers, progress)
            quick = quick_loss(model, streams["validation"])
            record(work, **asdict(progress), held_out_sample=quick)
            saved_at = progress.seconds
    return progress


# --- the whole run -----------------------------------------------------------------------------


def tokenizer_in(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a folder, trained if it is missing: a resumed run keeps its token ids."""
    if not (folder / "tokenizer.json").exists():
        train_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def copy_tokenizer(work: Path, folder: Path) -> None:
    """Copy the files; saving a loaded tokenizer would write the path that it was loaded from."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(work / name, folder / name)


def saved_model_losses(folder: Path, held_out: np.ndarray) -> dict[str, float]:
    types = {"model_bfloat16": torch.bfloat16, "model_float32": torch.float32}
    return {
        name: held_out_loss(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), held_out)
        for name, dtype in types.items()
    }


def report(folder: Path, streams: dict, progress: Progress, parameters: int) -> dict:
    bigram, discount = bigram_loss(streams["train"], streams["validation"])
    return {
        "held_out_nats_per_token": {
            "unigram": unigram_loss(streams["train"], streams["validation"]),
            "bigram": bigram,
            **saved_model_losses(folder, streams["validation"]),
        },
        "bigram_discount": discount,
        "tokens": {name: len(stream) for name, stream in streams.items()},
        "parameters": parameters,
        "training": asdict(progress) | {"tokens": progress.step * BATCH * CONTEXT},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path, help="folder for checkpoints, outside the repository")
    parser.add_argument("--minutes", type=float, default=55, help="training time in all")
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--no-compile", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options.work.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_in(options.work)
    streams = {split: token_stream(tokenizer, split) for split in ("train", "validation")}
    log.info("tokens: %s", {name: len(stream) for name, stream in streams.items()})
    model = new_model()
    progress = train(model, streams, options.work, options.minutes, not options.no_compile)
    copy_tokenizer(options.work, options.out)
    model.to(torch.bfloat16).save_pretrained(options.out)
    results = report(options.out, streams, progress, model.num_parameters())
    (options.out / "losses.json").write_text(json.dumps(results, indent=2) + "\n")
    log.info("%s", json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
