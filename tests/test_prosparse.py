"""prosparse: schedule, student, training loop, threshold search, corpus."""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import prosparse.corpus
import prosparse.train
from prosparse.corpus import (
    ChatSampling,
    RowOrder,
    encode_document,
    pack_rows,
    read_documents,
    read_questions,
    template_parts,
    write_chats,
)
from prosparse.decoding import DecodeCache, decode_step
from prosparse.errors import BadInput
from prosparse.evaluate import Allowance, common_prefix, compare, search_threshold
from prosparse.export import write_adapter
from prosparse.lora import Student
from prosparse.modeling import (
    Llama,
    LlamaShape,
    Merged,
    activate,
    load_state,
    project,
)
from prosparse.recipe import TrainConfig
from prosparse.schedule import Schedule, Stage, Steering
from prosparse.train import Trainer, Validation

MakeModel = Callable[..., Path]
RECIPES = sorted((Path(prosparse.corpus.__file__).parent / "recipes").glob("*.toml"))


@pytest.fixture(scope="module")
def dense_dir(make_tiny_model: MakeModel) -> Path:
    return make_tiny_model(hidden_act="silu")


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def tiny_config(**overrides: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "total_tokens": 40 * 4 * 32,
        "row_length": 32,
        "rows_per_step": 4,
        "ffn_rank": 8,
        "attention_rank": 4,
        "kl_positions": 1.0,
        "hidden_every": 2,
        "peak_lr": 5e-3,
        "stages": (Stage(0.1, 0.0), Stage(0.2, 0.1), Stage(1.0, 0.5)),
    }
    return TrainConfig(**(values | overrides))


def make_trainer(
    dense: Path, run: Path, validation: Validation | None = None, **overrides: Any
) -> Trainer:
    rows = torch.randint(0, 256, (24, 32), generator=torch.Generator().manual_seed(1))
    config = tiny_config(**overrides)
    return Trainer(
        dense, rows.int(), None, config, run, compile_blocks=False, validation=validation
    )


class TestSchedule:
    def test_values_of_algorithm_1(self) -> None:
        schedule = Schedule((Stage(0.2, 1.0), Stage(0.6, 3.0), Stage(1.0, 3.0, 0.1)))
        assert schedule.l1_weight(0.0) == schedule.l1_weight(0.2) == 1.0
        assert schedule.l1_weight(0.4) == pytest.approx(2.0)  # half-way up the half sine
        eta = 0.5 * (math.sin(-math.pi / 2 + math.pi * 0.25) + 1)
        assert schedule.l1_weight(0.3) == pytest.approx(1 + eta * 2)
        assert schedule.l1_weight(0.6) == schedule.l1_weight(0.8) == pytest.approx(3.0)
        assert schedule.threshold(0.5) == 0.0
        assert schedule.threshold(0.7) == 0.1

    @pytest.mark.parametrize(
        "stages",
        [(), (Stage(0.5, 1.0),), (Stage(0.5, 1.0), Stage(1.0, 0.5)), (Stage(1.0, -1.0),)],
        ids=["none", "ends early", "falls", "negative"],
    )
    def test_refuses(self, stages: tuple[Stage, ...]) -> None:
        with pytest.raises(ValueError, match="must"):
            Schedule(stages)

    def test_steering_pushes_dense_layers_harder(self) -> None:
        steering = Steering(target=0.85, gain=6.0)
        factor_L = steering.factor_L(torch.tensor([0.7, 0.85, 0.95]), tokens=1000)
        assert factor_L[0] > 1 > factor_L[2]
        assert factor_L[1] == 1


class TestModel:
    @pytest.mark.parametrize("act", ["silu", "relu"])
    def test_logits_equal_transformers(self, make_tiny_model: MakeModel, act: str) -> None:
        from transformers import LlamaForCausalLM

        folder = make_tiny_model(hidden_act=act)
        ids = torch.randint(0, 256, (2, 17))
        reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            expected = reference(ids).logits
        model = Llama(folder, dtype=torch.float32)
        stream, _, _ = model.hidden(ids)
        torch.testing.assert_close(model.logits(stream[-1]), expected, rtol=1e-4, atol=1e-4)

    def test_decoding_equals_the_whole_row(self, dense_dir: Path) -> None:
        model = Llama(dense_dir, dtype=torch.float32)
        ids = torch.randint(0, 256, (3, 9))
        cache = DecodeCache(model, 3, 9)
        steps = [decode_step(model, cache, ids[:, i]) for i in range(9)]
        whole = model.logits(model.hidden(ids)[0][-1])
        torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-4, atol=1e-4)

    def test_fatrelu_passes_only_above_the_threshold(self) -> None:
        gate = torch.tensor([-1.0, 0.0, 0.1, 0.1001, 2.0])
        kept = activate(gate, "relu", 0.1)
        assert torch.equal(kept, torch.tensor([0.0, 0.0, 0.0, 0.1001, 2.0]))

    def test_shifted_relu_starts_at_zero(self) -> None:
        gate = torch.tensor([-1.0, 0.0, 0.25, 0.5, 2.0])
        assert torch.equal(
            activate(gate, "shifted_relu", 0.25), torch.tensor([0.0, 0.0, 0.0, 0.25, 1.75])
        )

    def test_refuses_an_unknown_activation(self, make_tiny_model: MakeModel) -> None:
        with pytest.raises(ValueError, match="hidden_act is 'gelu'"):
            LlamaShape.from_folder(make_tiny_model(hidden_act="gelu"))

    def test_refuses_another_family(self, make_tiny_model: MakeModel) -> None:
        with pytest.raises(ValueError, match="model_type"):
            LlamaShape.from_folder(make_tiny_model(model_type="mistral"))


class TestStudent:
    def test_starts_as_the_dense_model(self, dense_dir: Path) -> None:
        state = load_state(dense_dir)
        merged = Student(state, LlamaShape.from_folder(dense_dir), 8, 4).merged_state(state)
        assert merged.keys() == state.keys()
        assert all(torch.equal(merged[name], state[name]) for name in state)

    def test_adapter_is_one_that_peft_reads(self, dense_dir: Path, tmp_path: Path) -> None:
        from peft import PeftModel
        from transformers import LlamaForCausalLM

        state = load_state(dense_dir)
        student = Student(state, LlamaShape.from_folder(dense_dir), 8, 4)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for param in student.params.values():
                param.add_(torch.randn(param.shape, generator=generator) * 0.05)
        write_adapter(tmp_path / "adapter", *student.adapter("dense"))
        base = LlamaForCausalLM.from_pretrained(dense_dir, dtype=torch.float32)
        merged = PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
        ours = student.merged_state(state)
        for name, tensor in merged.state_dict().items():
            if name in ours:
                torch.testing.assert_close(
                    ours[name].float(), tensor.float(), rtol=2**-7, atol=2**-9
                )

        again = Student(state, student.shape, 8, 4)
        again.load_adapter(tmp_path / "adapter")
        assert all(torch.equal(again.merged_state(state)[k], v) for k, v in ours.items())


class TestTraining:
    def test_without_l1_the_student_follows(self, dense_dir: Path, tmp_path: Path) -> None:
        trainer = make_trainer(dense_dir, tmp_path, stages=(Stage(1.0, 0.0),))
        lines: list[dict[str, Any]] = []
        trainer.run_to_end(lines.append)
        assert lines[0]["sparsity"] == pytest.approx(0.5, abs=0.1)  # random signs
        assert lines[-1]["kl"] < 0.5 * lines[0]["kl"]
        assert len((tmp_path / "log.jsonl").read_text().splitlines()) == len(lines) == 40

    def test_l1_makes_it_sparser(self, dense_dir: Path, tmp_path: Path) -> None:
        stages = (Stage(0.1, 0.0), Stage(0.3, 1.0), Stage(1.0, 3.0))
        trainer = make_trainer(dense_dir, tmp_path, stages=stages)
        lines: list[dict[str, Any]] = []
        trainer.run_to_end(lines.append)
        assert lines[-1]["sparsity"] > lines[0]["sparsity"] + 0.05
        assert lines[-1]["l1"] < 0.75

    def test_resume_continues_bit_for_bit(self, dense_dir: Path, tmp_path: Path) -> None:
        straight = make_trainer(dense_dir, tmp_path / "a", total_tokens=6 * 128)
        straight.run_to_end(lambda line: None)
        broken = make_trainer(dense_dir, tmp_path / "b", total_tokens=6 * 128)
        broken.run_to_end(lambda line: None, should_stop=lambda: broken.step == 3)
        assert broken.step == 3
        resumed = make_trainer(dense_dir, tmp_path / "b", total_tokens=6 * 128)
        assert resumed.resume()
        resumed.run_to_end(lambda line: None)
        for name, param in straight.student.params.items():
            assert torch.equal(param, resumed.student.params[name]), name

    def test_full_parameter_training(self, dense_dir: Path, tmp_path: Path) -> None:
        whole = {"ffn_rank": None, "attention_rank": None, "peak_lr": 1e-3}
        trainer = make_trainer(dense_dir, tmp_path, **whole)
        first = trainer.train_step()["kl"]
        for _ in range(12):
            last = trainer.train_step()["kl"]
        assert last < first
        assert not trainer.student.is_lora

    def test_written_model_has_the_students_logits(self, dense_dir: Path, tmp_path: Path) -> None:
        from transformers import LlamaForCausalLM

        trainer = make_trainer(dense_dir, tmp_path)
        for _ in range(3):
            trainer.train_step()
        trainer.write_model(tmp_path / "model")
        config = json.loads((tmp_path / "model" / "config.json").read_text())
        assert config["hidden_act"] == "relu"
        assert config["hidden_act_param"] == 0.0
        ids = torch.randint(0, 256, (1, 12))
        ours = Llama(tmp_path / "model", dtype=torch.float32)
        theirs = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
        with torch.no_grad():
            torch.testing.assert_close(
                ours.logits(ours.hidden(ids)[0][-1]), theirs(ids).logits, rtol=1e-4, atol=1e-4
            )

    def test_unknown_recipe_settings_are_named(self, tmp_path: Path) -> None:
        (tmp_path / "r.toml").write_text("learning_rate = 1.0\n")
        with pytest.raises(ValueError, match="learning_rate"):
            TrainConfig.from_toml(tmp_path / "r.toml")

    def test_default_recipe_is_the_default_config(self) -> None:
        import prosparse

        recipe = Path(prosparse.__file__).parent / "recipes" / "default.toml"
        config = TrainConfig.from_toml(recipe)
        assert dataclasses.asdict(config) == dataclasses.asdict(TrainConfig())

    @pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
    def test_every_recipe_trains(self, dense_dir: Path, tmp_path: Path, recipe: Path) -> None:
        config = TrainConfig.from_toml(recipe)
        small = {name: getattr(tiny_config(), name) for name in ("row_length", "ffn_rank")}
        config = dataclasses.replace(config, total_tokens=3 * 4 * 32, rows_per_step=4, **small)
        rows = torch.randint(0, 256, (24, 32), generator=torch.Generator().manual_seed(1)).int()
        trainer = Trainer(dense_dir, rows, None, config, tmp_path, compile_blocks=False)
        lines: list[dict[str, Any]] = []
        trainer.run_to_end(lines.append)
        assert [line["l1_weight"] > 0 for line in lines[1:]].count(True) in (0, 2)
        trainer.write_model(tmp_path / "model")
        assert LlamaShape.from_folder(tmp_path / "model").hidden_act == config.activation

    def test_next_token_loss(self, dense_dir: Path, tmp_path: Path) -> None:
        """The paper's language loss; without hidden states to match, no teacher is asked."""
        own = {"language_loss": "next-token", "hidden_weight": 0.0, "stages": (Stage(1.0, 0.0),)}
        trainer = make_trainer(dense_dir, tmp_path, **own)
        trainer.teacher.hidden = None  # type: ignore[assignment, method-assign]
        lines: list[dict[str, Any]] = []
        trainer.run_to_end(lines.append)
        assert lines[-1]["nll"] < lines[0]["nll"] - 0.3
        assert "kl" not in lines[0]
        with pytest.raises(ValueError, match="language_loss must be one of"):
            tiny_config(language_loss="hinge")

    def test_rows_do_not_depend_on_the_order_of_asking(self) -> None:
        rows = torch.arange(40).view(20, 2)
        one, two = RowOrder(rows, rows + 100, 0.5, 7), RowOrder(rows, rows + 100, 0.5, 7)
        assert torch.equal(one.next_rows(12), torch.cat([two.next_rows(4), two.next_rows(8)]))

    def test_the_curve_is_what_evaluate_says(self, dense_dir: Path, tmp_path: Path) -> None:
        documents = [list(range(3, 40)), list(range(20, 90))]
        trainer = make_trainer(
            dense_dir,
            tmp_path,
            validation=Validation(documents, every_tokens=512),
            total_tokens=1280,
        )
        trainer.run_to_end(lambda line: None)
        points = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
        assert [point["tokens"] for point in points] == [0, 512, 1024, 1280]
        trainer.write_model(tmp_path / "model")
        quality = compare(Llama(tmp_path / "model"), Llama(dense_dir), documents)
        assert points[-1]["kl"] == quality.kl
        assert points[-1]["sparsity"] == quality.sparsity
        assert points[-1]["kl"] < points[0]["kl"]

    def test_a_run_reaches_its_target_sparsity(self, dense_dir: Path, tmp_path: Path) -> None:
        """Two targets from one recipe; the weight that leads there is found on the way."""
        reached = {}
        for target in (0.6, 0.75):
            trainer = make_trainer(
                dense_dir,
                tmp_path / str(target),
                total_tokens=160 * 128,
                peak_lr=3e-3,
                stages=(Stage(1.0, 1.0),),
                target_sparsity=target,
                steer_by="mean",
                steer_gain=20.0,
                steer_rate=400.0,
            )
            trainer.run_to_end(lambda line: None)
            reached[target] = float(trainer.sparsity_L.mean())
        assert reached == {target: pytest.approx(target, abs=0.02) for target in reached}
        with pytest.raises(ValueError, match="steer_by must be one of layer, mean"):
            tiny_config(steer_by="token")


TRAIN_ONE_OF_TWO = """
import sys, torch
from pathlib import Path
from prosparse.parallel import Processes
from prosparse.schedule import Stage
from prosparse.recipe import TrainConfig
from prosparse.train import Trainer
torch.set_num_threads(1)
dense, run, rows_per_step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
config = TrainConfig(
    total_tokens=6 * 128, row_length=32, rows_per_step=rows_per_step, ffn_rank=8, attention_rank=4,
    kl_positions=1.0, hidden_every=2, stages=(Stage(1.0, 0.5),),
)
rows = torch.randint(0, 256, (64, 32), generator=torch.Generator().manual_seed(1)).int()
processes = Processes.from_launcher("cpu")
trainer = Trainer(
    dense, rows, None, config, run, compile_blocks=False, processes=processes
)
assert trainer.resume() == (run / "checkpoint.pt").exists()
stop_at = int(sys.argv[4])
trainer.run_to_end(lambda line: None, should_stop=lambda: trainer.step == stop_at)
trainer.write_adapter(run / "adapter", "dense")
processes.leave()
"""


class TestSeveralProcesses:
    def launch(self, count: int, *arguments: object) -> None:
        """As the shipped accelerate config starts it."""
        config = Path(prosparse.train.__file__).parent / "recipes" / "accelerate-fsdp.yaml"
        script = arguments[0]
        command = [sys.executable]
        if count > 1:
            command += ["-m", "accelerate.commands.launch", "--config_file", str(config)]
            command += ["--num_processes", str(count), "--main_process_port", "0"]
        command += [str(script), *map(str, arguments[1:])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    def test_two_sharded_processes_train_as_one(self, dense_dir: Path, tmp_path: Path) -> None:
        """Same rows, same adapter, but for the order in which gradients are added; the sharded run
        is stopped and resumed on the way."""
        script = tmp_path / "train.py"
        script.write_text(TRAIN_ONE_OF_TWO)
        self.launch(1, script, dense_dir, tmp_path / "one", 4, -1)
        self.launch(2, script, dense_dir, tmp_path / "two", 2, 3)
        self.launch(2, script, dense_dir, tmp_path / "two", 2, -1)
        logs = []
        for run in ("one", "two"):
            lines = (tmp_path / run / "log.jsonl").read_text().splitlines()
            logs.append([json.loads(line) for line in lines])
        assert [line["tokens"] for line in logs[0]] == [line["tokens"] for line in logs[1]]
        for one, two in zip(*logs, strict=True):
            assert two["kl"] == pytest.approx(one["kl"], rel=0.02)
            assert two["sparsity"] == pytest.approx(one["sparsity"], abs=0.01)
        adapters = [
            load_file(tmp_path / run / "adapter" / "adapter_model.safetensors")
            for run in ("one", "two")
        ]
        assert adapters[0].keys() == adapters[1].keys()
        moved = 0
        for name, tensor in adapters[0].items():
            if name.endswith("lora_B.weight"):  # all of it was learned: it started at zero
                other = adapters[1][name].float()
                assert torch.nn.functional.cosine_similarity(
                    tensor.float().flatten(), other.flatten(), dim=0
                ) > 0.95, name  # fmt: skip
                moved += 1
        assert moved


class TestEvaluation:
    def test_a_model_agrees_with_itself(self, dense_dir: Path) -> None:
        model = Llama(dense_dir, dtype=torch.float32)
        documents = [list(range(40)), list(range(20, 90))]
        quality = compare(model, model, documents, skip=3)
        assert quality.kl == pytest.approx(0, abs=1e-6)
        assert quality.top1_agreement == 1
        assert quality.perplexity == quality.teacher_perplexity
        assert quality.tokens == 37 + 67
        assert quality.sparsity == 0  # SiLU has no zeros

    def test_threshold_search_stays_within_the_bound(
        self, dense_dir: Path, make_tiny_model: MakeModel
    ) -> None:
        teacher = Llama(dense_dir, dtype=torch.float32)
        student = Llama(make_tiny_model(), dtype=torch.float32)
        documents = [list(range(60))]
        free, tried = search_threshold(student, teacher, documents, Allowance(1e9), [0.0, 0.2, 0.4])
        assert free == 0.4
        sparsities = [quality.sparsity for _, quality in tried]
        assert sparsities == sorted(sparsities)
        assert sparsities[-1] > sparsities[0]
        strict, tried = search_threshold(
            student, teacher, documents, Allowance(-1.0), [0.0, 0.2, 0.4]
        )
        assert strict == 0.0
        assert len(tried) == 1

    def test_common_prefix(self) -> None:
        assert common_prefix([[1, 2, 3, 4], [1, 2, 5]]) == 2
        assert common_prefix([[1, 2, 3]]) == 1
        assert common_prefix([[1], [2]]) == 1


class TestMergedLinear:
    def test_gradients_are_those_through_the_merged_weight(self) -> None:
        generator = torch.Generator().manual_seed(4)

        def matrix(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_()

        x, frozen = matrix(2, 5, 12), [matrix(7, 12).detach(), matrix(9, 12).detach()]
        factors = [matrix(3, 12), matrix(7, 3), matrix(4, 12), matrix(9, 4)]
        inputs = [x, *factors]
        merged = torch.cat(
            [w + b @ a for w, a, b in zip(frozen, factors[::2], factors[1::2], strict=True)]
        )
        grad = matrix(2, 5, 16).detach()
        wanted = torch.autograd.grad(x @ merged.T, inputs, grad)
        got = torch.autograd.grad(project(x, Merged(merged.detach(), tuple(factors))), inputs, grad)
        for ours, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)


class TestCorpus:
    def test_chats_are_written_and_repeatable(self, dense_dir: Path) -> None:
        model, tokenizer = Llama(dense_dir), tokenizer_of(dense_dir)
        sampling = ChatSampling(
            batch=6, temperature=9.0, top_k=250, max_question_tokens=300, max_answer_tokens=12
        )
        chats = write_chats(model, tokenizer, sampling, 0)
        assert chats
        assert chats == write_chats(model, tokenizer, sampling, 0)
        assert chats != write_chats(model, tokenizer, sampling, 1)
        for chat in chats:
            assert [m["role"] for m in chat["messages"]] == ["user", "assistant"]
            assert chat["tokens"] <= 312

    def test_given_questions_are_answered(self, dense_dir: Path, tmp_path: Path) -> None:
        model, tokenizer = Llama(dense_dir), tokenizer_of(dense_dir)
        file = tmp_path / "questions.txt"
        file.write_text("What is rain?\n\nName a color.\n")
        questions = read_questions(file, seed=1)
        assert sorted(questions) == ["Name a color.", "What is rain?"]
        chats = write_chats(model, tokenizer, ChatSampling(max_answer_tokens=8), 0, questions)
        assert {chat["messages"][0]["content"] for chat in chats} <= set(questions)
        assert len(chats) == 2

    def test_question_groups(self, tmp_path: Path) -> None:
        packaged = read_questions(Path(prosparse.corpus.__file__).with_name("questions.toml"), 0)
        assert "What is your name?" in packaged
        assert not [question for question in packaged if "France" in question]
        assert packaged != read_questions(
            Path(prosparse.corpus.__file__).with_name("questions.toml"), 1
        )
        (tmp_path / "empty.txt").write_text("\n")
        with pytest.raises(ValueError, match="holds no question"):
            read_questions(tmp_path / "empty.txt", 0)

    def test_template_parts(self, dense_dir: Path) -> None:
        tokenizer = tokenizer_of(dense_dir)
        before, between, end_id = template_parts(tokenizer)
        assert tokenizer.decode(before) == "<|im_start|>user\n"
        assert tokenizer.decode(between) == "\n<|im_start|>assistant\n"
        assert end_id == tokenizer.eos_token_id

    def test_a_cut_answer_is_not_taught_as_an_end(self, dense_dir: Path) -> None:
        tokenizer = tokenizer_of(dense_dir)
        chat = {
            "messages": [
                {"role": "user", "content": "why"},
                {"role": "assistant", "content": "because of"},
            ]
        }
        whole = encode_document(chat, tokenizer)
        cut = encode_document({**chat, "complete": False}, tokenizer)
        assert tokenizer.decode(cut).endswith("because of")
        assert tokenizer.eos_token_id in whole[len(cut) :]

    def test_documents_of_files_and_folders(self, tmp_path: Path) -> None:
        (tmp_path / "a.md").write_text("hello")
        (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"messages": []}\n')
        (tmp_path / "c.bin").write_bytes(b"\0")
        assert list(read_documents([tmp_path])) == [
            {"text": "hello"},
            {"text": "x"},
            {"messages": []},
        ]
        (tmp_path / "b.jsonl").write_text('{"other": 1}\n')
        with pytest.raises(ValueError, match=r"b\.jsonl:1"):
            list(read_documents([tmp_path]))
        with pytest.raises(BadInput, match="nowhere"):
            list(read_documents([tmp_path / "nowhere"]))

    def test_rows_begin_where_documents_begin(self) -> None:
        documents = [[start] + [7] * 8 + [0] for start in range(100, 110)]
        rows = pack_rows(documents, length=16, end_id=0, seed=0)
        assert all(100 <= int(row[0]) < 110 for row in rows)
        seen_whole = {int(row[0]) for row in rows}
        assert len(seen_whole) >= 5
        with pytest.raises(ValueError, match="do not fill one row"):
            pack_rows([[1] * 9], length=64, end_id=0, seed=0)


class TestTrainCommand:
    """`hotneuron prosparse train` from files to model folder."""

    def train(self, dense: Path, out: Path, *arguments: object) -> Any:
        from typer.testing import CliRunner

        from prosparse.commands import app

        command = ["train", str(dense), "--out", str(out), "--no-compile", *map(str, arguments)]
        return CliRunner().invoke(app, command)

    def test_from_chats_to_a_model(self, dense_dir: Path, tmp_path: Path) -> None:
        chats = tmp_path / "chats.jsonl"
        asked = [{"role": "user", "content": f"{n} more?"} for n in range(40)]
        answered = [{"role": "assistant", "content": f"{n} less"} for n in range(40)]
        lines = [json.dumps({"messages": turns}) for turns in zip(asked, answered, strict=True)]
        chats.write_text("\n".join(lines))
        recipe = tmp_path / "small.toml"
        recipe.write_text(
            "row_length = 32\nrows_per_step = 2\nffn_rank = 8\nattention_rank = 4\n"
            "[[stages]]\nuntil = 1.0\npeak = 0.1\nthreshold = 0.1\n"
        )
        options = ("--config", recipe, "--tokens", 192, "--data", chats, "--validation", chats)
        done = self.train(dense_dir, tmp_path / "run", *options, "--validate-every", 64)
        assert done.exit_code == 0, done.output
        assert LlamaShape.from_folder(tmp_path / "run" / "model").hidden_act == "relu"
        points = (tmp_path / "run" / "curve.jsonl").read_text().splitlines()
        assert [json.loads(point)["tokens"] for point in points] == [0, 64, 128, 192]
        again = self.train(
            dense_dir, tmp_path / "next", *options, "--start-from", tmp_path / "run" / "adapter"
        )
        assert again.exit_code == 0, again.output
        start = json.loads((tmp_path / "next" / "curve.jsonl").read_text().splitlines()[0])
        assert start["kl"] == pytest.approx(json.loads(points[-1])["kl"], rel=0.02)

    def test_what_it_cannot_start_from_is_named(self, dense_dir: Path, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("words " * 40)
        wrong = self.train(
            dense_dir, tmp_path / "run", "--data", text, "--start-from", tmp_path / "nowhere"
        )
        assert wrong.exit_code == 2
        assert "adapter" in wrong.output
        assert not (tmp_path / "run").exists()
        assert self.train(dense_dir, tmp_path / "run").exit_code == 2
