"""ProSparse training, by default with the dense model as the teacher.

Loss = language loss on sampled positions
     + weight * relative error of the residual stream at some layers
     + lambda(progress) * mean over layers of steer_l * mean|x1_l| / (its size at the start).

The language loss is KL(teacher || student), or the paper's next-token cross-entropy: the base
model's training data is not public, its distribution is. Substitution SiLU -> ReLU happens at step
0 (step 1 of the paper), the L1 term follows the sine stages (step 2); a stage may also train with a
FATReLU threshold in place.
"""

from __future__ import annotations

import ctypes
import json
import math
import random
import shutil
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from .lora import Student
from .modeling import SPARSE_ACTIVATIONS, Llama, block, load_state, rms_norm, rope_tables
from .schedule import Schedule, Stage, steer

LANGUAGE_LOSSES = ("distillation", "next-token")


@dataclass(frozen=True)
class TrainConfig:
    """A recipe. Defaults are the ones of recipes/default.toml."""

    language_loss: str = "distillation"
    activation: str = "relu"
    total_tokens: int = 1_750_000
    row_length: int = 384
    rows_per_step: int = 4
    chat_share: float = 0.55
    peak_lr: float = 1.5e-3
    warmup: float = 0.02
    ffn_rank: int | None = 64
    attention_rank: int | None = 16
    kl_positions: float = 0.5
    hidden_weight: float = 0.15
    hidden_every: int = 3
    target_sparsity: float = 0.83
    steer_gain: float = 6.0
    clip_norm: float = 1.0
    seed: int = 0
    stages: tuple[Stage, ...] = (
        Stage(0.05, 0.0),
        Stage(0.12, 0.3),
        Stage(0.31, 0.35),
        Stage(0.45, 0.35, 0.1),
        Stage(1.0, 0.35, 0.2),
    )

    def __post_init__(self) -> None:
        for name, known in (("language_loss", LANGUAGE_LOSSES), ("activation", SPARSE_ACTIVATIONS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, is {value!r}")

    @classmethod
    def from_toml(cls, path: Path) -> TrainConfig:
        values = tomllib.loads(path.read_text())
        known = set(cls.__dataclass_fields__)
        if unknown := sorted(set(values) - known):
            raise ValueError(f"{path}: unknown settings {unknown}; known: {sorted(known)}")
        if "stages" in values:
            values["stages"] = tuple(Stage(**stage) for stage in values["stages"])
        # TOML has no null: rank 0 stands for full-parameter training
        for key in ("ffn_rank", "attention_rank"):
            if values.get(key) == 0:
                values[key] = None
        return cls(**values)


class RowOrder:
    """Which row comes when: a fixed function of the seed, so a resumed run sees the same rows."""

    def __init__(self, chats: Tensor, texts: Tensor | None, chat_share: float, seed: int) -> None:
        self.sources = [chats] if texts is None else [chats, texts]
        self.share = 1.0 if texts is None else chat_share
        self.random = random.Random(seed)
        self.queues: list[list[int]] = [[] for _ in self.sources]

    def next_rows(self, count: int) -> Tensor:
        rows = []
        for _ in range(count):
            which = 0 if self.random.random() < self.share else 1
            queue = self.queues[which]
            if not queue:
                queue.extend(range(len(self.sources[which])))
                self.random.shuffle(queue)
            rows.append(self.sources[which][queue.pop()])
        return torch.stack(rows).long()


def distillation_loss(student_PV: Tensor, teacher_PV: Tensor) -> Tensor:
    """Mean KL(teacher || student) in nats over P positions."""
    teacher = teacher_PV.float().log_softmax(-1)
    student = student_PV.float().log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1).mean()


def keep_freed_memory() -> None:
    """Let the C library keep large freed blocks instead of unmapping each of them.

    Every step allocates and frees the same large tensors. Mapped anew each time, their pages are
    faulted in and zeroed again. Does nothing where the C library is not glibc.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # M_* in glibc's malloc.h
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, -1)
    libc.mallopt(top_pad, 256 << 20)


class Trainer:
    """Owns a run folder: log.jsonl, checkpoint.pt, adapter/ (or model/ for full training)."""

    def __init__(
        self,
        dense: Path,
        chats: Tensor,
        texts: Tensor | None,
        config: TrainConfig,
        run: Path,
        device: str = "cpu",
        compile_blocks: bool = True,
    ) -> None:
        self.config, self.run = config, run
        self.device = torch.device(device)
        self.teacher = Llama(dense, device)
        self.shape = self.teacher.shape
        state = {k: v.to(self.device) for k, v in load_state(dense).items()}
        self.student = Student(
            state, self.shape, config.ffn_rank, config.attention_rank, config.seed
        )
        self.schedule = Schedule(config.stages)
        self.rows = RowOrder(chats, texts, config.chat_share, config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.run_block: Callable[..., Any] = torch.compile(block) if compile_blocks else block
        self.kl: Callable[..., Tensor] = (
            torch.compile(distillation_loss) if compile_blocks else distillation_loss
        )
        self.optimizer = torch.optim.AdamW(
            list(self.student.params.values()),
            lr=config.peak_lr,
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=True,
        )
        self.step = 0
        self.tokens = 0
        self.l1_start_L: Tensor | None = None
        self.sparsity_L = torch.zeros(self.shape.num_layers, device=self.device)
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")

    @property
    def progress(self) -> float:
        return min(1.0, self.tokens / self.config.total_tokens)

    def learning_rate(self) -> float:
        c = self.config
        if self.progress < c.warmup:
            return c.peak_lr * (self.progress / c.warmup + 0.02)
        done = (self.progress - c.warmup) / (1 - c.warmup)
        return c.peak_lr * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns what the log line holds."""
        c, shape = self.config, self.shape
        ids_BS = self.rows.next_rows(c.rows_per_step).to(self.device)
        count = ids_BS.numel()
        cos, sin = rope_tables(shape, ids_BS.shape[1], self.device)
        threshold = torch.tensor(
            self.schedule.threshold(self.progress), dtype=torch.bfloat16, device=self.device
        )
        teacher_stream = self._teacher_stream(ids_BS)
        x_BSD = self.teacher.embed_VD[ids_BS]
        l1s, zeros, errors = [], [], []
        for layer in range(shape.num_layers):
            x_BSD, l1_BS, zeros_BS = self.run_block(
                x_BSD, self.student.block(layer), cos, sin, threshold, shape, c.activation
            )
            l1s.append(l1_BS.mean())
            zeros.append(zeros_BS.detach().mean())
            if c.hidden_weight and (shape.num_layers - 1 - layer) % c.hidden_every == 0:
                wanted = teacher_stream[layer].float()
                miss = (x_BSD.float() - wanted).square().sum(-1)
                errors.append((miss / wanted.square().sum(-1)).mean())
        language_loss = self._language_loss(ids_BS, x_BSD, teacher_stream)
        hidden_error = torch.stack(errors).mean() if errors else torch.zeros(())

        l1_L, zeros_L = torch.stack(l1s), torch.stack(zeros)
        if self.l1_start_L is None:
            self.l1_start_L = l1_L.detach().clone()
        decay = min(0.95, self.step / (self.step + 1))
        self.sparsity_L = decay * self.sparsity_L + (1 - decay) * zeros_L
        l1_weight = self.schedule.l1_weight(self.progress)
        steer_L = steer(self.sparsity_L, c.target_sparsity, c.steer_gain)
        l1 = (steer_L * l1_L / self.l1_start_L).mean()
        loss = language_loss + c.hidden_weight * hidden_error + l1_weight * l1
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.step}; lower peak_lr and resume"
            )

        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(self.student.params.values(), c.clip_norm)
        self.optimizer.step()
        self.step += 1
        self.tokens += count
        return {
            "step": self.step,
            "tokens": self.tokens,
            "kl" if c.language_loss == "distillation" else "nll": language_loss.item(),
            "hidden": hidden_error.item(),
            "l1": (l1_L / self.l1_start_L).mean().item(),
            "sparsity": zeros_L.mean().item(),
            "l1_weight": l1_weight,
            "threshold": float(threshold),
            "lr": lr,
            "grad_norm": float(norm),
        }

    def _teacher_stream(self, ids_BS: Tensor) -> list[Tensor]:
        """The teacher's residual stream after each layer, or nothing if no term asks for it."""
        if self.config.language_loss == "distillation" or self.config.hidden_weight:
            return self.teacher.hidden(ids_BS, self.run_block)[0]
        return []

    def _language_loss(self, ids_BS: Tensor, x_BSD: Tensor, teacher_stream: list[Tensor]) -> Tensor:
        """Of the student's last residual stream, in nats per token, on sampled positions."""
        count = ids_BS.numel()
        positions_P = torch.randperm(count, generator=self.generator)
        positions_P = positions_P[: int(count * self.config.kl_positions)].to(self.device)
        eps, embed_VD = self.shape.norm_eps, self.teacher.embed_VD
        if self.config.language_loss == "next-token":
            # the last position of a row has no next token
            positions_P = positions_P[(positions_P + 1) % ids_BS.shape[1] != 0]
        last_PD = rms_norm(x_BSD.flatten(0, 1)[positions_P], self.student.final_norm(), eps)
        student_PV = F.linear(last_PD, embed_VD)
        if self.config.language_loss == "next-token":
            return F.cross_entropy(student_PV.float(), ids_BS.flatten()[positions_P + 1])
        with torch.no_grad():
            wanted_PD = teacher_stream[-1].flatten(0, 1)[positions_P]
            teacher_PV = F.linear(rms_norm(wanted_PD, self.teacher.final_norm_D, eps), embed_VD)
        return self.kl(student_PV, teacher_PV)

    def save(self) -> None:
        """Everything a resumed run needs, replaced in one move."""
        checkpoint = {
            "params": {k: v.detach() for k, v in self.student.params.items()},
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "l1_start_L": self.l1_start_L,
            "sparsity_L": self.sparsity_L,
            "generator": self.generator.get_state(),
        }
        part = self.run / "checkpoint.pt.part"
        torch.save(checkpoint, part)
        part.rename(self.run / "checkpoint.pt")

    def resume(self) -> bool:
        """Go on from checkpoint.pt if there is one."""
        file = self.run / "checkpoint.pt"
        if not file.exists():
            return False
        checkpoint = torch.load(file, map_location=self.device, weights_only=True)
        with torch.no_grad():
            for key, param in self.student.params.items():
                param.copy_(checkpoint["params"][key])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.step, self.tokens = checkpoint["step"], checkpoint["tokens"]
        self.l1_start_L = checkpoint["l1_start_L"]
        self.sparsity_L = checkpoint["sparsity_L"]
        self.generator.set_state(checkpoint["generator"].cpu())
        for _ in range(self.step):
            self.rows.next_rows(self.config.rows_per_step)
        return True

    def write_model(self, folder: Path) -> None:
        """The merged student as a Hugging Face folder beside the dense model's tokenizer."""
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.teacher.folder.iterdir():
            if file.suffix in {".json", ".jinja", ".model"} and "index" not in file.name:
                shutil.copy(file, folder / file.name)
        config = json.loads((folder / "config.json").read_text())
        config["hidden_act"] = self.config.activation
        config["hidden_act_param"] = self.schedule.threshold(1.0)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        merged = {k: v.contiguous().cpu() for k, v in self.student.merged_state().items()}
        part = folder / "model.safetensors.part"
        save_file(merged, part, metadata={"format": "pt"})
        part.rename(folder / "model.safetensors")

    def run_to_end(
        self,
        on_step: Callable[[dict[str, Any]], None],
        save_every_s: float = 300.0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train until the budget is spent; checkpoint on the way, at the end and when stopped."""
        saved = time.monotonic()
        with (self.run / "log.jsonl").open("a") as log:
            while self.tokens < self.config.total_tokens and not should_stop():
                start = time.monotonic()
                line = self.train_step()
                line["seconds"] = time.monotonic() - start
                log.write(json.dumps(line) + "\n")
                log.flush()
                on_step(line)
                if time.monotonic() - saved > save_every_s:
                    self.save()
                    saved = time.monotonic()
        self.save()
