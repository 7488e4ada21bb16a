"""ProSparse training, by default with the dense model as the teacher.

Loss = language loss on sampled positions
     + weight * relative error of the residual stream at some layers
     + lambda(progress) * mean over layers of steer_l * mean|x1_l| / (its size at the start).

The language loss is KL(teacher || student), or the paper's next-token cross-entropy: the base
model's training data is not public, its distribution is. Substitution SiLU -> ReLU happens at step
0 (step 1 of the paper), the L1 term follows the sine stages (step 2); a stage may also train with a
FATReLU threshold in place. On the way the student is compared with the teacher on validation
documents: the curve of quality against tokens.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)

from predictor.files import replacing

from .corpus import RowOrder
from .evaluate import common_prefix, compare
from .export import write_adapter, write_checkpoint
from .lora import Student
from .losses import distillation_loss, stream_error
from .modeling import Llama, block, load_state, rms_norm, rope_tables
from .parallel import Processes, whole
from .recipe import TrainConfig
from .schedule import Schedule


@dataclass(frozen=True)
class Validation:
    """Documents that are not trained on, and how often the student is compared on them."""

    documents: Sequence[Sequence[int]]
    every_tokens: int = 250_000


class Trainer:
    """Owns a run folder: log.jsonl, curve.jsonl, checkpoint.pt, adapter/ (LoRA), model/."""

    def __init__(
        self,
        dense: Path,
        chats: Tensor,
        texts: Tensor | None,
        config: TrainConfig,
        run: Path,
        device: str = "cpu",
        compile_blocks: bool = True,
        *,
        validation: Validation | None = None,
        start_from: Path | None = None,
        processes: Processes | None = None,
    ) -> None:
        """`start_from`: the adapter folder of an earlier run. `processes` replaces `device`."""
        self.config, self.run, self.dense = config, run, dense
        self.validation = validation
        self.processes = processes or Processes(device=torch.device(device))
        self.device = self.processes.device
        self.teacher = Llama(dense, self.device)
        self.shape = self.teacher.shape
        state = {k: v.to(self.device) for k, v in load_state(dense).items()}
        self.student = Student(
            state, self.shape, config.ffn_rank, config.attention_rank, config.seed
        )
        if start_from:
            self.student.load_adapter(start_from)
        self.processes.shard(self.student, self.student.layers)
        self.schedule = Schedule(config.stages)
        self.steering = config.steering()
        self.rows = RowOrder(chats, texts, config.chat_share, config.seed)
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
        self.validated_at = -1  # tokens
        self.l1_start_L: Tensor | None = None
        self.sparsity_L = torch.zeros(self.shape.num_layers, device=self.device)
        if self.processes.is_main:
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

    def next_rows(self) -> Tensor:
        """This process's rows of the next step, [rows_per_step, row_length]."""
        count = self.config.rows_per_step
        all_rows = self.rows.next_rows(count * self.processes.count)
        return all_rows[self.processes.index * count :][:count].to(self.device)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step; returns what the log line holds."""
        c, shape = self.config, self.shape
        ids_BS = self.next_rows()
        count = ids_BS.numel() * self.processes.count
        threshold = torch.tensor(
            self.schedule.threshold(self.progress), dtype=torch.bfloat16, device=self.device
        )
        rest = (*rope_tables(shape, ids_BS.shape[1], self.device), threshold, shape, c.activation)
        teacher_stream = self._teacher_stream(ids_BS)
        stream, normed_BSD, l1_L, zeros_L = self.student(
            self.teacher.embed_VD[ids_BS], self.run_block, *rest
        )
        language_loss = self._language_loss(ids_BS, normed_BSD, teacher_stream)
        hidden_error = stream_error(
            stream, teacher_stream if c.hidden_weight else [], c.hidden_every
        )

        means = self.processes.mean(
            torch.cat([torch.stack([language_loss, hidden_error]).detach(), l1_L.detach(), zeros_L])
        )
        seen_l1_L, seen_zeros_L = means[2:].chunk(2)
        if self.l1_start_L is None:
            self.l1_start_L = seen_l1_L.clone()
        decay = min(0.95, self.step / (self.step + 1))
        self.sparsity_L = decay * self.sparsity_L + (1 - decay) * seen_zeros_L
        l1_weight = self.schedule.l1_weight(self.progress)
        steer_L = self.steering.factor_L(self.sparsity_L, count)
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
        params = self.student.params.values()
        norm = whole(torch.nn.utils.clip_grad_norm_(params, c.clip_norm))
        self.optimizer.step()
        self.step += 1
        self.tokens += count
        return {
            "step": self.step,
            "tokens": self.tokens,
            "kl" if c.language_loss == "distillation" else "nll": float(means[0]),
            "hidden": float(means[1]),
            "l1": float((seen_l1_L / self.l1_start_L).mean()),
            "sparsity": float(seen_zeros_L.mean()),
            "l1_weight": l1_weight,
            "steer": float(steer_L.mean()),
            "threshold": float(threshold),
            "lr": lr,
            "grad_norm": float(norm),
        }

    def _teacher_stream(self, ids_BS: Tensor) -> list[Tensor]:
        """The teacher's residual stream after each layer, or nothing if no term asks for it."""
        if self.config.language_loss == "distillation" or self.config.hidden_weight:
            return self.teacher.hidden(ids_BS, self.run_block)[0]
        return []

    def _sampled_positions(self, count: int) -> Tensor:
        """A fixed function of seed, step and process."""
        place = self.step * self.processes.count + self.processes.index
        generator = torch.Generator().manual_seed((self.config.seed << 32) + place)
        positions_P = torch.randperm(count, generator=generator)
        return positions_P[: int(count * self.config.kl_positions)].to(self.device)

    def _language_loss(
        self, ids_BS: Tensor, normed_BSD: Tensor, teacher_stream: list[Tensor]
    ) -> Tensor:
        """Of the student's last vectors, in nats per token, on sampled positions."""
        positions_P = self._sampled_positions(ids_BS.numel())
        eps, embed_VD = self.shape.norm_eps, self.teacher.embed_VD
        if self.config.language_loss == "next-token":
            # the last position of a row has no next token
            positions_P = positions_P[(positions_P + 1) % ids_BS.shape[1] != 0]
        student_PV = F.linear(normed_BSD.flatten(0, 1)[positions_P], embed_VD)
        if self.config.language_loss == "next-token":
            return F.cross_entropy(student_PV.float(), ids_BS.flatten()[positions_P + 1])
        with torch.no_grad():
            wanted_PD = teacher_stream[-1].flatten(0, 1)[positions_P]
            teacher_PV = F.linear(rms_norm(wanted_PD, self.teacher.final_norm_D, eps), embed_VD)
        return self.kl(student_PV, teacher_PV)

    def save(self) -> None:
        """Everything a resumed run needs, replaced in one move."""
        params, optimizer = get_state_dict(
            self.student, self.optimizer, options=self._whole_state_options()
        )
        checkpoint = {
            "params": params,
            "optimizer": optimizer,
            "step": self.step,
            "tokens": self.tokens,
            "validated_at": self.validated_at,
            "l1_start_L": self.l1_start_L,
            "sparsity_L": self.sparsity_L,
            "steering": self.steering.integral,
        }
        if self.processes.is_main:
            with replacing(self.run / "checkpoint.pt") as part, part.open("wb") as file:
                torch.save(checkpoint, file)

    def _whole_state_options(self) -> StateDictOptions:
        """Whole tensors, wherever they are sharded; of what is trained only."""
        return StateDictOptions(
            full_state_dict=True,
            cpu_offload=self.processes.count > 1,
            ignore_frozen_params=True,
            strict=False,
        )

    def resume(self) -> bool:
        """Go on from checkpoint.pt if there is one."""
        file = self.run / "checkpoint.pt"
        if not file.exists():
            return False
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        set_state_dict(
            self.student,
            self.optimizer,
            model_state_dict=checkpoint["params"],
            optim_state_dict=checkpoint["optimizer"],
            options=self._whole_state_options(),
        )
        self.step, self.tokens = checkpoint["step"], checkpoint["tokens"]
        self.validated_at = checkpoint["validated_at"]
        if checkpoint["l1_start_L"] is not None:
            self.l1_start_L = checkpoint["l1_start_L"].to(self.device)
        self.sparsity_L = checkpoint["sparsity_L"].to(self.device)
        self.steering.integral = checkpoint["steering"]
        for _ in range(self.step):
            self.next_rows()
        return True

    def merged_state(self) -> dict[str, Tensor]:
        """The student as a plain checkpoint; where it is sharded, every process has to ask."""
        dense = {name: tensor.to(self.device) for name, tensor in load_state(self.dense).items()}
        return self.student.merged_state(dense)

    def validate(self) -> dict[str, Any]:
        """Compare the student with its teacher on the validation documents: a point of the curve.

        As `hotneuron prosparse evaluate` does, with the template's opening left out.
        """
        assert self.validation is not None
        threshold = self.schedule.threshold(self.progress)
        shape = replace(
            self.shape,
            hidden_act=self.config.activation,
            thresholds=(threshold,) * self.shape.num_layers,
        )
        student = Llama(self.dense, self.device, state=self.merged_state(), shape=shape)
        documents = self.validation.documents
        quality = compare(student, self.teacher, documents, common_prefix(documents))
        return {
            "tokens": self.tokens,
            "kl": quality.kl,
            "top1_agreement": quality.top1_agreement,
            "sparsity": quality.sparsity,
            "sparsity_by_layer": [round(share, 4) for share in quality.sparsity_by_layer],
            "perplexity": quality.perplexity,
            "dense_perplexity": quality.teacher_perplexity,
            "threshold": threshold,
            "validation_tokens": quality.tokens,
        }

    def write_adapter(self, folder: Path, base_model: str) -> None:
        """The trained updates in the PEFT format."""
        tensors, config = self.student.adapter(base_model)
        if self.processes.is_main:
            write_adapter(folder, tensors, config)

    def write_model(self, folder: Path) -> None:
        """The merged student as a Hugging Face folder beside the dense model's tokenizer."""
        merged = self.merged_state()
        if not self.processes.is_main:
            return
        threshold = self.schedule.threshold(1.0)
        config = {"hidden_act": self.config.activation, "hidden_act_param": threshold}
        write_checkpoint(folder, self.teacher.folder, merged, config)

    def run_to_end(
        self,
        on_step: Callable[[dict[str, Any]], None],
        save_every_s: float = 300.0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train until the budget is spent; checkpoint on the way, at the end and when stopped."""
        saved = time.monotonic()
        while self.tokens < self.config.total_tokens:
            self._validate_if_due()
            due = time.monotonic() - saved > save_every_s
            stop, save = self.processes.any(should_stop(), due)
            if stop:
                break
            if save:
                self.save()
                saved = time.monotonic()
            start = time.monotonic()
            line = self.train_step()
            line["seconds"] = time.monotonic() - start
            self._append("log.jsonl", line)
            on_step(line)
        else:
            self._validate_if_due(at_end=True)
        self.save()

    def _validate_if_due(self, at_end: bool = False) -> None:
        if self.validation is None or self.validated_at == self.tokens:
            return
        every = self.validation.every_tokens
        if at_end or self.validated_at < 0 or self.tokens // every > self.validated_at // every:
            self.validated_at = self.tokens
            self._append("curve.jsonl", self.validate())

    def _append(self, name: str, line: dict[str, Any]) -> None:
        """A resumed run repeats the lines since its checkpoint: the last of a step counts."""
        if self.processes.is_main:
            with (self.run / name).open("a") as file:
                file.write(json.dumps(line) + "\n")
