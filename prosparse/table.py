"""The comparison of recipes, after ProSparse's main table: task scores and sparsity, a row a model.

The dense model stands first. A ReLU model gets two rows: with the threshold it was trained with
(name and `*`, as in the paper), and with the largest one that the validation documents allow.
Rows are stored as they are finished and are not measured again while model, documents, tasks and
settings stay what they were.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from model_store import DEFAULT_MODEL, resolve_model
from predictor.files import sha256_file, write_json
from predictor.thresholds import config_value

from .evaluate import Allowance, common_prefix, compare, search_threshold
from .modeling import Llama
from .table_markdown import markdown
from .task import Task, fingerprint
from .task_sets import SEED
from .tasks import mean_score, run_tasks

RESULT_FILE = "table.json"
Documents = list[list[int]]
Advance = Callable[[str], None]  # told what has just been done


@dataclass(frozen=True)
class Run:
    """A model to compare; a training run's folder also knows recipe and tokens."""

    name: str
    model: Path
    folder: Path | None = None
    language_loss: str | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Protocol:
    """What all rows share. Sets: "chats", "texts". Without validation, no threshold shift."""

    sets: dict[str, Documents]
    validation: Documents
    max_kl_increase: float
    candidates: tuple[float, ...]
    tasks: list[Task]

    def __post_init__(self) -> None:
        for name in self.sets:
            if self.scored(name) == 0:
                raise ValueError(f"no document among the {name} is longer than their opening")
        if self.validation and max(map(len, self.validation)) <= common_prefix(self.validation):
            raise ValueError("no validation document is longer than their opening")

    def skip(self, name: str) -> int:
        """Tokens at the start of each document that are context only: the chats' opening."""
        return common_prefix(self.sets[name]) if name == "chats" else 1

    def scored(self, name: str) -> int:
        """How many documents of a set are long enough."""
        skip = self.skip(name)
        return sum(len(document) > skip for document in self.sets[name])

    @property
    def steps(self) -> int:
        """How often `Advance` is called for one measured row."""
        return sum(self.scored(name) for name in self.sets) + len(self.tasks)

    def describe(self) -> dict[str, Any]:
        """For the result file: enough to see whether two results may be compared."""
        return {
            "sets": {
                name: {"documents": len(documents), "skip": self.skip(name), "key": key(documents)}
                for name, documents in self.sets.items()
            },
            "validation": {"documents": len(self.validation), "key": key(self.validation)},
            "max_kl_increase": self.max_kl_increase,
            "candidates": list(self.candidates),
            "tasks": {
                "names": [task.name for task in self.tasks],
                "sources": {task.name: task.source for task in self.tasks},
                "chance": {task.name: task.chance for task in self.tasks},
                "items": fingerprint(self.tasks),
                "seed": SEED,
                # doctests and docstrings are those of this version
                "python": platform.python_version(),
            },
        }


def key(value: Any) -> str:
    """A short name of a JSON value, equal for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def model_key(folder: Path) -> str:
    """Of everything that a model's numbers depend on: weights, shape and activation, tokenizer."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = [folder / name for name in names if (folder / name).is_file()]
    return key([[f.name, sha256_file(f)] for f in [*files, *sorted(folder.glob("*.safetensors"))]])


def read_run(text: str) -> Run:
    """A run folder, a model folder, or a model name. ValueError for a run that is not finished."""
    if text == DEFAULT_MODEL:
        # not the run of the recipe of this name
        return Run(f"shipped {text}", resolve_model(text))
    folder = Path(text)
    recipe = folder / "config.json"
    if not (folder.is_dir() and recipe.is_file()):
        return Run(folder.name, resolve_model(text))
    values = json.loads(recipe.read_text(encoding="utf-8"))
    name = folder.resolve().name
    if "model_type" in values:
        return Run(name, folder)
    if not (folder / "model" / "model.safetensors").is_file():
        raise ValueError(
            f"{folder} holds no model yet: let `hotneuron prosparse train --out {folder}` finish"
        )
    log = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    tokens = json.loads(log[-1])["tokens"]
    # runs from before the setting existed all distilled
    loss = values.get("language_loss", "distillation")
    return Run(name, folder / "model", folder, loss, tokens)


class Comparison:
    """Owns table.json: the rows measured so far, each under the key of what it stands on."""

    def __init__(
        self,
        protocol: Protocol,
        dense: Run,
        load: Callable[[Path], Llama],
        tokenizer: Any,
        out: Path,
        facts: dict[str, Any],
    ) -> None:
        self.protocol, self.dense, self.load = protocol, dense, load
        self.tokenizer, self.out, self.facts = tokenizer, out, facts
        self.teacher = load(dense.model)
        self.method = protocol.describe() | {"dense": model_key(dense.model)}
        self.method_key = key(self.method)
        self.known: dict[str, dict[str, Any]] = {}
        if (file := out / RESULT_FILE).is_file():
            stored = json.loads(file.read_text(encoding="utf-8"))
            self.known = {row["key"]: row for row in stored["rows"] + stored["other_rows"]}
        self.rows: list[dict[str, Any]] = []

    def add(self, run: Run, advance: Advance = lambda done: None) -> None:
        """The run's rows: measured now, or those already in the file."""
        name = model_key(run.model)
        student = cache(lambda: self.teacher if run is self.dense else self.load(run.model))
        trained = self._keep(
            run,
            key([self.method_key, name, "as trained"]),
            lambda: self._as_trained(student(), advance),
        )
        if trained["before_shift"]:
            self._keep(
                run,
                key([self.method_key, name, "shifted"]),
                lambda: self._shifted(student(), trained, advance),
            )

    def _keep(
        self, run: Run, row_key: str, measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The row under this key, measured only if it is not there; what names it is the run's."""
        row = self.known.get(row_key) or measure()
        named = {
            "name": run.name + ("*" if row["before_shift"] else ""),
            "key": row_key,
            "language_loss": run.language_loss,
            "tokens": run.tokens,
        }
        self.known[row_key] = named | {k: v for k, v in row.items() if k not in named}
        self.rows.append(self.known[row_key])
        self.save([])
        return self.known[row_key]

    def _as_trained(self, student: Llama, advance: Advance) -> dict[str, Any]:
        # the shift of shifted ReLU is no threshold; thresholds by layer come from a search already
        shifts = (
            bool(self.protocol.validation)
            and student.shape.hidden_act == "relu"
            and len(set(student.shape.thresholds)) == 1
        )
        settings = {"threshold": config_value(student.shape.thresholds), "before_shift": shifts}
        return settings | self._measure(student, advance)

    def _shifted(self, student: Llama, trained: dict[str, Any], advance: Advance) -> dict[str, Any]:
        """Under the largest threshold within the bound, which may be the one trained with."""
        p, own = self.protocol, float(trained["threshold"])
        best, tried = search_threshold(
            student,
            self.teacher,
            p.validation,
            Allowance(p.max_kl_increase),
            [own, *(value for value in p.candidates if value > own)],
            common_prefix(p.validation),
        )
        search = [{"threshold": t, "sparsity": q.sparsity, "kl": q.kl} for t, q in tried]
        measured = dict(trained) if best == own else self._measure(student, advance)
        return measured | {"threshold": best, "before_shift": False, "search": search}

    def _measure(self, student: Llama, advance: Advance) -> dict[str, Any]:
        p = self.protocol
        sets = {
            name: compare(
                student, self.teacher, documents, p.skip(name), partial(advance, name)
            ).as_dict()
            for name, documents in p.sets.items()
        }
        scores = run_tasks(student, self.tokenizer, p.tasks, lambda score: advance(score.task))
        return {
            "activation": student.shape.hidden_act,
            "sets": sets,
            "tasks": {score.task: score.as_dict() for score in scores},
            "task_mean": mean_score(scores),
            "measured": self.facts,
        }

    def save(self, curves: Sequence[dict[str, Any]]) -> None:
        """Rows of this call in order; others that the file has stay, as they may be asked for."""
        used = {row["key"] for row in self.rows}
        others = [row for row_key, row in self.known.items() if row_key not in used]
        result = {
            "method": self.method,
            "rows": self.rows,
            "curves": list(curves),
            "other_rows": others,
        }
        write_json(self.out / RESULT_FILE, result)

    def markdown(self, curves: Sequence[dict[str, Any]]) -> str:
        return markdown(self.method, self.rows, curves)
